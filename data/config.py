"""Reads a checkpoint's config.json: the sizes of the decoder and of the tower, defaults filled in, nonsense refused.

    text, vision, top = read_sizes(folder, read_json(folder / "config.json"))

Left out: everything but LLaVA-1.5; whether the weights have these sizes is checked where they are loaded (model.py).
"""
import json

from data.files import BadInput

KNOWN = {"toy": None, "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf", "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf"}
# What LlamaConfig and CLIPVisionConfig assume where config.json is silent; the 7B's file leaves most of this out.
TEXT_DEFAULTS = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                     rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=2048, vocab_size=32000)
VISION_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                       image_size=224, patch_size=32)


def read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; is {path.parent} a checkpoint folder in the Hugging Face layout?") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{path}: not readable as JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: not a JSON object; download it again")
    return value


def read_sizes(folder, config):
    """config.json -> the decoder's sizes, the tower's, and the few facts of the whole. Raises BadInput on nonsense."""
    path = folder / "config.json"
    if "mm_vision_tower" in config or "mm_projector_type" in config:
        raise BadInput(f"{path}: a checkpoint in the original LLaVA layout; use the same model as {KNOWN['llava-1.5-7b']} "
                       f"or {KNOWN['llava-1.5-13b']}")
    if config.get("model_type") != "llava":
        raise BadInput(f"{path}: model_type is {config.get('model_type')!r}, not 'llava'; LLaVA-1.5 in the Hugging Face layout is needed")
    given_text, given_vision = config.get("text_config") or {}, config.get("vision_config") or {}
    rope = given_text.get("rope_parameters") or {} if isinstance(given_text, dict) else None  # newer files nest rope_theta
    if not all(isinstance(o, dict) for o in (given_text, given_vision, rope)):
        raise BadInput(f"{path}: text_config, vision_config and rope_parameters must be objects; download it again")
    text = TEXT_DEFAULTS | {k: v for k, v in (given_text | rope).items() if v is not None}
    text.setdefault("num_key_value_heads", text["num_attention_heads"])
    vision = VISION_DEFAULTS | given_vision | {"vision_feature_layer": config.get("vision_feature_layer", -2)} if given_vision \
        else {"hidden_size": 1024, "vision_feature_layer": config.get("vision_feature_layer", -2)}
    positive = [(text, k) for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                    "num_key_value_heads", "max_position_embeddings", "vocab_size")]
    positive += [(vision, k) for k in VISION_DEFAULTS if k in vision]
    for sizes, key in positive:
        if type(sizes[key]) is not int or not 0 < sizes[key] <= (1 << 10 if "layers" in key else 1 << 20):
            raise BadInput(f"{path}: {key} = {str(sizes[key])[:40]} is not a sensible size; download it again")
    for sizes, key in ((text, "rms_norm_eps"), (text, "rope_theta"), (vision, "layer_norm_eps")):
        if type(sizes.get(key, 1)) not in (int, float) or not 0 < sizes.get(key, 1) < 1e12:
            raise BadInput(f"{path}: {key} = {str(sizes[key])[:40]} is not a sensible number; download it again")
    text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
    wrong = (
        "hidden_act must be silu" if text.get("hidden_act", "silu") != "silu" else
        "attention_bias is not supported" if text.get("attention_bias") else
        "rope scaling is not supported" if text.get("rope_scaling") or text.get("rope_type", "default") != "default" else
        "num_attention_heads is not a multiple of num_key_value_heads" if text["num_attention_heads"] % text["num_key_value_heads"] else
        "head_dim must be a positive even number" if type(text["head_dim"]) is not int or text["head_dim"] < 2 or text["head_dim"] % 2 else
        "the tower's hidden_size is not a multiple of its heads"
        if given_vision and vision["hidden_size"] % vision["num_attention_heads"] else
        "image_size is smaller than patch_size" if given_vision and vision["image_size"] < vision["patch_size"] else
        "vision_feature_select_strategy must be default" if config.get("vision_feature_select_strategy", "default") != "default" else
        "projector_hidden_act must be gelu" if config.get("projector_hidden_act", "gelu") != "gelu" else
        "vision_feature_layer must be one layer" if type(vision["vision_feature_layer"]) is not int
        or not -vision.get("num_hidden_layers", 24) <= vision["vision_feature_layer"] <= vision.get("num_hidden_layers", 24) else None)
    if wrong:
        raise BadInput(f"{path}: {wrong}; this is not a checkpoint this program can run")
    top = dict(image_token=config.get("image_token_index", config.get("image_token_id", 32000)),
               projector_bias=config.get("multimodal_projector_bias", True),
               tied=bool(config.get("tie_word_embeddings", False)))
    return text, vision, top

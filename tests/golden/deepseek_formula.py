"""Tiny DeepSeek-VLs whose weights are integer formulas of their names, in the layout of deepseek-ai's checkpoints.

    write_checkpoint(folder, CONFIGS["hybrid"])     config.json, tokenizer.json, weights: a folder for --ckpt
    shapes(TRUE_CONFIGS["deepseek-vl-7b"])          every tensor of the real one: {name on the hub: shape}

The tokeniser (deepseek_tokenizer.json) is a small one of the real one's shape: the same chain of splits with fewer
letters, no token for the 13 bytes that UTF-8 never uses, the 13 letters and the special tokens added.
"""
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from formula import HERE, _block as block, weight

SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual content that the "
          "user provides, and assist the user with a variety of tasks using natural language.")
BOS, EOS, IMAGE = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<image_placeholder>"
TOKENIZER = HERE / "deepseek_tokenizer.json"
NEW_TOKENS = 16


def prompt(question, history=()):
    """The rendered prompt without BOS; history = ((question, answer), ...)."""
    turns = [f"{q}\n\nAssistant: {a}{EOS}" for q, a in history] + [f"{question}\n\nAssistant:"]
    return f"{SYSTEM}\n\nUser: {IMAGE}\n" + "User: ".join(turns)


def _tower(name, image_size, **sizes):
    return dict(model_name=name, image_size=image_size, select_feature="same", select_layer=-1, **sizes)


def _config(text, siglip, sam=None):
    params, kind, projector = siglip, "CLIPVisionTower", "mlp_gelu"
    if sam:
        params = dict(concat_type="tuple", high_res_cfg=sam, low_res_cfg=siglip)
        kind, projector = "HybridVisionTower", "low_high_hybrid_split_mlp_gelu"
    return dict(
        model_type="multi_modality", torch_dtype="float32", language_config=dict(model_type="llama", **text),
        vision_config=dict(model_type="vision", cls=kind, params=params),
        aligner_config=dict(cls="MlpProjector", model_type="aligner", params=dict(depth=2, projector_type=projector)))


# rms_norm_eps and rope_theta are never stated; the real ones' tower sizes hang on model_name alone
CONFIGS = {
    "siglip": _config(
        dict(vocab_size=413, hidden_size=60, intermediate_size=100, num_hidden_layers=4, num_attention_heads=5,
             num_key_value_heads=5, max_position_embeddings=512),
        _tower("siglip_large_patch16_384", 40, width=36, layers=3, heads=3, patch_size=8, mlp_ratio=3)),
    # 10 x 10 cells in windows of 4: two cells of padding at each end; SAM's own width, grid and neck
    "hybrid": _config(
        dict(vocab_size=409, hidden_size=72, intermediate_size=116, num_hidden_layers=5, num_attention_heads=6,
             max_position_embeddings=512),
        _tower("siglip_large_patch16_384", 36, width=40, layers=2, heads=5, patch_size=6, mlp_ratio=4),
        _tower("sam_b_downsample", 80, width=44, layers=5, heads=4, patch_size=8, window_size=4,
               prompt_embed_dim=10, global_attn_indexes=[1, 3], downsample_channels=[14, 18])),
}
TRUE_CONFIGS = {
    "deepseek-vl-1.3b": _config(
        dict(vocab_size=102400, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16,
             num_key_value_heads=16, max_position_embeddings=16384),
        _tower("siglip_large_patch16_384", 384)),
    "deepseek-vl-7b": _config(
        dict(vocab_size=102400, num_hidden_layers=30, max_position_embeddings=16384),
        _tower("siglip_large_patch16_384", 384), _tower("sam_b_downsample", 1024)),
}
TEXT_DEFAULTS = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
TOWER_DEFAULTS = {
    "siglip_large_patch16_384": dict(width=1024, layers=24, heads=16, patch_size=16, mlp_ratio=4),
    "sam_b_downsample": dict(width=768, layers=12, heads=12, patch_size=16, mlp_ratio=4, window_size=14,
                             prompt_embed_dim=256, global_attn_indexes=[2, 5, 8, 11], downsample_channels=[512, 1024]),
}
# region: a box of cells (x0, y0, x1, y1) and which of them are kept, row by row; rpn = (frozen layers B, RPN layers R)
CASES = {
    "deepseek_siglip": dict(config="siglip", picture=(157, 94, 1), question="What is written on the 12 signs?",
                            history=(), rpn=(1, 2), region=((1, 1, 4, 4), "110 111 010")),
    "deepseek_hybrid": dict(config="hybrid", picture=(61, 130, 2), question="Où est le chat, Führer? 猫",
                            history=(("What color is the car?", "dark blue, 40"),), rpn=(2, 3),
                            region=((2, 1, 4, 4), "10 11 11")),
}


def towers(config):
    """-> {prefix of the tensors' names: sizes}, SigLIP first; what config.json leaves out is filled in."""
    params = config["vision_config"]["params"]
    found = {"vision_tower.": params}
    if "low_res_cfg" in params:
        found = {f"vision_tower_{end}.vision_tower.": params[f"{end}_res_cfg"] for end in ("low", "high")}
    return {f"vision_model.{prefix}": TOWER_DEFAULTS[tower["model_name"]] | tower for prefix, tower in found.items()}


def with_bias(shapes):
    """{name of a layer: shape} -> {name of a tensor: shape}."""
    out = {}
    for name, shape in shapes.items():
        out |= {name + ".weight": shape, name + ".bias": shape[:1]}
    return out


def _tower_shapes(c):
    """-> {name: shape} of matrices and norms that have a bias, {whole name: shape} of what has none."""
    C, p, cells, sam = c["width"], c["patch_size"], c["image_size"] // c["patch_size"], "window_size" in c
    hidden, mlp = int(C * c["mlp_ratio"]), "mlp.lin" if sam else "mlp.fc"
    both, bare = {"patch_embed.proj": (C, 3, p, p)}, {}
    for n in range(c["layers"]):
        sizes = {"norm1": (C,), "norm2": (C,), "attn.qkv": (3 * C, C), "attn.proj": (C, C), mlp + "1": (hidden, C),
                 mlp + "2": (C, hidden)}
        both |= {f"blocks.{n}.{name}": shape for name, shape in sizes.items()}
        if sam:
            m = cells if n in c["global_attn_indexes"] else c["window_size"]
            bare |= {f"blocks.{n}.attn.rel_pos_{axis}": (2 * m - 1, C // c["heads"]) for axis in "hw"}
    if not sam:  # no pool is used
        return (both | {"norm": (C,), "attn_pool.q": (C, C)},
                {"pos_embed": (1, cells * cells, C), "attn_pool.latent": (1, 1, C)})
    E, (middle, last) = c["prompt_embed_dim"], c["downsample_channels"]
    bare |= {"pos_embed": (1, cells, cells, C), "hd_alpha_downsamples": (1,),
             "downsamples.0.weight": (middle, E, 3, 3), "downsamples.1.weight": (last, middle, 3, 3)}
    for neck in "neck", "neck_hd":
        both |= {neck + ".1": (E,), neck + ".3": (E,)}
        bare |= {neck + ".0.weight": (E, C, 1, 1), neck + ".2.weight": (E, E, 3, 3)}
    return both, bare


def shapes(config):
    """-> {name as deepseek-ai writes it: shape}, those that no answer needs included."""
    text = TEXT_DEFAULTS | config["language_config"]
    D, decoder = text["hidden_size"], "language_model.model."
    words = text["vocab_size"], D
    out = {"language_model.lm_head.weight": words, decoder + "embed_tokens.weight": words,
           decoder + "norm.weight": (D,)}
    for n in range(text["num_hidden_layers"]):
        out |= block(f"{decoder}layers.{n}", text)
    low, *high = towers(config).values()
    C, both = low["width"], {}
    sizes = {"layers.0": (D, C), "layers.2": (D, D)}
    for c in high:
        last = c["downsample_channels"][-1]
        sizes = {"high_up_proj": (D // 2, last), "low_up_proj": (D // 2, C), "layers.1": (D, D)}
        both = {"vision_model.high_layer_norm": (last,), "vision_model.low_layer_norm": (C,)}  # never used
    both |= {f"aligner.{name}": shape for name, shape in sizes.items()}
    for prefix, c in towers(config).items():
        more, bare = _tower_shapes(c)
        both |= {prefix + name: shape for name, shape in more.items()}
        out |= {prefix + name: shape for name, shape in bare.items()}
    return out | with_bias(both)


def tensors(config):
    """Every tensor by name; a norm that is not called one still lies around 1."""
    found = {name: weight(name, shape) for name, shape in shapes(config).items()}
    return {name: 1 + 0.3 * t if ".neck" in name and name.endswith("weight") and t.dim() == 1 else t
            for name, t in found.items()}


def write_checkpoint(folder, config):
    """A folder as deepseek-ai publishes it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    *_, c = towers(config).values()
    mean = [0.48145466, 0.4578275, 0.40821073] if "window_size" in c else [0.5] * 3
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(
        background_color=[int(255 * m) for m in mean], do_normalize=False, image_mean=mean, image_size=c["image_size"],
        image_processor_type="VLMImageProcessor", min_size=14, rescale_factor=0.00392156862745098)))
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    save_file(tensors(config), folder / "model.safetensors", metadata={"format": "pt"})
    return folder

"""Tiny Qwen2.5-VLs whose weights are formulas of name and index (see formula.py), and the published two's sizes.

    CONFIGS                                     config.json of Qwen/Qwen2.5-VL-{3B,7B}-Instruct, as far as it matters
    TINY, CASES                                 config.json of the tiny models; what the golden files hold
    shapes(config)                              {the hub's tensor name: shape}, of any of them
    tensors(config), rpn_tensors(config, R)     every tensor; those of an RPN of its own, in the released names
    write_checkpoint(folder, config, ...)       a folder, in either layout of config.json and spelling of tensor names

qwen_tokenizer.json is a small byte-level BPE with Qwen's splitting rule, made by make_golden_bpe.py.
"""
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from deepseek_formula import with_bias
from formula import HERE, SHORT, _block as block, weight

NEW_TOKENS = 20  # greedy tokens per case
SYSTEM = "You are a helpful assistant."


def prompt(question, history=()):
    """The chat template, rendered with one <|image_pad|>; history = ((question, answer), ...)."""
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    for q, a in history:
        text += f"{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n<|im_start|>user\n"
    return text + f"{question}<|im_end|>\n<|im_start|>assistant\n"


# ---- models

def _config(hidden, mlp, layers, heads, kv_heads, vocab, tied, sections, vision, first_special, **more):
    names = ("vision_start_token_id", "vision_end_token_id", "vision_token_id", "image_token_id", "video_token_id")
    specials = {name: first_special + 3 + n for n, name in enumerate(names)}
    return dict(model_type="qwen2_5_vl", bos_token_id=first_special, eos_token_id=first_special + 2, **specials,
                hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, rms_norm_eps=1e-6, rope_theta=1000000.0, max_position_embeddings=128000,
                max_window_layers=layers, sliding_window=32768, use_sliding_window=False, tie_word_embeddings=tied,
                rope_scaling=dict(type="mrope", mrope_section=sections), torch_dtype="bfloat16", vocab_size=vocab,
                hidden_act="silu", vision_config=vision) | more


def _vision(depth, hidden, mlp, heads, full, out):
    return dict(depth=depth, hidden_act="silu", hidden_size=hidden, intermediate_size=mlp, num_heads=heads, in_chans=3,
                out_hidden_size=out, patch_size=14, spatial_merge_size=2, spatial_patch_size=14, window_size=112,
                fullatt_block_indexes=full, tokens_per_second=2, temporal_patch_size=2)


PUBLISHED = dict(vision_start_token_id=151652, vision_end_token_id=151653, vision_token_id=151654,
                 image_token_id=151655, video_token_id=151656)
CONFIGS = {
    "qwen2.5-vl-3b": _config(2048, 11008, 36, 16, 2, 151936, True, [16, 24, 24],
                             _vision(32, 1280, 3420, 16, [7, 15, 23, 31], 2048), 151643, **PUBLISHED),
    "qwen2.5-vl-7b": _config(3584, 18944, 28, 28, 4, 152064, False, [16, 24, 24],
                             _vision(32, 1280, 3420, 16, [7, 15, 23, 31], 3584), 151643, **PUBLISHED),
}
PIECES = 400  # of qwen_tokenizer.json; the specials follow
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
            "<|image_pad|>", "<|video_pad|>"]
TINY = {
    # tied head, heads that share K/V in threes, an unusual epsilon and theta, uneven sections
    "tied": _config(72, 100, 4, 6, 2, 418, True, [1, 2, 3], _vision(4, 32, 52, 2, [1, 3], 72), PIECES,
                    rms_norm_eps=1e-3, rope_theta=3000.0, max_position_embeddings=600),
    # own head, a tower of one head, full attention in one block only
    "own": _config(64, 90, 5, 4, 2, 423, False, [2, 3, 3], _vision(3, 24, 40, 1, [1], 64), PIECES,
                   max_position_embeddings=600),
}

# budget = (min, max) pixels; rpn = (B, R); boxes: the second look's regions in cells; picture = (width, height, seed)
CASES = {
    "qwen_wide": dict(config="tied", picture=(157, 94, 1), question="What is this?" + SHORT, history=(), rpn=(1, 3),
                      budget=(9408, 23520), boxes=[(1, 0, 4, 2), (4, 1, 6, 3)]),
    "qwen_tall": dict(config="own", picture=(134, 171, 2), question="Où est le chat? 猫 12,345", history=(),
                      rpn=(2, 2), budget=(9408, 23520), boxes=[(0, 2, 3, 5)]),
    "qwen_turns": dict(config="own", picture=(300, 200, 3), question="And who is the author?",
                       history=(("What color is the car?" + SHORT, "dark blue, 40"),), rpn=(2, 3),
                       budget=(9408, 23520), boxes=[(2, 1, 6, 4)]),
    "qwen_small": dict(config="tied", picture=(30, 47, 4), question="Is the sign\n\n red?", history=(),
                       rpn=(2, 1), budget=(9408, 23520), boxes=[(0, 0, 2, 2)]),
}


# ---- numbers

def _weight(name, shape):
    """Larger projections than LLaVA's: with a tied head, small ones repeat the last token for ever."""
    return (1.3 if "_proj.weight" in name else 1) * weight(name, shape)


def _decoder_block(prefix, c):
    out = block(prefix, c)
    for name in "qkv":
        projection = f"{prefix}.self_attn.{name}_proj."
        out[projection + "bias"] = out[projection + "weight"][:1]
    return out


def shapes(c):
    v, h = c["vision_config"], c["hidden_size"]
    w, m = v["hidden_size"], v["intermediate_size"]
    out = {"model.embed_tokens.weight": (c["vocab_size"], h), "model.norm.weight": (h,),
           "visual.patch_embed.proj.weight": (w, 3, 2, 14, 14), "visual.merger.ln_q.weight": (w,)}
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (c["vocab_size"], h)
    for n in range(c["num_hidden_layers"]):
        out |= _decoder_block(f"model.layers.{n}", c)
    both = {"visual.merger.mlp.0": (4 * w, 4 * w), "visual.merger.mlp.2": (h, 4 * w)}
    for n in range(v["depth"]):
        layer = f"visual.blocks.{n}."
        out[layer + "norm1.weight"] = out[layer + "norm2.weight"] = (w,)
        both |= {layer + "attn.qkv": (3 * w, w), layer + "attn.proj": (w, w), layer + "mlp.gate_proj": (m, w),
                 layer + "mlp.up_proj": (m, w), layer + "mlp.down_proj": (w, m)}
    return out | with_bias(both)


def tensors(config):
    return {name: _weight(name, shape) for name, shape in shapes(config).items()}


def rpn_tensors(config, layers):
    """As released: whole blocks, and a norm and a head that nothing reads."""
    names = {"model.twig_norm.weight": (config["hidden_size"],), "twig_head.weight": (1, config["hidden_size"])}
    for n in range(layers):
        names |= _decoder_block(f"model.twig_layers.{n}", config)
    return {name: _weight(name, shape) for name, shape in names.items()}


# ---- checkpoints

def nested(config):
    """The same configuration as newer libraries nest it; the head's flag is only in text_config, as before 5.x."""
    above = ("model_type", "twig_K", "twig_T", "vision_config", "image_token_id", "video_token_id",
             "vision_start_token_id", "vision_end_token_id")
    top = {key: config[key] for key in above if key in config}
    text = {key: value for key, value in config.items() if key not in (*above, "rope_theta", "rope_scaling")}
    rope = dict(config["rope_scaling"], rope_theta=config["rope_theta"], rope_type="default")
    vision = dict(config["vision_config"], in_channels=3, rope_parameters=dict(rope_theta=10000.0, rope_type="axial"))
    del vision["in_chans"]
    return top | dict(text_config=text | dict(model_type="qwen2_5_vl_text", rope_parameters=rope), vision_config=vision)


def respell(name, spelling):
    """"hub": as published and as saved; "memory": as the library's modules are called."""
    if spelling == "hub" or not name.startswith(("visual.", "model.")):
        return name
    return "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)


def write_checkpoint(folder, config, spelling="hub", layout="flat", budget=(3136, 12845056), rpn=None):
    """rpn: (B, R) adds an RPN as the released checkpoint holds one."""
    folder, found = Path(folder), tensors(config)
    folder.mkdir(parents=True, exist_ok=True)
    if rpn:
        found |= rpn_tensors(config, rpn[1])
        config = config | dict(twig_K=rpn[0], twig_T=rpn[1])
    first = config["bos_token_id"]
    files = {
        "config.json": config if layout == "flat" else nested(config),
        "preprocessor_config.json": dict(
            patch_size=14, temporal_patch_size=2, merge_size=2,
            image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
            min_pixels=budget[0], max_pixels=budget[1]),
        "generation_config.json": dict(
            eos_token_id=[first + 2, first], do_sample=True, repetition_penalty=1.05, temperature=0.1)}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    shutil.copy(HERE / "qwen_tokenizer.json", folder / "tokenizer.json")
    found = {respell(name, spelling): tensor for name, tensor in found.items()}
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

"""Tiny DeepSeek-VLs whose weights are integer formulas of their names, in the layout of deepseek-ai's checkpoints.

    write_checkpoint(folder, CONFIGS["hybrid"])     config.json, tokenizer.json, weights: a folder for --ckpt
    shapes(TRUE_CONFIGS["deepseek-vl-7b"])          every tensor of the real one: {name on the hub: shape}

The tokeniser (deepseek_tokenizer.json) is a small one of the real one's shape: the same chain of splits with fewer
letters, no token for the 13 bytes that UTF-8 never uses, the 13 letters and the special tokens added.
"""
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from formula import HERE, weight

SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual content that the "
          "user provides, and assist the user with a variety of tasks using natural language.")
BOS, EOS, IMAGE = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<image_placeholder>"
TOKENIZER = HERE / "deepseek_tokenizer.json"
NEW_TOKENS = 16


def prompt(question, history=()):
    """The rendered prompt without BOS; history = ((question, answer), ...)."""
    turns = [f"{q}\n\nAssistant: {a}{EOS}" for q, a in history] + [f"{question}\n\nAssistant:"]
    return f"{SYSTEM}\n\nUser: {IMAGE}\n" + "User: ".join(turns)


def _config(text, vision, aligner):
    return dict(model_type="multi_modality", torch_dtype="float32", language_config=dict(model_type="llama", **text),
                vision_config=dict(model_type="vision", **vision), aligner_config=dict(
                    cls="MlpProjector", model_type="aligner", params=dict(depth=2, **aligner)))


def _tower(name, image_size, **sizes):
    return dict(model_name=name, image_size=image_size, select_feature="same", select_layer=-1, **sizes)


def _plain(text, width, tower):
    return _config(text, dict(cls="CLIPVisionTower", params=tower),
                   dict(input_dim=width, n_embed=text.get("hidden_size", 4096), projector_type="mlp_gelu"))


def _hybrid(text, width, high, low):
    params = dict(concat_type="tuple", freeze_high=True, freeze_low=True, high_res_cfg=high, low_res_cfg=low)
    return _config(text, dict(cls="HybridVisionTower", params=params),
                   dict(input_dim=width, n_embed=text.get("hidden_size", 4096),
                        projector_type="low_high_hybrid_split_mlp_gelu"))


# rms_norm_eps and rope_theta are never stated; the real ones' tower sizes hang on model_name alone
CONFIGS = {
    "siglip": _plain(
        dict(vocab_size=413, hidden_size=60, intermediate_size=100, num_hidden_layers=4, num_attention_heads=5,
             num_key_value_heads=5, max_position_embeddings=512),
        36, _tower("siglip_large_patch16_384", 40, width=36, layers=3, heads=3, patch_size=8, mlp_ratio=3)),
    # 10 x 10 cells in windows of 4: two cells of padding at each end; SAM's own width, grid and neck
    "hybrid": _hybrid(
        dict(vocab_size=409, hidden_size=72, intermediate_size=116, num_hidden_layers=5, num_attention_heads=6,
             max_position_embeddings=512),
        40, _tower("sam_b_downsample", 80, width=44, layers=5, heads=4, patch_size=8, window_size=4,
                   prompt_embed_dim=10, global_attn_indexes=[1, 3], downsample_channels=[14, 18]),
        _tower("siglip_large_patch16_384", 36, width=40, layers=2, heads=5, patch_size=6, mlp_ratio=4)),
}
TRUE_CONFIGS = {
    "deepseek-vl-1.3b": _plain(
        dict(vocab_size=102400, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16,
             num_key_value_heads=16, max_position_embeddings=16384),
        1024, _tower("siglip_large_patch16_384", 384)),
    "deepseek-vl-7b": _hybrid(
        dict(vocab_size=102400, num_hidden_layers=30, max_position_embeddings=16384),
        1024, _tower("sam_b_downsample", 1024), _tower("siglip_large_patch16_384", 384)),
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
                            region=((2, 1, 5, 4), "111 011 001")),
}


def towers(config):
    """-> {prefix of the tensors' names: sizes}, SigLIP first; what config.json leaves out is filled in."""
    params = config["vision_config"]["params"]
    found = {"vision_tower.": params}
    if "low_res_cfg" in params:
        found = {f"vision_tower_{end}.vision_tower.": params[f"{end}_res_cfg"] for end in ("low", "high")}
    return {f"vision_model.{prefix}": TOWER_DEFAULTS[tower["model_name"]] | tower for prefix, tower in found.items()}


def shapes(config):
    """-> {name as deepseek-ai writes it: shape}, those that no answer needs included."""
    text = TEXT_DEFAULTS | config["language_config"]
    D, I, heads, out = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"], {}
    kv = text.get("num_key_value_heads", heads) * (D // heads)

    def linear(name, *shape):
        out[name + ".weight"], out[name + ".bias"] = shape, shape[:1]

    for prefix, c in towers(config).items():
        C, p, cells, sam = c["width"], c["patch_size"], c["image_size"] // c["patch_size"], "window_size" in c
        hidden, mlp = int(C * c.get("mlp_ratio", 4)), ("lin1", "lin2") if sam else ("fc1", "fc2")
        out[prefix + "pos_embed"] = (1, cells, cells, C) if sam else (1, cells * cells, C)
        linear(prefix + "patch_embed.proj", C, 3, p, p)
        for n in range(c["layers"]):
            block = f"{prefix}blocks.{n}."
            for name, shape in {"norm1": (C,), "attn.qkv": (3 * C, C), "attn.proj": (C, C), "norm2": (C,),
                                "mlp." + mlp[0]: (hidden, C), "mlp." + mlp[1]: (C, hidden)}.items():
                linear(block + name, *shape)
            if sam:
                m = cells if n in c["global_attn_indexes"] else c["window_size"]
                out[block + "attn.rel_pos_h"] = out[block + "attn.rel_pos_w"] = (2 * m - 1, C // c["heads"])
        if not sam:
            linear(prefix + "norm", C)
            out[prefix + "attn_pool.latent"] = (1, 1, C)            # never used
            linear(prefix + "attn_pool.q", C, C)
            continue
        E, channels = c["prompt_embed_dim"], [c["prompt_embed_dim"], *c["downsample_channels"]]
        for neck in "neck", "neck_hd":
            out[f"{prefix}{neck}.0.weight"], out[f"{prefix}{neck}.2.weight"] = (E, C, 1, 1), (E, E, 3, 3)
            linear(f"{prefix}{neck}.1", E)
            linear(f"{prefix}{neck}.3", E)
        for n, (a, b) in enumerate(zip(channels, channels[1:])):
            out[f"{prefix}downsamples.{n}.weight"] = (b, a, 3, 3)
        out[prefix + "hd_alpha_downsamples"] = (1,)
        linear("vision_model.high_layer_norm", channels[-1])        # never used
        linear("vision_model.low_layer_norm", C)

    low, *high = towers(config).values()
    if high:
        linear("aligner.high_up_proj", D // 2, high[0]["downsample_channels"][-1])
        linear("aligner.low_up_proj", D // 2, low["width"])
        linear("aligner.layers.1", D, D)
    else:
        linear("aligner.layers.0", D, low["width"])
        linear("aligner.layers.2", D, D)
    decoder = "language_model.model."
    out |= {decoder + "embed_tokens.weight": (text["vocab_size"], D), decoder + "norm.weight": (D,),
            "language_model.lm_head.weight": (text["vocab_size"], D)}
    for n in range(text["num_hidden_layers"]):
        for name, shape in {"input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_proj": (D, D),
                            "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D), "self_attn.o_proj": (D, D),
                            "mlp.gate_proj": (I, D), "mlp.up_proj": (I, D), "mlp.down_proj": (D, I)}.items():
            out[f"{decoder}layers.{n}.{name}.weight"] = shape
    return out


def tensors(config):
    """Every tensor by name; a norm that is not called one still lies around 1."""
    found = {name: weight(name, shape) for name, shape in shapes(config).items()}
    return {name: 1 + 0.3 * t if ".neck" in name and name.endswith("weight") and t.dim() == 1 else t
            for name, t in found.items()}


def write_checkpoint(folder, config, shards=1, dtype=torch.float32):
    """A folder as deepseek-ai publishes it, in one file or in shards with an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    found = {name: t.to(dtype) for name, t in tensors(config).items()}
    if shards == 1:
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {name: f"model-{n % shards + 1:05d}-of-{shards:05d}.safetensors" for n, name in enumerate(found)}
    for file in sorted(set(where.values())):
        part = {name: t for name, t in found.items() if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder

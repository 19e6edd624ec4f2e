"""Tiny LLaVAs whose weights and pictures are integer formulas of name and index: golden files hold only outputs.

No random number generator is used: every version of numpy and torch gives the same numbers.

    weight(name, shape)                    one float32 tensor; `name` is its name on the hub
    tensors(config)                        all tensors of a model, by that name
    rpn_tensors(config, layers)            an RPN with weights of its own, by the released names
    write_checkpoint(folder, config, ...)  a checkpoint folder, in any spelling of the names that is in circulation
    picture(width, height, seed)           a PIL image

Left out: the original (non-Hugging-Face) LLaVA layout.
"""
import functools
import json
import math
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).parent
PIECES = 400  # size of tokenizer.model; ids from here on have no text
NEW_TOKENS = 24  # greedy tokens per case

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
SHORT = "\nAnswer the question using a single word or phrase."


def prompt(question, history=()):
    """vicuna_v1, rendered; history = ((question, answer), ...)."""
    turns = [f"{q} ASSISTANT: {a}</s>" for q, a in history] + [f"{question} ASSISTANT:"]
    return f"{SYSTEM} USER: <image>\n" + "USER: ".join(turns)


# ---- models: sizes that divide into nothing pretty; keys left out take the reference's defaults

def _config(text, vision, image_token):
    return dict(model_type="llava", image_token_index=image_token, tie_word_embeddings=False,
                text_config=dict(model_type="llama", max_position_embeddings=512, **text),
                vision_config=dict(model_type="clip_vision_model", **vision))


CONFIGS = {
    # rms_norm_eps, rope_theta, num_key_value_heads and the vision defaults are not stated
    "plain": _config(
        dict(vocab_size=413, hidden_size=60, intermediate_size=100, num_hidden_layers=4, num_attention_heads=5),
        dict(hidden_size=40, intermediate_size=72, num_hidden_layers=4, num_attention_heads=4, patch_size=14,
             image_size=42),
        image_token=400),
    # six heads share two K/V heads; every epsilon and theta is unusual
    "grouped": _config(
        dict(vocab_size=407, hidden_size=72, intermediate_size=116, num_hidden_layers=6, num_attention_heads=6,
             num_key_value_heads=2, rms_norm_eps=2e-3, rope_theta=500.0),
        dict(hidden_size=36, intermediate_size=60, num_hidden_layers=5, num_attention_heads=3, patch_size=6,
             image_size=36, layer_norm_eps=1e-3),
        image_token=402),
    # one K/V head for all, an odd patch, one frozen layer
    "shared": _config(
        dict(vocab_size=419, hidden_size=66, intermediate_size=90, num_hidden_layers=3, num_attention_heads=3,
             num_key_value_heads=1, rms_norm_eps=1e-5, rope_theta=10000.0),
        dict(hidden_size=44, intermediate_size=84, num_hidden_layers=3, num_attention_heads=4, patch_size=7,
             image_size=35),
        image_token=400),
}

# rpn = (frozen layers B, RPN layers R)
CASES = {
    "plain": dict(config="plain", picture=(157, 94, 1), question="What is this?" + SHORT, history=(), rpn=(1, 2)),
    "grouped": dict(config="grouped", picture=(61, 130, 2), question="Is the red cup left of 12 books?", history=(),
                    rpn=(2, 3)),
    "turns": dict(config="grouped", picture=(90, 53, 3), question="And who is the author?",
                  history=(("What color is the car?" + SHORT, "dark blue, 40"),), rpn=(2, 3)),
    "shared": dict(config="shared", picture=(23, 20, 4), question="Où est le chat? 猫 " + SHORT, history=(),
                   rpn=(1, 2)),
}


# ---- numbers

def _uniform(name, count):
    """`count` floats in [-1, 1), multiples of 2**-23: splitmix64 of (crc32 of the name, index)."""
    z = (np.uint64(zlib.crc32(name.encode())) << np.uint64(32)) + np.arange(count, dtype=np.uint64)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float64) / 2 ** 23 - 1


@functools.cache
def weight(name, shape):
    u = _uniform(name, math.prod(shape)).reshape(shape)
    if name.endswith(".bias"):
        u = 0.1 * u
    elif "norm" in name:
        u = 1 + 0.3 * u
    elif "embed" in name and "patch" not in name:  # token, position and class embeddings
        u = 0.5 * u
    else:  # a matrix; 1.73 makes the variance 1 / fan_in
        gain = {"q": 1.4, "k": 1.4, "lm_head": 2.0}.get(name.split(".")[-2].removesuffix("_proj"), 0.8)
        u = gain * 1.73 / math.sqrt(math.prod(shape[1:])) * u
    return torch.from_numpy(u.astype(np.float32))


def _block(prefix, text):
    h, i, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    kv = text.get("num_key_value_heads", heads) * (h // heads)
    sizes = {"input_layernorm": (h,), "post_attention_layernorm": (h,),
             "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
             "self_attn.o_proj": (h, h),
             "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
    return {f"{prefix}.{name}.weight": shape for name, shape in sizes.items()}


def shapes(config):
    text, vision = config["text_config"], config["vision_config"]
    h, v, tower = text["hidden_size"], text["vocab_size"], "vision_tower.vision_model."
    c, m, p = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    out = {"language_model.model.embed_tokens.weight": (v, h), "language_model.model.norm.weight": (h,),
           "language_model.lm_head.weight": (v, h), tower + "embeddings.class_embedding": (c,),
           tower + "embeddings.patch_embedding.weight": (c, 3, p, p),
           tower + "embeddings.position_embedding.weight": ((vision["image_size"] // p) ** 2 + 1, c)}
    both = {"multi_modal_projector.linear_1": (h, c), "multi_modal_projector.linear_2": (h, h),  # with biases
            tower + "pre_layrnorm": (c,), tower + "post_layernorm": (c,)}
    for n in range(text["num_hidden_layers"]):
        out |= _block(f"language_model.model.layers.{n}", text)
    for n in range(vision["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{n}."
        for name in "q_proj", "k_proj", "v_proj", "out_proj":
            both[f"{layer}self_attn.{name}"] = (c, c)
        both |= {layer + "layer_norm1": (c,), layer + "layer_norm2": (c,), layer + "mlp.fc1": (m, c),
                 layer + "mlp.fc2": (c, m)}
    for name, shape in both.items():
        out[name + ".weight"], out[name + ".bias"] = shape, shape[:1]
    return out


def tensors(config):
    return {name: weight(name, shape) for name, shape in shapes(config).items()}


def rpn_tensors(config, layers):
    text = config["text_config"]
    names = {"model.twig_norm.weight": (text["hidden_size"],)}
    for n in range(layers):
        names |= _block(f"model.twig_layers.{n}", text)
    return {name: weight(name, shape) for name, shape in names.items()}


def picture(width, height, seed):
    """Slow colour waves with a dark frame, a bright block and fine grain: edges for the resize, corners that differ."""
    y, x = np.mgrid[:height, :width]
    grain = ((_uniform(f"picture {seed}", height * width * 3) + 1) * 20).astype(np.int64).reshape(height, width, 3)
    waves = np.stack([x * (2 + seed), y * (5 - seed % 3) + x, (x * y) // 23 + 40 * seed], axis=-1) % 200
    waves[(x > width // 2) & (y > height // 3) & (y < height // 2)] = 210, 40, 190
    waves[(x < 3) | (y < 3) | (x > width - 3)] = 10
    return Image.fromarray((waves + grain).clip(0, 255).astype(np.uint8))


# ---- checkpoints

_NESTED = [("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
           ("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector.")]
SPELLINGS = {  # prefix on the hub -> prefix in this spelling
    "hub": [],  # as published; saved by transformers up to 5.x after from_pretrained
    "hub-top-head": [("language_model.lm_head.", "lm_head.")],
    "5-saved": [("vision_tower.vision_model.", "vision_tower.")],  # 5.x: built from a config, then saved
    "4.52": _NESTED,  # 4.52 to 4.57 in memory, and raw dumps of that
    "5": [("vision_tower.vision_model.", "model.vision_tower.")] + _NESTED,  # 5.x in memory
}


def respell(name, spelling):
    for old, new in SPELLINGS[spelling]:
        if name.startswith(old):
            return new + name[len(old):]
    return name


def _modern(config):
    """The same configuration as 5.x writes it."""
    text = dict(config["text_config"])
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta", 10000.0), "rope_type": "default"}
    text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    return dict(config, text_config=text, multimodal_projector_bias=True)


def write_checkpoint(folder, config, spelling="hub", shards=1, dtype=torch.float32):
    """Write config.json, preprocessor_config.json, tokenizer.model and the weights, in one file or in shards.

    "4.52" also carries buffers that a loader ignores; "5" and "5-saved" come with the newer config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = config["vision_config"]["image_size"]
    found = {respell(name, spelling): tensor.to(dtype) for name, tensor in tensors(config).items()}
    if spelling == "4.52":
        found["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
        found["model.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    if spelling.startswith("5"):
        config = _modern(config)
    if spelling == "5":  # seen elsewhere; 5.x itself keeps image_token_index
        config["image_token_id"] = config.pop("image_token_index")
    pixels = dict(do_resize=True, size={"shortest_edge": size}, resample=3, do_rescale=True, rescale_factor=1 / 255,
                  do_normalize=True, image_mean=[0.48145466, 0.4578275, 0.40821073],
                  image_std=[0.26862954, 0.26130258, 0.27577711])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    shutil.copy(HERE / "tokenizer.model", folder)
    if shards == 1:
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {name: f"model-{n % shards + 1:05d}-of-{shards:05d}.safetensors" for n, name in enumerate(found)}
    for file in set(where.values()):
        part = {name: tensor for name, tensor in found.items() if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder

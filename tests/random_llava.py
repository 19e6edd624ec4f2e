"""
A LLaVA and an RPN of true sizes with random weights, and an RPN that says what it is told. For measurements and tests.

    llava, rpn, recipe, work = random_model("llava-1.5-7b", torch.device("cuda"), torch.float16)
    answer(llava, Steered(rpn, band(24, 300)), image, QUESTION, ignore_eos=True)      # a crop of exactly 300 tokens

    python tests/random_llava.py out/random-7b --random llava-1.5-7b    # a folder that --ckpt takes: 14 GB in shards, the toy's tokeniser

Left out: answers that mean anything.
"""
import argparse
import json
import re
import shutil
import zlib
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save_file

from bounds import SIZES, work  # also puts the project on the path
from model import LLaVA, find_checkpoint
from data.recipe import LLAVA_TRAINING, RECIPES
from sdrpn import RPN

QUESTION = "What is written on the red sign over the door?\nAnswer the question using a single word or phrase."  # 636 tokens in all


class Words:
    """Stands in for the tokeniser: an id for each word or sign. Only the number of ids matters here."""
    bos_id, eos_id, get_piece_size = (lambda self: 1), (lambda self: 2), (lambda self: 32000)

    def encode(self, text):
        return [3 + zlib.crc32(w.encode()) % 31000 for w in re.findall(r"\w{1,9}|\s$|[^\w ]", text)]

    def decode(self, ids):
        return " ".join(map(str, ids))


def fill(module, device, dtype):
    """Random weights for a module on the meta device, made in place and in dtype, scaled so that no activation grows. Norms: 1."""
    noise = torch.randn(1_000_003, device=device).to(dtype)
    for name, p in list(module.named_parameters()):
        t = torch.empty(p.shape, device=device, dtype=dtype)
        if p.dim() < 2:
            t.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            flat = t.view(-1)
            for i in range(0, len(flat), len(noise)):
                torch.mul(noise[:len(flat) - i], p[0].numel() ** -0.5, out=flat[i:i + len(noise)])
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Parameter(t, requires_grad=False))
    return module.eval()


def random_model(name, device, dtype, layers=None):
    """-> LLaVA, RPN, recipe, Work. EOS is never the most likely token, so every answer runs to its limit."""
    w = work(name, layers, dtype.itemsize)
    recipe = RECIPES.get((w.L, w.D)) or dict(
        attention={str(w.B - 1): [0, 1, 2]}, softmax="sequence", sink=dict(kind="attention", attention={str(min(2, w.L - 1)): None}, threshold=1e-3),
        frozen=w.B, layers=w.R, tau=0.15, train=LLAVA_TRAINING)
    with torch.device("meta"):
        llava, rpn = LLaVA(w.c, w.v, 32000, Words()), RPN(w.c, w.B, w.R)
    fill(llava, device, dtype), fill(rpn, device, dtype)
    llava.lm_head.weight[2] = 0.0
    llava.folder, llava.fingerprint = Path(name), "random"
    return llava, rpn, recipe, w


class Steered:
    """The RPN runs, and then says what it was told: every run crops the same tokens."""
    smooth, path = False, None

    def __init__(self, rpn, cells):
        self.rpn, self.frozen, self.told = rpn, rpn.frozen, torch.where(cells, 9.0, -9.0)

    def logits(self, hidden, columns):
        return self.rpn.logits(hidden, columns).float().cpu() * 0 + self.told


def band(g, n):
    """(g, g) bool, n cells around the diagonal: their box is the whole grid, so Masked Upscaling keeps exactly n tokens."""
    i, cells = torch.arange(g), torch.zeros(g * g, dtype=torch.bool)
    cells[(i[:, None] - i).abs().flatten().argsort(stable=True)[:n]] = True
    return cells.view(g, g)


def squares(g, *spans):
    cells = torch.zeros(g, g, dtype=torch.bool)
    for a, b in spans:
        cells[a:b, a:b] = True
    return cells


def write_checkpoint(name, folder, shard_bytes=2 << 30):
    """A folder in the Hugging Face layout, float16, filled and written one part of the network at a time."""
    w = work(name)
    with torch.device("meta"):
        llava = LLaVA(w.c, w.v, 32000, Words())
    folder.mkdir(parents=True)
    for file in ("tokenizer.model", "preprocessor_config.json"):
        shutil.copy(find_checkpoint("toy") / file, folder / file)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llava", "image_token_index": 32000, "torch_dtype": "float16", "text_config": w.c, "vision_config": w.v}, indent=1) + "\n")
    weight_map, shard = {}, {}

    def flush():
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    parts = [llava.vision_tower, llava.multi_modal_projector, llava.language_model.embed_tokens, *llava.language_model.layers,
             llava.language_model.norm, llava.lm_head]
    names = {id(module): prefix for prefix, module in llava.named_modules()}
    for part in parts:
        fill(part, torch.device("cpu"), torch.float16)
        shard |= {f"{names[id(part)]}.{k}": p.data for k, p in part.named_parameters()}
        part.to("meta")
        if sum(t.nbytes for t in shard.values()) > shard_bytes:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a checkpoint of true shapes with random weights.")
    parser.add_argument("folder", type=Path, help="must not exist yet")
    parser.add_argument("--random", choices=SIZES, default="small", help="whose shapes")
    args = parser.parse_args()
    write_checkpoint(args.random, args.folder)

"""Models of true sizes with random weights, of any family, with their RPN; and answers that crop what they are told.

    m, rpn, recipe = random_model("llava-1.5-7b", torch.device("cuda"), torch.float16)
    steered(m, rpn, band((24, 24), 300), picture, QUESTION)          # an answer with a crop of exactly 300 tokens

    python tests/speed/random_llava.py out/random-7b --random llava-1.5-7b    # a folder for --ckpt: 14 GB in shards

EOS is never the likeliest token, so every answer runs to its limit. Left out: answers that mean anything.
"""
import argparse
import json
import re
import shutil
import sys
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "golden")]

import deepseek_formula  # noqa: E402 (the project is on the path only now)
import qwen_formula  # noqa: E402
import sdrpn  # noqa: E402
from data.checkpoints import TOY  # noqa: E402
from model import read_config  # noqa: E402
from sdrpn import RELEASED, RPN, Recipe, answer, released_recipe  # noqa: E402
from slow import regions_of  # noqa: E402

QUESTION = ("What is written on the red sign over the door?\n"
            "Answer the question using a single word or phrase.")  # with LLaVA's prompt 636 tokens in all
SQUARE = 480  # side of the picture that is asked about: square, so that every cell may be cropped
BUDGET = 451584, 451584  # pixels, where a family takes any size: 24 x 24 tokens, as the others have
TINY_BUDGET = 19600, 23520  # 5 x 5


def llava(width, mlp, layers, heads, **vision):
    """config.json of a LLaVA; without `vision` its tower is ViT-L/14-336."""
    text = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
                rms_norm_eps=1e-5, max_position_embeddings=4096, vocab_size=32064)
    return dict(model_type="llava", image_token_index=32000, text_config=text, vision_config=vision)


CONFIGS = {
    "llava-1.5-7b": llava(4096, 11008, 32, 32),
    "llava-1.5-13b": llava(5120, 13824, 40, 40),
    "small": llava(1024, 2816, 12, 16),
    "tiny": llava(48, 80, 6, 4, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                  image_size=48, patch_size=6),
    **deepseek_formula.TRUE_CONFIGS,
    "tiny-deepseek": deepseek_formula.CONFIGS["hybrid"],
    **qwen_formula.CONFIGS,
    "tiny-qwen": qwen_formula.TINY["tied"],
}
TINY = tuple(name for name in CONFIGS if name.startswith("tiny"))


class Words:
    """Stands in for a tokeniser: an id for each word or sign. Only the number of ids matters here."""

    def __init__(self, config, vision):
        self.size = config.image_token if config.model_type != "multi_modality" else min(100015, config.vocab_size - 1)
        self.ids = {"<|vision_start|>": vision, "<|vision_end|>": vision + 1, "<image_placeholder>": self.size}

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def get_piece_size(self):
        return self.size

    def token_id(self, name):
        return self.ids.get(name, 2)

    def encode(self, text, special=False):
        words = re.findall(r"\w{1,9}|\s$|[^\w ]", text)
        return [3 + zlib.crc32(word.encode()) % (self.size - 3) for word in words]

    def decode(self, ids):
        return " ".join(map(str, ids))


def skeleton(name, layers=None):
    """A model without weights (on the meta device), its RPN, its recipe. layers: fewer of the decoder's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIGS[name]))
        family, config = read_config(folder)
    depth = config.num_hidden_layers
    fields = plain_recipe(depth) | released_recipe(family, config)
    fields.pop("note", None)
    if layers:
        config = replace(config, num_hidden_layers=layers)
        frozen = max(1, fields["frozen_layers"] * layers // depth)
        R = min(fields["rpn_layers"], layers - frozen)
        fields |= plain_recipe(layers) | dict(frozen_layers=frozen, rpn_layers=R)
    recipe = Recipe(**fields).for_kind(None)
    with torch.device("meta"):
        m = family(config, Words(config, CONFIGS[name].get("vision_start_token_id", 0)))
        rpn = RPN(m.config, recipe.frozen_layers, recipe.rpn_layers)
    if m.budget is not None:
        m.budget = TINY_BUDGET if name in TINY else BUDGET
    m.folder, m.fingerprint = Path(name), "random"
    return m, rpn, recipe


def plain_recipe(depth):
    """For a shape that no recipe was released for."""
    frozen = depth // 2
    sink = dict(kind="attention", attention={min(2, depth - 1): None}, threshold=1e-3)
    return dict(attention={frozen - 1: [0, 1, 2]}, softmax="sequence", sink=sink, frozen_layers=frozen,
                rpn_layers=min(2, depth - frozen), train=RELEASED["train"])


def fill(module, device, dtype):
    """Random weights, made in place and in dtype, scaled so that no activation grows. Norms: 1."""
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


def give_weights(m, rpn, device, dtype):
    fill(m, device, dtype)
    fill(rpn, device, dtype)
    if m.config.tied:
        m.lm_head.weight = m.language_model.embed_tokens.weight
    for token in m.config.eos_ids:
        m.lm_head.weight[token] = 0.0  # its logit is 0; the largest of all the others never is


def random_model(name, device, dtype, layers=None):
    """-> a model, its RPN, its recipe."""
    m, rpn, recipe = skeleton(name, layers)
    give_weights(m, rpn, device, dtype)
    return m, rpn, recipe


# -------------------------------------------------------------------------------- what is cropped

def steered(m, rpn, cells, picture, question, mode="mask", **how):
    """answer(), where the RPN and the search for regions run whole, and then these cells (h, w) are cropped."""
    told, find_regions = regions_of(cells), sdrpn.find_regions

    def find(*given):
        find_regions(*given)
        return told
    with mock.patch.object(sdrpn, "find_regions", find):
        return answer(m, rpn, picture, question, mode, **how)


def band(grid, n):
    """(h, w) bool: n cells around the diagonal. Their box is the whole grid, so Masked Upscaling keeps these n.

    >>> band((3, 3), 5).int().tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    h, w = grid
    off = (torch.arange(h)[:, None] * w - torch.arange(w) * h).abs().flatten()
    cells = torch.zeros(h * w, dtype=torch.bool)
    cells[off.argsort(stable=True)[:n]] = True
    return cells.view(h, w)


def squares(grid, *spans):
    """(h, w) bool: squares on the diagonal, from cell a up to b."""
    cells = torch.zeros(grid, dtype=torch.bool)
    for a, b in spans:
        cells[a:b, a:b] = True
    return cells


# ------------------------------------------------------------------------------------ a checkpoint

def write_checkpoint(name, folder, shard_bytes=2 << 30):
    """A LLaVA's folder in the Hugging Face layout, float16, filled and written one part of the network at a time."""
    m, _, _ = skeleton(name)
    folder.mkdir(parents=True)
    shutil.copy(TOY / "tokenizer.model", folder)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | {"torch_dtype": "float16"}, indent=1) + "\n")
    weight_map, shard = {}, {}

    def flush():
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    parts = [m.vision_tower, m.multi_modal_projector, m.language_model.embed_tokens, *m.language_model.layers,
             m.language_model.norm, m.lm_head]
    names = {id(module): prefix for prefix, module in m.named_modules()}
    for part in parts:
        fill(part, torch.device("cpu"), torch.float16)
        shard |= {f"{names[id(part)]}.{key}": p.data for key, p in part.named_parameters()}
        part.to("meta")
        if sum(t.nbytes for t in shard.values()) > shard_bytes:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a LLaVA's checkpoint of true shapes with random weights.")
    parser.add_argument("folder", type=Path, help="must not exist yet")
    names = [name for name, config in CONFIGS.items() if config["model_type"] == "llava"]
    parser.add_argument("--random", choices=names, default="small", help="whose shapes")
    args = parser.parse_args()
    write_checkpoint(args.random, args.folder)

"""
Qwen2.5-VL 3B and 7B: what differs from LLaVA. Sections are those of arXiv 2502.13923.

    the picture   keeps its shape: h x w tokens of 28 x 28 pixels, as many as a budget allows
    the tower     rotary embedding over rows and columns; most blocks see windows of 4 x 4 tokens,
                  a few see everything; 2 x 2 patches are merged into a token
    the decoder   biases on q, k, v; a position has three axes: time, row and column (M-RoPE)
    the crop      is a second picture with rows and columns of its own

    m = load("checkpoints/qwen2.5-vl-3b")
    m.budget = 451584, 451584    # (least, most) pixels of a picture: here about 576 tokens
    m.generate(load_image("img.jpg"), "What is written on the sign?")

Left out: video (in a picture, time stands still), sampling, the repetition penalty.
Shapes: b batch, (h, w) grid of image tokens, N = h*w of them, n = 4*N patches, C tower width,
H heads, d head size, D decoder width, t tokens of text.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from backbones.bpe import BPE
from clip import MEAN, STD, BadInput, reading, to_tensor
from model import (MLP, LLaVA, RMSNorm, decoder_config, expect, from_json, is_tied, note_template,
                   read_eos, read_processor, rope_table, rotate, wider)

SYSTEM = "You are a helpful assistant."
MERGE = 2  # a token is MERGE x MERGE patches
MAX_ASPECT = 200  # of a whole picture, as in the reference library


@dataclass
class VisionConfig:
    """The entries of vision_config that matter. A file may leave out what equals these defaults."""
    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    patch_size: int = 14
    temporal_patch_size: int = 2
    window_size: int = 112  # pixels of a window's side
    fullatt_block_indexes: list = (7, 15, 23, 31)


# ------------------------------------------------------------------------------------------ pixels

def smart_resize(height, width, budget, cell=28):
    """The (height, width) a picture is resized to (Sec. 2.1.2): whole cells, within the budget.

    Each side goes to the nearest number of cells, a half to the even one. If the area is then
    above budget = (least, most), both sides shrink by one factor and are rounded down. If it is
    below, they grow and are rounded up, which may pass `most`.

    >>> smart_resize(480, 640, (3136, 12845056))    # 17 x 23 cells
    (476, 644)
    >>> smart_resize(42, 70, (3136, 12845056))    # 1.5 and 2.5 cells
    (56, 56)
    >>> smart_resize(480, 640, (451584, 451584))    # 21 x 28 cells
    (588, 784)
    >>> smart_resize(612, 612, (451584, 451584))    # 24 x 24 but for a rounding error, as published
    (700, 700)
    """
    h, w = round(height / cell) * cell, round(width / cell) * cell
    least, most = budget
    if h * w > most:
        shrink = math.sqrt(height * width / most)
        h = max(cell, math.floor(height / shrink / cell) * cell)
        w = max(cell, math.floor(width / shrink / cell) * cell)
    elif h * w < least:
        grow = math.sqrt(least / (height * width))
        h = math.ceil(height * grow / cell) * cell
        w = math.ceil(width * grow / cell) * cell
    return h, w


# ------------------------------------------------------------------------------------------- tower

def windows_by_size(grid, side):
    """Windows of side x side tokens -> the order of the tokens (N,), and [(number, size), ...].

    At the right and at the bottom windows may be smaller. Those of one size come one after the
    other, to attend as a batch; there are at most four sizes.

    >>> order, sizes = windows_by_size((5, 6), 4)
    >>> sizes, order.tolist()[16:]
    ([(1, 16), (1, 8), (1, 4), (1, 2)], [4, 5, 10, 11, 16, 17, 22, 23, 24, 25, 26, 27, 28, 29])
    >>> order, sizes = windows_by_size((8, 5), 4)    # whole, cut, whole, cut
    >>> sizes, order[16:20].tolist(), order[32:].tolist()
    ([(2, 16), (2, 4)], [20, 21, 22, 23], [4, 9, 14, 19, 24, 29, 34, 39])
    """
    tokens, by_size = torch.arange(grid[0] * grid[1]).view(grid), {}
    for band in tokens.split(side, 0):
        for window in band.split(side, 1):
            by_size.setdefault(window.numel(), []).append(window.flatten())
    order = torch.cat([window for alike in by_size.values() for window in alike])
    return order, [(len(alike), size) for size, alike in by_size.items()]


def patch_rope(grid, d, device, dtype):
    """Rotary table (2, N, 4, d) of the patches, in float32 or wider: q and k are rotated in that.

    Half of the frequencies follow a patch's row, half its column. rotate() pairs channel i with
    i + d/2, so the channels are [row, column, row's pairs, column's pairs], d/4 of each.
    """
    patch = torch.arange(4 * grid[0] * grid[1], device=device)  # in the order (h, w, 2, 2)
    token, inner = patch // 4, patch % 4
    rows = token // grid[1] * MERGE + inner // MERGE
    columns = token % grid[1] * MERGE + inner % MERGE
    tables = [rope_table(at, d // 2, 10000, dtype=wider(dtype)) for at in (rows, columns)]
    (row, row_pair), (column, column_pair) = (table.chunk(2, -1) for table in tables)
    return torch.cat([row, column, row_pair, column_pair], -1).unflatten(1, (-1, 4))


class PatchEmbed(nn.Module):
    """pixels (b, 3, H, W) -> (b, N, 4, C): the four patches of each token, both row by row.

    The tower reads films, `temporal_patch_size` frames at once: a picture is one that stands still.
    """

    def __init__(self, c):
        super().__init__()
        p = c.patch_size
        self.proj = nn.Conv3d(3, c.hidden_size, (c.temporal_patch_size, p, p), bias=False)

    def forward(self, pixels):
        frames, p, _ = self.proj.kernel_size
        x = pixels.unflatten(3, (-1, MERGE, p)).unflatten(2, (-1, MERGE, p))  # H is h, 2, p
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (b, h, w, 2, 2, 3, p, p)
        x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)  # equal frames
        x = x.flatten(5).flatten(3, 4).flatten(1, 2)  # (b, N, 4, 3 * frames * p * p)
        return F.linear(x, self.proj.weight.flatten(1))


class Attention(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x, rope, sizes):
        """(b, n, C) -> (b, n, C). sizes = [(windows, patches of each), ...]: each attends alone."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # each (b, H, n, d)
        q, k = rotate(q, rope).to(x.dtype), rotate(k, rope).to(x.dtype)
        lengths, seen = [number * size for number, size in sizes], []
        parts = torch.stack([q, k, v]).split(lengths, 3)
        for (number, size), part in zip(sizes, parts):  # (3, b, H, number * size, d)
            alone = part.unflatten(3, (number, size)).transpose(2, 3).flatten(1, 2)
            y = F.scaled_dot_product_attention(*alone)  # (b * number, H, size, d)
            seen.append(y.unflatten(0, (-1, number)).transpose(1, 2).flatten(2, 3))
        return self.proj(torch.cat(seen, 2).transpose(1, 2).flatten(2))  # of (b, H, n, d)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        C = c.hidden_size
        self.norm1, self.norm2 = RMSNorm(C, 1e-6), RMSNorm(C, 1e-6)  # no file states this epsilon
        self.attn, self.mlp = Attention(C, c.num_heads), MLP(C, c.intermediate_size, bias=True)

    def forward(self, x, rope, sizes):
        x = x + self.attn(self.norm1(x), rope, sizes)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """A token's four patches (b, N, 4*C) -> the token (b, N, D): each normed, all in one MLP."""

    def __init__(self, C, D):
        super().__init__()
        four = MERGE ** 2 * C
        self.ln_q = RMSNorm(C, 1e-6)
        self.mlp = nn.Sequential(nn.Linear(four, four), nn.GELU(), nn.Linear(four, D))  # erf GELU

    def forward(self, x):
        return self.mlp(self.ln_q(x.unflatten(-1, (MERGE ** 2, -1))).flatten(-2))


class Tower(nn.Module):
    """pixels (b, 3, H, W), sides in whole tokens -> each token's four patches (b, N, 4*C).

    Sec. 2.1.1. Blocks in `fullatt_block_indexes` see the whole picture, the others windows of
    `window_size` pixels: most of the cost grows with the area and not with its square. The merger
    is here for its tensors' names. `project` calls it, once a crop's tokens have been chosen.
    """

    def __init__(self, c, D):
        super().__init__()
        self.cell = c.patch_size * MERGE  # pixels of a token's side
        self.side = c.window_size // self.cell  # tokens of a window's side
        self.whole, self.d = set(c.fullatt_block_indexes), c.hidden_size // c.num_heads
        self.patch_embed = PatchEmbed(c)
        self.blocks = nn.ModuleList(Layer(c) for _ in range(c.depth))
        self.merger = Merger(c.hidden_size, D)

    def grid(self, height, width):
        return height // self.cell, width // self.cell

    def forward(self, pixels):
        x = self.patch_embed(pixels)  # (b, N, 4, C)
        grid = self.grid(*pixels.shape[-2:])
        rope = patch_rope(grid, self.d, x.device, x.dtype)  # (2, N, 4, d)
        order, sizes = windows_by_size(grid, self.side)
        order = order.to(x.device)
        x, rope = x[:, order].flatten(1, 2), rope[:, order].flatten(1, 2)  # window by window
        of_windows = [(number, MERGE ** 2 * tokens) for number, tokens in sizes]
        of_all = [(1, x.shape[1])]
        for i, block in enumerate(self.blocks):
            x = block(x, rope, of_all if i in self.whole else of_windows)  # (b, n, C)
        x = x.unflatten(1, (-1, MERGE ** 2))[:, order.argsort()]  # (b, N, 4, C), row by row again
        return x.flatten(2)


# --------------------------------------------------------------------------------------- recipes

# What the authors released: the teacher's layers and heads for questions about text in pictures,
# and for questions about natural scenes. B, R, labels and training are the same for both. Of the
# kinds, data/llava_mix.py writes ocr_vqa and gqa; any other kind counts as the first, ocr_vqa.
REQUEST = ("Output the grounding bounding box of Region of Interest for the question. IMPORTANT: "
           "The output MUST be raw text, one box per line. DO NOT use JSON. Follow this exact "
           "format: x_min y_min x_max y_max {detail_label}.")


def released(textual, natural, natural_sinks, **more):
    """A recipe from {layer: heads} of each kind of question; only natural ones lose sinks."""
    sink = dict(kind="attention", attention=natural_sinks, threshold=1e-2)
    scenes = dict(attention=natural, sink=sink, request=REQUEST)
    return more | dict(
        attention=textual, softmax="sequence", rpn_layers=3, tau=0.1, square=True,
        budget=[451584, 451584],  # 24 x 24 tokens
        kinds={"ocr_vqa": {}, "gqa": scenes, "natural": scenes},
        labels=dict(grow=1, min_peak=5e-3, padding="background"),
        train=dict(lr=1e-4, warmup=0.03, betas=[0.9, 0.999], epochs=1, batch_size=16, grad_accum=8,
                   clip=1.0))


RECIPES = {
    ("qwen2_5_vl", 36, 2048): released(
        textual={20: [1, 4], 22: [14]}, natural={21: [9, 11], 22: [0, 7]},
        natural_sinks={8: [1, 13]}, frozen_layers=21,
        taus=dict(textvqa=0.15, vstar=0.175, ocrbench=0.03)),
    ("qwen2_5_vl", 28, 3584): released(
        textual={22: [1, 4], 23: [6, 11]}, natural={16: [1, 7, 17], 19: [17, 20]},
        natural_sinks={9: [4, 22]}, frozen_layers=16,
        taus=dict(textvqa=0.075, vstar=0.075, ocrbench=0.05)),
}


# ------------------------------------------------------------------------------------------- model

class Qwen2_5VL(LLaVA):
    """Tower, merger and Qwen2.5 decoder, with their tokeniser. Build it with `model.load`."""
    recipes = RECIPES

    def build_tower(self):
        self.visual = Tower(self.config.vision, self.config.hidden_size)

    # ---- words

    def prompt_ids(self, question, history=()):
        """The chat template as ids, one image id where the image goes.

        history = ((question, answer), ...). Only the template places special tokens; if a user
        types them, they stay text.
        """
        encode, token = self.tokenizer.encode, self.tokenizer.token_id
        begin, end = [token("<|im_start|>")], [token("<|im_end|>"), *encode("\n")]
        ids = [*begin, *encode(f"system\n{SYSTEM}"), *end, *begin, *encode("user\n"),
               token("<|vision_start|>"), self.config.image_token, token("<|vision_end|>")]
        for turn, (q, a) in enumerate([*history, (question, "")]):
            ids += [*end, *begin, *encode(f"user\n{q}")] if turn > 0 else encode(q)
            ids += [*end, *begin, *encode(f"assistant\n{a}")]
        return ids

    # ---- pictures

    def pixels(self, picture, box=None):
        """What the tower sees of a picture, or of box in its pixels -> (3, H, W) float32.

        A crop has the whole picture's budget: the smaller it is, the more it is magnified.
        """
        w, h = picture.size
        if box is not None:
            picture = picture.crop(box)  # of any shape
        elif max(w, h) > MAX_ASPECT * min(w, h):
            raise BadInput(f"a picture of {w} x {h} pixels: one side is more than {MAX_ASPECT} "
                           "times the other; crop it first")
        height, width = self.resized(picture)
        return to_tensor(picture.resize((width, height), Image.BICUBIC))

    def resized(self, picture):
        """The (height, width) in pixels to which the budget brings a picture."""
        return smart_resize(picture.height, picture.width, self.budget, self.visual.cell)

    def grid_of(self, picture):
        return self.visual.grid(*self.resized(picture))

    def token_grid(self, pixels):
        return self.visual.grid(*pixels.shape[-2:])

    def frame(self, picture_size):
        """The grid covers the picture itself: nothing is padded."""
        return picture_size

    def features(self, pixels):
        """(b, 3, H, W) -> (b, N, 4*C): each token's patches, not merged yet."""
        return self.visual(pixels.to(self.device, self.dtype))

    def project(self, features):
        return self.visual.merger(features)

    # ---- positions

    # M-RoPE (Sec. 2.1.3; arXiv 2409.12191): of the d/2 rotary frequencies, the first
    # mrope_section[0] turn with a token's time, the next with its row, the last with its column.
    # "w w <2 x 3 picture> w w":   time    0 1  2 2 2 2 2 2  5 6
    #                              row     0 1  2 2 2 3 3 3  5 6
    #                              column  0 1  2 3 4 2 3 4  5 6
    # That is ten tokens, but the next one is at 7.

    @staticmethod
    def image_positions(start, grid):
        """Time stands still. Text goes on behind the longer side.

        >>> positions, following = Qwen2_5VL.image_positions(7, (2, 3))
        >>> positions.tolist(), following
        ([[7, 7, 7, 7, 7, 7], [7, 7, 7, 8, 8, 8], [7, 8, 9, 7, 8, 9]], 10)
        """
        cell = torch.arange(grid[0] * grid[1])
        axes = torch.stack([0 * cell, cell // grid[1], cell % grid[1]])
        return start + axes, start + max(grid)

    def splice(self, tail, start, crops):
        """What follows the image in stage 2: each crop between markers, then the tail.

        tail (1, t, D) begins with the image's own <|vision_end|>, which stood at `start` so far:
            <vision_start> image  <vision_start> crop <vision_end>  <vision_end> text
        As in the authors' code, nothing before the crop is touched. The positions of dropped crop
        tokens stay free. -> (1, t', D), rotary table (2, t', d), the position of the next token.
        """
        token = self.tokenizer.token_id
        begin, end = self.embed([token("<|vision_start|>")]), self.embed([token("<|vision_end|>")])
        embeds, ropes = [], []
        for crop in crops:
            positions, behind = self.image_positions(start + 1, crop.keep.shape)
            kept = self.rope(positions[:, crop.keep.flatten()])
            embeds += [begin, crop.tokens[None], end]
            ropes += [self.text_rope(start, 1), kept, self.text_rope(behind, 1)]
            start = behind + 1
        t = tail.shape[1]
        ropes.append(self.text_rope(start, t))
        return torch.cat([*embeds, tail], 1), torch.cat(ropes, 1), start + t

    # ---- what a checkpoint of this family looks like

    @classmethod
    def read_config(cls, folder, given):
        """config.json, flat as published or nested as newer libraries save it -> Config."""
        text, vision = given.get("text_config") or given, given.get("vision_config") or {}
        flat = {"rope_theta": text.get("rope_theta")}
        rope = flat | (text.get("rope_parameters") or text["rope_scaling"])
        expect(text, model_type=["qwen2_5_vl", "qwen2_5_vl_text"], use_sliding_window=[False])
        expect(rope, type=["mrope", "default"], rope_type=["mrope", "default"])
        expect(vision | (vision.get("rope_parameters") or {}), hidden_act=["silu"],
               spatial_merge_size=[MERGE], in_channels=[3], in_chans=[3], rope_theta=[10000])
        vision = from_json(VisionConfig, vision)
        return decoder_config(
            text | {"rope_parameters": {"rope_theta": float(rope["rope_theta"])}},
            vision=vision, tied=is_tied(given, text),
            image_token=given["image_token_id"], eos_ids=read_eos(folder, given, text),
            budget=read_budget(folder, vision), qkv_bias=True, final_norm=False, score_rope=True,
            mrope_section=rope["mrope_section"])

    @classmethod
    def read_tokenizer(cls, folder, config):
        note_template(folder, "<|im_start|>", "<|vision_start|>")
        return BPE(folder / "tokenizer.json", config.vocab_size)

    def renames(self):
        """As published; as the reference library calls its modules; as released with an RPN."""
        return [("model.twig_", None), ("twig_", None), ("model.visual.", "visual."),
                ("model.language_model.", "language_model."), ("model.", "language_model.")]


def read_budget(folder, vision):
    """The least and most pixels of the folder's picture processor, which must be as ours is."""
    with reading(folder / "preprocessor_config.json", "this program cannot run such a checkpoint"):
        given = read_processor(folder)
        expect(given, image_mean=[[*MEAN]], image_std=[[*STD]], rescale_factor=[1 / 255],
               resample=[Image.BICUBIC], do_resize=[True], do_rescale=[True], do_normalize=[True],
               patch_size=[vision.patch_size], merge_size=[MERGE],
               temporal_patch_size=[vision.temporal_patch_size])
        # What is published where there is no such file, else what the reference library assumes
        most = 28 * 28 * (1280 if given else 16384)
        size = given.get("size") or {"shortest_edge": 56 * 56, "longest_edge": most}
        least = given.get("min_pixels") or size["shortest_edge"]
        most = given.get("max_pixels") or size["longest_edge"]
        if not 0 < least <= most:
            raise ValueError(f"min_pixels {least} is above max_pixels {most}")
        return least, most

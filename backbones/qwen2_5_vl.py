"""
Qwen2.5-VL 3B and 7B: what differs from LLaVA. Sections are those of arXiv 2502.13923.

    the picture   keeps its shape: h x w tokens of 28 x 28 pixels, as many as a budget allows
    the tower     rotary embedding over rows and columns; most blocks see windows of 4 x 4 tokens,
                  a few see everything; 2 x 2 patches are merged into a token
    the decoder   biases on q, k, v; a position has three axes, time, row and column (M-RoPE)
    the crop      is a second picture with rows and columns of its own

    m = load("qwen2.5-vl-3b")
    m.budget = 451584, 451584    # (least, most) pixels of a picture: here about 576 tokens
    m.generate(load_image("img.jpg"), "What is written on the sign?")

Left out: video (time stands still in a picture), sampling, generation_config's repetition penalty.
Shapes: b batch, (h, w) grid of image tokens, N = h*w of them, n = 4*N patches, C tower width,
H heads, d head size, D decoder width, t some and T all tokens of a prompt.
"""
import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from backbones.bpe import BPE
from clip import BadInput, to_tensor
from model import (MLP, LLaVA, RMSNorm, check_whole, read_json, read_text_sizes, refuse, rope_table,
                   rotate, wider)

SYSTEM = "You are a helpful assistant."
MERGE = 2  # a token is MERGE x MERGE patches
PUBLISHED_BUDGET = 3136, 12845056  # preprocessor_config.json of every published size
MAX_ASPECT = 200  # of a whole picture, as in the reference library


# ------------------------------------------------------------------------------------------ pixels

def smart_resize(height, width, budget=PUBLISHED_BUDGET, cell=28):
    """The (height, width) a picture is resized to (Sec. 2.1.2): whole cells, within the budget.

    Each side goes to the nearest number of cells, a half to the even one. If the area is then
    above budget = (least, most), both sides shrink by one factor and are rounded down; if below,
    they grow and are rounded up, which may pass `most`.

    >>> smart_resize(480, 640)    # 17 x 23 cells
    (476, 644)
    >>> smart_resize(42, 70)    # 1.5 and 2.5 cells
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

def windows(grid, side):
    """The tokens of each window of side x side, row by row; the last ones may be smaller.

    >>> [window.tolist() for window in windows((5, 6), 4)][1:]
    [[4, 5, 10, 11, 16, 17, 22, 23], [24, 25, 26, 27], [28, 29]]
    """
    tokens = torch.arange(grid[0] * grid[1]).view(grid)
    return [window.flatten() for band in tokens.split(side, 0) for window in band.split(side, 1)]


def windows_by_size(grid, side):
    """Windows of one size side by side, to attend as a batch -> order (N,), [(number, size), ...].

    There are at most four sizes: whole, cut off at the right, at the bottom, and in the corner.

    >>> order, sizes = windows_by_size((8, 5), 4)    # whole, cut, whole, cut
    >>> sizes, order[16:20].tolist(), order[32:].tolist()
    ([(2, 16), (2, 4)], [20, 21, 22, 23], [4, 9, 14, 19, 24, 29, 34, 39])
    """
    by_size = {}
    for window in windows(grid, side):
        by_size.setdefault(len(window), []).append(window)
    order = torch.cat([window for alike in by_size.values() for window in alike])
    return order, [(len(alike), size) for size, alike in by_size.items()]


def patch_rope(grid, d, device, dtype):
    """Rotary table (2, N, 4, d) of the patches, in float32 or wider: q and k are rotated in that.

    Half of the frequencies follow a patch's row, half its column. rotate() pairs channel i with
    i + d/2, so the channels are [row, column, row's pairs, column's pairs], d/4 of each.
    """
    cell, inner = torch.arange(grid[0] * grid[1], device=device), torch.arange(4, device=device)
    rows = cell[:, None] // grid[1] * MERGE + inner // MERGE  # (N, 4)
    columns = cell[:, None] % grid[1] * MERGE + inner % MERGE
    tables = [rope_table(at.flatten(), d // 2, 10000, dtype=wider(dtype)) for at in (rows, columns)]
    (row, row_pair), (column, column_pair) = (table.chunk(2, -1) for table in tables)
    return torch.cat([row, column, row_pair, column_pair], -1).unflatten(1, (-1, 4))


class PatchEmbed(nn.Module):
    """pixels (b, 3, H, W) -> (b, N, 4, C): the four patches of each token, both row by row.

    The tower reads films, `temporal_patch_size` frames at once: a picture is one that stands still.
    """

    def __init__(self, c):
        super().__init__()
        p, frames = c["patch_size"], c["temporal_patch_size"]
        self.proj = nn.Conv3d(3, c["hidden_size"], (frames, p, p), bias=False)  # for its weight

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
        parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2))
        for (number, size), part in zip(sizes, parts):  # three of (b, H, number * size, d)
            alone = [x.unflatten(2, (number, size)).transpose(1, 2).flatten(0, 1) for x in part]
            y = F.scaled_dot_product_attention(*alone)  # (b * number, H, size, d)
            seen.append(y.unflatten(0, (-1, number)).transpose(1, 2).flatten(2, 3))
        return self.proj(torch.cat(seen, 2).transpose(1, 2).flatten(2))  # of (b, H, n, d)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        C = c["hidden_size"]
        self.norm1, self.norm2 = RMSNorm(C, 1e-6), RMSNorm(C, 1e-6)  # no key states this epsilon
        self.attn, self.mlp = Attention(C, c["num_heads"]), MLP(c, bias=True)

    def forward(self, x, rope, sizes):
        x = x + self.attn(self.norm1(x), rope, sizes)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """A token's four patches (b, N, 4*C) -> the token (b, N, D): each normed, all in one MLP."""

    def __init__(self, c):
        super().__init__()
        four = MERGE ** 2 * c["hidden_size"]
        self.ln_q = RMSNorm(c["hidden_size"], 1e-6)
        self.mlp = nn.Sequential(nn.Linear(four, four), nn.GELU(),  # the exact (erf) GELU
                                 nn.Linear(four, c["out_hidden_size"]))

    def forward(self, x):
        return self.mlp(self.ln_q(x.unflatten(-1, (MERGE ** 2, -1))).flatten(-2))


class Tower(nn.Module):
    """pixels (b, 3, H, W), sides in whole tokens -> each token's four patches (b, N, 4*C).

    Sec. 2.1.1. Blocks in `fullatt_block_indexes` see the whole picture, the others windows of
    `window_size` pixels: most of the cost grows with the area and not with its square. The merger
    is here for its tensors' names: `project` calls it, once a crop's tokens have been chosen.
    """

    def __init__(self, c):
        super().__init__()
        self.cell = c["patch_size"] * MERGE  # pixels of a token's side
        self.side = c["window_size"] // self.cell  # tokens of a window's side
        self.whole, self.d = set(c["fullatt_block_indexes"]), c["hidden_size"] // c["num_heads"]
        self.patch_embed = PatchEmbed(c)
        self.blocks = nn.ModuleList(Layer(c) for _ in range(c["depth"]))
        self.merger = Merger(c)

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


# --------------------------------------------------------------------------------------- positions

# M-RoPE (Sec. 2.1.3; arXiv 2409.12191): of the d/2 rotary frequencies the first mrope_section[0]
# turn with a token's time, the next with its row, the last with its column; rope_table() does it.
# "w w <2 x 3 picture> w w":   time    0 1  2 2 2 2 2 2  5 6
#                              row     0 1  2 2 2 3 3 3  5 6
#                              column  0 1  2 3 4 2 3 4  5 6
# Ten tokens, but the next one is at 7: KVCache.shift is -3.

def picture_positions(start, grid):
    """(3, N) positions of a picture that begins at `start`: time stands still.

    >>> picture_positions(7, (2, 3)).tolist()
    [[7, 7, 7, 7, 7, 7], [7, 7, 7, 8, 8, 8], [7, 8, 9, 7, 8, 9]]
    """
    cell = torch.arange(grid[0] * grid[1])
    return start + torch.stack([0 * cell, cell // grid[1], cell % grid[1]])


def text_positions(start, t):
    """(3, t) positions of text from `start` on: the same on all axes, which is ordinary RoPE."""
    return torch.arange(start, start + t).expand(3, -1)


# --------------------------------------------------------------------------------------- recipes

# What the authors released: layers and heads of the teacher for questions about text in pictures
# and for those about natural scenes; B, R, labels and training are the same for both. Of the kinds,
# data/llava_mix.py writes ocr_vqa and gqa; one that is not named counts as the first, ocr_vqa.
REQUEST = ("Output the grounding bounding box of Region of Interest for the question. IMPORTANT: "
           "The output MUST be raw text, one box per line. DO NOT use JSON. Follow this exact "
           "format: x_min y_min x_max y_max {detail_label}.")
SHARED = dict(
    softmax="sequence", layers=3, tau=0.1, square=True, budget=[451584, 451584],  # 24 x 24
    labels=dict(grow=1, min_peak=5e-3, padding="background"),
    train=dict(lr=1e-4, warmup=0.03, betas=[0.9, 0.999], epochs=1, batch_size=16, grad_accum=8,
               clip=1.0))


def released(frozen, textual, natural, natural_sinks):
    """A recipe from B and {layer: heads} of each kind of question; only natural ones lose sinks."""
    sink = dict(kind="attention", attention=natural_sinks, threshold=1e-2)
    scenes = dict(attention=natural, sink=sink, request=REQUEST)
    kinds = {"ocr_vqa": {}, "gqa": scenes, "natural": scenes}
    return SHARED | dict(frozen=frozen, attention=textual, sink=None, kinds=kinds)


RECIPES = {
    ("qwen2_5_vl", 36, 2048): released(
        frozen=21, textual={"20": [1, 4], "22": [14]},
        natural={"21": [9, 11], "22": [0, 7]}, natural_sinks={"8": [1, 13]}),
    ("qwen2_5_vl", 28, 3584): released(
        frozen=16, textual={"22": [1, 4], "23": [6, 11]},
        natural={"16": [1, 7, 17], "19": [17, 20]}, natural_sinks={"9": [4, 22]}),
}


# ------------------------------------------------------------------------------------------- model

class Qwen2_5VL(LLaVA):
    """Tower, merger and Qwen2.5 decoder, with its tokeniser. Build it with `model.load`.

    Beside LLaVA's attributes: budget, (least, most) pixels of a picture and of a crop; settable.
    """
    recipes = RECIPES

    def build_tower(self):
        self.visual = Tower(self.config["vision"])
        self.budget = self.config.pop("budget")  # may change; what config.json says may not

    # ---- words

    def prompt_ids(self, question, history=()):
        """The chat template as ids, one image id where the image goes.

        history = ((question, answer), ...). Only the template places special tokens: what a user
        types stays text.
        """
        encode, token = self.tokenizer.encode, self.tokenizer.token_id
        begin, end, newline = token("<|im_start|>"), token("<|im_end|>"), encode("\n")
        ids = [begin, *encode(f"system\n{SYSTEM}"), end, *newline]
        for turn, (q, a) in enumerate([*history, (question, None)]):
            if turn == 0:
                ids += [begin, *encode("user\n"), token("<|vision_start|>"),
                        self.config["image_token"], token("<|vision_end|>"), *encode(q)]
            else:
                ids += [begin, *encode(f"user\n{q}")]
            ids += [end, *newline, begin, *encode("assistant\n" + (a or ""))]
            if a is not None:
                ids += [end, *newline]
        return ids

    def tokenize(self, prompt_text):
        """A rendered prompt with one <|image_pad|> -> ids; special tokens are taken by name."""
        return self.tokenizer.encode(prompt_text, special=True)

    # ---- pictures

    def pixels(self, picture, box=None):
        """What the tower sees of a picture, or of box in its pixels -> (3, H, W) float32.

        A crop has the whole picture's budget: the smaller it is, the more it is magnified.
        """
        if box is None:
            check_aspect(picture)
        else:
            picture = picture.crop(box)  # of any shape: it came out of a picture that was checked
        height, width = self.shown_size(picture)
        return to_tensor(picture.convert("RGB").resize((width, height), Image.BICUBIC))

    def shown_size(self, picture):
        """The (height, width) in pixels to which the budget brings a picture."""
        return smart_resize(picture.height, picture.width, self.budget, self.visual.cell)

    def grid_of(self, picture):
        check_aspect(picture)
        return self.visual.grid(*self.shown_size(picture))

    def token_grid(self, pixels):
        return self.visual.grid(*pixels.shape[-2:])

    def features(self, pixels):
        """(b, 3, H, W) -> (b, N, 4*C): each token's patches, not merged yet."""
        return self.visual(pixels.to(self.device, self.dtype))

    def project(self, features):
        return self.visual.merger(features)

    def frame(self, picture_size):
        """The grid covers the picture itself: nothing is padded."""
        return picture_size

    # ---- positions

    def positions(self, ids, grid):
        """(3, T) of ids whose image id stands for N tokens; text follows behind the longer side."""
        at = ids.index(self.config["image_token"])
        after = text_positions(at + max(grid), len(ids) - at - 1)
        positions = torch.cat([text_positions(0, at), picture_positions(at, grid), after], 1)
        return positions.to(self.device)

    def splice(self, tail, start, crops):
        """What follows the image in stage 2: each crop between markers, and then the tail.

        tail (1, t, D) begins with the image's own <|vision_end|>, which so far stood at `start`:
            <vision_start> image  <vision_start> crop <vision_end>  <vision_end> text
        As the authors have it: what comes before the crop is not touched.
        Of a crop's positions those of dropped tokens stay free. -> (1, t', D), positions (3, t').
        """
        token = self.tokenizer.token_id
        begin, end = self.embed([token("<|vision_start|>")]), self.embed([token("<|vision_end|>")])
        embeds, positions = [], []
        for crop in crops:
            behind = start + 1 + max(crop.grid)
            kept = picture_positions(start + 1, crop.grid)[:, crop.keep.cpu()]
            embeds += [begin, crop.tokens[None], end]
            positions += [text_positions(start, 1), kept, text_positions(behind, 1)]
            start = behind + 1
        positions.append(text_positions(start, tail.shape[1]))
        return torch.cat([*embeds, tail], 1), torch.cat(positions, 1).to(self.device)

    # ---- what a checkpoint of this family looks like

    @classmethod
    def read_config(cls, folder, config):
        """config.json, flat as published or nested as newer libraries save it -> sizes and flags.

        Raises BadInput on what is nonsense or not Qwen2.5-VL. What is absent is not guessed: the
        reference library's defaults are those of other models.
        """
        path = folder / "config.json"
        text, vision = config.get("text_config") or config, config["vision_config"]
        tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings")
        sizes = read_decoder(path, text) | {
            "vision": read_vision(path, vision), "budget": read_budget(folder),
            "image_token": config.get("image_token_id"), "tied": bool(tied),
            "eos_ids": read_eos(folder, text)}
        refuse(path, [(sizes["vision"]["out_hidden_size"] != sizes["hidden_size"],
                       "the tower's out_hidden_size is not the decoder's hidden_size")])
        return sizes

    @staticmethod
    def read_tokenizer(folder, config):
        tokenizer = BPE(folder / "tokenizer.json")
        for name in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"):
            tokenizer.token_id(name)
        image, vocab = tokenizer.token_id("<|image_pad|>"), config["vocab_size"]
        if image != config["image_token"] or tokenizer.size > vocab:
            raise BadInput(f"{tokenizer.path}: {tokenizer.size} tokens, <|image_pad|> is {image}; "
                           f"config.json has {vocab} embeddings and image_token_id "
                           f"{str(config['image_token'])[:40]}; use the checkpoint's own")
        return tokenizer

    @staticmethod
    def canonical(name):
        """As published, or as the reference library calls its modules -> our parameter's name."""
        name = re.sub(r"^model\.(?=visual\.|language_model\.|lm_head\.)", "", name)
        return re.sub(r"^model\.", "language_model.", name)

    def ignored(self, key):
        """Buffers; and, of a whole model that was released with its RPN, what RPN.load reads."""
        return key.startswith("language_model.twig_") or key.endswith("rotary_emb.inv_freq")


def check_aspect(picture):
    w, h = picture.size
    if max(w, h) > MAX_ASPECT * min(w, h):
        raise BadInput(f"a picture of {w} x {h} pixels: one side is more than {MAX_ASPECT} times "
                       "the other; crop it first")


# ---------------------------------------------------------------------------- a checkpoint's sizes

def read_decoder(path, text):
    """The decoder's part of config.json -> the sizes and flags that Block reads."""
    rope = text.get("rope_parameters") or text["rope_scaling"]
    theta = {"rope_theta": rope.get("rope_theta", text.get("rope_theta"))}
    sizes = read_text_sizes(path, text | {"rope_scaling": None, "rope_parameters": theta}, {})
    sections, kind = rope.get("mrope_section"), rope.get("rope_type", rope.get("type"))
    numbers = isinstance(sections, list) and all(type(n) is int and n > 0 for n in sections)
    refuse(path, [
        (kind not in ("mrope", "default"), f"rotary scaling {str(kind)[:40]} is not supported"),
        (not numbers or len(sections) != 3 or 2 * sum(sections) != sizes["head_dim"],
         "mrope_section must be three numbers of frequencies, half of head_dim in all"),
        (text.get("use_sliding_window"), "use_sliding_window is not supported")])
    wanted = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "vocab_size",
              "max_position_embeddings")
    return {key: sizes[key] for key in wanted} | dict(
        qkv_bias=True, final_norm=False, score_rope=True, mrope_section=sections)


def read_vision(path, vision):
    """vision_config -> the tower's sizes."""
    wanted = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size",
              "patch_size", "temporal_patch_size", "window_size", "spatial_merge_size")
    check_whole(path, vision, *wanted)
    blocks, heads = vision.get("fullatt_block_indexes"), vision["num_heads"]
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    refuse(path, [
        (vision["depth"] > 1024, "the tower's depth is not a sensible number"),
        (not isinstance(blocks, list) or not all(type(i) is int for i in blocks),
         "fullatt_block_indexes must be a list of blocks"),
        (vision["spatial_merge_size"] != MERGE, f"spatial_merge_size must be {MERGE}"),
        (channels != 3, "the tower must see 3 channels"),
        (vision.get("hidden_act", "silu") != "silu", "the tower's hidden_act must be silu"),
        (vision["hidden_size"] % (4 * heads) != 0, "the tower's head size must be a multiple of 4"),
        (vision["window_size"] < MERGE * vision["patch_size"], "window_size is below one token")])
    return {key: vision[key] for key in wanted} | {"fullatt_block_indexes": blocks}


def read_eos(folder, text):
    """The ids that end an answer: eos_token_id of generation_config.json, else of config.json."""
    path = folder / "generation_config.json"
    given = text.get("eos_token_id")
    if path.is_file():
        given = read_json(path).get("eos_token_id", given)
    ids = given if isinstance(given, list) else [given]
    if not ids or not all(type(i) is int for i in ids):
        raise BadInput(f"{path}: eos_token_id = {str(given)[:40]} is no token; download it again")
    return ids


def read_budget(folder):
    """Least and most pixels of the picture processor, in any spelling; without it the published."""
    path, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    if path.is_file():
        given = read_json(path)
    elif newer.is_file():
        path, given = newer, read_json(newer).get("image_processor")
    else:
        return PUBLISHED_BUDGET
    given = given if isinstance(given, dict) else {}
    size = given.get("size") if isinstance(given.get("size"), dict) else {}
    least = given.get("min_pixels", size.get("shortest_edge", size.get("min_pixels")))
    most = given.get("max_pixels", size.get("longest_edge", size.get("max_pixels")))
    if type(least) is not int or type(most) is not int or not 0 < least <= most:
        raise BadInput(f"{path}: min_pixels {str(least)[:40]}, max_pixels {str(most)[:40]}: must "
                       "be numbers, the smaller one first; download it again")
    return least, most

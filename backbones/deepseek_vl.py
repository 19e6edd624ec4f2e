"""
DeepSeek-VL 1.3B and 7B (Lu et al. 2024, arXiv 2403.05525): the towers, aligner, pixels and prompt
in which it differs from LLaVA.

    SigLIP-L/16 on 384 x 384 pixels     -> 24 x 24 features of 1024    both models
    SAM-B       on 1024 x 1024 pixels   -> 24 x 24 features of 1024    7B only: small print, edges

SigLIP is a plain vision transformer: every patch sees every patch, and the last layer is read. SAM
gets seven times the pixels, so most of its blocks look around within windows of 14 x 14 patches and
four see everything; two strided convolutions then bring its 64 x 64 patches to SigLIP's grid, where
the aligner joins the two features of each cell.
Left out: SigLIP's pooled output (attn_pool), dropout, other towers that the original can build.
Shapes: b batch, S image side, g grid, N = g*g image tokens, C width, H heads, d = C / H,
D the decoder's width; in SAM m cells a side of a window, or of the whole picture.
"""
import re

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from backbones.bpe import BPE
from clip import MEAN, MLP, PAD_COLOUR, STD, BadInput, pad_to_square, to_tensor
from model import (KNOWN, TEXT_DEFAULTS, LLaVA, check_number, check_whole, read_text_sizes, refuse,
                   wider)

SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual "
          "content that the user provides, and assist the user with a variety of tasks using "
          "natural language.")
BOS, EOS, IMAGE = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<image_placeholder>"
GREY = (127, 127, 127)  # what the 1.3B pads with; the 7B: LLaVA's colour
MIN_SIDE = 14  # pixels (preprocessor_config.json: min_size), so that no strip vanishes
TOWERS = {  # config.json only says a tower's name (model_name); the sizes behind it
    "siglip_large_patch16_384": dict(
        image_size=384, width=1024, layers=24, heads=16, patch_size=16, mlp_ratio=4),
    "sam_b_downsample": dict(
        image_size=1024, width=768, layers=12, heads=12, patch_size=16, mlp_ratio=4,
        window_size=14, global_attn_indexes=[2, 5, 8, 11], prompt_embed_dim=256,
        downsample_channels=[512, 1024]),
}


# ----------------------------------------------------------------------------------------- pixels

def to_unit(picture):
    """An RGB PIL image -> float32 pixels (3, h, w) in [0, 1]; each tower has its own mean."""
    return to_tensor(picture, mean=(0, 0, 0), std=(1, 1, 1))


def resize_and_pad(picture, size, colour):
    """The whole picture as DeepSeek-VL sees it -> a square PIL image of side `size`.

    Long side to `size`, bicubic, both sides rounded down; then pasted into the middle of a square
    of one colour, an odd row or column of padding going to the bottom or right.

    >>> picture = Image.new("RGB", (100, 30), "red")  # 30 / 100 * 384 = 115.2 rows
    >>> square = resize_and_pad(picture, 384, (127, 127, 127))
    >>> [square.getpixel((0, y)) for y in (133, 134, 248, 249)]
    [(127, 127, 127), (255, 0, 0), (255, 0, 0), (127, 127, 127)]
    """
    w, h = (max(int(side / max(picture.size) * size), MIN_SIDE) for side in picture.size)
    return pad_to_square(picture.resize((w, h), Image.BICUBIC), colour)


# ----------------------------------------------------------------------------------------- SigLIP

class SigLIPAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, C = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (b, H, n, d)
        y = F.scaled_dot_product_attention(q, k, v)  # (b, H, n, d), every patch sees every patch
        return self.proj(y.transpose(1, 2).reshape(b, n, C))


def build_mlp(width, hidden):
    """The MLP of both towers: CLIP's with the exact (erf) GELU."""
    return MLP(dict(hidden_size=width, intermediate_size=hidden, hidden_act="gelu"))


class SigLIPBlock(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = SigLIPAttention(width, heads), build_mlp(width, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SigLIP(nn.Module):
    """pixels (b, 3, S, S) in [0, 1] -> patch features (b, N, C): all blocks and the final norm.

    Zhai et al. 2023, arXiv 2303.15343. Like CLIP's tower, but no token stands for the whole
    picture (a head pools the patches, unused here). `c`: sizes as in TOWERS, from vision_config's
    params (1.3B) or their low_res_cfg (7B).
    """

    def __init__(self, c):
        super().__init__()
        width, hidden = c["width"], int(c["width"] * c["mlp_ratio"])
        self.image_size, self.grid = c["image_size"], c["image_size"] // c["patch_size"]
        self.patch_embed = nn.Module()  # only for the names of the keys
        self.patch_embed.proj = nn.Conv2d(3, width, c["patch_size"], stride=c["patch_size"])
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid ** 2, width))
        self.blocks = nn.ModuleList(
            SigLIPBlock(width, c["heads"], hidden) for _ in range(c["layers"]))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels):
        pixels = ((pixels - 0.5) / 0.5).to(self.pos_embed.dtype)
        x = self.patch_embed.proj(pixels)  # (b, C, g, g)
        x = x.flatten(2).transpose(1, 2) + self.pos_embed  # (b, N, C), row by row
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # (b, N, C)


# -------------------------------------------------------------------------------------------- SAM

def to_windows(x, m):
    """(b, h, w, C) -> (b * windows, m, m, C), row by row; zeros fill up the bottom and right.

    >>> x = torch.tensor([[1, 2, 3], [4, 5, 6]]).view(1, 2, 3, 1)
    >>> to_windows(x, 2).flatten(1).tolist()
    [[1, 2, 4, 5], [3, 0, 6, 0]]
    """
    b, h, w, C = x.shape
    x = F.pad(x, (0, 0, 0, -w % m, 0, -h % m))  # (b, rows * m, columns * m, C)
    x = x.unflatten(2, (-1, m)).unflatten(1, (-1, m))  # (b, rows, m, columns, m, C)
    return x.transpose(2, 3).reshape(-1, m, m, C)


def from_windows(x, h, w):
    """The inverse: (b * windows, m, m, C) -> (b, h, w, C), without the padding.

    >>> x = torch.arange(24).view(1, 4, 6, 1)
    >>> torch.equal(from_windows(to_windows(x, 3), 4, 6), x)
    True
    """
    m, C = x.shape[2:]
    rows, columns = -(-h // m), -(-w // m)
    x = x.view(-1, rows, columns, m, m, C).transpose(2, 3)  # (b, rows, m, columns, m, C)
    return x.reshape(-1, rows * m, columns * m, C)[:, :h, :w]


def by_distance(table, m):
    """A vector for each distance, (2m-1, d) -> (m, m, d): entry [q, k] is row q - k + m - 1.

    >>> by_distance(torch.arange(5).view(5, 1), 3).flatten(1).tolist()  # row 2 is distance 0
    [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    """
    at = torch.arange(m, device=table.device)
    return table[at[:, None] - at + m - 1]


class SAMAttention(nn.Module):
    """All cells of a window (m, m) see each other; how far apart they lie shifts their scores.

    The shift is q . R_h[rows apart] + q . R_w[columns apart], q not divided by sqrt(d) as in the
    score (decomposed relative positions: Li et al. 2022, arXiv 2112.01526, section 4.1).
    """

    def __init__(self, width, heads, m):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * m - 1, width // heads))  # R_h
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * m - 1, width // heads))  # R_w

    def forward(self, x):
        b, m, _, C = x.shape
        qkv = self.qkv(x).view(b, m * m, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (b, H, m*m, d)
        at = q.unflatten(2, (m, m))  # (b, H, m, m, d): the query of the cell in row y, column x
        # What a key in row (column) k adds for that query: (b, H, m, m, m)
        by_row = torch.einsum("bHyxd,ykd->bHyxk", at, by_distance(self.rel_pos_h, m))
        by_column = torch.einsum("bHyxd,xkd->bHyxk", at, by_distance(self.rel_pos_w, m))
        shift = by_row.contiguous()[..., :, None] + by_column.contiguous()[..., None, :]
        shift = shift.view(b, self.heads, m * m, m * m)  # from (b, H, m, m, m, m)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=shift)  # (b, H, m*m, d)
        return self.proj(y.transpose(1, 2).reshape(b, m, m, C))


class SAMBlock(nn.Module):
    """(b, cells, cells, C) -> the same. `window` cells a side; 0: it sees the whole picture."""

    def __init__(self, width, heads, hidden, window, cells):
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = SAMAttention(width, heads, window or cells)
        self.mlp = build_mlp(width, hidden)

    def forward(self, x):
        h, w = x.shape[1:3]
        y = self.norm1(x)
        if self.window:  # zeros are added after the norm and attend like any cell
            y = from_windows(self.attn(to_windows(y, self.window)), h, w)
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, C, h, w)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SAM(nn.Module):
    """pixels (b, 3, S, S) in [0, 1] -> features (b, N, C') on a grid (g, g), C' = 1024.

    The image encoder of Kirillov et al. 2023, arXiv 2304.02643, then DeepSeek-VL's way to
    SigLIP's grid (section 3.1, hybrid vision encoder): a neck, bilinear to 4g cells a side, two
    convolutions of stride 2. What its first global block saw takes the same way through a neck of
    its own and is added, with one learnt weight, to keep what is low-level. `c`: sizes as in
    TOWERS, from vision_config's params.high_res_cfg.
    """

    def __init__(self, c, grid):
        super().__init__()
        width, hidden = c["width"], int(c["width"] * c["mlp_ratio"])
        cells = c["image_size"] // c["patch_size"]
        self.image_size, self.grid = c["image_size"], grid
        self.patch_embed = nn.Module()  # only for the names of the keys
        self.patch_embed.proj = nn.Conv2d(3, width, c["patch_size"], stride=c["patch_size"])
        self.pos_embed = nn.Parameter(torch.zeros(1, cells, cells, width))
        windows = [c["window_size"]] * c["layers"]
        for layer in c["global_attn_indexes"]:
            windows[layer] = 0
        self.first_global = windows.index(0)
        self.blocks = nn.ModuleList(
            SAMBlock(width, c["heads"], hidden, window, cells) for window in windows)
        self.neck = self.build_neck(width, c["prompt_embed_dim"])
        self.neck_hd = self.build_neck(width, c["prompt_embed_dim"])
        channels = [c["prompt_embed_dim"], *c["downsample_channels"]]
        self.downsamples = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False)
            for a, b in zip(channels, channels[1:]))
        self.hd_alpha_downsamples = nn.Parameter(torch.zeros(1))

    @staticmethod
    def build_neck(width, channels):
        return nn.Sequential(
            nn.Conv2d(width, channels, 1, bias=False),
            ChannelNorm(channels, eps=1e-6),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            ChannelNorm(channels, eps=1e-6))

    def shrink(self, x, neck):
        """(b, cells, cells, C) -> (b, C', g, g)"""
        x = neck(x.permute(0, 3, 1, 2))  # (b, 256, cells, cells)
        side = 4 * self.grid
        wide = x.to(wider(x.dtype))
        x = F.interpolate(wide, (side, side), mode="bilinear").to(x.dtype)  # (b, 256, 4g, 4g)
        for convolution in self.downsamples:
            x = convolution(x)  # (b, 512, 2g, 2g), then (b, 1024, g, g)
        return x

    def forward(self, pixels):
        mean, std = torch.tensor([MEAN, STD], device=pixels.device).view(2, 3, 1, 1)
        pixels = ((pixels - mean) / std).to(self.pos_embed.dtype)  # CLIP's mean, not SAM's
        x = self.patch_embed.proj(pixels)
        x = x.permute(0, 2, 3, 1) + self.pos_embed  # (b, cells, cells, C)
        for layer, block in enumerate(self.blocks):
            x = block(x)
            if layer == self.first_global:
                early = x
        y = self.shrink(x, self.neck)  # (b, C', g, g)
        y = y + self.hd_alpha_downsamples * self.shrink(early, self.neck_hd)
        return y.flatten(2).transpose(1, 2)  # (b, N, C'), row by row


# ---------------------------------------------------------------------------------------- aligner

class Aligner(nn.Module):
    """1.3B (projector_type mlp_gelu): SigLIP's features (b, n, C) -> (b, n, D)."""

    def __init__(self, C, D):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(C, D), nn.GELU(), nn.Linear(D, D))

    def forward(self, x):
        return self.layers(x)


class HybridAligner(nn.Module):
    """7B (low_high_hybrid_split_mlp_gelu): SAM's and SigLIP's features -> (b, n, D).

    They come side by side, (b, n, C' + C). Each fills half of the width, SAM's the first.
    """

    def __init__(self, C_high, C_low, D):
        super().__init__()
        self.split = [C_high, C_low]
        self.high_up_proj, self.low_up_proj = nn.Linear(C_high, D // 2), nn.Linear(C_low, D // 2)
        self.layers = nn.Sequential(nn.GELU(), nn.Linear(D, D))

    def forward(self, x):
        high, low = x.split(self.split, -1)
        x = torch.cat([self.high_up_proj(high), self.low_up_proj(low)], -1)  # (b, n, D)
        return self.layers(x)


# ------------------------------------------------------------------------------------ DeepSeek-VL

class DeepSeekVL(LLaVA):
    """LLaVA with SigLIP and perhaps SAM as its eyes, an aligner as its projector, another prompt.

    Checkpoints: deepseek-ai/deepseek-vl-1.3b-chat and -7b-chat (model_type multi_modality).
    """
    recipes = {  # B and R alone; the rest was never published
        ("multi_modality", 24, 2048): dict(
            frozen=9, layers=3, note="of the authors' recipe only B = 9 and R = 3 are known"),
        ("multi_modality", 30, 4096): dict(
            frozen=11, layers=3, note="the authors' recipe is unknown but for R = 3; B = 11 is our "
                                      "guess, the 1.3B's share of the layers"),
    }

    def __init__(self, config, tokenizer):
        ids = {"image_token": tokenizer.token_id(IMAGE), "eos_ids": [tokenizer.token_id(EOS)]}
        super().__init__(config | ids, tokenizer)

    def build_tower(self):
        vision, D = self.config["vision"], self.config["hidden_size"]
        self.siglip, self.sam = SigLIP(vision["low"]), None
        self.grid = self.siglip.grid, self.siglip.grid
        if vision["high"] is None:
            self.aligner = Aligner(vision["low"]["width"], D)
        else:
            self.sam = SAM(vision["high"], self.siglip.grid)
            channels = vision["high"]["downsample_channels"][-1]
            self.aligner = HybridAligner(channels, vision["low"]["width"], D)

    # ---- words

    def prompt_ids(self, question, history=()):
        """The chat prompt as ids, one image_token where the image goes.

        history = ((question, answer), ...). Texts are stripped as DeepSeek-VL does; its special
        tokens are placed here alone: typed by a user they stay text.
        """
        encode, (eos,) = self.tokenizer.encode, self.config["eos_ids"]
        ids = [self.tokenizer.token_id(BOS), *encode(f"{SYSTEM}\n\nUser: ")]
        ids.append(self.config["image_token"])
        for turn, (q, a) in enumerate([*history, (question, None)]):
            asked = f"\n{q.rstrip()}" if turn == 0 else f"User: {q.strip()}"
            if a is None:
                ids += encode(f"{asked}\n\nAssistant:")
            else:
                ids += [*encode(f"{asked}\n\nAssistant: {a.strip()}"), eos]
        return ids

    def tokenize(self, prompt_text):
        """A rendered prompt with one <image_placeholder>, without BOS -> ids, one for the image."""
        bos = self.tokenizer.token_id(BOS)
        return [bos, *self.tokenizer.encode(prompt_text, special=True)]

    # ---- pictures

    def pixels(self, picture, box=None):
        """A picture, or a box of it in source pixels -> (3, S, S) float32 in [0, 1].

        S is SAM's side, or SigLIP's where there is no SAM. Crops are stretched as LLaVA's are: no
        other rule was published.
        """
        picture = picture.convert("RGB")
        size = (self.sam or self.siglip).image_size
        if box is None:
            colour = GREY if self.sam is None else PAD_COLOUR
            return to_unit(resize_and_pad(picture, size, colour))
        return to_unit(picture.crop(box).resize((size, size), Image.BILINEAR))

    def features(self, pixels):
        """(b, 3, S, S) -> (b, N, C); with SAM (b, N, C' + C), SAM's features first.

        SigLIP then sees the same square, made smaller as floats.
        """
        pixels = pixels.to(self.device)
        if self.sam is None:
            return self.siglip(pixels)
        side = self.siglip.image_size
        small = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        return torch.cat([self.sam(pixels), self.siglip(small)], -1)

    def project(self, features):
        return self.aligner(features)

    # ---- what a checkpoint of this family looks like

    @classmethod
    def read_config(cls, folder, config):
        """config.json's content -> the decoder's sizes, the towers' under "vision", and flags.

        Raises BadInput on what is nonsense, not DeepSeek-VL, or a port under other names.
        """
        path = folder / "config.json"
        if config.get("model_type") != "multi_modality":
            size = "7b" if "high_res_vision_config" in config else "1.3b"
            raise BadInput(f"{path}: a port of DeepSeek-VL with tensors under other names; use the "
                           f"original, {KNOWN[f'deepseek-vl-{size}']}")
        text = read_text_sizes(path, config["language_config"], TEXT_DEFAULTS)
        towers = read_towers(path, config["vision_config"])
        check_aligner(path, config["aligner_config"], text["hidden_size"], towers)
        return text | {"vision": towers, "tied": bool(text.get("tie_word_embeddings", False))}

    @staticmethod
    def read_tokenizer(folder, config):
        tokenizer = BPE(folder / "tokenizer.json")
        if tokenizer.size > config["vocab_size"]:
            raise BadInput(f"{tokenizer.path}: {tokenizer.size} tokens, but config.json has "
                           f"{config['vocab_size']} embeddings; use the tokenizer.json of this "
                           "checkpoint")
        return tokenizer

    @staticmethod
    def canonical(name):
        name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
        name = re.sub(r"^language_model\.model\.", "language_model.", name)
        name = re.sub(r"^vision_model\.vision_tower(_low)?\.vision_tower\.", "siglip.", name)
        name = re.sub(r"^vision_model\.vision_tower_high\.vision_tower\.", "sam.", name)
        return name.replace(".mlp.lin", ".mlp.fc")  # SAM's spelling

    def ignored(self, key):
        """Tensors that checkpoints hold and nothing reads: SigLIP's pooling, two norms, buffers."""
        return (key.startswith(("siglip.attn_pool.", "vision_model.high_layer_norm.",
                                "vision_model.low_layer_norm."))
                or key.endswith("rotary_emb.inv_freq"))


def read_towers(path, given):
    """vision_config -> {"low": SigLIP's sizes, "high": SAM's or None}. Raises BadInput."""
    kind, params = given["cls"], given["params"]
    siglip, sam = TOWERS  # their names
    if kind == "CLIPVisionTower":
        return {"low": read_tower(path, params, siglip), "high": None}
    if kind == "HybridVisionTower":
        return {"low": read_tower(path, params["low_res_cfg"], siglip),
                "high": read_tower(path, params["high_res_cfg"], sam)}
    raise BadInput(f"{path}: vision_config.cls {str(kind)[:40]} is unknown; "
                   "CLIPVisionTower (1.3B) and HybridVisionTower (7B) are supported")


def read_tower(path, given, name):
    """One tower's object -> its sizes: those it spells out, else those behind its name."""
    if given.get("model_name") != name:
        raise BadInput(f"{path}: tower {str(given.get('model_name'))[:40]} where {name} is "
                       f"expected; use {KNOWN['deepseek-vl-1.3b']} or {KNOWN['deepseek-vl-7b']}")
    c = TOWERS[name] | {key: given[key] for key in TOWERS[name] if key in given}
    check_number(path, c, "mlp_ratio")
    lists = ("global_attn_indexes", "downsample_channels")
    check_whole(path, c, *(key for key in c if key not in ("mlp_ratio", *lists)))
    for key, most in zip(lists, (c["layers"], 1 << 20)):
        numbers = c.get(key, [0])  # SigLIP has no lists
        if not numbers or not all(type(n) is int and 0 <= n < most for n in numbers):
            raise BadInput(f"{path}: {key} = {str(numbers)[:40]} is no list of sensible numbers; "
                           "download it again")
    refuse(path, [
        (given.get("select_layer", -1) != -1, "select_layer must be -1"),
        (given.get("select_feature", "same") != "same", "select_feature must be same"),
        (c["width"] % c["heads"] != 0, "the tower's width is not a multiple of its heads"),
        (c["image_size"] < c["patch_size"], "image_size is smaller than patch_size"),
        (len(c.get("downsample_channels", [0, 0])) != 2, "downsample_channels must be two")])
    return c


def check_aligner(path, given, width, towers):
    """Is aligner_config the one for these towers? Raises BadInput."""
    params = given["params"]
    kind = "mlp_gelu" if towers["high"] is None else "low_high_hybrid_split_mlp_gelu"
    refuse(path, [
        (params.get("projector_type") != kind, f"projector_type must be {kind} for its towers"),
        (params.get("depth", 2) != 2, "the aligner's depth must be 2"),
        (params.get("n_embed", width) != width, "the aligner's n_embed is not the hidden_size"),
        (width % 2 != 0, "hidden_size must be even")])

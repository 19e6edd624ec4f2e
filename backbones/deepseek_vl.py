"""
DeepSeek-VL 1.3B and 7B (Lu et al. 2024, arXiv 2403.05525): the towers, aligner, pixels and prompt
in which it differs from LLaVA.

    SigLIP-L/16 on 384 x 384 pixels     -> 24 x 24 features of 1024    both models
    SAM-B       on 1024 x 1024 pixels   -> 24 x 24 features of 1024    7B only: small print, edges

SigLIP is a plain vision transformer: every patch sees every patch, and the last layer is read. SAM
gets seven times the pixels, so most of its blocks look around within windows of 14 x 14 patches and
four see everything. Two strided convolutions then bring its 64 x 64 patches to SigLIP's grid, where
the aligner joins the two features of each cell.
Left out: SigLIP's pooled output (attn_pool), dropout, other towers that the original can build.
Shapes: b batch, S image side, g grid, N = g*g image tokens, C width, H heads, d = C / H,
D the decoder's width; in SAM m cells a side of a window, or of the whole picture.
"""
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from backbones.bpe import BPE
from clip import MEAN, MLP, STD, pad_to_square, reading, to_tensor
from model import (LLaVA, decoder_config, expect, from_json, is_tied, note_template, read_eos,
                   read_json, read_processor, wider)

SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual "
          "content that the user provides, and assist the user with a variety of tasks using "
          "natural language.")
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
IMAGE = "<image_placeholder>"
MIN_SIDE = 14  # pixels, so that no strip vanishes
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


@dataclass
class SigLIPConfig:
    """SigLIP's sizes. config.json only gives the name that stands for these defaults."""
    image_size: int = 384
    width: int = 1024
    layers: int = 24
    heads: int = 16
    patch_size: int = 16
    mlp_ratio: float = 4
    name, mean, std = "siglip_large_patch16_384", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass
class SAMConfig:
    """SAM's sizes, in the same way."""
    image_size: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    patch_size: int = 16
    mlp_ratio: float = 4
    window_size: int = 14                      # cells of a window's side
    global_attn_indexes: list = (2, 5, 8, 11)  # blocks without windows
    prompt_embed_dim: int = 256                # of the neck
    downsample_channels: list = (512, 1024)
    name, mean, std = "sam_b_downsample", MEAN, STD  # quirk: CLIP's mean, not SAM's


# ----------------------------------------------------------------------------------------- pixels

def to_unit(picture):
    """An RGB picture -> float32 pixels (3, h, w) in [0, 1]; each tower has its own mean."""
    return to_tensor(picture, mean=(0, 0, 0), std=(1, 1, 1))


def resize_and_pad(picture, size, colour):
    """The whole picture as DeepSeek-VL sees it -> a square PIL image of side `size`.

    Long side to `size`, bicubic, both sides rounded down. It is then pasted into the middle of a
    square of one colour; an odd row or column of padding goes to the bottom or right.

    >>> picture = Image.new("RGB", (100, 30), "red")  # 30 / 100 * 384 = 115.2 rows
    >>> square = resize_and_pad(picture, 384, (127, 127, 127))
    >>> [square.getpixel((0, y)) for y in (133, 134, 248, 249)]
    [(127, 127, 127), (255, 0, 0), (255, 0, 0), (127, 127, 127)]
    """
    w, h = (max(int(side / max(picture.size) * size), MIN_SIDE) for side in picture.size)
    return pad_to_square(picture.resize((w, h), Image.BICUBIC), colour)


def padding_colour(c):
    """A tower's mean as a colour: grey for the 1.3B's SigLIP, CLIP's mean for the 7B's SAM."""
    return tuple(int(255 * m) for m in c.mean)


# ----------------------------------------------------------------------------------------- SigLIP

class Attention(nn.Module):
    """Every patch sees every patch: (b, n, C) -> (b, n, C)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x):
        """(b, n, C) -> q, k and v, each (b, H, n, d)"""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        y = F.scaled_dot_product_attention(*self.split(x))  # (b, H, n, d)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A layer of either tower; `attention` is of its kind."""

    def __init__(self, c, attention):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(c.width), LayerNorm(c.width)
        self.attn, self.mlp = attention, MLP(c.width, int(c.width * c.mlp_ratio))  # erf GELU

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """pixels (b, 3, S, S) in [0, 1] -> (b, C, cells, cells), normalised by the tower's own mean."""

    def __init__(self, c):
        super().__init__()
        self.statistics = [c.mean, c.std]
        self.proj = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size)

    def forward(self, pixels):
        mean, std = torch.tensor(self.statistics, device=pixels.device).view(2, 3, 1, 1)
        return self.proj(((pixels - mean) / std).to(self.proj.weight.dtype))


class SigLIP(nn.Module):
    """pixels (b, 3, S, S) in [0, 1] -> patch features (b, N, C): all blocks and the final norm.

    Zhai et al. 2023, arXiv 2303.15343. Like CLIP's tower, but no token stands for the whole
    picture (a head pools the patches, unused here).
    """

    def __init__(self, c):
        super().__init__()
        self.config, self.grid = c, c.image_size // c.patch_size
        self.patch_embed = PatchEmbed(c)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid ** 2, c.width))
        self.blocks = nn.ModuleList(
            Block(c, Attention(c.width, c.heads)) for _ in range(c.layers))
        self.norm = LayerNorm(c.width)

    def forward(self, pixels):
        x = self.patch_embed(pixels)  # (b, C, g, g)
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


class SAMAttention(Attention):
    """(b, h, w, C) -> the same. The cells of a window (m, m) see each other.

    How far apart they lie shifts their scores by q . R_h[rows apart] + q . R_w[columns apart], with
    q not divided by sqrt(d) as it is in the score (decomposed relative positions: Li et al. 2022,
    arXiv 2112.01526, section 4.1). quirk: the zeros that fill up a window attend like any cell.
    """

    def __init__(self, width, heads, m):
        super().__init__(width, heads)
        self.m = m
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * m - 1, width // heads))  # R_h
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * m - 1, width // heads))  # R_w

    def forward(self, x):
        (_, h, w, _), m = x.shape, self.m
        q, k, v = self.split(to_windows(x, m).flatten(1, 2))  # each (windows, H, m*m, d)
        at = q.unflatten(2, (m, m))  # (windows, H, m, m, d): the query of the cell in row y, col x
        # What a key in row (column) k adds for that query: (windows, H, m, m, m)
        by_row = torch.einsum("bHyxd,ykd->bHyxk", at, by_distance(self.rel_pos_h, m))
        by_column = torch.einsum("bHyxd,xkd->bHyxk", at, by_distance(self.rel_pos_w, m))
        shift = by_row.contiguous()[..., :, None] + by_column.contiguous()[..., None, :]
        shift = shift.flatten(4).flatten(2, 3)  # (windows, H, m*m, m*m), a view
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=shift)  # (windows, H, m*m, d)
        y = self.proj(y.transpose(1, 2).flatten(2))  # (windows, m*m, C)
        return from_windows(y.unflatten(1, (m, m)), h, w)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, C, h, w)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def build_neck(width, channels):
    return nn.Sequential(
        nn.Conv2d(width, channels, 1, bias=False),
        ChannelNorm(channels, eps=1e-6),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        ChannelNorm(channels, eps=1e-6))


class SAM(nn.Module):
    """pixels (b, 3, S, S) in [0, 1] -> features (b, N, C') on a grid (g, g), C' = 1024.

    The image encoder of Kirillov et al. 2023, arXiv 2304.02643, then DeepSeek-VL's way to
    SigLIP's grid (section 3.1, hybrid vision encoder): a neck, bilinear to 4g cells a side, two
    convolutions of stride 2. To keep what is low-level, the output of the first global block takes
    the same way through a neck of its own and is added with one learnt weight.
    """

    def __init__(self, c, grid):
        super().__init__()
        cells = c.image_size // c.patch_size
        self.config, self.grid = c, grid
        self.patch_embed = PatchEmbed(c)
        self.pos_embed = nn.Parameter(torch.zeros(1, cells, cells, c.width))
        sides = [c.window_size] * c.layers
        for layer in c.global_attn_indexes:
            sides[layer] = cells
        self.blocks = nn.ModuleList(Block(c, SAMAttention(c.width, c.heads, m)) for m in sides)
        self.neck = build_neck(c.width, c.prompt_embed_dim)
        self.neck_hd = build_neck(c.width, c.prompt_embed_dim)
        halve = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1, bias=False)
        first, second = c.downsample_channels
        self.downsamples = nn.Sequential(halve(c.prompt_embed_dim, first), halve(first, second))
        self.hd_alpha_downsamples = nn.Parameter(torch.zeros(1))

    def shrink(self, x, neck):
        """(b, cells, cells, C) -> (b, C', g, g)"""
        x = neck(x.permute(0, 3, 1, 2))  # (b, 256, cells, cells)
        wide = x.to(wider(x.dtype))
        x = F.interpolate(wide, (4 * self.grid,) * 2, mode="bilinear").to(x.dtype)
        return self.downsamples(x)  # (b, 256, 4g, 4g) -> (b, 512, 2g, 2g) -> (b, 1024, g, g)

    def forward(self, pixels):
        x = self.patch_embed(pixels).permute(0, 2, 3, 1)  # (b, cells, cells, C)
        x = x + self.pos_embed
        for layer, block in enumerate(self.blocks):
            x = block(x)
            if layer == min(self.config.global_attn_indexes):
                early = x
        y = self.shrink(x, self.neck)  # (b, C', g, g)
        y = y + self.hd_alpha_downsamples * self.shrink(early, self.neck_hd)
        return y.flatten(2).transpose(1, 2)  # (b, N, C'), row by row


# ---------------------------------------------------------------------------------------- aligner

class HybridAligner(nn.Module):
    """7B (low_high_hybrid_split_mlp_gelu): SAM's and SigLIP's features -> (b, n, D).

    They come side by side, (b, n, C' + C). Each fills half of the width, SAM's the first.
    """

    def __init__(self, C_high, C_low, D):
        super().__init__()
        self.high_up_proj, self.low_up_proj = nn.Linear(C_high, D // 2), nn.Linear(C_low, D // 2)
        self.layers = nn.Sequential(nn.GELU(), nn.Linear(D, D))

    def forward(self, x):
        high, low = x.tensor_split([self.high_up_proj.in_features], -1)
        x = torch.cat([self.high_up_proj(high), self.low_up_proj(low)], -1)  # (b, n, D)
        return self.layers(x)


# ------------------------------------------------------------------------------------ DeepSeek-VL

class DeepSeekVL(LLaVA):
    """LLaVA with SigLIP and perhaps SAM as its eyes, an aligner as its projector, another prompt.

    Checkpoints: deepseek-ai/deepseek-vl-1.3b-chat and -7b-chat (model_type multi_modality).
    """
    recipes = {  # B and R alone; the rest was never published
        ("multi_modality", 24, 2048): dict(
            frozen_layers=9, rpn_layers=3,
            note="of the authors' recipe only B = 9 and R = 3 are known"),
        ("multi_modality", 30, 4096): dict(
            frozen_layers=11, rpn_layers=3,
            note="of the authors' recipe only R = 3 is known; B = 11 is our guess, the same share "
                 "of the layers as in the 1.3B"),
    }

    def __init__(self, config, tokenizer):
        eos = config.eos_ids or [tokenizer.token_id(EOS)]
        config = replace(config, eos_ids=eos, image_token=tokenizer.token_id(IMAGE))
        super().__init__(config, tokenizer)

    def build_tower(self):
        (low, high), D = self.config.vision, self.config.hidden_size
        self.siglip, self.sam = SigLIP(low), None
        self.grid = self.siglip.grid, self.siglip.grid
        if high is None:
            layers = nn.Sequential(nn.Linear(low.width, D), nn.GELU(), nn.Linear(D, D))
            self.aligner = nn.Sequential(OrderedDict(layers=layers))  # for the tensors' names
        else:
            self.sam = SAM(high, self.siglip.grid)
            self.aligner = HybridAligner(high.downsample_channels[-1], low.width, D)

    # ---- words

    def prompt_ids(self, question, history=()):
        """The chat prompt as ids, one image_token where the image goes.

        history = ((question, answer), ...). Texts are stripped as DeepSeek-VL does. Only the
        template places special tokens; if a user types them, they stay text.
        """
        encode, token = self.tokenizer.encode, self.tokenizer.token_id
        ids = [token(BOS), *encode(f"{SYSTEM}\n\nUser: "), self.config.image_token]
        for turn, (q, a) in enumerate([*history, (question, None)]):
            asked = f"\n{q.rstrip()}" if turn == 0 else f"User: {q.strip()}"
            if a is None:
                ids += encode(f"{asked}\n\nAssistant:")
            else:
                ids += [*encode(f"{asked}\n\nAssistant: {a.strip()}"), token(EOS)]
        return ids

    # ---- pictures

    def pixels(self, picture, box=None):
        """A picture, or a box of it in source pixels -> (3, S, S) float32 in [0, 1].

        S is SAM's side, or SigLIP's where there is no SAM. Crops are stretched as LLaVA's are: no
        other rule was published.
        """
        c = (self.sam or self.siglip).config
        if box is None:
            return to_unit(resize_and_pad(picture, c.image_size, padding_colour(c)))
        return to_unit(picture.crop(box).resize((c.image_size,) * 2, Image.BILINEAR))

    def features(self, pixels):
        """(b, 3, S, S) -> (b, N, C); with SAM (b, N, C' + C), SAM's features first.

        SigLIP then sees the same square, made smaller as floats.
        """
        pixels = pixels.to(self.device)
        if self.sam is None:
            return self.siglip(pixels)
        side = self.siglip.config.image_size
        small = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        return torch.cat([self.sam(pixels), self.siglip(small)], -1)

    def project(self, features):
        return self.aligner(features)

    # ---- what a checkpoint of this family looks like

    @classmethod
    def read_config(cls, folder, given):
        """config.json's content -> Config, the towers' sizes under `vision`."""
        text, vision = given["language_config"], given["vision_config"]
        expect(text, model_type=["llama"])
        expect(vision, cls=["CLIPVisionTower", "HybridVisionTower"])
        params, hybrid = vision["params"], vision["cls"] == "HybridVisionTower"
        low = read_tower(SigLIPConfig, params["low_res_cfg"] if hybrid else params)
        high = read_tower(SAMConfig, params["high_res_cfg"]) if hybrid else None
        projector = "low_high_hybrid_split_mlp_gelu" if hybrid else "mlp_gelu"
        expect(params, concat_type=["tuple"])
        expect(given["aligner_config"]["params"], projector_type=[projector], depth=[2])
        check_processor(folder, high or low)
        return decoder_config(
            text, vision=(low, high), tied=is_tied(given, text),
            eos_ids=read_eos(folder, given, text, {"eos_token_id": []}))  # []: the tokeniser's

    @classmethod
    def read_tokenizer(cls, folder, config):
        note_template(folder, "User: ", "Assistant:")
        return BPE(folder / "tokenizer.json", config.vocab_size)

    def renames(self):
        """As published. The 1.3B has one tower under that name, the 7B a low and a high one."""
        layers = self.config.vision[1].layers if self.sam else 0
        blocks = [f"sam.blocks.{layer}.mlp." for layer in range(layers)]
        return [
            ("language_model.lm_head.", "lm_head."), ("language_model.model.", "language_model."),
            ("vision_model.vision_tower.", "siglip."),
            ("vision_model.vision_tower_low.vision_tower.", "siglip."),
            ("vision_model.vision_tower_high.vision_tower.", "sam."),
            ("siglip.attn_pool.", None),
            ("vision_model.low_layer_norm.", None), ("vision_model.high_layer_norm.", None),
            *((block + "lin", block + "fc") for block in blocks)]


def read_tower(kind, given):
    """A tower's object in config.json -> its sizes: those it states, else those of its name."""
    expect(given, model_name=[kind.name], select_layer=[-1], select_feature=["same"],
           pixel_mean=[[*kind.mean]], pixel_std=[[*kind.std]])
    return from_json(kind, given)


def check_processor(folder, c):
    """Raise BadInput if the folder's processor does anything that pixels() or the prompt do not."""
    with reading(folder / "preprocessor_config.json", "this program cannot run such a checkpoint"):
        expect(read_processor(folder), image_size=[c.image_size], min_size=[MIN_SIDE],
               do_normalize=[False], rescale_factor=[1 / 255], image_mean=[[*c.mean]],
               background_color=[[*padding_colour(c)]])
        expect(read_json(folder / "processor_config.json", optional=True), sft_format=["deepseek"],
               image_tag=[IMAGE], add_special_token=[False])

"""
DeepSeek-VL 1.3B and 7B (Lu et al., 2024): what differs from LLaVA, that is two towers, the aligner, prompt and pixels.

    SigLIP-L/16 on 384 x 384 pixels      24 x 24 features of 1024      both sizes: what is in the picture
    SAM-B       on 1024 x 1024 pixels    24 x 24 features of 1024      7B only: small things, a letter, an edge

SigLIP is a plain vision transformer: every patch sees every patch, and the last layer is read. SAM sees seven times the
pixels, so most of its blocks attend within windows of 14 x 14 patches and four see everything; two strided convolutions
then bring its 64 x 64 patches to SigLIP's grid. Both have one feature at each cell, and the aligner joins them there.
Left out: SigLIP's pooled output (attn_pool), dropout, and every other tower the original code can build.
Shapes: b batch, S image side, g grid, N = g*g image tokens, C width, H heads, d = C / H, D the decoder's width.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from clip import MEAN, STD, BadInput

MIN_SIDE = 14  # pixels: preprocessor_config.json's min_size, so that a strip does not vanish
TOWERS = {  # config.json names a tower by model_name alone; these are the sizes behind the names
    "siglip_large_patch16_384": dict(image_size=384, width=1024, layers=24, heads=16, patch_size=16, mlp_ratio=4),
    "sam_b_downsample": dict(image_size=1024, width=768, layers=12, heads=12, patch_size=16, mlp_ratio=4, window_size=14,
                             global_attn_indexes=(2, 5, 8, 11), prompt_embed_dim=256, downsample_channels=(512, 1024)),
}


# --------------------------------------------------------------------------------------------------------------- pixels

def to_unit(picture):
    """An RGB PIL image -> float32 pixels (3, h, w) in [0, 1]: each tower normalises them in its own way."""
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return raw.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 255


def resize_and_pad(picture, size, colour):
    """The long side to `size`, bicubic, both sides rounded down; then pasted into the middle of a square of one colour.

    >>> picture = Image.new("RGB", (100, 30), "red")          # 384 wide, 30 / 100 * 384 = 115.2 high
    >>> square = resize_and_pad(picture, 384, (127, 127, 127))
    >>> [square.getpixel((0, y)) for y in (133, 134, 248, 249)]
    [(127, 127, 127), (255, 0, 0), (255, 0, 0), (127, 127, 127)]
    """
    w, h = (max(int(side / max(picture.size) * size), MIN_SIDE) for side in picture.size)
    square = Image.new("RGB", (size, size), colour)
    square.paste(picture.resize((w, h), Image.BICUBIC), ((size - w) // 2, (size - h) // 2))
    return square


def normalise(pixels, mean, std):
    """(b, 3, S, S) in [0, 1] -> the same around 0, channel by channel."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


# --------------------------------------------------------------------------------------------------------------- SigLIP

class Patches(nn.Module):
    """pixels (b, 3, S, S) -> a vector for each patch (b, C, g, g)."""

    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, pixels):
        return self.proj(pixels)


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


class SigLIPMLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # (b, n, C) -> (b, n, 4C) -> (b, n, C); the exact (erf) GELU


class SigLIPBlock(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = SigLIPAttention(width, heads), SigLIPMLP(width, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SigLIP(nn.Module):
    """pixels (b, 3, S, S) in [0, 1] -> patch features (b, N, C): the last block, after the final norm. No CLS token.

    Zhai et al. 2023, arXiv 2303.15343: CLIP's tower trained with a loss for each pair, so without one token for the whole
    picture. Sizes: vision_config.params (1.3B) or its low_res_cfg (7B); keys as in TOWERS.
    """

    def __init__(self, c):
        super().__init__()
        width, hidden = c["width"], int(c["width"] * c["mlp_ratio"])
        self.image_size, self.grid = c["image_size"], c["image_size"] // c["patch_size"]
        self.patch_embed = Patches(width, c["patch_size"])
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid ** 2, width))
        self.blocks = nn.ModuleList(SigLIPBlock(width, c["heads"], hidden) for _ in range(c["layers"]))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels):
        pixels = normalise(pixels, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).to(self.pos_embed.dtype)
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # (b, C, g, g) -> (b, N, C), row by row
        x = x + self.pos_embed  # (b, N, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # (b, N, C)


# ------------------------------------------------------------------------------------------------------------------ SAM

def to_windows(x, m):
    """(b, h, w, C) -> (b * windows, m, m, C), the windows row by row. What is missing at the bottom and right is zeros.

    >>> to_windows(torch.arange(1, 7).view(1, 2, 3, 1), 2).view(2, 4).tolist()       # [[1 2 3], [4 5 6]] and a column of 0
    [[1, 2, 4, 5], [3, 0, 6, 0]]
    """
    b, h, w, C = x.shape
    x = F.pad(x, (0, 0, 0, -w % m, 0, -h % m))  # (b, rows * m, columns * m, C)
    rows, columns = x.shape[1] // m, x.shape[2] // m
    return x.view(b, rows, m, columns, m, C).transpose(2, 3).reshape(-1, m, m, C)


def from_windows(x, h, w):
    """The inverse: (b * windows, m, m, C) -> (b, h, w, C), the padding cut off."""
    m, C = x.shape[2:]
    rows, columns = -(-h // m), -(-w // m)
    x = x.view(-1, rows, columns, m, m, C).transpose(2, 3)  # (b, rows, m, columns, m, C)
    return x.reshape(-1, rows * m, columns * m, C)[:, :h, :w]


def by_distance(table, m):
    """A vector for each distance, table (2m-1, d) -> (m, m, d): entry (q, k) is row q - k + m - 1.

    >>> by_distance(torch.arange(5)[:, None], 3)[:, :, 0].tolist()                    # row 2 is distance 0
    [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    """
    at = torch.arange(m, device=table.device)
    return table[at[:, None] - at[None] + m - 1]


class SAMAttention(nn.Module):
    """All cells of one window (or picture) see each other; how far apart two are adds a learnt bias to their score.

    The bias is q . R_h[rows apart] + q . R_w[columns apart], with q as it is, not divided by sqrt(d) like the score.
    Li et al. 2022, arXiv 2112.01526, section 3 (decomposed relative positions); used by SAM's image encoder.
    """

    def __init__(self, width, heads, m):
        super().__init__()
        self.heads, d = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * m - 1, d))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * m - 1, d))

    def forward(self, x):
        b, m, _, C = x.shape
        qkv = self.qkv(x).view(b, m * m, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (b, H, m*m, d)
        at = q.unflatten(2, (m, m))  # (b, H, m, m, d): the query of row y, column x
        rows = torch.einsum("bHyxd,ykd->bHyxk", at, by_distance(self.rel_pos_h, m))  # (b, H, m, m, m)
        columns = torch.einsum("bHyxd,xkd->bHyxk", at, by_distance(self.rel_pos_w, m))
        bias = rows[..., :, None] + columns[..., None, :]  # (b, H, m, m, m, m)
        bias = bias.view(b, self.heads, m * m, m * m)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (b, H, m*m, d)
        return self.proj(y.transpose(1, 2).reshape(b, m, m, C))


class SAMMLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.lin2(F.gelu(self.lin1(x)))


class SAMBlock(nn.Module):
    """(b, g, g, C) -> the same. window: cells a side, or 0: this block sees the whole picture."""

    def __init__(self, width, heads, hidden, window, grid):
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = SAMAttention(width, heads, window or grid), SAMMLP(width, hidden)

    def forward(self, x):
        y = self.norm1(x)  # (b, g, g, C)
        if self.window:  # padded after the norm, and the padding attends like any cell
            y = from_windows(self.attn(to_windows(y, self.window)), *y.shape[1:3])
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, C, h, w)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SAM(nn.Module):
    """pixels (b, 3, S, S) in [0, 1] -> features (b, N, C) on SigLIP's grid (g, g): N = g*g, C the last downsample_channels.

    Kirillov et al. 2023, arXiv 2304.02643: the image encoder, windows but in the blocks of global_attn_indexes. DeepSeek-VL
    (arXiv 2403.05525, section 3.1 "Hybrid Vision Encoder") shrinks its map of S / patch cells a side: neck, bilinear to 4g,
    two convolutions of stride 2. What the first global block saw goes the same way through its own neck and is added
    with one learnt weight, so that fine detail survives. Sizes: vision_config.params.high_res_cfg; keys as in TOWERS.
    """

    def __init__(self, c, grid):
        super().__init__()
        width, hidden, wide = c["width"], int(c["width"] * c["mlp_ratio"]), c["image_size"] // c["patch_size"]
        self.image_size, self.grid, self.first_global = c["image_size"], grid, min(c["global_attn_indexes"])
        self.patch_embed = Patches(width, c["patch_size"])
        self.pos_embed = nn.Parameter(torch.zeros(1, wide, wide, width))
        windows = [0 if i in c["global_attn_indexes"] else c["window_size"] for i in range(c["layers"])]
        self.blocks = nn.ModuleList(SAMBlock(width, c["heads"], hidden, window, wide) for window in windows)
        self.neck, self.neck_hd = (self.build_neck(width, c["prompt_embed_dim"]) for _ in range(2))
        channels = [c["prompt_embed_dim"], *c["downsample_channels"]]
        self.downsamples = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False)
                                         for a, b in zip(channels, channels[1:]))
        self.hd_alpha_downsamples = nn.Parameter(torch.zeros(1))

    @staticmethod
    def build_neck(width, out):
        return nn.Sequential(nn.Conv2d(width, out, 1, bias=False), ChannelNorm(out, eps=1e-6),
                             nn.Conv2d(out, out, 3, padding=1, bias=False), ChannelNorm(out, eps=1e-6))

    def shrink(self, x, neck):
        """(b, cells, cells, C) -> (b, C', g, g)"""
        x = neck(x.permute(0, 3, 1, 2))  # (b, 256, cells, cells)
        x = F.interpolate(x.float(), size=(4 * self.grid, 4 * self.grid), mode="bilinear").to(x.dtype)  # (b, 256, 4g, 4g)
        for convolution in self.downsamples:
            x = convolution(x)  # (b, 512, 2g, 2g), then (b, 1024, g, g)
        return x

    def forward(self, pixels):
        pixels = normalise(pixels, MEAN, STD).to(self.pos_embed.dtype)  # CLIP's mean, not SAM's own
        x = self.patch_embed(pixels).permute(0, 2, 3, 1) + self.pos_embed  # (b, cells, cells, C)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.first_global:
                detail = x
        y = self.shrink(x, self.neck) + self.hd_alpha_downsamples * self.shrink(detail, self.neck_hd)
        return y.flatten(2).transpose(1, 2)  # (b, C', g, g) -> (b, N, C'), row by row


# -------------------------------------------------------------------------------------------------------------- aligner

class Aligner(nn.Module):
    """Features -> the decoder's input space, (b, N, C) -> (b, N, D): aligner_config.params.projector_type mlp_gelu (1.3B)."""

    def __init__(self, C, D):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(C, D), nn.GELU(), nn.Linear(D, D))

    def forward(self, x):
        return self.layers(x)


class HybridAligner(nn.Module):
    """SAM's and SigLIP's features side by side, (b, N, C_high + C_low) -> (b, N, D): low_high_hybrid_split_mlp_gelu (7B).

    Each gets half of the width; the high one comes first.
    """

    def __init__(self, C_high, C_low, D):
        super().__init__()
        self.split = [C_high, C_low]
        self.high_up_proj, self.low_up_proj = nn.Linear(C_high, D // 2), nn.Linear(C_low, D // 2)
        self.layers = nn.Sequential(nn.GELU(), nn.Linear(D, D))

    def forward(self, x):
        high, low = x.split(self.split, -1)
        return self.layers(torch.cat([self.high_up_proj(high), self.low_up_proj(low)], -1))

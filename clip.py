"""
An image -> patch features: LLaVA-1.5's vision tower, CLIP ViT-L/14-336 (any CLIP ViT by config).

    pixels = preprocess(load_image("img.jpg"), 336)        # (3, 336, 336)
    features = CLIPVision(vision_config)(pixels[None])     # (1, 576, 1024)

LLaVA reads the *penultimate* layer: the last block and post_layernorm exist in checkpoints and are
never run.
Left out: the text tower, the contrastive loss, and every size that is not square.
Shapes: b batch, S image side, g = S / patch, N = g*g patches, C width, H heads, d = C / H.
"""
import io
import os
import re
import sys
import warnings

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = tuple(int(255 * m) for m in MEAN)  # (122, 116, 104), what LLaVA pads with
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS, MAX_SIDE = 100_000_000, 11_000  # at most 1.1 GB while a picture is read and padded
VIT_L_14_336 = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    image_size=336, patch_size=14, layer_norm_eps=1e-5, hidden_act="quick_gelu")
Image.MAX_IMAGE_PIXELS = None  # our own limits are checked before any pixel is decoded
warnings.filterwarnings("ignore", module="PIL")  # what Pillow only grumbles about is readable

if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 5):
    print(f"torch {torch.__version__}: too old, 2.5 is needed; pip install --upgrade torch",
          file=sys.stderr)
    sys.exit(2)


def printable(text, keep=""):
    r"""Text from outside, fit for a terminal: control characters and escapes are spelled out.

    >>> print(printable("a\x1b[2Jb\n"))
    a\x1b[2Jb\n
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


class BadInput(Exception):
    """Something the user gave is wrong; one line: the file, the problem, the remedy."""

    def __str__(self):
        return printable(" ".join(super().__str__().split()))


# ------------------------------------------------------------------------------------------ pixels

def load_image(path):
    """Open a picture as RGB with its EXIF rotation applied; the first frame of an animation.

    `path` may be "-" or /dev/stdin. Raises BadInput if it is missing, not one of FORMATS, damaged,
    or above MAX_PIXELS or MAX_SIDE (looked at before a pixel is decoded).
    """
    source = open_source(str(path))
    try:
        with Image.open(source, formats=FORMATS) as picture:
            check_size(path, picture)
            picture.seek(0)
            picture.load()
        ImageOps.exif_transpose(picture, in_place=True)  # a copy of a large picture is 400 MB
        return to_rgb(picture)
    except UnidentifiedImageError:
        raise BadInput(f"{path}: not an image in a known format; "
                       f"use one of {', '.join(FORMATS)}") from None
    except (BadInput, MemoryError):
        raise
    except Exception as e:  # Pillow has many ways to say that a file is broken
        raise BadInput(f"{path}: the image is damaged or truncated ({type(e).__name__}); "
                       "save it again") from None


def open_source(path):
    """What Pillow opens for this path: the path itself, or standard input in memory."""
    if path in ("-", "/dev/stdin"):
        return io.BytesIO(sys.stdin.buffer.read())
    if re.match(r"[a-z][a-z0-9+.-]*://", path, re.IGNORECASE):
        raise BadInput(f"{path}: pictures are not fetched; download it first: curl -LO '{path}'")
    if os.path.isdir(path):
        raise BadInput(f"{path}: a folder; name one picture in it")
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such image file; check the path")
    return path


def check_size(path, picture):
    """Raise BadInput above the limits; fewer pixels pass where Pillow needs twice the memory."""
    (w, h), limit = picture.size, MAX_PIXELS
    wide = picture.mode[0] in "IF"  # 16 or 32 bits a value
    if wide or picture.format == "WEBP" or "progressive" in picture.info:
        limit = MAX_PIXELS // 2
    if w * h > limit or max(w, h) > MAX_SIDE:
        raise BadInput(f"{path}: {w}x{h} pixels is above the limit of {limit // 10**6} "
                       f"megapixels or {MAX_SIDE} a side; make it smaller first")


def to_rgb(picture):
    """Any mode -> RGB: 16 and 32 bits scaled to 8, transparency shown on white."""
    if picture.mode.startswith("I") or picture.mode == "F":  # convert() would clip these to white
        picture = Image.fromarray(to_bytes(np.asarray(picture, dtype=np.float32)))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        if picture.mode not in ("RGBA", "LA"):
            picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")  # transparent pixels hold arbitrary colours
        white.paste(picture, mask=picture)
        return white
    return picture.convert("RGB")


def to_bytes(values):
    """Grey values of any range -> uint8: 16-bit files by their full range, others by their own."""
    values = np.nan_to_num(values, posinf=65535, neginf=0)
    if values.min() >= 0 and 255 < values.max() <= 65535:
        low, high = 0, 65535
    else:
        low, high = min(values.min(), 0), max(values.max(), 255)
    values -= low
    values *= 255
    values /= high - low
    return values.astype(np.uint8)


def to_tensor(picture, mean=MEAN, std=STD):
    """An RGB picture -> normalised float32 pixels (3, h, w)."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def pad_to_square(picture, colour=PAD_COLOUR):
    """Centre a picture on a square of its long side; an odd rest goes below or right."""
    w, h = picture.size
    side = max(w, h)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - w) // 2, (side - h) // 2))
    return square


def preprocess(picture, size):
    """The whole picture as LLaVA-1.5 sees it: padded to a square, bicubic -> (3, S, S) float32."""
    square = pad_to_square(picture)
    return to_tensor(square.resize((size, size), Image.BICUBIC))


def preprocess_crop(picture, box, size):
    """A region (x0, y0, x1, y1) in source pixels, stretched bilinearly -> (3, S, S) float32."""
    crop = picture.crop(box)
    if crop.mode != "RGB":
        crop = crop.convert("RGB")
    return to_tensor(crop.resize((size, size), Image.BILINEAR))


# ------------------------------------------------------------------------------------------- model

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.q_proj, self.k_proj = nn.Linear(C, C), nn.Linear(C, C)
        self.v_proj, self.out_proj = nn.Linear(C, C), nn.Linear(C, C)

    def split(self, x):
        """(b, n, C) -> (b, H, n, d)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v)  # (b, H, n, d), every patch sees every patch
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (b, n, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config["hidden_size"], config["intermediate_size"])
        self.fc2 = nn.Linear(config["intermediate_size"], config["hidden_size"])
        self.quick = config["hidden_act"] == "quick_gelu"

    def forward(self, x):
        x = self.fc1(x)  # (b, n, 4C)
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)
        return self.fc2(x)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, eps = config["hidden_size"], config["layer_norm_eps"]
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(C, eps=eps), nn.LayerNorm(C, eps=eps)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, patch = config["hidden_size"], config["patch_size"]
        self.class_embedding = nn.Parameter(torch.zeros(C))
        self.patch_embedding = nn.Conv2d(3, C, patch, stride=patch, bias=False)
        # zeros: drawing random numbers imports the compiler, a second, even where none are stored
        positions = torch.zeros((config["image_size"] // patch) ** 2 + 1, C)
        self.position_embedding = nn.Embedding.from_pretrained(positions, freeze=False)

    def forward(self, pixels):
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (b, N, C), row by row
        cls = self.class_embedding.expand(x.shape[0], 1, -1)
        return torch.cat([cls, x], 1) + self.position_embedding.weight  # (b, 1+N, C)


class CLIPVision(nn.Module):
    """pixels (b, 3, S, S) -> patch features (b, N, C): the penultimate layer, no CLS, no norm.

    `config` is a vision_config; keys it lacks are those of ViT-L/14-336. `vision_feature_layer`
    (default -2) counts as in the reference library: -1 is the last layer's output, -2 the one
    before.
    """

    def __init__(self, config):
        super().__init__()
        config = VIT_L_14_336 | config
        if config["hidden_act"] not in ("quick_gelu", "gelu"):
            raise BadInput(f"config.json: vision hidden_act {config['hidden_act']!r} is not "
                           "supported; it must be quick_gelu or gelu")
        self.image_size = config["image_size"]
        self.grid = config["image_size"] // config["patch_size"]
        self.depth = config["num_hidden_layers"]  # of the checkpoint; `used` of them are run
        feature = config.get("vision_feature_layer", -2)
        used = feature if feature >= 0 else self.depth + 1 + feature
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(  # the checkpoints' spelling
            config["hidden_size"], eps=config["layer_norm_eps"])
        self.encoder = nn.Module()  # only for the names of the keys
        self.encoder.layers = nn.ModuleList(Layer(config) for _ in range(used))

    def forward(self, pixels):
        x = self.pre_layrnorm(self.embeddings(pixels))  # (b, 1+N, C)
        for layer in self.encoder.layers:
            x = layer(x)
        return x[:, 1:]  # (b, N, C)

"""
An image -> patch features: LLaVA-1.5's vision tower, CLIP ViT-L/14-336 (any CLIP ViT by config).

    pixels = preprocess(load_image("img.jpg"), 336)        # (3, 336, 336)
    features = CLIPVision(vision_config)(pixels[None])     # (1, 576, 1024)

LLaVA reads the *penultimate* layer. Checkpoints also hold the last block and post_layernorm; they
never run.
Left out: the text tower, the contrastive loss, and any input that is not square.
Shapes: b batch, S image side, g = S / patch, N = g*g patches, C width, H heads, d = C / H.
"""
import contextlib
import io
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = (122, 116, 104)  # LLaVA's padding, int(255 * MEAN)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_SIDE = 11_000  # pixels; the padded square then takes 363 MB
Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow refuses twice as many
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 26  # long texts are fine
warnings.filterwarnings("ignore", module="PIL")  # Pillow warns about files that it reads correctly


# ------------------------------------------------------------------------------------------ errors

def printable(text, keep=""):
    r"""Text from outside, safe to print: control characters are spelled out, letters stay.

    >>> print(printable("a\x1b[2Jb\n"))
    a\x1b[2Jb\n
    """
    unsafe = r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(unsafe, lambda c: c[0] if c[0] in keep else ascii(c[0])[1:-1], str(text))


class BadInput(Exception):
    """The user's input is wrong. One line: the file, the problem, the remedy."""

    def __str__(self):
        return printable(" ".join(super().__str__().split()))


@contextlib.contextmanager
def reading(path, remedy="download it again"):
    """Wrap the reading of a file: any error inside becomes one BadInput that names the file.

    >>> with reading("notes.json", "write it again"):
    ...     int("x")
    Traceback (most recent call last):
    clip.BadInput: notes.json: invalid literal for int() with base 10: 'x'; write it again
    """
    try:
        yield
    except (BadInput, MemoryError):
        raise
    except Exception as e:
        missing = "no entry " if isinstance(e, KeyError) else ""
        problem = missing + (getattr(e, "strerror", None) or str(e) or type(e).__name__)
        problem = re.sub(r" <\S+ object at \w+>", "", problem)[:400]
        raise BadInput(f"{path}: {problem}; {remedy}") from e


# ---------------------------------------------------------------------------------------- pictures

def load_image(path):
    """Open a picture as RGB, turned as its EXIF says; of an animation the first frame.

    path: a file, a pipe, or "-" for standard input. Raises BadInput if the file is missing,
    damaged, none of FORMATS, above 100 megapixels or MAX_SIDE, or of a depth without a range.
    """
    with reading(path, f"use an intact {', '.join(FORMATS)}"):
        stdin = str(path) in ("-", "/dev/stdin")
        data = sys.stdin.buffer.read() if stdin else Path(path).read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if max(picture.size) > MAX_SIDE:
                raise ValueError(f"{picture.size} pixels, more than {MAX_SIDE} a side")
            picture.seek(0)
            key = picture.info.get("transparency")
            if isinstance(key, tuple) and "16" in str(picture.tile):  # Pillow keeps the high bytes
                picture.info["transparency"] = tuple(v >> 8 for v in key)
            picture.load()
            rgb = to_rgb(picture)
            with contextlib.suppress(Exception):  # damaged EXIF counts as none
                rgb.getexif()[0x0112] = picture.getexif().get(0x0112)
        return ImageOps.exif_transpose(rgb)


def to_rgb(picture):
    """Any mode -> RGB. 16 bits are scaled to 8, transparency is shown on white."""
    if picture.mode[0] in "IF":  # convert() would clip these
        picture = to_eight_bits(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")  # transparent pixels hold any colour
        white.paste(picture, mask=picture)
        return white
    return picture.convert("RGB")


def to_eight_bits(picture):
    """Grey of up to 16 bits a value -> 8-bit grey and alpha. Raises ValueError for other depths."""
    tags = getattr(picture, "tag_v2", {258: (16,)})  # a PNG of this mode always has 16 bits
    bits = tags.get(258, (1,))[0]
    if bits > 16 or tags.get(339, (1,))[0] != 1:  # 339: the sample format, 1 is unsigned
        raise ValueError(f"{bits} bits a value have no defined range here; save it with 8 or 16")
    grey = np.asarray(picture, dtype=np.uint32)
    alpha = np.where(grey == picture.info.get("transparency", -1), 0, 255)
    if tags.get(262) == 0:  # white is zero
        grey = 2 ** bits - 1 - grey
    return Image.fromarray(np.stack([grey * 255 // (2 ** bits - 1), alpha], -1).astype(np.uint8))


def to_tensor(picture, mean=MEAN, std=STD):
    """An RGB picture -> normalised float32 pixels (3, h, w)."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8)).float() / 255  # (h, w, 3)
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1).contiguous()


def pad_to_square(picture, colour=PAD_COLOUR):
    """Centre a picture on a square of its long side; an odd row or column goes below or right."""
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
    return to_tensor(crop.resize((size, size), Image.BILINEAR))


# ------------------------------------------------------------------------------------------- model

@dataclass
class VisionConfig:
    """The entries of vision_config that matter. The defaults are those of ViT-L/14-336."""
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    vision_feature_layer: int = -2  # -1: the last layer's output, -2: the one before


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.heads = config.hidden_size, config.num_attention_heads
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
    def __init__(self, width, inner, quick=False):
        super().__init__()
        self.fc1, self.fc2, self.quick = nn.Linear(width, inner), nn.Linear(inner, width), quick

    def forward(self, x):
        x = self.fc1(x)  # (b, n, 4C)
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)  # quick_gelu, or erf
        return self.fc2(x)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = Attention(config)
        self.mlp = MLP(C, config.intermediate_size, config.hidden_act == "quick_gelu")
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(C, eps=eps), nn.LayerNorm(C, eps=eps)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(C))
        self.patch_embedding = nn.Conv2d(3, C, patch, stride=patch, bias=False)
        # zeros: drawing random numbers would import torch's compiler, which takes a second
        positions = torch.zeros((config.image_size // patch) ** 2 + 1, C)
        self.position_embedding = nn.Embedding.from_pretrained(positions, freeze=False)

    def forward(self, pixels):
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (b, N, C), row by row
        cls = self.class_embedding.expand(x.shape[0], 1, -1)
        return torch.cat([cls, x], 1) + self.position_embedding.weight  # (b, 1+N, C)


class CLIPVision(nn.Module):
    """pixels (b, 3, S, S) -> patch features (b, N, C): the penultimate layer, no CLS, no norm.

    config: a dict with entries of VisionConfig; entries it lacks have the defaults there.
    """

    def __init__(self, config):
        super().__init__()
        known = VisionConfig.__annotations__
        config = VisionConfig(**{name: value for name, value in config.items() if name in known})
        if config.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"the tower's hidden_act {config.hidden_act} is not supported")
        self.image_size, self.grid = config.image_size, config.image_size // config.patch_size
        used = config.vision_feature_layer % (config.num_hidden_layers + 1)  # layers that run
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(  # the checkpoints' spelling
            config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = nn.Module()  # only for the names of the keys
        self.encoder.layers = nn.ModuleList(Layer(config) for _ in range(used))

    def forward(self, pixels):
        x = self.pre_layrnorm(self.embeddings(pixels))  # (b, 1+N, C)
        for layer in self.encoder.layers:
            x = layer(x)
        return x[:, 1:]  # (b, N, C)

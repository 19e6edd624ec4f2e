"""
An image -> patch features: the vision tower of LLaVA-1.5, CLIP ViT-L/14-336 (any CLIP ViT by its config).

    pixels = preprocess(load_image("img.jpg"), 336)        # (3, 336, 336)
    features = CLIPVision(vision_config)(pixels[None])     # (1, 576, 1024)

LLaVA reads the *penultimate* layer: the last block and post_layernorm exist in checkpoints and are never run.
Left out: the text tower, the contrastive loss, and every size that is not square.
Shapes: b batch, S image side, g = S / patch, N = g*g patches, C width, H heads, d = C / H.
"""
import os
import re
import sys
import warnings

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from data.files import BadInput

if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 5):  # enable_gqa of the attention kernel, torch.OutOfMemoryError
    sys.exit(print(f"torch {torch.__version__}: too old, 2.5 is needed; pip install --upgrade torch", file=sys.stderr) or 2)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = tuple(int(255 * m) for m in MEAN)  # (122, 116, 104), what LLaVA pads with
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS, MAX_SIDE = 200_000_000, 20_000  # LLaVA pads to a square: a long strip costs its long side twice
VIT_L_14_336 = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                    image_size=336, patch_size=14, layer_norm_eps=1e-5, hidden_act="quick_gelu")
Image.MAX_IMAGE_PIXELS = None  # our own limits are checked before any pixel is decoded
warnings.filterwarnings("ignore", module="PIL")  # a file that Pillow only grumbles about is readable


# ----------------------------------------------------------------------------------------------- pixels

def load_image(path):
    """Open a picture as RGB with its EXIF rotation applied; the first frame of an animation.

    Raises BadInput if it is missing, not one of FORMATS, damaged, or above MAX_PIXELS or MAX_SIDE (before decoding).
    """
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such image file; check the path")
    try:
        with Image.open(path, formats=FORMATS) as image:
            w, h = image.size
            if w * h > MAX_PIXELS or max(w, h) > MAX_SIDE:
                raise BadInput(f"{path}: {w}x{h} pixels is above the limit of {MAX_PIXELS // 10**6} megapixels or {MAX_SIDE} a side; "
                               "make it smaller first")
            image.seek(0)
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits a pixel: convert() would clip to white
                values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=65535, neginf=0)
                low, high = (0, 65535) if values.min() >= 0 and 255 < values.max() <= 65535 else (min(values.min(), 0), max(values.max(), 255))
                image = Image.fromarray(((values - low) * 255 / (high - low)).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")  # transparent pixels hold arbitrary colours: show them on white
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise BadInput(f"{path}: not an image in a known format; use one of {', '.join(FORMATS)}") from None
    except BadInput:
        raise
    except Exception as e:  # Pillow has many ways to say that a file is broken
        raise BadInput(f"{path}: the image is damaged or truncated ({type(e).__name__}); save it again") from None


def to_tensor(image):
    """An RGB PIL image -> normalised float32 pixels (3, h, w)."""
    x = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255  # (3, h, w)
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def preprocess(image, size, pad=True):
    """The whole picture as LLaVA-1.5 sees it: pad to a square, bicubic to size x size -> (3, S, S) float32.

    An odd difference puts the extra row or column of padding at the bottom or right.
    pad=False is the reference library's default (short side to `size`, centre crop), for parity tests only.
    """
    image = image.convert("RGB")
    w, h = image.size
    if pad:
        side = max(w, h)
        square = Image.new("RGB", (side, side), PAD_COLOUR)
        square.paste(image, ((side - w) // 2, (side - h) // 2))
        return to_tensor(square.resize((size, size), Image.BICUBIC))
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    left, top = (w - size) // 2, (h - size) // 2
    return to_tensor(image.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size)))


def preprocess_crop(image, box, size):
    """A region of interest (x0, y0, x1, y1 in source pixels), stretched with bilinear filtering -> (3, S, S) float32."""
    return to_tensor(image.convert("RGB").crop(box).resize((size, size), Image.BILINEAR))


# ------------------------------------------------------------------------------------------------ model

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        C = c["hidden_size"]
        self.heads = c["num_attention_heads"]
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x):
        b, n, C = x.shape
        q, k, v = (p(x).view(b, n, self.heads, C // self.heads).transpose(1, 2)  # each (b, H, n, d)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v)  # (b, H, n, d), every patch sees every patch
        return self.out_proj(y.transpose(1, 2).reshape(b, n, C))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c["hidden_size"], c["intermediate_size"])
        self.fc2 = nn.Linear(c["intermediate_size"], c["hidden_size"])
        self.quick = c["hidden_act"] == "quick_gelu"

    def forward(self, x):
        x = self.fc1(x)  # (b, n, 4C)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.layer_norm1 = nn.LayerNorm(c["hidden_size"], eps=c["layer_norm_eps"])
        self.layer_norm2 = nn.LayerNorm(c["hidden_size"], eps=c["layer_norm_eps"])

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        C, patch = c["hidden_size"], c["patch_size"]
        self.class_embedding = nn.Parameter(torch.zeros(C))
        self.patch_embedding = nn.Conv2d(3, C, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((c["image_size"] // patch) ** 2 + 1, C)

    def forward(self, pixels):
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (b, C, g, g) -> (b, N, C), row by row
        cls = self.class_embedding.expand(x.shape[0], 1, -1)
        return torch.cat([cls, x], 1) + self.position_embedding.weight  # (b, 1+N, C)


class CLIPVision(nn.Module):
    """pixels (b, 3, S, S) -> patch features (b, N, C): the penultimate layer, without CLS and without a final norm.

    `config` is a vision_config; keys it lacks are those of ViT-L/14-336. `vision_feature_layer` (default -2)
    counts as in the reference library: -1 is the last layer's output, -2 the one before.
    """

    def __init__(self, config):
        super().__init__()
        c = VIT_L_14_336 | config
        if c["hidden_act"] not in ("quick_gelu", "gelu"):
            raise BadInput(f"config.json: vision hidden_act {c['hidden_act']!r} is not supported; it must be quick_gelu or gelu")
        self.grid = c["image_size"] // c["patch_size"]
        self.image_size = c["image_size"]
        self.depth = depth = c["num_hidden_layers"]  # layers of the checkpoint, of which `used` are run
        feature = c.get("vision_feature_layer", -2)
        used = feature if feature >= 0 else depth + 1 + feature
        self.embeddings = Embeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c["hidden_size"], eps=c["layer_norm_eps"])  # the checkpoints' spelling
        self.encoder = nn.Module()  # only for the names of the keys
        self.encoder.layers = nn.ModuleList(Layer(c) for _ in range(used))

    def forward(self, pixels):
        x = self.pre_layrnorm(self.embeddings(pixels))  # (b, 1+N, C)
        for layer in self.encoder.layers:
            x = layer(x)
        return x[:, 1:]  # (b, N, C)

"""
The lessons of pretrain.py: scenes, crowded scenes and pages as arrays on disk, CHUNK a file.

    make_chunk(folder, "scenes", 0, cut)
    pool = Pool(folder, "scenes")
    batch = pool.sample(random.Random(0), 16)    # 16 times (chunk, row)

A scene is stored as four views: the whole picture, two crops, and one more with the patches that a
mask keeps of it. Where these lie, pretrain.py says: cut(scene, rng).
Shapes: n = CHUNK, S = SIDE px, g = GRID patches a side, N = g*g; boxes are half-open, in source px.
"""
import json
import random

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.numpy import save_file

import clip
import scenes
from clip import preprocess, preprocess_crop
from data.files import write_file

GRID, SIDE, CHUNK = 12, 168, 256
KINDS = "scenes", "crowded", "pages"
VIEWS = 4  # the whole picture, two crops, one crop that is masked
CROPS = {"none": [0], "one": [0, 1], "two": [0, 1, 2], "masked": [0, 3]}  # views in one sequence
FONT_PX, DOT_PX = (14, 48), (5, 15)  # larger than in the scenes asked about later: to learn reading
TEXTS = [*"0123456789", *scenes.WORDS]
# What a patch must name: the shape (or none), its colour, its dot's colour, its text.
CLASSES = (len(scenes.SHAPES) + 1, len(scenes.COLOURS), len(scenes.COLOURS), len(TEXTS))
MEAN, STD = torch.tensor(clip.MEAN).view(3, 1, 1), torch.tensor(clip.STD).view(3, 1, 1)


# ---------------------------------------------------------------------------------------- geometry

def cells_over(view, box, share=0.0):
    """The g*g cells of a view (a source rectangle) that a box covers by more than a share: (N,)."""
    inside = []
    for i in (0, 1):
        edges = np.linspace(view[i], view[i + 2], GRID + 1)
        overlap = np.minimum(edges[1:], box[i + 2]) - np.maximum(edges[:-1], box[i])
        inside.append(overlap > share * (edges[1] - edges[0]))
    return np.outer(inside[1], inside[0]).ravel()


def visible(view, box):
    """The share of a box that lies in a view.

    >>> visible((0, 0, 10, 10), (5, 0, 15, 10))
    0.5
    """
    w = min(view[2], box[2]) - max(view[0], box[0])
    h = min(view[3], box[3]) - max(view[1], box[1])
    return max(w, 0) * max(h, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def whole(size):
    """The padded square as a rectangle of the source.

    >>> whole((672, 504))
    [0, -84, 672, 588]
    """
    w, h = size
    side = max(w, h)
    x, y = (side - w) // 2, (side - h) // 2
    return [-x, -y, side - x, side - y]


# ----------------------------------------------------------------------------------- what is drawn

def crowded_scene(rng):
    """16 things on a 4 x 4 grid, shapes may repeat: four times the lessons of a scene."""
    things = []
    for i in range(16):
        side = rng.randint(100, 156)
        x = 168 * (i % 4) + rng.randint(4, 164 - side)
        y = 168 * (i // 4) + rng.randint(4, 164 - side)
        shape, box = rng.choice(scenes.SHAPES), (x, y, x + side, y + side)
        things.append(scenes.new_thing(rng, shape, box, [], FONT_PX, DOT_PX))
    return scenes.draw_scene(rng, (672, 672), things)


def centres_in(at, size, side):
    """Rows (or columns) of patches with centres in at..at+size of `side` px; else the nearest."""
    found = [c for c in range(GRID) if at < (c + 0.5) * side / GRID < at + size]
    return found or [min(int((at + size / 2) * GRID / side), GRID - 1)]


def page(rng):
    """A page full of numbers and words on plates -> image, text class of each patch (N,).

    Letters as whole pictures show them and as crops do: 4 to 55 px high once the page is SIDE
    wide, squeezed one way or the other.
    """
    w, h = rng.sample([672, rng.randint(470, 672)], 2)
    font_px = scenes.log_uniform(rng, 18, 220)
    columns = max(1, int(w / max(64, 1.9 * font_px + 24)))
    lines = max(1, int(h / max(64, 1.2 * font_px + 24)))
    image = Image.new("RGB", (w, h), scenes.tint(rng, 120, 250))
    draw, wanted = ImageDraw.Draw(image), np.full((GRID, GRID), -100, np.int64)
    dx, dy = w / columns, h / lines
    for i in range(columns * lines):
        x, y = i % columns * dx, i // columns * dy
        fill = rng.choice(list(scenes.COLOURS.values())) if rng.random() < 0.7 else None
        draw.rectangle((x, y, x + dx, y + dy), fill=fill)
        text, face = rng.choice(TEXTS), scenes.font(float(int(font_px * rng.uniform(0.75, 1))))
        x0, y0, x1, y1 = face.getbbox(text)
        across, down = x1 - x0 + 10, y1 - y0 + 10
        x, y = x + rng.uniform(0, max(0, dx - across)), y + rng.uniform(0, max(0, dy - down))
        draw.rounded_rectangle((x, y, x + across, y + down), radius=6, fill="white")
        draw.text((x + 5 - x0, y + 5 - y0), text, fill="black", font=face)
        over = centres_in(y, down, h), centres_in(x, across, w)
        wanted[np.ix_(*over)] = TEXTS.index(text)
    return image, wanted.ravel()


def targets(view, things):
    """(N, 4) class of each patch: shape (last = none), colour, dot, text; -100 where not asked."""
    out = np.full((GRID * GRID, len(CLASSES)), -100, np.int64)
    out[:, 0] = len(scenes.SHAPES)
    colours = list(scenes.COLOURS)
    for t in things:
        cells, seen = cells_over(view, t.box, 0.5), visible(view, t.box)
        if seen < 0.35:
            out[cells, 0] = -100
            continue
        out[cells, 0], out[cells, 1] = scenes.SHAPES.index(t.shape), colours.index(t.colour)
        if seen > 0.95:
            out[cells, 2] = colours.index(t.dot)
            out[cells, 3] = TEXTS.index(t.text)
    return out


# ---------------------------------------------------------------------------------- chunks on disk

def blank_chunk():
    """The arrays of a chunk: pixels (n, 4, S, S, 3), and for each patch of each view its classes,
    the things on it (up to 6), whether it is kept, and whether it is all picture without a thing.
    """
    return {"pixels": np.zeros((CHUNK, VIEWS, SIDE, SIDE, 3), np.uint8),
            "classes": np.full((CHUNK, VIEWS, GRID * GRID, len(CLASSES)), -100, np.int8),
            "cells": np.zeros((CHUNK, VIEWS, 6, GRID * GRID), bool),
            "keep": np.ones((CHUNK, VIEWS, GRID * GRID), bool),
            "empty": np.zeros((CHUNK, VIEWS, GRID * GRID), bool)}


def write_chunk(path, arrays, questions):
    metadata = {"questions": json.dumps(questions)}
    write_file(path, lambda partial: save_file(arrays, partial, metadata))


def make_scenes(path, seed, crowded, cut):
    """CHUNK scenes; a question is stored as [question, answer, numbers of its things, kind]."""
    arrays, questions = blank_chunk(), []
    for i in range(CHUNK):
        rng = random.Random(f"{seed}/{i}")
        scene = crowded_scene(rng) if crowded else scenes.make_scene(rng, FONT_PX, DOT_PX)
        crops, masked, arrays["keep"][i, 3] = cut(scene, rng)
        for v, view in enumerate([whole(scene.image.size), *crops, masked]):
            if v == 0:
                pixels = preprocess(scene.image, SIDE)
            else:
                pixels = preprocess_crop(scene.image, view, SIDE)
            pixels = ((pixels * STD + MEAN) * 255).round().byte()
            arrays["pixels"][i, v] = pixels.permute(1, 2, 0).numpy()
            arrays["classes"][i, v] = targets(view, scene.things)
            arrays["empty"][i, v] = cells_over(view, [0, 0, *scene.image.size], 0.999)
            for k, t in enumerate(scene.things):
                arrays["empty"][i, v] &= ~cells_over(view, t.box)
                if not crowded and visible(view, t.box) > 0.6:
                    arrays["cells"][i, v, k] = cells_over(view, t.box)
        if not crowded:
            boxes = [list(t.box) for t in scene.things]
            asked = scenes.all_questions(scene, rng)
            questions.append([(q["question"], q["answers"][0],
                               [boxes.index(b) for b in q["boxes"]], q["kind"]) for q in asked])
    write_chunk(path, arrays, questions)


def make_pages(path, seed):
    """CHUNK x VIEWS pages, stored like scenes."""
    arrays = blank_chunk()
    for i in range(CHUNK):
        for v in range(VIEWS):
            image, arrays["classes"][i, v, :, 3] = page(random.Random(f"{seed}/{i}/{v}"))
            arrays["pixels"][i, v] = np.asarray(image.resize((SIDE, SIDE), Image.BICUBIC))
    write_chunk(path, arrays, [])


def make_chunk(folder, kind, n, cut):
    """Chunk n of a kind, if it is not there yet."""
    path = folder / f"{kind}{n:04d}.safetensors"
    if path.is_file():
        return
    torch.set_num_threads(1)
    if kind == "pages":
        make_pages(path, f"page/{n}")
    elif kind == "crowded":
        make_scenes(path, f"crowded/{n}", crowded=True, cut=cut)
    else:
        make_scenes(path, f"pairs/{n}", crowded=False, cut=cut)


# ------------------------------------------------------------------------------------ chunks read

def around(x, fill):
    """x (..., g, g) -> (..., g, g, 3, 3): each patch amid its neighbours; beyond the edge, fill."""
    edge = [(0, 0)] * (x.ndim - 2) + [(1, 1), (1, 1)]
    return sliding_window_view(np.pad(x, edge, constant_values=fill), (3, 3), (-2, -1))


def keep_cores(classes):
    """Ask for a text only in the middle of its thing, where the plate is.

    Three times the outer patches are peeled off, if that leaves any.
    """
    text = classes[..., 3].reshape(*classes.shape[:-2], GRID, GRID).copy()
    for _ in range(3):
        sides = around(text, -100)[..., (0, 1, 1, 2), (1, 0, 2, 1)]  # above, left, right, below
        inner = (text >= 0) & (sides == text[..., None]).all(-1)
        near = around(inner, False).any((-2, -1))
        text[near & ~inner] = -100
    classes[..., 3] = text.reshape(classes.shape[:-1])


class Pool:
    """Chunks of one of KINDS; the first is for validation."""

    def __init__(self, folder, kind):
        self.chunks = []
        for path in sorted(folder.glob(f"{kind}????.safetensors")):
            with safe_open(path, framework="np") as f:
                chunk = {key: f.get_tensor(key) for key in f.keys()}
                chunk["questions"] = json.loads(f.metadata()["questions"])
            if kind != "pages":
                keep_cores(chunk["classes"])
            self.chunks.append(chunk)

    def sample(self, rng, b):
        """b scenes as a list of (chunk, row)."""
        last = len(self.chunks)
        return [(self.chunks[rng.randrange(1, last)], rng.randrange(CHUNK)) for _ in range(b)]

    def validation(self, b):
        return [(self.chunks[0], i) for i in range(b)]


def stored(batch, views, what):
    """What is stored of one view of each (chunk, row) -> tensor (b, ...)."""
    return torch.from_numpy(np.stack([c[what][i, v] for (c, i), v in zip(batch, views)]))


def to_pixels(views):
    """uint8 (b, S, S, 3) -> normalised float32 (b, 3, S, S)."""
    return (views.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD

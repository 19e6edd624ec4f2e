"""
The lessons of pretrain.py: scenes, crowded scenes and pages as arrays on disk, CHUNK a file.

    make_chunks(folder, 0, 28, 2)          # every second chunk, to be run in a process of its own
    pool = Pool(folder, "scenes")
    batch = pool.sample(random.Random(0), 16)    # 16 times (chunk, row)

A scene is stored as four views: the whole picture, two crops as Box Upscaling cuts them (Eq. 7),
and one as Masked Upscaling does (Eq. 8), with the patches it keeps. The regions come from made-up
maps: ragged blobs on the things that a question may name, and now and then a spot elsewhere, cut
by the method's own find_regions().
Shapes: n = CHUNK, S = SIDE px, g = GRID patches a side, N = g*g; boxes are half-open, in source px.
"""
import json
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import clip  # noqa: E402 (the project is on the path only now)
import scenes  # noqa: E402
from clip import preprocess, preprocess_crop  # noqa: E402
from sdrpn import Letterbox, find_regions, kept_cells, union  # noqa: E402

GRID, SIDE, CHUNK = 12, 168, 256
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


# ------------------------------------------------------------------------------------------- crops

def pick(scene, rng):
    """What a crop is about: one thing, two near each other, or any two."""
    pairs = scenes.near_pairs(scene.things, max(scene.image.size))
    chance = rng.random()
    if chance < 0.45 or (chance < 0.8 and not pairs):
        return [rng.choice(scene.things)]
    return list(rng.choice(pairs)) if chance < 0.8 else rng.sample(scene.things, 2)


def loose_crop(scene, rng, named):
    """The box around the things named with some margin; any rectangle if there are none."""
    w, h = scene.image.size
    if named:
        x0, y0 = min(t.box[0] for t in named), min(t.box[1] for t in named)
        x1, y1 = max(t.box[2] for t in named), max(t.box[3] for t in named)
        margin = [rng.uniform(-8, 60) for _ in range(4)]
        x0, y0, x1, y1 = x0 - margin[0], y0 - margin[1], x1 + margin[2], y1 + margin[3]
    else:
        cw, ch = rng.uniform(100, w), rng.uniform(100, h)
        x0, y0 = rng.uniform(0, w - cw), rng.uniform(0, h - ch)
        x1, y1 = x0 + cw, y0 + ch
    return [max(0, int(x0)), max(0, int(y0)), min(w, math.ceil(x1)), min(h, math.ceil(y1))]


def propose(scene, rng, named):
    """Regions as an RPN might propose them: ragged blobs on the things named, at times a spot."""
    p = torch.zeros(GRID, GRID)
    for t in named:
        cells = cells_over(whole(scene.image.size), t.box, rng.choice([0.0, 0.2, 0.5]))
        strength, ragged = rng.uniform(0.3, 1), rng.choice([0.0, 0.2, 0.4])
        for y, x in torch.from_numpy(cells).view(GRID, GRID).nonzero().tolist():
            p[y, x] = strength if rng.random() >= ragged else 0.0
    for _ in range(rng.choices([0, 1, 2], [0.5, 0.3, 0.2])[0]):
        y, x = rng.randrange(GRID), rng.randrange(GRID)
        p[y:y + rng.randint(1, 2), x:x + rng.randint(1, 2)] = rng.uniform(0.3, 1)
    on = Letterbox(scene.image.size, GRID).holds_picture()
    return find_regions(p.logit(1e-6), 0.15, on)


def box_views(scene, rng, named):
    """Two crops as Box Upscaling cuts them: the heaviest regions, any rectangle where one lacks."""
    letterbox = Letterbox(scene.image.size, GRID)
    best = sorted(propose(scene, rng, named), key=lambda r: -r.weight)[:2]
    views = [list(letterbox.to_pixels(r.box)) for r in best]
    return views + [loose_crop(scene, rng, []) for _ in range(2 - len(views))]


def masked_view(scene, rng, named):
    """One crop as Masked Upscaling cuts it, and which of its patches it keeps (N,)."""
    regions = propose(scene, rng, named)
    if not regions:
        return loose_crop(scene, rng, named), np.ones(GRID * GRID, bool)
    region = union(regions)
    view = list(Letterbox(scene.image.size, GRID).to_pixels(region.box))
    return view, kept_cells(region, (GRID, GRID)).flatten().numpy()


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
    """Written aside and renamed, so that half a file is never read."""
    partial = path.with_suffix(f".{os.getpid()}")
    packed = np.frombuffer(json.dumps(questions).encode(), np.uint8)
    with open(partial, "wb") as f:
        np.savez(f, **arrays, questions=packed)
    os.replace(partial, path)


def make_scenes(path, seed, crowded):
    """CHUNK scenes; a question is stored as [question, answer, numbers of its things, kind]."""
    arrays, questions = blank_chunk(), []
    for i in range(CHUNK):
        rng = random.Random(f"{seed}/{i}")
        scene = crowded_scene(rng) if crowded else scenes.make_scene(rng, FONT_PX, DOT_PX)
        if rng.random() < 0.3:
            crops = [loose_crop(scene, rng, [t]) for t in rng.sample(scene.things, 2)]
        else:
            crops = box_views(scene, rng, pick(scene, rng))
        masked, arrays["keep"][i, 3] = masked_view(scene, rng, pick(scene, rng))
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


def make_chunks(folder, first, count, stride, kinds=("scenes", "crowded", "pages")):
    """Chunks first, first + stride, .. below count (of pages 30 at most) that are not there yet."""
    os.nice(5)
    torch.set_num_threads(1)
    for n in range(first, count, stride):
        for kind in kinds:
            path = folder / f"{kind}{n:04d}.npz"
            if path.is_file() or (kind == "pages" and n >= 30):
                continue
            if kind == "pages":
                make_pages(path, f"page/{n}")
            elif kind == "crowded":
                make_scenes(path, f"crowded/{n}", crowded=True)
            else:
                make_scenes(path, f"pairs/{n}", crowded=False)


# ------------------------------------------------------------------------------------ chunks read

def shift(x, dy, dx, fill):
    """x (..., g, g) moved down by dy and right by dx, each -1, 0 or 1; `fill` comes in."""
    out = np.full_like(x, fill)
    to_y, to_x = slice(max(dy, 0), GRID + min(dy, 0)), slice(max(dx, 0), GRID + min(dx, 0))
    from_y, from_x = slice(max(-dy, 0), GRID + min(-dy, 0)), slice(max(-dx, 0), GRID + min(-dx, 0))
    out[..., to_y, to_x] = x[..., from_y, from_x]
    return out


def keep_cores(classes):
    """Ask for a text only in the middle of its thing, where the plate is.

    Three times the outer patches are peeled off, if that leaves any.
    """
    text = classes[..., 3].reshape(*classes.shape[:-2], GRID, GRID).copy()
    for _ in range(3):
        inner = text >= 0
        for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            inner &= shift(text, dy, dx, -100) == text
        near = inner.copy()
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                near |= shift(inner, dy, dx, False)
        text[near & ~inner] = -100
    classes[..., 3] = text.reshape(classes.shape[:-1])


class Pool:
    """Chunks of one kind ("scenes", "crowded", "pages"); the first is for validation."""

    def __init__(self, folder, kind):
        self.chunks = []
        for path in sorted(folder.glob(f"{kind}????.npz")):
            with np.load(path) as f:
                chunk = {k: f[k] for k in ("pixels", "classes", "cells", "keep", "empty")}
                chunk["questions"] = json.loads(f["questions"].tobytes())
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

"""
The lessons of pretrain.py: scenes, crowded scenes and pages as arrays on disk, CHUNK in a file.

    make_chunk(folder, "scenes", 0, cut_crops)
    pool = Pool(folder, "scenes")
    batch = pool.sample(random.Random(0), 16)    # 16 pairs (chunk, row)

A scene is stored as four views: the whole picture, two crops, and a crop with the patches that a
mask keeps of it. pretrain.cut_crops(scene, rng) decides where these lie.
Shapes: n = CHUNK, S = SIDE px, g = GRID patches a side, N = g*g. Boxes and views are half-open
(x0, y0, x1, y1) in source px.
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
from clip import preprocess, preprocess_crop
from data.files import write_file
from data.toy import scenes

GRID, SIDE, CHUNK = 12, 168, 256
KINDS = {"scenes": "pairs", "crowded": "crowded", "pages": "page"}  # kind -> its random stream
VIEWS = 4  # the whole picture, two crops, one crop that is masked
CROPS = {"none": [0], "one": [0, 1], "two": [0, 1, 2], "masked": [0, 3]}  # views in one sequence
FONT_PX, DOT_PX = (14, 48), (5, 15)  # larger than in the RPN's scenes: the tower learns to read
TEXTS = [*"0123456789", *scenes.WORDS]
# What a patch must name: the shape (or none), its colour, its dot's colour, its text.
CLASSES = (len(scenes.SHAPES) + 1, len(scenes.COLOURS), len(scenes.COLOURS), len(TEXTS))
UNKNOWN = -100  # the class of a patch that need not name it; cross_entropy ignores it
MEAN, STD = torch.tensor(clip.MEAN).view(3, 1, 1), torch.tensor(clip.STD).view(3, 1, 1)


# ---------------------------------------------------------------------------------------- geometry

def covered_cells(view, box, share=0.0):
    """The cells of a view's g x g grid of which a box covers more than a share: (N,) bool.

    >>> view, box = (0, 0, 120, 120), (5, 0, 20, 10)  # half of the first cell, all of the second
    >>> covered_cells(view, box).nonzero()[0].tolist()
    [0, 1]
    >>> covered_cells(view, box, 0.5).nonzero()[0].tolist()
    [1]
    """
    covered = []
    for i in (0, 1):
        edges = np.linspace(view[i], view[i + 2], GRID + 1)
        overlap = np.minimum(edges[1:], box[i + 2]) - np.maximum(edges[:-1], box[i])
        covered.append(overlap > share * (edges[1] - edges[0]))
    return np.outer(covered[1], covered[0]).ravel()


def visible_share(view, box):
    """The share of a box that lies in a view.

    >>> visible_share((0, 0, 10, 10), (5, 0, 15, 10))
    0.5
    """
    w = min(view[2], box[2]) - max(view[0], box[0])
    h = min(view[3], box[3]) - max(view[1], box[1])
    return max(w, 0) * max(h, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def padded_square(size):
    """The square that pads a picture of this (w, h), in source px.

    >>> padded_square((672, 504))
    [0, -84, 672, 588]
    """
    w, h = size
    side = max(w, h)
    x, y = (side - w) // 2, (side - h) // 2
    return [-x, -y, side - x, side - y]


def covered_centres(start, length, side):
    """Of g patches along `side` px, those with centres in start..start+length; else the nearest."""
    end = start + length
    found = [c for c in range(GRID) if start < (c + 0.5) * side / GRID < end]
    return found or [min(int((start + length / 2) * GRID / side), GRID - 1)]


# -------------------------------------------------------------------------------- what is to learn

def crowded_scene(rng):
    """16 things on a 4 x 4 grid, where shapes may repeat: more to name than in a scene."""
    things = []
    for i in range(16):
        side = rng.randint(100, 156)
        x = 168 * (i % 4) + rng.randint(4, 164 - side)
        y = 168 * (i // 4) + rng.randint(4, 164 - side)
        shape, box = rng.choice(scenes.SHAPES), (x, y, x + side, y + side)
        things.append(scenes.new_thing(rng, shape, box, [], FONT_PX, DOT_PX))
    return scenes.draw_scene(rng, (672, 672), things)


def draw_page(rng):
    """A page full of numbers and words on plates -> picture, text class of each patch (N,).

    Once the page is SIDE wide its letters are 4 to 55 px high, as in whole pictures and in crops.
    """
    w, h = rng.sample([672, rng.randint(470, 672)], 2)
    font_px = scenes.log_uniform(rng, 18, 220)
    columns = max(1, int(w / max(64, 1.9 * font_px + 24)))
    lines = max(1, int(h / max(64, 1.2 * font_px + 24)))
    picture = Image.new("RGB", (w, h), scenes.tint(rng, 120, 250))
    draw, classes = ImageDraw.Draw(picture), np.full((GRID, GRID), UNKNOWN)
    dx, dy = w / columns, h / lines
    for i in range(columns * lines):
        x, y = i % columns * dx, i // columns * dy
        fill = rng.choice(list(scenes.COLOURS.values())) if rng.random() < 0.7 else None
        draw.rectangle((x, y, x + dx, y + dy), fill=fill)
        text, face = rng.choice(TEXTS), scenes.font(float(int(font_px * rng.uniform(0.75, 1))))
        width, height = scenes.plate_size(text, face)
        x += rng.uniform(0, max(0, dx - width))
        y += rng.uniform(0, max(0, dy - height))
        scenes.draw_plate(draw, x, y, text, face)
        patches = np.ix_(covered_centres(y, height, h), covered_centres(x, width, w))
        classes[patches] = TEXTS.index(text)
    return picture, classes.ravel()


def patch_classes(view, things):
    """(N, 4) class of each patch: shape (last = none), colour, dot, text. Each may be UNKNOWN."""
    classes = np.full((GRID * GRID, len(CLASSES)), UNKNOWN)
    classes[:, 0] = len(scenes.SHAPES)
    colours = list(scenes.COLOURS)
    for t in things:
        cells, share = covered_cells(view, t.box, 0.5), visible_share(view, t.box)
        if share < 0.35:
            classes[cells, 0] = UNKNOWN
            continue
        classes[cells, 0] = scenes.SHAPES.index(t.shape)
        classes[cells, 1] = colours.index(t.colour)
        if share > 0.95:
            classes[cells, 2] = colours.index(t.dot)
            classes[cells, 3] = TEXTS.index(t.text)
    return classes


# ---------------------------------------------------------------------------------- chunks on disk

def blank_chunk():
    """The arrays of a chunk. Each view has pixels, and for its patches: their classes, the things
    on them (up to 6), whether the mask keeps them, and whether they show the ground alone.
    """
    patches = (CHUNK, VIEWS, GRID * GRID)
    return {"pixels": np.zeros((CHUNK, VIEWS, SIDE, SIDE, 3), np.uint8),
            "classes": np.full((*patches, len(CLASSES)), UNKNOWN, np.int8),
            "cells": np.zeros((CHUNK, VIEWS, 6, GRID * GRID), bool),
            "keep": np.ones(patches, bool),
            "empty": np.zeros(patches, bool)}


def fill_scene(row, scene, rng, cut_crops):
    """Fill one row of a chunk, except for its cells -> the four views."""
    picture = scene.picture
    crops, row["keep"][3] = cut_crops(scene, rng)
    views = [padded_square(picture.size), *crops]
    for v, view in enumerate(views):
        pixels = preprocess_crop(picture, view, SIDE) if v > 0 else preprocess(picture, SIDE)
        pixels = ((pixels * STD + MEAN) * 255).round().byte()
        row["pixels"][v] = pixels.permute(1, 2, 0)
        row["classes"][v] = patch_classes(view, scene.things)
        row["empty"][v] = covered_cells(view, [0, 0, *picture.size], 0.999)
        for thing in scene.things:
            row["empty"][v] &= ~covered_cells(view, thing.box)
    return views


def add_questions(cells, scene, views, rng):
    """Fill a row's cells (4, 6, N) -> its [(question, answer, numbers of its things, kind), ...]"""
    numbers = {thing.box: k for k, thing in enumerate(scene.things)}
    for v, view in enumerate(views):
        for box, k in numbers.items():
            if visible_share(view, box) > 0.6:
                cells[v, k] = covered_cells(view, box)
    questions = []
    for q in scenes.all_questions(scene, rng):
        things = [numbers[tuple(box)] for box in q["boxes"]]
        questions.append((*q["question"], *q["answers"], things, q["kind"]))
    return questions


def make_chunk(folder, kind, number, cut_crops):
    """Write a chunk of one of KINDS, if it is not there yet."""
    path = folder / f"{kind}{number:04d}.safetensors"
    if path.is_file():
        return
    torch.set_num_threads(1)
    arrays, questions = blank_chunk(), []
    for i in range(CHUNK):
        seed = f"{KINDS[kind]}/{number}/{i}"
        rng, row = random.Random(seed), {key: array[i] for key, array in arrays.items()}
        if kind == "crowded":
            fill_scene(row, crowded_scene(rng), rng, cut_crops)
        elif kind == "scenes":
            scene = scenes.make_scene(rng, FONT_PX, DOT_PX)
            views = fill_scene(row, scene, rng, cut_crops)
            questions.append(add_questions(row["cells"], scene, views, rng))
        else:
            for v in range(VIEWS):
                picture, row["classes"][v, :, 3] = draw_page(random.Random(f"{seed}/{v}"))
                row["pixels"][v] = picture.resize((SIDE, SIDE), Image.BICUBIC)
    metadata = {"questions": json.dumps(questions)}
    write_file(path, lambda partial: save_file(arrays, partial, metadata))


# ------------------------------------------------------------------------------------ chunks read

def neighbours(x, fill):
    """x (..., g, g) -> (..., g, g, 3, 3): each patch with its neighbours; `fill` off the edge."""
    edge = [(0, 0)] * (x.ndim - 2) + [(1, 1), (1, 1)]
    return sliding_window_view(np.pad(x, edge, constant_values=fill), (3, 3), (-2, -1))


def keep_cores(classes):
    """Ask for a text only in the middle of its thing, where the plate is.

    The outer patches are peeled off three times, unless nothing would be left.
    """
    text = classes[..., 3].reshape(*classes.shape[:-2], GRID, GRID).copy()
    for _ in range(3):
        sides = neighbours(text, UNKNOWN)[..., (0, 1, 1, 2), (1, 0, 2, 1)]
        inner = (text >= 0) & (sides == text[..., None]).all(-1)
        near = neighbours(inner, False).any((-2, -1))
        text[near & ~inner] = UNKNOWN
    classes[..., 3] = text.reshape(classes.shape[:-1])


class Pool:
    """The chunks of one of KINDS. The first is for validation."""

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
        """b random rows as a list of (chunk, row)."""
        last = len(self.chunks)
        return [(self.chunks[rng.randrange(1, last)], rng.randrange(CHUNK)) for _ in range(b)]

    def validation(self, b):
        return [(self.chunks[0], i) for i in range(b)]


def take(batch, views, key):
    """An array of one view of each (chunk, row) -> tensor (b, ...)."""
    rows = [chunk[key][i, view] for (chunk, i), view in zip(batch, views)]
    return torch.from_numpy(np.stack(rows))


def to_pixels(views):
    """uint8 (b, S, S, 3) -> normalised float32 (b, 3, S, S)."""
    return (views.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD

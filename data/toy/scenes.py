"""Endless toy pictures with questions, answers and true boxes, all drawn from a seed.

A picture (long side 672 px) shows 3 to 6 large named shapes on a cluttered pastel ground. Each
shape carries two details: a plate with a number or a word, and a coloured dot. A toy model that
sees the whole picture at 168 px, 4 times smaller, finds the shape but often cannot read its
details. A crop of the shape's box at full resolution always shows them. So the questions reward
looking at the right place, or (kind "both") at the right two places.

    python data/toy/scenes.py --seed 7 --count 300 --out toy_eval    # a set to evaluate on
    picture, question = ToyQuestions("train/0", 1000)[3]             # in training

Left out: overlapping, rotated or repeated shapes, photographs, and questions that need counting or
spatial relations. Pixels (not questions) may differ a little between Pillow versions.
"""

import argparse
import math
import random
import re
import sys
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# As a script, only this folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.program import log, run_program  # noqa: E402

SIDE = 672  # px of the padded square
SIZES = [(672, 672), (672, 504), (504, 672), (672, 448), (448, 672), (672, 576), (576, 672)]  # w, h
SHAPES = ("circle", "square", "triangle", "star", "heart",
          "cross", "diamond", "ring", "house", "arrow")
COLOURS = {
    "red": (215, 25, 35), "green": (30, 160, 60), "blue": (35, 85, 225), "yellow": (255, 225, 30),
    "orange": (255, 135, 0), "purple": (125, 40, 175), "pink": (255, 145, 205),
    "brown": (115, 65, 25),
}
WORDS = ("cat", "sun", "key", "map", "fox", "zip", "egg", "jam", "owl", "bus")
TEMPLATES = {
    "number": "What number is on the {}?",
    "word": "What word is on the {}?",
    "colour": "What colour is the dot on the {}?",
    "both": "What is on the {} and the {}?",
    "exist": "Is there a {} in the picture?",
}
KINDS = tuple(TEMPLATES)
TOY_QUESTIONS = [template.format("star", "ring") for template in TEMPLATES.values()]  # examples

GAP = 14      # least space between two things, px
OUTLINE = 4   # width of a thing's dark outline, px
RIM = 2       # width of a dot's white rim, px
PAD = 5       # white space between a text and the edge of its plate, px
PLATE_Y = {"triangle": 0.66, "house": 0.62, "heart": 0.42}  # plate centre / height, else 0.5


# --------------------------------------------------------------------------------------- questions

class ToyQuestions:
    """A stream of questions, made on the fly. Item i is (picture, question) and depends on i alone.

    The kinds take turns; yes and no are equally likely.
    A question is {"question": ["What word is on the star?"], "answers": ["cat"], "kind": "word",
    "boxes": [[30, 40, 150, 160]], "id": "train/0/6"}. Boxes are half-open, in source px; an absent
    shape has none.
    """

    def __init__(self, stream, count):
        self.stream, self.count = stream, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i >= self.count:
            raise IndexError(i)  # this is what ends a for loop
        rng = random.Random(f"{self.stream}/{i}")
        kind = KINDS[i % len(KINDS)]
        scene = make_scene(rng, kind=kind)
        questions = possible_questions(scene.things, kind)
        if kind == "exist":
            questions = with_answer(questions, rng.choice(["yes", "no"]))
        return scene.picture, rng.choice(questions) | {"id": f"{self.stream}/{i}"}


def with_answer(questions, answer):
    return [q for q in questions if q["answers"] == [answer]]


def possible_questions(things, kind):
    """All questions of one kind about these things, in a fixed order.

    >>> things = [Thing("star", "red", "4", "blue", (0, 0, 100, 100), 20.0, 8.0),
    ...           Thing("ring", "red", "owl", "blue", (200, 0, 300, 100), 20.0, 8.0)]
    >>> possible_questions(things, "both")  # doctest: +NORMALIZE_WHITESPACE
    [{'question': ['What is on the star and the ring?'], 'answers': ['4 owl'],
      'boxes': [[0, 0, 100, 100], [200, 0, 300, 100]], 'kind': 'both'}]
    """
    def ask(shapes, answer, named):
        question = TEMPLATES[kind].format(*shapes).replace("a arrow", "an arrow")
        boxes = [list(thing.box) for thing in named]
        return {"question": [question], "answers": [answer], "boxes": boxes, "kind": kind}

    if kind == "both":
        pairs = near_pairs(things)
        return [ask([a.shape, b.shape], f"{a.text} {b.text}", [a, b]) for a, b in pairs]
    if kind == "exist":
        found = {shape: [t for t in things if t.shape == shape] for shape in SHAPES}
        return [ask([s], "yes" if named else "no", named) for s, named in found.items()]
    if kind == "colour":
        return [ask([t.shape], t.dot, [t]) for t in things]
    things = [t for t in things if t.text.isdigit() == (kind == "number")]
    return [ask([t.shape], t.text, [t]) for t in things]


def all_questions(scene, rng):
    """All questions about a scene in random order, but as many with yes as with no."""
    chosen = []
    for kind in KINDS:
        questions = possible_questions(scene.things, kind)
        if kind == "exist":
            yes, no = with_answer(questions, "yes"), with_answer(questions, "no")
            count = min(len(yes), len(no))
            questions = rng.sample(yes, count) + rng.sample(no, count)
        chosen += questions
    rng.shuffle(chosen)
    return chosen


def is_toy_question(text):
    """True if the toy was trained on questions like this one.

    >>> is_toy_question("Is there an arrow in the picture?"), is_toy_question("What is this?")
    (True, False)
    """
    template = re.sub("|".join(SHAPES), "{}", text.strip()).replace(" an {}", " a {}")
    return template in TEMPLATES.values()


# ------------------------------------------------------------------------------------------ scenes

@dataclass
class Thing:
    """A shape and its details, as Thing("star", "red", "4", "blue", (30, 40, 150, 160), 31.0, 6.2).
    """
    shape: str
    colour: str
    text: str
    dot: str         # colour of the dot
    box: tuple       # (x0, y0, x1, y1) in source px, half-open; a square
    font_px: float
    dot_px: float    # radius of the dot


@dataclass
class Scene:
    picture: Image.Image  # RGB, long side 672
    things: list


def make_scene(rng, font_px=(12, 28), dot_px=(8, 16), kind=None):
    """A new Scene. If `kind` is given, the scene has at least one question of that kind.

    font_px, dot_px: (least, largest) in source px.
    """
    while True:
        size, things = rng.choice(SIZES), []
        boxes = place_boxes(rng, *size)
        for shape, box in zip(rng.sample(SHAPES, len(boxes)), boxes):
            things.append(new_thing(rng, shape, box, things, font_px, dot_px))
        if len(things) >= 3 and (kind is None or possible_questions(things, kind)):
            return draw_scene(rng, size, things)


def place_boxes(rng, width, height):
    """3 to 6 square boxes of 100 to 168 px, GAP apart; fewer if the picture is full."""
    boxes = []
    count = rng.randint(3, 6)
    for _ in range(80):
        side = rng.randint(100, 168)
        x, y = rng.randint(0, width - side), rng.randint(0, height - side)
        new = (x, y, x + side, y + side)
        if all(max(x - b[2], b[0] - new[2], y - b[3], b[1] - new[3]) >= GAP for b in boxes):
            boxes.append(new)
        if len(boxes) == count:
            break
    return boxes


def new_thing(rng, shape, box, earlier, font_px, dot_px):
    """A thing with random details. Its dot sometimes has the colour of an earlier thing's dot."""
    side = box[2] - box[0]
    colour = rng.choice(list(COLOURS))
    dot = rng.choice([c for c in COLOURS if c != colour])
    if earlier and rng.random() < 0.35:
        copied = rng.choice(earlier).dot
        dot = copied if copied != colour else dot
    text = str(rng.randint(0, 9)) if rng.random() < 0.5 else rng.choice(WORDS)
    size, radius = log_uniform(rng, *font_px), log_uniform(rng, *dot_px)
    # Shrink the text until the shape shows around its plate and the dot fits above or below it.
    x0, y0, x1, y1 = font(100).getbbox(text)
    room_x, room_y = 0.74 * side - 2 * PAD, min(0.74 * side, side - dot_room(radius)) - 2 * PAD
    size = float(int(min(size, 100 * room_x / (x1 - x0), 100 * room_y / (y1 - y0))))
    return Thing(shape, colour, text, dot, box, size, radius)


def log_uniform(rng, low, high):
    """A number whose logarithm is uniform: half of log_uniform(rng, 4, 16) are below 8."""
    return low * (high / low) ** rng.random()


def dot_room(radius):
    """Height in px that a dot needs beside the plate: its rim, and 3 px of air on both sides."""
    return 2 * (radius + RIM + 3)


def box_around(things):
    """
    >>> box_around([Thing("star", "red", "4", "blue", (30, 40, 150, 160), 31.0, 6.2),
    ...             Thing("ring", "red", "4", "blue", (300, 0, 400, 100), 31.0, 6.2)])
    (30, 0, 400, 160)
    """
    x0, y0, x1, y1 = zip(*(thing.box for thing in things))
    return min(x0), min(y0), max(x1), max(y1)


def near_pairs(things):
    """Pairs of things that one crop can still magnify.

    The box around both covers at most a third of the padded square (a label's box may not cover
    half of it).
    """
    pairs = []
    for pair in combinations(things, 2):
        x0, y0, x1, y1 = box_around(pair)
        if (x1 - x0) * (y1 - y0) <= SIDE ** 2 / 3:
            pairs.append(pair)
    return pairs


# ----------------------------------------------------------------------------------------- drawing

def polygon(count, inner=1):
    """Corners around a centre, the first on top: polygon(4) is a diamond.

    inner: distance of every second corner from the centre; below 1 the polygon is a star.
    """
    corners = []
    for k in range(count):
        turn, radius = 2 * math.pi * k / count, inner if k % 2 else 1
        corners.append((radius * math.sin(turn), -radius * math.cos(turn)))
    return corners


def heart(t):
    """A point of the heart curve, t from 0 to 2 pi."""
    y = 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 13 * math.cos(t)
    return 16 * math.sin(t) ** 3, y


def fit_unit_square(points):
    """Stretch an outline to the unit square.

    >>> fit_unit_square([(1, 0), (2, 2), (0, 2)])
    [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    """
    stretched = []
    for values in zip(*points):
        low, high = min(values), max(values)
        stretched.append([(v - low) / (high - low) for v in values])
    return list(zip(*stretched))


OUTLINES = {  # of the ring: see draw_shape
    "circle": polygon(48),
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(1, 0), (2, 2), (0, 2)],
    "star": polygon(10, inner=0.45),
    "heart": [heart(2 * math.pi * k / 40) for k in range(40)],
    "cross": [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2),
              (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)],
    "diamond": polygon(4),
    "house": [(5, 0), (10, 4.5), (8.5, 4.5), (8.5, 10), (1.5, 10), (1.5, 4.5), (0, 4.5)],
    "arrow": [(0, 3), (5, 3), (5, 0), (10, 5), (5, 10), (5, 7), (0, 7)],
}


def draw_scene(rng, size, things):
    """Draw things on a new ground of this (w, h) -> Scene."""
    picture = draw_ground(rng, size)
    draw = ImageDraw.Draw(picture)
    for thing in things:
        draw_shape(draw, thing)
        draw_details(draw, thing, rng)
    return Scene(picture, things)


def tint(rng, low, high):
    """A random colour, each channel from low to high."""
    return tuple(rng.randint(low, high) for _ in range(3))


def draw_ground(rng, size):
    """A pastel picture, flat or with a gentle gradient, with thin lines and small confetti."""
    first, second = tint(rng, 205, 250), tint(rng, 205, 250)
    corners = Image.new("RGB", (2, 2), first)
    for corner in rng.choice([[], [(0, 1), (1, 1)], [(1, 0), (1, 1)], [(1, 1)]]):
        corners.putpixel(corner, second)
    picture = corners.resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.randint(10, 25)):
        ends = [rng.randrange(length) for length in size * 2]
        draw.line(ends, fill=tint(rng, 120, 235), width=rng.randint(1, 3))
    for _ in range(rng.randint(10, 25)):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        box = (x, y, x + rng.randint(5, 20), y + rng.randint(5, 20))
        stamp = rng.choice([draw.ellipse, draw.rectangle])
        stamp(box, fill=tint(rng, 120, 235))
    return picture


def draw_shape(draw, thing):
    """Draw the filled shape with its darker outline. It touches all four sides of its box."""
    x0, y0, x1, y1 = thing.box
    side, fill = x1 - x0, COLOURS[thing.colour]
    dark = tuple(int(0.5 * c) for c in fill)
    if thing.shape == "ring":  # the only shape with a hole: two nested bands
        band = round(0.2 * side)
        for inset, colour in ((0, dark), (OUTLINE, fill)):
            outer = (x0 + inset, y0 + inset, x1 - 1 - inset, y1 - 1 - inset)
            draw.ellipse(outer, outline=colour, width=band - 2 * inset)
        return
    half = OUTLINE / 2  # of the outline lies outside the path
    span = side - 1 - OUTLINE
    points = fit_unit_square(OUTLINES[thing.shape])
    path = [(x0 + half + u * span, y0 + half + v * span) for u, v in points]
    draw.polygon(path, fill=fill)
    # path[:2] rounds the last corner too.
    draw.line(path + path[:2], fill=dark, width=OUTLINE, joint="curve")


font = cache(ImageFont.load_default)  # font(size); parsing it is slow


def plate_size(text, face):
    """(w, h) in px of the plate with this text in this font."""
    left, top, right, bottom = face.getbbox(text)
    return right - left + 2 * PAD, bottom - top + 2 * PAD


def draw_plate(draw, x, y, text, face):
    """Draw a white plate with its text; (x, y) is the top left corner."""
    width, height = plate_size(text, face)
    left, top, _, _ = face.getbbox(text)
    draw.rounded_rectangle((x, y, x + width, y + height), radius=6, fill="white")
    draw.text((x + PAD - left, y + PAD - top), text, fill="black", font=face)


def draw_details(draw, thing, rng):
    """Draw the plate near the centre and the dot above or below it, both inside the box."""
    x0, y0, x1, y1 = thing.box
    side, face = x1 - x0, font(thing.font_px)
    centre, room = (x0 + x1) / 2, dot_room(thing.dot_px)
    width, height = plate_size(thing.text, face)
    below = rng.random() < 0.5
    y = y0 + PLATE_Y.get(thing.shape, 0.5) * side - height / 2
    # Move the plate if the dot lacks room.
    y = min(y, y1 - room - height) if below else max(y, y0 + room)
    draw_plate(draw, centre - width / 2, y, thing.text, face)

    spare = (y1 - y - height if below else y - y0) - room
    distance = room / 2 + 0.5 * rng.random() * spare  # from the plate's edge to the dot's centre
    dot_x = centre + rng.uniform(-0.15, 0.15) * side
    dot_y = y + height + distance if below else y - distance
    for r, colour in ((thing.dot_px + RIM, "white"), (thing.dot_px, COLOURS[thing.dot])):
        draw.ellipse((dot_x - r, dot_y - r, dot_x + r, dot_y + r), fill=colour)


# ------------------------------------------------------------------------------------- the program

def write_scenes(args):
    from data.questions import write_questions  # a question about a scene does without
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (picture, question) in enumerate(ToyQuestions(args.seed, args.count)):
        image = f"images/{i:05d}.png"
        picture.save(args.out / image)
        lines.append({"image": image} | question)
    path = args.out / "questions.jsonl"
    write_questions(path, ".", lines)
    log(f"wrote {args.count} scenes with a question each; try: python infer.py --eval {path}")


def main(argv=None):
    p = argparse.ArgumentParser(
        "scenes.py", description="Write toy pictures and a questions.jsonl with true boxes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--seed", type=int, default=7, help="same seed, same questions")
    p.add_argument("--count", type=int, default=300, help="pictures, one question each")
    p.add_argument("--out", type=Path, required=True, metavar="DIR",
                   help="folder for images/ and questions.jsonl; files in it are replaced")
    run_program(p, write_scenes, argv)


if __name__ == "__main__":
    main()

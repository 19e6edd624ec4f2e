"""Endless toy pictures with questions, answers and true boxes, all drawn from a seed.

A picture (long side 672 px) holds 3 to 6 big named shapes on a cluttered pastel ground. Each shape
carries two details: a plate with a number or a word, and a coloured dot. A toy model that sees the
whole picture at 168 px (4x smaller) can find the shape but often can not read its details; a crop
of the shape's box at full resolution always shows them. So the questions reward looking at the
right place, or (kind "both") at the right two places.

    python data/toy/scenes.py --seed 7 --count 300 --out toy_eval    # a set to evaluate on
    scene = make_scene(random.Random(0)); all_questions(scene, random.Random(1))   # in training

Left out: overlapping, rotated or repeated shapes, photographs, and questions that need counting or
spatial relations. Pixels (not questions) may differ a little between Pillow versions.
"""

import argparse
import json
import math
import random
import sys
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# As a script, only this folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from clip import BadInput, printable  # noqa: E402
from data.program import run_program  # noqa: E402
from data.questions import write_questions  # noqa: E402

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
KINDS = ("number", "word", "colour", "both", "exist")

GAP = 14      # least space between two objects, px
OUTLINE = 4   # width of an object's dark outline, px
RIM = 2       # width of a dot's white rim, px
PAD = 5       # white space between a text and the edge of its plate, px
PLATE_Y = {"triangle": 0.66, "house": 0.62, "heart": 0.42}  # plate centre / height, else 0.5


@dataclass
class Thing:
    """One object. `box` is (x0, y0, x1, y1) in source px, half-open; `font_px` and the dot's radius
    `dot_px` are source px too: Thing("star", "red", "4", "blue", (30, 40, 150, 160), 31.0, 6.2).
    """
    shape: str
    colour: str
    text: str
    dot: str
    box: tuple
    font_px: float
    dot_px: float


@dataclass
class Scene:
    image: Image.Image  # RGB, long side 672
    things: list


def log_uniform(rng, low, high):
    """A number from low to high with uniform logarithm: (4, 16) falls below 8 half of the time."""
    return low * (high / low) ** rng.random()


@lru_cache(maxsize=None)
def font(size):
    return ImageFont.load_default(size)  # parsing the font is slow next to drawing with it


def place(rng, width, height):
    """3 to 6 square boxes of 100 to 168 px that keep GAP apart; fewer if the picture is full."""
    boxes = []
    wanted = rng.randint(3, 6)
    for _ in range(80):
        side = rng.randint(100, 168)
        x, y = rng.randint(0, width - side), rng.randint(0, height - side)
        new = (x, y, x + side, y + side)
        if all(max(x - b[2], b[0] - new[2], y - b[3], b[1] - new[3]) >= GAP for b in boxes):
            boxes.append(new)
        if len(boxes) == wanted:
            break
    return boxes


def new_thing(rng, shape, box, earlier, font_px, dot_px):
    """A thing with random details; now and then its dot copies that of an earlier one."""
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


def dot_room(radius):
    """Height in px that a dot takes beside the plate: rim, and 3 px of air on both sides."""
    return 2 * (radius + RIM + 3)


def near_pairs(things):
    """Pairs in two places that one crop can still show larger.

    The box around both covers at most a third of the padded square: a label's may not reach half.
    """
    pairs = []
    for a, b in combinations(things, 2):
        width = max(a.box[2], b.box[2]) - min(a.box[0], b.box[0])
        height = max(a.box[3], b.box[3]) - min(a.box[1], b.box[1])
        if width * height <= SIDE ** 2 / 3:
            pairs.append((a, b))
    return pairs


def wheel(count, radius=lambda k: 1):
    """Points around a centre, the first on top: wheel(4) is a diamond."""
    turns = [2 * math.pi * k / count for k in range(count)]
    return [(radius(k) * math.sin(t), -radius(k) * math.cos(t)) for k, t in enumerate(turns)]


def heart(t):
    """A point of the heart curve, t from 0 to 2 pi."""
    y = 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 13 * math.cos(t)
    return 16 * math.sin(t) ** 3, y


def unit(points):
    """The same outline stretched to the unit square, so that a thing's box fits it tightly."""
    stretched = []
    for values in zip(*points):
        low, high = min(values), max(values)
        stretched.append([(v - low) / (high - low) for v in values])
    return list(zip(*stretched))


OUTLINES = {name: unit(points) for name, points in {
    "circle": wheel(48),
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(1, 0), (2, 2), (0, 2)],
    "star": wheel(10, lambda k: 0.45 if k % 2 else 1),
    "heart": [heart(2 * math.pi * k / 40) for k in range(40)],
    "cross": [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2),
              (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)],
    "diamond": wheel(4),
    "house": [(5, 0), (10, 4.5), (8.5, 4.5), (8.5, 10), (1.5, 10), (1.5, 4.5), (0, 4.5)],
    "arrow": [(0, 3), (5, 3), (5, 0), (10, 5), (5, 10), (5, 7), (0, 7)],
}.items()}


def tint(rng, low, high):
    """A random colour, each channel from low to high."""
    return tuple(rng.randint(low, high) for _ in range(3))


def draw_ground(rng, size):
    """A pastel picture, flat or with a gentle gradient, under thin lines and small confetti."""
    first, second = tint(rng, 205, 250), tint(rng, 205, 250)
    corners = Image.new("RGB", (2, 2), first)
    for corner in rng.choice([[], [(0, 1), (1, 1)], [(1, 0), (1, 1)], [(1, 1)]]):
        corners.putpixel(corner, second)
    image = corners.resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(10, 25)):
        ends = [rng.randrange(size[k % 2]) for k in range(4)]
        draw.line(ends, fill=tint(rng, 120, 235), width=rng.randint(1, 3))
    for _ in range(rng.randint(10, 25)):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        w, h = rng.randint(5, 20), rng.randint(5, 20)
        stamp = rng.choice([draw.ellipse, draw.rectangle])
        stamp((x, y, x + w, y + h), fill=tint(rng, 120, 235))
    return image


def draw_body(draw, thing):
    """The thing's filled shape with a darker outline, exactly filling its box."""
    x0, y0, x1, y1 = thing.box
    side, fill = x1 - x0, COLOURS[thing.colour]
    dark = tuple(int(0.5 * c) for c in fill)
    if thing.shape == "ring":  # the only shape with a hole: two nested bands
        band = round(0.2 * side)
        draw.ellipse((x0, y0, x1 - 1, y1 - 1), outline=dark, width=band)
        draw.ellipse((x0 + OUTLINE, y0 + OUTLINE, x1 - 1 - OUTLINE, y1 - 1 - OUTLINE),
                     outline=fill, width=band - 2 * OUTLINE)
        return
    half = OUTLINE / 2  # the outline straddles the path: keep its outer half inside the box
    span = side - 1 - OUTLINE
    path = [(x0 + half + u * span, y0 + half + v * span) for u, v in OUTLINES[thing.shape]]
    draw.polygon(path, fill=fill)
    # path[:2] rounds the last corner too.
    draw.line(path + path[:2], fill=dark, width=OUTLINE, joint="curve")


def draw_details(draw, thing, rng):
    """The text plate near the centre, the dot above or below it; both inside the box, apart."""
    x0, y0, x1, y1 = thing.box
    side, radius = x1 - x0, thing.dot_px
    left, top, right, bottom = font(thing.font_px).getbbox(thing.text)
    width, height = right - left + 2 * PAD, bottom - top + 2 * PAD
    cx, room = (x0 + x1) / 2, dot_room(radius)
    below = rng.random() < 0.5
    # The plate's top edge, moved only to make room for the dot.
    plate_y = y0 + PLATE_Y.get(thing.shape, 0.5) * side - height / 2
    plate_y = min(plate_y, y1 - room - height) if below else max(plate_y, y0 + room)
    plate = (cx - width / 2, plate_y, cx + width / 2, plate_y + height)
    draw.rounded_rectangle(plate, radius=6, fill="white")
    corner = (cx - width / 2 + PAD - left, plate_y + PAD - top)
    draw.text(corner, thing.text, fill="black", font=font(thing.font_px))

    spare = (y1 - plate_y - height if below else plate_y - y0) - room
    away = room / 2 + 0.5 * rng.random() * spare  # from the plate's edge to the dot's centre
    dot_x = cx + rng.uniform(-0.15, 0.15) * side
    dot_y = plate_y + height + away if below else plate_y - away
    for r, colour in ((radius + RIM, "white"), (radius, COLOURS[thing.dot])):
        draw.ellipse((dot_x - r, dot_y - r, dot_x + r, dot_y + r), fill=colour)


def make_scene(rng, font_px=(12, 28), dot_px=(8, 16), kind=None):
    """A fresh Scene; with `kind`, one that can pose that kind of question.

    Sizes are ranges in source px: make_scene(random.Random(0), font_px=(40, 56)) has large texts.
    """
    while True:
        size, things = rng.choice(SIZES), []
        boxes = place(rng, *size)
        for shape, box in zip(rng.sample(SHAPES, len(boxes)), boxes):
            things.append(new_thing(rng, shape, box, things, font_px, dot_px))
        if len(things) >= 3 and (kind is None or candidates(things, kind)):
            return draw_scene(rng, size, things)


def draw_scene(rng, size, things):
    """These things on a fresh ground of this (w, h) -> Scene."""
    image = draw_ground(rng, size)
    draw = ImageDraw.Draw(image)
    for thing in things:
        draw_body(draw, thing)
        draw_details(draw, thing, rng)
    return Scene(image, things)


def candidates(things, kind):
    """Every question of one kind that these things can pose, in a fixed order."""
    if kind in ("number", "word"):
        found = [(f"What {kind} is on the {t.shape}?", t.text, [t])
                 for t in things if t.text.isdigit() == (kind == "number")]
    elif kind == "colour":
        found = [(f"What colour is the dot on the {t.shape}?", t.dot, [t]) for t in things]
    elif kind == "both":
        found = [(f"What is on the {a.shape} and the {b.shape}?", f"{a.text} {b.text}", [a, b])
                 for a, b in near_pairs(things)]
    elif kind == "exist":
        seen = {t.shape: [t] for t in things}
        found = [(f"Is there {'an' if s[0] in 'aeiou' else 'a'} {s} in the picture?",
                  "yes" if s in seen else "no", seen.get(s, [])) for s in SHAPES]
    else:
        raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    return [{"question": question, "answers": [answer], "boxes": [list(t.box) for t in named],
             "kind": kind} for question, answer, named in found]


def ask(scene, rng, kind):
    """One question of this kind, which the scene can pose.

    As {"question": "What word is on the star?", "answers": ["cat"], "kind": "word",
    "boxes": [[30, 40, 150, 160]]}: source px, no box for an absent shape. Yes and no are equally
    likely.
    """
    found = candidates(scene.things, kind)
    if kind == "exist":
        wanted = rng.choice(["yes", "no"])
        found = [q for q in found if q["answers"] == [wanted]]
    return rng.choice(found)


def all_questions(scene, rng):
    """All questions of the scene in random order, each at most once.

    As many with yes as with no: the more frequent is thinned out, or always saying it would score.
    """
    chosen = []
    for kind in KINDS:
        found = candidates(scene.things, kind)
        if kind == "exist":
            sides = [[q for q in found if q["answers"] == [answer]] for answer in ("yes", "no")]
            fewest = min(map(len, sides))
            found = [q for side in sides for q in rng.sample(side, fewest)]
        chosen += found
    rng.shuffle(chosen)
    return chosen


def make_question(seed, i):
    """(Scene, question) number i of a stream, a function of (seed, i); the kinds take turns."""
    rng = random.Random(f"{seed}/{i}")
    kind = KINDS[i % len(KINDS)]
    scene = make_scene(rng, kind=kind)
    return scene, ask(scene, rng, kind)


class ToyQuestions:
    """A stream of questions by number, made on the fly: item i is (picture, question dict)."""

    def __init__(self, stream, count):
        self.stream, self.count = stream, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i >= self.count:
            raise IndexError(i)  # or a loop over the questions would never end
        scene, question = make_question(self.stream, i)
        turns = [question["question"]]
        return scene.image, question | {"question": turns, "id": f"{self.stream}/{i}"}


def knows_scenes(folder):
    """Does a checkpoint's recipe, if it has one, say that it was made for these scenes?"""
    path = folder / "recipe.json"
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))["train"]["data"] == "toy scenes"
    except (OSError, KeyError):
        return False
    except (ValueError, TypeError, RecursionError):
        raise BadInput(f"{path}: damaged; copy the checkpoint's own again") from None


def write(args):
    if args.count < 1:
        raise BadInput(f"--count {args.count}: must be at least 1")
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(args.count):
        scene, question = make_question(args.seed, i)
        image = f"images/{i:05d}.png"
        scene.image.save(args.out / image)
        lines.append({"id": f"{args.seed}/{i}", "image": image} | question)
    write_questions(args.out / "questions.jsonl", ".", lines)
    print(f"wrote {args.count} pictures and questions to {printable(args.out)}; "
          f"try: python infer.py --eval {printable(args.out)}/questions.jsonl")


def parser():
    p = argparse.ArgumentParser(
        "scenes.py", description="Write toy pictures and a questions.jsonl with true boxes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--seed", type=int, default=7, help="same seed, same questions")
    p.add_argument("--count", type=int, default=300, help="pictures, one question each")
    p.add_argument("--out", type=Path, required=True, metavar="DIR",
                   help="folder for images/ and questions.jsonl; made if missing, "
                        "files in it are replaced")
    return p


def main(argv=None):
    run_program(parser(), write, argv)


if __name__ == "__main__":
    main()

r"""Pictures of what the model saw: beside an answer, step by step, and as sheets of maps.

    sheet = answer_picture(picture, letterbox, heat, boxes, crops, question, {"plain": "6"})
    save(sheet, "out/star.png", protect="star.png")

Plain arrays and PIL pictures in, PIL pictures out. Maps are (h, w), the cells of the image tokens.
`letterbox` is the geometry of one picture and its grid, from the caller (sdrpn.Letterbox):
    .picture_size      (width, height) of the source picture in pixels
    .grid              (h, w)
    .to_grid(x, axis)  a source pixel coordinate -> cells from the grid's left (axis 0) or top (1)
    .to_pixels(box)    a box in cells -> (x0, y0, x1, y1) in source pixels
Of a map only the part over the picture is drawn, not the padding.

Text: Pillow's own font holds ASCII and a few signs. What a font lacks is written in other letters
(é as e) or escaped (\u4e2d), never as an empty box; use_font(path) takes a font that holds more.
Left out: charts (tests/plots.py), moving pictures, colour fonts.
"""
import math
import os
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clip import FORMATS, BadInput
from data.files import write_file

INK, SOFT, LINE, PANEL = (28, 32, 38), (96, 104, 114), (214, 218, 223), (246, 247, 249)
GREEN, WHITE, DARK = (0, 184, 92), (255, 255, 255), (16, 16, 24)  # green: boxes, what is kept
RAMP = np.array([(10, 8, 40), (74, 16, 108), (158, 40, 104), (226, 84, 60), (250, 162, 40),
                 (252, 244, 160)])
LABELS = (  # name, colour, opacity of the labels -1, 0, 1
    ("ignored", (220, 220, 220), 0.4),
    ("background", (50, 86, 150), 0.6),
    ("foreground", GREEN, 0.75),
)
MARGIN, GAP, HEADER = 28, 20, 48  # px; a panel's header is its title and its key
THIN = 32  # px; no side of a picture is drawn shorter


# --------------------------------------------------------------------------------------------- text

SPELL = {"×": "x", "–": "-", "—": "-", "−": "-", "→": "->", "≤": "<=", "≥": ">=", "€": "EUR",
         "£": "GBP", "ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O"}
NOWHERE = "\U0010ffff"  # no character: a font draws the box that stands for all it lacks
font_path = None        # None: Pillow's own font


def use_font(path):
    """Draw all text with this TrueType or OpenType font; None: Pillow's own. Raises BadInput."""
    global font_path
    if path is not None:
        try:
            ImageFont.truetype(str(path), 16).getmask("a")
        except (OSError, ValueError) as e:
            raise BadInput(f"{path}: no font that can be drawn with ({e}); "
                           "name a .ttf or .otf file, not a bitmap font") from None
    font_path = path
    font.cache_clear()


@lru_cache
def font(size):
    """The font in use, `size` px high."""
    if font_path is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(font_path), size)


@lru_cache(maxsize=10000)
def has_glyph(face, character):
    """Whether the font draws this character: not nothing, and not the box of what it lacks."""
    mask, lacking = face.getmask(character), face.getmask(NOWHERE)
    same = mask.size == lacking.size and bytes(mask) == bytes(lacking)
    return mask.getbbox() is not None and not same


def spelt(character, face):
    r"""What stands for a character that the font lacks: other letters, or its number.

    >>> [spelt(c, ImageFont.load_default(16)) for c in "é→中😀²"]
    ['e', '->', '\\u4e2d', '\\U0001f600', '\\u00b2']
    """
    if character in SPELL:
        return SPELL[character]
    if unicodedata.category(character) in ("Lu", "Ll", "Lo", "Nd"):  # not ²: 10² is not 102
        parts = unicodedata.normalize("NFKD", character)
        letters = "".join(c for c in parts if not unicodedata.combining(c))
        if letters and all(has_glyph(face, c) for c in letters):
            return letters
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def readable(text, face):
    r"""Text on one line, of its first 2000 characters, in characters that the font holds.

    Space and control characters become one space; joiners and marks of direction, which have no
    shape of their own, go.
    >>> readable("a\x00\n café \u202e中", ImageFont.load_default(16))
    'a cafe \\u4e2d'
    """
    drawn = []
    for c in unicodedata.normalize("NFC", str(text)[:2000]):
        kind = unicodedata.category(c)
        if kind in ("Cc", "Zs", "Zl", "Zp"):
            drawn.append(" ")
        elif kind == "Cs":  # half a character: no font can be asked for it
            drawn.append(f"\\u{ord(c):04x}")
        elif kind != "Cf":
            drawn.append(c if has_glyph(face, c) else spelt(c, face))
    return " ".join("".join(drawn).split())


def wrap(text, face, width, most=1):
    """Text -> at most `most` lines, none wider than width px in this font; … marks a cut."""
    rest, lines = readable(text, face), []
    while rest and len(lines) < most:
        fits = bisect_right(range(1, len(rest) + 1), width, key=lambda n: face.getlength(rest[:n]))
        end = max(fits, 1)
        if end < len(rest) and rest.rfind(" ", 0, end + 1) > 0:
            end = rest.rfind(" ", 0, end + 1)
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and face.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last + "…"
    return lines or [""]


# ------------------------------------------------------------------------------ maps over a picture

def heat_colour(values):
    """(h, w) in [0, 1] -> (h, w, 3) uint8: dark violet, red, pale yellow, ever lighter."""
    stops = np.linspace(0, 1, len(RAMP))
    colour = np.stack([np.interp(values, stops, RAMP[:, k]) for k in range(3)], -1)
    return colour.round().astype(np.uint8)


def fitted(size, width, height):
    """The size of a picture of size (w, h) px, scaled to fit width x height px.

    A side that would be shorter than THIN is stretched to that.
    >>> fitted((1000, 500), 400, 400), fitted((5000, 10), 400, 400)
    ((400, 200), (400, 32))
    """
    scale = min(width / size[0], height / size[1])
    return (min(width, max(THIN, round(size[0] * scale))),
            min(height, max(THIN, round(size[1] * scale))))


def thumbnail(picture, width, height):
    """The picture as RGB at its fitted size, scaled up or down."""
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    size = fitted(picture.size, width, height)
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def map_over(values, letterbox, size, smooth):
    """The part of a map (h, w) over the picture, resampled to size = (W, H) px -> (H, W).

    smooth: linear between the centres of the cells; otherwise each pixel has its cell's value.
    """
    values = np.asarray(values)
    h, w = values.shape
    source = letterbox.picture_size
    x, y = (letterbox.to_grid((np.arange(size[axis]) + 0.5) * source[axis] / size[axis], axis)
            for axis in (0, 1))  # the pixels' centres, (W,) and (H,) in cells
    if not smooth:
        rows = np.clip(np.floor(y).astype(int), 0, h - 1)
        columns = np.clip(np.floor(x).astype(int), 0, w - 1)
        return values[rows[:, None], columns]
    values = np.nan_to_num(values.astype(float))
    wide = np.stack([np.interp(x, np.arange(w) + 0.5, row) for row in values])  # (h, W)
    return np.stack([np.interp(y, np.arange(h) + 0.5, column) for column in wide.T], 1)


def overlay(thumb, values, letterbox, own_max=False):
    """A thumbnail in grey under a map (h, w): integers as LABELS, floats as heat in [0, 1].

    own_max: the heat is first divided by its largest value over the picture.
    """
    grey = np.asarray(thumb.convert("L"), float)[..., None]  # (H, W, 1)
    whole = np.asarray(values).dtype.kind in "iu"
    values = map_over(values, letterbox, thumb.size, smooth=not whole)
    if whole:
        colour = np.array([tint for _, tint, _ in LABELS])[values + 1]
        opacity = np.array([[alpha] for _, _, alpha in LABELS])[values + 1]
    else:
        if own_max:
            values = values / max(values.max(), 1e-12)
        values = np.clip(values, 0, 1)
        grey = grey * 0.85
        colour, opacity = heat_colour(values), 0.45 + 0.35 * values[..., None]
    return Image.fromarray((grey * (1 - opacity) + colour * opacity).astype(np.uint8))


def shrunk(mask, by):
    """A mask (H, W) bool without its outermost `by` pixels.

    >>> shrunk(np.ones((3, 4), bool), 1).astype(int)
    array([[0, 0, 0, 0],
           [0, 1, 1, 0],
           [0, 0, 0, 0]])
    """
    for _ in range(by):
        wide = np.pad(mask, 1)
        mask = mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask


def with_outline(thumb, mask, colour):
    """A copy of the thumbnail with the mask (H, W) bool outlined along its inner edge."""
    pixels = np.array(thumb)
    inner = shrunk(mask, 1)
    pixels[mask & ~inner] = DARK
    pixels[inner & ~shrunk(inner, 2)] = colour
    return Image.fromarray(pixels)


def with_boxes(thumb, boxes, source):
    """A copy of the thumbnail with outlines of boxes (x0, y0, x1, y1) in px of a source of (w, h).

    The line runs around the box, so that the smallest box is seen and nothing of it is hidden.
    """
    thumb = thumb.copy()
    pen, last = ImageDraw.Draw(thumb), np.array(thumb.size) - 1
    for box in boxes:
        low, high = np.sort(np.reshape(box, (2, 2)), 0) * thumb.size / np.array(source)
        room = np.maximum(4 - (high - low) / 2, 0)  # at least 8 px to look through
        for reach, width, tint in ((4, 5, DARK), (3, 3, GREEN)):
            around = np.clip([low - room - reach, high + room + reach], 0, last)
            pen.rectangle(tuple(around.ravel()), outline=tint, width=width)
    return thumb


def centres(cells, letterbox, size):
    """Where the cells (h, w) bool lie on a thumbnail of size (W, H) px -> [(x, y)] px, reach in px.

    Cells wholly in the padding are left out, centres in it are moved to the picture's edge.
    reach: half the shorter side of a cell.
    """
    low = [letterbox.to_grid(0, axis) for axis in (0, 1)]
    high = [letterbox.to_grid(letterbox.picture_size[axis], axis) for axis in (0, 1)]
    cell = [size[axis] / (high[axis] - low[axis]) for axis in (0, 1)]  # px
    spots = []
    for row, column in np.argwhere(cells):
        at = column, row
        if all(low[axis] - 1 < at[axis] < high[axis] for axis in (0, 1)):
            spots.append([min(max((at[axis] + 0.5 - low[axis]) * cell[axis], 0), size[axis])
                          for axis in (0, 1)])
    return spots, min(cell) / 2


def with_marks(thumb, cells, letterbox, shape):
    """A copy of the thumbnail with a white "ring" or "cross" on each cell (h, w) bool."""
    thumb = thumb.copy()
    spots, reach = centres(cells, letterbox, thumb.size)
    for x, y in spots:
        draw_mark(ImageDraw.Draw(thumb), x, y, min(max(reach, 5), 16), shape)
    return thumb


def draw_mark(pen, x, y, reach, shape):
    """A "ring" around (x, y) or a "cross" on it: white with a dark edge, reach px to each side."""
    for more, tint in ((1, DARK), (0, WHITE)):
        if shape == "ring":
            around = reach + more
            corners = x - around, y - around, x + around, y + around
            pen.ellipse(corners, outline=tint, width=2 + 2 * more)
            continue
        for up in (-0.7 * reach, 0.7 * reach):
            pen.line((x - 0.7 * reach, y - up, x + 0.7 * reach, y + up), tint, 3 + 2 * more)


def crop_view(crop, keep, width, height):
    """A crop, fitted to width x height px; tokens outside keep (h, w) bool are greyed."""
    thumb = thumbnail(crop, width, height)
    if keep.all():
        return thumb
    h, w = keep.shape
    rows = np.arange(thumb.height) * h // thumb.height
    columns = np.arange(thumb.width) * w // thumb.width
    kept = keep[rows[:, None], columns]  # (H, W)
    pixels = np.array(thumb)
    grey = np.asarray(thumb.convert("L"), float)[..., None] * 0.3 + 150
    pixels[~kept] = np.broadcast_to(grey, pixels.shape)[~kept].astype(np.uint8)
    return with_outline(Image.fromarray(pixels), kept, GREEN)


def crops_view(crops, width, height):
    """The crops [(PIL, keep)] in one panel, as large as columns make them."""
    def slot(columns):
        rows = math.ceil(len(crops) / columns)
        return (width - 8 * (columns - 1)) // columns, (height - 8 * (rows - 1)) // rows

    def shown(columns):  # px that the crops cover
        return sum(math.prod(fitted(crop.size, *slot(columns))) for crop, _ in crops)

    columns = max(range(1, len(crops) + 1), key=shown)
    across, down = slot(columns)
    view = Image.new("RGB", (width, height), PANEL)
    for k, (crop, keep) in enumerate(crops):
        x, y = k % columns * (across + 8), k // columns * (down + 8)
        paste(view, crop_view(crop, keep, across, down), x, y, across, down)
    return view


# ------------------------------------------------------------------------------------------- sheets

@dataclass
class Panel:
    title: str
    key: list          # of (swatch: PIL picture or None, text), in a line below the title
    view: Image.Image  # None: nothing to show


def paste(sheet, view, x, y, width, height):
    """The view, in the middle of the place of width x height px whose top left corner is (x, y)."""
    sheet.paste(view, (x + (width - view.width) // 2, y + (height - view.height) // 2))


def flat(colour, opacity=1.0):
    """A swatch of a colour, as it is over mid grey."""
    mixed = tuple(round(c * opacity + 128 * (1 - opacity)) for c in colour)
    swatch = Image.new("RGB", (14, 14), mixed)
    if mixed == WHITE:
        ImageDraw.Draw(swatch).rectangle((0, 0, 13, 13), outline=DARK)
    return swatch


def ramp():
    """A swatch of the colours of heat, from 0 to 1."""
    return Image.fromarray(heat_colour(np.tile(np.linspace(0, 1, 56), (14, 1))))


def mark(shape):
    """A swatch of a mark on dark ground."""
    swatch = Image.new("RGB", (16, 16), tuple(RAMP[1]))
    draw_mark(ImageDraw.Draw(swatch), 7.5, 7.5, 5, shape)
    return swatch


def label_key():
    """The colours of LABELS, foreground first."""
    return [(flat(colour, opacity), name) for name, colour, opacity in reversed(LABELS)]


def draw_key(sheet, x, y, width, key):
    """Swatches and their texts in a line from (x, y), cut at width px."""
    pen, face, end = ImageDraw.Draw(sheet), font(14), x + width
    for swatch, text in key:
        if swatch is not None and x + swatch.width < end:
            sheet.paste(swatch, (x, y))
            x += swatch.width + 6
        if end - x < 20:
            return
        line = wrap(text, face, end - x)[0]
        pen.text((x, y + 14), line, SOFT, face, "ls")
        x += math.ceil(face.getlength(line)) + 14


def layout(size, panels, usual, width, height):
    """Panels of a picture of size (w, h) on width x height px -> columns, (across, down) px.

    In the usual number of columns, unless fewer show the picture half as large again: a wide
    picture's panels come one below the other. Beyond 3 : 1 the sheet may be twice as high.
    >>> layout((640, 480), 3, 3, 1144, 600)
    (3, (368, 276))
    >>> layout((6400, 480), 3, 3, 1144, 600)
    (1, (1144, 100))
    """
    if max(size) > 3 * min(size):
        height *= 2

    def place(columns):
        rows = panels // columns
        return ((width - GAP * (columns - 1)) // columns,
                (height - GAP * (rows - 1)) // rows - HEADER)

    def scale(columns):
        across, down = place(columns)
        return min(across / size[0], down / size[1])

    columns = max((n for n in range(1, usual + 1) if panels % n == 0), key=scale)
    if scale(columns) < 1.5 * scale(usual):
        columns = usual
    across, most = place(columns)
    return columns, (across, min(most, max(100, fitted(size, across, most)[1])))


def panel_grid(panels, columns, place):
    """Panels of place = (across, down) px in rows of `columns` -> picture."""
    across, down = place
    rows = math.ceil(len(panels) / columns)
    size = columns * (across + GAP) - GAP, rows * (HEADER + down + GAP) - GAP
    sheet = Image.new("RGB", size, "white")
    pen, face = ImageDraw.Draw(sheet), font(17)
    for k, panel in enumerate(panels):
        x, y = k % columns * (across + GAP), k // columns * (HEADER + down + GAP)
        pen.text((x, y + 16), wrap(panel.title, face, across)[0], INK, face, "ls")
        draw_key(sheet, x, y + 24, across, panel.key)
        pen.rectangle((x, y + HEADER, x + across - 1, y + HEADER + down - 1), PANEL, LINE)
        if panel.view is not None:
            paste(sheet, panel.view, x, y + HEADER, across, down)
    return sheet


def text_block(rows, width):
    """Pairs (label, text), the labels in a column, the texts on up to 4 lines each -> picture."""
    small, big = font(16), font(21)
    labels = [wrap(label, small, 220)[0] for label, _ in rows]
    indent = math.ceil(max(small.getlength(label) for label in labels)) + GAP
    texts = [wrap(text, big, width - indent, 4) for _, text in rows]
    height = sum(29 * len(lines) + 11 for lines in texts)
    sheet = Image.new("RGB", (width, height), "white")
    pen, y = ImageDraw.Draw(sheet), 22
    for label, lines in zip(labels, texts):
        pen.text((0, y), label, SOFT, small, "ls")
        for line in lines:
            pen.text((indent, y), line, INK, big, "ls")
            y += 29
        y += 11
    return sheet


def stack(pieces, width):
    """Pictures one below the other on a white sheet, width px wide, with margins."""
    height = sum(piece.height for piece in pieces) + MARGIN * (len(pieces) + 1)
    sheet, y = Image.new("RGB", (width, height), "white"), MARGIN
    for piece in pieces:
        sheet.paste(piece, (MARGIN, y))
        y += piece.height + MARGIN
    return sheet


def size_of(picture, place):
    """A picture's size in words, and whether its panel shows it stretched."""
    across, down = fitted(picture.size, *place)
    stretched = max(across * picture.height, 1) / max(down * picture.width, 1)
    note = "" if 0.8 < stretched < 1.25 else ", thin side stretched"
    return f"{picture.width} x {picture.height} px{note}"


def crops_panel(title, crops, place):
    """The crops that the model looked at; how many tokens it kept, where some are masked."""
    if not crops:
        return Panel(title, [(None, "the plain answer stands")], None)
    kept, tokens = sum(int(keep.sum()) for _, keep in crops), sum(keep.size for _, keep in crops)
    note = f"all {tokens} tokens kept"
    if kept < tokens:
        note = f"{kept} of {tokens} tokens kept, the greyed are left out"
    return Panel(title, [(None, note)], crops_view(crops, *place))


def answer_picture(picture, letterbox, heat, boxes, crops, question, answers):
    """A question, its answers and what the model looked at -> picture 1200 px wide.

    heat: (h, w) in [0, 1], or None in plain mode. boxes: (x0, y0, x1, y1) in source px, outlined.
    crops: [(PIL crop, keep)], keep (h, w) bool: the cells of the crop's own grid that were read.
    answers: dict label -> text.
    """
    width = 1200 - 2 * MARGIN
    columns, place = layout(picture.size, 3, 3, width, 620)
    thumb = thumbnail(picture, *place)
    where = Panel("No map", [(None, "plain answer: the picture is read as it is")], None)
    if heat is not None:
        view = overlay(thumb, heat, letterbox)
        where = Panel("Where to look", [(ramp(), "0 to 1")], view)
    panels = [
        Panel("Picture", [(None, size_of(picture, place))], with_boxes(thumb, boxes, picture.size)),
        where,
        crops_panel("Crops" if len(crops) > 1 else "Crop" if crops else "No crop", crops, place),
    ]
    text = text_block([("question", question), *answers.items()], width)
    return stack([panel_grid(panels, columns, place), text], 1200)


# ------------------------------------------------------------------------- the method, step by step

@dataclass
class Steps:
    """All that SD-RPN computes on one question; maps are (h, w) arrays over a letterbox's grid."""
    picture: Image.Image
    question: str
    # the teacher's
    teacher_letterbox: object
    raw: np.ndarray        # response-to-image attention, any scale
    sinks: np.ndarray      # bool: what Eq. 1 removes
    clean: np.ndarray      # raw without the sinks
    labels: np.ndarray     # integers: 1 foreground, 0 background, -1 ignored
    response: str          # its own answer, whose attention this is
    # the student's
    letterbox: object
    rpn: np.ndarray        # probabilities
    smoothed: np.ndarray   # the same after Eq. 6's filter
    tau: float
    regions: list          # boxes (x0, y0, x1, y1) in cells; empty: the plain answer stands
    boxes: list            # what is cropped, in source px
    crops: list            # [(PIL crop, keep)] as in answer_picture
    plain: str
    two_stage: str
    mode: str              # "mask" or "box"


STORY = ("1 to 4, the teacher: what the model attends to while it answers becomes labels.   "
         "5 to 8, the student: its map says where to look again.")
CROP_TITLES = {"box": "8  Box Upscaling (Eq. 7)",
               "mask": "8  Masked Upscaling (Eq. 8)"}


def explain_picture(steps):
    """Steps of one question -> picture 1600 px wide: eight numbered panels and the answers."""
    width = 1600 - 2 * MARGIN
    columns, place = layout(steps.picture.size, 8, 4, width, 1040)
    panels = [*teacher_panels(steps, place), *student_panels(steps, place)]
    story = Image.new("RGB", (width, 22), "white")
    draw_key(story, 0, 2, width, [(None, STORY)])
    answers = [("question", steps.question), ("plain answer", steps.plain)]
    if steps.response.strip() != steps.plain.strip():
        answers.append(("teacher's response", steps.response))
    answers.append(("two-stage answer", steps.two_stage))
    return stack([story, panel_grid(panels, columns, place), text_block(answers, width)], 1600)


def teacher_panels(steps, place):
    """1 to 4: from the picture to the labels, as in training (Sec. 3.2)."""
    letterbox, source = steps.teacher_letterbox, steps.picture.size
    thumb = thumbnail(steps.picture, *place)
    picture_key = [(None, size_of(steps.picture, place))]
    if len(steps.boxes):
        picture_key.append((flat(GREEN), "looked at again"))
    raw = overlay(thumb, steps.raw, letterbox, own_max=True)
    clean = overlay(thumb, steps.clean, letterbox, own_max=True)
    count = int(np.sum(steps.sinks))
    hidden = count - len(centres(steps.sinks, letterbox, thumb.size)[0])
    words = "1 sink" if count == 1 else f"{count} sinks"
    if hidden:
        words += f" ({hidden} in the padding)"
    sink_key = [(mark("ring"), words) if count else (None, "no sinks")]
    tokens = "{} x {} image tokens".format(*letterbox.grid)
    removed_key = [(mark("cross"), "removed") if count else (None, "nothing to remove")]
    return [
        Panel("1  Picture", picture_key, with_boxes(thumb, steps.boxes, source)),
        Panel("2  Attention of the answer (Sec. 3.1)", [*sink_key, (None, tokens)],
              with_marks(raw, steps.sinks, letterbox, "ring")),
        Panel("3  Sinks removed (Eq. 1)", removed_key,
              with_marks(clean, steps.sinks, letterbox, "cross")),
        Panel("4  Labels (Eq. 2)", label_key(), overlay(thumb, steps.labels, letterbox)),
    ]


def student_panels(steps, place):
    """5 to 8: from the RPN's map to the crop, as in answering (Sec. 3.3 and 3.4)."""
    letterbox = steps.letterbox
    thumb = thumbnail(steps.picture, *place)
    above = map_over(steps.smoothed > steps.tau, letterbox, thumb.size, smooth=False)  # (H, W) bool
    regions = [letterbox.to_pixels(box) for box in steps.regions]
    found = "1 region" if len(regions) == 1 else f"{len(regions)} regions"
    title = CROP_TITLES[steps.mode] if steps.crops else "8  No crop"
    return [
        Panel("5  The RPN's map (Eq. 5)", [(ramp(), "0 to 1")],
              overlay(thumb, steps.rpn, letterbox)),
        Panel("6  Smoothed, cut at tau (Eq. 6)", [(flat(WHITE), f"above tau = {steps.tau:g}")],
              with_outline(overlay(thumb, steps.smoothed, letterbox), above, WHITE)),
        Panel("7  Regions (Eq. 7)", [(None, found)],
              with_boxes(thumb, regions, steps.picture.size)),
        crops_panel(title, steps.crops, place),
    ]


# ----------------------------------------------------------------------------------- sheets of maps

def contact_sheet(rows, columns):
    """Maps beside their pictures, one row a picture -> picture at most 1000 px wide.

    rows: dicts with picture, maps [((h, w) array, its letterbox)] and title; if known, sinks (h, w)
    bool, which are ringed on the first map, the raw attention, and crossed out on the second.
    columns: titles, the picture's first. A float map is drawn as heat up to its own maximum over
    the picture, an integer map as LABELS.
    """
    margin, gap, small, big = 20, 10, font(14), font(16)
    across = min(300, (1000 - 2 * margin + gap) // len(columns) - gap)
    shapes = [row["picture"].height / row["picture"].width for row in rows]
    heights = [math.ceil(across * min(1, max(0.45, shape))) for shape in shapes]
    key = sheet_key(rows)
    width = 2 * margin + len(columns) * (across + gap) - gap
    height = 54 + sum(heights) + 38 * len(rows) + 26 * bool(key)
    sheet = Image.new("RGB", (width, height), "white")
    pen, y = ImageDraw.Draw(sheet), 48
    for k, title in enumerate(columns):
        x = margin + k * (across + gap) + across / 2
        pen.text((x, 34), wrap(title, big, across)[0], INK, big, "ms")
    for row, down in zip(rows, heights):
        title = wrap(row["title"], small, width - 2 * margin)[0]
        pen.text((margin, y + 13), title, SOFT, small, "ls")
        for k, view in enumerate(row_views(row, across, down)[:len(columns)]):
            x = margin + k * (across + gap)
            pen.rectangle((x - 1, y + 21, x + across, y + 22 + down), PANEL, LINE)
            paste(sheet, view, x, y + 22, across, down)
        y += down + 38
    draw_key(sheet, margin, y, width - 2 * margin, key)
    return sheet


def sheet_key(rows):
    """What the colours and marks of a contact sheet mean, of those that it holds."""
    key = []
    if any(np.asarray(values).dtype.kind in "iu" for row in rows for values, _ in row["maps"]):
        key += label_key()
    if any(np.any(row["sinks"]) for row in rows if row.get("sinks") is not None):
        key += [(mark("ring"), "sink"), (mark("cross"), "sink, removed")]
    return key


def row_views(row, across, down):
    """A row of a contact sheet -> the picture and its maps, each at most across x down px."""
    thumb = thumbnail(row["picture"], across, down)
    views = [overlay(thumb, values, letterbox, own_max=True) for values, letterbox in row["maps"]]
    if row.get("sinks") is not None:
        letterbox = row["maps"][0][1]
        views[0] = with_marks(views[0], row["sinks"], letterbox, "ring")
        views[1] = with_marks(views[1], row["sinks"], letterbox, "cross")
    return [thumb, *views]


# ------------------------------------------------------------------------------------------- saving

QUALITY = {"JPEG": dict(quality=92, subsampling=0), "WEBP": dict(quality=92)}


def check_path(path, protect=None):
    """Whether save() may write here -> Pillow's name of the suffix's format. Raises BadInput.

    protect: a path that is never overwritten, such as the input's, by whatever name.
    """
    path = Path(path)
    form = Image.registered_extensions().get(path.suffix.lower())
    if form not in FORMATS:
        raise BadInput(f"{path}: no format of a picture that can be written; "
                       "end the name with .png, .jpg, .webp, .bmp, .gif or .tiff")
    if path.is_dir():
        raise BadInput(f"{path}: is a folder; name a file")
    real = os.path.realpath(path)  # without what leads there and back
    known = protect is not None and os.path.exists(real) and os.path.exists(protect)
    if known and os.path.samefile(real, protect):
        raise BadInput(f"{path}: is the input, which is never overwritten; name another file")
    return form


def save(picture, path, protect=None):
    """Write the picture in the format that the suffix of path says; its folder is made.

    Whole or not at all. Raises what check_path() does before anything is written, or OSError.
    """
    path = Path(path)
    form = check_path(path, protect)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda partial: picture.save(partial, form, **QUALITY.get(form, {})))

"""Pictures of what the model saw: beside an answer, step by step, and as a sheet of many samples.

    sheet = answer_picture(picture, letterbox, heat, crops, "What number?", {"plain": "6"})
    save(sheet, "out/star.png")

Takes RGB pictures (PIL) and numpy arrays, returns PIL pictures. All three are one panel_grid().
`letterbox` says how a map's grid lies over its picture (sdrpn.Letterbox). We use its picture_size,
grid, to_grid(), to_pixels() and cells_of(). Only the part of a map over the picture is drawn.

Colours: a map is blended over the picture in grey, so each colour depends on both. A swatch in a
key runs from black ground (top) to white ground (bottom): it holds every colour of its panel.
Text: Pillow's own font is drawn in ASCII; any other character becomes a question mark.
Shapes: a map is (h, w), one value per image token. Boxes are (x0, y0, x1, y1), half-open.
Left out: charts (tests/paper/plots.py), animations, other fonts.
"""
import os
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from clip import FORMATS, BadInput, printable
from data.files import write_file

INK, SOFT, LINE = (28, 32, 38), (96, 104, 114), (176, 182, 190)
GREEN, WHITE, DARK = (0, 184, 92), (255, 255, 255), (16, 16, 24)
MARGIN, GAP = 28, 20  # px
HIGH, THIN = 400, 32  # px: no view is higher than HIGH, no side of it shorter than THIN
RADIUS = 11           # px, of the mark on a sink
OPACITY = 0.6         # of a map over its picture
RAMP = [(10, 8, 40), (74, 16, 108), (158, 40, 104), (226, 84, 60), (250, 162, 40), (252, 244, 160)]
HEAT = Image.fromarray(np.uint8([RAMP])).resize((256, 1), Image.BILINEAR).tobytes()
LABELS = bytes([232, 232, 232, 20, 60, 150, *GREEN])  # like HEAT a palette: 3 bytes a level
LABEL_NAMES = ("ignored", "background", "foreground")  # labels -1, 0, 1


# --------------------------------------------------------------------------------------------- text

@lru_cache
def font(size):
    """Pillow's own font, `size` px high."""
    return ImageFont.load_default(size)


def wrap(text, face, width, most=1):
    """Break text into at most `most` lines of about `width` px; "..." marks a cut.

    >>> wrap("a café", font(16), 300)
    ['a caf?']
    """
    text = printable(" ".join(str(text)[:2000].split())).encode("ascii", "replace").decode()
    characters = 0.95 * width * len(text) / max(face.getlength(text), 1)
    return textwrap.wrap(text, max(int(characters), 4), max_lines=most, placeholder="...") or [""]


def write(text, size, colour, width, most=1):
    """Draw text on at most `most` lines; the picture is `width` px wide."""
    lines, step = wrap(text, font(size), width, most), round(1.4 * size)
    sheet = Image.new("RGB", (width, step * len(lines)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        pen.text((0, step * number + size), line, colour, font(size), "ls")
    return sheet


# ------------------------------------------------------------------------------ maps over a picture

def thumbnail(picture, width):
    """Scale a picture up or down to fit a panel of this width; a side below THIN px is stretched.

    >>> thumbnail(Image.new("RGB", (1000, 500)), 402).size
    (400, 200)
    >>> thumbnail(Image.new("RGB", (9, 900)), 402).size
    (32, 400)
    """
    scale = min((width - 2) / picture.width, min(width, HIGH) / picture.height)
    size = [max(THIN, round(side * scale)) for side in picture.size]
    return picture.resize(size, Image.LANCZOS, reducing_gap=3.0)


def picture_in_cells(letterbox):
    """The box of the whole picture, in cells of the grid: floats."""
    right, bottom = (letterbox.to_grid(letterbox.picture_size[axis], axis) for axis in (0, 1))
    return letterbox.to_grid(0, 0), letterbox.to_grid(0, 1), right, bottom


def resample(values, letterbox, size):
    """Resize the part of a map (h, w) over the picture to size (W, H) px; a picture of floats.

    Floats are interpolated between the centres of cells, integers and booleans are not.
    """
    method = Image.BILINEAR if values.dtype.kind == "f" else Image.NEAREST
    cells = Image.fromarray(values.astype(np.float32))
    return cells.resize(size, method, picture_in_cells(letterbox))


def blend(ground, levels, palette):
    """Blend levels (0 to 255) in the colours of a palette over the ground in grey."""
    colours = levels.convert("L")
    colours.putpalette(palette)
    return Image.blend(ground.convert("L").convert("RGB"), colours.convert("RGB"), OPACITY)


def swatch(levels, width, palette):
    """The colours of these levels as blend() makes them over black (top) to white (bottom)."""
    ground = Image.linear_gradient("L").resize((width, 14))
    return blend(ground, Image.fromarray(np.uint8([levels])).resize(ground.size), palette)


def draw_heat(thumb, values, letterbox, own_maximum=False):
    """Draw a map of floats over a thumbnail, from 0 to 1 or to its own maximum -> view, key.

    The maximum is taken over the picture, so a sink in the padding does not darken the view.
    """
    top, text = 1.0, "0 to 1"
    if own_maximum:
        top = values[letterbox.holds_picture()].max()
        text = f"0 to its maximum, {top:.2g}"
    levels = resample(255 * values / max(top, 1e-12), letterbox, thumb.size)
    return blend(thumb, levels, HEAT), [(swatch(range(256), 40, HEAT), text)]


def draw_labels(thumb, labels, letterbox):
    """Draw labels (h, w) in {-1, 0, 1} over a thumbnail -> view, key."""
    key = [(swatch([n], 14, LABELS), LABEL_NAMES[n]) for n in (2, 1, 0)]
    if labels.max() < 0:
        key = [(key[2][0], "all ignored: the attention is zero, too weak or too spread out")]
    return blend(thumb, resample(labels + 1, letterbox, thumb.size), LABELS), key


def draw_mark(view, x, y, radius, removed):
    """Draw a ring around (x, y), or a cross on it if removed: white with a dark edge."""
    pen = ImageDraw.Draw(view)
    for edge, ink in ((1, DARK), (0, WHITE)):
        reach = radius + edge
        x0, y0, x1, y1 = x - reach, y - reach, x + reach, y + reach
        if removed:
            pen.line((x0, y0, x1, y1), ink, 3 + 2 * edge)
            pen.line((x0, y1, x1, y0), ink, 3 + 2 * edge)
        else:
            pen.ellipse((x0, y0, x1, y1), outline=ink, width=2 + 2 * edge)


def mark_sinks(view, sinks, letterbox, removed):
    """Mark the sinks (h, w) bool that lie over the picture -> an entry of the key.

    A mark that would stick out is moved inwards, so that it is whole on a narrow picture too.
    """
    seen = sinks & letterbox.holds_picture().numpy()
    low, high = np.reshape(picture_in_cells(letterbox), (2, 2))
    centres = (np.argwhere(seen)[:, ::-1] + 0.5 - low) / (high - low) * view.size  # (sinks, 2)
    for x, y in np.clip(centres, RADIUS + 2, np.array(view.size) - RADIUS - 3):
        draw_mark(view, x, y, RADIUS, removed)
    sample = Image.new("RGB", (14, 14), RAMP[1])
    draw_mark(sample, 6.5, 6.5, 4, removed)
    text = f"{'removed' if removed else 'sinks'}: {sinks.sum()}"
    if sinks.sum() > seen.sum():
        text += f" ({sinks.sum() - seen.sum()} in padding)"
    return sample, text


def draw_outline(view, mask, colour):
    """Outline a mask ("L", 0 or 255) on the view, along the mask's inner edge."""
    for width, ink in ((3, colour), (1, DARK)):
        inner = ImageOps.expand(mask, width).filter(ImageFilter.MinFilter(2 * width + 1))
        view.paste(ink, mask=ImageChops.subtract(mask, ImageOps.crop(inner, width)))


def scale_box(box, source, view):
    """A box in px of the source picture -> in px of its view."""
    return tuple(round(at * view.size[k % 2] / source.size[k % 2]) for k, at in enumerate(box))


def draw_boxes(view, boxes, source):
    """Frame boxes in px of the source. The line runs around a box and hides nothing of it."""
    for box in boxes:
        x0, y0, x1, y1 = scale_box(box, source, view)
        mask = Image.new("L", view.size)
        ImageDraw.Draw(mask).rectangle((x0 - 3, y0 - 3, x1 + 2, y1 + 2), 255)
        draw_outline(view, mask, GREEN)


def pale(view):
    """The view in light grey."""
    return Image.blend(view.convert("L"), Image.new("L", view.size, 215), 0.7).convert("RGB")


# ------------------------------------------------------------------------------------------- panels

def join(pieces, gap, down):
    """Paste pictures on white, one below the other if `down`, else side by side."""
    widths, heights = zip(*(piece.size for piece in pieces))
    between = gap * (len(pieces) - 1)
    size = (max(widths), sum(heights) + between) if down else (sum(widths) + between, max(heights))
    sheet, at = Image.new("RGB", size, "white"), 0
    for piece in pieces:
        sheet.paste(piece, (0, at) if down else (at, 0))
        at += piece.size[down] + gap
    return sheet


def draw_panel(title, view, key, width):
    """A title, a view in a thin frame, and its key: pairs (swatch, text). Either may be None."""
    pieces = [write(title, 17, INK, width)]
    if view:
        pieces.append(ImageOps.expand(view, 1, LINE))
    for sample, text in key:
        line = write(text, 14, SOFT, width - 50, 3)
        pieces.append(join([sample, line], 6, down=False) if sample else line)
    return join(pieces, 4, down=True)


def panel_width(columns, whole):
    """The width in px of each of `columns` panels on a sheet of `whole` px."""
    return (whole - 2 * MARGIN + GAP) // columns - GAP


def panel_grid(rows, columns, width, texts):
    """Draw rows of panels, `width` px wide each, and texts below them.

    rows: [(heading, [panel, ...]), ...]; panels go on a new line after `columns` of them.
    texts: {label: text}.
    """
    pieces, whole = [], columns * (width + GAP) - GAP
    for heading, panels in rows:
        if heading:
            pieces.append(write(heading, 17, SOFT, whole))
        for start in range(0, len(panels), columns):
            pieces.append(join(panels[start:start + columns], GAP, down=False))
    for label, text in texts.items():
        lines = write(text.strip() or "(empty answer)", 20, INK, whole - 200, 4)
        pieces.append(join([write(label, 20, SOFT, 180), lines], GAP, down=False))
    return ImageOps.expand(join(pieces, GAP, down=True), MARGIN, "white")


def columns_for(picture, usual):
    """Half as many columns as usual for a panorama, which would be too low in them."""
    return usual // 2 if picture.width > 3 * picture.height else usual


def size_of(picture):
    """A picture's size, as an entry of a key."""
    return None, f"{picture.width} x {picture.height} px"


def crop_panels(title, picture, crops, width):
    """One panel per crop (box in source px, keep (h, w) bool). Tokens outside keep are greyed."""
    panels = []
    for box, keep in crops:
        view = thumbnail(picture.crop(box), width)
        h, w = keep.shape
        if not keep.all():
            mask = Image.fromarray(np.uint8(255 * keep)).resize(view.size, Image.NEAREST)
            view = Image.composite(view, pale(view), mask)
            draw_outline(view, mask, GREEN)
        key = [(None, f"{h} x {w} tokens, {keep.sum()} read")]
        panels.append(draw_panel(title, view, key, width))
    reason = [(None, "no region to crop: the plain answer stands")]
    return panels or [draw_panel(title, None, reason, width)]


def map_panels(titles, thumb, maps, sinks, width):
    """One panel per map, over a thumbnail.

    maps: [(array (h, w), its letterbox), ...]: the attention with its sinks and without, both drawn
    up to their own maximum, and then labels (integers) or probabilities (floats).
    """
    panels = []
    for k, (title, (values, letterbox)) in enumerate(zip(titles, maps)):
        if values.dtype.kind == "f":
            view, key = draw_heat(thumb, values, letterbox, own_maximum=k < 2)
        else:
            view, key = draw_labels(thumb, values, letterbox)
        if k < 2:
            key.append(mark_sinks(view, sinks, letterbox, removed=k == 1))
        panels.append(draw_panel(title, view, key, width))
    return panels


# ----------------------------------------------------------------------------------- three pictures

def answer_picture(picture, letterbox, heat, crops, question, answers):
    """Draw a question, its answers, and where the model looked; at most 1200 px wide.

    heat: the RPN's probabilities (h, w); None if it did not run. answers: {name: text}.
    crops: [(box in source px, keep)], keep (h, w) bool: which tokens of the crop's grid were read.
    """
    plain = heat is None and not crops
    columns = 1 if plain else columns_for(picture, max(3, 2 + len(crops)))
    width = panel_width(columns, 600 if plain else 1200)
    thumb = thumbnail(picture, width)
    framed = thumb.copy()
    draw_boxes(framed, [box for box, _ in crops], picture)
    panels = [draw_panel("Picture", framed, [size_of(picture)], width)]
    if heat is not None:
        panels.append(draw_panel("Where to look", *draw_heat(thumb, heat, letterbox), width))
    if not plain:
        panels += crop_panels("Crop", picture, crops, width)
    return panel_grid([("", panels)], columns, width, {"question": question, **answers})


@dataclass
class Steps:
    """All that SD-RPN computes on one question. Maps are arrays (h, w) over a letterbox's grid."""
    picture: Image.Image
    question: str
    # the teacher
    raw: np.ndarray        # attention from the response to the image, any scale
    clean: np.ndarray      # raw without the sinks
    labels: np.ndarray     # integers: 1 foreground, 0 background, -1 ignored
    sinks: np.ndarray      # bool: what Eq. 1 removes
    teacher_letterbox: object
    response: str          # its own answer, whose attention this is
    # the student
    letterbox: object
    rpn: np.ndarray        # probabilities
    smoothed: np.ndarray   # the same after Eq. 6's filter
    tau: float
    regions: list          # boxes in cells; empty: the plain answer stands
    crops: list            # [(box in source px, keep)] as in answer_picture()
    plain: str
    two_stage: str
    mode: str              # "mask" or "box"


TITLES = ("2  Attention of the answer (Sec. 3.1)", "3  Sinks removed (Eq. 1)", "4  Labels (Eq. 2)",
          "5  The RPN's map (Eq. 5)")
CROP_TITLES = {"mask": "8  Masked Upscaling (Eq. 8)", "box": "8  Box Upscaling (Eq. 7)"}


def explain_picture(steps):
    """Draw the method on one question in eight numbered steps; at most 1600 px wide.

    Steps 1 to 4 make the labels, as in training; 5 to 8 find the crop, as in answering.
    """
    columns = columns_for(steps.picture, max(4, 3 + len(steps.crops)))
    width = panel_width(columns, 1600)
    thumb, letterbox = thumbnail(steps.picture, width), steps.teacher_letterbox
    maps = [(values, letterbox) for values in (steps.raw, steps.clean, steps.labels)]
    maps.append((steps.rpn, steps.letterbox))
    panels = map_panels(TITLES, thumb, maps, steps.sinks, width)

    h, w = letterbox.grid
    tokens = f"{h} x {w} image tokens, {letterbox.holds_picture().sum()} on the picture"
    first = draw_panel("1  Picture", thumb, [size_of(steps.picture), (None, tokens)], width)
    rows = [("Training: the attention of the model's own answer becomes labels.",
             [first, *panels[:3]]),
            ("Answering: the RPN's map says where to look again.",
             [panels[3], *region_panels(steps, thumb, width),
              *crop_panels(CROP_TITLES[steps.mode], steps.picture, steps.crops, width)])]
    texts = {"question": steps.question, "plain answer": steps.plain}
    if steps.response.strip() != steps.plain.strip():
        texts["teacher's answer"] = steps.response
    return panel_grid(rows, columns, width, {**texts, "two-stage answer": steps.two_stage})


def region_panels(steps, thumb, width):
    """Steps 6 and 7: the cells above tau, and the regions that they form."""
    letterbox = steps.letterbox
    smoothed, key = draw_heat(thumb, steps.smoothed, letterbox)
    above = resample(255 * (steps.smoothed > steps.tau), letterbox, thumb.size)
    draw_outline(smoothed, above.convert("L"), WHITE)
    key.append((None, f"outlined: above tau = {steps.tau:g}"))

    regions = pale(thumb)
    for box, _ in steps.crops:
        place = scale_box(box, steps.picture, thumb)
        regions.paste(thumb.crop(place), place)
    draw_boxes(regions, [letterbox.to_pixels(box) for box in steps.regions], steps.picture)
    regions_key = [(Image.new("RGB", (14, 14), GREEN), f"regions: {len(steps.regions)}"),
                   (None, "in colour: what is cropped")]
    return [draw_panel("6  Smoothed, cut at tau (Eq. 6)", smoothed, key, width),
            draw_panel("7  Regions (Eq. 7)", regions, regions_key, width)]


def contact_sheet(rows, columns):
    """Draw pictures and their maps, one row per picture; at most 1200 px wide.

    rows: dicts of picture, maps and sinks as in map_panels(), and title, the row's heading. It
    should say whose answer it holds: "What number is it?  model's own answer: 6".
    columns: the panels' titles, beginning with the picture's.
    """
    width, lines = panel_width(len(columns), 1200), []
    for row in rows:
        thumb = thumbnail(row["picture"], width)
        first = draw_panel(columns[0], thumb, [size_of(row["picture"])], width)
        panels = map_panels(columns[1:], thumb, row["maps"], row["sinks"], width)
        lines.append((row["title"], [first, *panels]))
    return panel_grid(lines, len(columns), width, {})


# ------------------------------------------------------------------------------------------- saving

def check_path(path, protect=None):
    """Return Pillow's name of the format that the path's suffix asks for.

    Raises BadInput if there is none, or if path is `protect`, the input picture.
    """
    form = Image.registered_extensions().get(Path(path).suffix.lower())
    if form not in FORMATS:
        raise BadInput(f"{path}: pictures are written as .png, .jpg, .webp, .bmp, .gif or .tiff")
    if protect is not None and os.path.realpath(path) == os.path.realpath(protect):
        raise BadInput(f"{path}: this is the input picture; save under another name")
    return form


def save(picture, path):
    """Write the picture whole or not at all, in the format of path's suffix. Makes its folder."""
    path, form = Path(path), check_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda partial: picture.save(partial, form, quality=92))

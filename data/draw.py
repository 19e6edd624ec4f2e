"""Pictures of what the model saw: evidence beside answers, sheets of maps, plots.

Used by the scripts that train, evaluate and answer. Plain arrays and PIL images in, PIL images out.

Geometry. A map is g x g and covers the square canvas the vision encoder sees: the picture of w x h pixels is
centred on a canvas of side L = max(w, h), at offset floor((L-w)/2), floor((L-h)/2). Cell (row r, column c) is
the canvas from (c, r) * L/g to (c+1, r+1) * L/g. Only the part that lies over the picture is drawn.

Left out: other file types, log axes, error bars. Type is Pillow's built-in font, which holds little beyond
ASCII: accents are dropped, and scripts it lacks appear as empty boxes.
"""
import math
import unicodedata
from bisect import bisect_right
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageFont import load_default as font  # font(size in px)

INK, SOFT, LINE, GRID, PANEL = (28, 32, 38), (110, 118, 128), (214, 218, 223), (232, 235, 238), (246, 247, 249)
GREEN = (0, 184, 92)  # the accent: boxes, foreground, bars
SERIES = [(0, 150, 90), (0, 104, 178), (214, 92, 0), (150, 80, 160), (120, 124, 130), (214, 160, 0)]
RAMP = np.array([(10, 8, 40), (74, 16, 108), (158, 40, 104), (226, 84, 60), (250, 162, 40), (252, 244, 160)])
LABELS = [("ignored", (220, 220, 220), 0.4), ("background", (50, 86, 150), 0.6), ("foreground", GREEN, 0.75)]  # -1, 0, 1
SPELL = str.maketrans({"×": "x", "–": "-", "—": "-", "−": "-", "→": "->", "≤": "<=", "≥": ">=", "ß": "ss"})

def wrap(text, face, width, most=1):
    """text -> at most `most` lines, none wider than width px in the font `face`; an ellipsis marks a cut. Accents,
    control characters and lone surrogates are dropped, and so is all beyond 2000 characters."""
    text = unicodedata.normalize("NFKD", str(text).translate(SPELL))[:2000]
    text = "".join(c if c.isprintable() else " " for c in text if not unicodedata.combining(c))
    text, lines = " ".join(text.split()), []
    while text and len(lines) < most:
        n = bisect_right(range(1, len(text) + 1), width, key=lambda k: face.getlength(text[:k]))  # this many fit
        n = n if n == len(text) else max(text.rfind(" ", 0, n + 1), 0) or max(n, 1)
        lines, text = lines + [text[:n]], text[n:].lstrip()
    while text and lines[-1] and face.getlength(lines[-1] + "…") > width:
        lines[-1] = lines[-1][:-1]
    return lines[:-1] + [lines[-1] + "…" * bool(text)] if lines else [""]

def heat_colour(values):
    """values (h, w) in [0, 1] -> (h, w, 3) uint8: dark violet through red to pale yellow, lightness rising."""
    values, at = np.nan_to_num(np.asarray(values, float)), np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(values, at, RAMP[:, k]) for k in range(3)], -1).round().astype(np.uint8)

def map_over(grid, source, size, smooth):
    """The part of a (g, g) map over a picture of source = (w, h) px, resampled to size = (W, H) px -> (H, W).
    smooth: linear between the centres of the cells; otherwise each pixel takes the value of its cell."""
    grid, g, long = np.asarray(grid), len(grid), max(source)
    x, y = (((np.arange(size[k]) + 0.5) * source[k] / size[k] + (long - source[k]) // 2) * g / long for k in (0, 1))
    if not smooth:
        return grid[np.clip(y.astype(int), 0, g - 1)[:, None], np.clip(x.astype(int), 0, g - 1)]
    wide = np.stack([np.interp(x, np.arange(g) + 0.5, row) for row in np.nan_to_num(grid.astype(float))])  # (g, W)
    return np.stack([np.interp(y, np.arange(g) + 0.5, column) for column in wide.T], 1)

def overlay(thumb, grid, source, own_max=False):
    """thumb, of a picture of source = (w, h) px, in grey under a (g, g) map: integers as LABELS, floats as heat
    in [0, 1] (own_max: first divided by the largest value over the picture)."""
    grey, whole = np.asarray(thumb.convert("L"), float)[..., None], np.asarray(grid).dtype.kind in "iub"
    values = map_over(grid, source, thumb.size, smooth=not whole)
    if whole:
        colour, alpha = np.array([c for _, c, _ in LABELS])[values + 1], np.array([[a] for *_, a in LABELS])[values + 1]
    else:
        heat = np.clip(values / max(values.max(), 1e-12) if own_max else values, 0, 1)
        grey, colour, alpha = grey * 0.85, heat_colour(heat), 0.45 + 0.35 * heat[..., None]
    return Image.fromarray((grey * (1 - alpha) + colour * alpha).astype(np.uint8))

def thumbnail(image, width, height):
    """image as RGB, scaled (up or down) to fit width x height px; aspect kept, no side under 1 px."""
    scale = min(width / image.width, height / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)

def paste(sheet, picture, x, y, width, height):
    """picture, fitted to and centred in the panel of width x height px whose top left corner is (x, y)."""
    picture = thumbnail(picture, width, height)
    ImageDraw.Draw(sheet).rectangle((x - 1, y - 1, x + width, y + height), PANEL, LINE)
    sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))

def with_boxes(thumb, boxes, source):
    """A copy of thumb with the boxes (x0, y0, x1, y1), in px of the source, outlined in green."""
    thumb, scale, last = thumb.copy(), np.divide(thumb.size, source), np.array(thumb.size) - 1
    for box in boxes:
        corners = np.sort(np.reshape(box, (2, 2)), 0) * scale + [[-2, -2], [2, 2]]  # around it, so never too small
        ImageDraw.Draw(thumb).rectangle(tuple(np.clip(corners, 0, last).ravel()), outline=GREEN, width=3)
    return thumb

def answer_picture(image, heat, boxes, crops, question, answers):
    """A question, its answers and what the model looked at -> picture 1200 px wide.
    image: PIL source. heat: (g, g) in [0, 1], or None in plain mode. boxes: [(x0, y0, x1, y1)] in px of the
    source. crops: [PIL], the first four are shown. answers: dict label -> text."""
    margin, gap, side, top, small, big = 28, 22, 366, 58, font(16), font(21)
    tall = math.ceil(min(460, max(220, side * image.height / image.width)))
    labels = [wrap(label, small, 220)[0] for label in ("question", *answers)]
    indent = margin + gap + max(small.getlength(label) for label in labels)
    texts = [wrap(text, big, 1200 - margin - indent, 4) for text in (question, *answers.values())]
    out = Image.new("RGB", (1200, top + tall + 44 + sum(29 * len(lines) + 13 for lines in texts)), "white")
    draw, thumb, blank = ImageDraw.Draw(out), thumbnail(image, side, tall), Image.new("RGB", (side, tall), PANEL)
    maps = [] if heat is None else [overlay(thumb, np.asarray(heat, float), image.size)]
    for k, (title, pictures) in enumerate([
            (f"picture, {image.width} x {image.height} px", [with_boxes(thumb, boxes, image.size)]),
            ("where to look, 0 to 1" if maps else "no map", maps),
            (f"crops: {len(crops)}" + ", the first 4" * (len(crops) > 4), crops[:4])]):
        x, each = margin + k * (side + gap), (tall + 8) // max(1, len(pictures)) - 8
        draw.text((x, margin), title, INK, small)
        for j, picture in enumerate(pictures or [blank]):
            paste(out, picture, x, top + j * (each + 8), side, each)
    if maps:  # the ramp, at the right end of its title
        ramp = heat_colour(np.tile(np.linspace(0, 1, 80), (10, 1)))
        out.paste(Image.fromarray(ramp), (margin + 2 * side + gap - 80, margin + 5))
    y = top + tall + 44
    for label, lines in zip(labels, texts):
        draw.text((margin, y), label, SOFT, small, "ls")
        for j, line in enumerate(lines):
            draw.text((indent, y + 29 * j), line, INK, big, "ls")
        y += 29 * len(lines) + 13
    return out

def contact_sheet(rows, columns):
    """Maps beside their pictures, one row a picture -> picture at most 1000 px wide.
    rows: list of dict(image=PIL, maps=[(g, g) arrays], title=str). columns: titles, columns[0] the picture's.
    A float map is drawn as heat, scaled to its largest value over the picture; an integer map as LABELS."""
    margin, gap, n, small = 20, 10, len(columns), font(14)
    cell = min(300, (1000 - 2 * margin + gap) // n - gap)
    tall = [math.ceil(cell * min(1, max(0.45, r["image"].height / r["image"].width))) for r in rows]
    key = LABELS[::-1] if any(np.asarray(m).dtype.kind in "iub" for r in rows for m in r["maps"]) else ()
    out = Image.new("RGB", (n * (cell + gap) + 30, 54 + sum(tall) + 38 * len(rows) + 26 * bool(key)), "white")
    draw, y = ImageDraw.Draw(out), 48
    for k, title in enumerate(columns):
        draw.text((margin + k * (cell + gap) + cell / 2, 20), wrap(title, font(16), cell)[0], INK, font(16), "ma")
    for row, height in zip(rows, tall):
        thumb = thumbnail(row["image"], cell, height)
        draw.text((margin, y), wrap(row["title"], small, out.width - 2 * margin)[0], SOFT, small)
        maps = (overlay(thumb, grid, row["image"].size, own_max=True) for grid in row["maps"])
        for k, picture in zip(range(n), (thumb, *maps)):
            paste(out, picture, margin + k * (cell + gap), y + 22, cell, height)
        y += height + 38
    for x, (name, tint, alpha) in zip(range(margin, 1000, 130), key):  # the colours as they are over mid grey
        draw.rectangle((x, y + 2, x + 14, y + 14), tuple(round(c * alpha + 128 * (1 - alpha)) for c in tint))
        draw.text((x + 21, y), name, INK, small)
    return out

def ticks(low, high, most):
    """Round numbers, 1, 2 or 5 times a power of ten apart, in [low, high] -> list of (value, text)."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / most * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    form = f",.{digits}f" if digits <= 4 and max(abs(low), abs(high)) < 1e6 else ".3g"
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(k * step, f"{k * step:{form}}") for k in range(first, last + 1)]

def padded(values, share):
    """(low, high) of the values, widened on both sides by a share of the span; never empty."""
    low, high = min(values, default=0), max(values, default=1)
    room = (high - low) * share or abs(high) * 0.1 or 1
    return low - room, high + room

def axes(xs, ys, xlabel, ylabel, title, names=()):
    """An empty chart at twice its size, for the ranges xs, ys -> image, its ImageDraw, x -> px, y -> px."""
    out, face = Image.new("RGB", (1800, 1120), "white"), font(30)
    draw, left, right, bottom, x, y = ImageDraw.Draw(out), 160, 1744, 980, 160, 108
    draw.text((left, 40), wrap(title, font(40), right - left)[0], INK, font(40))
    for k, name in enumerate(wrap(name, face, 700)[0] for name in names):
        if x + face.getlength(name) + 60 > right:
            x, y = left, y + 44
        draw.rounded_rectangle((x, y + 10, x + 40, y + 24), 7, SERIES[k % len(SERIES)])
        draw.text((x + 54, y), name, INK, face)
        x += 100 + face.getlength(name)
    top = y + (124 if names else 70)
    px = lambda v: left + (v - xs[0]) / (xs[1] - xs[0]) * (right - left)
    py = lambda v: bottom - (v - ys[0]) / (ys[1] - ys[0]) * (bottom - top)
    for v, text in ticks(*ys, 7):
        draw.line((left, py(v), right, py(v)), GRID, 2)
        draw.text((left - 16, py(v)), text, SOFT, face, "rm")
    for v, text in ticks(*xs, 9):
        draw.line((px(v), bottom, px(v), bottom + 10), SOFT, 2)
        draw.text((px(v), bottom + 18), text, SOFT, face, "ma")
    draw.line((left, bottom, right, bottom), SOFT, 3)
    draw.text(((left + right) / 2, 1084), wrap(xlabel, face, right - left)[0], INK, face, "ms")
    draw.text((left, top - 26), wrap(ylabel, face, right - left)[0], INK, face, "ls")  # level, so easier to read
    return out, draw, px, py

def line_plot(series, xlabel, ylabel, title):
    """series: dict name -> list of (x, y) or (x, y, text), the text standing beside its point -> 900 x 560 picture.
    Points are joined in the order given; one that is not finite is left out."""
    series = {name: [p for p in points if math.isfinite(p[0] + p[1])] for name, points in series.items()}
    every, face, taken = [p for points in series.values() for p in points], font(27), []  # taken: boxes, in px
    xs, ys = padded([p[0] for p in every], 0.05), padded([p[1] for p in every], 0.08)
    out, draw, px, py = axes(xs, ys, xlabel, ylabel, title, list(series))
    for k, points in ((k, points) for k, points in enumerate(series.values()) if points):
        spots = [(px(p[0]), py(p[1])) for p in points]
        draw.line(spots, SERIES[k % len(SERIES)], 5, joint="curve")
        for x, y in spots if len(spots) <= 60 else ():  # beyond that markers are clutter
            taken.append((x - 11, y - 11, x + 11, y + 11))
            draw.ellipse(taken[-1], SERIES[k % len(SERIES)], "white", 3)
    for x, y, text in [(px(p[0]), py(p[1]), wrap(p[2], face, 420)[0]) for p in every if len(p) > 2]:
        for dx, dy, anchor in (-16, -14, "rs"), (16, 14, "la"), (16, -14, "ls"), (-16, 14, "ra"), (0, -20, "ms"):
            a, b, c, d = draw.textbbox((x + dx, y + dy), text, face, anchor)
            hits = sum(a < C and A < c and b < D and B < d for A, B, C, D in taken)
            if a > 160 and c < 1790 and d < 976 and not hits:  # the first free place around the point
                break
        taken.append((a, b, c, d))
        draw.text((x + dx, y + dy), text, INK, face, anchor, stroke_width=5, stroke_fill="white")
    return out.resize((900, 560), Image.Resampling.LANCZOS)

def bar_plot(edges, values, xlabel, ylabel, title, counts=None):
    """A histogram: edges (n + 1), rising; values (n); counts (n) stand above the bars -> 900 x 560 picture.
    A value that is not finite, such as the mean of an empty bin, draws no bar."""
    known, face = [0.0] + [v for v in values if math.isfinite(v)], font(26)
    xs, ys = (edges[0], edges[-1]), (min(known) * 1.08, (max(known) or 1.0) * 1.08)
    out, draw, px, py = axes(xs, ys, xlabel, ylabel, title)
    for k, value in ((k, v) for k, v in enumerate(values) if math.isfinite(v)):
        x0, x1, (y0, y1) = px(edges[k]), px(edges[k + 1]), sorted((py(0), py(value)))
        draw.rectangle((x0 + 2, y0, max(x0 + 2, x1 - 3), y1), GREEN)
        n = "" if counts is None else f"{counts[k]:,}" if counts[k] < 10000 else f"{counts[k] / 1000:,.0f}k"
        if face.getlength(n) < x1 - x0:  # a bar too narrow for its count goes without
            draw.text(((x0 + x1) / 2, y0 - 10), n, SOFT, face, "ms", stroke_width=4, stroke_fill="white")
    return out.resize((900, 560), Image.Resampling.LANCZOS)

def save(picture, path):
    """PNG at path, whose folder is made; written under another name first, so no half a file ever stands there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    try:
        picture.save(part, "PNG")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

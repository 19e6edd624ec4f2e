"""Charts: lines through points, and bars; 900 x 560 px, drawn at twice that and made smaller.

    chart = line_plot({"box": [(1.2, 71.0), (1.9, 75.5)]}, "seconds", "score, %", "Cost")

Left out: logarithmic axes, error bars.
"""
import math

from PIL import Image, ImageDraw

from data.draw import GREEN, INK, SOFT, font, wrap

GRID = (232, 235, 238)
SERIES = [(0, 150, 90), (0, 104, 178), (214, 92, 0), (150, 80, 160), (120, 124, 130), (214, 160, 0)]
LEFT, RIGHT, BOTTOM = 160, 1744, 980  # px of the 1800 x 1120 that are drawn: where the axes run


def ticks(low, high, most):
    """Round numbers in [low, high], 1, 2 or 5 times a power of ten apart -> list of (value, text).

    >>> [text for _, text in ticks(0, 1, 5)]
    ['0.0', '0.2', '0.4', '0.6', '0.8', '1.0']
    """
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= least * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    form = ".3g"
    if digits <= 4 and max(abs(low), abs(high)) < 1e6:
        form = f",.{digits}f"
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(k * step, f"{k * step:{form}}") for k in range(first, last + 1)]


def padded(values, share):
    """(low, high) of the values, widened on both sides by a share of the span; never empty.

    >>> padded([2, 4], 0.25), padded([3], 0.25), padded([], 0)
    ((1.5, 4.5), (2.7, 3.3), (-0.1, 1.1))
    """
    low, high = min(values, default=0), max(values, default=1)
    room = (high - low) * share
    if room == 0:
        room = abs(high) * 0.1
    if room == 0:
        room = 1
    return low - room, high + room


class Axes:
    """An empty chart for the ranges xs, ys; .pen draws on it, .x(value) and .y(value) are in px."""

    def __init__(self, xs, ys, xlabel, ylabel, title, names=()):
        self.sheet = Image.new("RGB", (1800, 1120), "white")
        self.pen, self.xs, self.ys = ImageDraw.Draw(self.sheet), xs, ys
        face, width = font(30), RIGHT - LEFT
        self.pen.text((LEFT, 40), wrap(title, font(40), width)[0], INK, font(40))
        self.top = self.legend(names) + 124 if names else 178
        for value, text in ticks(*ys, 7):
            self.pen.line((LEFT, self.y(value), RIGHT, self.y(value)), GRID, 2)
            self.pen.text((LEFT - 16, self.y(value)), text, SOFT, face, "rm")
        for value, text in ticks(*xs, 9):
            self.pen.line((self.x(value), BOTTOM, self.x(value), BOTTOM + 10), SOFT, 2)
            self.pen.text((self.x(value), BOTTOM + 18), text, SOFT, face, "ma")
        self.pen.line((LEFT, BOTTOM, RIGHT, BOTTOM), SOFT, 3)
        self.pen.text(((LEFT + RIGHT) / 2, 1084), wrap(xlabel, face, width)[0], INK, face, "ms")
        self.pen.text((LEFT, self.top - 26), wrap(ylabel, face, width)[0], INK, face, "ls")  # level

    def legend(self, names):
        """The names with their colours, as many to a line as fit -> the last line's y."""
        x, y, face = LEFT, 108, font(30)
        for k, name in enumerate(wrap(name, face, 700)[0] for name in names):
            if x + face.getlength(name) + 60 > RIGHT:
                x, y = LEFT, y + 44
            self.pen.rounded_rectangle((x, y + 10, x + 40, y + 24), 7, SERIES[k % len(SERIES)])
            self.pen.text((x + 54, y), name, INK, face)
            x += 100 + face.getlength(name)
        return y

    def x(self, value):
        return LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (RIGHT - LEFT)

    def y(self, value):
        return BOTTOM - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (BOTTOM - self.top)

    def picture(self):
        return self.sheet.resize((900, 560), Image.Resampling.LANCZOS)


def line_plot(series, xlabel, ylabel, title):
    """series: dict name -> list of (x, y) or (x, y, text to stand beside the point) -> picture.

    Points are joined in the order given; one that is not finite is left out.
    """
    finite = [[p for p in points if math.isfinite(p[0] + p[1])] for points in series.values()]
    every = [p for points in finite for p in points]
    axes = Axes(padded([p[0] for p in every], 0.05), padded([p[1] for p in every], 0.08),
                xlabel, ylabel, title, list(series))
    taken = []  # boxes in px that no text may cover
    for k, points in enumerate(finite):
        colour, spots = SERIES[k % len(SERIES)], [(axes.x(p[0]), axes.y(p[1])) for p in points]
        if spots:
            axes.pen.line(spots, colour, 5, joint="curve")
        if len(spots) > 60:  # beyond that markers are clutter
            continue
        for x, y in spots:
            taken.append((x - 11, y - 11, x + 11, y + 11))
            axes.pen.ellipse(taken[-1], colour, "white", 3)
    for point in every:
        if len(point) > 2:
            write_beside(axes.pen, axes.x(point[0]), axes.y(point[1]), point[2], taken)
    return axes.picture()


def write_beside(pen, x, y, text, taken):
    """Write at the first free place around the point (x, y), else at the last, and take it."""
    places = (-16, -14, "rs"), (16, 14, "la"), (16, -14, "ls"), (-16, 14, "ra"), (0, -20, "ms")
    face = font(27)
    text = wrap(text, face, 420)[0]
    for dx, dy, anchor in places:
        left, top, right, bottom = pen.textbbox((x + dx, y + dy), text, face, anchor)
        inside = left > LEFT and right < RIGHT + 46 and bottom < BOTTOM - 4
        hits = [left < c and a < right and top < d and b < bottom for a, b, c, d in taken]
        if inside and not any(hits):
            break
    taken.append((left, top, right, bottom))
    pen.text((x + dx, y + dy), text, INK, face, anchor, stroke_width=5, stroke_fill="white")


def bar_plot(edges, values, xlabel, ylabel, title, counts=None):
    """A histogram: edges (n + 1), rising; values (n); counts (n) stand above the bars -> picture.

    A value that is not finite, such as the mean of an empty bin, draws no bar.
    """
    known = [0.0] + [value for value in values if math.isfinite(value)]
    top = max(known) if max(known) > 0 else 1.0
    axes = Axes((edges[0], edges[-1]), (min(known) * 1.08, top * 1.08), xlabel, ylabel, title)
    face = font(26)
    for k, value in enumerate(values):
        if not math.isfinite(value):
            continue
        x0, x1 = axes.x(edges[k]), axes.x(edges[k + 1])
        y0, y1 = sorted((axes.y(0), axes.y(value)))
        axes.pen.rectangle((x0 + 2, y0, max(x0 + 2, x1 - 3), y1), GREEN)
        count = "" if counts is None else f"{counts[k]:,}"
        if counts is not None and counts[k] >= 10000:
            count = f"{counts[k] / 1000:,.0f}k"
        if face.getlength(count) < x1 - x0:  # a bar too narrow for its count goes without
            axes.pen.text(((x0 + x1) / 2, y0 - 10), count, SOFT, face, "ms",
                          stroke_width=4, stroke_fill="white")
    return axes.picture()

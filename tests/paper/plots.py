"""Line charts and bar charts, 900 x 560 px each.

    chart = line_plot({"box": [(1.2, 71.0, "tau 0.1"), (1.9, 75.5, "tau 0.2")]}, "seconds", "score, %", "Cost")

Left out: logarithmic axes, error bars.
"""
import math
import sys
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.draw import GREEN, INK, SOFT  # noqa: E402 (the project is on the path only now)

GRID = (232, 235, 238)
SERIES = [(0, 150, 90), (0, 104, 178), (214, 92, 0), (150, 80, 160), (120, 124, 130)]
WIDTH, HEIGHT = 1800, 1120  # charts are drawn at twice their size
LEFT, RIGHT, TOP, BOTTOM = 160, 1744, 190, 980  # where the axes run
SMALL, LARGE = ImageFont.load_default(28), ImageFont.load_default(40)


def ticks(low, high):
    """Up to 9 round numbers in [low, high].

    >>> ticks(0, 1), ticks(41.5, 69)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [45.0, 50.0, 55.0, 60.0, 65.0])
    """
    least = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= least)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(k * step, 9) for k in range(first, last + 1)]


def scale(low, high, start, end):
    """A function from values to pixels: low -> start, high -> end."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


class Axes:
    """An empty chart. `pen` draws on it; x() and y() turn values into pixels."""

    def __init__(self, xs, ys, xlabel, ylabel, title):
        self.sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
        self.x, self.y = scale(*xs, LEFT, RIGHT), scale(*ys, BOTTOM, TOP)
        self.pen = ImageDraw.Draw(self.sheet)
        self.pen.text((LEFT, 40), title, INK, LARGE)
        for value in ticks(*ys):
            self.pen.line((LEFT, self.y(value), RIGHT, self.y(value)), GRID, 2)
            self.pen.text((LEFT - 16, self.y(value)), f"{value:g}", SOFT, SMALL, "rm")
        for value in ticks(*xs):
            self.pen.line((self.x(value), BOTTOM, self.x(value), BOTTOM + 10), SOFT, 2)
            self.pen.text((self.x(value), BOTTOM + 18), f"{value:g}", SOFT, SMALL, "ma")
        self.pen.line((LEFT, BOTTOM, RIGHT, BOTTOM), SOFT, 3)
        self.pen.text(((LEFT + RIGHT) / 2, 1084), xlabel, INK, SMALL, "ms")
        self.pen.text((LEFT, TOP - 26), ylabel, INK, SMALL, "ls")

    def picture(self):
        return self.sheet.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.LANCZOS)


def padded(values):
    """The range of some values, a tenth wider; never empty."""
    room = (max(values) - min(values)) / 10 or abs(values[0]) / 10 or 1
    return min(values) - room, max(values) + room


def line_plot(series, xlabel, ylabel, title):
    """{name: [(x, y, label), ...]} -> a picture. Points are joined in the order given."""
    points = [point for line in series.values() for point in line]
    axes = Axes(padded([p[0] for p in points]), padded([p[1] for p in points]), xlabel, ylabel, title)
    taken = []
    right = RIGHT
    for name, line, colour in zip(series, series.values(), SERIES):
        axes.pen.text((right, 120), name, colour, SMALL, "ra")  # the legend
        right -= SMALL.getlength(name) + 40
        spots = [(axes.x(x), axes.y(y)) for x, y, _ in line]
        axes.pen.line(spots, colour, 5, joint="curve")
        for (x0, y0), (x1, y1) in pairwise(spots):
            for k in range(20):  # no label on a line either
                x, y = x0 + (x1 - x0) * k / 20, y0 + (y1 - y0) * k / 20
                taken.append((x, y, x, y))
        for x, y in spots:
            taken.append((x - 11, y - 11, x + 11, y + 11))
            axes.pen.ellipse(taken[-1], colour, "white", 3)
    for x, y, label in points:
        write_beside(axes.pen, axes.x(x), axes.y(y), label, taken)
    return axes.picture()


def write_beside(pen, x, y, text, taken):
    """Write at the nearest free place around (x, y) and add it to the boxes in `taken`."""
    for distance in range(26, 300, 8):
        for degrees in range(-90, 270, 30):
            dx, dy = distance * math.cos(math.radians(degrees)), distance * math.sin(math.radians(degrees))
            anchor = "lm" if dx > 1 else "rm" if dx < -1 else "mm"
            left, top, right, bottom = box = pen.textbbox((x + dx, y + dy), text, SMALL, anchor)
            inside = left > LEFT and right < RIGHT and top > TOP and bottom < BOTTOM
            if inside and not any(left < c and a < right and top < d and b < bottom for a, b, c, d in taken):
                taken.append(box)
                pen.text((x + dx, y + dy), text, INK, SMALL, anchor, stroke_width=4, stroke_fill="white")
                return


def bar_plots(parts, edges, xlabel, ylabel):
    """Histograms side by side on one scale: {title: (values, counts)}. The counts stand above the bars.

    A value that is NaN, the mean of an empty bin, draws no bar.
    """
    highest = max((v for values, _ in parts.values() for v in values if v == v), default=0)
    sheet = Image.new("RGB", (WIDTH // 2 * len(parts), HEIGHT // 2), "white")
    for n, (title, (values, counts)) in enumerate(parts.items()):
        axes = Axes((edges[0], edges[-1]), (0, 1.08 * highest or 1), xlabel, ylabel, title)
        for low, high, value, count in zip(edges, edges[1:], values, counts):
            if value == value:
                axes.pen.rectangle((axes.x(low) + 2, axes.y(value), axes.x(high) - 3, BOTTOM), GREEN)
                text = f"{count}" if count < 10000 else f"{count / 1000:.0f}k"
                axes.pen.text((axes.x(low / 2 + high / 2), axes.y(value) - 10), text, SOFT, SMALL, "ms")
        sheet.paste(axes.picture(), (n * WIDTH // 2, 0))
    return sheet


if __name__ == "__main__":
    print(__doc__)

"""Checks of data/draw.py: things stand where they should, odd input does not crash, files are whole."""
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import draw

GREEN = np.array(draw.GREEN)

def pixels(picture):
    return np.asarray(picture.convert("RGB")).astype(int)

def same(picture, colour, tolerance=6):
    """(H, W) bool: where the picture has the colour."""
    return (abs(pixels(picture) - np.array(colour)) <= tolerance).all(-1)

def test_map_over_takes_the_rows_or_columns_inside_the_padding():
    grid = np.arange(25).reshape(5, 5)  # one cell per pixel of the canvas; the offset is floor(3 / 2) = 1
    for smooth in (False, True):
        assert np.array_equal(draw.map_over(grid, (5, 2), (5, 2), smooth), grid[1:3])
        assert np.array_equal(draw.map_over(grid, (2, 5), (2, 5), smooth), grid[:, 1:3])
        assert np.array_equal(draw.map_over(grid, (5, 5), (5, 5), smooth), grid)
    assert np.array_equal(draw.map_over(grid, (5, 2), (10, 4), False), grid[1:3].repeat(2, 0).repeat(2, 1))

@pytest.mark.parametrize("size, cell, at", [
    ((400, 200), (1, 2), (0.625, 0.25)),  # canvas 400, offset (0, 100): the centre (250, 150) is (250, 50) of the picture
    ((200, 400), (2, 1), (0.25, 0.625)),
    ((400, 400), (1, 2), (0.625, 0.375))])
def test_heat_is_hottest_at_its_cell(size, cell, at):
    heat, image = np.zeros((4, 4)), Image.new("RGB", size)
    heat[cell] = 1
    out = pixels(draw.answer_picture(image, heat, [], [], "q", {}))[58:, 416:782].sum(-1)
    tall = min(460, max(220, round(366 * size[1] / size[0])))
    scale = min(366 / size[0], tall / size[1])
    left, top = (366 - size[0] * scale) / 2, (tall - size[1] * scale) / 2
    inside = out[round(top) + 1:round(top + size[1] * scale) - 1, round(left) + 1:round(left + size[0] * scale) - 1]
    y, x = np.unravel_index(inside.argmax(), inside.shape)
    assert abs(x - at[0] * size[0] * scale) < 4 and abs(y - at[1] * size[1] * scale) < 4

def test_a_sheet_scales_each_map_and_answers_do_not():
    thumb, faint = Image.new("RGB", (40, 40), "white"), np.eye(4) * 0.01

    def apart(own_max):  # the largest difference between a map and the same map a hundred times stronger
        one, other = (pixels(draw.overlay(thumb, grid, (40, 40), own_max)) for grid in (faint, faint * 100))
        return abs(one - other).max()
    assert apart(True) <= 1 and apart(False) > 50
    sink = faint.copy()
    sink[0, 0] = 1e6  # in the padding of a wide picture: it must not darken what is drawn
    wide = Image.new("RGB", (40, 10), "white")
    assert pixels(draw.overlay(wide, sink, (40, 10), True))[..., 0].max() > 180
    for broken in (np.zeros((4, 4)), np.full((4, 4), np.nan)):
        draw.overlay(thumb, broken, (40, 40), True)

def test_labels_have_three_colours_in_their_cells():
    labels = np.array([[-1, 0], [1, 1]], np.int8)
    out = pixels(draw.overlay(Image.new("RGB", (20, 20), (128, 128, 128)), labels, (20, 20)))
    ignored, background, foreground = out[5, 5], out[5, 15], out[15, 5]
    assert np.array_equal(out[15, 15], foreground) and np.array_equal(out[0, 0], out[9, 9])
    assert foreground.argmax() == 1 and background.argmax() == 2 and np.ptp(ignored) == 0
    row = dict(image=Image.new("RGB", (20, 20), (128, 128, 128)), maps=[labels], title="")
    sheet = draw.contact_sheet([row], ["picture", "labels"])
    for colour in (ignored, background, foreground):  # in the map and in the legend, at the foot
        assert same(sheet, colour, 1).sum() > 1000 and same(sheet, colour, 1)[-30:, :400].sum() > 100

def test_box_is_drawn_in_place_and_always_seen():
    white = Image.new("RGB", (732, 732), "white")  # shown at half size, its corner at (28, 58)
    out = draw.answer_picture(white, None, [(100, 200, 300, 260)], [], "q", {})
    y, x = np.nonzero(same(out, GREEN, 0))
    found, wanted = [x.min(), y.min(), x.max(), y.max()], [28 + 50, 58 + 100, 28 + 150, 58 + 130]
    assert np.abs(np.subtract(found, wanted)).max() <= 3
    for box in [(5, 5, 5, 5), (732, 732, 732, 732), (-9, -9, 999, 999), (300, 260, 100, 200)]:
        assert same(draw.answer_picture(white, None, [box], [], "q", {}), GREEN, 0).sum() >= 4

@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (4000, 3000), (3, 2)])
def test_extreme_sizes(size):
    image, g = Image.new("RGB", size, (200, 30, 30)), 6
    crops = [image.crop((0, 0, min(9, size[0]), min(9, size[1])))] * 6
    out = draw.answer_picture(image, np.ones((g, g)), [(0, 0, *size)], crops, "q", {"a": "b"})
    assert out.width == 1200 and out.height < 800
    sheet = draw.contact_sheet([dict(image=image, maps=[np.ones((g, g)), np.ones((g, g), int)], title="t")], ["a", "b", "c"])
    assert sheet.width <= 1000 and same(out, (200, 30, 30)).any() and same(sheet, (200, 30, 30)).any()

@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_modes(mode):
    draw.answer_picture(Image.new(mode, (9, 7)), None, [], [], "q", {})

@pytest.mark.parametrize("text", ["", "😀 👩‍👩‍👧", "שלום مرحبا", "漢字" * 300, "\ud83d\x00\r\n\t", "word " * 3000, "x" * 9000, "…" * 5000],
                         ids=["none", "emoji", "rtl", "wide", "control", "words", "one word", "dots"])
def test_any_text_is_drawn_within_its_lines(text):
    face = draw.font(21)
    lines = draw.wrap(text, face, 300, 3)
    assert 1 <= len(lines) <= 3 and max(face.getlength(line) for line in lines) <= 300
    assert len(text) < 500 or lines[-1].endswith("…")
    image = Image.new("RGB", (8, 8))
    assert draw.answer_picture(image, None, [], [], text, {text[:99]: text}).height < 1200
    draw.contact_sheet([dict(image=image, maps=[], title=text)], [text, text])
    draw.line_plot({text[:99]: [(0, 1, text)]}, text, text, text)

def test_wrapping_keeps_every_word():
    text = "how many people stand to the left of the red car in front of the café?"
    lines = draw.wrap(text, draw.font(20), 200, 9)
    assert len(lines) > 2 and " ".join(lines) == text.replace("é", "e")
    assert draw.wrap("a\x00\ud83d\n b – c", draw.font(20), 200) == ["a b - c"]

def test_heat_colour_grows_lighter():
    ramp = draw.heat_colour(np.linspace(0, 1, 50)[None])
    light = ramp[0] @ [0.3, 0.59, 0.11]
    assert ramp.shape == (1, 50, 3) and ramp.dtype == np.uint8 and (np.diff(light) > 0).all()
    assert np.array_equal(draw.heat_colour([[-1, 2, np.nan]])[0], ramp[0, [0, -1, 0]])

def test_six_rows_of_five_fit_a_page():
    rows = [dict(image=Image.new("RGB", (64, 48)), maps=[np.eye(4)] * 4, title="t")] * 6
    sheet = draw.contact_sheet(rows, ["picture", "raw attention", "after sink removal", "labels", "RPN map"])
    assert 950 <= sheet.width <= 1000 and sheet.height < 1300

def test_ticks_are_round_and_inside():
    assert [text for _, text in draw.ticks(0, 1, 5)] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    for low, high in [(-3, 1e4), (1e-7, 3e-7), (31.2, 63.9), (1e8, 3e9)]:
        values = [v for v, _ in draw.ticks(low, high, 7)]
        assert 2 <= len(values) <= 8 and min(values) >= low - 1e-9 and max(values) <= high * (1 + 1e-9)

def test_line_plot_places_points():
    out = draw.line_plot({"a": [(1, float("nan")), (0, 0), (float("inf"), 0), (10, 0)], "b": [(5, 1, "top")]}, "x", "y", "t")
    spots = (np.argwhere(same(out, colour, 3)[110:489]) for colour in draw.SERIES[:2])  # below the legend
    (a_top, a_left), (a_bottom, a_right), (b_top, b_left), (b_bottom, b_right) = (f(s, 0) for s in spots for f in (np.min, np.max))
    assert out.size == (900, 560) and a_right - a_left > 700 and b_right - b_left < 15
    assert abs(a_left + a_right - b_left - b_right) < 4 and a_top - b_bottom > 250  # y grows upwards
    for series in ({}, {"a": []}, {"a": [(3, 3)]}, {"a": [(i, i * i) for i in range(500)]}):
        assert draw.line_plot(series, "x", "y", "t").size == (900, 560)

def test_bars_have_the_height_of_their_values():
    out = draw.bar_plot([0, 1, 2, 4], [0.5, float("nan"), 1.0], "x", "y", "t", counts=[3, 0, 12345678])
    tall = same(out, GREEN, 3)[:489].sum(0)  # green px in each column
    first, none, last = tall[180], tall[380], tall[680]
    assert none == 0 and last > 300 and abs(first / last - 0.5) < 0.02
    assert draw.bar_plot([0, 1], [0], "x", "y", "t").size == (900, 560)

def test_save_leaves_a_whole_file_or_the_old_one(tmp_path):
    path, picture = tmp_path / "deep" / "er" / "a.png", Image.new("RGB", (4, 3), (1, 2, 3))
    draw.save(picture, path)
    assert Image.open(path).size == (4, 3) and [p.name for p in path.parent.iterdir()] == ["a.png"]

    class Broken:
        def save(self, part, kind):
            Path(part).write_bytes(b"half")
            raise OSError("disk full")
    with pytest.raises(OSError):
        draw.save(Broken(), path)
    assert Image.open(path).size == (4, 3) and [p.name for p in path.parent.iterdir()] == ["a.png"]

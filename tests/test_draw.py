"""Checks of data/draw.py and tests/plots.py: things stand where they should, odd input is drawn, files are whole."""
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plots
from clip import BadInput
from data import draw
from data.draw import DARK, GREEN, WHITE
from sdrpn import Letterbox


def array(picture):
    return np.asarray(picture.convert("RGB")).astype(int)


def same(picture, colour, tolerance=6):
    """(H, W) bool: where the picture has the colour."""
    return (abs(array(picture) - np.array(colour)) <= tolerance).all(-1)


def extent(mask):
    """(x0, y0, x1, y1) of the True pixels, inclusive."""
    y, x = np.nonzero(mask)
    return x.min(), y.min(), x.max(), y.max()


# ---------------------------------------------------------------------------------------------- maps

def test_map_over_takes_the_rows_or_columns_inside_the_padding():
    values = np.arange(25).reshape(5, 5)  # one cell per pixel of the square; the offset is floor(3 / 2) = 1
    for smooth in (False, True):
        assert np.array_equal(draw.map_over(values, Letterbox((5, 2), (5, 5)), (5, 2), smooth), values[1:3])
        assert np.array_equal(draw.map_over(values, Letterbox((2, 5), (5, 5)), (2, 5), smooth), values[:, 1:3])
        assert np.array_equal(draw.map_over(values, Letterbox((5, 5), (5, 5)), (5, 5), smooth), values)
    twice = draw.map_over(values, Letterbox((5, 2), (5, 5)), (10, 4), False)
    assert np.array_equal(twice, values[1:3].repeat(2, 0).repeat(2, 1))


def test_map_over_of_a_grid_that_is_not_square():
    values = np.arange(6).reshape(2, 3)  # 2 rows of 3 cells over the picture itself, no padding
    box = Letterbox((30, 20), (2, 3), (30, 20))
    assert np.array_equal(draw.map_over(values, box, (6, 4), False), values.repeat(2, 0).repeat(2, 1))
    assert np.array_equal(draw.map_over(values, box, (3, 2), True), values)  # at the centres of the cells


@pytest.mark.parametrize("size, frame, cell, at", [
    ((400, 200), None, (1, 2), (0.625, 0.25)),   # offset (0, 100): centre (250, 150) is (250, 50) of the picture
    ((200, 400), None, (2, 1), (0.25, 0.625)),
    ((400, 400), None, (1, 2), (0.625, 0.375)),
    ((400, 200), (400, 200), (1, 2), (0.625, 0.375))])
def test_heat_is_hottest_at_its_cell(size, frame, cell, at):
    heat = np.zeros((4, 4))
    heat[cell] = 1
    view = draw.overlay(Image.new("RGB", size), heat, Letterbox(size, (4, 4), frame))
    y, x = np.unravel_index(array(view).sum(-1).argmax(), size[::-1])
    assert abs(x - at[0] * size[0]) < 4 and abs(y - at[1] * size[1]) < 4


def test_heat_may_be_relative_to_its_own_maximum():
    thumb, faint, box = Image.new("RGB", (40, 40), "white"), np.eye(4) * 0.01, Letterbox((40, 40), (4, 4))

    def apart(own_max):  # the largest difference between a map and the same map a hundred times stronger
        one, other = (array(draw.overlay(thumb, values, box, own_max)) for values in (faint, faint * 100))
        return abs(one - other).max()
    assert apart(True) <= 1 and apart(False) > 50
    sink = faint.copy()
    sink[0, 0] = 1e6  # in the padding of a wide picture: it must not darken what is drawn
    wide = draw.overlay(Image.new("RGB", (40, 10), "white"), sink, Letterbox((40, 10), (4, 4)), True)
    assert array(wide)[..., 0].max() > 180
    for broken in (np.zeros((4, 4)), np.full((4, 4), np.nan)):
        draw.overlay(thumb, broken, box, True)


def test_heat_colour_grows_lighter():
    ramp = draw.heat_colour(np.linspace(0, 1, 50)[None])
    light = ramp[0] @ [0.3, 0.59, 0.11]
    assert ramp.shape == (1, 50, 3) and ramp.dtype == np.uint8 and (np.diff(light) > 0).all()
    assert np.array_equal(draw.heat_colour(np.array([[-1, 2]]))[0], ramp[0, [0, -1]])


def test_labels_have_three_colours_in_their_cells():
    labels, grey = np.array([[-1, 0], [1, 1]], np.int8), Image.new("RGB", (20, 20), (128, 128, 128))
    out = array(draw.overlay(grey, labels, Letterbox((20, 20), (2, 2))))
    ignored, background, foreground = out[5, 5], out[5, 15], out[15, 5]
    assert np.array_equal(out[15, 15], foreground) and np.array_equal(out[0, 0], out[9, 9])
    assert foreground.argmax() == 1 and background.argmax() == 2 and np.ptp(ignored) == 0
    row = dict(picture=grey, maps=[(labels, Letterbox((20, 20), (2, 2)))], title="")
    sheet = draw.contact_sheet([row], ["picture", "labels"])
    for colour in (ignored, background, foreground):  # in the map and in the key, at the foot
        assert same(sheet, colour, 1).sum() > 1000 and same(sheet, colour, 1)[-30:, :400].sum() > 100


def test_marks_stand_on_their_cells_and_not_in_the_padding():
    sinks = np.zeros((4, 4), bool)
    sinks[0, 0] = sinks[1, 2] = True  # of a picture 400 x 200 the first lies above it, the second at (250, 50)
    box = Letterbox((400, 200), (4, 4))
    spots, reach = draw.centres(sinks, box, (400, 200))
    assert spots == [[250, 50]] and reach == 50
    ring = draw.with_marks(Image.new("RGB", (400, 200), "blue"), sinks, box, "ring")
    x0, y0, x1, y1 = extent(same(ring, WHITE, 0))
    assert np.abs(np.subtract((x0, y0, x1, y1), (234, 34, 266, 66))).max() <= 1  # at most 16 px wide each way
    assert array(ring)[50, 250].tolist() == [0, 0, 255]  # what is ringed stays in view
    cross = draw.with_marks(Image.new("RGB", (400, 200), "blue"), sinks, box, "cross")
    assert same(cross, WHITE, 0)[50, 250] and extent(same(cross, WHITE, 0))[0] > 210
    low = np.zeros((3, 3), bool)
    low[1, 1] = True  # a strip one pixel high in the middle row of three: the mark is moved onto it
    assert draw.centres(low, Letterbox((90, 1), (3, 3)), (90, 32))[0] == [[45, 32]]  # its one row lies above the centre


# --------------------------------------------------------------------------------------------- sheets

def test_box_is_an_outline_in_its_place_and_always_seen():
    white = Image.new("RGB", (732, 732), "white")
    half = draw.with_boxes(white.resize((366, 366)), [(100, 200, 300, 260)], white.size)
    assert np.abs(np.subtract(extent(same(half, GREEN, 0)), (50, 100, 150, 130))).max() <= 3
    assert same(half, WHITE, 0)[103:128, 53:148].all()  # nothing of what it frames is hidden
    for box in [(5, 5, 5, 5), (732, 732, 732, 732), (-9, -9, 999, 999), (300, 260, 100, 200), (90, 90, 91, 91)]:
        out = draw.with_boxes(white.resize((366, 366)), [box], white.size)
        x0, y0, x1, y1 = extent(same(out, GREEN, 0))
        assert x1 - x0 >= 6 and y1 - y0 >= 6
    assert same(half, DARK, 0).any()  # its edge, so that it is seen on green as well


ALL = np.ones((2, 2), bool)  # a crop's tokens, of which none is left out


def masked(size=(300, 300)):
    """A red crop whose left half of 2 x 2 tokens is kept."""
    return Image.new("RGB", size, (200, 30, 30)), np.array([[True, False], [True, False]])


def test_masked_upscaling_shows_the_whole_crop_with_the_dropped_tokens_greyed():
    view = draw.crop_view(*masked(), 100, 100)
    assert view.size == (100, 100)
    assert same(view, (200, 30, 30))[10:90, 10:45].all()      # kept
    dropped = array(view)[10:90, 55:95]
    assert (np.ptp(dropped, -1) == 0).all() and dropped.min() > 120  # grey and pale
    assert same(view, GREEN, 0)[50].any()                     # the mask's outline
    crop, keep = masked()
    assert same(draw.crop_view(crop, keep | True, 100, 100), (200, 30, 30)).all()


def test_the_answer_picture_says_how_many_tokens_are_kept():
    picture = Image.new("RGB", (400, 400), "white")
    panel = draw.crops_panel("Crop", [masked()], (366, 366))
    assert panel.key == [(None, "2 of 4 tokens kept, the greyed are left out")]
    out = draw.answer_picture(picture, Letterbox((400, 400), (2, 2)), None, [], [masked()], "q", {})
    assert same(out, (200, 30, 30))[:, 800:].sum() > 366 * 366 * 0.4


@pytest.mark.parametrize("sizes, shown", [
    ([(300, 100)] * 2, 0.6), ([(100, 300)] * 2, 0.6), ([(200, 200)] * 4, 0.9), ([(300, 100)] * 3, 0.9),
    ([(200, 200)], 0.99), ([(300, 150)] * 5, 0.4)])
def test_several_crops_fill_their_panel(sizes, shown):
    view = draw.crops_view([(Image.new("RGB", size, (200, 30, 30)), ALL) for size in sizes], 366, 366)
    assert view.size == (366, 366) and same(view, (200, 30, 30)).mean() >= shown


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (4000, 3000), (3, 2), (20000, 300)])
def test_extreme_sizes(size):
    picture, box = Image.new("RGB", size, (200, 30, 30)), Letterbox(size, (6, 6))
    crops = [(picture.crop((0, 0, min(9, size[0]), min(9, size[1]))), ALL)] * 7
    out = draw.answer_picture(picture, box, np.ones((6, 6)), [(0, 0, *size)], crops, "q", {"a": "b"})
    assert out.width == 1200 and out.height < 1500
    plain = draw.answer_picture(picture, box, None, [], [], "q", {})
    x0, y0, x1, y1 = extent(same(plain, (200, 30, 30)))
    assert min(x1 - x0, y1 - y0) >= 30 and max(x1 - x0, y1 - y0) >= 360  # never a hairline
    row = dict(picture=picture, maps=[(np.ones((6, 6)), box), (np.ones((6, 6), int), box)], title="t")
    sheet = draw.contact_sheet([row], ["a", "b", "c"])
    assert sheet.width <= 1000 and same(sheet, (200, 30, 30)).any()


def test_a_long_picture_gets_the_width_of_the_sheet():
    assert draw.layout((5000, 300), 3, 3, 1144, 620) == (1, (1144, 100))
    assert draw.layout((400, 400), 3, 3, 1144, 620) == (3, (368, 368))
    columns, (across, down) = draw.layout((300, 5000), 3, 3, 1144, 620)
    assert columns == 3 and down > 1000


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_modes(mode):
    picture = Image.new(mode, (9, 7))
    draw.answer_picture(picture, Letterbox((9, 7), (2, 2)), None, [], [(picture, ALL)], "q", {})


def steps(size=(400, 200), grid=(4, 4), regions=((1, 1, 3, 2),), frame=None, **changes):
    """One question whose answer looks at the cells of the regions and at a sink in row -2."""
    picture, box = Image.new("RGB", size, (200, 200, 210)), Letterbox(size, grid, frame)
    clean, sinks = np.zeros(grid), np.zeros(grid, bool)
    for x0, y0, x1, y1 in regions:
        clean[y0:y1, x0:x1] = 0.5
    sinks[-2, 0] = True
    boxes = [box.to_pixels(region) for region in regions]
    given = dict(picture=picture, question="What?", teacher_letterbox=box, raw=clean + 5.0 * sinks, response="map",
                 letterbox=box, sinks=sinks, clean=clean, labels=(clean > 0).astype(int), rpn=clean,
                 smoothed=clean, tau=0.15,
                 regions=list(regions), boxes=boxes, crops=[(picture.crop(b), ALL) for b in boxes],
                 plain="map", two_stage="sun", mode="mask")
    return draw.Steps(**given | changes)


def test_explain_shows_every_step_with_its_equation():
    one = steps(crops=[masked()])
    teacher, student = draw.teacher_panels(one, (366, 183)), draw.student_panels(one, (366, 183))
    titles = [panel.title for panel in teacher + student]
    for number, (title, equation) in enumerate(zip(titles, ["", "Sec. 3.1", "Eq. 1", "Eq. 2", "Eq. 5", "Eq. 6",
                                                            "Eq. 7", "Eq. 8"], strict=True), 1):
        assert title.startswith(f"{number}  ") and equation in title
    assert draw.student_panels(steps(mode="box"), (366, 183))[-1].title == "8  Box Upscaling (Eq. 7)"
    assert titles[-1] == "8  Masked Upscaling (Eq. 8)"
    raw, clean = teacher[1].view, teacher[2].view
    assert same(raw, WHITE, 0).any() and same(clean, WHITE, 0).any()      # the sink, ringed and crossed out
    y, x = 46, 183                                                        # in the middle of the region
    assert array(raw)[y, x].sum() + 100 < array(clean)[y, x].sum()        # the sink had outshone it
    outline = same(student[1].view, WHITE, 0)                             # tau's contour, cells 1 to 3 of row 1
    assert np.abs(np.subtract(extent(outline), (92, 0, 274, 91))).max() <= 3


def test_the_teacher_may_have_a_grid_of_its_own():
    seen = steps(size=(400, 200), grid=(8, 8), regions=((4, 3, 6, 4),))  # cells of 50 px of a padded square
    one = steps(size=(400, 200), grid=(2, 4), regions=((2, 0, 3, 1),), frame=(400, 200), labels=seen.labels,
                raw=seen.raw, clean=seen.clean, sinks=seen.sinks, teacher_letterbox=seen.teacher_letterbox)
    labels = draw.teacher_panels(one, (400, 200))[3].view
    assert labels.size == (400, 200) and array(labels)[75, 250].argmax() == 1 and array(labels)[125, 250].argmax() == 2
    box = extent(same(draw.student_panels(one, (400, 200))[2].view, GREEN, 0))
    assert np.abs(np.subtract(box, (200, 0, 300, 100))).max() <= 4


def test_explain_counts_what_the_padding_hides():
    sinks = np.zeros((4, 4), bool)
    sinks[0, 1] = sinks[2, 0] = True  # the first lies above a wide picture
    key = draw.teacher_panels(steps(sinks=sinks), (366, 183))[1].key
    assert [text for _, text in key] == ["2 sinks (1 in the padding)", "4 x 4 image tokens"]
    none = draw.teacher_panels(steps(sinks=np.zeros((4, 4), bool)), (366, 183))
    assert none[1].key[0] == (None, "no sinks") and none[2].key == [(None, "nothing to remove")]


@pytest.mark.parametrize("case", [
    dict(regions=()), dict(size=(640, 480), grid=(3, 7), frame=(640, 480)),
    dict(size=(30, 3000), grid=(12, 12), regions=((5, 2, 7, 4),)),
    dict(size=(3000, 30), grid=(12, 12), regions=((2, 5, 4, 7), (9, 5, 11, 7))),
    dict(raw=np.zeros((4, 4)), response="", two_stage="漢字"),
    dict(labels=-np.ones((4, 4), int))],
    ids=["no region", "not square", "tall", "wide", "silent", "no label"])
def test_explain_any_question(case):
    sheet = draw.explain_picture(steps(**case))
    assert sheet.width == 1600 and 400 < sheet.height < 2500
    if case.get("regions") == ():
        assert draw.student_panels(steps(**case), (366, 183))[-1].key == [(None, "the plain answer stands")]


def test_the_contact_sheet_marks_sinks_and_their_removal():
    one = steps()
    maps = [(one.raw, one.letterbox), (one.clean, one.letterbox)]
    row = dict(picture=one.picture, maps=maps, title="t", sinks=one.sinks)
    views = draw.row_views(row, 180, 90)
    assert not same(views[0], WHITE, 0).any()
    for view in views[1:]:
        x0, y0, x1, y1 = extent(same(view, WHITE, 0))
        assert x1 < 50 and y0 > 40  # in the cell at the lower left
    marked, unmarked = (draw.contact_sheet([row | {"sinks": sinks}], ["a", "b", "c"]) for sinks in (one.sinks, None))
    assert marked.height == unmarked.height + 26  # the key


def test_six_rows_of_five_fit_a_page():
    picture, box = Image.new("RGB", (64, 48)), Letterbox((64, 48), (4, 4))
    row = dict(picture=picture, maps=[(np.eye(4), box)] * 4, title="t")
    sheet = draw.contact_sheet([row] * 6, ["picture", "raw attention", "after sink removal", "labels", "RPN map"])
    assert 950 <= sheet.width <= 1000 and sheet.height < 1300


# ----------------------------------------------------------------------------------------------- text

TEXTS = {"none": "", "emoji": "😀 👩‍👩‍👧", "rtl": "שלום مرحبا", "wide": "漢字" * 300, "control": "\ud83d\x00\r\n\t",
         "words": "word " * 3000, "one word": "x" * 9000, "dots": "…" * 5000, "joined": "क्षत्रिय",
         "bidi": "\u202eabc\u2066", "combining": "e\u0301\u0302"}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_any_text_is_drawn_within_its_lines(text):
    face = draw.font(21)
    lines = draw.wrap(text, face, 300, 3)
    assert 1 <= len(lines) <= 3 and max(face.getlength(line) for line in lines) <= 300
    assert len(text) < 500 or lines[-1].endswith("…")
    assert all(c == " " or draw.has_glyph(face, c) for line in lines for c in line)  # no empty boxes
    picture, box = Image.new("RGB", (8, 8)), Letterbox((8, 8), (2, 2))
    assert draw.answer_picture(picture, box, None, [], [], text, {text[:99]: text}).height < 1200


def test_any_text_is_drawn_on_sheets_and_charts():
    texts, picture = list(TEXTS.values()), Image.new("RGB", (8, 8))
    draw.contact_sheet([dict(picture=picture, maps=[], title=text) for text in texts], texts[:2])
    plots.line_plot({text[:99]: [(n, 1, text)] for n, text in enumerate(texts)}, *texts[:3])


def test_what_the_font_lacks_is_spelt_or_escaped():
    face = ImageFont.load_default(20)
    assert draw.readable("Größe → 5 €", face) == "Grosse -> 5 EUR"
    assert draw.readable("naïve cafe\u0301", face) == "naive cafe"
    assert draw.readable("中 x² ½ \ud83d 😀", face) == r"\u4e2d x\u00b2 \u00bd \ud83d \U0001f600"
    assert draw.readable("a\x1b[31m\x07b\u200b\u202ec", face) == "a [31m bc"
    assert len(draw.readable("中" * 10**6, face)) == 2000 * len(r"\u4e2d")


def test_wrapping_keeps_every_word():
    text = "how many people stand to the left of the red car in front of the café?"
    lines = draw.wrap(text, draw.font(20), 200, 9)
    assert len(lines) > 2 and " ".join(lines) == text.replace("é", "e")
    assert draw.wrap("a\x00\n b – c", draw.font(20), 200) == ["a b - c"]


def test_another_font_draws_what_it_holds(tmp_path):
    for path, content in ((tmp_path / "no.ttf", b"no font"), (tmp_path / "absent.ttf", None), (tmp_path, None)):
        if content:
            path.write_bytes(content)
        with pytest.raises(BadInput, match="no font that can be drawn with"):
            draw.use_font(path)
    own = tmp_path / "own.ttf"
    own.write_bytes(ImageFont.load_default(16).font_bytes)  # Pillow's own, as a file
    try:
        draw.use_font(own)
        assert draw.font(16).path == str(own) and draw.readable("a中", draw.font(16)) == r"a\u4e2d"
    finally:
        draw.use_font(None)
    assert draw.font(16).path != str(own)


# ---------------------------------------------------------------------------------------------- saving

@pytest.mark.parametrize("name, form", [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP"),
                                        ("a.bmp", "BMP"), ("a.gif", "GIF"), ("a.tif", "TIFF"), ("b.c.tiff", "TIFF")])
def test_save_writes_what_the_suffix_says(tmp_path, name, form):
    draw.save(Image.new("RGB", (40, 30), (10, 200, 30)), tmp_path / name)
    with Image.open(tmp_path / name) as back:
        assert back.format == form and back.size == (40, 30)
        assert same(back, (10, 200, 30), 12).all()


def test_save_refuses_before_anything_is_written(tmp_path):
    picture, source = Image.new("RGB", (4, 3)), tmp_path / "in.png"
    source.write_bytes(b"the input")
    (tmp_path / "soft.png").symlink_to(source)
    os.link(source, tmp_path / "hard.png")
    (tmp_path / "folder.png").mkdir()
    for name, message in (("a", "no format"), ("deep/a.pdf", "no format"), (".png", "no format"),
                          ("in.png", "is the input"), ("soft.png", "is the input"), ("hard.png", "is the input"),
                          ("x/../in.png", "is the input"), ("folder.png", "is a folder")):
        with pytest.raises(BadInput, match=message):
            draw.save(picture, tmp_path / name, protect=source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.png", "hard.png", "in.png", "soft.png"]
    assert source.read_bytes() == b"the input"


def test_save_leaves_a_whole_file_or_the_old_one(tmp_path):
    path, picture = tmp_path / "deep" / "er" / "a.png", Image.new("RGB", (4, 3), (1, 2, 3))
    draw.save(picture, path)
    assert Image.open(path).size == (4, 3) and [p.name for p in path.parent.iterdir()] == ["a.png"]

    class Broken:
        def save(self, file, form):
            file.write_bytes(b"half")
            raise OSError("disk full")
    with pytest.raises(OSError):
        draw.save(Broken(), path)
    assert Image.open(path).size == (4, 3) and [p.name for p in path.parent.iterdir()] == ["a.png"]
    draw.save(picture, path.with_name("x" * 251 + ".png"))  # as long as a name may be
    os.link(path, path.with_name("old.png"))
    draw.save(Image.new("RGB", (9, 9)), path)  # a new file takes the name, the old one is not written into
    assert Image.open(path).size == (9, 9) and Image.open(path.with_name("old.png")).size == (4, 3)


# ---------------------------------------------------------------------------------------------- charts

def test_ticks_are_round_and_inside():
    for low, high in [(-3, 1e4), (1e-7, 3e-7), (31.2, 63.9), (1e8, 3e9)]:
        values = [v for v, _ in plots.ticks(low, high, 7)]
        assert 2 <= len(values) <= 8 and min(values) >= low - 1e-9 and max(values) <= high * (1 + 1e-9)


def test_line_plot_places_points():
    series = {"a": [(1, float("nan")), (0, 0), (float("inf"), 0), (10, 0)], "b": [(5, 1, "top")]}
    out = plots.line_plot(series, "x", "y", "t")
    a, b = (same(out, colour, 3) for colour in plots.SERIES[:2])
    for mask in (a, b):
        mask[:110] = mask[489:] = False  # the legend and what lies below the axis
    (a_left, a_top, a_right, _), (b_left, _, b_right, b_bottom) = extent(a), extent(b)
    assert out.size == (900, 560) and a_right - a_left > 700 and b_right - b_left < 15
    assert abs(a_left + a_right - b_left - b_right) < 4 and a_top - b_bottom > 250  # y grows upwards
    for series in ({}, {"a": []}, {"a": [(3, 3)]}, {"a": [(i, i * i) for i in range(500)]}):
        assert plots.line_plot(series, "x", "y", "t").size == (900, 560)


def test_bars_have_the_height_of_their_values():
    out = plots.bar_plot([0, 1, 2, 4], [0.5, float("nan"), 1.0], "x", "y", "t", counts=[3, 0, 12345678])
    tall = same(out, GREEN, 3)[:489].sum(0)  # green px in each column
    first, none, last = tall[180], tall[380], tall[680]
    assert none == 0 and last > 300 and abs(first / last - 0.5) < 0.02
    assert plots.bar_plot([0, 1], [0], "x", "y", "t").size == (900, 560)

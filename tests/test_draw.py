"""Checks of data/draw.py: maps, marks and boxes stand in their places, the words are there, files are whole."""
import numpy as np
import pytest
from PIL import Image

from clip import BadInput
from data import draw
from data.draw import GREEN, WHITE
from sdrpn import Letterbox

RED = (200, 30, 30)


def array(picture):
    return np.asarray(picture).astype(int)


def same(picture, colour, tolerance=0):
    """(H, W) bool: where the picture has the colour."""
    return (abs(array(picture) - colour) <= tolerance).all(-1)


def extent(mask):
    """[x0, y0, x1, y1] of the True pixels, half-open."""
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])


@pytest.fixture
def words(monkeypatch):
    """All texts that are written, in order."""
    written, write = [], draw.write
    monkeypatch.setattr(draw, "write", lambda text, *how: written.append(text) or write(text, *how))
    return written


# ---- maps over a picture

def test_resample_takes_the_cells_over_the_picture():
    cells = np.arange(25).reshape(5, 5)  # one cell per pixel of the square; the offset is floor(3 / 2) = 1
    for values in (cells, cells.astype(float)):
        assert np.array_equal(draw.resample(values, Letterbox((5, 2), 5), (5, 2)), values[1:3])
        assert np.array_equal(draw.resample(values, Letterbox((2, 5), 5), (2, 5)), values[:, 1:3])


def test_a_map_says_its_scale_and_padding_does_not_set_it():
    thumb, box = Image.new("RGB", (40, 20), "white"), Letterbox((40, 20), 4)
    heat = np.zeros((4, 4))
    heat[1, 1], heat[0, 0] = 0.0123, 1e6  # the second lies in the padding
    own, own_key = draw.draw_heat(thumb, heat, box, own_maximum=True)
    shared, shared_key = draw.draw_heat(thumb, np.full((4, 4), 0.0123), box)
    assert own_key[0][1] == "0 to its maximum, 0.012" and array(own).max() > 240
    assert shared_key[0][1] == "0 to 1" and array(shared).max() < 140  # a faint map stays dark


def test_swatches_have_the_colours_that_are_drawn():
    ground = Image.linear_gradient("L").resize((28, 14))  # as a swatch has it, under two cells
    box = Letterbox((28, 14), (1, 2))
    for number, name in enumerate(draw.LABEL_NAMES, -1):
        view, key = draw.draw_labels(ground, np.array([[number, 1]]), box)
        sample, = [sample for sample, text in key if text == name]
        assert np.array_equal(array(view)[:, :14], array(sample))
    view, [(bar, _)] = draw.draw_heat(ground, np.ones((1, 2)), box)
    assert np.array_equal(array(view)[:, 0], array(bar)[:, -1])
    assert draw.draw_labels(ground, np.array([[-1, -1]]), box)[1][0][1].startswith("all ignored")


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("size, centre", [((400, 200), (250, 50)), ((32, 400), (18, 150))])  # the second is moved
def test_marks_are_whole_and_on_their_cells(size, centre, removed):
    sinks, view = np.zeros((4, 4), bool), Image.new("RGB", size, "blue")
    sinks[1, 2] = sinks[0, 0] = True
    _, text = draw.mark_sinks(view, sinks, Letterbox(size, 4), removed)
    x0, y0, x1, y1 = extent(same(view, WHITE))
    assert x1 - x0 == y1 - y0 > 20 and np.hypot(x0 + x1 - 2 * centre[0], y0 + y1 - 2 * centre[1]) < 4
    assert text == f"{'removed' if removed else 'sinks'}: 2 (1 in padding)"


@pytest.mark.parametrize("box", [(100, 200, 300, 260), (8, 8, 10, 10)])
def test_boxes_are_always_seen_and_hide_nothing(box):
    view = Image.new("RGB", (366, 366), "white")
    draw.draw_boxes(view, [box], Image.new("RGB", (732, 732)))
    half = [side // 2 for side in box]
    assert abs(extent(same(view, GREEN)) - half).max() <= 3 and same(view.crop(half), WHITE).all()


# ---- pictures

def steps(size=(400, 200), grid=(4, 4), **changes):
    """One question whose answer looks at two cells of row 1, and at a sink in row 2."""
    box, clean, sinks = Letterbox(size, grid), np.zeros(grid), np.zeros(grid, bool)
    clean[1, 1:3], sinks[2, 0] = 0.5, True
    crop = box.to_pixels((1, 1, 3, 2)), np.array([[True, False], [True, False]])
    given = dict(picture=Image.new("RGB", size, RED), question="What?", raw=clean + 5.0 * sinks, clean=clean,
                 labels=(clean > 0) * 1, sinks=sinks, teacher_letterbox=box, response="map", letterbox=box,
                 rpn=clean, smoothed=clean, tau=0.15, regions=[(1, 1, 3, 2)], crops=[crop], plain="map",
                 two_stage="sun", mode="mask")
    return draw.Steps(**given | changes)


def test_explain_shows_every_step_with_its_equation(words):
    draw.explain_picture(steps(two_stage=" "))
    for number, equation in enumerate(["", "Sec. 3.1", "Eq. 1", "Eq. 2", "Eq. 5", "Eq. 6", "Eq. 7", "Eq. 8"], 1):
        assert [text for text in words if text.startswith(f"{number}  ") and equation in text]
    assert {"4 x 4 image tokens, 8 on the picture", "0 to its maximum, 5", "sinks: 1", "regions: 1",
            "outlined: above tau = 0.15", "2 x 2 tokens, 2 read", "(empty answer)"} <= set(words)


def test_the_regions_panel_shows_tau_regions_and_the_crop(monkeypatch):
    monkeypatch.setattr(draw, "draw_panel", lambda title, view, *more: view)
    smoothed, regions = draw.region_panels(steps(regions=[(1, 1, 4, 2)]), Image.new("RGB", (400, 200), RED), 402)
    assert extent(same(smoothed, WHITE)).tolist() == [101, 1, 299, 99]  # inside a dark line of 1 px
    assert abs(extent(same(regions, GREEN)) - (100, 0, 400, 100)).max() <= 3
    assert abs(extent(same(regions, RED)) - (100, 0, 300, 100)).max() <= 3


@pytest.mark.parametrize("changes", [
    dict(crops=[], regions=[]), dict(size=(640, 480), grid=(3, 7), mode="box"), dict(size=(30, 3000)),
    dict(size=(5000, 1)), dict(question="漢字 " * 900)])
def test_any_question_is_drawn(changes, words):
    one = steps(**changes)
    sheet = draw.explain_picture(one)
    assert sheet.width <= 1600 and sheet.height < 2500
    assert ("no region to crop: the plain answer stands" in words) == (not one.crops)
    sheet = draw.answer_picture(one.picture, one.letterbox, one.rpn, one.crops, one.question, {"plain": "map"})
    assert sheet.width <= 1200 and same(sheet, RED, 6).sum() > 32 * 300  # never a hairline


def test_a_plain_answer_has_one_panel(words):
    draw.answer_picture(steps().picture, steps().letterbox, None, [], "What?", {"plain": ""})
    assert words == ["Picture", "400 x 200 px", "What?", "question", "(empty answer)", "plain"]


def test_a_white_picture_has_a_frame():
    panel = draw.draw_panel("", Image.new("RGB", (50, 40), "white"), [], 60)
    assert same(panel, draw.LINE).sum() == 2 * 52 + 2 * 40


def test_tokens_that_are_not_read_are_greyed():
    panel, = draw.crop_panels("Crop", steps().picture, steps().crops, 202)  # the left half is read
    left, right = panel.crop((9, 40, 95, 110)), panel.crop((110, 40, 190, 110))
    assert same(left, RED, 6).all() and np.ptp(array(right), -1).max() == 0


def test_the_contact_sheet_scales_probabilities_from_0_to_1(words):
    one = steps()
    maps = [(values, one.letterbox) for values in (one.raw, one.clean, one.labels, one.rpn)]
    row = dict(picture=one.picture, maps=maps, sinks=one.sinks, title="What? model's own answer: map")
    draw.contact_sheet([row] * 2, ["picture", "attention", "clean", "labels", "RPN"])
    for text in ("0 to its maximum, 5", "0 to its maximum, 0.5", "0 to 1", "sinks: 1", "removed: 1", row["title"]):
        assert words.count(text) == 2


@pytest.mark.parametrize("text", ["", "one café " * 3000, "x" * 9000, "\ud83d\x00\r\n\t", "e\u0301 漢字 \u202eabc"])
def test_any_text_is_wrapped(text):
    lines = draw.wrap(text, draw.font(20), 300, 3)
    assert len(lines) <= 3 and max(draw.font(20).getlength(line) for line in lines) <= 310
    assert all(" " <= c <= "~" for line in lines for c in line) and (len(text) < 500 or lines[-1].endswith("..."))


# ---- files

@pytest.mark.parametrize("name, form", [("a.png", "PNG"), ("a.JPG", "JPEG"), ("b.c.tiff", "TIFF")])
def test_save_writes_what_the_suffix_says(tmp_path, name, form):
    draw.save(Image.new("RGB", (40, 30), RED), tmp_path / "deep" / name)
    with Image.open(tmp_path / "deep" / name) as back:
        assert back.format == form and same(back, RED, 12).all()


def test_the_input_and_unknown_formats_are_refused(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "in.png")
    for name, message in (("a", "written as"), ("a.pdf", "written as"), ("in.png", "input"), ("link.png", "input")):
        with pytest.raises(BadInput, match=message):
            draw.check_path(tmp_path / name, protect=tmp_path / "in.png")

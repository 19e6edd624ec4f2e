"""The method step by step: examples to check by hand, and exactness where two roads must lead to one result.

    python -m pytest tests/test_method.py       # tiny models made from formulas; no network, no GPU
"""
import itertools
import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import sdrpn
import slow
from clip import BadInput, preprocess, preprocess_crop
from differ import load_golden
from formula import CASES, CONFIGS, NEW_TOKENS, picture, rpn_tensors, tensors
from model import LLaVA
from sdrpn import (RPN, Letterbox, Recipe, answer, assign_labels, conversation, find_regions, kept_cells, regions_above,
                   remove_sink_tokens, response_attention, roi_loss, smooth, teach, upscale)
from slow import regions_of

EOS = 2
HISTORY = (("What color is the car?", "dark blue"), ("And who is it?", "two red cups"))


@pytest.fixture
def decoded(monkeypatch):
    """Every call of LLaVA.decode, as (hidden state of the last prompt token, ids of the answers)."""
    calls, decode = [], LLaVA.decode

    def record(self, last_hidden, *args, **kwargs):
        calls.append((last_hidden.clone(), decode(self, last_hidden, *args, **kwargs)))
        return calls[-1][1]
    monkeypatch.setattr(LLaVA, "decode", record)
    return calls


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cells(drawing):
    """"#." is a foreground cell and an empty one; a row per line -> (h, w) bool."""
    return torch.tensor([[c == "#" for c in row] for row in drawing.split()])


# ---- labels (Eq. 1, Eq. 2) ------------------------------------------------------------------------------------------

def test_sinks_are_strictly_longer_than_the_threshold():
    hidden = torch.tensor([[3., 4.], [3., 4.0001], [0., 0.], [-30., 40.]])
    assert remove_sink_tokens(torch.tensor([.1, .2, .3, .4]), hidden, 5.).tolist() == pytest.approx([.1, 0, .3, 0])
    two = remove_sink_tokens(torch.ones(2, 4), torch.stack([hidden, 2 * hidden]), torch.tensor([[5.], [10.]]))
    assert two.tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]  # a batch, each with a threshold of its own


def above(x):
    return torch.nextafter(torch.tensor(x), torch.tensor(2.)).item()


def below(x):
    return torch.nextafter(torch.tensor(x), torch.tensor(0.)).item()


def test_labels_by_hand():
    """Both thresholds are inclusive, and so is the box, here rows 1-2 and columns 1-2."""
    roi_map = torch.tensor([[.1, 0., above(.1), 0., 0.],
                            [0., 1., 0., below(.2), .15],
                            [0., 0., .2, 0., .1],
                            [0., 0., 0., 0., 0.],
                            [below(.2), 0., 0., 0., 0.]])
    assert assign_labels(roi_map.flatten(), grid=5).view(5, 5).tolist() == [[0, 0, -1, 0, 0],
                                                                            [0, 1, -1, -1, -1],
                                                                            [0, -1, 1, 0, 0],
                                                                            [0, 0, 0, 0, 0],
                                                                            [-1, 0, 0, 0, 0]]


@pytest.mark.parametrize("corner, fraction, ignored", [
    ((1, 2), .5, False), ((1, 3), .5, True), ((1, 3), .51, False), ((3, 3), .5, True), ((3, 3), 1.01, False)])
def test_a_box_over_half_the_grid_teaches_nothing(corner, fraction, ignored):
    """Foreground at (0, 0) and at the corner of a 4 x 4 grid: a box of 6, 8 or 16 cells."""
    roi_map = torch.zeros(4, 4)
    roi_map[0, 0] = roi_map[corner] = .7
    labels = assign_labels(roi_map.flatten(), 4, max_box_fraction=fraction)
    assert (labels == 1).sum() == (0 if ignored else 2) and bool((labels == -1).all()) == ignored


@pytest.mark.parametrize("h, w", [(7, 7), (4, 9)])
def test_labels_of_a_batch_of_turns(h, w):
    """(b, n, N) at once, against plain loops over one map after the other."""
    maps = random(3, 4, h * w, seed=1).abs() ** 6
    maps[1, 2] = 0
    labels = assign_labels(maps, (h, w), tau_fg=.25, tau_bg=.01)
    assert labels.shape == maps.shape and labels.dtype == torch.int64
    for b, n in itertools.product(range(3), range(4)):
        a = {(y, x): maps[b, n, w * y + x].item() for y in range(h) for x in range(w)}
        peak = max(a.values())
        fg = [c for c in a if peak and a[c] >= .25 * peak]
        ys, xs = [y for y, _ in fg] or [0, h - 1], [x for _, x in fg] or [0, w - 1]
        inside = {(y, x) for y, x in a if min(ys) <= y <= max(ys) and min(xs) <= x <= max(xs)}
        want = {c: 1 if c in fg else 0 if c not in inside and a[c] <= .01 * peak else -1 for c in a}
        if len(inside) >= h * w / 2:
            want = dict.fromkeys(a, -1)
        assert labels[b, n].tolist() == list(want.values())
    assert {-1, 0, 1} == set(labels.flatten().tolist())  # the case has something of all
    assert 0 < (labels == -1).all(-1).sum() < 8


def test_a_removed_sink_is_background_outside_the_box_and_ignored_inside():
    roi_map = torch.tensor([.9, 0., 0., 0.,  0., 5., 0., 0.,  .0, 0., .6, 0.,  7., 0., 0., 0.])  # two sinks: 5 and 7
    hidden = torch.where(roi_map[:, None] > 1, 100., 1.).expand(16, 3)
    labels = assign_labels(remove_sink_tokens(roi_map, hidden, 50.), 4, max_box_fraction=.6)  # a box of 9 cells
    assert labels.view(4, 4).tolist() == [[1, -1, -1, 0], [-1, -1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 0]]


def test_further_rules_of_released_recipes():
    """A box grown by a cell, a least maximum, and padding (here the last row) that is background and no maximum."""
    roi_map = torch.tensor([[.5, 0., 0., 0.], [0., 0., 0., .05], [0., 0., 0., 0.], [.9, .9, .9, .9]]).flatten()
    on = torch.ones(4, 4, dtype=torch.bool)
    on[3] = False
    own = assign_labels(roi_map, 4, has_picture=on).view(4, 4)
    assert own.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    grown = assign_labels(roi_map, 4, has_picture=on, grow=1).view(4, 4)
    assert grown.tolist() == [[1, -1, 0, 0], [-1, -1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert (assign_labels(roi_map, 4, has_picture=on, min_peak=.5) == own.flatten()).all()
    assert (assign_labels(roi_map, 4, has_picture=on, min_peak=.51) == -1).all()
    assert (assign_labels(roi_map, 4, has_picture=on, grow=2) == -1).all()  # 9 cells of 16


# ---- loss (Alg. 1 line 18) ------------------------------------------------------------------------------------------

def loss_case():
    logits = (3 * random(5, 2, 16, seed=2)).requires_grad_()
    labels = torch.randint(-1, 2, logits.shape, generator=torch.Generator().manual_seed(3))
    labels[3] = -1  # a sample that teaches nothing
    return logits, labels


def test_loss_is_the_mean_over_labelled_tokens():
    logits, labels = loss_case()
    on = labels >= 0
    want = F.binary_cross_entropy_with_logits(logits[on], labels[on].float())
    got = roi_loss(logits, labels)
    assert got.shape == () and torch.allclose(got, want, rtol=1e-6)
    ours, theirs = torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0]
    assert torch.allclose(ours, theirs, atol=1e-8) and not ours[~on].any()


def test_micro_batches_add_up_to_the_whole_batch():
    logits, labels = loss_case()
    parts = [roi_loss(logits[i:i + 2], labels[i:i + 2], count=1) for i in (0, 2, 4)]
    whole, summed = roi_loss(logits, labels), sum(parts) / (labels >= 0).sum()
    assert torch.allclose(summed, whole, rtol=1e-6)
    ours, theirs = torch.autograd.grad(summed, logits)[0], torch.autograd.grad(whole, logits)[0]
    assert torch.allclose(ours, theirs, atol=1e-8)


def test_no_label_is_zero_and_still_has_a_gradient():
    logits = (50 * random(2, 1, 9)).requires_grad_()
    loss = roi_loss(logits, torch.full((2, 1, 9), -1))
    loss.backward()
    assert loss.item() == 0 and logits.grad.tolist() == torch.zeros(2, 1, 9).tolist()


# ---- regions (Eq. 6, Eq. 7) -----------------------------------------------------------------------------------------

def slow_smooth(p):
    """The Gaussian as loops in float64; index -1 is index 1, index g is index g - 2."""
    g, w = len(p), [math.exp(-.5), 1, math.exp(-.5)]

    def fold(i):
        return -i if i < 0 else 2 * (g - 1) - i if i >= g else i
    near = [(dy, dx, w[dy + 1] * w[dx + 1] / sum(w) ** 2) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return torch.tensor([[sum(v * p[fold(y + dy)][fold(x + dx)].item() for dy, dx, v in near) for x in range(g)]
                         for y in range(g)])


def test_smoothing():
    spot = torch.zeros(5, 5)
    spot[2, 2] = 1
    assert smooth(spot).sum() == pytest.approx(1)
    assert torch.allclose(smooth(spot)[1:4, 2], torch.tensor([.1238, .2042, .1238]), atol=1e-4)
    assert torch.allclose(smooth(spot)[1:4, 1], torch.tensor([.0751, .1238, .0751]), atol=1e-4)
    assert torch.allclose(smooth(torch.full((4, 6, 6), .3)), torch.tensor(.3))  # edges included
    maps = random(3, 2, 6, 6, seed=4).sigmoid()
    want = torch.stack([slow_smooth(p) for p in maps.flatten(0, 1)]).view(maps.shape)
    assert torch.allclose(smooth(maps), want, atol=1e-6)


@pytest.mark.parametrize("drawing, boxes, areas", [
    ("......  .#....  ......  ....#.  ......  ......", [], []),  # specks
    ("......  ......  ..##..  ......  ......  ......", [(1, 1, 4, 4)], [2]),  # both sides grow: s = (2+4-3)//2
    ("......  ......  ..#...  ..#...  ......  ......", [(1, 1, 4, 4)], [2]),
    ("......  ......  ..#...  ...#..  ......  ......", [(1, 1, 4, 4)], [2]),  # neighbours over the corner
    ("......  ......  ..#...  ..##..  ......  ......", [(1, 1, 4, 4)], [3]),
    ("......  ......  .###..  ......  ......  ......", [(1, 1, 4, 4)], [3]),  # only the short side grows
    ("......  .#....  ..#...  ...#..  ......  ......", [(1, 1, 4, 4)], [3]),  # neither
    ("##....  ......  ......  ......  ......  ......", [(0, 0, 2, 2)], [2]),  # clipped, not shifted
    ("......  ......  ......  ......  ......  ....##", [(3, 4, 6, 6)], [2]),
    ("......  ......  .##...  .##...  ......  ......", [(1, 2, 3, 4)], [4]),  # four cells stay as they are
    ("......  ......  .####.  ......  ......  ......", [(1, 2, 5, 3)], [4]),
    ("....##  ....##  ..#...  .#....  ......  ##..##",
     [(4, 0, 6, 2), (0, 1, 3, 4), (0, 4, 2, 6), (3, 4, 6, 6)], [4, 2, 2, 2]),
    ("....#.  ..##..  ......  #.....  .#.#..  ..#...", [(2, 0, 5, 2), (0, 3, 4, 6)], [3, 4]),
    (".##.#.  .##.#.  ....#.  #####.  ......  ......",  # by the first cell, not by the corner of the box
     [(1, 0, 3, 2), (0, 0, 5, 4)], [4, 8]),
    ("######  ######  ##....  ......  ......  ......", [(0, 0, 6, 3)], [14]),  # 225 * 36 / 576 is 14.06
    ("######  ######  ###...  ......  ......  ......", [], []),
    ("######  ######  ###...  ......  ......  ..##..", [(1, 4, 4, 6)], [2]),
    ("######  ######  ######  ######  ######  ######", [], []),
    ("....  ....  ..##  ....  ....  ....  ....  ....  ....", [(1, 1, 4, 4)], [2])])  # a grid need not be square
def test_regions_by_hand(drawing, boxes, areas):
    """Components of a map that needs no smoothing: sizes, the border, 8 neighbours, order. Cells stay as they are."""
    mask = cells(drawing)
    found = regions_above(mask.float(), .5)
    assert [r.box for r in found] == boxes and [int(r.cells.sum()) for r in found] == areas
    for r in found:
        x0, y0, x1, y1 = r.box
        assert r.cells[y0:y1, x0:x1].sum() == r.cells.sum() and not (r.cells & ~mask).any()
        assert r.weight == r.cells.sum()


def test_the_threshold_is_strict():
    p = torch.zeros(6, 6)
    p[1, 1] = p[4, 3] = p[4, 4] = .5
    assert regions_above(p, .5) == []
    assert [r.box for r in regions_above(p, .49)] == [(2, 3, 5, 6)]
    assert [r.box for r in regions_of(p)] == [(1, 1, 2, 2), (3, 4, 5, 5)]  # what tests make of a map: all of it


def slow_regions(p, threshold):
    """Neighbours take each other's smaller number until nothing changes -> [(box, cells)], count of too large ones."""
    g = len(p)
    number = {(y, x): g * y + x for y in range(g) for x in range(g) if p[y, x] > threshold}
    changed = True
    while changed:
        changed = False
        for (y, x), (v, u) in itertools.product(number, number):
            if abs(y - v) <= 1 and abs(x - u) <= 1 and number[v, u] < number[y, x]:
                number[y, x], changed = number[v, u], True
    found, too_large = [], 0
    for n in sorted(set(number.values())):  # the number is that of the first cell in raster order
        part = [c for c in number if number[c] == n]
        sides = []
        for side in zip(*part):
            low, high = min(side), max(side) + 1
            if len(part) < 4 and high - low < 3:
                low = math.floor((low + high - 3) / 2)
                low, high = max(low, 0), min(low + 3, g)
            sides.append((low, high))
        (y0, y1), (x0, x1) = sides
        too_large += 576 * len(part) > 225 * g * g
        if len(part) > 1 and 576 * len(part) <= 225 * g * g:
            found.append(((x0, y0, x1, y1), sorted(part)))
    return found, too_large


@pytest.mark.parametrize("tau, some, dropped", [(.08, 0, 4), (.15, 3, 1), (.3, 4, 0)])
def test_regions_of_random_maps(tau, some, dropped):
    counts = []
    for seed in range(4):
        logits = 4 * random(9, 9, seed=seed) - 4
        want, too_large = slow_regions(slow_smooth(logits.sigmoid()), tau)
        found = find_regions(logits, tau)
        assert [(r.box, [tuple(c) for c in r.cells.nonzero().tolist()]) for r in found] == want
        counts.append((len(found) > 0, too_large))
    assert sum(found for found, _ in counts) >= some and sum(n for _, n in counts) >= dropped


# ---- cells and pixels -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(100, 100), (157, 94), (61, 130), (1, 50), (50, 1), (640, 427), (3, 7), (4, 4)])
def test_boxes_in_pixels(size):
    """All boxes of a 6 x 6 grid in exact fractions: floor, ceil, cut to the picture, at least one pixel inside it."""
    side, lines = max(size), list(itertools.combinations(range(7), 2))
    for (x0, x1), (y0, y1) in itertools.product(lines, lines):
        want = []
        for length, low, high in (size[0], x0, x1), (size[1], y0, y1):
            pad = (side - length) // 2
            low = min(max(math.floor(Fraction(low * side, 6) - pad), 0), length)
            high = min(max(math.ceil(Fraction(high * side, 6) - pad), 0), length)
            if high == low:  # beside the picture: the pixel at its edge
                low, high = (length - 1, length) if low == length else (low, low + 1)
            want.append((low, high))
        (left, right), (top, bottom) = want
        assert Letterbox(size, 6).to_pixels((x0, y0, x1, y1)) == (left, top, right, bottom)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def overlaps(length, frame, count, low, high):
    """Does each of `count` cells of a frame around `length` pixels overlap pixels low..high-1? In exact fractions."""
    pad = (frame - length) // 2
    return [any(min(Fraction(i + 1, count) * frame, pad + p + 1) > max(Fraction(i, count) * frame, pad + p)
                for p in range(low, high)) for i in range(count)]


@pytest.mark.parametrize("size", [(100, 100), (157, 94), (200, 20), (7, 90), (50, 1), (4, 7)])
@pytest.mark.parametrize("grid", [3, 6, (6, 3), (5, 8)])
def test_cells_that_hold_a_part_of_the_picture_or_of_a_box(size, grid):
    h, w = (grid, grid) if type(grid) is int else grid
    frame = (max(size), max(size)) if h == w else size
    boxes = [(0, 0, *size), (size[0] // 3, size[1] // 4, size[0] // 2 + 1, size[1] // 2 + 1)]
    want = []
    for x0, y0, x1, y1 in boxes:
        across, down = overlaps(size[0], frame[0], w, x0, x1), overlaps(size[1], frame[1], h, y0, y1)
        want.append([[x and y for x in across] for y in down])
    letterbox = Letterbox(size, grid)
    assert letterbox.holds_picture().tolist() == want[0] and letterbox.cells_of(boxes[1:]).tolist() == want[1]
    assert torch.equal(letterbox.cells_of(boxes), letterbox.holds_picture()) and not letterbox.cells_of([]).any()


# ---- crops (Eq. 7, Eq. 8) -------------------------------------------------------------------------------------------

def crops_of(m, shot, regions, mode, most=2):
    crops = upscale(m, shot, Letterbox.of(m, shot), regions, mode, most)
    return crops, [crop.box for crop in crops]


def crop_features(m, shot, box):
    return m.project(m.features(preprocess_crop(shot, box, m.vision_tower.image_size)[None]))[0]  # (N, D)


@pytest.mark.parametrize("drawing, kept", [
    ("......  .###..  .#.#..  .###..  ......  ......", 32),  # 3 x 3 to 6 x 6: the hole loses the four cells above .5
    ("......  ......  ..##..  ......  ......  ......", 36),  # one row of two fills the crop
    ("......  ..#...  ...#..  ......  ......  ......", None),
    ("#.....  .#....  ..#...  ...#..  ....#.  .....#", 6),  # as large as the grid: copied
    (".....#  ....#.  ......  ......  ......  #.....", None)])
def test_masked_upscaling_keeps_the_features_under_the_mask(load, drawing, kept):
    """One crop around everything; the mask is stretched with it, by PIL here, and more than one half keeps a patch."""
    m, shot = load("grouped"), picture(157, 157, 1)
    mask = cells(drawing)
    ys, xs = [i.tolist() for i in mask.nonzero(as_tuple=True)]
    around = min(xs), min(ys), max(xs) + 1, max(ys) + 1
    stretched = Image.fromarray(mask.float().numpy()).crop(around).resize((6, 6), Image.BILINEAR)
    keep = torch.from_numpy(np.array(stretched)).flatten() > .5
    letterbox = Letterbox(shot.size, m.grid_of(shot))
    (crop,), boxes = crops_of(m, shot, regions_of(mask), "mask")
    assert boxes == [letterbox.to_pixels(around)]
    assert len(crop.tokens) == keep.sum() == (kept or keep.sum()) > 0
    assert torch.equal(crop.keep.flatten(), keep) and crop.keep.shape == (6, 6)
    assert torch.allclose(crop.tokens, crop_features(m, shot, boxes[0])[keep], atol=1e-5)


def test_the_mask_is_the_released_ones_and_keeps_all_where_it_would_keep_nothing():
    """Against torch's own bilinear resize, on boxes inside the picture and every size of a crop."""
    for seed, (side, n) in enumerate(itertools.product((1, 2, 3, 5, 8, 11), (4, 6, 12, 24))):
        mask = random(12, 12, seed=seed) > .3
        region = sdrpn.Region((1, 1, 1 + side, 1 + side), mask, 1.)
        want = F.interpolate(mask[None, None, 1:1 + side, 1:1 + side].float(), (n, n), mode="bilinear")[0, 0] > .5
        got = kept_cells(region, (n, n), Letterbox((96, 96), 12))
        assert torch.equal(got, want if want.any() else torch.ones_like(want)), (side, n)


def test_the_mask_is_sampled_where_the_crop_lies():
    """48 x 24 px on a 4 x 4 grid: rows 1 and 2 hold picture. A box of rows 0-2 is cut to these."""
    mask = cells("####  ####  #...  ....")
    keep = kept_cells(sdrpn.Region((0, 0, 4, 3), mask, 1.), (4, 4), Letterbox((48, 24), 4))
    assert keep.tolist() == cells("####  ####  #...  #...").tolist()


def test_box_upscaling_takes_the_heaviest_in_raster_order(load):
    m, shot = load("grouped"), picture(90, 90, 1)
    weights = torch.zeros(6, 6)
    weights[0, 0:2], weights[2, 3:6], weights[4:6, 0:2] = .6, .3, .2  # 1.2, .9 and .8, though areas are 2, 3 and 4
    found = regions_of(weights)
    boxes = [(0, 0, 30, 15), (45, 30, 90, 45), (0, 60, 30, 90)]
    for most, want in (1, boxes[:1]), (2, boxes[:2]), (5, boxes):
        crops, got = crops_of(m, shot, found, "box", most)
        assert got == want and [crop.tokens.shape for crop in crops] == [(36, 72)] * len(want)
        for crop, box in zip(crops, want):
            assert torch.allclose(crop.tokens, crop_features(m, shot, box), atol=1e-5)
    heavier = regions_of(weights * torch.tensor([1., 1, 1, 1, 9, 9])[:, None])  # now the last two
    assert crops_of(m, shot, heavier, "box")[1] == [boxes[0], boxes[2]]


# ---- teacher (Sec. 3.1, Alg. 1) -------------------------------------------------------------------------------------

@pytest.mark.parametrize("H, Hkv", [(6, 6), (6, 2), (4, 1)])
@pytest.mark.parametrize("softmax", ["image", "sequence"])
def test_response_attention_is_what_dense_attention_says(H, Hkv, softmax):
    """The whole attention matrix of prompt and response, causal, then its response rows and image columns."""
    d, prompt, m, columns = 8, 9, 4, slice(2, 7)
    q, k = 2 * random(H, prompt + m, d, seed=5), 2 * random(Hkv, prompt + m, d, seed=6)
    want = torch.zeros(H, 5)
    for h, row in itertools.product(range(H), range(prompt, prompt + m)):
        keys = k[h * Hkv // H].tolist()
        scores = [sum(a * b for a, b in zip(q[h, row].tolist(), key)) / math.sqrt(d) for key in keys]
        seen = range(prompt + m)[columns] if softmax == "image" else range(row + 1)
        total = sum(math.exp(scores[j]) for j in seen)
        want[h] += torch.tensor([math.exp(scores[j]) / total for j in range(prompt + m)[columns]]) / m
    got = response_attention(q[:, prompt:], k, columns, prompt, softmax)
    assert torch.allclose(got, want, atol=1e-6) and got.dtype == torch.float32
    wide = response_attention(q[:, prompt:].double(), k.double(), columns, prompt, softmax)
    assert wide.dtype == torch.float32


NO_SINK = {"kind": "norm", "c": 1e9}  # a rule that removes nothing


def recipe(attention, softmax="image", sink=NO_SINK, frozen=1):
    return Recipe(attention, frozen, 2, None, softmax, sink)


def lesson_of(m, name, **how):
    case = CASES[name]
    pixels = preprocess(picture(*case["picture"]), m.vision_tower.image_size)[None]
    return teach(m, recipe(**how), pixels, [m.prompt_ids(case["question"], case["history"])], NEW_TOKENS)


@pytest.mark.parametrize("softmax", ["image", "sequence"])
@pytest.mark.parametrize("name", CASES)
def test_teacher_maps_are_the_reference_librarys(load, monkeypatch, name, softmax):
    """Every layer and head, of the response rows that decoding left behind; and the pool of all, mean over pairs."""
    m, (want, notes) = load(CASES[name]["config"]), load_golden(name)
    seen = []

    def record(*args):
        seen.append(response_attention(*args))
        return seen[-1]
    monkeypatch.setattr(sdrpn, "response_attention", record)
    frozen = CASES[name]["rpn"][0]
    lesson = lesson_of(m, name, attention={n: None for n in range(m.depth)}, softmax=softmax, frozen=frozen)
    maps = want[f"attention.{softmax}"]
    assert torch.allclose(torch.stack(seen), maps, atol=2e-5)
    assert torch.allclose(lesson.raw[0], maps.flatten(0, 1).mean(0), atol=1e-5)
    assert torch.equal(lesson.raw, lesson.clean) and lesson.responses == [notes["text"].strip()]
    assert torch.allclose(lesson.hidden[0, want["rows"].long()], want[f"layer.{frozen - 1}"], atol=1e-4)
    columns = (want["input_ids"] == m.config.image_token).nonzero().flatten()
    assert (lesson.columns.start, lesson.columns.stop - 1) == (columns[0], columns[-1])
    assert lesson.hidden.shape[1] == len(want["input_ids"]) == lesson.rope.shape[1]


def between(values, share):
    """A threshold that values in float32 stay on one side of: halfway between two neighbours."""
    low, high = values.sort().values[int(share * len(values)):][:2].tolist()
    return (low + high) / 2


@pytest.mark.parametrize("name", CASES)
def test_recipe_heads_and_both_sink_criteria(load, name):
    """A few heads of two layers, not as many in each; sinks by hidden norm at the lowest of them, and by attention."""
    m, (want, _) = load(CASES[name]["config"]), load_golden(name)
    heads, maps = {2: [1], 1: [2, 0]}, want["attention.image"]
    raw = (maps[1, 0] + maps[1, 2] + maps[2, 1]) / 3
    norms = want["hidden_norm"][1]
    c = between(norms, .6) / norms.median().item()
    lesson = lesson_of(m, name, attention=heads, sink=dict(kind="norm", c=c))
    assert torch.allclose(lesson.raw[0], raw, atol=1e-5)
    clean = remove_sink_tokens(raw, norms[:, None], c * norms.median())
    assert torch.allclose(lesson.clean[0], clean, atol=1e-5) and 0 < (clean == 0).sum() < len(clean)

    ordinary = want["attention.sequence"]
    pool = torch.cat([ordinary[0], ordinary[2, [0, 2]]]).mean(0)  # the ordinary softmax, though the map has the paper's
    cut = between(pool, .5)
    sink = dict(kind="attention", attention={0: None, 2: [0, 2]}, threshold=cut * len(pool) / 576)
    lesson = lesson_of(m, name, attention=heads, sink=sink)
    clean = raw.masked_fill(pool >= cut, 0.)
    assert torch.allclose(lesson.clean[0], clean, atol=1e-5) and 0 < (clean == 0).sum() < len(clean)


def end_at(monkeypatch, m, token):
    """From now on the model says EOS wherever it would have said `token`: the same row of the head, a hair longer."""
    head = m.lm_head.weight.detach().clone()
    head[EOS] = 1.001 * head[token]
    monkeypatch.setitem(m.lm_head._parameters, "weight", torch.nn.Parameter(head, requires_grad=False))


def classroom(m):
    """Six pictures and questions, all prompts of one length."""
    size = m.vision_tower.image_size
    pixels = torch.stack([preprocess(picture(40 + 13 * k, 90 - 7 * k, k + 1), size) for k in range(6)])
    prompts = [m.prompt_ids(f"What is {k}?") for k in range(6)]
    assert len({len(p) for p in prompts}) == 1
    return pixels, prompts


def free_answers(m, decoded, n):
    teach(m, recipe({1: None}), *classroom(m), max_new_tokens=n)
    return decoded.pop()[1]


def by_attention(config):
    """Removes some tokens of the classroom's pictures, and no map has a value near the threshold."""
    threshold = {"grouped": 9e-4, "shared": 3.7e-4}[config]
    return {"kind": "attention", "attention": {0: None}, "threshold": threshold}


@pytest.mark.parametrize("config, softmax", [("grouped", "image"), ("grouped", "sequence"), ("shared", "sequence")])
def test_a_batch_teaches_what_single_samples_do(load, monkeypatch, decoded, config, softmax):
    """Answers that end at different steps: each row of the batch keeps its own queries and keys to its own end."""
    m = load(config, "float64")
    how = recipe({1: [0, 2], 2: [1]}, softmax, by_attention(config), frozen=2)
    pixels, prompts = classroom(m)
    free = free_answers(m, decoded, 10)

    def ends(token):
        return [a.index(token) if token in a else 10 for a in free]
    token = max({i for a in free for i in a}, key=lambda i: (0 in ends(i), len(set(ends(i)))))
    end_at(monkeypatch, m, token)
    batch = teach(m, how, pixels, prompts, max_new_tokens=10)
    answers = decoded.pop()[1]
    assert answers == [a[:n] for a, n in zip(free, ends(token))] and len({*map(len, answers)}) >= 4 and [] in answers
    for i in range(6):
        one = teach(m, how, pixels[i:i + 1], prompts[i:i + 1], max_new_tokens=10)
        assert one.responses == [batch.responses[i]] and one.columns == batch.columns
        for name in "raw", "clean", "hidden":
            assert torch.allclose(getattr(one, name)[0], getattr(batch, name)[i], atol=1e-6), (i, name)
    ended = torch.tensor([not a for a in answers])
    assert not batch.raw[ended].any() and batch.raw[~ended].any(1).all()
    assert (assign_labels(batch.clean, m.vision_tower.grid)[ended] == -1).all()  # first token EOS: nothing is taught

    raw, clean = slow.maps(m, how, pixels, prompts, [a[:9] for a in answers])  # the same rows, from whole matrices
    assert torch.allclose(raw.float(), batch.raw, atol=1e-6) and torch.allclose(clean.float(), batch.clean, atol=1e-6)
    assert 0 < (clean[~ended] == 0).sum() < clean[~ended].numel()
    assert not slow.maps(m, how, pixels, prompts, [[]] * 6)[0].any()


def test_rows_are_the_tokens_fed_back(load, decoded):
    """A response cut at n tokens has the rows of the first n - 1; given answers have the rows of all their tokens."""
    m, how = load("grouped", "float64"), recipe({1: None, 3: [2]}, sink=None)
    pixels, prompts = classroom(m)
    free = free_answers(m, decoded, 6)
    given = [slow.maps(m, how, pixels, prompts, [a[:n] for a in free])[0].float() for n in range(6)]
    for n in range(1, 6):
        assert torch.allclose(teach(m, how, pixels, prompts, max_new_tokens=n).raw, given[n - 1], atol=1e-6)
        assert not torch.allclose(given[n], given[n - 1], atol=1e-4)


# ---- words ----------------------------------------------------------------------------------------------------------

def test_eos_ends_an_answer_and_is_no_part_of_it(load, monkeypatch, decoded):
    m, shot = load("grouped"), picture(90, 53, 3)
    m.generate(shot, "What is this?", 12)
    free = decoded[-1][1][0]
    token = free[7]
    end_at(monkeypatch, m, token)
    text = m.generate(shot, "What is this?", 12)
    assert decoded[-1][1] == [free[:free.index(token)]] and 0 < free.index(token) < 12
    assert text == m.tokenizer.decode(free[:free.index(token)]).strip() and "</s>" not in text
    end_at(monkeypatch, m, free[0])
    assert m.generate(shot, "What is this?", 12) == ""


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_of_the_head_without_a_piece_are_never_chosen(load, monkeypatch, decoded, config):
    m, shot = load(config), picture(90, 53, 3)
    pieces, head = m.tokenizer.get_piece_size(), m.lm_head.weight.detach().clone()
    assert pieces < len(head)
    m.generate(shot, "What is this?", 8)
    hidden, [free] = decoded[-1]
    head[pieces:] = 2 * head[free[0]]
    monkeypatch.setitem(m.lm_head._parameters, "weight", torch.nn.Parameter(head, requires_grad=False))
    m.generate(shot, "What is this?", 8)
    assert m.head(hidden).argmax() >= pieces and decoded[-1][1] == [free]


def test_a_prompt_beyond_the_models_positions_is_refused(load):
    """Also where only the crop makes it too long: the prompt and its answer just fit, 9 tokens more do not."""
    m, shot, long = load("plain"), picture(90, 53, 3), "What is this? " * 80
    for ask in m.generate, lambda *args: answer(m, None, *args, regions=[]):
        with pytest.raises(BadInput, match="the model has room for 512; shorten the question"):
            ask(shot, long)
    room = 512 - (len(m.prompt_ids("What is this?")) - 1 + 9)
    answer(m, None, shot, "What is this?", max_new_tokens=room, regions=[])
    with pytest.raises(BadInput, match="need 521 tokens, the model has room for 512"):
        answer(m, None, shot, "What is this?", max_new_tokens=room, regions=regions_of(torch.ones(3, 3)))


# ---- student (Eq. 3-5) ----------------------------------------------------------------------------------------------

def released(folder, config, frozen, layers, kind="twig only"):
    """An RPN in the layout its authors publish: config.json and whole blocks, alone or among everything else."""
    folder.mkdir(exist_ok=True)
    facts = {"model_type": "llava_llama", "twig_K": frozen, "twig_T": layers, "hidden_size": 1}
    (folder / "config.json").write_text(json.dumps(facts))
    found = rpn_tensors(CONFIGS[config], layers)
    if kind != "twig only":
        found |= {"twig_head.weight": torch.ones(3, 3), "model.mm_projector.0.weight": torch.ones(2, 2)}
        found |= {name.removeprefix("language_").replace("model.lm_head", "lm_head"): t
                  for name, t in tensors(CONFIGS[config]).items() if name.startswith("language_")}
    if kind == "filled, in shards":
        files = {name: f"model-0000{n % 2 + 1}-of-00002.safetensors" for n, name in enumerate(found)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        for file in set(files.values()):
            save_file({name: found[name] for name in found if files[name] == file}, folder / file)
    else:
        save_file(found, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["twig only", "filled", "filled, in shards"])
@pytest.mark.parametrize("name", CASES)
def test_a_released_rpn_scores_as_the_reference(load, tmp_path, name, kind):
    """Extra tensors change nothing: the backbone's, twig_head, and v, o and MLP of the last block, which we lack."""
    case, (want, _), m = CASES[name], load_golden(name), load(CASES[name]["config"])
    rpn = RPN.load(released(tmp_path / "rpn", case["config"], *case["rpn"], kind), m)
    got = rpn(m, picture(*case["picture"]), case["question"], case["history"])
    assert got.dtype == torch.float32 and (got.flatten() - want["rpn.own"][-1]).abs().max() < 1e-4
    assert not any(p.requires_grad for p in rpn.parameters()) and rpn.tau == .15


@pytest.mark.parametrize("damage, message", [
    (lambda found, facts: found.pop("model.twig_norm.weight"), "Missing key.*twig_norm.weight"),
    (lambda found, facts: found.update({"model.twig_norm.weight": torch.ones(73)}), "size mismatch for twig_norm"),
    (lambda found, facts: found.update({"model.twig_norm.weight": torch.full((72,), math.nan)}), "twig_norm.*NaN"),
    (lambda found, facts: facts.pop("twig_K"), "no entry 'twig_K'"),
    (lambda found, facts: facts.update(model_type="qwen2_5_vl"), "model_type = qwen2_5_vl is not supported")])
def test_a_wrong_rpn_is_refused(load, tmp_path, damage, message):
    folder = released(tmp_path / "rpn", "grouped", 2, 3)
    found, facts = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    damage(found, facts)
    (folder / "config.json").write_text(json.dumps(facts))
    save_file(found, folder / "model.safetensors")
    with pytest.raises(BadInput, match=message) as caught:
        RPN.load(folder, load("grouped"))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_our_own_file(load, tmp_path):
    """Saved and read again it scores the same, and carries its tau; of other weights it is refused."""
    m, other, path = load("grouped"), load("plain"), tmp_path / "rpn.safetensors"
    rpn = RPN.from_layers(m, frozen=2, layers=3)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in rpn.parameters())
    rpn.save(path, {"frozen": 2, "layers": 3, "fingerprint": m.fingerprint, "ckpt": "grouped", "tau": .3})
    assert all(k.startswith("model.twig_") for k in load_file(path))
    shot = picture(61, 130, 2)
    for place in path, tmp_path:  # the file, or the folder of a run
        again = RPN.load(place, m)
        assert torch.allclose(again(m, shot, "What is this?"), rpn(m, shot, "What is this?"), atol=1e-5)
        assert again.path == path and again.tau == .3
    with pytest.raises(BadInput, match=f"trained for another checkpoint.*{m.fingerprint}.*{other.fingerprint}"):
        RPN.load(path, other)
    with pytest.raises(BadInput, match="both at least 1, together at most the model's 6 layers"):
        RPN.from_layers(m, frozen=4, layers=3)


def whole(m, ids, N=36):
    """The image's one id -> N of them."""
    return [i for t in ids for i in ([t] * N if t == m.config.image_token else [t])]


def test_all_turns_in_one_pass(load, tmp_path):
    """Eq. 4: a query row per turn, the ':' before its answer; its scores are those of the conversation cut there."""
    m = load("grouped", "float64")
    rpn = RPN.load(released(tmp_path / "rpn", "grouped", 2, 3), m)
    turns = ["What is this?", "And who is it?", "Is the red cup left of 12 books?"]
    responses = ["dark blue", "a cat, 40", "no"]
    ids, rows = conversation(m, turns, responses, (6, 6))
    assert len(rows) == 3 and rows[-1] == len(whole(m, ids)) - 1 and ids.count(EOS) == 2
    assert all(m.tokenizer.id_to_piece(whole(m, ids)[r]).endswith(":") for r in rows)
    shot = picture(61, 130, 2)
    embeds, columns, rope, _ = slow.sequence(m, ids, m.pixels(shot)[None])
    scores = rpn.score(m.run(embeds, 0, 2, rope), columns, rows, rope)  # (b, H, n, N)
    assert scores.shape == (1, 6, 3, 36)
    for n in range(3):
        alone = rpn(m, shot, turns[n], list(zip(turns[:n], responses)))
        assert torch.allclose(scores[0, :, n].mean(0).float(), alone.flatten(), atol=1e-6)
    assert not torch.allclose(scores[:, :, 0], scores[:, :, 1], atol=1e-2)


def test_query_rows_of_the_reference(load, tmp_path):
    case, (want, _), m = CASES["turns"], load_golden("turns"), load("grouped")
    (first, response), = case["history"]
    responses = [response, "what comes after the last question is not read"]
    ids, rows = conversation(m, [first, case["question"]], responses, (6, 6))
    assert whole(m, ids) == want["input_ids"].tolist()
    embeds, columns, rope, _ = slow.sequence(m, ids, m.pixels(picture(*case["picture"]))[None])
    rpn = RPN.load(released(tmp_path / "rpn", "grouped", 2, 3), m)
    scores = rpn.score(m.run(embeds, 0, 2, rope), columns, rows, rope)[0].mean(0)  # (n, N)
    assert torch.allclose(scores, want["rpn.own"], atol=1e-4)


# ---- two-stage answers (Sec. 3.4) -----------------------------------------------------------------------------------

def two_blobs(g):
    """Far corners: two regions of two cells each, with a gap even on a 3 x 3 grid."""
    mask = torch.zeros(g, g, dtype=torch.bool)
    mask[0, :2] = mask[-1, -2:] = True
    return mask


WAYS = {
    "mask": lambda g: dict(regions=regions_of(two_blobs(g))),
    "box": lambda g: dict(regions=regions_of(two_blobs(g)), mode="box"),
    "no region": lambda g: dict(regions=[]),
    "turns": lambda g: dict(regions=regions_of(two_blobs(g)), history=HISTORY),
    "own map": lambda g: dict(),
    "own map, box": lambda g: dict(mode="box", history=HISTORY[:1]),
}


def telling_tau(m, rpn, shot, question, history=()):
    """A threshold at which the RPN's map, which means nothing here, has most regions; in the widest such gap."""
    logits, on = rpn(m, shot, question, history), Letterbox(shot.size, m.grid_of(shot)).holds_picture()
    values = smooth(logits.sigmoid() * on).flatten().sort().values.tolist()
    gaps = list(itertools.pairwise(values))
    low, high = max(gaps, key=lambda g: (len(find_regions(logits, sum(g) / 2, on)), g[1] - g[0]))
    return (low + high) / 2


def entering(m, widths):
    """Note how many tokens enter layer 0 in each call, decoding left out."""
    def note(module, args):
        if args[0].shape[1] > 1:
            widths.append(args[0].shape[1])
    return m.language_model.layers[0].register_forward_pre_hook(note)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name, dtype, close", [("plain", "float64", 1e-9), ("shared", "float64", 1e-9),
                                                ("grouped", "float64", 1e-9), ("grouped", "float32", 1e-4)])
def test_stage_two_need_not_start_over(load, tmp_path, decoded, name, way, dtype, close):
    """[system][image] is not run again, and nothing changes: one function, to rounding."""
    case, m = CASES[name], load(name, dtype)
    g, question = m.vision_tower.grid, case["question"]
    rpn, shot = RPN.load(released(tmp_path / "rpn", name, *case["rpn"]), m), picture(*case["picture"])
    how, widths = WAYS[way](g), []
    if "regions" not in how:
        how["tau"] = telling_tau(m, rpn, shot, question, how.get("history", ()))
    hook = entering(m, widths)
    fast = answer(m, rpn, shot, question, max_new_tokens=8, **how)
    hook.remove()
    scratch = slow.answer(m, rpn, shot, question, max_new_tokens=8, **how)
    (ours, ids), (reference, wanted) = decoded
    assert ids == wanted and fast.text == scratch.text and fast.boxes == scratch.boxes and len(ids[0]) == 8
    assert torch.allclose(ours, reference, rtol=0, atol=close) and ours.dtype == getattr(torch, dtype)
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(fast.crops, scratch.crops, strict=True))
    assert [r.box for r in fast.regions] == [r.box for r in scratch.regions]
    ids = m.prompt_ids(question, how.get("history", ()))
    P, n = ids.index(m.config.image_token) + g * g, sum(len(crop.tokens) for crop in fast.crops)
    t = len(m.tail(ids))
    assert widths == ([P, t, n + t] if n else [P, t]) and bool(n) == (way != "no region")


LONG = "Is the red cup left of 12 books? And what color is the car that is behind it, dark blue?"


@pytest.mark.parametrize("name", ["plain", "grouped", "shared"])
def test_questions_on_one_prefix_are_questions_asked_alone(load, tmp_path, decoded, monkeypatch, name):
    """In any order of modes, lengths and histories, with the teacher in between: equal to 1e-9 in float64."""
    case, m = CASES[name], load(name, "float64")
    rpn, shot = RPN.load(released(tmp_path / "rpn", name, *case["rpn"]), m), picture(*case["picture"])
    recipe = Recipe({0: None, 1: [0]}, rpn.frozen, 2, None, sink={"kind": "norm", "c": 1.})
    blobs, pixels = regions_of(two_blobs(m.vision_tower.grid)), m.pixels(shot)[None]
    prefix = m.prefill(pixels, keep=sdrpn.prefix_layers(recipe))
    widths, hook = [], []
    hook = entering(m, widths)
    for question, mode, history in [
            ("What is this?", "mask", ()), (LONG, "box", HISTORY), ("What?", "plain", ()), (LONG, "teacher", ()),
            ("What is this?", "box", HISTORY), ("No?", "mask", ()), (LONG, "plain", HISTORY), ("Who?", "teacher", ())]:
        widths.clear()
        if mode == "teacher":
            prompts = [m.prompt_ids(question, history)]
            one = teach(m, recipe, pixels, prompts, 8, prefix)
            assert widths == [len(m.tail(prompts[0]))]
            two = teach(m, recipe, pixels, prompts, 8)
            for field in "raw", "clean", "hidden", "rope":
                assert torch.allclose(getattr(one, field), getattr(two, field), rtol=0, atol=1e-9)
        elif mode == "plain":
            m.generate(shot, question, 8, history, prefix)
            slow.answer(m, rpn, shot, question, max_new_tokens=8, history=history, regions=[])
        else:
            regions = {} if question == "No?" else dict(regions=blobs)
            how = dict(mode=mode, max_new_tokens=8, history=history, tau=.5, **regions)
            got = answer(m, rpn, shot, question, prefix=prefix, **how)
            assert got.prefix is prefix and widths[0] == len(m.tail(m.prompt_ids(question, history)))
            slow.answer(m, rpn, shot, question, **how)
        (ours, ids), (reference, wanted) = decoded[-2:]
        assert ids == wanted and torch.allclose(ours, reference, rtol=0, atol=1e-9)
    hook.remove()
    monkeypatch.setattr(type(m), "tail", lambda self, ids: [ids[-1]])  # a prompt whose tail is one token
    assert m.generate(shot, "x", 8, (), prefix) == m.generate(shot, "x", 8)


def test_no_call_has_a_mask_and_grouped_heads(load, monkeypatch):
    """No fused CUDA kernel takes both; torch's own rule says what its kernels take."""
    m, shot, calls, attend = load("grouped"), picture(61, 130, 2), [], F.scaled_dot_product_attention

    def note(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        params = torch.backends.cuda.SDPAParams(q, k, v, attn_mask, 0.0, is_causal, enable_gqa)
        calls.append((attn_mask is not None, enable_gqa, params.enable_gqa))
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)
    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    answer(m, None, shot, "What is this?", max_new_tokens=3, regions=regions_of(two_blobs(6)))
    assert (True, False, False) in calls and (False, True, True) in calls  # behind the prefix; prefill and decoding
    assert not any(mask and grouped for mask, grouped, _ in calls)


@pytest.mark.parametrize("mode", ["mask", "box"])
@pytest.mark.parametrize("history", [(), HISTORY])
def test_the_crop_stands_right_behind_the_image(load, decoded, mode, history):
    """Put together by hand: [system][image][crop][all turns], through all layers once. The crop is the question's."""
    m, shot = load("grouped", "float64"), picture(157, 94, 1)
    mask = two_blobs(6)
    mask[2, 2] = mask[3, 2] = mask[2, 3] = True
    got = answer(m, None, shot, "What is this?", mode, max_new_tokens=1, history=history, regions=regions_of(mask))
    assert got.boxes == ([(0, 0, 157, 94)] if mode == "mask" else [(0, 0, 53, 1), (52, 21, 105, 74)])
    crops = torch.cat([crop_features(m, shot, box)[crop.keep.flatten()] for box, crop in zip(got.boxes, got.crops)])
    ids = m.prompt_ids("What is this?", history)
    at = ids.index(m.config.image_token)
    image = m.project(m.features(m.pixels(shot)[None]))
    embeds = torch.cat([m.embed(ids[:at]), image, crops[None], m.embed(ids[at + 1:])], 1)
    want = m.run(embeds, 0, 6, m.text_rope(0, embeds.shape[1]))[:, -1]
    assert torch.allclose(decoded[0][0], want, atol=1e-9)
    assert decoded[0][1] == [[m.head(want)[0, :400].argmax().item()]]


@pytest.mark.parametrize("history", [(), HISTORY])
def test_plain_is_generate_and_so_is_an_answer_without_a_region(load, decoded, history):
    m, shot = load("grouped"), picture(157, 94, 1)
    text = m.generate(shot, "What is this?", 8, history)
    plain = answer(m, None, shot, "What is this?", "plain", max_new_tokens=8, history=history)
    nothing = answer(m, None, shot, "What is this?", max_new_tokens=8, history=history, regions=[])
    assert plain.text == nothing.text == text and plain.boxes == nothing.boxes == [] and nothing.logits is None
    assert decoded[0][1] == decoded[1][1] == decoded[2][1]


def dreamt(logits, tau=.15):
    """An RPN that sees the same map everywhere."""
    return SimpleNamespace(frozen=2, tau=tau, logits=lambda prefix, tail, rope: logits)


@pytest.mark.parametrize("size, rows, tau", [
    ((200, 20), [2, 3], .3), ((20, 200), [2, 3], .3), ((120, 42), [1, 2, 3, 4], .6)])
def test_regions_lie_in_the_picture_not_in_its_padding(load, size, rows, tau):
    """Of 6 rows only some hold pixels: what the map says of others is gone before smoothing, so it can not leak."""
    m, shot = load("grouped"), picture(*size, 1)
    on = torch.zeros(6, 6, dtype=torch.bool)
    on[rows] = True
    lit = torch.ones(6, 6, dtype=torch.bool)
    lit[:, 3:] = False  # half of it: a region of everything would be dropped
    half = (0, 0, size[0] // 2, size[1])
    if size[0] < size[1]:
        on, lit, half = on.T, lit.T, (0, 0, size[0], size[1] // 2)
    padding = torch.where(on, -20., 20.)
    assert find_regions(padding, .3)  # what would be found there
    beside = answer(m, dreamt(padding), shot, "What is this?", max_new_tokens=2, tau=.3)
    assert beside.boxes == [] and torch.equal(beside.logits, padding)  # the map itself is left alone
    everywhere = answer(m, dreamt(torch.where(lit, 20., -20.), tau), shot, "What is this?", max_new_tokens=2)
    assert everywhere.boxes == [half] and len(everywhere.regions) == 1  # the RPN's own tau


def test_a_map_that_is_not_finite_is_an_error(load):
    m, shot = load("grouped"), picture(90, 53, 3)
    rpn = RPN.from_layers(m, 2, 2).requires_grad_(False)
    rpn.twig_norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="its map is not finite in float32; try --dtype"):
        answer(m, rpn, shot, "What is this?")

"""The method step by step: examples small enough to check by hand, and exactness wherever two roads must lead to one result.

    python -m pytest tests/test_method.py       # tiny models made from formulas; no network, no GPU
"""
import doctest
import io
import itertools
import json
import math
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).resolve().parent / "golden")]

from differ import load_golden  # noqa: E402 (also puts the project on the path)
from formula import CASES, CONFIGS, NEW_TOKENS, picture, rpn_tensors, tensors, write_checkpoint  # noqa: E402

import infer  # noqa: E402
import sdrpn  # noqa: E402
from clip import BadInput, preprocess, preprocess_crop  # noqa: E402
from data import metrics  # noqa: E402
from model import LLaVA  # noqa: E402
from sdrpn import (RPN, answer, assign_labels, crop_tokens, find_regions, grid_to_image, picture_cells, regions_above,  # noqa: E402
                   remove_sink_tokens, response_attention, roi_loss, roi_loss_sum, smooth, teach)
from train import conversation_ids  # noqa: E402

EOS = 2
HISTORY = (("What color is the car?", "dark blue"), ("And who is it?", "two red cups"))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(config name, dtype): a tiny LLaVA read from a checkpoint folder written for it; each is made once."""
    loaded = {}

    def load(config, dtype="float32"):
        if (config, dtype) not in loaded:
            folder = write_checkpoint(tmp_path_factory.mktemp(config), CONFIGS[config])
            loaded[config, dtype] = LLaVA.load(folder, device="cpu", dtype=dtype)
        return loaded[config, dtype]
    return load


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
    """"#." is a foreground cell and an empty one; a row per line -> (g, g) bool."""
    return torch.tensor([[c == "#" for c in row] for row in drawing.split()])


@pytest.mark.parametrize("module, examples", [(sdrpn, 4), (metrics, 10)])
def test_examples_in_docstrings(module, examples):
    result = doctest.testmod(module)
    assert result.attempted >= examples and not result.failed


# ---- labels (Eq. 1, Eq. 2) ---------------------------------------------------------------------------------------

def test_sinks_are_strictly_longer_than_the_threshold():
    hidden = torch.tensor([[3., 4.], [3., 4.0001], [0., 0.], [-30., 40.]])
    assert remove_sink_tokens(torch.tensor([.1, .2, .3, .4]), hidden, 5.).tolist() == pytest.approx([.1, 0, .3, 0])
    two = remove_sink_tokens(torch.ones(2, 4), torch.stack([hidden, 2 * hidden]), torch.tensor([[5.], [10.]]))
    assert two.tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]         # a batch, each with a threshold of its own


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


@pytest.mark.parametrize("corner, fraction, ignored", [((1, 2), .5, False), ((1, 3), .5, True), ((1, 3), .51, False),
                                                       ((3, 3), .5, True), ((3, 3), 1.01, False)])
def test_a_box_over_half_the_grid_teaches_nothing(corner, fraction, ignored):
    """Foreground at (0, 0) and at the corner of a 4 x 4 grid: a box of 6, 8 or 16 cells."""
    roi_map = torch.zeros(4, 4)
    roi_map[0, 0] = roi_map[corner] = .7
    labels = assign_labels(roi_map.flatten(), 4, max_box_fraction=fraction)
    assert (labels == 1).sum() == (0 if ignored else 2) and bool((labels == -1).all()) == ignored


def test_a_map_of_zeros_teaches_nothing():
    assert assign_labels(torch.zeros(2, 36), 6).tolist() == [[-1] * 36] * 2


def test_labels_of_a_batch_of_turns():
    """(b, n, N) at once, against plain loops over one map after the other."""
    maps = random(3, 4, 49, seed=1).abs() ** 6
    maps[1, 2] = 0
    labels = assign_labels(maps, 7, tau_fg=.25, tau_bg=.01)
    assert labels.shape == maps.shape and labels.dtype == torch.int64
    for b, n in itertools.product(range(3), range(4)):
        a = {(y, x): maps[b, n, 7 * y + x].item() for y in range(7) for x in range(7)}
        peak = max(a.values())
        fg = [c for c in a if peak and a[c] >= .25 * peak]
        ys, xs = [y for y, _ in fg] or [0, 6], [x for _, x in fg] or [0, 6]
        inside = {(y, x) for y, x in a if min(ys) <= y <= max(ys) and min(xs) <= x <= max(xs)}
        want = [-1 if len(inside) >= 24.5 else 1 if c in fg else 0 if c not in inside and a[c] <= .01 * peak else -1 for c in a]
        assert labels[b, n].tolist() == want
    assert {-1, 0, 1} == set(labels.flatten().tolist()) and (labels == -1).all(-1).sum() < 8        # the case has something of all


def test_a_removed_sink_is_background_outside_the_box_and_ignored_inside():
    roi_map = torch.tensor([.9, 0., 0., 0.,  0., 5., 0., 0.,  .0, 0., .6, 0.,  7., 0., 0., 0.])         # two sinks: 5 and 7
    hidden = torch.where(roi_map[:, None] > 1, 100., 1.).expand(16, 3)
    labels = assign_labels(remove_sink_tokens(roi_map, hidden, 50.), 4, max_box_fraction=.6)            # a box of 9 cells
    assert labels.view(4, 4).tolist() == [[1, -1, -1, 0], [-1, -1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 0]]


# ---- loss (Alg. 1 line 18) ---------------------------------------------------------------------------------------

def loss_case():
    logits = (3 * random(5, 2, 16, seed=2)).requires_grad_()
    labels = torch.randint(-1, 2, logits.shape, generator=torch.Generator().manual_seed(3))
    labels[3] = -1                                              # a sample that teaches nothing
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
    parts = [roi_loss_sum(logits[i:i + 2], labels[i:i + 2]) for i in (0, 2, 4)]
    whole, summed = roi_loss(logits, labels), sum(parts) / (labels >= 0).sum()
    assert torch.allclose(summed, whole, rtol=1e-6)
    assert torch.allclose(torch.autograd.grad(summed, logits)[0], torch.autograd.grad(whole, logits)[0], atol=1e-8)


def test_no_label_is_zero_and_still_has_a_gradient():
    logits = (50 * random(2, 1, 9)).requires_grad_()
    loss = roi_loss(logits, torch.full((2, 1, 9), -1))
    loss.backward()
    assert loss.item() == 0 and logits.grad.tolist() == torch.zeros(2, 1, 9).tolist()


# ---- regions (Eq. 6, Eq. 7) --------------------------------------------------------------------------------------

def slow_smooth(p):
    """The Gaussian as loops in float64; index -1 is index 1, index g is index g - 2."""
    g, w = len(p), [math.exp(-.5), 1, math.exp(-.5)]
    fold = lambda i: -i if i < 0 else 2 * (g - 1) - i if i >= g else i
    near = [(dy, dx, w[dy + 1] * w[dx + 1] / sum(w) ** 2) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return torch.tensor([[sum(v * p[fold(y + dy)][fold(x + dx)].item() for dy, dx, v in near) for x in range(g)] for y in range(g)])


def test_smoothing():
    spot = torch.zeros(5, 5)
    spot[2, 2] = 1
    assert smooth(spot).sum() == pytest.approx(1)
    assert torch.allclose(smooth(spot)[1:4, 2], torch.tensor([.1238, .2042, .1238]), atol=1e-4)
    assert torch.allclose(smooth(spot)[1:4, 1], torch.tensor([.0751, .1238, .0751]), atol=1e-4)
    assert torch.allclose(smooth(torch.full((4, 6, 6), .3)), torch.tensor(.3))                  # edges included
    maps = random(3, 2, 6, 6, seed=4).sigmoid()
    want = torch.stack([slow_smooth(p) for p in maps.flatten(0, 1)]).view(maps.shape)
    assert torch.allclose(smooth(maps), want, atol=1e-6)


@pytest.mark.parametrize("drawing, boxes, count", [
    ("......  .#....  ......  ....#.  ......  ......", [], 0),                                  # specks
    ("......  ......  ..##..  ......  ......  ......", [(1, 1, 4, 4)], 9),                      # both sides grow: s = (2+4-3)//2
    ("......  ......  ..#...  ..#...  ......  ......", [(1, 1, 4, 4)], 9),
    ("......  ......  ..#...  ...#..  ......  ......", [(1, 1, 4, 4)], 9),                      # neighbours over the corner
    ("......  ......  ..#...  ..##..  ......  ......", [(1, 1, 4, 4)], 9),
    ("......  ......  .###..  ......  ......  ......", [(1, 1, 4, 4)], 9),                      # only the short side grows
    ("......  .#....  ..#...  ...#..  ......  ......", [(1, 1, 4, 4)], 9),                      # neither, but all cells count
    ("##....  ......  ......  ......  ......  ......", [(0, 0, 2, 2)], 4),                      # clipped, not shifted
    ("......  ......  ......  ......  ......  ....##", [(3, 4, 6, 6)], 6),
    ("......  ......  .##...  .##...  ......  ......", [(1, 2, 3, 4)], 4),                      # four cells stay as they are
    ("......  ......  .####.  ......  ......  ......", [(1, 2, 5, 3)], 4),
    ("....##  ....##  ..#...  .#....  ......  ##..##", [(4, 0, 6, 2), (0, 1, 3, 4), (0, 4, 2, 6), (3, 4, 6, 6)], 4 + 9 + 4 + 6),
    ("....#.  ..##..  ......  #.....  .#.#..  ..#...", [(2, 0, 5, 2), (0, 3, 4, 6)], 6 + 4),
    ("######  ######  ######  ######  ######  ######", [(0, 0, 6, 6)], 36)])
def test_regions_by_hand(drawing, boxes, count):
    """Components of a map that needs no smoothing: areas 1, 2-3 and larger, the border, 8 neighbours, raster order."""
    found = regions_above(cells(drawing).float(), .5)
    assert [r.box for r in found] == boxes and sum(int(r.cells.sum()) for r in found) == count
    for r in found:
        x0, y0, x1, y1 = r.box
        assert r.cells[y0:y1, x0:x1].sum() == r.cells.sum()


def test_threshold_is_strict_and_small_regions_can_be_kept():
    p = torch.zeros(6, 6)
    p[1, 1] = p[4, 3] = p[4, 4] = .5
    assert regions_above(p, .5) == []
    assert [r.box for r in regions_above(p, .49)] == [(2, 3, 5, 6)]
    assert [r.box for r in regions_above(p, .49, small=False)] == [(1, 1, 2, 2), (3, 4, 5, 5)]


@pytest.mark.parametrize("drawing, tau, boxes", [
    ("......  ......  ..#...  ......  ......  ......", .15, []),                                # .204, beside it .124: one cell
    ("......  ......  ..#...  ......  ......  ......", .12, [(1, 1, 4, 4)]),                    # a plus of five
    ("......  ......  ..##..  ......  ......  ......", .25, [(1, 1, 4, 4)]),                    # .328, above and below .199
    ("......  ......  ..##..  ......  ......  ......", .15, [(2, 1, 4, 4)]),
    ("......  ......  ......  ......  ....#.  ......", .2, [(4, 4, 6, 6)]),                     # .204, folded: .248 twice, .300
    ("......  ......  ......  ......  ....#.  ......", .28, []),
])
def test_smoothed_regions_by_hand(drawing, tau, boxes):
    assert find_regions(torch.where(cells(drawing), 20., -20.), tau) == boxes


def slow_regions(p, threshold):
    """Neighbours take each other's smaller number until nothing changes."""
    g = len(p)
    number = {(y, x): g * y + x for y in range(g) for x in range(g) if p[y, x] > threshold}
    changed = True
    while changed:
        changed = False
        for (y, x), (v, u) in itertools.product(number, number):
            if abs(y - v) <= 1 and abs(x - u) <= 1 and number[v, u] < number[y, x]:
                number[y, x], changed = number[v, u], True
    boxes = []
    for n in set(number.values()):
        part = [c for c in number if number[c] == n]
        box = []
        for side in zip(*part):
            low, high = min(side), max(side) + 1
            if len(part) < 4 and high - low < 3:
                low = math.floor((low + high - 3) / 2)
                low, high = max(low, 0), min(low + 3, g)
            box.append((low, high))
        if len(part) > 1:
            boxes.append((box[1][0], box[0][0], box[1][1], box[0][1]))
    return sorted(boxes, key=lambda b: (b[1], b[0]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tau", [.15, .3, .5])
def test_regions_of_random_maps(seed, tau):
    logits = 4 * random(9, 9, seed=seed) - 4
    found = find_regions(logits, tau)
    assert sorted(found) == sorted(slow_regions(slow_smooth(logits.sigmoid()), tau))
    assert [(b[1], b[0]) for b in found] == sorted((b[1], b[0]) for b in found)
    assert found or tau == .5


@pytest.mark.parametrize("size", [(100, 100), (157, 94), (61, 130), (1, 50), (50, 1), (640, 427), (3, 7), (4, 4)])
def test_grid_to_image(size):
    """All boxes of a 6 x 6 grid in exact fractions: floor, ceil, clamped to the picture, at least one pixel inside it."""
    side, lines = max(size), list(itertools.combinations(range(7), 2))
    for (x0, x1), (y0, y1) in itertools.product(lines, lines):
        want = []
        for length, low, high in (size[0], x0, x1), (size[1], y0, y1):
            pad = (side - length) // 2
            low = min(max(math.floor(Fraction(low * side, 6) - pad), 0), length)
            high = min(max(math.ceil(Fraction(high * side, 6) - pad), 0), length)
            if high == low:                                     # beside the picture: the pixel at its edge
                low, high = (length - 1, length) if low == length else (low, low + 1)
            want.append((low, high))
        (left, right), (top, bottom) = want
        assert grid_to_image((x0, y0, x1, y1), 6, size) == (left, top, right, bottom)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


@pytest.mark.parametrize("box, grid, size, pixels", [
    ((0, 0, 6, 6), 6, (157, 94), (0, 0, 157, 94)),
    ((2, 2, 4, 4), 6, (157, 94), (52, 21, 105, 74)),            # 26 1/6 px a cell, 31 px of padding above and 32 below
    ((0, 0, 1, 1), 6, (157, 94), (0, 0, 27, 1)),                # nothing but padding above
    ((0, 5, 1, 6), 6, (157, 94), (0, 93, 27, 94)),              # and below
    ((23, 0, 24, 24), 24, (333, 500), (332, 0, 333, 500)),
    ((3, 3, 6, 6), 24, (4032, 3024), (504, 0, 1008, 504))])
def test_grid_to_image_by_hand(box, grid, size, pixels):
    got = grid_to_image(box, grid, size)
    assert got == pixels and all(type(v) is int for v in got)


@pytest.mark.parametrize("size", [(100, 100), (157, 94), (200, 20), (7, 90), (50, 1), (4, 7)])
@pytest.mark.parametrize("grid", [3, 6])
def test_cells_that_hold_a_part_of_the_picture(size, grid):
    side, on = max(size), []
    for length in size:
        pad = (side - length) // 2
        on.append([any(min(Fraction(i + 1, grid) * side, pad + p + 1) > max(Fraction(i, grid) * side, pad + p) for p in range(length))
                   for i in range(grid)])
    assert picture_cells(grid, size).tolist() == [[x and y for x in on[0]] for y in on[1]]


# ---- crops (Eq. 7, Eq. 8) ----------------------------------------------------------------------------------------

def regions_of(mask):
    return regions_above(mask.float(), 0., small=False)


def crop_features(llava, image, box):
    return llava.encode_images(preprocess_crop(image, box, llava.vision_tower.image_size)[None].to(llava.dtype))[0]         # (N, D)


@pytest.mark.parametrize("drawing, kept", [
    ("......  .###..  .#.#..  .###..  ......  ......", 32),     # 3 x 3 to 6 x 6: the hole loses the four cells above .5
    ("......  ......  ..##..  ......  ......  ......", 36),     # one row of two fills the crop
    ("......  ..#...  ...#..  ......  ......  ......", None),
    ("#.....  .#....  ..#...  ...#..  ....#.  .....#", 6),      # as large as the grid: copied
    (".....#  ....#.  ......  ......  ......  #.....", None)])
def test_masked_upscaling_keeps_the_features_under_the_mask(load, drawing, kept):
    """One crop around everything; the mask is stretched with it, by PIL here, and more than one half keeps a patch."""
    llava, image = load("grouped"), picture(157, 94, 1)
    mask = cells(drawing)
    ys, xs = [i.tolist() for i in mask.nonzero(as_tuple=True)]
    around = min(xs), min(ys), max(xs) + 1, max(ys) + 1
    stretched = Image.fromarray(mask.float().numpy()).crop(around).resize((6, 6), Image.BILINEAR)
    keep = (torch.from_numpy(np.array(stretched)).flatten() > .5).nonzero().flatten()
    tokens, boxes = crop_tokens(llava, image, regions_of(mask), "mask")
    assert boxes == [grid_to_image(around, 6, image.size)] and tokens.shape[1] == len(keep) == (kept or len(keep)) > 0
    assert torch.allclose(tokens[0], crop_features(llava, image, boxes[0])[keep], atol=1e-5)


def test_masked_upscaling_with_nothing_left_keeps_all(load, monkeypatch):
    """A mask stretched over its own bounding box always leaves something; the rule is there for other ways to stretch it."""
    monkeypatch.setattr(F, "interpolate", lambda x, size, **how: torch.full((1, 1, *size), .5))
    llava, image = load("grouped"), picture(157, 94, 1)
    tokens, boxes = crop_tokens(llava, image, regions_of(cells("......  .##...  ......  ......  ......  ......")), "mask")
    assert tokens.shape == (1, 36, 72) and torch.allclose(tokens[0], crop_features(llava, image, boxes[0]), atol=1e-5)


def test_box_upscaling_takes_the_heaviest_in_raster_order(load):
    llava, image = load("grouped"), picture(90, 90, 1)
    weights = torch.zeros(6, 6)
    weights[0, 0:2], weights[2, 3:6], weights[4:6, 0:2] = .6, .3, .2            # 1.2, .9 and .8, though areas are 2, 3 and 4
    found = regions_of(weights)
    boxes = [(0, 0, 30, 15), (45, 30, 90, 45), (0, 60, 30, 90)]
    for most, want in (1, boxes[:1]), (2, boxes[:2]), (5, boxes):
        tokens, got = crop_tokens(llava, image, found, "box", most)
        assert got == want and tokens.shape == (1, 36 * len(want), 72)
        assert torch.allclose(tokens[0], torch.cat([crop_features(llava, image, b) for b in want]), atol=1e-5)
    heavier = regions_of(weights * torch.tensor([1., 1, 1, 1, 9, 9])[:, None])                  # now the last two
    assert crop_tokens(llava, image, heavier, "box")[1] == [boxes[0], boxes[2]]


# ---- teacher (Sec. 3.1, Alg. 1) ----------------------------------------------------------------------------------

@pytest.mark.parametrize("H, Hkv", [(6, 6), (6, 2), (4, 1)])
@pytest.mark.parametrize("softmax", ["image", "sequence"])
def test_response_attention_is_what_dense_attention_says(H, Hkv, softmax):
    """The whole attention matrix of prompt and response, causal, then its response rows and image columns."""
    d, prompt, m, image = 8, 9, 4, slice(2, 7)
    q, k = 2 * random(H, prompt + m, d, seed=5), 2 * random(Hkv, prompt + m, d, seed=6)
    want = torch.zeros(H, 5)
    for h, row in itertools.product(range(H), range(prompt, prompt + m)):
        scores = [sum(a * b for a, b in zip(q[h, row].tolist(), k[h * Hkv // H, j].tolist())) / math.sqrt(d) for j in range(prompt + m)]
        seen = range(prompt + m)[image] if softmax == "image" else range(row + 1)
        total = sum(math.exp(scores[j]) for j in seen)
        want[h] += torch.tensor([math.exp(scores[j]) / total for j in range(prompt + m)[image]]) / m
    got = response_attention(q[:, prompt:], k, image, prompt, softmax)
    assert torch.allclose(got, want, atol=1e-6) and got.dtype == torch.float32
    assert response_attention(q[:, prompt:].double(), k.double(), image, prompt, softmax).dtype == torch.float32


def recipe(attention, softmax="image", sink=None, frozen=1):
    return dict(attention=attention, softmax=softmax, sink=sink or dict(kind="norm", c=1e9), frozen=frozen, layers=2, tau=.15, train={})


def lesson_of(llava, name, **how):
    case = CASES[name]
    pixels = preprocess(picture(*case["picture"]), llava.vision_tower.image_size)[None]
    return teach(llava, recipe(**how), pixels, [llava.prompt_ids(case["question"], case["history"])], NEW_TOKENS)


@pytest.mark.parametrize("softmax", ["image", "sequence"])
@pytest.mark.parametrize("name", CASES)
def test_teacher_maps_are_the_reference_librarys(load, monkeypatch, name, softmax):
    """Every layer and head, of the response rows that decoding left behind; and the pool of them all, mean over pairs."""
    llava, (want, notes) = load(CASES[name]["config"]), load_golden(name)
    seen = []
    monkeypatch.setattr(sdrpn, "response_attention", lambda *args: seen.append(response_attention(*args)) or seen[-1])
    layers, frozen = llava.config["num_hidden_layers"], CASES[name]["rpn"][0]
    lesson = lesson_of(llava, name, attention={str(layer): None for layer in range(layers)}, softmax=softmax, frozen=frozen)
    want_maps = want[f"attention.{softmax}"]
    assert torch.allclose(torch.stack(seen), want_maps, atol=2e-5)
    assert torch.allclose(lesson.raw[0], want_maps.flatten(0, 1).mean(0), atol=1e-5) and torch.equal(lesson.raw, lesson.clean)
    assert lesson.responses == [notes["text"].strip()]
    assert torch.allclose(lesson.hidden[0, want["rows"].long()], want[f"layer.{frozen - 1}"], atol=1e-4)
    columns = (want["input_ids"] == llava.image_token).nonzero().flatten()
    assert (lesson.image.start, lesson.image.stop - 1) == (columns[0], columns[-1]) and lesson.hidden.shape[1] == len(want["input_ids"])


def between(values, share):
    """A threshold that values in float32 stay on one side of: halfway between two neighbours."""
    low, high = values.sort().values[int(share * len(values)):][:2].tolist()
    return (low + high) / 2


@pytest.mark.parametrize("name", CASES)
def test_recipe_heads_and_both_sink_criteria(load, name):
    """A few heads of two layers, not the same number in each; sinks by hidden norm at the lowest of them, and by attention."""
    llava, (want, _) = load(CASES[name]["config"]), load_golden(name)
    heads, maps = {"2": [1], "1": [2, 0]}, want["attention.image"]
    raw = (maps[1, 0] + maps[1, 2] + maps[2, 1]) / 3
    norms = want["hidden_norm"][1]
    c = between(norms, .6) / norms.median().item()
    lesson = lesson_of(llava, name, attention=heads, sink=dict(kind="norm", c=c))
    assert torch.allclose(lesson.raw[0], raw, atol=1e-5)
    clean = remove_sink_tokens(raw, norms[:, None], c * norms.median())
    assert torch.allclose(lesson.clean[0], clean, atol=1e-5) and 0 < (clean == 0).sum() < len(clean)

    ordinary = want["attention.sequence"]
    pool = torch.cat([ordinary[0], ordinary[2, [0, 2]]]).mean(0)        # the ordinary softmax, though the map has the paper's
    cut = between(pool, .5)
    sink = dict(kind="attention", attention={"0": None, "2": [0, 2]}, threshold=cut * len(pool) / 576)
    lesson = lesson_of(llava, name, attention=heads, sink=sink)
    clean = raw.masked_fill(pool >= cut, 0.)
    assert torch.allclose(lesson.clean[0], clean, atol=1e-5) and 0 < (clean == 0).sum() < len(clean)


def end_at(monkeypatch, llava, token):
    """From now on the model says EOS wherever it would have said `token`: the same row of the head, a hair longer."""
    rows = llava.lm_head.weight.detach().clone()
    rows[EOS] = 1.001 * rows[token]
    monkeypatch.setitem(llava.lm_head._parameters, "weight", torch.nn.Parameter(rows, requires_grad=False))


def classroom(llava):
    """Six pictures and questions, all prompts of one length."""
    size = llava.vision_tower.image_size
    pixels = torch.stack([preprocess(picture(40 + 13 * k, 90 - 7 * k, k + 1), size) for k in range(6)])
    prompts = [llava.prompt_ids(f"What is {k}?") for k in range(6)]
    assert len({len(p) for p in prompts}) == 1
    return pixels, prompts


def free_answers(llava, decoded, n):
    teach(llava, recipe({"1": None}), *classroom(llava), max_new_tokens=n)
    return decoded.pop()[1]


@pytest.mark.parametrize("config, softmax", [("grouped", "image"), ("grouped", "sequence"), ("shared", "sequence")])
def test_a_batch_teaches_what_single_samples_do(load, monkeypatch, decoded, config, softmax):
    """Answers that end at different steps: each row of the batch keeps its own queries and keys to its own end."""
    llava = load(config, "float64")
    how = recipe({"1": [0, 2], "2": [1]}, softmax, dict(kind="attention", attention={"0": None}, threshold=0.004), frozen=2)
    pixels, prompts = classroom(llava)
    free = free_answers(llava, decoded, 10)
    ends = lambda token: [a.index(token) if token in a else 10 for a in free]
    token = max({i for a in free for i in a}, key=lambda i: (0 in ends(i), len(set(ends(i)))))
    end_at(monkeypatch, llava, token)
    batch = teach(llava, how, pixels, prompts, max_new_tokens=10)
    answers = decoded.pop()[1]
    assert answers == [a[:n] for a, n in zip(free, ends(token))] and len({*map(len, answers)}) >= 4 and [] in answers
    for i in range(6):
        one = teach(llava, how, pixels[i:i + 1], prompts[i:i + 1], max_new_tokens=10)
        assert one.responses == [batch.responses[i]] and one.image == batch.image
        for name in "raw", "clean", "hidden":
            assert torch.allclose(getattr(one, name)[0], getattr(batch, name)[i], atol=1e-6), (i, name)
    ended = torch.tensor([not a for a in answers])
    assert not batch.raw[ended].any() and batch.raw[~ended].any(1).all()
    assert (assign_labels(batch.clean, llava.grid)[ended] == -1).all()                         # first token EOS: nothing is taught

    given = teach(llava, how, pixels, prompts, given=[a[:9] for a in answers])                 # the same rows, all at once
    assert torch.allclose(given.raw, batch.raw, atol=1e-6) and torch.allclose(given.clean, batch.clean, atol=1e-6)
    assert torch.equal(given.hidden, batch.hidden)
    assert torch.equal(teach(llava, how, pixels, prompts, given=[[]] * 6).raw, torch.zeros_like(batch.raw))


def test_rows_are_the_tokens_fed_back(load, decoded):
    """A response cut at n tokens has the rows of the first n - 1; given answers have the rows of all their tokens."""
    llava, how = load("grouped", "float64"), recipe({"1": None, "3": [2]})
    pixels, prompts = classroom(llava)
    free = free_answers(llava, decoded, 6)
    given = [teach(llava, how, pixels, prompts, given=[a[:n] for a in free]).raw for n in range(6)]
    for n in range(1, 6):
        assert torch.allclose(teach(llava, how, pixels, prompts, max_new_tokens=n).raw, given[n - 1], atol=1e-6)
        assert not torch.allclose(given[n], given[n - 1], atol=1e-4)


def test_sinks_can_stay(load):
    llava, how = load("grouped"), recipe({"1": None}, sink=dict(kind="norm", c=0.))
    pixels, prompts = classroom(llava)
    assert not teach(llava, how, pixels, prompts, 4).clean.any()
    kept = teach(llava, how, pixels, prompts, 4, sinks=False)
    assert torch.equal(kept.clean, kept.raw) and kept.raw.any()


# ---- words -------------------------------------------------------------------------------------------------------

def test_eos_ends_an_answer_and_is_no_part_of_it(load, monkeypatch, decoded):
    llava, image = load("grouped"), picture(90, 53, 3)
    llava.generate(image, "What is this?", 12)
    free = decoded[-1][1][0]
    token = free[7]
    end_at(monkeypatch, llava, token)
    text = llava.generate(image, "What is this?", 12)
    assert decoded[-1][1] == [free[:free.index(token)]] and 0 < free.index(token) < 12
    assert text == llava.tokenizer.decode(free[:free.index(token)]).strip() and "</s>" not in text
    end_at(monkeypatch, llava, free[0])
    assert llava.generate(image, "What is this?", 12) == "" and answer(llava, None, image, "What is this?", "plain").text == ""


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_of_the_head_without_a_piece_are_never_chosen(load, monkeypatch, decoded, config):
    llava, image = load(config), picture(90, 53, 3)
    pieces, rows = llava.tokenizer.get_piece_size(), llava.lm_head.weight.detach().clone()
    assert pieces < len(rows)
    llava.generate(image, "What is this?", 8)
    hidden, [free] = decoded[-1]
    rows[pieces:] = 2 * rows[free[0]]
    monkeypatch.setitem(llava.lm_head._parameters, "weight", torch.nn.Parameter(rows, requires_grad=False))
    llava.generate(image, "What is this?", 8)
    assert llava.head(hidden).argmax() >= pieces and decoded[-1][1] == [free]


@pytest.mark.parametrize("ask", [lambda llava, *args: llava.generate(*args), lambda llava, *args: answer(llava, None, *args, mode="plain")])
def test_a_prompt_beyond_the_models_positions_is_refused(load, ask):
    with pytest.raises(BadInput, match="the model has room for 512; shorten the question"):
        ask(load("plain"), picture(90, 53, 3), "What is this? " * 80)


# ---- student (Eq. 3-5) -------------------------------------------------------------------------------------------

def released(folder, config, frozen, layers, kind="twig only"):
    """An RPN in the layout its authors publish: config.json and whole blocks, alone or among everything else."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama", "twig_K": frozen, "twig_T": layers, "hidden_size": 1}))
    found = rpn_tensors(CONFIGS[config], layers)
    if kind != "twig only":
        found |= {"model.twig_head.weight": torch.ones(3, 3), "model.mm_projector.0.weight": torch.ones(2, 2)}
        found |= {name.removeprefix("language_"): t for name, t in tensors(CONFIGS[config]).items() if name.startswith("language_")}
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
    """Extra tensors change nothing: the backbone's, twig_head, and v, o and MLP of the last block, which the student lacks."""
    case, (want, _), llava = CASES[name], load_golden(name), load(CASES[name]["config"])
    rpn = RPN.load(released(tmp_path / "rpn", case["config"], *case["rpn"], kind), llava)
    got = rpn(llava, picture(*case["picture"]), case["question"], case["history"])
    assert got.shape == (llava.grid, llava.grid) and got.dtype == torch.float32
    assert (got.flatten() - want["rpn.own"][-1]).abs().max() < 1e-4
    last = f"twig_layers.{case['rpn'][1] - 1}."
    assert {k.removeprefix(last).split(".weight")[0] for k in rpn.state_dict() if k.startswith(last)} == \
        {"input_layernorm", "self_attn.q_proj", "self_attn.k_proj"} and not any(p.requires_grad for p in rpn.parameters())


def drop(name):
    return lambda folder, found, config: found.pop(name)


def keep(change):
    return lambda folder, found, config: config.update(change)


def put(name, tensor):
    return lambda folder, found, config: found.update({name: tensor})


@pytest.mark.parametrize("damage, message", [
    (drop("model.twig_layers.0.mlp.up_proj.weight"), r"1 RPN tensors missing, first model\.twig_layers\.0\.mlp\.up_proj\.weight; download"),
    (drop("model.twig_norm.weight"), "missing, first model.twig_norm.weight"),
    (drop("model.twig_layers.2.self_attn.k_proj.weight"), "missing, first model.twig_layers.2.self_attn.k_proj.weight"),
    (put("model.twig_norm.weight", torch.ones(73)), r"shape \(73,\), .* needs \(72,\): an RPN of another model"),
    (put("model.twig_layers.2.self_attn.k_proj.weight", torch.ones(72, 72)), r"needs \(24, 72\): an RPN of another model"),
    (put("model.twig_norm.weight", torch.full((72,), math.nan)), "NaN"),
    (keep({"twig_K": 4}), "needs 7 decoder layers, .* has 6"),
    (keep({"twig_K": 0}), "does not say its depth"), (keep({"twig_K": -1}), "does not say its depth"),
    (keep({"twig_T": None}), "does not say its depth"), (keep({"twig_T": 0}), "does not say its depth"),
    (keep({"twig_K": "2"}), "does not say its depth"), (keep({"twig_T": True}), "does not say its depth"),
    (lambda folder, found, config: (folder / "model.safetensors").unlink(), "no model.safetensors")])
def test_a_wrong_rpn_is_refused(load, tmp_path, damage, message):
    folder = released(tmp_path / "rpn", "grouped", 2, 3)
    found, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    damage(folder, found, config)
    (folder / "config.json").write_text(json.dumps(config))
    if (folder / "model.safetensors").is_file():
        save_file(found, folder / "model.safetensors")
    with pytest.raises(BadInput, match=message) as caught:
        RPN.load(folder, load("grouped"))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_our_own_file(load, tmp_path):
    """Saved and read again it scores the same; of other weights, or of no RPN at all, it is refused."""
    llava, other, path = load("grouped"), load("plain"), tmp_path / "rpn.safetensors"
    rpn = RPN.from_layers(llava, frozen=2, layers=3)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in rpn.parameters())
    rpn.save(path, {"frozen": 2, "layers": 3, "fingerprint": llava.fingerprint, "ckpt": "grouped"})
    assert [p.name for p in tmp_path.iterdir()] == ["rpn.safetensors"] and all(k.startswith("model.twig_") for k in load_file(path))
    ask = lambda r, model=llava: r(model, picture(61, 130, 2), "What is this?")
    for place in path, tmp_path:                                # the file, or the folder of a run
        again = RPN.load(place, llava)
        assert all(torch.equal(t, rpn.state_dict()[k]) for k, t in again.state_dict().items())
        assert torch.allclose(ask(again), ask(rpn), atol=1e-5) and again.smooth and again.path == path
    with pytest.raises(BadInput, match=f"trained for another checkpoint .*{llava.fingerprint}.*{other.fingerprint}.*train.py --ckpt"):
        RPN.load(path, other)
    rpn.save(path, {"frozen": 2, "layers": 3, "smooth": "labels"})
    assert not RPN.load(path, llava).smooth
    save_file(rpn_tensors(CONFIGS["grouped"], 3), path)
    with pytest.raises(BadInput, match="not an RPN of this program"):
        RPN.load(path, llava)
    path.write_bytes(b"nonsense")
    with pytest.raises(BadInput, match="truncated or not safetensors"):
        RPN.load(path, llava)
    with pytest.raises(BadInput, match="no such RPN; train one with"):
        RPN.load(tmp_path / "absent.safetensors", llava)


@pytest.mark.parametrize("frozen, layers", [(0, 3), (4, 3), (2, 0), (-1, 2), (6, 1)])
def test_depths_a_model_does_not_have(load, frozen, layers):
    with pytest.raises(BadInput, match="together at most the model's 6 layers"):
        RPN.from_layers(load("grouped"), frozen, layers)


def test_all_turns_in_one_pass(load, tmp_path):
    """Eq. 4: a query row per turn, the ':' before its answer; its scores are those of the conversation cut there."""
    llava = load("grouped", "float64")
    rpn = RPN.load(released(tmp_path / "rpn", "grouped", 2, 3), llava)
    turns, responses = ["What is this?", "And who is it?", "Is the red cup left of 12 books?"], ["dark blue", "a cat, 40", "no"]
    ids, rows = conversation_ids(llava, turns, responses)
    expanded = [i for t in ids for i in ([t] * 36 if t == llava.image_token else [t])]
    assert len(rows) == 3 and rows[-1] == len(expanded) - 1
    assert all(llava.tokenizer.id_to_piece(expanded[r]).endswith(":") for r in rows) and expanded.count(EOS) == 2
    image, size = picture(61, 130, 2), llava.vision_tower.image_size
    pixels = torch.stack([preprocess(image, size), preprocess(picture(90, 53, 3), size)])
    hidden, columns = zip(*(llava.embed_prompt(ids, llava.encode_images(pixels[i:i + 1])) for i in range(2)))
    scores = rpn.score(llava.run(torch.cat(hidden), 0, 2), columns[0], rows)                    # (b, H, n, N)
    assert scores.shape == (2, 6, 3, 36)
    for n in range(3):
        alone = rpn(llava, image, turns[n], list(zip(turns[:n], responses)))
        assert torch.allclose(scores[0, :, n].mean(0).float(), alone.flatten(), atol=1e-6)
    assert not torch.allclose(scores[0], scores[1], atol=1e-2) and not torch.allclose(scores[:, :, 0], scores[:, :, 1], atol=1e-2)


def test_query_rows_of_the_reference(load, tmp_path):
    case, (want, _), llava = CASES["turns"], load_golden("turns"), load("grouped")
    (first, response), = case["history"]
    ids, rows = conversation_ids(llava, [first, case["question"]], [response, "what comes after the last question is not read"])
    assert [i for t in ids for i in ([t] * 36 if t == llava.image_token else [t])] == want["input_ids"].tolist()
    hidden, columns = llava.embed_prompt(ids, llava.view(picture(*case["picture"])))
    rpn = RPN.load(released(tmp_path / "rpn", "grouped", 2, 3), llava)
    scores = rpn.score(llava.run(hidden, 0, 2), columns, rows)[0].mean(0)                       # (n, N)
    assert torch.allclose(scores, want["rpn.own"], atol=1e-4)


# ---- two-stage answers (Sec. 3.4) --------------------------------------------------------------------------------

def two_blobs(g):
    """Far corners: two regions of two cells each, with a gap even on a 3 x 3 grid."""
    mask = torch.zeros(g, g, dtype=torch.bool)
    mask[0, :2] = mask[-1, -2:] = True
    return mask


WAYS = {
    "mask": lambda g: dict(mask=two_blobs(g)),
    "box": lambda g: dict(mask=two_blobs(g), mode="box"),
    "no region": lambda g: dict(mask=torch.zeros(g, g, dtype=torch.bool)),
    "whole": lambda g: dict(mask=torch.ones(g, g, dtype=torch.bool)),
    "turns": lambda g: dict(mask=two_blobs(g), history=HISTORY),
    "turns, no region": lambda g: dict(mask=torch.zeros(g, g, dtype=torch.bool), history=HISTORY),
    "own map": lambda g: dict(tau=.5),
    "own map, box": lambda g: dict(tau=.5, mode="box", history=HISTORY[:1]),
}


@pytest.mark.parametrize("dtype, close", [("float64", 1e-9), ("float32", 1e-4)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["plain", "grouped", "shared"])
def test_stage_two_need_not_start_over(load, tmp_path, decoded, name, way, dtype, close):
    """[system][image] is not run through the frozen layers again, and nothing changes: the same function, to rounding."""
    case, llava = CASES[name], load(name, dtype)
    rpn, image, how = RPN.load(released(tmp_path / "rpn", name, *case["rpn"]), llava), picture(*case["picture"]), WAYS[way](llava.grid)
    widths = []
    hook = llava.language_model.layers[0].register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    kept = answer(llava, rpn, image, case["question"], max_new_tokens=8, **how)
    again, widths[:] = list(widths), []
    scratch = answer(llava, rpn, image, case["question"], max_new_tokens=8, reuse=False, **how)
    hook.remove()
    (ours, ids), (reference, wanted) = decoded
    assert ids == wanted and kept.text == scratch.text and kept.boxes == scratch.boxes and len(ids[0]) == 8
    assert torch.allclose(ours, reference, rtol=0, atol=close) and ours.dtype == getattr(torch, dtype)
    assert torch.allclose(llava.head(ours), llava.head(reference), rtol=0, atol=close)

    T = len(llava.prompt_ids(case["question"], how.get("history", ()))) + llava.grid ** 2 - 1
    n = kept.visual_tokens - llava.grid ** 2
    before = llava.prompt_ids(case["question"]).index(llava.image_token) + llava.grid ** 2
    assert [w for w in again if w > 1] == ([T, n + T - before] if n else [T])                   # tokens that entered layer 0
    assert [w for w in widths if w > 1] == [T, T + n]
    assert len(kept.boxes) == {"box": 2, "no region": 0, "turns, no region": 0}.get(way, len(kept.boxes)) and bool(n) == bool(kept.boxes)
    assert kept.boxes or "no region" in way or "own" in way


@pytest.mark.parametrize("mode", ["mask", "box"])
@pytest.mark.parametrize("history", [(), HISTORY])
def test_the_crop_stands_right_behind_the_image(load, decoded, mode, history):
    """Put together by hand: [system][image][crop][all turns], through all layers once. The crop is that of the question asked."""
    llava, image = load("grouped", "float64"), picture(157, 94, 1)
    mask = two_blobs(6)
    mask[2, 2] = mask[3, 2] = mask[2, 3] = True
    got = answer(llava, None, image, "What is this?", mode, max_new_tokens=1, history=history, mask=mask)
    assert got.boxes == ([(0, 0, 157, 94)] if mode == "mask" else [(0, 0, 53, 1), (52, 21, 105, 74)])
    crops = torch.cat([crop_features(llava, image, box) for box in got.boxes])                  # (n, D)
    if mode == "mask":
        crops = crops[mask.flatten()]                                                           # the crop is the whole grid
    ids = llava.prompt_ids("What is this?", history)
    at = ids.index(llava.image_token)
    embeds = torch.cat([llava.embed(ids[:at]), llava.view(image), crops[None], llava.embed(ids[at + 1:])], 1)
    want = llava.run(embeds, 0, 6)[:, -1]
    assert torch.allclose(decoded[0][0], want, atol=1e-9) and got.visual_tokens == 36 + len(crops)
    assert decoded[0][1] == [[llava.head(want)[0, :400].argmax().item()]]


@pytest.mark.parametrize("history", [(), HISTORY])
def test_plain_is_generate_and_so_is_a_mask_without_a_cell(load, decoded, history):
    llava, image = load("grouped"), picture(157, 94, 1)
    text = llava.generate(image, "What is this?", 8, history)
    plain = answer(llava, None, image, "What is this?", "plain", max_new_tokens=8, history=history)
    assert plain.logits is None and plain.boxes == [] and plain.text == text and plain.visual_tokens == 36
    nothing = answer(llava, None, image, "What is this?", max_new_tokens=8, history=history, mask=torch.zeros(6, 6))
    assert nothing.boxes == [] and nothing.text == text and nothing.logits is None
    assert decoded[0][1] == decoded[1][1] == decoded[2][1]


def dreamt(logits, smooth=True):
    """An RPN that sees the same map everywhere."""
    return SimpleNamespace(frozen=2, smooth=smooth, path=None, logits=lambda hidden, columns: logits)


@pytest.mark.parametrize("size, rows", [((200, 20), [2, 3]), ((20, 200), [2, 3]), ((120, 40), [2, 3]), ((120, 42), [1, 2, 3, 4])])
def test_regions_lie_in_the_picture_not_in_its_padding(load, size, rows):
    """Of 6 rows only some hold pixels: what the map says of the others is gone before smoothing, so it can not leak either."""
    llava, image = load("grouped"), picture(*size, 1)
    on = torch.zeros(6, 6, dtype=torch.bool)
    on[rows] = True
    on = on if size[0] > size[1] else on.T
    beside = answer(llava, dreamt(torch.where(on, -20., 20.)), image, "What is this?", max_new_tokens=2)
    assert beside.boxes == [] and beside.logits.max() == 20                                     # the map itself is left alone
    everywhere = answer(llava, dreamt(torch.full((6, 6), 20.)), image, "What is this?", max_new_tokens=2)
    assert everywhere.boxes == [(0, 0, *size)]


def test_a_map_learnt_from_smoothed_labels_is_not_smoothed_again(load):
    llava, image = load("grouped"), picture(90, 90, 1)
    logits = torch.where(cells("......  ......  ..##..  ..##..  ......  ......"), 20., -20.)
    boxes = [answer(llava, dreamt(logits, smooth), image, "What is this?", max_new_tokens=1).boxes for smooth in (True, False)]
    assert boxes == [[(15, 15, 75, 75)], [(30, 30, 60, 60)]]


@pytest.mark.parametrize("how, message", [(dict(tau=0.), "must lie between 0 and 1"), (dict(tau=1.), "must lie between 0 and 1"),
                                          (dict(mode="crop"), "must be mask, box or plain")])
def test_wrong_settings(load, how, message):
    with pytest.raises(BadInput, match=message):
        answer(load("plain"), None, picture(90, 53, 3), "What is this?", mask=torch.ones(3, 3), **how)
    with pytest.raises(BadInput, match="its map is not finite in float32; try --dtype"):
        answer(load("grouped"), dreamt(torch.full((6, 6), math.nan)), picture(90, 53, 3), "What is this?")


# ---- conversations -----------------------------------------------------------------------------------------------

def told(result):
    return result.text, result.boxes, result.logits.tolist(), result.visual_tokens


def test_calls_share_nothing(load, tmp_path):
    """The same question has the same answer whatever was asked before it, in whatever mode and about whatever picture."""
    llava, image, other = load("grouped"), picture(61, 130, 2), picture(157, 94, 1)
    rpn = RPN.load(released(tmp_path / "rpn", "grouped", 2, 3), llava)
    ask = lambda *args, **how: told(answer(llava, rpn, *args, tau=.5, max_new_tokens=6, **how))
    first = ask(image, "What is this?")
    assert ask(other, "And who is it?", mode="box", history=HISTORY) != first
    teach(llava, recipe({"1": None}), *classroom(llava), max_new_tokens=3)
    llava.generate(other, "Is the red cup left?", 3)
    assert ask(image, "What is this?") == first


@pytest.mark.parametrize("mode", ["mask", "box", "plain"])
def test_a_conversation_is_its_turns_asked_with_the_history(load, tmp_path, monkeypatch, capsys, mode):
    """Typed one after the other at the prompt, or asked one by one: each answer becomes text of the history, its crop does not."""
    llava, image = load("grouped"), picture(61, 130, 2)
    rpn = RPN.load(released(tmp_path / "rpn", "grouped", 2, 3), llava)
    turns = ["What is this?", "And who is it?", "Is it red?"]
    args = infer.parser().parse_args(["x.png", "--json", "--mode", mode, "--max-new-tokens", "6"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(turns) + "\n\nnever asked\n"))
    infer.converse(llava, rpn, image, args, .5, tmp_path / "a.png")
    typed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    history = []
    for turn, line in zip(turns, typed, strict=True):
        result = answer(llava, rpn, image, turn, mode, .5, 6, history)
        assert (line["answer"], line["boxes"]) == (result.text, [list(b) for b in result.boxes])
        history.append((turn, result.text))
    last, _ = infer.ask_turns(llava, rpn, image, turns, mode, .5, 6)
    assert (last.text, last.boxes) == (result.text, result.boxes) and len({t["answer"] for t in typed}) == 3

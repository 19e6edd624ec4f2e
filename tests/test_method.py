"""The method step by step: examples to check by hand, and exactness where two roads must lead to one result.

    python -m pytest tests/test_method.py       # tiny models made from formulas; no network, no GPU
"""
import itertools
import json
import math
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
from formula import CASES, CONFIGS, NEW_TOKENS, picture, rpn_tensors
from model import LLaVA
from sdrpn import (RPN, Letterbox, Recipe, Region, answer, assign_labels, conversation, find_regions, kept_cells,
                   regions_above, remove_sink_tokens, response_attention, roi_loss, smooth, teach, upscale)
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


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cells(drawing):
    """"#." is a foreground cell and an empty one; a row per line -> (h, w) bool."""
    return torch.tensor([[c == "#" for c in row] for row in drawing.split()])


# ---- labels (Eq. 1, Eq. 2) ------------------------------------------------------------------------------------------

def test_sinks_are_strictly_longer_than_the_threshold():
    hidden = torch.tensor([[3., 4.], [3., 4.0001], [0., 0.], [-30., 40.]])
    clean = remove_sink_tokens(torch.ones(2, 4), torch.stack([hidden, 2 * hidden]), torch.tensor([[5.], [10.]]))
    assert clean.tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]  # a batch, each with a threshold of its own


def test_labels_by_hand():
    """Both thresholds are inclusive, and so is the box, here rows 1-2 and columns 1-2."""
    roi_map = torch.tensor([[.1, 0., .1001, 0., 0.],
                            [0., 1., 0., .1999, .15],
                            [0., 0., .2, 0., .1],
                            [0., 0., 0., 0., 0.],
                            [.1999, 0., 0., 0., 0.]])
    assert assign_labels(roi_map.flatten(), grid=5).view(5, 5).tolist() == [[0, 0, -1, 0, 0],
                                                                            [0, 1, -1, -1, -1],
                                                                            [0, -1, 1, 0, 0],
                                                                            [0, 0, 0, 0, 0],
                                                                            [-1, 0, 0, 0, 0]]


@pytest.mark.parametrize("corner, fraction, ignored", [((1, 2), .5, False), ((1, 3), .5, True), ((1, 3), .51, False)])
def test_a_box_over_half_the_grid_teaches_nothing(corner, fraction, ignored):
    """Foreground at (0, 0) and at the corner of a 4 x 4 grid: a box of 6 or 8 cells."""
    roi_map = torch.zeros(4, 4)
    roi_map[0, 0] = roi_map[corner] = .7
    labels = assign_labels(roi_map.flatten(), 4, max_box_fraction=fraction)
    assert (labels == 1).sum() == (0 if ignored else 2) and (labels == -1).all() == ignored


def test_labels_of_a_batch_of_turns():
    """(b, n, N) at once, against one map after the other. A map of zeros teaches nothing."""
    maps = random(3, 4, 36, seed=1).abs() ** 6
    maps[1, 2] = 0
    labels = assign_labels(maps, (4, 9), tau_fg=.25, tau_bg=.01)
    for a, got in zip(maps.view(-1, 4, 9), labels.view(-1, 4, 9)):
        want = torch.where(a <= .01 * a.max(), 0, -1)
        ys, xs = torch.where(a >= .25 * a.max())
        box = want[ys.min():ys.max() + 1, xs.min():xs.max() + 1]
        box[:] = -1
        want[ys, xs] = 1
        assert torch.equal(got, want if box.numel() < 18 else torch.full_like(want, -1))
    assert 1 < (labels == -1).all(-1).sum() < 12


def test_further_rules_of_released_recipes():
    """Padding (here the last row) is background and no maximum; a box grown by a cell; a least maximum."""
    roi_map = torch.tensor([[0., 0., 0., 0.], [0., 0., 0., .05], [.5, 0., 0., 0.], [.9, .9, .9, .9]]).flatten()
    has_picture = cells("####  ####  ####  ....")

    def labels(**rules):
        return assign_labels(roi_map, 4, has_picture=has_picture, **rules).tolist()
    own, ignored = 8 * [0] + [1] + 7 * [0], 16 * [-1]
    assert labels() == labels(min_peak=.5) == own and labels(min_peak=.51) == ignored
    assert labels(grow=1) == 4 * [0] + [-1, -1, 0, 0, 1, -1] + 6 * [0] and labels(grow=2) == ignored  # 12 cells of 16


# ---- loss (Alg. 1 line 18) ------------------------------------------------------------------------------------------

def test_loss_is_the_mean_over_labelled_tokens():
    """And so is the sum over micro-batches, divided once."""
    logits = (3 * random(5, 2, 16, seed=2)).requires_grad_()
    labels = torch.randint(-1, 2, logits.shape, generator=torch.Generator().manual_seed(3))
    labels[3] = -1  # a sample that teaches nothing
    on = labels >= 0
    want = F.binary_cross_entropy_with_logits(logits[on], labels[on].float())
    parts = sum(roi_loss(logits[i:i + 2], labels[i:i + 2], count=1) for i in (0, 2, 4))
    for got in roi_loss(logits, labels), parts / on.sum():
        assert got.shape == () and torch.allclose(got, want, rtol=1e-6)
        ours, theirs = torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits, retain_graph=True)[0]
        assert torch.allclose(ours, theirs, atol=1e-8) and not ours[~on].any()


def test_no_label_is_zero_and_still_has_a_gradient():
    logits = (50 * random(2, 1, 9)).requires_grad_()
    loss = roi_loss(logits, torch.full((2, 1, 9), -1))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


# ---- regions (Eq. 6, Eq. 7) -----------------------------------------------------------------------------------------

def slow_smooth(p):
    """The Gaussian as nine shifted copies in float64; beyond the edge, index -1 is index 1."""
    (h, w), weights, padded = p.shape, np.exp([-.5, 0, -.5]), np.pad(p.double().numpy(), 1, "reflect")
    weights /= weights.sum()
    return torch.from_numpy(sum(weights[i] * weights[j] * padded[i:i + h, j:j + w]
                                for i in range(3) for j in range(3))).float()


def test_smoothing():
    maps = random(3, 2, 6, 7, seed=4).sigmoid()
    want = torch.stack([slow_smooth(p) for p in maps.flatten(0, 1)]).view(maps.shape)
    assert torch.allclose(smooth(maps), want, atol=1e-6)


@pytest.mark.parametrize("drawing, boxes, areas", [
    ("......  .#....  ......  ....#.  ......  ......", [], []),  # specks
    ("......  ......  ..##..  ......  ......  ......", [(1, 1, 4, 4)], [2]),  # both sides grow: s = (2+4-3)//2
    ("......  ......  ..#...  ...#..  ......  ......", [(1, 1, 4, 4)], [2]),  # neighbours over the corner
    ("......  ......  ......  ......  ......  ....##", [(3, 4, 6, 6)], [2]),  # clipped, not shifted
    (".##.#.  .##.#.  ....#.  #####.  ......  ......",  # four cells stay; in order of the first cell
     [(1, 0, 3, 2), (0, 0, 5, 4)], [4, 8]),
    ("######  ######  ##....  ......  ......  ......", [(0, 0, 6, 3)], [14]),  # 225 * 36 / 576 is 14.06
    ("######  ######  ###...  ......  ......  ..##..", [(1, 4, 4, 6)], [2]),
    ("....  ....  ..##  ....  ....  ....  ....  ....  ....", [(1, 1, 4, 4)], [2])])  # a grid need not be square
def test_regions_by_hand(drawing, boxes, areas):
    """Components of a map that needs no smoothing: sizes, the border, 8 neighbours, order. Cells stay as they are."""
    mask = cells(drawing)
    found = regions_above(mask.float(), .5)
    assert [r.box for r in found] == boxes and [r.weight for r in found] == areas
    for r in found:
        x0, y0, x1, y1 = r.box
        assert r.cells[y0:y1, x0:x1].sum() == r.cells.sum() == r.weight and not (r.cells & ~mask).any()
    assert not regions_above(mask / 2, .5)  # the threshold is strict


def slow_regions(p, threshold):
    """Neighbours take each other's smaller number until nothing changes -> [(box, cells)], count of too large ones."""
    g = len(p)
    number = torch.arange(g * g).view(g, g).float()  # at last that of the first cell in raster order
    for _ in range(g * g):
        number[p <= threshold] = math.inf
        number = -F.max_pool2d(-number[None], 3, 1, 1)[0]
    number[p <= threshold] = math.inf
    found, too_large = [], 0
    for n in number.unique()[:-1]:
        part, sides = (number == n).nonzero(), []
        too_large += 576 * len(part) > 225 * g * g
        if len(part) == 1 or 576 * len(part) > 225 * g * g:
            continue
        for side in part.T.tolist():
            low, high = min(side), max(side) + 1
            if len(part) < 4 and high - low < 3:
                low = math.floor((low + high - 3) / 2)
                low, high = max(low, 0), min(low + 3, g)
            sides.append((low, high))
        (y0, y1), (x0, x1) = sides
        found.append(((x0, y0, x1, y1), part.tolist()))
    return found, too_large


@pytest.mark.parametrize("tau", [.08, .15, .3])
def test_regions_of_random_maps(tau):
    count = 0
    for seed in range(4):
        logits = 4 * random(9, 9, seed=seed) - 4
        want, too_large = slow_regions(slow_smooth(logits.sigmoid()), tau)
        assert [(r.box, r.cells.nonzero().tolist()) for r in find_regions(logits, tau)] == want
        count += len(want) + too_large
    assert count >= 4


# ---- cells and pixels -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(100, 100), (157, 94), (61, 130), (1, 50), (50, 1), (3, 7)])
def test_boxes_in_pixels(size):
    """A box holds the pixels that its cells overlap, or, beside the picture, the one at the edge. 6 x 6 cells."""
    side = max(size)
    for low, high in itertools.combinations(range(7), 2):
        want = []
        for length in size:
            pad = (side - length) // 2
            pixels = [p for p in range(length) if 6 * (pad + p + 1) > low * side and 6 * (pad + p) < high * side]
            pixels = pixels or [0 if high * side <= 6 * pad else length - 1]
            want.append((pixels[0], pixels[-1] + 1))
        (left, right), (top, bottom) = want
        assert Letterbox(size, 6).to_pixels((low, low, high, high)) == (left, top, right, bottom)


def touched(letterbox, axis, low, high):
    """Which cells along an axis overlap the pixels low..high-1, in whole numbers."""
    frame, count = letterbox.frame[axis], letterbox.cells[axis]
    pad = (frame - letterbox.picture_size[axis]) // 2
    return torch.tensor([i * frame < count * (pad + high) and (i + 1) * frame > count * (pad + low)
                         for i in range(count)])


@pytest.mark.parametrize("size, grid, frame", [
    ((157, 94), 6, (157, 157)), ((50, 1), 3, (50, 50)), ((7, 90), (6, 3), (7, 90)), ((200, 20), (5, 8), (200, 20))])
def test_cells_that_hold_a_part_of_the_picture_or_of_a_box(size, grid, frame):
    letterbox, (w, h) = Letterbox(size, grid), size
    box = w // 3, h // 4, w // 2 + 1, h // 2 + 1
    for (x0, y0, x1, y1), got in ((0, 0, w, h), letterbox.holds_picture()), (box, letterbox.cells_of([box])):
        assert torch.equal(got, touched(letterbox, 1, y0, y1)[:, None] & touched(letterbox, 0, x0, x1))
    assert letterbox.frame == frame and not letterbox.cells_of([]).any()


# ---- crops (Eq. 7, Eq. 8) -------------------------------------------------------------------------------------------

def crops_of(m, shot, regions, mode, most=2):
    crops = upscale(m, shot, Letterbox.of(m, shot), regions, mode, most)
    return crops, [crop.box for crop in crops]


def crop_features(m, shot, box):
    return m.project(m.features(preprocess_crop(shot, box, m.vision_tower.image_size)[None]))[0]  # (N, D)


@pytest.mark.parametrize("drawing, around, kept", [
    ("......  .###..  .#.#..  .###..  ......  ......", (1, 1, 4, 4), 32),  # 3 x 3 to 6 x 6: the hole loses four cells
    ("......  ......  ..##..  ......  ......  ......", (2, 2, 4, 3), 36),  # one row of two fills the crop
    ("#.....  .#....  ..#...  ...#..  ....#.  .....#", (0, 0, 6, 6), 6)])  # as large as the grid: copied
def test_masked_upscaling_keeps_the_features_under_the_mask(load, drawing, around, kept):
    """One crop around everything; the mask is stretched with it, by PIL here, and more than one half keeps a patch."""
    m, shot, mask = load("grouped"), picture(157, 157, 1), cells(drawing)
    stretched = Image.fromarray(mask.float().numpy()).crop(around).resize((6, 6), Image.BILINEAR)
    keep = torch.from_numpy(np.array(stretched) > .5)
    (crop,), boxes = crops_of(m, shot, regions_of(mask), "mask")
    assert boxes == [Letterbox(shot.size, 6).to_pixels(around)]
    assert torch.equal(crop.keep, keep) and len(crop.tokens) == keep.sum() == kept
    assert torch.allclose(crop.tokens, crop_features(m, shot, boxes[0])[keep.flatten()], atol=1e-5)


def test_the_mask_is_the_released_ones_and_keeps_all_where_it_would_keep_nothing():
    """Against torch's own bilinear resize, on boxes inside the picture and every size of a crop."""
    for seed, (side, n) in enumerate(itertools.product((1, 2, 3, 5, 8, 11), (4, 6, 12, 24))):
        mask = random(12, 12, seed=seed) > .3
        want = F.interpolate(mask[None, None, 1:1 + side, 1:1 + side].float(), (n, n), mode="bilinear")[0, 0] > .5
        got = kept_cells(Region((1, 1, 1 + side, 1 + side), mask, 1.), (n, n), Letterbox((96, 96), 12))
        assert torch.equal(got, want if want.any() else torch.ones_like(want))


def test_the_mask_is_sampled_where_the_crop_lies():
    """48 x 24 px on a 4 x 4 grid: rows 1 and 2 hold picture. A box of rows 0-2 is cut to these."""
    mask = cells("####  ####  #...  ....")
    keep = kept_cells(Region((0, 0, 4, 3), mask, 1.), (8, 8), Letterbox((48, 24), 4))
    assert torch.equal(keep, cells(4 * "########  " + "###.....  " + 3 * "##......  "))


def test_box_upscaling_takes_the_heaviest_in_raster_order(load):
    m, shot, weights = load("grouped"), picture(90, 90, 1), torch.zeros(6, 6)
    weights[0, 0:2], weights[2, 3:6], weights[4:6, 0:2] = .6, .3, .2  # 1.2, .9 and .8, though areas are 2, 3 and 4
    boxes = [(0, 0, 30, 15), (45, 30, 90, 45), (0, 60, 30, 90)]
    for most, want in (1, boxes[:1]), (2, boxes[:2]), (5, boxes):
        crops, got = crops_of(m, shot, regions_of(weights), "box", most)
        assert got == want
    assert torch.allclose(crops[1].tokens, crop_features(m, shot, boxes[1]), atol=1e-5)  # all cells of it
    weights[4:6] *= 9
    assert crops_of(m, shot, regions_of(weights), "box")[1] == [boxes[0], boxes[2]]


# ---- teacher (Sec. 3.1, Alg. 1) -------------------------------------------------------------------------------------

@pytest.mark.parametrize("H, Hkv", [(6, 2), (4, 4)])
@pytest.mark.parametrize("softmax", ["image", "sequence"])
def test_response_attention_is_what_dense_attention_says(H, Hkv, softmax):
    """Row by row: a response token sees the prompt, the response before it, and itself."""
    d, prompt, m, columns = 8, 9, 4, slice(2, 7)
    q, k = 2 * random(H, m, d, seed=5), 2 * random(Hkv, prompt + m, d, seed=6)
    want = torch.zeros(H, 5)
    for h, row in itertools.product(range(H), range(m)):
        scores = k[h * Hkv // H, :prompt + row + 1] @ q[h, row] / math.sqrt(d)
        want[h] += (scores[columns].softmax(0) if softmax == "image" else scores.softmax(0)[columns]) / m
    for dtype in torch.float32, torch.float64:
        got = response_attention(q.to(dtype), k.to(dtype), columns, prompt, softmax)
        assert torch.allclose(got, want, atol=1e-6) and got.dtype == torch.float32


def recipe(attention, softmax="image", sink=None, frozen=1):
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
    seen, frozen = [], CASES[name]["rpn"][0]

    def record(*args):
        seen.append(response_attention(*args))
        return seen[-1]
    monkeypatch.setattr(sdrpn, "response_attention", record)
    lesson = lesson_of(m, name, attention={n: None for n in range(m.depth)}, softmax=softmax, frozen=frozen)
    maps = want[f"attention.{softmax}"]
    assert torch.allclose(torch.stack(seen), maps, atol=2e-5)
    assert torch.allclose(lesson.raw[0], maps.flatten(0, 1).mean(0), atol=1e-5)
    assert torch.equal(lesson.raw, lesson.clean) and lesson.responses == [notes["text"].strip()]
    assert torch.allclose(lesson.hidden[0, want["rows"].long()], want[f"layer.{frozen - 1}"], atol=1e-4)


def between(values, share):
    """A threshold that values in float32 stay on one side of: halfway between two neighbours."""
    low, high = values.sort().values[int(share * len(values)):][:2].tolist()
    return (low + high) / 2


@pytest.mark.parametrize("name", ["plain", "turns"])
def test_recipe_heads_and_both_sink_criteria(load, name):
    """A few heads of two layers, not as many in each; sinks by hidden norm at the lowest of them, and by attention."""
    m, (want, _) = load(CASES[name]["config"]), load_golden(name)
    maps, norms, ordinary = want["attention.image"], want["hidden_norm"][1], want["attention.sequence"]
    raw = (maps[1, 0] + maps[1, 2] + maps[2, 1]) / 3
    seen = torch.cat([ordinary[0], ordinary[2, [0, 2]]]).mean(0)  # the ordinary softmax, though the map has the paper's
    longest, most = between(norms, .6), between(seen, .5)
    by_norm = dict(kind="norm", c=longest / norms.median().item())
    by_attention = dict(kind="attention", attention={0: None, 2: [0, 2]}, threshold=most * len(seen) / 576)
    for sink, sinks in (by_norm, norms > longest), (by_attention, seen >= most):
        lesson = lesson_of(m, name, attention={2: [1], 1: [2, 0]}, sink=sink)
        assert torch.allclose(lesson.raw[0], raw, atol=1e-5) and 0 < sinks.sum() < len(sinks)
        assert torch.allclose(lesson.clean[0], raw.masked_fill(sinks, 0.), atol=1e-5)


def imitate(monkeypatch, m, rows, token, scale):
    """From now on these rows of the head are that of `token`, scaled: they win where it would have."""
    head = m.lm_head.weight.detach().clone()
    head[rows] = scale * head[token]
    monkeypatch.setitem(m.lm_head._parameters, "weight", torch.nn.Parameter(head, requires_grad=False))


@pytest.mark.parametrize("config, softmax, threshold", [("grouped", "image", 9e-4), ("shared", "sequence", 3.7e-4)])
def test_a_batch_teaches_what_single_samples_do(load, monkeypatch, decoded, config, softmax, threshold):
    """Answers that end at different steps: each row of the batch keeps its own queries and keys to its own end.

    The rows are the tokens fed back: not the last of an answer that was cut.
    """
    m = load(config, "float64")
    sink = {"kind": "attention", "attention": {0: None}, "threshold": threshold}  # no map has a value near it
    how = recipe({1: [0, 2], 2: [1]}, softmax, sink, frozen=2)
    pixels = torch.stack([m.pixels(picture(40 + 13 * k, 90 - 7 * k, k + 1)) for k in range(6)])
    prompts = [m.prompt_ids(f"What is {k}?") for k in range(6)]
    assert not teach(m, how, pixels, prompts, max_new_tokens=1).raw.any()
    teach(m, how, pixels, prompts, max_new_tokens=10)
    free = decoded.pop()[1]

    def ends(token):
        return [answer.index(token) if token in answer else 10 for answer in free]
    token = max({*itertools.chain(*free)}, key=lambda i: (0 in ends(i), len(set(ends(i)))))
    imitate(monkeypatch, m, EOS, token, 1.001)
    batch = teach(m, how, pixels, prompts, max_new_tokens=10)
    answers = decoded.pop()[1]
    assert answers == [a[:n] for a, n in zip(free, ends(token))] and {0, 10} < {*map(len, answers)}
    for i in range(6):
        one = teach(m, how, pixels[i:i + 1], prompts[i:i + 1], max_new_tokens=10)
        assert one.responses == [batch.responses[i]]
        for name in "raw", "clean", "hidden":
            assert torch.allclose(getattr(one, name)[0], getattr(batch, name)[i], atol=1e-6)
    raw, clean = slow.maps(m, how, pixels, prompts, [a[:9] for a in answers])  # the same rows, from whole matrices
    assert torch.allclose(raw.float(), batch.raw, atol=1e-6) and torch.allclose(clean.float(), batch.clean, atol=1e-6)
    assert (clean != raw).any() and clean.any()
    ended = [not answer for answer in answers]  # the first token was EOS
    assert not batch.raw[ended].any() and (assign_labels(batch.clean, m.grid)[ended] == -1).all()


# ---- words ----------------------------------------------------------------------------------------------------------

def test_eos_ends_an_answer_and_is_no_part_of_it(load, monkeypatch, decoded):
    m, shot = load("grouped"), picture(90, 53, 3)
    m.generate(shot, "What is this?", 12)
    free = decoded[-1][1][0]
    end = free.index(free[7])
    imitate(monkeypatch, m, EOS, free[7], 1.001)
    text = m.generate(shot, "What is this?", 12)
    assert decoded[-1][1] == [free[:end]] and end > 0 and text == m.tokenizer.decode(free[:end]).strip()
    imitate(monkeypatch, m, EOS, free[0], 1.001)
    assert m.generate(shot, "What is this?", 12) == ""


def test_rows_of_the_head_without_a_piece_are_never_chosen(load, monkeypatch, decoded):
    m, shot = load("grouped"), picture(90, 53, 3)
    m.generate(shot, "What is this?", 8)
    hidden, [free] = decoded[-1]
    pieces = m.tokenizer.get_piece_size()
    imitate(monkeypatch, m, slice(pieces, None), free[0], 2)
    m.generate(shot, "What is this?", 8)
    assert m.head(hidden).argmax() >= pieces and decoded[-1][1] == [free]


def test_a_prompt_beyond_the_models_positions_is_refused(load):
    """Also where only the crop makes it too long: the prompt and its answer just fit, 9 tokens more do not."""
    m, shot, question = load("plain"), picture(90, 53, 3), "What is this? " * 40
    room = 512 - (len(m.prompt_ids(question)) - 1 + 9)
    answer(m, None, shot, question, max_new_tokens=room, regions=[])
    with pytest.raises(BadInput, match="need 513 tokens, the model has room for 512; shorten the question"):
        m.generate(shot, question, room + 1)
    with pytest.raises(BadInput, match="need 521 tokens"):
        answer(m, None, shot, question, max_new_tokens=room, regions=regions_of(torch.ones(3, 3)))


# ---- student (Eq. 3-5) ----------------------------------------------------------------------------------------------

def released(folder, name, filled=False):
    """A case's RPN as its authors publish it: config.json and whole blocks. Filled: among other tensors, in shards."""
    frozen, layers = CASES[name]["rpn"]
    facts = {"model_type": "llava_llama", "twig_K": frozen, "twig_T": layers}
    (folder / "config.json").write_text(json.dumps(facts))
    found = rpn_tensors(CONFIGS[CASES[name]["config"]], layers)
    if not filled:
        save_file(found, folder / "model.safetensors")
        return folder
    for other in "twig_head.weight", "lm_head.weight", "model.norm.weight", "model.mm_projector.0.weight":
        found[other] = torch.ones(2, 2)
    files = {key: f"{n % 2}.safetensors" for n, key in enumerate(found)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for file in "0.safetensors", "1.safetensors":
        save_file({key: found[key] for key in found if files[key] == file}, folder / file)
    return folder


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_released_rpn_scores_as_the_reference(load, tmp_path, name, filled):
    """Other tensors change nothing: the backbone's, twig_head, and v, o and MLP of the last block, which we lack."""
    case, (want, _), m = CASES[name], load_golden(name), load(CASES[name]["config"])
    rpn = RPN.load(released(tmp_path, name, filled), m)
    got = rpn(m, picture(*case["picture"]), case["question"], case["history"])
    assert got.dtype == torch.float32 and (got.flatten() - want["rpn.own"][-1]).abs().max() < 1e-4
    assert not any(p.requires_grad for p in rpn.parameters()) and rpn.tau == .15


@pytest.mark.parametrize("entry, value, message", [
    ("twig_K", None, "no entry 'twig_K'"), ("twig_T", 4, "Missing key.*twig_layers.3"),
    ("model_type", "qwen2_5_vl", "model_type = qwen2_5_vl is not supported")])
def test_a_wrong_rpn_is_refused(load, tmp_path, entry, value, message):
    path = released(tmp_path, "grouped") / "config.json"
    facts = json.loads(path.read_text()) | {entry: value}
    path.write_text(json.dumps({name: fact for name, fact in facts.items() if fact}))
    with pytest.raises(BadInput, match=message) as caught:
        RPN.load(tmp_path, load("grouped"))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_our_own_file(load, tmp_path):
    """Saved and read again it scores the same, and carries its tau; of other weights it is refused."""
    m, other, path, shot = load("grouped"), load("plain"), tmp_path / "rpn.safetensors", picture(61, 130, 2)
    rpn = RPN.from_layers(load("grouped", "float64"), frozen=2, layers=3)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in rpn.parameters())
    rpn.save(path, {"frozen": 2, "layers": 3, "fingerprint": m.fingerprint, "ckpt": "grouped", "tau": .3})
    assert all(name.startswith("model.twig_") for name in load_file(path))
    for place in path, tmp_path:  # the file, or the folder of a run
        again = RPN.load(place, m)
        assert torch.allclose(again(m, shot, "What is this?"), rpn(m, shot, "What is this?"), atol=1e-5)
        assert again.path == path and again.tau == .3
    with pytest.raises(BadInput, match=f"trained for another checkpoint.*{m.fingerprint}.*{other.fingerprint}"):
        RPN.load(path, other)
    with pytest.raises(BadInput, match="both at least 1, together at most the model's 6 layers"):
        RPN.from_layers(m, frozen=4, layers=3)


def test_all_turns_in_one_pass(load, tmp_path):
    """Eq. 4: a query row per turn, the ':' before its answer; its scores are those of the conversation cut there."""
    case, (want, _), m = CASES["turns"], load_golden("turns"), load("grouped", "float64")
    (first, response), = case["history"]
    turns, responses = [first, case["question"]], [response, "what comes after the last question is not read"]
    rpn, shot = RPN.load(released(tmp_path, "turns"), m), picture(*case["picture"])
    ids, rows = conversation(m, turns, responses, (6, 6))
    embeds, columns, rope, _ = slow.sequence(m, ids, m.pixels(shot)[None])
    whole = ids[:columns.start] + 36 * [m.config.image_token] + m.tail(ids)
    assert whole == want["input_ids"].tolist() and all(m.tokenizer.id_to_piece(whole[r]).endswith(":") for r in rows)
    scores = rpn.score(m.run(embeds, 0, 2, rope), columns, rows, rope)[0].mean(0).float()  # (n, N)
    assert torch.allclose(scores, want["rpn.own"], atol=1e-4)
    for n in range(2):
        alone = rpn(m, shot, turns[n], list(zip(turns[:n], responses)))
        assert torch.allclose(scores[n], alone.flatten(), atol=1e-6)


# ---- two-stage answers (Sec. 3.4) -----------------------------------------------------------------------------------

def two_blobs(g):
    """Far corners: two regions of two cells each, with a gap even on a 3 x 3 grid."""
    mask = torch.zeros(g, g)
    mask[0, :2] = mask[-1, -2:] = 1
    return regions_of(mask)


def entering(m, widths):
    """Note how many tokens enter layer 0 in each call, decoding left out."""
    def note(module, args):
        if args[0].shape[1] > 1:
            widths.append(args[0].shape[1])
    return m.language_model.layers[0].register_forward_pre_hook(note)


@pytest.mark.parametrize("way, mode, history", [
    ("two blobs", "mask", ()), ("two blobs", "box", HISTORY), ("no region", "mask", ()),
    ("own map", "mask", HISTORY[:1]), ("own map", "box", ())])
@pytest.mark.parametrize("name, dtype, close", [("plain", "float64", 1e-9), ("grouped", "float64", 1e-9),
                                                ("shared", "float32", 1e-4)])
def test_stage_two_need_not_start_over(load, tmp_path, decoded, name, dtype, close, way, mode, history):
    """[system][image] is not run again, and nothing changes: one function, to rounding."""
    case, m, widths = CASES[name], load(name, dtype), []
    (g, _), question, shot = m.grid, case["question"], picture(*case["picture"])
    rpn = RPN.load(released(tmp_path, name), m)
    how = {"mode": mode, "history": history, "max_new_tokens": 8}
    if way == "own map":  # it means nothing here: take some threshold at which it has regions
        p = smooth(rpn(m, shot, question, history).sigmoid() * Letterbox.of(m, shot).holds_picture())
        how["tau"] = between(p.flatten(), .75)
    else:
        how["regions"] = two_blobs(g) if way == "two blobs" else []
    hook = entering(m, widths)
    fast = answer(m, rpn, shot, question, **how)
    hook.remove()
    scratch = slow.answer(m, rpn, shot, question, **how)
    (ours, ids), (reference, wanted) = decoded
    assert ids == wanted and fast.text == scratch.text and fast.boxes == scratch.boxes and len(ids[0]) == 8
    assert torch.allclose(ours, reference, rtol=0, atol=close) and ours.dtype == getattr(torch, dtype)
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(fast.crops, scratch.crops, strict=True))
    ids = m.prompt_ids(question, history)
    P, t, n = ids.index(m.config.image_token) + g * g, len(m.tail(ids)), sum(len(crop.tokens) for crop in fast.crops)
    assert widths == ([P, t, n + t] if n else [P, t]) and bool(n) == (way != "no region")


LONG = "Is the red cup left of 12 books? And what color is the car that is behind it, dark blue?"


@pytest.mark.parametrize("name", ["plain", "grouped", "shared"])
def test_questions_on_one_prefix_are_questions_asked_alone(load, tmp_path, decoded, monkeypatch, name):
    """In any order of modes, lengths and histories, with the teacher in between: equal to 1e-9 in float64."""
    case, m, widths = CASES[name], load(name, "float64"), []
    rpn, shot = RPN.load(released(tmp_path, name), m), picture(*case["picture"])
    how, pixels = recipe({0: None, 1: [0]}, sink={"kind": "norm", "c": 1.}, frozen=rpn.frozen), m.pixels(shot)[None]
    prefix = m.prefill(pixels, keep=sdrpn.prefix_layers(how))
    hook = entering(m, widths)
    for question, mode, history in [("What is this?", "mask", ()), (LONG, "box", HISTORY), ("What?", "plain", ()),
                                    (LONG, "teacher", ()), ("No?", "mask", ()), ("Who?", "teacher", ())]:
        widths.clear()
        prompt = m.prompt_ids(question, history)
        if mode == "teacher":
            one, two = (teach(m, how, pixels, [prompt], 4, behind) for behind in (prefix, None))
            for field in "raw", "clean", "hidden", "rope":
                assert torch.allclose(getattr(one, field), getattr(two, field), rtol=0, atol=1e-9)
        else:
            regions = None if question == "No?" else [] if mode == "plain" else two_blobs(m.grid[0])
            rest = dict(max_new_tokens=4, history=history, tau=.5, regions=regions)
            assert answer(m, rpn, shot, question, mode, prefix=prefix, **rest).prefix is prefix
            slow.answer(m, rpn, shot, question, mode, **rest)
        assert widths[0] == len(m.tail(prompt))
        (ours, ids), (reference, wanted) = decoded[-2:]
        assert ids == wanted and torch.allclose(ours, reference, rtol=0, atol=1e-9)
    hook.remove()
    with pytest.raises(ValueError, match="another picture"):
        answer(m, rpn, picture(9, 9, 1), "x", prefix=answer(m, rpn, shot, "x").prefix)
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
    answer(m, None, shot, "What is this?", max_new_tokens=3, regions=two_blobs(6))
    assert (True, False, False) in calls and (False, True, True) in calls  # behind the prefix; prefill and decoding
    assert not any(mask and grouped for mask, grouped, _ in calls)


@pytest.mark.parametrize("mode, history, boxes", [
    ("mask", HISTORY, [(0, 0, 157, 94)]), ("box", (), [(0, 0, 53, 1), (52, 21, 105, 74)])])
def test_the_crop_stands_right_behind_the_image(load, decoded, mode, history, boxes):
    """Put together by hand: [system][image][crop][all turns], through all layers once. The crop is the question's."""
    m, shot = load("grouped", "float64"), picture(157, 94, 1)
    regions = regions_of(cells("##....  ......  ..##..  ..#...  ......  ....##"))
    got = answer(m, None, shot, "What is this?", mode, max_new_tokens=1, history=history, regions=regions)
    assert got.boxes == boxes
    crops = [crop_features(m, shot, crop.box)[crop.keep.flatten()] for crop in got.crops]
    ids = m.prompt_ids("What is this?", history)
    at = ids.index(m.config.image_token)
    image = m.project(m.features(m.pixels(shot)[None]))
    embeds = torch.cat([m.embed(ids[:at]), image, torch.cat(crops)[None], m.embed(ids[at + 1:])], 1)
    want = m.run(embeds, 0, 6, m.text_rope(0, embeds.shape[1]))[:, -1]
    assert torch.allclose(decoded[0][0], want, atol=1e-9)
    assert decoded[0][1] == [[m.head(want)[0, :400].argmax().item()]]


def test_plain_is_generate_and_so_is_an_answer_without_a_region(load):
    m, shot, how = load("grouped"), picture(157, 94, 1), dict(max_new_tokens=8, history=HISTORY)
    text = m.generate(shot, "What is this?", **how)
    plain = answer(m, None, shot, "What is this?", "plain", **how)
    nothing = answer(m, None, shot, "What is this?", regions=[], **how)
    assert plain.text == nothing.text == text and plain.boxes == nothing.boxes == [] and nothing.logits is None


@pytest.mark.parametrize("turned", [False, True])
def test_regions_lie_in_the_picture_not_in_its_padding(load, turned):
    """Rows 2 and 3 hold pixels: what the map says of others is gone before smoothing, so it can not leak."""
    def ask(logits):
        rpn = SimpleNamespace(frozen=2, tau=.25, logits=lambda *args: logits.T if turned else logits)
        shot = picture(20, 200, 1) if turned else picture(200, 20, 1)
        return answer(load("grouped"), rpn, shot, "What?", max_new_tokens=2).boxes
    padding, left = torch.full((6, 6), -20.), torch.full((6, 6), -20.)
    padding[[0, 1, 4, 5], 0] = left[:, :2] = 20.
    assert find_regions(padding, .25) and ask(padding) == []
    assert ask(left) == [(0, 0, 20, 67) if turned else (0, 0, 67, 20)]


def test_numbers_that_are_not_finite_are_errors(load, monkeypatch):
    m, shot = load("grouped"), picture(90, 53, 3)
    rpn = RPN.from_layers(m, 2, 2).requires_grad_(False)
    rpn.twig_norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="its map is not finite in float32; try --dtype"):
        answer(m, rpn, shot, "What is this?")
    imitate(monkeypatch, m, 5, 5, math.nan)
    with pytest.raises(FloatingPointError, match="the model's logits are not finite in float32; try --dtype"):
        m.generate(shot, "What is this?")

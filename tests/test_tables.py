"""tables.py and what it stands on: pure functions on cases worked out by hand, every command on a tiny model."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import ablations
import heads
import model
import peers
import plots
import qwen_formula
import sdrpn
import tables
import train
from calls import call, one_line, question_file, write_rows
from formula import CONFIGS, picture, write_checkpoint
from sdrpn import Letterbox, Recipe, load_recipe, teach


def block(grid, rows, columns, value=1.0):
    cells = torch.zeros(grid)
    cells[slice(*rows), slice(*columns)] = value
    return cells


TRAINING = dict(samples=4, lr=1e-3, warmup=0.1, betas=[0.9, 0.98], epochs=1, batch_size=2, grad_accum=1, clip=1.0,
                held_out=5, data="toy scenes")
SINK = dict(kind="norm", c=1.1)
RECIPE = dict(attention={"2": [0]}, sink=SINK, frozen_layers=2, rpn_layers=2, train=TRAINING,
              kinds={"Wha": {"sink": SINK}})


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("tables") / "tiny", CONFIGS["grouped"])
    weights = load_file(folder / "model.safetensors")
    for layer in (2, 3):  # sharp attention: flat maps have no labels
        weights[f"language_model.model.layers.{layer}.self_attn.q_proj.weight"] *= 8
    save_file(weights, folder / "model.safetensors")
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    return folder


@pytest.fixture(scope="module")
def tiny(ckpt):
    return model.load(ckpt, "cpu")


# ---- ViCrop: cells of 10 px; windows of 20 to 40 px are 2, 2, 2, 3, 3, 4 cells wide

@pytest.mark.parametrize("rows, columns, size, grid, box", [
    # 2 x 2 cells: sum 4, all four neighbours 2, so (4 - 2) / 4 beats every wider window
    ((1, 3), (3, 5), (60, 60), (6, 6), (30, 10, 50, 30)),
    # 3 x 3: (9 - 6) / 9 at r = 1.6 beats (4 - 3) / 4 at r = 1; 32 px around (25, 25)
    ((1, 4), (1, 4), (60, 60), (6, 6), (9, 9, 41, 41)),
    # 10 px of padding above: the centre (40, 20) of the square is (40, 10)
    ((1, 3), (3, 5), (60, 40), (6, 6), (30, 0, 50, 20)),
    # the centre lies on the picture's edge: shifted inside
    ((4, 6), (0, 2), (60, 40), (6, 6), (0, 20, 20, 40)),
    # a grid that follows the picture has no padding
    ((1, 3), (3, 5), (60, 40), (4, 6), (30, 10, 50, 30))])
def test_vicrop_window(rows, columns, size, grid, box):
    assert peers.vicrop_window(block(grid, rows, columns), Letterbox(size, grid), 20) == box


@torch.no_grad()
def test_vicrop_reads_the_last_rows_attention_of_one_layer(tiny):
    pixels, layer = tiny.pixels(picture(61, 130, 2))[None], 3
    prefix = tiny.prefill(pixels, keep=[0, layer], depth=layer)
    tail = tiny.embed(tiny.tail(tiny.prompt_ids("What is this?")))
    rope = torch.cat([prefix.rope, tiny.text_rope(prefix.position, tail.shape[1])], 1)
    whole = peers.all_maps(tiny, torch.cat([prefix.hidden[0], tail], 1), rope)[layer][0, :, -1].mean(0)
    row = peers.attention_to_image(tiny, prefix, "What is this?", layer)
    assert torch.allclose(row, whole[prefix.columns], atol=1e-5)


def test_vicrop_answers_like_a_crop_of_the_same_box(tiny, monkeypatch):
    monkeypatch.setattr(peers, "vicrop_window", lambda *how: (54, 18, 90, 54))
    result = peers.vicrop(tiny, picture(108, 108, 1), "What is this?", 2, 4)  # cells of 18 px
    region = sdrpn.Region((3, 1, 5, 3), torch.ones(6, 6, dtype=torch.bool), 1.0)
    same = sdrpn.answer(tiny, None, picture(108, 108, 1), "What is this?", "box", max_new_tokens=4, regions=[region])
    assert result.boxes == [(54, 18, 90, 54)] == same.boxes and result.text == same.text


# ---- ablations

def test_the_regressions_target_is_the_raw_map():
    raw = torch.tensor([[0.1, 0.3], [0.0, 0.0]])
    targets = ablations.raw_targets(SimpleNamespace(raw=raw), None)
    assert torch.allclose(targets, torch.tensor([[25.0, 75.0], [-1.0, -1.0]]))  # no response: nothing to learn
    scores = torch.log(torch.tensor([[[0.2, 0.8]], [[0.4, 0.6]]]))[None].expand(2, -1, -1, -1)  # mean .3, .7
    assert ablations.regression_loss(scores, targets[:, None]).item() == pytest.approx(5 ** 2 + 5 ** 2, rel=1e-4)


def test_presmoothed_labels_are_wider_and_the_rpns_map_is_left_alone():
    clean = block((6, 6), (2, 3), (2, 3)).flatten()  # one cell; its neighbours are .2042 / .1238 of it, smoothed
    sample = SimpleNamespace(has_picture=torch.ones(6, 6, dtype=torch.bool), recipe=Recipe(**RECIPE))
    lesson = sdrpn.Lesson(None, None, clean[None], None, None, None)
    assert (train.make_targets(lesson, [sample]) == 1).sum() == 1
    assert (ablations.smoothed_targets(lesson, [sample]) == 1).sum() == 9
    logits = torch.full((6, 6), -9.0)
    logits[2, 2:4] = 9.0
    with ablations.asking(ablations.PRESMOOTHED):
        assert sdrpn.find_regions(logits)[0].cells.sum() == 2
    assert sdrpn.find_regions(logits)[0].cells.sum() > 2


def test_fed_answers_give_the_maps_of_decoded_ones(tiny, monkeypatch):
    pixels = torch.stack([tiny.pixels(picture(61, 130, n)) for n in (2, 3)])
    how, decode, said = (tiny, Recipe(**RECIPE), pixels, [tiny.prompt_ids("What is this?")] * 2, 6), tiny.decode, []

    def listen(*how):
        said.extend(decode(*how))
        del said[1][2:]  # as if it had ended there
        return said

    def feed(last_hidden, cache, column, position, most):
        ablations.feed(tiny, [ids[:most - 1] for ids in said], cache, column, position)
        return said
    monkeypatch.setattr(tiny, "decode", listen)
    own = teach(*how)
    monkeypatch.setattr(tiny, "decode", feed)
    given = teach(*how)
    assert len(said[0]) == 6 and torch.allclose(given.raw, own.raw, atol=1e-5)
    assert tiny.detokenize(ablations.answer_ids(tiny, "What is this?", "a cat")) == "a cat"


# ---- heads: two layers of two heads on a grid of 6, the box at another place in each question

PLACES = [(0, 0), (0, 2), (0, 4), (2, 0), (2, 4), (4, 0), (4, 2), (4, 4)] * 2


def made_up():
    """1.0 holds about 80 % in the box, 0.1 all on a corner, 0.0 and 1.1 look everywhere alike."""
    seen = []
    for n, (y, x) in enumerate(PLACES):
        inside = block((6, 6), (y, y + 2), (x, x + 2)).bool().flatten()
        maps = torch.full((2, 2, 36), 1 / 36)
        maps[1, 0] = torch.where(inside, (0.8 + 0.01 * (n % 3)) / 4, 0.2 / 32)
        maps[0, 1] = 0
        maps[0, 1, 0] = 1
        seen.append(heads.Seen(maps, torch.full((2, 2), 0.5), torch.ones(2, 36), (6, 6), inside))
    return seen


def test_a_gaze_head_holds_more_in_the_true_box_than_in_others():
    seen = made_up()
    assert heads.head_scores(seen)[1, 0] == pytest.approx(0.8, abs=0.01)
    assert heads.beats_chance(seen).tolist() == [[False, False], [True, False]]
    for one in seen:  # always the same place, where it happens to be: above the area's share, and still chance
        one.inside = block((6, 6), (0, 2), (0, 2)).bool().flatten()
    assert heads.head_scores(seen)[0, 1] == 1 and not heads.beats_chance(seen).any()


def test_the_heads_that_make_the_best_labels_are_chosen():
    seen = made_up()
    assert heads.choose(seen, heads.beats_chance(seen)) == ([(1, 0)], math.inf)
    for one, (y, x) in zip(seen, PLACES):  # a sink outweighs the object, five times the median norm
        far = 35 if (y, x) != (4, 4) else 0
        one.maps[1, 0, far], one.norms[1, far] = 0.9, 5.0
    assert heads.choose(seen, heads.beats_chance(seen)) == ([(1, 0)], 4.0)  # the largest c that removes it


def test_a_layer_that_parks_is_named():
    seen = made_up()
    for one in seen:
        one.norms[0, 0] = 3.0  # where head 0.1 lies; the other head of the layer has 1/36 there
    # longest norm, long tokens in %, attention on them in %
    assert heads.parking(seen).T.tolist() == [pytest.approx([3, 100 / 36, 100 * (1 + 1 / 36) / 2]), [1, 0, 0]]
    assert "layers that park on sinks: 0 " in "\n".join(heads.report(seen))


def test_every_heads_map_is_what_the_teacher_averages(tiny):
    image, q = picture(61, 130, 2), {"question": ["What is this?"], "boxes": [[0, 0, 61, 20]]}
    recipe = Recipe(**RECIPE | {"attention": {"2": None, "3": [0, 1]}})
    seen = heads.observe(tiny, recipe, image, q, 4)
    lesson = teach(tiny, recipe, tiny.pixels(image)[None], [tiny.prompt_ids("What is this?")], 4)
    pool = torch.cat([seen.maps[2], seen.maps[3, :2]]).mean(0)
    assert torch.allclose(pool, lesson.raw[0], atol=1e-6)
    assert torch.allclose(heads.without_sinks(pool, seen.norms[2], 1.1), lesson.clean[0], atol=1e-6)
    assert seen.inside.nonzero().flatten().tolist() == [1, 2, 3, 4]  # of 6 x 6; 34 px of padding beside it


# ---- numbers

def row(*results):
    found = {}
    for n, (seed, name, kind, score) in enumerate(results):
        found[n] = {"seed": seed, "id": name, "kind": kind, "score": score}
    return tables.Row("", "", results=found)


def test_means_ranges_and_intervals():
    got = row((0, "a", "word", 100), (0, "b", "word", 0), (0, "c", "same", 100),
              (1, "a", "word", 100), (1, "b", "word", 100), (1, "c", "same", 100))
    plain = row((0, "a", "word", 0), (0, "b", "word", 0), (0, "c", "same", 0))  # asked once
    assert tables.over_seeds(got, "score", ["word"]) == (75, 25)  # seeds 50 and 100
    assert tables.over_seeds(plain, "score", ["word"]) == (0, None)  # one seed: no range
    assert tables.change(got, plain, ["word"]) == "+75.0 ±49.0"  # a 100, b 50: 1.96 x 35.36 / 2 ** .5


def test_figure_3_counts_tokens_by_their_share_of_the_maximum():
    inside = torch.tensor([True, False, False, True])
    shares, counts = tables.fig3_bins(torch.tensor([1.0, 0.5, 0.0, 0.08]), inside)
    assert [counts[k] for k in (0, 1, 7, 11)] == [1, 1, 1, 1] and sum(counts) == 4
    assert [shares[k] for k in (0, 1, 7, 11)] == [0, 100, 0, 100]


def test_labels_of_points_do_not_cover_each_other():
    taken, pen = [], plots.Axes((0, 1), (0, 1), "", "", "").pen
    for n in range(12):
        plots.write_beside(pen, 900, 500 + n, f"{n} {n}", taken)
    for left, top, right, bottom in taken:
        assert sum(left < c and a < right and top < d and b < bottom for a, b, c, d in taken) == 1  # itself
    assert len(taken) == 12


def test_two_answer_files_are_compared_question_by_question(tmp_path):
    for name, scores in ("a", [0, 0, 1, 1]), ("b", [1, 1, 0, 1]):
        rows = []
        for n, score in enumerate(scores):
            rows.append({"image": "x.png", "question": [n], "scores": {"plain": 0.5, "two_stage": score}})
        write_rows(tmp_path / name, rows)
    code, out, _ = call(tables, "compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert code == 0 and "plain, of 4 questions" in out and "won 0 and lost 0" in out
    assert f"{tmp_path / 'b'} won 2 and lost 1 against {tmp_path / 'a'}; +25.0 ± 93.8 points" in out
    one_line(tables, "compare", tmp_path / "a", tmp_path / "none", says="name two files")


# ---- the commands, on random weights

def run(what, ckpt, *flags):
    code, out, err = call(tables, what, "--ckpt", ckpt, "--out", ckpt.parent / "out", "--count", 1, "--seeds", 0,
                          "--max-new-tokens", 3, "--device", "cpu", *flags)
    assert code == 0, err
    return out, err


def test_table3_trains_each_row_once(ckpt):
    out, err = run("table3", ckpt, "--without", "exist", "--fresh")
    rows = [line for line in out.splitlines() if line.startswith(("plain", "#", "true box"))]
    assert [line.split()[0] for line in rows] == [
        "plain", "#1", "#2", "#3", "#4", "#5", "true", "#1", "#2", "#3", "#4", "#5", "true", "#2", "#3", "#4", "#5"]
    assert rows[2].endswith("+5.3") and "no exist" in out
    assert err.count("step 1/") == 3  # #4 and #5 share a run
    runs = ckpt.parent / "out/tiny"
    settings = {p.name: json.loads((p / "config.json").read_text()) for p in runs.iterdir()}
    assert {name: own["ablation"] for name, own in settings.items()} == {
        "seed-0-none": "none", "seed-0-raw-map-mean-squared-error": "raw map, mean squared error",
        "seed-0-sinks-kept": "sinks kept"}
    kept = settings["seed-0-sinks-kept"]
    assert settings["seed-0-none"]["sink"] and kept["sink"] is kept["kinds"]["Wha"]["sink"] is None
    assert (ckpt.parent / "out/table3.txt").read_text() == out + "\n"


@pytest.mark.parametrize("what, value, name", [
    ("table4a", 1, "seed-0-frozen_layers-1-none"), ("table4b", 2, "seed-0-the-data-set-s-answers"),
    ("table7", 1, "seed-0-rpn_layers-1-none"), ("table8", 0, "seed-0-labels-of-the-smoothed-map")])
def test_sweeps(ckpt, what, value, name):
    run(what, ckpt, "--values", value)
    trained = ckpt.parent / "out/tiny" / name
    assert (trained / "rpn.safetensors").is_file()
    if what == "table4b":
        labels = sdrpn.Checkpoint(next((trained / "labels").iterdir()), [])
        given = [text for texts in json.loads(labels.metadata["responses"]).values() for text in texts]
        answers = [a for n in range(4) for a in tables.ToyQuestions("train/0", 4)[n][1]["answers"]]
        assert all(any(a.startswith(text) for a in answers) for text in given) and any(given)


def test_tau_of_a_file_is_asked_once_and_has_no_range(tiny, ckpt, tmp_path, monkeypatch):
    questions, asked, timed, rpn = question_file(tmp_path, 2), [], tables.timed, tmp_path / "rpn.safetensors"
    monkeypatch.setattr(tables, "timed", lambda *how: asked.append(how[6].name) or timed(*how))
    sdrpn.RPN.from_layers(tiny, 2, 2).save(rpn, {"frozen": 2, "layers": 2})
    out, _ = run("fig5", ckpt, "--eval", questions, "--rpn", rpn, "--values", 0.1, 0.5, "--seeds", 0, 1, "--count", 2)
    assert "2 questions of questions.jsonl" in out and "mask 0.5" in out and "\ntrue box" in out
    assert asked.count("plain") == asked.count("mask 0.5") == 3  # a warm-up, then each question
    assert "±" not in out.split("\n\n")[0]
    assert (ckpt.parent / "out/fig5.png").is_file()


def test_heads_of_random_weights_are_no_better_than_chance(ckpt, tmp_path):
    one_line(tables, "heads", "--ckpt", ckpt, "--max-new-tokens", 3, "--device", "cpu", "--out", tmp_path, "--count", 4,
             says="no head beats chance")
    assert "gaze heads: 0 of 36" in (tmp_path / "heads.txt").read_text()


def test_without_boxes_heads_prints_a_recipe_that_loads_and_needs_none(tmp_path):
    folder, questions = write_checkpoint(tmp_path / "bare", CONFIGS["grouped"]), tmp_path / "q.jsonl"
    picture(70, 50, 1).save(tmp_path / "a.png")
    write_rows(questions, [{"image": "a.png", "question": f"What is {n}?"} for n in range(8)])
    out, _ = run("heads", folder, "--eval", questions, "--count", 8)
    (folder / "recipe.json").write_text(out[out.index("{"):])
    recipe = load_recipe(folder)  # B and R in LLaVA-1.5's proportion
    assert (recipe.frozen_layers, recipe.rpn_layers, recipe.sink.kind, recipe.sink.c) == (3, 3, "norm", 4.0)
    assert "nothing tells these heads from chance" in out
    assert tables.bare_recipe(24, {"frozen_layers": 9, "rpn_layers": 3, "note": "as published"}).frozen_layers == 9
    one_line(tables, "fig3", "--ckpt", folder, "--eval", questions, "--device", "cpu", "--out", tmp_path,
             says="no question has both a true box")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tiny Qwen2.5-VL, whose grid follows the picture, and a recipe with kinds of questions."""
    folder = tmp_path_factory.mktemp("qwen") / "tiny-qwen"
    qwen_formula.write_checkpoint(folder, qwen_formula.TINY["tied"], budget=(20 * 784, 60 * 784))
    natural = dict(attention={"1": [0]}, request="Give the box.", sink=dict(kind="norm", c=1.5))
    recipe = RECIPE | dict(square=True, budget=[30 * 784, 30 * 784], kinds={"Wha": natural, "Is ": {}},
                           train=TRAINING | {"data": None})
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


@pytest.mark.parametrize("what, flags, says", [
    ("fig5", ["--budget", 15680, 15680, "--budget", 47040, 47040], "SD-RPN 60"),
    ("table3", [], "#5 masked"), ("peers", [], "ViCrop rel-att"), ("fig3", [], "sinks removed: inside")])
def test_a_family_whose_grid_follows_the_picture(qwen, monkeypatch, what, flags, says):
    monkeypatch.setattr(sdrpn, "assign_labels", lambda roi_map, *how, **more: (roi_map > roi_map.median()).long())
    questions = question_file(qwen.parent, 6)
    out, _ = run(what, qwen, "--data", questions, "--eval", questions, "--samples", 2, "--dtype", "float32", *flags)
    assert says in out

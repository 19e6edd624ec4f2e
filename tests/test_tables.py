"""Checks of tables.py and what it stands on: pure functions on cases worked out by hand, commands on a tiny LLaVA.

    python -m pytest tests/test_tables.py      # seconds on one core
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "golden")]

import ablations  # noqa: E402
import heads  # noqa: E402
import peers  # noqa: E402
import sdrpn  # noqa: E402
import tables  # noqa: E402
import train  # noqa: E402
from clip import BadInput  # noqa: E402
from formula import CONFIGS, picture, write_checkpoint  # noqa: E402
from model import KVCache, load  # noqa: E402
from sdrpn import Letterbox, load_recipe, teach  # noqa: E402


def block(grid, rows, columns, value=1.0):
    cells = torch.zeros(grid)
    cells[slice(*rows), slice(*columns)] = value
    return cells


TRAINING = dict(samples=4, lr=1e-3, warmup=0.1, betas=[0.9, 0.98], epochs=1, batch_size=2, grad_accum=1, clip=1.0,
                held_out=5, data="toy scenes")
RECIPE = dict(attention={"2": [0]}, softmax="image", sink=dict(kind="norm", c=1.1), frozen=2, layers=2,
              tau=0.15, train=TRAINING)


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
    return load(ckpt, "cpu")


# ---- ViCrop: cells of 10 px; windows of 20 to 40 px are 2, 2, 2, 3, 3, 4 cells wide

@pytest.mark.parametrize("rows, columns, size, grid, box", [
    # 2 x 2 cells: sum 4, all four neighbours 2, so (4 - 2) / 4 beats every wider window
    ((1, 3), (3, 5), (60, 60), (6, 6), (30, 10, 50, 30)),
    # 3 x 3: (9 - 6) / 9 at r = 1.6 beats (4 - 3) / 4 at r = 1; 32 px around (25, 25)
    ((1, 4), (1, 4), (60, 60), (6, 6), (9, 9, 41, 41)),
    # in a corner there are two neighbours
    ((0, 2), (4, 6), (60, 60), (6, 6), (40, 0, 60, 20)),
    # 10 px of padding above: the centre (40, 20) of the square is (40, 10)
    ((1, 3), (3, 5), (60, 40), (6, 6), (30, 0, 50, 20)),
    # the centre lies on the picture's edge: shifted inside
    ((4, 6), (0, 2), (60, 40), (6, 6), (0, 20, 20, 40)),
    # no taller than the picture
    ((1, 3), (3, 5), (60, 15), (6, 6), (30, 0, 50, 15)),
    # a grid that follows the picture has no padding
    ((1, 3), (3, 5), (60, 40), (4, 6), (30, 10, 50, 30)),
    # two rows: as tall as every window, so only windows beside it are neighbours: (4 - 2) / 4
    ((0, 2), (3, 5), (60, 20), (2, 6), (30, 0, 50, 20)),
])
def test_vicrop_window(rows, columns, size, grid, box):
    assert peers.vicrop_window(block(grid, rows, columns), Letterbox(size, grid), 20) == box


def test_vicrop_takes_the_whole_picture_where_one_window_covers_it():
    letterbox = Letterbox((60, 40), 6)
    assert peers.vicrop_window(block((6, 6), (1, 3), (3, 5)), letterbox, 60) == (0, 0, 60, 40)


@torch.no_grad()
def test_vicrop_reads_one_layers_attention_without_running_the_rest(tiny):
    hidden, layer = torch.randn(1, 11, 72, generator=torch.Generator().manual_seed(0)), 3
    rope = tiny.rope(torch.arange(11))
    row = peers.attention_row(tiny, hidden, layer, rope, KVCache(tiny, 1, 11))
    assert torch.allclose(row, peers.all_maps(tiny, hidden, rope)[layer][0, :, -1].mean(0), atol=1e-5)
    shared = KVCache(tiny, 1, 11)  # in two parts, as two prompts that share an image
    peers.attention_row(tiny, hidden[:, :7], layer, rope[:, :7], shared)
    assert torch.allclose(row, peers.attention_row(tiny, hidden[:, 7:], layer, rope[:, 7:], shared, 7), atol=1e-5)


def test_vicrop_looks_by_its_own_map(tiny, monkeypatch):
    maps = iter([block((6, 6), (1, 3), (3, 5), 4.0) + 1, torch.full((6, 6), 2.0)])  # the question's, the general one
    monkeypatch.setattr(peers, "attention_to_image", lambda *how: next(maps).flatten())
    result = peers.vicrop(tiny, picture(108, 108, 1), "What is this?", 2, 4)  # cells of 18 px, windows from 36 px on
    assert result.boxes == [(54, 18, 90, 54)] and result.visual_tokens == 72
    region = sdrpn.Region((3, 1, 5, 3), torch.ones(6, 6, dtype=torch.bool), 1.0)
    same = sdrpn.answer(tiny, None, picture(108, 108, 1), "What is this?", "box", max_new_tokens=4, regions=[region])
    assert same.boxes == result.boxes and same.text == result.text


# ---- regions from attention and from true boxes

def test_attention_regions_keep_what_exceeds_a_share_of_the_maximum():
    raw = block((8, 8), (1, 3), (1, 3)) + block((8, 8), (6, 8), (6, 8), 0.02)
    region, = train.attention_regions(raw.flatten(), (8, 8))
    assert region.cells[1:3, 1:3].all() and not region.cells[4:, 4:].any()
    assert train.attention_regions(torch.zeros(64), (8, 8)) == []


@pytest.mark.parametrize("boxes, size, cells", [
    ([[10, 10, 20, 20]], (60, 60), [[(1, 1)]]),
    ([[10, 10, 20, 20]], (60, 40), [[(2, 1)]]),           # 10 px of padding above
    ([[19, 0, 21, 1]], (60, 60), [[(0, 1), (0, 2)]]),     # two columns are touched
    ([[0, 0, 1, 1], [59, 59, 60, 60]], (60, 60), [[(0, 0)], [(5, 5)]]),
    ([], (60, 60), [])])
def test_true_regions(boxes, size, cells):
    found = train.true_regions(boxes, Letterbox(size, 6))
    assert [[tuple(cell) for cell in region.cells.nonzero().tolist()] for region in found] == cells


# ---- ablations

def test_the_regressions_target_is_the_raw_map_and_its_loss_the_squared_error():
    lesson = SimpleNamespace(raw=torch.tensor([[0.1, 0.3], [0.0, 0.0]]))
    targets = ablations.raw_targets(lesson, None)
    assert torch.allclose(targets, torch.tensor([[25.0, 75.0], [-1.0, -1.0]]))  # no response: nothing to learn
    scores = torch.log(torch.tensor([[[0.2, 0.8]], [[0.4, 0.6]]]))[None].expand(2, -1, -1, -1)  # mean .3, .7
    assert ablations.regression_loss(scores, targets[:, None]).item() == pytest.approx(5 ** 2 + 5 ** 2, rel=1e-4)


def test_presmoothed_labels_are_wider_and_the_rpns_map_is_left_alone():
    clean = block((6, 6), (2, 3), (2, 3)).flatten()  # one cell; its neighbours are .2042 / .1238 of it, smoothed
    sample = SimpleNamespace(on=torch.ones(6, 6, dtype=torch.bool), recipe={})
    lesson = SimpleNamespace(clean=clean[None])
    assert (train.targets(lesson, [sample]) == 1).sum() == 1
    assert (ablations.smoothed_targets(lesson, [sample]) == 1).sum() == 9
    logits = torch.full((6, 6), -9.0)
    logits[2, 2:4] = 9.0
    with ablations.asking(ablations.PRESMOOTHED):
        assert sdrpn.find_regions(logits)[0].cells.sum() == 2
    assert sdrpn.find_regions(logits)[0].cells.sum() > 2


def test_without_sinks_every_kind_of_question_keeps_them(tmp_path, monkeypatch):
    recipe = RECIPE | {"kinds": {"text": {}, "natural": {"sink": {"kind": "norm", "c": 2.0}}}}
    monkeypatch.setattr(sdrpn, "load_recipe", lambda folder: recipe)
    ours = ablations.recipe_without_sinks(tmp_path)
    assert [sdrpn.recipe_for(ours, kind)["sink"] for kind in ("text", "natural")] == [None, None]
    assert recipe["sink"] is not None


def test_fed_answers_give_the_maps_of_decoded_ones(tiny, monkeypatch):
    pixels = torch.stack([tiny.pixels(picture(61, 130, n)) for n in (2, 3)])
    prompts, decode, said = [tiny.prompt_ids("What is this?")] * 2, tiny.decode, []

    def listen(*how):
        said.extend(decode(*how))
        said[1] = said[1][:2]  # as if it had ended there
        return said
    monkeypatch.setattr(tiny, "decode", listen)
    own = teach(tiny, RECIPE, pixels, prompts, 6)
    assert len(said[0]) == 6 and len(said[1]) == 2

    def fed(last_hidden, cache, position, most):
        answers = [ids[:most - 1] for ids in said]
        ablations.feed(tiny, answers, cache, position)
        return answers
    monkeypatch.setattr(tiny, "decode", fed)
    given = teach(tiny, RECIPE, pixels, prompts, 6)
    assert torch.allclose(given.raw, own.raw, atol=1e-5) and torch.allclose(given.clean, own.clean, atol=1e-5)
    assert not torch.allclose(own.raw[0], own.raw[1], atol=1e-4)


def test_the_data_sets_answer_stands_behind_the_prompt(tiny):
    turns, answers = ["What is this?", "And that?"], ["a cat", "12"]
    sample = train.Sample(0, "0", turns, None, None, RECIPE, responses=["a cat"])
    sample.answers = answers
    for turn in (0, 1):
        prompt, answer = sample.prompt(tiny, turn), ablations.answer_ids(tiny, sample, turn)
        talk = tiny.prompt_ids("More?", list(zip(turns, answers))[:turn + 1])
        assert talk[:len(prompt) + len(answer) + 1] == [*prompt, *answer, 2]
        assert tiny.detokenize(answer) == answers[turn]


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


def test_a_box_is_laid_on_a_grid_of_another_shape():
    inside = block((6, 6), (0, 3), (0, 2)).bool().flatten()
    assert heads.resized(inside, (6, 6), (4, 3)).view(4, 3).tolist() == [[True, False, False]] * 2 + [[False] * 3] * 2


def test_without_boxes_heads_are_ranked_by_mass_and_entropy():
    seen = made_up()
    for one in seen:
        one.inside = None
    scores = heads.head_scores(seen)  # uniform, one token, in between
    assert torch.allclose(scores[0], torch.tensor([0.0, 0.5]), atol=1e-6) and 0 < scores[1, 0] < 0.5
    for one in seen:
        one.mass[0, 1] = 0.01  # hardly looks at the picture
    pairs, c = heads.choose(seen)
    assert pairs[:2] == [(1, 0), (0, 1)] and c == 4.0


def test_the_heads_that_make_the_best_labels_are_chosen():
    seen = made_up()
    assert heads.choose(seen, heads.beats_chance(seen)) == ([(1, 0)], None)
    for one, (y, x) in zip(seen, PLACES):  # a sink outweighs the object, five times the median norm
        far = 35 if (y, x) != (4, 4) else 0
        one.maps[1, 0, far], one.norms[1, far] = 0.9, 5.0
    assert heads.choose(seen, heads.beats_chance(seen)) == ([(1, 0)], 4.0)  # the largest c that removes it


def test_a_layer_that_parks_is_told():
    seen = made_up()
    for one in seen:
        one.norms[0, 0] = 3.0  # where head 0.1 lies; the other head of the layer has 1/36 there
    norms, tokens, attention = heads.parking(seen)
    assert norms == [3.0, 1.0] and tokens[1] == attention[1] == 0.0
    assert tokens[0] == pytest.approx(100 / 36) and attention[0] == pytest.approx(100 * (1 + 1 / 36) / 2)
    assert [heads.parks(*row) for row in zip(tokens, attention)] == [True, False]


def test_every_heads_map_is_what_the_teacher_averages(tiny):
    image, q = picture(61, 130, 2), {"question": ["What is this?"], "boxes": [[0, 0, 61, 20]]}
    seen = heads.observe(tiny, {}, image, q, 4)
    pooled = RECIPE | {"attention": {"2": None, "3": [0, 1]}}
    lesson = teach(tiny, pooled, tiny.pixels(image)[None], [tiny.prompt_ids("What is this?")], 4)
    pool = torch.cat([seen.maps[2], seen.maps[3, :2]]).mean(0)
    assert torch.allclose(pool, lesson.raw[0], atol=1e-6)
    assert torch.allclose(heads.without_sinks(pool, seen.norms[2], 1.1), lesson.clean[0], atol=1e-6)
    assert ((0 < seen.mass) & (seen.mass < 1)).all()
    assert seen.inside.view(6, 6).nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [0, 4]]  # 34 px of padding beside it


# ---- numbers

def row(name, seed, score, kind="word"):
    return {"id": name, "seed": seed, "score": score, "kind": kind, "seconds": 1.0}


def test_means_ranges_and_intervals():
    got = [row("a", 0, 100), row("b", 0, 0), row("c", 0, 100, "same"),
           row("a", 1, 100), row("b", 1, 100), row("c", 1, 100, "same")]
    plain = [r | {"score": 0} for r in got]
    assert tables.over_seeds(got, "score", ["word"]) == (75, 25)  # seeds 50 and 100
    assert tables.over_seeds(got, "iou") is None
    middle, half = tables.paired(got, plain, ["word"])  # a 100, b 50: two questions, not four
    assert middle == 75 and half == pytest.approx(1.96 * 35.3553 / 2 ** 0.5, rel=1e-4)


def test_the_mean_without_a_kind_is_one_more_column():
    rows = [tables.PLAIN, tables.Row("#1 raw attention", "raw attention"), tables.Row("#2 RPN", "RPN + MSE", [])]
    scores = {"plain": (0, 0, 100), "#1 raw attention": (100, 0, 100), "#2 RPN": (100, 100, 0)}
    results = {name: [row("a", 0, s[0]), row("b", 0, s[1]), row("c", 0, s[2], "same")] for name, s in scores.items()}
    lines = tables.lay_out(rows, results, {}, ["same"])
    assert lines[0].split()[:5] == ["word", "same", "all", "no", "same"]
    assert lines[3].split()[2:6] == ["100.0", "0.0", "66.7", "100.0"]
    to_raw = lines[lines.index(next(line for line in lines if line.startswith("against raw"))) + 1:]
    assert to_raw[0].startswith("#2 RPN") and "-100.0 ±nan" in to_raw[0] and to_raw[1] == ""


def test_figure_3_counts_tokens_by_their_share_of_the_maximum():
    maps = [torch.tensor([0.5, 0.25, 0.0, 0.04]), torch.zeros(4)]  # relative: 1, .5, 0, .08
    relative, inside = tables.relative_attention(maps, [torch.tensor([True, False, False, True])] * 2)
    counts, shares = tables.fig3_bins(relative, inside)
    assert [counts[k] for k in (0, 1, 7, 11)] == [1, 1, 1, 1] and sum(counts) == 4
    assert [shares[k] for k in (0, 1, 7, 11)] == [0, 100, 0, 100]


# ---- the commands, on random weights

def run(capsys, what, ckpt, *flags, code=0):
    try:
        tables.main([what, "--ckpt", str(ckpt), "--out", str(ckpt.parent / "out"), "--count", "1",
                     "--max-new-tokens", "3", "--device", "cpu", *flags])
    except SystemExit as e:
        assert e.code == code
    else:
        assert code == 0
    return capsys.readouterr()


def test_table3_trains_each_row_once(ckpt, capsys):
    out, err = run(capsys, "table3", ckpt, "--seeds", "0", "1", "--without", "exist")
    rows = [line for line in out.splitlines() if line.startswith(("plain", "#", "true box"))]
    assert [line.split()[0] for line in rows] == [
        "plain", "#1", "#2", "#3", "#4", "#5", "true", "#1", "#2", "#3", "#4", "#5", "true", "#2", "#3", "#4", "#5"]
    assert rows[2].endswith("+5.3") and "±" in rows[0] and "no exist" in out and str(ckpt) not in out
    kept = ("", "-raw-map-mean-squared-error", "-sinks-kept")
    folders = [f"seed{seed}{ablation}" for seed in (0, 1) for ablation in kept]
    assert sorted(p.name for p in (ckpt.parent / "out" / "tiny").iterdir()) == folders
    told = {name: json.loads((ckpt.parent / "out" / "tiny" / name / "config.json").read_text()) for name in folders}
    assert [told[f"seed0{a}"]["ablation"] for a in kept] == ["none", "raw map, mean squared error", "sinks kept"]
    assert told["seed0-sinks-kept"]["recipe"]["sink"] is None and told["seed0"]["recipe"]["sink"] == RECIPE["sink"]
    assert (ckpt.parent / "out" / "table3.txt").read_text() == out + "\n"
    _, err = run(capsys, "peers", ckpt, "--seeds", "0")  # the run of #4 and #5 is used again
    assert "step 1/" not in err
    _, err = run(capsys, "peers", ckpt, "--seeds", "0", "--fresh")  # trained again, once for both of its rows
    assert err.count("step 1/") == 1


def test_an_rpn_of_another_ablation_is_not_shown(ckpt, capsys):
    run(capsys, "table8", ckpt, "--seeds", "5")
    runs = ckpt.parent / "out" / "tiny"
    assert (runs / "seed5-labels-of-the-smoothed-map" / "rpn.safetensors").is_file()
    (runs / "seed5-labels-of-the-smoothed-map").rename(runs / "seed5-the-data-sets-answers")
    _, err = run(capsys, "table4b", ckpt, "--seeds", "5", "--values", "4", code=2)
    assert "holds a run with another ablation; use --fresh" in err


@pytest.mark.parametrize("what, value, name", [
    ("table4a", "1", "seed0-frozen-layers-1"), ("table4b", "2", "seed0-the-data-sets-answers"),
    ("table7", "1", "seed0-rpn-layers-1"), ("settings", None, "seed0-batch-size-8")])
def test_sweeps(ckpt, capsys, what, value, name):
    out, _ = run(capsys, what, ckpt, "--seeds", "0", *(["--values", value] if value else []))
    assert (ckpt.parent / "out" / "tiny" / name / "rpn.safetensors").is_file()
    assert value is None or f" {value}  " in out


def test_answers_of_the_data_set_are_what_is_learnt_from(ckpt, capsys):
    run(capsys, "table4b", ckpt, "--seeds", "6", "--values", "4")
    labels = next((ckpt.parent / "out" / "tiny" / "seed6-the-data-sets-answers" / "labels").iterdir())
    own = next((ckpt.parent / "out" / "tiny" / "seed6" / "labels").iterdir())
    given, own = (sdrpn.open_safetensors(path).metadata()["responses"] for path in (labels, own))
    answers = [a for n in range(4) for a in tables.ToyQuestions("train/6", 4)[n][1]["answers"]]
    given = [response for response, in json.loads(given)]  # two tokens of each: one less than --max-new-tokens
    assert all(any(a.startswith(response) for a in answers) for response in given) and "".join(given) not in own
    assert sdrpn.open_safetensors(labels).get_tensor("targets").numel() == 2 * 36


def test_a_question_file_without_boxes(ckpt, capsys, tmp_path):
    picture(70, 50, 1).save(tmp_path / "a.png")
    line = {"image": "a.png", "question": "What is this?", "answers": ["12"]}
    kinds = ("sign", "sign", "other")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line | {"kind": kind}) + "\n" for kind in kinds))
    run(capsys, "tau", ckpt, "--seeds", "0", "--values", "0.2")
    rpn, file = ckpt.parent / "out" / "tiny" / "seed0" / "rpn.safetensors", str(tmp_path / "q.jsonl")
    out, _ = run(capsys, "fig5", ckpt, "--eval", file, "--rpn", str(rpn), "--values", "0.1", "0.5", "--seeds", "0")
    assert "2 questions of q.jsonl" in out and "mask 0.5" in out and "\ntrue box" not in out  # one of each kind
    assert (ckpt.parent / "out" / "fig5.png").is_file()
    _, err = run(capsys, "fig3", ckpt, "--eval", file, code=2)
    assert err.startswith("tables.py: no question has both a true box")


def test_figure_3_before_and_after(ckpt, capsys):
    out, _ = run(capsys, "fig3", ckpt, "--seeds", "0")
    assert "with sinks: inside the true box are, above 0.2:" in out and "sinks removed: inside" in out
    assert (ckpt.parent / "out" / "fig3.png").is_file()


def test_heads_of_random_weights_are_no_better_than_chance(ckpt, capsys):
    out, err = run(capsys, "heads", ckpt, "--seeds", "0", "--count", "6", code=2)
    assert "gaze heads: 0 of 36" in out and "recipe.json" not in out and "layers that park on sinks: " in out
    assert err.startswith("tables.py: no head beats chance")
    _, err = run(capsys, "heads", ckpt, "--seeds", "0", "--count", "2", code=2)
    assert "too few to tell a head from chance" in err


def test_without_boxes_heads_prints_a_recipe_that_loads_and_needs_none(ckpt, capsys, tmp_path):
    folder = write_checkpoint(tmp_path / "bare", CONFIGS["grouped"])
    picture(70, 50, 1).save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": "a.png", "question": "What is this?"}) + "\n")
    out, _ = run(capsys, "heads", folder, "--seeds", "0", "--eval", str(tmp_path / "q.jsonl"))
    (folder / "recipe.json").write_text(out[out.index("{"):])
    recipe = load_recipe(folder)
    assert recipe["frozen"] == 3 and recipe["layers"] == 3 and recipe["sink"]["kind"] == "norm"
    assert recipe == json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert "nothing tells these heads from chance" in out


def test_published_depths_go_into_the_recipe(tiny, monkeypatch):
    assert tables.known_depths(tiny) == (3, 3)  # 15 of 32, in proportion
    monkeypatch.setattr(type(tiny), "recipes", {("llava", 6, 72): {"frozen": 2, "layers": 1}})  # without heads
    recipe = tables.found_recipe(tiny, [(3, 1), (3, 0), (5, 2)], None, None)
    assert (recipe["frozen"], recipe["layers"], recipe["attention"]) == (2, 1, {"3": [0, 1], "5": [2]})
    assert recipe["sink"] is None and not sdrpn.recipe_faults(recipe, 6, 6)


def test_a_models_pictures_have_the_recipes_budget_unless_told(ckpt, monkeypatch):
    monkeypatch.setattr(type(load(ckpt, "cpu")), "budget", (1, 2))  # of the checkpoint
    args = SimpleNamespace(ckpt=ckpt, device="cpu", dtype=None, budget=None, what="peers")
    assert [tables.open_model(args, own).budget for own in (None, {}, {"budget": [3, 4]})] == [(1, 2), (1, 2), (3, 4)]
    args.budget = [(5, 6)]
    assert tables.open_model(args, {"budget": [3, 4]}).budget == (5, 6)


@pytest.mark.parametrize("flags", [
    ["--samples", "0"], ["--seeds", "x"], ["--values", "0.5"], ["--vicrop-layer", "6"], ["--eval", "nowhere.jsonl"],
    ["--ckpt", "nowhere"], ["--values", "9"], ["--without", "nothing"], ["--budget", "784"]])
def test_bad_input_is_one_line(ckpt, capsys, flags):
    out, err = run(capsys, "table7", ckpt, *flags, code=2)
    assert out == "" and err.splitlines()[-1].startswith("tables.py: ")


def test_a_budget_is_for_models_that_have_one(ckpt, capsys):
    out, err = run(capsys, "fig3", ckpt, "--budget", "784", "7840", code=2)
    assert "shows every picture at one size" in err
    args = SimpleNamespace(what="peers", budget=[(1, 2), (3, 4)])
    with pytest.raises(BadInput, match="fig5 takes several"):
        tables.check_budget(args, SimpleNamespace(budget=(1, 2)))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tiny Qwen2.5-VL, whose grid follows the picture, and questions about pictures of three shapes."""
    formula = pytest.importorskip("qwen_formula")
    folder = tmp_path_factory.mktemp("qwen")
    formula.write_checkpoint(folder / "tiny-qwen", formula.TINY["tied"], budget=(20 * 784, 60 * 784))
    natural = dict(attention={"1": [0]}, request="Give the box.", sink=dict(kind="norm", c=1.5))
    recipe = RECIPE | dict(square=True, budget=[30 * 784, 30 * 784], kinds={"text": {}, "natural": natural},
                           train=TRAINING | {"data": "a file"})
    (folder / "tiny-qwen" / "recipe.json").write_text(json.dumps(recipe))
    rows = []
    for n, size in enumerate([(157, 94), (61, 130), (90, 90)]):
        picture(*size, n).save(folder / f"{n}.png")
        for kind in ("text", "natural"):
            rows.append(dict(image=f"{n}.png", question="What is this?\nAnswer briefly.", kind=kind, answers=["12"],
                             boxes=[[10 * n, 10, 10 * n + 30, 50]]))
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "thrice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    return folder / "tiny-qwen"


@pytest.mark.parametrize("what, flags, says", [
    ("fig5", ["--budget", "15680", "15680", "--budget", "47040", "47040"], "SD-RPN 60"),
    ("table3", [], "#5 masked"), ("peers", ["--budget", "31360", "31360"], "ViCrop rel-att"),
    ("fig3", [], "sinks removed: inside"), ("heads", [], "gaze heads: ")])
def test_a_family_whose_grid_follows_the_picture(qwen, capsys, monkeypatch, what, flags, says):
    monkeypatch.setattr(sdrpn, "assign_labels", lambda roi_map, *how, **more: (roi_map > roi_map.median()).long())
    questions = str(qwen.parent / ("thrice.jsonl" if what == "heads" else "q.jsonl"))
    try:
        tables.main([what, "--ckpt", str(qwen), "--out", str(qwen.parent / "out"), "--data", questions,
                     "--eval", questions, "--seeds", "0", "--max-new-tokens", "3", "--device", "cpu",
                     "--dtype", "float32", *flags])
    except SystemExit:
        assert what == "heads"  # random weights
    out, err = capsys.readouterr()
    assert says in out and (what != "heads" or "no head beats chance" in err)

"""Checks of tables.py: its pure functions on cases worked out by hand, its commands on a tiny LLaVA made here.

    python -m pytest tests/test_tables.py      # seconds on one core
"""
import json
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "golden")]

import tables  # noqa: E402
from clip import preprocess  # noqa: E402
from formula import CONFIGS, picture, write_checkpoint  # noqa: E402
from model import LLaVA  # noqa: E402
from sdrpn import load_recipe, remove_sink_tokens, teach  # noqa: E402
from train import attention_mask, true_mask  # noqa: E402


def block(g, rows, columns, value=1.0):
    grid = torch.zeros(g, g)
    grid[slice(*rows), slice(*columns)] = value
    return grid


# ---- ViCrop: a grid of 6 over 60 px, so cells of 10 px; windows of 20 to 40 px are 2, 2, 2, 3, 3, 4 cells wide

@pytest.mark.parametrize("rows, columns, size, box", [
    ((1, 3), (3, 5), (60, 60), (30, 10, 50, 30)),   # 2 x 2 cells: sum 4, all four neighbours 2, so (4 - 2) / 4 beats every wider window
    ((1, 4), (1, 4), (60, 60), (9, 9, 41, 41)),     # 3 x 3: (9 - 6) / 9 at r = 1.6 beats (4 - 3) / 4 at r = 1; 32 px around (25, 25)
    ((0, 2), (4, 6), (60, 60), (40, 0, 60, 20)),    # in a corner there are two neighbours
    ((1, 3), (3, 5), (60, 40), (30, 0, 50, 20)),    # 10 px of padding above: the centre (40, 20) of the square is (40, 10)
    ((4, 6), (0, 2), (60, 40), (0, 20, 20, 40)),    # the centre lies on the picture's edge: shifted inside
    ((1, 3), (3, 5), (60, 15), (30, 0, 50, 15)),    # no taller than the picture
])
def test_vicrop_window(rows, columns, size, box):
    assert tables.vicrop_window(block(6, rows, columns), size, 20) == box


def test_vicrop_takes_the_whole_picture_where_one_window_covers_it():
    assert tables.vicrop_window(block(6, (1, 3), (3, 5)), (60, 40), 60) == (0, 0, 60, 40)


# ---- maps from attention and from true boxes

def test_attention_mask_keeps_what_exceeds_a_share_of_the_maximum():
    raw = block(6, (1, 3), (1, 3)) + block(6, (5, 6), (5, 6), 0.02)
    mask = attention_mask(raw.flatten(), 6)
    assert (mask[1:3, 1:3] > 0).all() and not mask[4:, 4:].any()
    assert mask.argmax() in (7, 8, 13, 14)
    assert attention_mask(torch.zeros(36), 6) is None


@pytest.mark.parametrize("boxes, size, cells", [
    ([[10, 10, 20, 20]], (60, 60), [(1, 1)]),
    ([[10, 10, 20, 20]], (60, 40), [(2, 1)]),           # 10 px of padding above
    ([[19, 0, 21, 1]], (60, 60), [(0, 1), (0, 2)]),     # two columns are touched
    ([[0, 0, 1, 1], [59, 59, 60, 60]], (60, 60), [(0, 0), (5, 5)])])
def test_true_mask(boxes, size, cells):
    assert true_mask(boxes, 6, size).nonzero().tolist() == [list(c) for c in cells]
    assert true_mask([], 6, size) is None


# ---- heads: two layers of two heads on a grid of 6, the box in its middle

def made_up(questions=3):
    inside = block(6, (2, 4), (2, 4)).bool().flatten().expand(questions, -1)
    maps = torch.full((questions, 2, 2, 36), 1 / 36)
    maps[:, 1, 0] = torch.where(inside, 0.2, 0.2 / 32)      # 80 % in the box
    maps[:, 0, 1] = 0
    maps[:, 0, 1, 0] = 1                                    # all on one corner, which is a sink
    return maps, torch.full((questions, 2, 2), 0.5), torch.ones(questions, 2, 36), inside


def test_heads_are_ranked_by_the_share_inside_the_box():
    maps, mass, _, inside = made_up()
    assert torch.allclose(tables.head_scores(maps, mass, inside), torch.tensor([[4 / 36, 0], [0.8, 4 / 36]]))


def test_without_boxes_heads_are_ranked_by_mass_and_entropy():
    maps, mass, norms, _ = made_up()
    scores = tables.head_scores(maps, mass)
    assert torch.allclose(scores[0], torch.tensor([0.0, 0.5]), atol=1e-6) and 0 < scores[1, 0] < 0.5    # uniform, one token, in between
    mass[:, 0, 1] = 0.01                                    # hardly looks at the picture
    _, pairs, c = tables.choose(maps, mass, norms)
    assert pairs[:2] == [(1, 0), (0, 1)] and c == 4.0


def test_choose_takes_the_head_that_makes_the_best_labels():
    maps, mass, norms, inside = made_up()
    scores, pairs, c = tables.choose(maps, mass, norms, inside)
    assert pairs == [(1, 0)] and c == 1000.0 and scores.argmax() == 2
    maps[:, 1, 0, 35], norms[:, 1, 35] = 0.9, 5.0           # a sink outweighs the object, five times the median norm
    scores, pairs, c = tables.choose(maps, mass, norms, inside)
    assert pairs == [(1, 0)] and c == 4.0                   # the largest c that removes it


# ---- numbers

def test_means_ranges_and_intervals():
    row = lambda name, seed, score, kind="word": {"id": name, "seed": seed, "score": score, "kind": kind}
    got = [row("a", 0, 100), row("b", 0, 0), row("c", 0, 100, "same"), row("a", 1, 100), row("b", 1, 100), row("c", 1, 100, "same")]
    plain = [r | {"score": 0} for r in got]
    assert tables.over_seeds(got, "score", "word") == (75, 25)      # seeds 50 and 100
    assert tables.over_seeds(got, "iou") is None
    middle, half = tables.paired(got, plain, "word")                # a 100, b 50: two questions, not four
    assert middle == 75 and half == pytest.approx(1.96 * 35.3553 / 2 ** 0.5, rel=1e-4)


# ---- the commands, on random weights

@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("tables") / "tiny", CONFIGS["grouped"])
    training = dict(samples=4, lr=1e-3, warmup=0.1, betas=[0.9, 0.98], epochs=1, batch_size=2, grad_accum=1, clip=1.0, held_out=5, data="toy scenes")
    recipe = dict(attention={"2": None, "3": [0, 1]}, softmax="image", sink=dict(kind="norm", c=4.0), frozen=2, layers=2, tau=0.15, train=training)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def test_every_heads_map_is_what_the_teacher_averages(ckpt):
    llava, image, question = LLaVA.load(ckpt, "cpu"), picture(61, 130, 2), "What is this?"
    maps, mass, norms = tables.observe(llava, image, question, 4)
    lesson = teach(llava, load_recipe(llava), preprocess(image, 36)[None], [llava.prompt_ids(question)], 4)
    pool = torch.cat([maps[2], maps[3, :2]]).mean(0)
    assert torch.allclose(pool, lesson.raw[0], atol=1e-6) and torch.allclose(maps.sum(-1), torch.ones(6, 6), atol=1e-5)
    assert ((0 < mass) & (mass < 1)).all()
    assert torch.equal(tables.without_sinks(pool, norms[2], 1.2), remove_sink_tokens(pool, norms[2][:, None], 1.2 * norms[2].median()))


def run(capsys, what, ckpt, *flags, code=0):
    try:
        tables.main([what, "--ckpt", str(ckpt), "--out", str(ckpt.parent / "out"), "--count", "1", "--max-new-tokens", "3", "--device", "cpu", *flags])
    except SystemExit as e:
        assert e.code == code
    return capsys.readouterr()


def test_table3_trains_each_row_once(ckpt, capsys):
    out, err = run(capsys, "table3", ckpt, "--seeds", "0", "1")
    rows = [line for line in out.splitlines() if line.startswith(("plain", "#", "true box"))]
    assert [r.split()[0] for r in rows] == ["plain", "#1", "#2", "#3", "#4", "#5", "true", "#1", "#2", "#3", "#4", "#5", "true", "#3", "#4", "#5"]
    assert rows[2].endswith("+5.3") and "±" in rows[0] and str(ckpt) not in out
    assert sorted(p.name for p in (ckpt.parent / "out" / "tiny").iterdir()) == [
        f"seed{s}{flags}" for s in (0, 1) for flags in ("", "-loss-mse", "-no-sink-removal")]
    assert (ckpt.parent / "out" / "table3.txt").read_text() == out + "\n"
    _, err = run(capsys, "peers", ckpt, "--seeds", "0")             # the run of #4 and #5 is used again
    assert "finished" in err and "step 1/" not in err


@pytest.mark.parametrize("what, value, name", [("table4a", "1", "seed0-frozen-layers-1"), ("table4b", "2", "seed0-samples-2"),
                                               ("table7", "1", "seed0-rpn-layers-1")])
def test_sweeps(ckpt, capsys, what, value, name):
    out, _ = run(capsys, what, ckpt, "--values", value, "--seeds", "0")
    assert (ckpt.parent / "out" / "tiny" / name / "rpn.safetensors").is_file() and f" {value}  " in out


def test_a_question_file_without_boxes(ckpt, capsys, tmp_path):
    picture(70, 50, 1).save(tmp_path / "a.png")
    line = {"image": "a.png", "question": "What is this?", "answers": ["12"], "kind": "sign"}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line | {"kind": kind}) + "\n" for kind in ("sign", "sign", "other")))
    run(capsys, "table8", ckpt, "--seeds", "0")
    rpn = ckpt.parent / "out" / "tiny" / "seed0" / "rpn.safetensors"
    out, _ = run(capsys, "fig5", ckpt, "--eval", str(tmp_path / "q.jsonl"), "--rpn", str(rpn), "--values", "0.1", "0.5", "--seeds", "0")
    assert "2 questions of q.jsonl" in out and "mask 0.5" in out and "\ntrue box" not in out      # one of each kind
    assert (ckpt.parent / "out" / "fig5.png").is_file()
    _, err = run(capsys, "fig3", ckpt, "--eval", str(tmp_path / "q.jsonl"), code=2)
    assert err.startswith("tables.py: no question has both a true box")


def test_heads_prints_a_recipe_that_loads_and_needs_none(ckpt, capsys, tmp_path):
    folder = write_checkpoint(tmp_path / "bare", CONFIGS["grouped"])
    out, _ = run(capsys, "heads", folder, "--seeds", "0")
    (folder / "recipe.json").write_text(out[out.index("{"):])
    recipe = load_recipe(LLaVA.load(folder, "cpu"))
    assert recipe["frozen"] == 3 and recipe["layers"] == 3 and recipe["sink"]["kind"] == "norm"
    assert "this recipe" in out and "the shipped one" not in out


@pytest.mark.parametrize("flags", [["--samples", "0"], ["--seeds", "x"], ["--values", "0.5"], ["--vicrop-layer", "6"], ["--eval", "nowhere.jsonl"],
                                   ["--ckpt", "nowhere"], ["--values", "9"]])
def test_bad_input_is_one_line(ckpt, capsys, flags):
    out, err = run(capsys, "table7", ckpt, *flags, code=2)
    assert out == "" and err.splitlines()[-1].startswith("tables.py: ")

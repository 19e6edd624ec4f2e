"""The bounds of bench.py are numbers worked out by hand, and it runs whole on tiny models of every family.

No speed is tested.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench  # noqa: E402 (also puts the project on the path)
import report  # noqa: E402
from bounds import Machine, Work  # noqa: E402
from random_llava import (CONFIGS, QUESTION, SQUARE, TINY, band, random_model, skeleton, squares,  # noqa: E402
                          steered, write_checkpoint)

T, P, CROP = 636, 611, 300  # LLaVA-1.5: 35 tokens, the image's 576, 25 more; crop tokens
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def work():
    m, _, recipe = skeleton("llava-1.5-7b")
    return Work(m, recipe, SQUARE)


@pytest.mark.parametrize("crop, reuse, digits", [
    (300, True, "1.56"), (300, False, "2.01"), (0, True, "1.06"), (0, False, "1.53")])
def test_two_stage_prefill_in_plain_prefills(work, crop, reuse, digits):
    assert f"{work.two_stage(T, P, crop, reuse) / work.plain(T):.2f}" == digits


def test_other_bounds_of_the_7b(work):
    w = work
    assert w.L * w.weights == 32 * (202_383_360 - 2 * 4096)  # a layer's parameters without its two norms
    assert w.cache_bytes(1) == 2 * 32 * 4096 * 2  # half a megabyte a token
    assert 0.064 < w.rpn(T) / w.plain(T) < 0.066  # two blocks of 32, and the k of the image
    ours, stopped = w.encode() + w.roi(T), 14 * w.layer(T) + w.row(T)
    assert (2 * w.encode() + 2 * w.plain(T)) / ours > 3.0  # ViCrop as published
    assert 2 * (w.encode() + stopped) / ours > 1.5  # stopped after its layer
    behind = 14 * w.layer(T - P, P) + w.row(T - P, P)  # sharing the image prefix too
    assert f"{(w.encode() + stopped + behind) / ours:.1f}" == "0.9"


def test_what_the_tower_of_the_7b_costs(work):
    """23 layers on 577 tokens of 1024, by hand: projections and MLP, attention; and the patches, 14 x 14 x 3 each."""
    layer = 2 * 577 * 12 * 1024 ** 2 + 4 * 1024 * 577 ** 2
    assert work.tower == 23 * layer + 2 * 576 * 588 * 1024
    assert work.projector == 2 * 576 * (1024 * 4096 + 4096 ** 2)


def test_throughput_bound_on_a_gpu(work):
    """10 new tokens at 700 TFLOP/s and 4.2 TB/s: the decoding, which both sides pay, brings 1 / 1.56 up to 0.85."""
    machine = Machine.__new__(Machine)
    machine.peak, machine.bandwidth = 700e12, 4.2e12
    plain = work.plain_seconds(machine, T)
    assert f"{plain / work.two_stage_seconds(machine, T, P, CROP):.2f}" == "0.85"
    assert plain / work.two_stage_seconds(machine, T, P, 0) > 0.96


@pytest.mark.parametrize("name, parameters, rpn", [
    ("llava-1.5-7b", 7_050_828_800, 438_304_768), ("llava-1.5-13b", 13_338_896_384, 686_817_280),
    ("deepseek-vl-1.3b", 1_962_640_384, 111_149_056), ("deepseek-vl-7b", 7_331_390_721, 438_304_768),
    ("qwen2.5-vl-3b", 3_754_622_976, 158_859_264), ("qwen2.5-vl-7b", 8_292_166_656, 480_772_096)])
def test_true_sizes(name, parameters, rpn):
    """Without a byte of weights: the published numbers, less what no answer needs; all see 24 x 24 tokens."""
    if name not in CONFIGS:
        pytest.skip("its family is not here")
    m, _, recipe = skeleton(name)
    w = Work(m, recipe, SQUARE)
    assert (w.parameters, w.rpn_parameters, w.grid) == (parameters, rpn, (24, 24))


def test_layers_are_counted_like_the_model():
    """The parameters of the random model are those the bounds count."""
    m, rpn, _, w = random_model("tiny", CPU, torch.float32)

    def linear(net):
        return sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert linear(m.language_model.layers) == w.L * w.weights
    assert linear(rpn) == w.rpn_parameters
    assert len(m.prompt_ids(QUESTION)) - 1 + 576 == T
    assert m.prompt_ids(QUESTION).index(m.config["image_token"]) + 576 == P


@pytest.mark.parametrize("cells, mode, tokens", [
    (band((8, 8), 33), "mask", 33), (band((8, 8), 0), "mask", 0), (band((8, 8), 64), "mask", 64),
    (squares((8, 8), (1, 3), (5, 7)), "box", 128)])
def test_steered_answers_crop_what_they_are_told(cells, mode, tokens):
    m, rpn, _, w = random_model("tiny", CPU, torch.float32)
    picture = Image.new("RGB", (64, 64), "red")
    result = steered(m, rpn, cells, picture, QUESTION, mode, max_new_tokens=3)
    assert result.visual_tokens == w.N + tokens and len(result.text.split()) == 3


def test_launches_of_a_step_are_counted():
    """A product, a sum and a product again; views start nothing."""
    x = torch.ones(4, 4)
    count = bench.launches(bench.profiled(lambda: (x.mT.unsqueeze(0)[0] @ x + 1) @ x, CPU), CPU)
    assert dict(count) == {"mm": 2, "add": 1}


@pytest.mark.parametrize("name", TINY)
def test_bench_runs_whole(name):
    parts = ["answer", "ratios", "peers", "labels", "shares", "kernels", "training", "scaling"]
    lines = []
    rows = bench.main(["--random", name, "--repeat", "1", "--device", "cpu", "--only", *parts], say=lines.append)
    assert all(measured == measured and abs(measured) < float("inf") for _, measured, *_ in rows) and len(rows) >= 45
    assert f"python tests/bench.py --random {name} --repeat 1 --device cpu --only {' '.join(parts)}\n" in lines
    assert any(line.startswith(f"{name}, float32: ") for line in lines)


def test_what_does_not_fit_is_left_out(tmp_path):
    """No memory, no time, and a part in which two runs before were killed: nothing is measured, all of it is said."""
    args = bench.arguments(["--random", "tiny", "--device", "cpu"])
    said = []
    one = bench.Bench(args, said.append)
    one.room = 1000
    bench.measure(one, ["answer"])
    one.room = None
    bench.measure(one, ["answer"], until=0)
    store = report.Store(tmp_path / "rows.json")
    store.begin(one.entry(), "answer")
    store.begin(one.entry(), "answer")
    bench.measure(one, ["answer"], store=report.Store(store.path))
    assert one.rows == [] and one.plain_seconds is None
    assert ["GB" in said[0], "the same command goes on" in said[1], "twice" in said[2]] == [True] * 3


def test_the_report_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Rows that are kept are not measured again, and all of them are in the block to paste."""
    begun = []

    def run(name, layers, parts, args, store, minutes):
        given = ["--random", name, "--only", *parts, "--results", str(store.path), "--repeat", "1", "--device", "cpu"]
        bench.main(given, say=begun.append)
        return 0
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "stamp", lambda device: "a machine")
    monkeypatch.setattr(report, "ON_CPU", [("tiny", None, ["kernels"])])
    monkeypatch.setattr(report, "check", lambda device, say: [("the same answers", 20, 20)])
    args = SimpleNamespace(device="cpu", dtype=None, minutes=1, repeat=1, models=None, only=["check", "kernels"])
    blocks = []
    report.main(args, blocks.append, run)
    monkeypatch.setattr(bench.Bench, "kernels", None)
    monkeypatch.setattr(report, "check", None)
    report.main(args, blocks.append, run)
    assert blocks[0] == blocks[1] and blocks[0].count("```") == 2
    assert [path.name for path in (tmp_path / "out" / "bench").iterdir()] == ["a-machine.json"]
    for text in ("a machine", "the same answers", "tiny, float32: 6 layers of 48", "operators a layer"):
        assert text in blocks[0]


def test_golden_cases_and_toy_on_this_cpu():
    rows = list(report.check_golden(CPU))
    assert rows[0][1] == rows[0][2] >= 3 and rows[1][1] < 1e-3
    rows = list(report.check_toy(CPU, 2))
    assert [row[1] for row in rows[:2]] == [2, 2]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="anonymous memory is counted on Linux only")
def test_a_random_checkpoint_in_shards_loads_and_its_loading_is_measured(tmp_path):
    write_checkpoint("tiny", tmp_path / "random", shard_bytes=1 << 20)
    assert len(list((tmp_path / "random").glob("*.safetensors"))) > 2
    said = []
    bench.main(["--load", str(tmp_path / "random"), "--device", "cpu", "--dtype", "float16"], say=said.append)
    assert "of weights in float16 on cpu" in said[0] and "x the weights" in said[0]

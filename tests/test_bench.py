"""The bounds of bench.py are numbers worked out by hand, and it runs whole on a tiny model.

No speed is tested.
"""
import json
from types import SimpleNamespace

import pytest
import torch

import bench
import model
import report
from bounds import Machine, Work
from calls import shell
from random_llava import (CONFIGS, QUESTION, SQUARE, band, random_model, skeleton, squares, steered,
                          write_checkpoint)

T, P, CROP = 636, 611, 300  # LLaVA-1.5: 35 tokens, the image's 576, 25 more; crop tokens
CPU = torch.device("cpu")


def test_what_questions_cost_in_plain_prefills():
    m, _, recipe = skeleton("llava-1.5-7b")
    work = Work(m, recipe, SQUARE)
    flops = [work.two_stage(T, P, CROP), work.question(T, P, CROP), work.plain(T, P), work.two_stage(T, P, 0),
             work.recomputed(T, CROP)]
    assert [f"{each / work.plain(T):.2f}" for each in flops] == ["1.56", "0.60", "0.04", "1.06", "2.01"]
    assert work.plain(P) + work.plain(T, P) == work.plain(T)  # a prefix and its rest are the whole
    assert work.L * work.weights == 32 * (202_383_360 - 2 * 4096)  # a layer's parameters without its two norms
    assert work.cache_bytes(1) == 2 * 32 * 4096 * 2  # half a megabyte a token
    layer = 2 * 577 * 12 * 1024 ** 2 + 4 * 1024 * 577 ** 2  # of the tower, 577 tokens of 1024: products, attention
    assert work.image[0] == 23 * layer + 2 * 576 * 588 * 1024  # and the patches, 14 x 14 x 3 each
    machine = Machine.__new__(Machine)
    machine.peak, machine.bandwidth = 700e12, 4.2e12  # a GPU, whose decoding brings 1 / 1.56 up to 0.85
    assert f"{work.plain_seconds(machine, T) / work.two_stage_seconds(machine, T, P, CROP):.2f}" == "0.85"


@pytest.mark.parametrize("name, parameters, rpn", [
    ("llava-1.5-7b", 7_050_828_800, 438_304_768), ("llava-1.5-13b", 13_338_896_384, 686_817_280),
    ("deepseek-vl-1.3b", 1_962_640_384, 111_149_056), ("deepseek-vl-7b", 7_331_390_721, 438_304_768),
    ("qwen2.5-vl-3b", 3_754_622_976, 158_859_264), ("qwen2.5-vl-7b", 8_292_166_656, 480_772_096)])
def test_true_sizes(name, parameters, rpn):
    """Without a byte of weights: the published numbers, less what no answer needs; all see 24 x 24 tokens."""
    m, _, recipe = skeleton(name)
    w = Work(m, recipe, SQUARE)
    assert (w.parameters, w.rpn_parameters, w.grid) == (parameters, rpn, (24, 24))


@pytest.mark.parametrize("cells, mode, tokens", [
    (band((8, 8), 33), "mask", [33]), (squares((8, 8), (1, 3), (5, 7)), "box", [64, 64])])
def test_steered_answers_crop_what_they_are_told(cells, mode, tokens):
    m, rpn, _ = random_model("tiny", CPU, torch.float32)
    picture = bench.Image.new("RGB", (64, 64), "red")
    result = steered(m, rpn, cells, picture, QUESTION, mode, max_new_tokens=3)
    assert [len(crop.tokens) for crop in result.crops] == tokens and len(result.text.split()) == 3


def measure(*words):
    lines = []
    rows = bench.main(["--random", "tiny", "--repeat", "1", "--device", "cpu", *words], log=lines.append)
    return rows, "\n".join(lines)


def test_every_part_runs():
    rows, text = measure("--layers", "3", "--only", *bench.PARTS)
    assert all(0 < measured < float("inf") for _, measured, *_ in rows) and len(rows) >= 40
    assert "\ntiny, 3 layers only, float32: 3 layers of 48" in text and "left out" not in text


def test_what_does_not_fit_is_left_out_and_named(monkeypatch):
    monkeypatch.setattr(bench, "free_bytes", lambda device: 1000)
    rows, text = measure("--only", "prefix")
    assert rows == [] and "prefix: left out: needs" in text


def test_the_report_resumes_keeps_to_its_minutes_and_ends_with_json(tmp_path, monkeypatch):
    begun, blocks = [], []

    def run(words, seconds):
        begun.append(words)
        assert seconds <= 60
        bench.main(words, log=lambda text: None)
        return 0 if len(begun) < 2 else None
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "stamp", lambda device: "a machine")
    monkeypatch.setattr(report, "MODELS", [("tiny-deepseek", None, ["answer"]), ("tiny-qwen", None, ["answer"])])
    args = SimpleNamespace(device=CPU, minutes=1, repeat=1, models=None, only=["answer"])
    report.main(args, blocks.append, run)  # both, after which the minutes are over
    report.main(args, blocks.append, run)  # nothing is measured again
    assert len(begun) == 3 and blocks[0] == blocks[2] and "tiny-qwen, float32: 4 layers of 72" in blocks[0]
    deepseek, qwen = json.loads(blocks[1])["parts"]
    assert (qwen["entry"], qwen["part"]) == ("tiny-qwen, float32", "answer") and len(qwen["rows"]) == 9
    assert report.bench_process(["--only", "busy"], 0.1) is None


def test_answers_are_those_of_float64():
    for name, measured, bound in report.check(CPU, 1):
        assert measured < bound if "difference" in name else measured == bound >= 1


def test_training_memory_is_counted_from_shapes():
    """Weights in bfloat16, the RPN's with gradient and moments in float32, and what a batch of 8 keeps."""
    m, _, recipe = skeleton("small")
    w = Work(m, recipe, SQUARE)
    kept = report.training_bytes("small") - 2 * w.parameters - 16 * w.rpn_parameters
    assert w.cache_bytes(8 * P) < kept < 2 * w.cache_bytes(8 * P)


def test_reading_ahead_is_measured():
    rows = {name: measured for name, measured, *_ in report.reading(CPU, steps=3)}
    assert rows["pictures per second, with reading ahead"] > 0 and len(rows) == 4


def test_a_random_checkpoint_in_shards_loads(tmp_path):
    write_checkpoint("tiny", tmp_path / "random", shard_bytes=1 << 20)
    assert len(list((tmp_path / "random").glob("*.safetensors"))) > 2
    m = model.load(tmp_path / "random", "cpu", "float16")
    assert m.config.hidden_size == CONFIGS["tiny"]["text_config"]["hidden_size"]


@pytest.mark.background
def test_scripts_run_from_anywhere(tmp_path):
    scripts = [path for part in ("paper", "speed") for path in (report.ROOT / "tests" / part).glob("*.py")]
    for path in scripts:
        if path.name != "walk.py":
            done = shell(path, "--help", folder=tmp_path)
            assert done.returncode == 0, done.stderr

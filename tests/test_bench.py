"""The bounds that bench.py prints are METHOD section 4's numbers, and bench.py runs whole on a tiny model. No speed is tested."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench  # noqa: E402 (also puts the project on the path)
from bounds import Machine, work  # noqa: E402
from random_llava import QUESTION, Steered, band, random_model, squares, write_checkpoint  # noqa: E402
from sdrpn import answer  # noqa: E402

T, P, CROP = 636, 611, 300  # 35 tokens, the image's 576, 25 more; crop tokens


@pytest.mark.parametrize("crop, reuse, digits", [(300, True, "1.56"), (300, False, "2.01"), (0, True, "1.06"), (0, False, "1.53")])
def test_two_stage_prefill_in_plain_prefills(crop, reuse, digits):
    w = work("llava-1.5-7b")
    assert f"{w.two_stage(T, P, crop, reuse) / w.plain(T):.2f}" == digits


def test_other_bounds_of_the_7b():
    w = work("llava-1.5-7b")
    assert w.L * w.weights == 32 * (202_383_360 - 2 * 4096)  # a layer's parameters without its two norms
    assert w.cache_bytes(1) == 2 * 32 * 4096 * 2  # half a megabyte a token
    assert 0.064 < w.rpn(T) / w.plain(T) < 0.066  # two blocks of 32, and the k of the image
    ours, stopped = w.encode() + w.roi(T), 14 * w.layer(T) + w.row(T)
    assert (2 * w.encode() + 2 * w.plain(T)) / ours > 3.0  # ViCrop as published
    assert 2 * (w.encode() + stopped) / ours > 1.5  # stopped after its layer
    assert f"{(w.encode() + stopped + 14 * w.layer(T - P, P) + w.row(T - P, P)) / ours:.1f}" == "0.9"  # sharing the image prefix too


def test_throughput_bound_on_a_gpu():
    """10 new tokens at 700 TFLOP/s and 4.2 TB/s: the decoding, which both sides pay, brings 1 / 1.56 up to 0.85."""
    w, m = work("llava-1.5-7b"), Machine.__new__(Machine)
    m.peak, m.bandwidth = 700e12, 4.2e12
    assert f"{w.plain_seconds(m, T) / w.two_stage_seconds(m, T, P, CROP):.2f}" == "0.85"
    assert w.plain_seconds(m, T) / w.two_stage_seconds(m, T, P, 0) > 0.96


def test_layers_are_counted_like_the_model():
    """The parameters of the random model are those the bounds count."""
    llava, rpn, _, w = random_model("tiny", torch.device("cpu"), torch.float32)
    linear = lambda net: sum(p.numel() for name, p in net.named_parameters() if p.dim() > 1)
    assert linear(llava.language_model.layers) == w.L * w.weights
    assert linear(rpn) == (w.R - 1) * w.weights + w.D * (w.q + w.kv)
    assert len(llava.prompt_ids(QUESTION)) - 1 + 576 == T and llava.prompt_ids(QUESTION).index(llava.image_token) + 576 == P


@pytest.mark.parametrize("cells, mode, tokens", [(band(8, 33), "mask", 33), (band(8, 0), "mask", 0), (band(8, 64), "mask", 64),
                                                 (squares(8, (1, 3), (5, 7)), "box", 128)])
def test_steered_answers_crop_what_they_are_told(cells, mode, tokens):
    llava, rpn, _, w = random_model("tiny", torch.device("cpu"), torch.float32)
    image = bench.Image.new("RGB", (64, 64), "red")
    result = answer(llava, Steered(rpn, cells), image, QUESTION, mode, max_new_tokens=3, ignore_eos=True)
    assert result.visual_tokens == w.N + tokens and len(result.text.split()) == 3


def test_bench_runs_whole():
    lines = []
    rows = bench.main(["--random", "tiny", "--repeat", "1", "--device", "cpu"], say=lines.append)
    assert all(measured == measured and abs(measured) < float("inf") for _, measured, _ in rows) and len(rows) > 50
    assert "python tests/bench.py --random tiny --repeat 1 --device cpu" in lines and "B=3, R=2" in lines[2]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="anonymous memory is counted on Linux only")
def test_a_random_checkpoint_in_shards_loads_and_its_loading_is_measured(tmp_path):
    write_checkpoint("tiny", tmp_path / "random", shard_bytes=1 << 20)
    assert len(list((tmp_path / "random").glob("*.safetensors"))) > 2
    bench.main(["--load", str(tmp_path / "random"), "--device", "cpu", "--dtype", "float16"], say=(lines := []).append)
    assert "of weights in float16 on cpu" in lines[0] and "x the weights" in lines[0]

"""Our model against a reference library's outputs (tests/golden/, made by make_golden.py): logits within 1e-4, greedy tokens identical.

A failing test names the first stage that differs; `python tests/golden/differ.py CASE` prints all of them.
"""
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent / "golden")]

from differ import compare, first_break, load_golden  # noqa: E402 (also puts the project on the path)
from formula import CASES, CONFIGS, NEW_TOKENS, SPELLINGS, picture, prompt, weight, write_checkpoint  # noqa: E402
from model import LLaVA  # noqa: E402


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(config name, dtype, ...): a tiny LLaVA read from a checkpoint folder written for it; each is made once."""
    loaded = {}

    def load(config, dtype="float32", **how):
        key = (config, dtype, *how.items())
        if key not in loaded:
            folder = write_checkpoint(tmp_path_factory.mktemp(config), CONFIGS[config], **how)
            loaded[key] = LLaVA.load(folder, device="cpu", dtype=dtype)
        return loaded[key]
    return load


@pytest.mark.parametrize("name", CASES)
def test_every_stage(load, name):
    report = compare(load(CASES[name]["config"]), name)
    assert not first_break(report), "\n".join(["parity breaks first at " + first_break(report), *(line for _, line in report)])


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens(load, name, monkeypatch):
    case, (want, notes) = CASES[name], load_golden(name)
    llava = load(case["config"])
    ask = lambda: llava.generate(picture(*case["picture"]), case["question"], max_new_tokens=NEW_TOKENS, history=case["history"])
    assert ask().strip() == notes["text"].strip()
    monkeypatch.setattr(type(llava), "detokenize", lambda self, ids: list(ids))             # the ids themselves
    assert ask() == want["tokens"].tolist()


def logits(llava, name):
    return llava.logits(picture(*CASES[name]["picture"]), prompt(CASES[name]["question"], CASES[name]["history"]))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_spelling_of_tensor_names(load, spelling, shards):
    assert torch.equal(logits(load("grouped", spelling=spelling, shards=shards), "turns"), logits(load("grouped"), "turns"))


@pytest.mark.parametrize("name", CASES)
def test_float64_agrees_and_bfloat16_is_no_worse_than_the_reference(load, name):
    """Statistics, softmax and rotary tables are float32 or wider in any dtype: rounding them to bfloat16 would show here."""
    want, notes = load_golden(name)
    rows, config = want["rows"].long(), CASES[name]["config"]
    assert (logits(load(config, "float64"), name)[rows] - want["logits"]).abs().max() < 1e-4
    norm = load(config, "bfloat16").language_model.norm
    normed = norm((30 * weight("norm input", want["norm.bfloat16"].shape)).bfloat16())
    assert (normed == want["norm.bfloat16"]).float().mean() > 0.98
    off = (logits(load(config, "bfloat16"), name).float() - logits(load(config), name)).abs().mean()
    assert off < 1.5 * float(notes["bfloat16_mean_error"]), off


@pytest.mark.parametrize("name", CASES)
def test_rpn_logits(load, name):
    """The untrained RPN, a copy of layers B..B+R-1, scores the image tokens as the reference's own layers do."""
    sdrpn = pytest.importorskip("sdrpn")
    case, (want, _) = CASES[name], load_golden(name)
    llava, (frozen, layers) = load(case["config"]), case["rpn"]
    rpn = sdrpn.RPN.from_layers(llava, frozen=frozen, layers=layers)
    with torch.no_grad():
        got = rpn(llava, picture(*case["picture"]), case["question"], history=case["history"])
    assert (got.flatten() - want["rpn.copy"][-1]).abs().max() < 1e-4

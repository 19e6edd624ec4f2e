"""Our model against a reference library's outputs (made by golden/make_golden.py): logits within 1e-4, the same tokens.

A failing test names the first stage that differs; `python tests/golden/differ.py CASE` prints all of them.
"""
import pytest
import torch

import sdrpn
import slow
from differ import compare, first_break, load_golden
from formula import CASES, NEW_TOKENS, picture, prompt, weight


@pytest.mark.parametrize("name", CASES)
def test_every_stage(load, name):
    report = compare(load(CASES[name]["config"]), name)
    lines = ["parity breaks first at " + first_break(report), *(line for _, line in report)]
    assert not first_break(report), "\n".join(lines)


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens(load, name, monkeypatch):
    case, (want, notes) = CASES[name], load_golden(name)
    llava = load(case["config"])

    def ask():
        return llava.generate(picture(*case["picture"]), case["question"], NEW_TOKENS, case["history"])
    assert ask().strip() == notes["text"].strip()
    monkeypatch.setattr(type(llava), "detokenize", lambda self, ids: list(ids))  # the ids themselves
    assert ask() == want["tokens"].tolist()


def logits(llava, name):
    return slow.logits(llava, picture(*CASES[name]["picture"]), prompt(CASES[name]["question"], CASES[name]["history"]))


@pytest.mark.parametrize("name", CASES)
def test_float64_agrees_and_bfloat16_is_no_worse_than_the_reference(load, name):
    """Statistics, softmax and rotary tables are float32 or wider in any dtype: bfloat16 for them would show here."""
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
    case, (want, _) = CASES[name], load_golden(name)
    llava, (frozen, layers) = load(case["config"]), case["rpn"]
    rpn = sdrpn.RPN.from_layers(llava, frozen=frozen, layers=layers)
    with torch.no_grad():
        got = rpn(llava, picture(*case["picture"]), case["question"], history=case["history"])
    assert (got.flatten() - want["rpn.copy"][-1]).abs().max() < 1e-4

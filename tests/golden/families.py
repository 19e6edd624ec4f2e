"""What the tests of the other families share: their golden cases, and what runs behind a prefix.

    want = golden("qwen_wide")                                     # {name: tensor}
    crop, text, logits = second_look(m, case, shot, regions, 20)   # logits (t', vocab) of all behind the image
"""
import PIL
import pytest
import torch
from safetensors.torch import load_file

import slow
from formula import HERE
from sdrpn import Region, answer


SHRUNK = "qwen_wide", "qwen_tall", "deepseek_hybrid"  # tall pictures, or tall crops


def golden(name):
    if name in SHRUNK and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow shrinks tall pictures height first only from 13 on; pixels differ by some levels")
    return load_file(HERE / f"{name}.safetensors")


def close(ours, theirs, most=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < most


def region(grid, box, rows="1"):
    """A box of cells; rows, "10 11", says which of them count."""
    x0, y0, x1, y1 = box
    cells = torch.zeros(grid, dtype=torch.bool)
    cells[y0:y1, x0:x1] = torch.tensor([[c == "1" for c in row] for row in rows.split()])
    return Region(box, cells, 1.0)


@torch.no_grad()
def second_look(m, case, shot, regions, new_tokens):
    """-> the crop, the answer, the logits of all that follows the image."""
    question, history = case["question"], case["history"]
    found = answer(m, None, shot, question, max_new_tokens=new_tokens, history=history, regions=regions)
    (crop,), prefix = found.crops, found.prefix
    tail = m.embed(m.tail(m.prompt_ids(question, history)))
    spliced, rope, _ = m.splice(tail, prefix.position, found.crops)
    return crop, found.text, m.head(m.run(spliced, 0, m.depth, rope, prefix.cache, prefix.columns.stop))[0]


def ask_three(monkeypatch, m, rpn, shot, mode, regions):
    """Questions behind one prefix, with other crops or none, in float64: each as if all were run anew for it."""
    seen, prefix = [], None
    monkeypatch.setattr(m, "decode", lambda *given: seen.append(given) or [[]])
    for question, some in ("What is this?", regions), ("Who?", []), ("And that one, is it red?", regions[:1]):
        found = answer(m, rpn, shot, question, mode, regions=some, prefix=prefix)
        slow.answer(m, rpn, shot, question, mode, regions=some)
        (hidden, _, *places), (anew, _, *others) = seen[-2:]
        close(hidden, anew, 1e-9)
        assert places == others and prefix in (None, found.prefix)
        prefix = found.prefix

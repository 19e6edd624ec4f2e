"""`--compile`: the compiled decoding step chooses the eager one's tokens. Skipped where nothing can compile."""
import shutil
from types import SimpleNamespace

import pytest
import torch

import slow
from formula import CONFIGS, picture, write_checkpoint
from model import LLaVA, compile_decode
from sdrpn import answer


@pytest.mark.skipif(not any(shutil.which(c) for c in ("g++", "clang++")), reason="on a CPU it needs a C++ compiler")
def test_compiled_tokens_equal_eager_tokens(tmp_path):
    m = LLaVA.load(write_checkpoint(tmp_path, CONFIGS["grouped"]), "cpu", "float32")
    m.lm_head.weight[2] = 0  # EOS is never the likeliest
    m.detokenize = list
    shot, rpn = picture(157, 94, 1), SimpleNamespace(frozen=2)

    def look_at(n):
        """The two-stage answer with a crop of the first n cells."""
        regions = slow.regions_of((torch.arange(36) < n).view(6, 6))
        return answer(m, rpn, shot, "What is this?", max_new_tokens=12, regions=regions).text

    def answers():
        """Twice the same after another question: what an earlier answer left in the cache must not be seen."""
        one, longer = m.generate(shot, "Why?", 12), m.generate(shot, "Why?", 30, history=[("Who?", "me")])
        return [look_at(33), look_at(0), look_at(33), one, longer]

    eager = answers()
    seconds = compile_decode(m, 36 + 64 + 12, 2 * 36 + 64 + 30)
    assert seconds > 0 and {(layer, shape[2]) for layer, shape in m.static} == {(n, 512) for n in range(6)}
    torch._dynamo.config.error_on_recompile, before = True, torch._dynamo.config.error_on_recompile
    try:
        compiled = answers()
    finally:
        torch._dynamo.config.error_on_recompile = before
    assert compiled == eager
    assert len(m.static) == 6  # one size served both lengths, and every answer
    assert eager[0] == eager[2] != eager[1] and len(eager[0]) == 12 and len(eager[4]) == 30

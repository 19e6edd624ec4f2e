"""`--compile`: the compiled decoding step chooses the same tokens as the eager one. Skipped where nothing can compile."""
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from random_llava import QUESTION, Steered, band, random_model  # noqa: E402 (also puts the project on the path)
from sdrpn import answer  # noqa: E402


@pytest.mark.skipif(not any(shutil.which(c) for c in ("g++", "clang++")), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_tokens_equal_eager_tokens():
    llava, rpn, _, w = random_model("tiny", torch.device("cpu"), torch.float32, layers=3)
    image = Image.effect_noise((64, 48), 60).convert("RGB")

    def answers():
        """Twice the same after another question: what an earlier answer left in the cache must not be seen."""
        two = [answer(llava, Steered(rpn, band(8, n)), image, QUESTION, max_new_tokens=12, ignore_eos=True).text for n in (33, 0, 33)]
        return [*two, llava.generate(image, "Why?", 12), llava.generate(image, "Why?", 30, history=[("Who?", "me")])]

    eager = answers()
    seconds = llava.compile_decode(w.N + 64 + 12, 2 * w.N + 64 + 30)
    assert seconds > 0 and list(llava.static) == [(1, 512)]  # one size served both lengths
    torch._dynamo.config.error_on_recompile, before = True, torch._dynamo.config.error_on_recompile
    try:
        compiled = answers()
    finally:
        torch._dynamo.config.error_on_recompile = before
    assert compiled == eager
    assert eager[0] == eager[2] and len(eager[4].split()) == 30

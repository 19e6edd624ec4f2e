"""tests/paper/walk.py, one question through every equation: it prints what its comments say."""
import re
from pathlib import Path

import pytest

from calls import shell

WALK = Path(__file__).resolve().parent / "paper" / "walk.py"


@pytest.mark.background
def test_the_walk_prints_what_it_says(tmp_path):
    """Numbers with a point may differ by a little, as sums do on other machines; all else is equal."""
    run = shell(WALK)
    assert run.returncode == 0, run.stderr
    printed = run.stdout.splitlines()
    said = re.findall(r"^# prints: (.*)$", WALK.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(printed) == len(said) > 30
    for ours, theirs in zip(printed, said):
        number = r"\d+\.\d+"
        assert re.sub(number, "x", ours) == re.sub(number, "x", theirs)
        for a, b in zip(re.findall(number, ours), re.findall(number, theirs)):
            assert abs(float(a) - float(b)) < 0.05, (ours, theirs)
    assert len(list((WALK.parents[2] / "out" / "walk").glob("*.png"))) >= 7

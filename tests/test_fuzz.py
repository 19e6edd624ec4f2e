"""300 cases of tests/fuzz.py in one process and 4 as real ones: no traceback, no hang, no half-written file.

    python -m pytest tests/test_fuzz.py      # half a minute on one core
"""
import os
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import fuzz  # noqa: E402


def test_three_hundred_cases():
    """In a process of its own, whose memory is limited."""
    done = subprocess.run([sys.executable, fuzz.__file__, "--seed", "0", "--count", "300"], capture_output=True,
                          text=True, errors="replace", env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1200)
    assert done.returncode == 0 and "300 cases of seed 0, 0 failures" in done.stdout, done.stdout + done.stderr


def test_four_processes(tmp_path):
    assert not fuzz.fuzz_processes(1, range(4), tmp_path)

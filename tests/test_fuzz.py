"""120 cases of tests/speed/fuzz.py in a process of its own: no traceback, no hang, no half-written file."""
from calls import ROOT, shell


def test_damaged_files_end_in_one_line():
    done = shell(ROOT / "tests/speed/fuzz.py", "--count", 120)
    assert done.returncode == 0 and b"120 cases of seed 0, 0 failures" in done.stdout, done.stdout + done.stderr

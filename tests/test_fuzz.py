"""Some cases of tests/speed/fuzz.py: no traceback, no half-written file."""
from fuzz import fuzz


def test_damaged_files_end_in_one_line(tmp_path, capsys):
    assert fuzz(0, 30, tmp_path) == 0, capsys.readouterr().out

"""What the tests of the programs share: a tiny checkpoint with a finished run, and calls of main() that are read.

    code, out, err = call(infer, "img.png", "Why?", "--ckpt", made.ckpt)
    one_line(train, *argv(made, run), says="another lr; use --fresh")

"One line" means: exit code 2, and one line on stderr that begins with the program's name and says what the test
looks for. The checkpoint is fuzz.tiny's, 100 KB with peaked attention.
"""
import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import fuzz  # noqa: E402 (also puts the project on the path)
import infer  # noqa: E402
import train  # noqa: E402

ROOT = fuzz.ROOT


def make(folder):
    """ckpt, data (24 questions), image, and two runs: `whole`, undisturbed, of 6 steps, and `half`, stopped after 2."""
    torch.set_num_threads(1)
    made = SimpleNamespace(ckpt=fuzz.tiny(folder / "llava-tiny"), data=fuzz.question_file(folder / "set", 24),
                           image=folder / "set/pictures/0.png", whole=folder / "whole", half=folder / "half")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "ROOT", folder)
        m.setattr(train, "report", fuzz.dot)
        assert fuzz.quiet(train, argv(made, made.whole)) == 0
        assert fuzz.quiet(train, argv(made, made.half), stop_after=2) == 130
    return made


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """What the programs write by themselves goes to tmp_path; report.png is a dot."""
    for program in (infer, train):
        monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(train, "report", fuzz.dot)
    torch.set_num_threads(1)
    before = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, before)


def argv(made, out, *more):
    return fuzz.train_argv(made.ckpt, made.data, out, "--seed", 5, *more)


def ask(made, *more):
    return ["--ckpt", made.ckpt, "--device", "cpu", "--max-new-tokens", 2, *more]


def call(program, *words):
    """main(words) -> exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program.main([str(w) for w in words])
        except SystemExit as e:
            code = e.code or 0
    return code, out.getvalue(), err.getvalue()


def one_line(program, *words, says, code=2):
    """The call ends with this code and one line that holds these words (a regular expression)."""
    got, _, err = call(program, *words)
    name = Path(program.__file__).name + ":"
    lines = [line for line in err.splitlines() if line.startswith(name)]
    assert got == code and len(lines) == 1, (got, err)
    assert err.splitlines()[-1] == lines[0] and "Traceback" not in err, err
    assert re.search(says, lines[0]), lines[0]
    assert lines[0].isprintable(), lines[0]


def shell(*words, folder=ROOT, stdin=None, more=()):
    """A real process -> its result, as text."""
    words = [sys.executable, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(more)
    return subprocess.run(words, cwd=folder, input=stdin, capture_output=True, env=environment, timeout=600)


def weights(run):
    return (run / "rpn.safetensors").read_bytes()


def same_rpn(one, two):
    """Do two runs hold the same tensors, under whatever names of their checkpoints?"""
    one, two = (load_file(run / "rpn.safetensors") for run in (one, two))
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def losses(run):
    return [row["loss"] for row in rows_of(run / "log.jsonl")]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def everything(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextlib.contextmanager
def room_for(size):
    """No file can grow beyond `size` bytes: a full disk, to the program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

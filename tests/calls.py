"""What the tests of the programs share: a tiny checkpoint with finished runs, and calls of main() that are read.

    code, out, err = call(infer, "img.png", "Why?", "--ckpt", made.ckpt)
    one_line(train, *argv(made, run), says="another lr; use --fresh")
    first, second = call_two(train, *argv(made, run))

"One line" means: exit code 2, and one line on stderr that begins with the program's name and matches what the test
looks for. The checkpoint takes 100 KB; its attention is peaked enough that labels exist with --max-new-tokens 3.
"""
import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import data.evaluate
import data.toy.compare
import infer
import train
from data.run import Run
from formula import CONFIGS, picture, write_checkpoint
from model import load
from sdrpn import RPN

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no test needs a GPU, and a process that has one can not be forked
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even where the tests run under nohup
ROOT = Path(__file__).resolve().parents[1]
ASK = ("What is this?", "Is the red cup left of 12 books?", "And who?")
SCORES = "language_model.model.layers.1.self_attn.q_proj.weight"
RECIPE = {
    "attention": {"1": [1]}, "sink": {"kind": "norm", "c": 100.0}, "frozen_layers": 2, "rpn_layers": 2, "tau": 0.4,
    "train": {"lr": 1e-3, "warmup": 0.03, "betas": [0.9, 0.98], "epochs": 2, "batch_size": 4, "grad_accum": 2,
              "clip": 1.0}}


# ---- little files

def tiny(folder, shards=1):
    """A checkpoint with its recipe and an untrained RPN; anyone.safetensors is one of no checkpoint in particular."""
    folder = write_checkpoint(folder, CONFIGS["grouped"], shards=shards)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if SCORES in tensors:
            tensors[SCORES] *= 16
            save_file(tensors, path)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    m = load(folder, "cpu", "float32")
    rpn, facts = RPN.from_layers(m, 2, 2), {"frozen": 2, "layers": 2, "ckpt": folder.name, "tau": RECIPE["tau"]}
    rpn.save(folder / "anyone.safetensors", facts)
    rpn.save(folder / "rpn.safetensors", facts | {"fingerprint": m.fingerprint})
    return folder


def question_file(folder, count):
    """`count` questions over small pictures, with answers and boxes; every eighth is a conversation."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        picture(40 + 3 * i % 50, 70 - i % 40, i).save(folder / "pictures" / f"{i}.png")
        lines.append({"image": f"pictures/{i}.png", "question": ASK[:2] if i % 8 == 7 else ASK[i % 3], "id": i,
                      "answers": ["a cup", "yes"], "boxes": [[2, 3, 20, 30]], "metric": "vqa", "tau": 0.3})
    write_rows(folder / "questions.jsonl", lines)
    return folder / "questions.jsonl"


def make(folder):
    """ckpt, data (16 questions), image, and two runs: `whole`, undisturbed, of 4 steps, and `half`, stopped after 1."""
    made = SimpleNamespace(ckpt=tiny(folder / "llava-tiny"), data=question_file(folder / "set", 16),
                           image=folder / "set/pictures/0.png", whole=folder / "whole", half=folder / "half")
    with pytest.MonkeyPatch.context() as patch:
        move(patch, folder)
        assert call(train, *argv(made, made.whole))[0] == 0
        patch.setattr(Run, "any_stops", lambda run: run.step == 1)
        assert call(train, *argv(made, made.half))[0] == 130
    return made


def move(patch, folder):
    """What the programs write by themselves goes to `folder`; report.png is a dot."""
    for program in (infer, train, data.evaluate):
        patch.setattr(program, "ROOT", folder)
    patch.setattr(data.toy.compare, "report", lambda *how: Image.new("RGB", (1, 1)).save(how[4]))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    move(monkeypatch, tmp_path)


# ---- calls

def train_argv(ckpt, questions, out, *more):
    return ["--ckpt", ckpt, "--data", questions, "--out", out, "--max-new-tokens", 3, "--dtype", "float32",
            "--device", "cpu", *more]


def argv(made, out, *more):
    return train_argv(made.ckpt, made.data, out, "--seed", 5, *more)


def ask(made, *more):
    return ["--ckpt", made.ckpt, "--device", "cpu", "--max-new-tokens", 2, *more]


def call(program, *words):
    """main(words) -> exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program.main([str(word) for word in words])
        except SystemExit as e:
            code = e.code or 0
    return code, out.getvalue(), err.getvalue()


def one_line(program, *words, says, code=2, room=None):
    """The call ends with this code, and its last line on stderr, the only one of the program's, matches `says`.

    room: bytes beyond which no file can grow: a full disk, to the program.
    """
    got, _, err = forked((in_room, room, program.__name__, words))[0] if room else call(program, *words)
    lines = [line for line in err.splitlines() if line.startswith(Path(program.__file__).name + ":")]
    assert got == code and len(lines) == 1 and err.splitlines()[-1] == lines[0] and "Traceback" not in err, (got, err)
    assert re.search(says, lines[0]) and lines[0].isprintable(), lines[0]


def in_room(size, program, words):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return call(sys.modules[program], *words)


def in_rank(rank, port, program, words):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return call(sys.modules[program], *words)


def call_two(program, *words):
    """call() in two processes, which meet as those of torchrun do -> their two results."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    return forked(*((in_rank, rank, port, program.__name__, words) for rank in (0, 1)))


def forked(*calls):
    """Call function(*arguments), each in a copy of this process -> their results."""
    with multiprocessing.get_context("fork").Pool(len(calls)) as pool:
        waiting = [pool.apply_async(function, arguments) for function, *arguments in calls]
        return [result.get(timeout=300) for result in waiting]


FORKS = """import json, os, runpy, sys, torch  # which takes the longest: once for all
for line in sys.stdin:
    words, folder, place = json.loads(line)
    if os.fork() == 0:
        os.chdir(folder)
        for stream, name in enumerate((os.devnull, place + "/out", place + "/err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), stream)
        sys.argv = words
        if words[0] == "-c":
            sys.path[0], code = "", words.pop(1)
            exec(code, {"__name__": "__main__"})
        else:
            sys.path[0] = os.path.dirname(words[0])
            runpy.run_path(words[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
forking = threading.local()  # a process for each thread


def shell(*words, folder=ROOT):
    """What `python words` does in a process of its own, forked off one that has loaded torch -> its result, as text."""
    if not hasattr(forking, "process"):
        forking.process = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps([[*map(str, words)], str(folder), place]), file=forking.process.stdin, flush=True)
        code = int(forking.process.stdout.readline())
        out, err = (Path(place, name).read_text() for name in ("out", "err"))
    return SimpleNamespace(returncode=code, stdout=out, stderr=err)


def copy_project(folder):
    """The project without what is large or was made in it: .venv alone has gigabytes -> folder."""
    skip = shutil.ignore_patterns(".*", "out", "checkpoints", "*_images", "*.jsonl", "__pycache__")
    return shutil.copytree(ROOT, folder, ignore=skip)


# ---- what a run left

def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(run):
    return (run / "rpn.safetensors").read_bytes()


def losses(run):
    return [row["loss"] for row in rows_of(run / "log.jsonl")]


def everything(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

"""Stopped, gone on with, spread over processes, fed rubbish: nothing is lost, and nothing wrong is accepted in silence.

    python -m pytest tests/test_robust.py      # about a minute on one core, no network

The checkpoint is fuzz.tiny's, 100 KB with peaked attention. "one line" below means: exit code 2, and one line on stderr
that begins with the program's name and says what the test looks for. More rubbish: tests/fuzz.py.
"""
import contextlib
import importlib.util
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import fuzz  # noqa: E402 (also puts the project on the path)
import infer  # noqa: E402
import model  # noqa: E402
import sdrpn  # noqa: E402
import train  # noqa: E402
from clip import load_image  # noqa: E402
from formula import CONFIGS, picture, write_checkpoint  # noqa: E402

ROOT = fuzz.ROOT


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """ckpt, data (24 questions), and `whole`: the folder of an undisturbed run of 6 steps."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    made = type("Made", (), {"ckpt": fuzz.tiny(folder / "llava-tiny"), "data": fuzz.question_file(folder / "set", 24), "whole": folder / "whole"})
    assert fuzz.quiet(train, argv(made, made.whole)) == 0
    return made


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """What the programs write by themselves goes to tmp_path."""
    for program in (infer, train):
        monkeypatch.setattr(program, "ROOT", tmp_path)
    torch.set_num_threads(1)
    before = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, before)


def argv(made, out, *more):
    return fuzz.train_argv(made.ckpt, made.data, out, "--seed", 5, *more)


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
    assert got == code and len(lines) == 1 and err.splitlines()[-1] == lines[0] and "Traceback" not in err, (got, err)
    assert re.search(says, lines[0]), lines[0]


def ask(made, *more):
    return ["--ckpt", made.ckpt, "--device", "cpu", "--max-new-tokens", 2, *more]


def weights(run):
    return (run / "rpn.safetensors").read_bytes()


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def everything(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stop_in(monkeypatch, step, how):
    """`how` happens once, in the middle of this step (counted from 0)."""
    whole = train.Run.step

    def stepping(run, n):
        if n == step:
            monkeypatch.setattr(train.Run, "step", whole)
            how()
        return whole(run, n)
    monkeypatch.setattr(train.Run, "step", stepping)


# ---- stop and go on

def test_there_is_something_to_learn(made):
    log = [json.loads(line) for line in (made.whole / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6] and all(row["tokens"] > 50 and row["empty"] < row["samples"] == 8 for row in log)
    assert log[-1]["loss"] < log[0]["loss"]
    assert sorted(p.name for p in made.whole.iterdir()) == ["config.json", "labels", "log.jsonl", "report.png", "rpn.safetensors"]


def test_killed_at_random_moments(tmp_path):
    done, runs, wrong = fuzz.kills(5, 1, tmp_path)
    assert done >= 5 and not wrong


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_ctrl_c_finishes_the_step_and_half_and_half_is_the_whole(made, tmp_path, monkeypatch, after):
    run = tmp_path / "run"
    stop_in(monkeypatch, after, lambda: os.kill(os.getpid(), signal.SIGINT))
    code, _, err = call(train, *argv(made, run))
    assert code == 130 and "the same command goes on" in err.splitlines()[-1]
    assert len(losses(run)) == after + 1 and not (run / "rpn.safetensors").exists()
    code, _, err = call(train, *argv(made, run))
    assert code == 0 and f"going on at step {after + 1} of 6" in err
    assert weights(run) == weights(made.whole) and losses(run) == losses(made.whole) and not (run / "resume.safetensors").exists()


def test_a_second_ctrl_c_stops_at_once_and_labels_are_kept(made, tmp_path, monkeypatch):
    run, taught = tmp_path / "run", []
    teach = train.teach
    monkeypatch.setattr(train, "teach", lambda *a, **k: taught.append(len(a[3])) or teach(*a, **k))
    stop_in(monkeypatch, 2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    one_line(train, *argv(made, run), says="stopped; the same command goes on", code=130)
    labelled = len(losses(run)) * 8
    assert labelled == 16 and sum(taught) >= labelled
    taught.clear()
    assert call(train, *argv(made, run))[0] == 0 and weights(run) == weights(made.whole)
    assert sum(taught) < 24  # of 24 samples the third step's alone, conversations counted turn by turn; and six for the report


def test_ctrl_c_while_loading(made, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(model.LLaVA, "load", interrupted)
    one_line(train, *argv(made, tmp_path / "run"), says="stopped", code=130)
    one_line(infer, fuzz.question_file(tmp_path, 1).parent / "pictures/0.png", "Why?", *ask(made), says="stopped", code=130)


def half(made, run, *more):
    """A run of which two steps are done."""
    assert fuzz.quiet(train, argv(made, run, *more), stop_after=2) == 130
    return run


@pytest.mark.parametrize("more, says", [
    (["--lr", "0.01"], "another lr; use --fresh"), (["--batch-size", "2"], "another batch_size; .*--fresh"),
    (["--loss", "mse", "--no-sink-removal"], "another loss, sink_removal; .*--fresh"), (["--max-new-tokens", "4"], "max_new_tokens; .*--fresh"),
    (["--samples", "16"], "questions; .*--fresh"), (["--frozen-layers", "1"], "frozen_layers; .*--fresh"), (["--dtype", "float64"], "dtype; .*--fresh")])
def test_other_settings_are_refused(made, tmp_path, more, says):
    run = half(made, tmp_path / "run")
    before = everything(run)
    one_line(train, *argv(made, run, *more), says=says)
    assert everything(run) == before


def test_another_checkpoint_or_data_set_is_refused_and_fresh_starts_over(made, tmp_path):
    run, other = half(made, tmp_path / "run"), shutil.copytree(made.ckpt, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["language_model.model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    one_line(train, *argv(made, run, "--ckpt", other), says="another fingerprint; use --fresh")
    data = made.data.parent / "fewer.jsonl"
    data.write_text("".join(made.data.read_text().splitlines(keepends=True)[:18]))
    one_line(train, *argv(made, run, "--data", data), says="another data, questions; use --fresh")
    code, _, err = call(train, *argv(made, run, "--data", data, "--fresh"))
    assert code == 0 and "going on" not in err and len(losses(run)) == 6
    before = everything(run)
    code, _, err = call(train, *argv(made, run, "--data", data))
    assert code == 0 and "finished; --fresh trains it again" in err and weights(run) == before[Path("rpn.safetensors")]
    assert call(train, *argv(made, run, "--fresh"))[0] == 0 and weights(run) == weights(made.whole)


def test_leftovers_of_a_crash_are_removed_and_damaged_labels_made_again(made, tmp_path):
    run = half(made, tmp_path / "run")
    labels = sorted((run / "labels").glob("*.safetensors"))
    labels[0].write_bytes(labels[0].read_bytes()[:100])
    for name in ("resume.safetensors.partial", "labels/000004-0of1.safetensors.partial", "config.json.partial"):
        (run / name).write_bytes(b"half")
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lo')
    assert call(train, *argv(made, run))[0] == 0
    assert weights(run) == weights(made.whole) and losses(run) == losses(made.whole) and not list(run.rglob("*.partial"))
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json.partial").write_text("{")  # killed while the very first file was written
    assert call(train, *argv(made, tmp_path / "new"))[0] == 0 and weights(tmp_path / "new") == weights(made.whole)


def test_a_damaged_run_says_so_and_a_strangers_folder_is_left_alone(made, tmp_path):
    run = half(made, tmp_path / "run")
    for name in ("resume.safetensors", "config.json"):
        (run / name).write_bytes((run / name).read_bytes()[:-20])
        before = everything(run)
        one_line(train, *argv(made, run), says=f"{name}: damaged; .*--fresh")
        assert everything(run) == before
    assert call(train, *argv(made, run, "--fresh"))[0] == 0 and weights(run) == weights(made.whole)
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "holiday.jpg.partial").write_bytes(b"mine")
    for more in ([], ["--fresh"]):
        one_line(train, *argv(made, stranger, *more), says="not empty and not a run of this program")
    assert everything(stranger) == {Path("holiday.jpg.partial"): b"mine"}
    one_line(train, *argv(made, stranger / "holiday.jpg.partial" / "run"), says="Not a directory; free some space or name another --out")


@contextlib.contextmanager
def room_for(size):
    """No file can grow beyond `size` bytes: a full disk, to the program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [200, 3000, 50_000])
def test_a_full_disk_loses_nothing(made, tmp_path, size):
    run = half(made, tmp_path / "run")
    before = everything(run)
    with room_for(size):  # fails at the log, at the labels, at the weights
        one_line(train, *argv(made, run, "--save-every", 0), says=r"run/?.*(too large|os error 27).*free some space or name another --out")
    after = everything(run)
    assert all(after[name] == content for name, content in before.items() if name.name != "log.jsonl") and not list(run.rglob("*.partial"))
    assert call(train, *argv(made, run))[0] == 0 and weights(run) == weights(made.whole)


def test_safetensors_reports_of_a_full_disk(made, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    run = half(made, tmp_path / "run")
    before = everything(run)
    monkeypatch.setattr(train, "save_file", full)
    one_line(train, *argv(made, run, "--save-every", 0), says="No space left.*free some space.*the same command goes on")
    after = everything(run)
    assert all(after[name] == content for name, content in before.items() if name.name != "log.jsonl") and not list(run.rglob("*.partial"))


def test_eval_goes_on_and_scores_nothing_twice(made, tmp_path, monkeypatch):
    asked, answer, how = [], infer.answer, ["--eval", made.data, "--limit", 6, *ask(made)]
    monkeypatch.setattr(infer, "answer", lambda *a: asked.append(a[3]) or answer(*a))
    code, out, _ = call(infer, *how)
    want, (file,) = json.loads(out), (tmp_path / "out/eval").iterdir()
    rows, each = file.read_text().splitlines(), len(asked)
    assert code == 0 and want["questions"] == 6 and each == 12 and [json.loads(r)["n"] for r in rows] == list(range(6))

    def again(text, fewer):
        file.write_text(text)
        asked.clear()
        code, out, err = call(infer, *how)
        assert code == 0 and len(asked) == fewer and json.loads(out) == want, (asked, err)
        assert sorted(json.loads(line)["n"] for line in file.read_text().splitlines()) == list(range(6)) and [file] == list(file.parent.iterdir())
    again("\n".join(rows) + "\n", 0)
    again("\n".join(rows[:3]) + "\n" + rows[3][:40], 6)  # cut off in the fourth line
    again("\n".join(rows[:5]) + "\n" + rows[5], 2)  # whole, but for the end of the line
    again("\n".join([rows[0], "\0" * 50, '{"n"', *rows[2:]]) + "\n", 2)  # blocks lost by the file system
    (tmp_path / "out/eval/x").mkdir()
    assert call(infer, *how, "--tau", "0.9")[0] == 0 and len(list(file.parent.iterdir())) == 3  # another setting, another file
    file.write_text(json.dumps({"n": 0}) + "\n")
    one_line(infer, *how, says=f"{file.name}: what an earlier run scored is damaged; delete the file")


def test_eval_on_a_full_disk(made, tmp_path):
    how = ["--eval", made.data, "--limit", 3, *ask(made)]
    with room_for(600):
        one_line(infer, *how, says="File too large; check the path, the rights and the free space")
    assert call(infer, *how)[0] == 0
    (file,) = (tmp_path / "out/eval").iterdir()
    assert sorted(json.loads(line)["n"] for line in file.read_text().splitlines()) == [0, 1, 2]


def test_a_picture_that_can_not_be_written(made, tmp_path):
    image = made.data.parent / "pictures/0.png"
    with room_for(1000):
        one_line(infer, image, "Why?", *ask(made, "--save", tmp_path / "a.png"), says="too large; check the path, the rights and the free space")
    assert not list(tmp_path.iterdir())
    one_line(infer, image, "Why?", *ask(made, "--save", image / "a.png"), says=r"a directory|exists")


# ---- several processes

def together(command, folder, more=(), processes=2):
    """train.py as several forked processes over gloo -> the processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [fuzz.start(command, folder / "log", {"WORLD_SIZE": str(processes), "RANK": str(r), "LOCAL_RANK": str(r), "MASTER_ADDR": "127.0.0.1",
                                                 "MASTER_PORT": str(port)} | dict(more)) for r in range(processes)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_two_processes_are_one(made, tmp_path, dtype):
    code, _, err = call(train, *argv(made, tmp_path / "one", "--dtype", dtype))
    assert code == 0, err
    assert [fuzz.finish(p) for p in together(argv(made, tmp_path / "two", "--dtype", dtype), tmp_path)] == [0, 0], (tmp_path / "log").read_text()
    one, two = (load_file(tmp_path / name / "rpn.safetensors") for name in ("one", "two"))
    assert len(list((tmp_path / "two/labels").iterdir())) == 6 and len(list((tmp_path / "one/labels").iterdir())) == 3
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"))) < 1e-4
    if dtype == "float64":
        assert one["model.twig_norm.weight"].dtype == torch.float64
        assert max((one[k] - two[k]).abs().max() for k in one) < 1e-9


def test_a_run_goes_on_with_another_number_of_processes(made, tmp_path):
    run, how = tmp_path / "run", argv(made, tmp_path / "run", "--dtype", "float64", "--save-every", 0)
    assert call(train, *argv(made, tmp_path / "one", "--dtype", "float64"))[0] == 0
    for count in (2, 3):
        running = together(how, tmp_path, processes=count)
        while running[0].is_alive() and (not (run / "log.jsonl").exists() or len(losses_so_far(run)) < (2 if count == 2 else 4)):
            time.sleep(0.002)
        for process in running:
            process.kill()
            fuzz.finish(process)
    assert not (run / "rpn.safetensors").exists()
    code, _, err = call(train, *how)
    assert code == 0 and re.search("going on at step [1-5] of 6", err)
    one, two = (load_file(folder / "rpn.safetensors") for folder in (tmp_path / "one", run))
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-9


def losses_so_far(run):
    return [line for line in (run / "log.jsonl").read_text().split("\n")[:-1]]


def test_bad_samples_of_all_processes_count(made, tmp_path):
    data = made.data.parent / "two-bad.jsonl"
    lines = [json.loads(line) for line in made.data.read_text().splitlines()]
    for i in (3, 20):
        lines[i]["image"] = f"pictures/none{i}.png"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    running = together(argv(made, tmp_path / "run", "--data", data, "--max-bad", 10), tmp_path)
    assert [fuzz.finish(p) for p in running] == [0, 0], (tmp_path / "log").read_text()
    assert [json.loads(line)["sample"] for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()] == [2, 19]


def test_what_fails_in_all_processes_is_said_once(made, tmp_path):
    for name, how in (("ckpt", ["--ckpt", tmp_path / "none"]), ("flag", ["--nonsense"]), ("bad", ["--images", tmp_path])):
        (tmp_path / name).mkdir()
        running = together(argv(made, tmp_path / name / "run", *how), tmp_path / name)
        assert [fuzz.finish(p) for p in running] == [2, 2]
        assert (tmp_path / name / "log").read_text().count("train.py:") == 1


def test_one_process_that_fails_ends_the_run(made, tmp_path):
    """Under the real torchrun: the second of two processes fails in its second step, the first waits for its gradient."""
    (tmp_path / "failing.py").write_text(
        f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport train\nstep = train.Run.step\n"
        "def failing(run, n):\n    if n == 1 and os.environ['RANK'] == '1':\n        raise train.BadInput('the second process has had enough')\n"
        "    return step(run, n)\ntrain.Run.step = failing\ntrain.main()\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", tmp_path / "failing.py",
                           *map(str, argv(made, tmp_path / "run"))], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py:")]
    assert done.returncode not in (0, None) and said == ["train.py: the second process has had enough"], done.stderr
    assert len(losses(tmp_path / "run")) == 1
    assert "train.py\"," not in done.stderr  # torchrun's own traceback is none of ours


# ---- numbers

def test_numbers_that_are_not_finite_stop_training(made, tmp_path, monkeypatch):
    run, ids = tmp_path / "run", r"step 0, samples \['q\d+'.*"
    teach = train.teach

    def no_attention(*a, **k):
        lesson = teach(*a, **k)
        lesson.raw[0, 0] = float("nan")
        return lesson
    with monkeypatch.context() as m:
        m.setattr(train, "teach", no_attention)
        one_line(train, *argv(made, run), says=ids + "attention is not finite; .*--dtype float32")
    with monkeypatch.context() as m:
        m.setattr(train, "roi_loss_sum", lambda logits, labels: logits.sum() * float("inf"))
        one_line(train, *argv(made, run), says=ids + r"loss (-?inf|nan); the learning rate .*--lr, with --fresh")
    with monkeypatch.context() as m:
        m.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
        one_line(train, *argv(made, run), says=r"step 0, samples number \[\d+.*gradient norm nan; the learning rate")
    with monkeypatch.context() as m:
        m.setattr(model.LLaVA, "head", lambda llava, x: x.new_full((len(x), 407), float("nan")))
        one_line(train, *argv(made, tmp_path / "other"), says=ids + "logits are not finite in float32; try --dtype")
    assert call(train, *argv(made, run))[0] == 0 and weights(run) == weights(made.whole)  # and nothing of it was kept


def test_numbers_that_are_not_finite_stop_an_answer(made, monkeypatch):
    image = made.data.parent / "pictures/0.png"
    for target, name, wrong, says in (
            (model.LLaVA, "head", lambda llava, x: x.new_full((len(x), 407), float("inf")), "the model's logits are not finite in float32; try --dtype"),
            (sdrpn.RPN, "logits", lambda *_: torch.full((6, 6), float("nan")), "its map is not finite in float32; try --dtype")):
        with monkeypatch.context() as m:
            m.setattr(target, name, wrong)
            one_line(infer, image, "Why?", *ask(made), says=says)
            one_line(infer, "--eval", made.data, *ask(made), says=f"questions.jsonl: question 1: .*{says[-30:]}")


def test_labels_that_are_mostly_empty_are_warned_of(made, tmp_path):
    flat = shutil.copytree(made.ckpt, tmp_path / "flat")
    recipe = json.loads((flat / "recipe.json").read_text())
    (flat / "recipe.json").write_text(json.dumps(recipe | {"attention": {"0": None}}))
    code, _, err = call(train, *argv(made, tmp_path / "run", "--ckpt", flat, "--epochs", 1))
    assert code == 0 and re.search(r"warning: (100|9\d) % of the samples had no label at all: .*tables.py heads", err)
    assert "warning" not in call(train, *argv(made, tmp_path / "fine", "--epochs", 1))[2]
    assert "on cpu (--device) in float32 (--dtype)" in err


def test_an_old_torch_is_refused_at_import(monkeypatch, capsys):
    def again():
        spec = importlib.util.spec_from_file_location("clip_again", ROOT / "clip.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for version, ok in (("2.4.1+cu121", False), ("1.13.0", False), ("2.5.0", True), ("2.13.0a0+gitabc", True), ("3.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        if ok:
            again()
            continue
        with pytest.raises(SystemExit) as e:
            again()
        assert e.value.code == 2 and re.fullmatch(rf"torch {re.escape(version)}: .*pip install --upgrade torch\n", capsys.readouterr().err)


# ---- pictures

def png(w, h, depth=8, colour=2, body=b""):
    """A PNG with this header, whatever the data."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def grey16(path, low, high):
    Image.fromarray(np.linspace(low, high, 40 * 30).reshape(30, 40).astype(np.uint16)).save(path)


PICTURES = {  # name: (what writes it, what load_image must make of it)
    "animated.gif": (lambda p: picture(40, 30, 1).save(p, save_all=True, append_images=[picture(40, 30, 2)]), lambda a: a.shape == (30, 40, 3)),
    "cmyk.jpg": (lambda p: Image.new("CMYK", (40, 30), (0, 255, 255, 0)).save(p), lambda a: a[15, 20, 0] > 200 and a[15, 20, 1:].max() < 60),
    "grey16.png": (lambda p: grey16(p, 0, 65535), lambda a: a[0, 0].max() < 3 and a[-1, -1].min() > 252 and abs(int(a[15, 0, 0]) - 128) < 4),
    "dark16.png": (lambda p: grey16(p, 0, 255), lambda a: 100 < a[15, 0, 0] < 150),  # 8-bit values in a 16-bit file
    "grey16.tif": (lambda p: grey16(p, 0, 65535), lambda a: a[0, 0].max() < 3 and a[-1, -1].min() > 252),
    "float.tif": (lambda p: Image.new("F", (40, 30), float("nan")).save(p), lambda a: a.shape == (30, 40, 3)),
    "palette.png": (lambda p: Image.new("RGB", (40, 30), (9, 99, 9)).quantize(4).save(p, transparency=0), lambda a: (a == 255).all()),
    "alpha.webp": (lambda p: Image.new("RGBA", (40, 30), (9, 9, 9, 0)).save(p, lossless=True, exact=True), lambda a: (a == 255).all()),
    "bilevel.tif": (lambda p: Image.new("1", (40, 30), 1).save(p), lambda a: (a == 255).all()),
    "dot.png": (lambda p: Image.new("RGB", (1, 1), (1, 2, 3)).save(p), lambda a: a.tolist() == [[[1, 2, 3]]]),
    "strip.png": (lambda p: Image.new("RGB", (1, 5000), (1, 2, 3)).save(p), lambda a: a.shape == (5000, 1, 3)),
    "wide.bmp": (lambda p: Image.new("RGB", (5000, 1), (1, 2, 3)).save(p), lambda a: a.shape == (1, 5000, 3)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_work(made, tmp_path, name):
    write, right = PICTURES[name]
    write(tmp_path / name)
    assert right(np.asarray(load_image(tmp_path / name)))
    for mode in ("mask", "box"):
        code, out, err = call(infer, tmp_path / name, "What is this?", *ask(made, "--mode", mode, "--tau", "0.01"))
        assert code == 0, err
    assert (tmp_path / f"out/{Path(name).stem}.roi.png").is_file()


def test_exif_rotation_turns_picture_and_boxes(made, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(60, 30, 1).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (30, 60)
    code, out, _ = call(infer, tmp_path / "a.jpg", "Why?", *ask(made, "--json", "--tau", "0.001"))
    assert code == 0 and all(0 <= x0 < x1 <= 30 and 0 <= y0 < y1 <= 60 for x0, y0, x1, y1 in json.loads(out)["boxes"])


@pytest.mark.parametrize("name, content, says", [
    ("none.png", None, "none.png: no such image file; check the path"),
    ("", None, "no such image file"),
    ("empty.png", b"", "empty.png: not an image in a known format; use one of JPEG, PNG"),
    ("text.jpg", b"hello", "text.jpg: not an image"),
    ("page.pdf", b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n", "page.pdf: not an image"),
    ("macro.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "macro.eps: not an image"),
    ("cut.png", lambda b: b[:len(b) // 2], r"cut.png: the image is damaged or truncated \(OSError\); save it again"),
    ("cut.jpg", lambda b: b[:len(b) // 2], "cut.jpg: the image is damaged"),
    ("huge.png", png(20000, 10001), "huge.png: 20000x10001 pixels is above the limit of 200 megapixels"),
    ("long.png", png(1 << 30, 1), r"long.png: 1073741824x1 pixels is above the limit of .* 20000 a side; make it smaller"),
    ("line\nbreak.png", None, "line break.png: no such image file")])
def test_pictures_that_do_not(made, tmp_path, name, content, says):
    path = tmp_path / "pictures" / name
    path.parent.mkdir(exist_ok=True)
    if callable(content):
        picture(90, 70, 1).save(path)
        content = content(path.read_bytes())
    if content is not None:
        path.write_bytes(content)
    began, before = time.process_time(), everything(tmp_path)
    one_line(infer, path, "Why?", *ask(made), says=says)
    assert time.process_time() - began < 1 and everything(tmp_path) == before


# ---- questions

@pytest.mark.parametrize("question", ["a\tb\x00c\x07\x1b[31m\r\n", "Où est 猫 🙂👩‍👩‍👧?", "ما هذا؟ \u202eabc", "<image></s><s>[INST]", "x" * 300, "\u0301\u200d\ufeff", "?"])
def test_questions_that_work(made, question):
    code, out, err = call(infer, made.data.parent / "pictures/0.png", question, *ask(made))
    assert code == 0 and "Traceback" not in err


@pytest.mark.parametrize("question, says", [
    ("", "the question is empty"), (" \n\t", "the question is empty"), ("what " * 2000, r"need \d{4,} tokens, the model has room for 512; shorten"),
    ("a\udcffb", "not UTF-8")])
def test_questions_that_do_not(made, tmp_path, question, says):
    one_line(infer, made.data.parent / "pictures/0.png", question, *ask(made), says=says)
    assert not (tmp_path / "out").exists()


GOOD = '{"image": "pictures/0.png", "question": "Why?", "answers": ["x"]}'


@pytest.mark.parametrize("content, says", [
    (b"", "holds no question"), (b"\n\n", "holds no question"), (b'{"images": "."}\n', "holds no question"),
    (GOOD.encode() + b"\n{\"image\"\n", "line 2: not JSON"), (b"[1]\n", "line 1: not a JSON object"), (b"\xff\xfe\x00", "not readable as text"),
    (b'{"image": "a.png"}\n', "line 1: 'question' must be"), (b'{"question": "Why?"}\n', "line 1: 'image' must be a path"),
    (b'{"image": "a.png", "question": ["", "b"]}\n', "line 1: 'question' must be"),
    (b'{"image": "a.png", "question": "\\ud800"}\n', "line 1: 'question' must be"),
    (b'{"image": 3, "question": "Why?"}\n', "line 1: 'image' must be"),
    (GOOD[:-1].encode() + b', "tau": 2}\n', "line 1: 'tau' has a wrong type or value: 2"),
    (GOOD[:-1].encode() + b', "boxes": [[1, 2, 3, 1e400]]}\n', "line 1: 'boxes' has a wrong type"),
    (GOOD[:-1].encode() + b', "boxes": [[1, 2, 3, ' + b"9" * 400 + b']]}\n', "line 1: 'boxes' has a wrong type"),
    (GOOD[:-1].encode() + b', "cycle": [1]}\n', "line 1: 'cycle' has a wrong type"),
    (b'{"image": "../secret.png", "question": "Why?"}\n', "line 1: image '../secret.png' leaves the image root"),
    (b'{"image": "/etc/passwd", "question": "Why?"}\n', "line 1: image '/etc/passwd' leaves the image root"),
    (b'{"image": "a/../../b.png", "question": "Why?"}\n', "line 1: .* leaves the image root"),
    (b'{"image": "pictures/0.png", "question": "Why?"}\n', "question 1 has no 'answers'"),
    (b"[" * 100_000, "line 1: not JSON")])
def test_question_files_that_do_not_work(made, tmp_path, content, says):
    path = made.data.parent / "bad.jsonl"
    path.write_bytes(content)
    one_line(infer, "--eval", path, *ask(made), says=f"bad.jsonl.*{says}")
    if "answers" not in says:
        one_line(train, *argv(made, tmp_path / "run", "--data", path), says=f"bad.jsonl.*{says}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [GOOD + "\r\n" + GOOD + "\r\n", "\ufeff" + GOOD, '\ufeff{"images": "."}\r\n' + GOOD + "\n\n" + GOOD + "   "])
def test_question_files_from_windows_work(made, content):
    path = made.data.parent / "windows.jsonl"
    path.write_bytes(content.encode())
    code, out, err = call(infer, "--eval", path, *ask(made))
    assert code == 0 and json.loads(out)["questions"] == content.count("Why?"), err


def test_what_is_wrong_with_one_question_is_said_with_its_number(made):
    path = made.data.parent / "third.jsonl"
    for third, says in (('{"image": "none.png", "question": "Why?", "answers": ["x"]}', "question 3: .*none.png: no such image"),
                        (json.dumps({"image": "pictures/0.png", "question": "why " * 900, "answers": ["x"]}), r"question 3: .* need \d+ tokens")):
        path.write_text(f"{GOOD}\n{GOOD}\n{third}\n")
        one_line(infer, "--eval", path, *ask(made), says=f"third.jsonl: {says}")


def test_a_conversation_on_stdin(made, monkeypatch):
    image = made.data.parent / "pictures/0.png"
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\nAnd who?\n\n"))
    code, out, _ = call(infer, image, *ask(made))
    assert code == 0 and len(out.split("\n")) >= 3
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    one_line(infer, image, *ask(made), says="stdin or stdout .*PYTHONIOENCODING=utf-8")


def test_bad_samples_are_skipped_counted_and_listed(made, tmp_path):
    data, lines = made.data.parent / "some-bad.jsonl", [json.loads(line) for line in made.data.read_text().splitlines()]
    (data.parent / "pictures/cut.png").write_bytes((data.parent / "pictures/1.png").read_bytes()[:300])
    lines[2]["image"], lines[5]["image"], lines[9]["question"] = "pictures/cut.png", "none.png", "why " * 600
    lines[12]["question"] = ["why " * 80] * 6  # fits turn by turn, not as a conversation
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = tmp_path / "run"
    one_line(train, *argv(made, run, "--data", data), says=r"\d of 24 samples are bad, more than --max-bad 1.0 %; see .*skipped.jsonl")
    assert (run / "skipped.jsonl").is_file() and not (run / "rpn.safetensors").exists()
    code, _, err = call(train, *argv(made, run, "--data", data, "--max-bad", 20))
    skipped = {row["sample"]: row["why"] for row in map(json.loads, (run / "skipped.jsonl").read_text().splitlines())}
    assert code == 0 and sorted(skipped) == [1, 4, 8, 11], err
    assert "damaged" in skipped[1] and "no such" in skipped[4] and "tokens" in skipped[8] and "tokens" in skipped[11]
    assert sum(json.loads(line)["samples"] for line in (run / "log.jsonl").read_text().splitlines()) == 2 * 20
    run = tmp_path / "stopped"
    assert fuzz.quiet(train, argv(made, run, "--data", data, "--max-bad", 20), stop_after=4) == 130
    assert call(train, *argv(made, run, "--data", data, "--max-bad", 20))[0] == 0
    assert everything(run)[Path("skipped.jsonl")] == everything(tmp_path / "run")[Path("skipped.jsonl")] and weights(run) == weights(tmp_path / "run")
    one_line(train, *argv(made, tmp_path / "all", "--images", tmp_path, "--max-bad", 50), says="samples are bad")


def test_given_answers_are_one_for_each_turn(made, tmp_path):
    data, lines = made.data.parent / "given.jsonl", [json.loads(line) for line in made.data.read_text().splitlines()]
    lines[3]["question"], lines[3]["answers"] = ["What is this?", "And who is it?"], ["cat"]
    lines[4]["question"], lines[4]["answers"] = ["What is this?", "And who is it?"], ["cat", "owl"]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = call(train, *argv(made, tmp_path / "run", "--data", data, "--answers", "given", "--max-bad", 20))
    skipped = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert code == 0 and [row["sample"] for row in skipped] == [2] and "fewer answers than turns" in skipped[0]["why"], err


def test_an_rpn_of_mse_is_for_the_tables_only(made, tmp_path):
    code, out, err = call(train, *argv(made, tmp_path / "mse", "--loss", "mse"))
    assert code == 0 and "only `python tests/tables.py table3` reads" in err and not out
    assert (tmp_path / "mse/rpn.safetensors").is_file() and not (tmp_path / "mse/report.png").exists()


# ---- checkpoints, recipes, RPNs, flags

def test_checkpoints_that_do_not_work(made, tmp_path):
    image, empty = made.data.parent / "pictures/0.png", tmp_path / "empty"
    empty.mkdir()
    one_line(infer, image, "Why?", "--ckpt", empty, "--mode", "plain", says="empty/config.json: missing")
    one_line(train, *argv(made, tmp_path / "run", "--ckpt", empty), says="empty/config.json: missing")
    one_line(infer, image, "Why?", "--ckpt", tmp_path / "none", says="none: no such checkpoint folder, nor one of the names")
    sharded = fuzz.tiny(tmp_path / "sharded", 3)
    parts = sorted(sharded.glob("model-*.safetensors"))
    for a, b in ((parts[0], parts[1]), (parts[1], parts[2])):
        one = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(one)
    code, _, err = call(infer, image, "Why?", "--ckpt", sharded, "--mode", "plain", "--device", "cpu", "--max-new-tokens", 2)
    assert code == 0, err  # swapped shards: every tensor is still there under its name, so the index was the only thing wrong
    shutil.rmtree(tmp_path / "out")  # the picture of this answer, the only one here
    parts[1].write_bytes(parts[0].read_bytes())
    one_line(infer, image, "Why?", "--ckpt", sharded, "--mode", "plain", says="is there twice|tensors missing")
    wrong = shutil.copytree(made.ckpt, tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    tensors["language_model.model.layers.3.mlp.up_proj.weight"][5, 5] = float("nan")
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    for program, words in ((infer, [image, "Why?", "--ckpt", wrong, "--mode", "plain"]), (train, argv(made, tmp_path / "run", "--ckpt", wrong))):
        one_line(program, *words, says="layers.3.mlp.up_proj.weight holds NaN")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_tokenizers_of_another_vocabulary(made, tmp_path):
    image = made.data.parent / "pictures/0.png"
    for token, says in ((399, "400 pieces, but config.json has 407 embeddings and image token 399; use the tokenizer.model of this checkpoint"),
                        ("402", "image token 402"), (None, "image token None")):
        folder = shutil.copytree(made.ckpt, tmp_path / f"ckpt{token}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"image_token_index": token}))
        one_line(infer, image, "Why?", "--ckpt", folder, "--mode", "plain", says=says)
    (folder / "tokenizer.model").write_bytes(b"not a model")
    one_line(infer, image, "Why?", "--ckpt", folder, "--mode", "plain", says="tokenizer.model: not a sentencepiece model")


@pytest.mark.parametrize("key, value", [
    ("attention", {}), ("attention", {"6": [0]}), ("attention", {"1": [6]}), ("attention", {"1": []}), ("attention", [1]), ("attention", {"x": None}),
    ("attention", {"1": [True]}), ("softmax", "row"), ("sink", {"kind": "norm"}), ("sink", {"kind": "attention", "attention": {"9": None}, "threshold": 1}),
    ("sink", "norm"), ("frozen", 0), ("frozen", 6), ("frozen", "2"), ("layers", 5), ("tau", 1), ("tau", None), ("train", []), ("train", {"lr": 1}),
    ("train", {"lr": -1, "warmup": 0, "betas": [0.9, 0.98], "epochs": 1, "batch_size": 1, "grad_accum": 1, "clip": 1}),
    ("train", {"lr": 1, "warmup": 0, "betas": [0.9], "epochs": 1, "batch_size": 1, "grad_accum": 1, "clip": 1})])
def test_recipes_that_make_no_sense(made, tmp_path, key, value):
    folder = shutil.copytree(made.ckpt, tmp_path / "ckpt")
    recipe = json.loads((folder / "recipe.json").read_text()) | {key: value}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    one_line(train, *argv(made, tmp_path / "run", "--ckpt", folder), says=f"recipe.json: {key}.*: missing, or not of this model")
    assert not (tmp_path / "run").exists()


def test_recipes_that_are_no_recipes(made, tmp_path):
    folder = shutil.copytree(made.ckpt, tmp_path / "ckpt")
    for text, says in (("{}", "attention, softmax, sink, frozen, layers, tau, train: missing"), ("[]", "not a JSON object"), ("{", "not readable as JSON")):
        (folder / "recipe.json").write_text(text)
        one_line(infer, made.data.parent / "pictures/0.png", "Why?", *ask(made), "--ckpt", folder, says=f"recipe.json: {says}")


def with_facts(made, path, facts, change=lambda tensors: None):
    with safe_open(made.ckpt / "rpn.safetensors", framework="pt") as f:
        own = json.loads(f.metadata()["sdrpn"])
    tensors = load_file(made.ckpt / "rpn.safetensors")
    change(tensors)
    save_file(tensors, path, metadata={"sdrpn": json.dumps(own | facts) if isinstance(facts, dict) else facts})
    return path


@pytest.mark.parametrize("facts, says", [
    ({"fingerprint": "0123456789abcdef", "ckpt": "llava-other"}, "trained for another checkpoint .llava-other, fingerprint 0123456789abcdef"),
    ({"layers": 9}, "needs 11 decoder layers"), ({"layers": 0}, "does not say its depth"), ({"frozen": -3}, "does not say its depth"),
    ({"frozen": 0}, "does not say its depth"), ({"frozen": "2"}, "does not say its depth"), ({"layers": 3}, "tensors missing"), ("{", "does not say"),
    ({"loss": "mse"}, "its map is no probability"), ("[]", "does not say"), ("null", "does not say"), ('"x"', "does not say"), ("[" * 100_000, "does not say")])
def test_rpns_that_do_not_work(made, tmp_path, facts, says):
    path = with_facts(made, tmp_path / "rpn.safetensors", facts)
    one_line(infer, made.data.parent / "pictures/0.png", "Why?", *ask(made, "--rpn", path), says=f"rpn.safetensors: .*{says}")


def test_rpns_of_other_sizes_or_with_nan(made, tmp_path):
    image, name = made.data.parent / "pictures/0.png", "model.twig_norm.weight"
    for change, says in ((lambda t: t.update({name: torch.ones(60)}), r"has shape \(60,\), .* needs \(72,\)"), (lambda t: t[name].fill_(float("nan")), "holds NaN"),
                         (lambda t: t.pop(name), "1 RPN tensors missing")):
        path = with_facts(made, tmp_path / "rpn.safetensors", {}, change)
        one_line(infer, image, "Why?", *ask(made, "--rpn", path), says=says)
    path.write_bytes(path.read_bytes()[:1000])
    one_line(infer, image, "Why?", *ask(made, "--rpn", path), says="truncated or not safetensors")
    one_line(infer, image, "Why?", *ask(made, "--rpn", tmp_path / "none"), says="none: no such RPN")


@pytest.mark.parametrize("words, says", [
    (["--tau", "0"], r"--tau 0.0: must lie between 0 and 1"), (["--tau", "1"], "--tau 1.0"), (["--tau", "nan"], "--tau nan"), (["--tau", "x"], "--tau: invalid float"),
    (["--device", "gpu"], "--device gpu: not on this machine; use cpu"), (["--device", "meta"], "--device meta: not on this machine"),
    (["--device", "cuda:99"], "--device cuda:99: not on this machine"), (["--dtype", "int8"], "--dtype int8: must be float16"), (["--nonsense"], "unrecognized arguments"),
    (["--mode", "zoom"], "invalid choice"), (["--max-new-tokens", "0"], "must be at least 1"), (["--eval", "x.jsonl"], "name an image .* or --eval")])
def test_flags_of_infer(made, tmp_path, words, says):
    one_line(infer, made.data.parent / "pictures/0.png", "Why?", "--ckpt", made.ckpt, *words, says=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, says", [
    (["--samples", "0"], "--samples 0: must be at least 1"), (["--frozen-layers", "0"], "--frozen-layers 0: must be at least 1"), (["--lr", "nan"], "--lr nan"),
    (["--lr", "-1"], "--lr -1.0"), (["--rpn-layers", "9"], "--rpn-layers 9: both at least 1, together at most the model's 6"), (["--epochs", "x"], "invalid int"),
    (["--device", "tpu"], "--device tpu: not on this machine"), (["--loss", "l1"], "invalid choice"), (["--data", "none.jsonl"], "none.jsonl: not readable as text .No such")])
def test_flags_of_train(made, tmp_path, words, says):
    one_line(train, *argv(made, tmp_path / "run", *words), says=says)
    assert not list(tmp_path.iterdir())


def test_without_a_recipe_or_data_the_remedy_is_named(made, tmp_path):
    bare = write_checkpoint(tmp_path / "bare", CONFIGS["plain"])
    one_line(train, *argv(made, tmp_path / "run", "--ckpt", bare), says="no recipe.json, and no released recipe for 4 layers of 60; .*tables.py heads")
    one_line(train, "--ckpt", bare, says="llava_mix.jsonl is missing; make it with: python data/llava_mix.py")
    one_line(infer, made.data.parent / "pictures/0.png", "Why?", "--ckpt", bare, says="no RPN is trained for it yet; .*train.py --ckpt")


def test_out_last_that_names_nothing(made, tmp_path):
    image, run = made.data.parent / "pictures/0.png", tmp_path / "out/gone"
    run.mkdir(parents=True)
    (tmp_path / "out/last").write_text("gone\n")
    one_line(infer, image, "Why?", says="names gone, whose rpn.safetensors is gone")
    shutil.copy(made.ckpt / "rpn.safetensors", run)
    (run / "config.json").write_text("{}")
    one_line(infer, image, "Why?", says="None: no such checkpoint folder")


# ---- security

PRODUCT = [*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py")]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_runs_foreign_code_or_talks_to_a_network(path):
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"torch\s*\.\s*load|\bimport\s+pickle|pickle\.|\bmarshal\b|\bshelve\b|allow_pickle|weights_only", source)
    assert not re.search(r"(?<![\w.])(eval|exec|compile|__import__)\s*\(|os\.system|subprocess|\bpty\b|shell\s*=\s*True|ctypes", source)
    assert not re.search(r"^\s*(import|from)\s+(socket|ssl|http|urllib|requests|ftplib|smtplib|aiohttp|huggingface_hub|transformers)\b", source, re.M)
    assert not re.search(r"urlopen|urlretrieve|hf_hub_download|torch\.hub|load_state_dict_from_url", source)


def test_imports_are_the_five_packages_and_the_standard_library():
    own = {p.stem for p in ROOT.glob("*.py")} | {"data", "scenes"}
    for path in PRODUCT:
        for name in re.findall(r"^\s*(?:import|from)\s+([\w.]+)", path.read_text(encoding="utf-8"), re.M):
            top = name.split(".")[0]
            assert top in own | {"torch", "safetensors", "sentencepiece", "PIL", "numpy"} or top in sys.stdlib_module_names, (path, name)


def test_pillow_opens_six_formats_only(tmp_path, monkeypatch):
    opened, open_ = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(k.get("formats")) or open_(*a, **k))
    for suffix in ("ppm", "ico", "tga", "pcx", "im", "eps", "pdf"):
        picture(20, 20, 1).save(tmp_path / f"a.{suffix}")
        with pytest.raises(infer.BadInput, match="not an image in a known format"):
            load_image(tmp_path / f"a.{suffix}")
    assert set(opened) == {("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")}
    assert "Image.open(" not in "".join(p.read_text(encoding="utf-8") for p in ROOT.glob("*.py") if p.name != "clip.py")


def test_nothing_is_written_but_out_and_what_was_named(made, tmp_path, monkeypatch):
    """Every file opened for writing, by name, while both programs run."""
    written, watching = set(), [True]

    def watch(event, args):
        if watching and event == "open" and isinstance(args[0], (str, bytes, os.PathLike)) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.add(Path(os.fsdecode(args[0])).resolve())
        if watching and event in ("os.rename", "os.mkdir", "shutil.rmtree", "os.remove"):
            written.add(Path(os.fsdecode(args[1 if event == "os.rename" else 0])).resolve())
    sys.addaudithook(watch)
    monkeypatch.chdir(made.data.parent)
    try:
        assert call(train, *argv(made, tmp_path / "named"))[0] == 0
        assert call(infer, "pictures/0.png", "Why?", *ask(made))[0] == 0
        assert call(infer, "--eval", made.data, "--limit", 2, *ask(made))[0] == 0
    finally:
        watching.clear()
    assert len(written) > 5
    assert not [p for p in written if not any(p.is_relative_to(tmp_path / name) for name in ("named", "out"))]

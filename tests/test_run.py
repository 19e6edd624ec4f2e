"""A training run that is stopped, killed, resumed or spread over processes ends with the same weights.

    python -m pytest tests/test_run.py      # 15 seconds on one core, no network
"""
import contextlib
import json
import os
import shutil
import signal
import time
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import train
from calls import ROOT, argv, call, call_two, everything, losses, one_line, rows_of, weights, write_rows
from clip import BadInput
from data.run import Run, read_ahead


@contextlib.contextmanager
def in_step(step, act):
    """Training meanwhile calls act() in the middle of this step (counted from 0)."""
    learning_rate = train.learning_rate

    def acting(peak, warmup, at, steps):
        if at == step:
            act()
        return learning_rate(peak, warmup, at, steps)
    with mock.patch.object(train, "learning_rate", acting):
        yield


def send(name):
    """A function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), getattr(signal, name))


def count_taught(monkeypatch):
    """A list to which every call of teach() adds its number of prompts."""
    taught, teach = [], train.teach
    monkeypatch.setattr(train, "teach", lambda *how: taught.append(len(how[3])) or teach(*how))
    return taught


@pytest.fixture
def half(made, tmp_path):
    """A copy of a run that was stopped after one of its four steps."""
    return shutil.copytree(made.half, tmp_path / "run")


# ---- stop and resume

def test_there_is_something_to_learn(made):
    rows = rows_of(made.whole / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["tokens"] > 50 and row["empty"] < row["samples"] == 8 for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (made.whole / "skipped.jsonl").read_text() == "" and not (made.whole / "resume.safetensors").exists()
    umask = os.umask(0)
    os.umask(umask)
    assert (made.whole / "rpn.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_stopped_run_finishes_its_step_and_resumes_bit_by_bit(made, tmp_path):
    run = tmp_path / "run"
    for step, name in (0, "SIGINT"), (1, "SIGHUP"), (3, "SIGTERM"):
        with in_step(step, send(name)):
            code, _, err = call(train, *argv(made, run))
        assert code == 130 and "run the same command" in err.splitlines()[-1]
        assert len(losses(run)) == step + 1 and not (run / "rpn.safetensors").exists()
    code, _, err = call(train, *argv(made, run))
    assert code == 0 and "resuming at step 4 of 4" in err
    assert weights(run) == weights(made.whole) and losses(run) == losses(made.whole)


def test_a_second_ctrl_c_stops_at_once_and_the_labels_are_kept(made, tmp_path, monkeypatch):
    run, taught = tmp_path / "run", count_taught(monkeypatch)
    with in_step(1, lambda: [send("SIGINT")() for _ in range(2)]):
        one_line(train, *argv(made, run), says="stopped; run the same command to resume", code=130)
    assert len(losses(run)) == 1 and sum(taught) >= 16
    taught.clear()
    assert call(train, *argv(made, run))[0] == 0 and weights(run) == weights(made.whole) and not taught


def test_a_killed_run_resumes_bit_by_bit(made, tmp_path):
    """Killed in its second step, it loses that step's weights, but not its labels."""
    flags = argv(made, tmp_path / "run", "--save-every", 0)
    with in_step(1, send("SIGKILL")):
        child = os.fork()
        if child == 0:
            try:
                call(train, *flags)
            finally:
                os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    code, _, err = call(train, *flags)
    assert code == 0 and "resuming at step 1 of 4; 16 samples have labels" in err
    assert weights(tmp_path / "run") == weights(made.whole) and losses(tmp_path / "run") == losses(made.whole)


def test_two_processes_are_one(made, tmp_path):
    """The second is asked to stop in the first step and fails in the third; the same command resumes both."""
    def stop():
        if os.environ.get("RANK") == "1":
            send("SIGTERM")()

    def fail():
        if os.environ.get("RANK") == "1":
            raise BadInput("the second process has had enough")
    data, lines = made.data.with_name("two-bad.jsonl"), rows_of(made.data)
    lines[3]["image"] = lines[8]["image"] = "none.png"
    write_rows(data, lines)
    flags = ["--dtype", "float64", "--save-every", 0, "--data", data, "--max-bad", 20]
    one, two = argv(made, tmp_path / "one", *flags), argv(made, tmp_path / "two", *flags)
    with in_step(0, stop):
        assert [code for code, _, _ in call_two(train, *two)] == [130, 130]
    with in_step(2, fail):
        (first, _, said), (second, _, err) = call_two(train, *two)
    assert (first, second) == (1, 2) and err == "train.py: the second process has had enough\n"
    assert "resuming at step 1 of 4" in said and "train.py:" not in said
    assert [code for code, _, _ in call_two(train, *two)] == [0, 0] and call(train, *one)[0] == 0
    one, two = tmp_path / "one", tmp_path / "two"
    ours, theirs = (load_file(run / "rpn.safetensors") for run in (one, two))
    assert max((ours[key] - theirs[key]).abs().max() for key in ours) < 1e-9
    assert max(abs(a - b) for a, b in zip(losses(one), losses(two), strict=True)) < 1e-9
    assert sorted(row["sample"] for row in rows_of(two / "skipped.jsonl")) == [3, 8]
    assert len(list((two / "labels").iterdir())) == 4


def test_labels_are_made_once(made, half, monkeypatch):
    taught = count_taught(monkeypatch)
    (half / "resume.safetensors").unlink()
    assert call(train, *argv(made, half))[0] == 0 and weights(half) == weights(made.whole)
    assert 8 <= sum(taught) < 16  # those of the second step, conversations counted turn by turn


def test_what_torchrun_left_in_the_environment_does_no_harm(made, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = shutil.copytree(made.whole, tmp_path / "run")
    code, _, err = call(train, *argv(made, run))
    assert code == 0 and "finished; --fresh trains it again" in err and weights(run) == weights(made.whole)


# ---- whose folder it is

@pytest.mark.parametrize("more, changed", [
    (["--lr", "0.01", "--rpn-layers", "1"], "rpn_layers, lr"), (["--max-new-tokens", "4"], "max_new_tokens"),
    (["--samples", "9"], "questions"), (["--images", "."], "images"), (["--dtype", "float64"], "dtype")])
def test_a_run_with_other_settings_is_refused(made, half, more, changed):
    before = everything(half)
    one_line(train, *argv(made, half, *more), says=f"another .*({changed}).*; use --fresh to start over")
    assert everything(half) == before


def test_fresh_starts_over(made, half):
    (half / "notes.md").write_text("mine")
    assert call(train, *argv(made, half, "--epochs", 1, "--fresh"))[0] == 0 and weights(half) != weights(made.whole)
    assert call(train, *argv(made, half, "--fresh"))[0] == 0 and weights(half) == weights(made.whole)
    assert (half / "notes.md").read_text() == "mine" and losses(half) == losses(made.whole)


@pytest.mark.parametrize("files", [
    {"config.json": '{"names": ["cat"]}', "labels/000000-0of1.safetensors": "mine"}, {"config.json": '["sdrpn"]'},
    {"holiday.jpg": "mine"}, {"rpn.safetensors": "mine"}])
def test_a_folder_that_is_not_ours_is_left_alone(made, tmp_path, files):
    for name, text in files.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    before = everything(tmp_path)
    for more in ([], ["--fresh"]):
        one_line(train, *argv(made, tmp_path / "run", *more), says="run.*name another --out")
    assert everything(tmp_path) == before


def test_two_runs_in_one_folder_are_kept_apart(tmp_path):
    first = Run(tmp_path / "run", {"seed": 0}, samples=8, batch=4, epochs=1)
    with pytest.raises(BadInput, match="another train.py is running there"):
        Run(tmp_path / "run", {"seed": 0}, samples=8, batch=4, epochs=1, fresh=True)
    first.close()
    Run(tmp_path / "run", {"seed": 0}, samples=8, batch=4, epochs=1).close()


# ---- what goes wrong

@pytest.mark.parametrize("name", ["resume.safetensors", "labels/000000-0of1.safetensors", "config.json"])
def test_a_damaged_file_is_named(made, half, name):
    (half / name).write_bytes((half / name).read_bytes()[:-20])
    before = everything(half)
    one_line(train, *argv(made, half), says=f"{name}: .*; (delete it|name another --out)")
    assert everything(half) == before


@pytest.mark.parametrize("size", [3000, 50_000])  # it fails at the labels, at the weights
def test_a_full_disk_loses_nothing(made, half, size):
    before = everything(half)
    one_line(train, *argv(made, half, "--save-every", 0), says="not written; .*free space", room=size)
    after = everything(half)
    assert all(after[name] == content for name, content in before.items() if name.name != "log.jsonl")
    assert not list(half.rglob("*.partial"))
    assert call(train, *argv(made, half))[0] == 0 and weights(half) == weights(made.whole)


def test_bad_samples_are_skipped_counted_and_listed(made, tmp_path):
    data, lines = made.data.parent / "some-bad.jsonl", rows_of(made.data)
    (data.parent / "pictures/cut.png").write_bytes((data.parent / "pictures/1.png").read_bytes()[:300])
    lines[1]["image"], lines[4]["image"] = "pictures/cut.png", "none.png"
    lines[8]["question"] = "why " * 600
    lines[11]["question"] = ["why " * 80] * 6  # each turn fits, the conversation does not
    write_rows(data, lines)
    run, stopped, flags = tmp_path / "run", tmp_path / "stopped", ["--data", data, "--max-bad", 30]
    one_line(train, *argv(made, run, "--data", data), says=r"\d of 16 samples are bad, .*; see .*skipped.jsonl")
    assert rows_of(run / "skipped.jsonl") and not (run / "rpn.safetensors").exists()
    assert call(train, *argv(made, run, *flags))[0] == 0
    skipped = {row["sample"]: row["why"] for row in rows_of(run / "skipped.jsonl")}
    assert sorted(skipped) == [1, 4, 8, 11] and "cut.png" in skipped[1] and "none.png" in skipped[4]
    assert "tokens" in skipped[8] and "tokens" in skipped[11]
    assert sum(row["samples"] for row in rows_of(run / "log.jsonl")) == 2 * 12
    with in_step(2, send("SIGINT")):
        assert call(train, *argv(made, stopped, *flags))[0] == 130
    assert call(train, *argv(made, stopped, *flags))[0] == 0
    assert weights(stopped) == weights(run) and rows_of(stopped / "skipped.jsonl") == rows_of(run / "skipped.jsonl")


def test_a_gradient_that_is_not_finite_stops_training(made, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "group_loss", lambda scores, labels: scores.sum() * float("inf"))
    one_line(train, *argv(made, tmp_path / "run"), says="step 0: the gradient is (inf|nan); use a lower --lr")


def test_an_rpn_that_learnt_nothing_is_not_written(made, tmp_path):
    ckpt, run = shutil.copytree(made.ckpt, tmp_path / "ckpt"), tmp_path / "run"
    recipe = json.loads((ckpt / "recipe.json").read_text())
    recipe["sink"]["c"] = 1e-6  # every token is longer than that: all are sinks
    (ckpt / "recipe.json").write_text(json.dumps(recipe))
    one_line(train, *argv(made, run, "--ckpt", ckpt), says="none of the samples got a label.*--fresh")
    assert not (run / "rpn.safetensors").exists()


# ---- pictures are read ahead

def test_at_most_two_steps_are_read_ahead():
    loaded = []

    def load(item):
        loaded.append(item)
        if item == 5:
            raise BadInput("five")
        return -item
    steps = read_ahead(load, ([item, item + 1] for item in range(0, 100, 2)))
    assert next(steps) == [0, -1]
    time.sleep(0.1)
    assert sorted(loaded) == [0, 1, 2, 3, 4, 5]
    assert next(steps) == [-2, -3]
    with pytest.raises(BadInput, match="five"):  # in its own step, not before
        next(steps)
    assert max(loaded) < 10  # nothing that waited was still read


def test_a_question_file_is_used_whole_and_only_the_scenes_take_the_recipes_number(made):
    args = train.parser().parse_args(["--lr", "0.5"])
    recipe = train.load_recipe(ROOT / "data/toy/llava-toy")
    assert train.override(recipe.train, args).lr == 0.5 and train.override(recipe, args) == recipe
    assert len(train.open_questions(recipe.train, None, None, seed=0)[0]) == recipe.train.samples
    args.data = str(made.data)
    training = train.override(recipe.train, args)
    assert len(train.open_questions(training, None, None, seed=0)[0]) == 16
    first, again = (train.open_questions(training, None, 3, seed)[0].questions for seed in (1, 1))
    assert first == again and len(first) == 3

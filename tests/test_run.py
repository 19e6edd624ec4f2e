"""A run's folder: stopped, killed, gone on with, spread over processes; nothing is lost, no stranger's file touched.

    python -m pytest tests/test_run.py      # half a minute on one core, no network
"""
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import fuzz  # noqa: E402 (also puts the project on the path)
import infer  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from calls import (ROOT, argv, ask, call, everything, home, losses, one_line, room_for,  # noqa: E402, F401
                   rows_of, same_rpn, weights)
from clip import BadInput  # noqa: E402
from data import files, run as data_run  # noqa: E402
from data.run import Run  # noqa: E402


def stop_in(monkeypatch, step, how):
    """`how` happens once, in the middle of this step (counted from 0)."""
    share = Run.share

    def sharing(run, n):
        if n == step:
            monkeypatch.setattr(Run, "share", share)
            how()
        return share(run, n)
    monkeypatch.setattr(Run, "share", sharing)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def half(made, run):
    """A run of which two steps are done."""
    return shutil.copytree(made.half, run)


# ---- stop and go on

def test_there_is_something_to_learn(made):
    log = rows_of(made.whole / "log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert all(row["tokens"] > 50 and row["empty"] < row["samples"] == 8 for row in log)
    assert log[-1]["loss"] < log[0]["loss"]
    names = ["config.json", "labels", "log.jsonl", "report.png", "rpn.safetensors"]
    assert sorted(p.name for p in made.whole.iterdir()) == names


def test_killed_at_random_moments(tmp_path):
    _, runs, wrong = fuzz.kills(5, 1, tmp_path)
    assert runs and not wrong


@pytest.mark.parametrize("after", [0, 3, 5])
def test_ctrl_c_finishes_the_step_and_half_and_half_is_the_whole(made, tmp_path, monkeypatch, after):
    run = tmp_path / "run"
    stop_in(monkeypatch, after, interrupt)
    code, _, err = call(train, *argv(made, run))
    assert code == 130 and "the same command goes on" in err.splitlines()[-1]
    assert len(losses(run)) == after + 1 and not (run / "rpn.safetensors").exists()
    code, _, err = call(train, *argv(made, run))
    assert code == 0 and f"going on at step {after + 1} of 6" in err
    assert weights(run) == weights(made.whole) and losses(run) == losses(made.whole)
    assert not (run / "resume.safetensors").exists()


def test_a_second_ctrl_c_stops_at_once_and_labels_are_kept(made, tmp_path, monkeypatch):
    run, taught = tmp_path / "run", []
    teach = train.teach
    monkeypatch.setattr(train, "teach", lambda *a, **k: taught.append(len(a[3])) or teach(*a, **k))
    stop_in(monkeypatch, 2, lambda: [interrupt() for _ in range(2)])
    one_line(train, *argv(made, run), says="stopped; the same command goes on", code=130)
    labelled = len(losses(run)) * 8
    assert labelled == 16 and sum(taught) >= labelled
    taught.clear()
    assert call(train, *argv(made, run))[0] == 0 and weights(run) == weights(made.whole)
    assert 8 <= sum(taught) < 16  # of 24 samples the third step's alone, conversations counted turn by turn


def test_ctrl_c_while_loading(made, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    for program in (train, infer):
        monkeypatch.setattr(program, "load", interrupted)
    one_line(train, *argv(made, tmp_path / "run"), says="stopped", code=130)
    one_line(infer, made.image, "Why?", *ask(made), says="stopped", code=130)


def test_killed_between_the_weights_and_the_end_of_the_resume_point(made, tmp_path):
    run = shutil.copytree(made.whole, tmp_path / "run")
    half(made, tmp_path / "other")
    shutil.copy(tmp_path / "other/resume.safetensors", run)
    code, _, err = call(train, *argv(made, run))
    assert code == 0 and "finished; --fresh trains it again" in err
    assert weights(run) == weights(made.whole) and not (run / "resume.safetensors").exists()


@pytest.mark.parametrize("more, says", [
    (["--lr", "0.01"], "another lr; use --fresh"),
    (["--batch-size", "2"], "another batch_size; .*--fresh"),
    (["--max-new-tokens", "4"], "max_new_tokens; .*--fresh"),
    (["--samples", "16"], "questions; .*--fresh"),
    (["--frozen-layers", "1", "--lr", "0.01"], "another recipe, lr; .*--fresh"),
    (["--rpn-layers", "1"], "another recipe; .*--fresh"),
    (["--images", "."], "another images; .*--fresh"),
    (["--dtype", "float64"], "dtype; .*--fresh")])
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
    assert code == 0 and "finished; --fresh trains it again" in err
    assert weights(run) == before[Path("rpn.safetensors")]
    assert call(train, *argv(made, run, "--fresh"))[0] == 0 and weights(run) == weights(made.whole)


def test_a_moved_checkpoint_or_a_newline_in_its_config_is_the_same_model(made, tmp_path):
    run, moved = half(made, tmp_path / "run"), shutil.copytree(made.ckpt, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config, indent=3, sort_keys=True) + "\n\n")
    assert call(train, *argv(made, run, "--ckpt", moved))[0] == 0 and same_rpn(run, made.whole)
    code, _, err = call(infer, made.image, "Why?", *ask(made, "--ckpt", moved, "--rpn", made.whole / "rpn.safetensors"))
    assert code == 0, err
    config["text_config"]["rms_norm_eps"] = 1e-4  # another number is another model
    (moved / "config.json").write_text(json.dumps(config))
    one_line(infer, made.image, "Why?", *ask(made, "--ckpt", moved, "--rpn", made.whole), says="for another checkpoint")


def test_leftovers_of_a_crash_are_removed_and_damaged_labels_made_again(made, tmp_path):
    run = half(made, tmp_path / "run")
    labels = sorted((run / "labels").glob("*.safetensors"))
    labels[0].write_bytes(labels[0].read_bytes()[:100])
    for name in ("resume.safetensors.partial", "labels/000004-0of1.safetensors.partial", "config.json.partial"):
        (run / name).write_bytes(b"half")
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lo')
    assert call(train, *argv(made, run))[0] == 0
    assert weights(run) == weights(made.whole) and losses(run) == losses(made.whole)
    assert not list(run.rglob("*.partial"))
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json.partial").write_text("{")  # killed while the very first file was written
    assert call(train, *argv(made, tmp_path / "new"))[0] == 0
    assert weights(tmp_path / "new") == weights(made.whole)


def test_a_damaged_run_says_so(made, tmp_path):
    run = half(made, tmp_path / "run")
    for name in ("resume.safetensors", "config.json"):
        (run / name).write_bytes((run / name).read_bytes()[:-20])
        before = everything(run)
        one_line(train, *argv(made, run), says=f"{name}: damaged; .*--fresh")
        assert everything(run) == before
    assert call(train, *argv(made, run, "--fresh"))[0] == 0 and weights(run) == weights(made.whole)


# ---- what others left in the folder

STRANGERS = {
    "photos": {"holiday.jpg.partial": "mine", "config.json.partial": "mine", "resume.safetensors.partial": "mine"},
    "yolo": {"config.json": '{"names": ["cat"]}', "labels/a.txt": "0 .5 .5 .1 .1", "log.jsonl": "mine",
             "labels/000000-0of1.safetensors": "mine"},
    "text": {"config.json": "sdrpn = 1", "report.png": "mine"},
    "list": {"config.json": '["sdrpn"]', "rpn.safetensors": "mine"},
    "word": {"config.json": '"sdrpn"', "rpn.safetensors": "mine"},
    "number": {"config.json": "1", "skipped.jsonl": "mine"},
    "labels": {"labels/000000-0of1.safetensors": "mine"},
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("more", [[], ["--fresh"]])
def test_a_strangers_folder_is_left_alone(made, tmp_path, name, more):
    for path, text in STRANGERS[name].items():
        (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / path).write_text(text)
    before = everything(tmp_path)
    one_line(train, *argv(made, tmp_path / name, *more), says=f"{name}: not empty and not a run of this program")
    assert everything(tmp_path) == before


def test_a_checkpoint_as_out_is_left_alone(made, tmp_path):
    ckpt = shutil.copytree(made.ckpt, tmp_path / "ckpt")
    (ckpt / "labels").mkdir()
    before = everything(tmp_path)
    for more in ([], ["--fresh"]):
        one_line(train, *argv(made, ckpt, "--ckpt", ckpt, *more), says="not a run of this program; name another --out")
    assert everything(tmp_path) == before and (ckpt / "labels").is_dir()
    one_line(train, *argv(made, ckpt / "config.json" / "run"),
             says="Not a directory; check the path, free some space, or name another --out; then the same")


def test_in_a_run_only_what_it_wrote_is_deleted(made, tmp_path):
    run, mine = half(made, tmp_path / "run"), tmp_path / "mine.safetensors"
    mine.write_bytes((run / "labels/000000-0of1.safetensors").read_bytes())
    (run / "labels/000088-0of1.safetensors").symlink_to(mine)  # looks like labels, and is not ours
    (run / "labels/000099-0of1.safetensors").symlink_to(tmp_path / "nowhere")
    others = {"notes.md": b"mine", "labels/notes.txt": b"mine", "labels/old.safetensors": b"mine",
              "labels/1-0of1.safetensors.bak": b"mine", "draft.partial": b"mine", "labels/x.partial": b"mine"}
    for name, content in others.items():
        (run / name).write_bytes(content)
    for more in ([], ["--fresh"]):
        assert call(train, *argv(made, run, *more))[0] == 0
        assert weights(run) == weights(made.whole) and losses(run) == losses(made.whole)
        assert all((run / name).read_bytes() == content for name, content in others.items())
        assert (run / "labels/000088-0of1.safetensors").is_symlink() and mine.is_file()
        assert (run / "labels/000099-0of1.safetensors").is_symlink()


@pytest.mark.parametrize("at", range(1, 6))
def test_killed_while_starting_over_it_is_still_a_run(tmp_path, monkeypatch, at):
    out, settings, deleted, unlink = tmp_path / "run", {"seed": 0}, [], Path.unlink
    Run(out, settings, 8, 4, 1).close()
    (out / "rpn.safetensors").write_bytes(b"old")
    (out / "labels/000000-0of1.safetensors").write_bytes(b"old")

    def interrupted(path, **how):
        deleted.append(path)
        if len(deleted) == at:
            raise KeyboardInterrupt
        unlink(path, **how)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", interrupted)
        Run(out, settings, 8, 4, 1, fresh=True)
    run = Run(out, {"seed": 1}, 8, 4, 1, fresh=True)
    assert not run.finished and not run.labels.where and json.loads((out / "config.json").read_text())["seed"] == 1
    run.close()


def test_a_setting_that_only_the_old_run_has_is_another_run(tmp_path):
    Run(tmp_path / "run", {"seed": 0, "ablation": "sinks kept"}, 8, 4, 1).close()
    with pytest.raises(BadInput, match="another ablation; use --fresh"):
        Run(tmp_path / "run", {"seed": 0}, 8, 4, 1)


def test_a_damaged_file_of_labels_that_another_process_removes_first(tmp_path, monkeypatch):
    labels = data_run.Labels(tmp_path)
    (tmp_path / "000000-0of2.safetensors").write_bytes(b"damaged")
    load = labels.load

    def slower(path):
        path.unlink()
        return load(path)
    monkeypatch.setattr(labels, "load", slower)
    labels.refresh()
    assert not labels.where


def test_a_link_called_labels_is_not_followed(made, tmp_path):
    run, elsewhere = half(made, tmp_path / "run"), tmp_path / "elsewhere"
    (run / "labels").rename(elsewhere)
    (run / "labels").symlink_to(elsewhere)
    before = everything(tmp_path)
    for more in ([], ["--fresh"]):
        one_line(train, *argv(made, run, *more), says="labels: a link, which is not followed")
    assert everything(tmp_path) == before


def test_a_second_run_on_one_folder_is_refused_while_the_first_lives(made, tmp_path):
    run, long = tmp_path / "run", ["--epochs", 400]
    first = fuzz.start(argv(made, run, *long), tmp_path / "log")
    try:
        while not (run / "log.jsonl").is_file() or not (run / "log.jsonl").read_text().count("\n"):
            assert first.is_alive(), (tmp_path / "log").read_text()
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)  # so that nothing but the second run could change a file
        before = everything(run)
        for more in ([], ["--fresh"]):
            one_line(train, *argv(made, run, *long, *more), says="run: another train.py is running there; wait for it")
        assert everything(run) == before
    finally:
        first.kill()
        fuzz.finish(first)
    assert call(train, *argv(made, run, "--fresh"))[0] == 0  # a killed one leaves no lock
    assert weights(run) == weights(made.whole)


@pytest.mark.parametrize("step, gone", [(1, "run"), (1, "run/labels"), (4, "run"), (4, "run/labels")])
def test_a_folder_deleted_in_the_middle_is_said(made, tmp_path, monkeypatch, step, gone):
    stop_in(monkeypatch, step, lambda: shutil.rmtree(tmp_path / gone))
    one_line(train, *argv(made, tmp_path / "run"), says=rf"{gone}/.*: (No such file|removed or damaged while)")
    assert call(train, *argv(made, tmp_path / "run"))[0] == 0 and weights(tmp_path / "run") == weights(made.whole)


# ---- full disks

@pytest.mark.parametrize("size", [200, 3000, 50_000])
def test_a_full_disk_loses_nothing(made, tmp_path, size):
    run = half(made, tmp_path / "run")
    before = everything(run)
    with room_for(size):  # fails at the log, at the labels, at the weights
        one_line(train, *argv(made, run, "--save-every", 0),
                 says=r"run/?.*(too large|os error 27).*free some space, or name another --out")
    after = everything(run)
    assert all(after[name] == content for name, content in before.items() if name.name != "log.jsonl")
    assert not list(run.rglob("*.partial"))
    assert call(train, *argv(made, run))[0] == 0 and weights(run) == weights(made.whole)


def test_safetensors_reports_of_a_full_disk(made, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    run = half(made, tmp_path / "run")
    before = everything(run)
    for module in (data_run, files):  # labels, the resume point
        monkeypatch.setattr(module, "save_file", full)
    one_line(train, *argv(made, run, "--save-every", 0),
             says="No space left.*free some space.*the same command goes on")
    after = everything(run)
    assert all(after[name] == content for name, content in before.items() if name.name != "log.jsonl")
    assert not list(run.rglob("*.partial"))


# ---- several processes

def together(command, folder, more=(), processes=2):
    """train.py as several forked processes over gloo -> the processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | dict(more)
    return [fuzz.start(command, folder / "log", common | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(processes)]


def test_two_processes_are_one(made, tmp_path):
    code, _, err = call(train, *argv(made, tmp_path / "one", "--dtype", "float64"))
    assert code == 0, err
    running = together(argv(made, tmp_path / "two", "--dtype", "float64"), tmp_path)
    assert [fuzz.finish(p) for p in running] == [0, 0], (tmp_path / "log").read_text()
    one, two = (load_file(tmp_path / name / "rpn.safetensors") for name in ("one", "two"))
    assert len(list((tmp_path / "two/labels").iterdir())) == 6 and len(list((tmp_path / "one/labels").iterdir())) == 3
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"))) < 1e-4
    assert one["model.twig_norm.weight"].dtype == torch.float64
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-9


def test_a_run_goes_on_with_another_number_of_processes(made, tmp_path):
    run, how = tmp_path / "run", argv(made, tmp_path / "run", "--dtype", "float64", "--save-every", 0)
    assert call(train, *argv(made, tmp_path / "one", "--dtype", "float64"))[0] == 0
    for count, enough in ((2, 2), (3, 4)):
        running = together(how, tmp_path, processes=count)
        while running[0].is_alive() and lines_so_far(run / "log.jsonl") < enough:
            time.sleep(0.002)
        for process in running:
            process.kill()
            fuzz.finish(process)
    assert not (run / "rpn.safetensors").exists()
    code, _, err = call(train, *how)
    assert code == 0 and re.search("going on at step [1-5] of 6", err)
    one, two = (load_file(folder / "rpn.safetensors") for folder in (tmp_path / "one", run))
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-9


def lines_so_far(path):
    return path.read_text().count("\n") if path.is_file() else 0


def test_bad_samples_of_all_processes_count(made, tmp_path):
    data, lines = made.data.parent / "two-bad.jsonl", rows_of(made.data)
    for i in (3, 20):
        lines[i]["image"] = f"pictures/none{i}.png"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    running = together(argv(made, tmp_path / "run", "--data", data, "--max-bad", 10), tmp_path)
    assert [fuzz.finish(p) for p in running] == [0, 0], (tmp_path / "log").read_text()
    assert [row["sample"] for row in rows_of(tmp_path / "run/skipped.jsonl")] == [2, 19]


def test_what_fails_in_all_processes_is_said_once(made, tmp_path):
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger/config.json").write_text("{}")
    for name, how, codes in (("ckpt", ["--ckpt", tmp_path / "none"], [2, 2]), ("flag", ["--nonsense"], [2, 2]),
                             ("bad", ["--images", tmp_path], [2, 2]),
                             ("out", ["--out", tmp_path / "stranger"], [2, 1])):  # the second waits for the first
        (tmp_path / name).mkdir()
        running = together(argv(made, tmp_path / name / "run", *how), tmp_path / name)
        assert [fuzz.finish(p) for p in running] == codes, (name, (tmp_path / name / "log").read_text())
        assert (tmp_path / name / "log").read_text().count("train.py:") == 1


def test_one_process_that_fails_ends_the_run(made, tmp_path):
    """Under the real torchrun: the second of two fails in its second step, the first waits for its gradient."""
    (tmp_path / "failing.py").write_text(
        f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport train\nshare = train.Run.share\n"
        "def failing(run, n):\n    if n == 1 and os.environ['RANK'] == '1':\n"
        "        raise train.BadInput('the second process has had enough')\n"
        "    return share(run, n)\ntrain.Run.share = failing\ntrain.main()\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                           tmp_path / "failing.py", *map(str, argv(made, tmp_path / "run"))],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py:")]
    assert done.returncode not in (0, None), done.stderr
    assert said == ["train.py: the second process has had enough"], done.stderr
    assert len(losses(tmp_path / "run")) == 1
    assert "train.py\"," not in done.stderr  # torchrun's own traceback is none of ours


# ---- numbers and labels

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
        m.setattr(train, "loss_sum", lambda scores, labels: scores.sum() * float("inf"))
        one_line(train, *argv(made, run), says=ids + r"loss (-?inf|nan); the learning rate .*--lr, with --fresh")
    with monkeypatch.context() as m:
        m.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
        one_line(train, *argv(made, run), says="step 0: gradient norm nan; the learning rate .*--lr, with --fresh")
    with monkeypatch.context() as m:
        m.setattr(model.LLaVA, "head", lambda llava, x: x.new_full((len(x), 407), float("nan")))
        one_line(train, *argv(made, tmp_path / "other"), says=ids + "logits are not finite in float32; try --dtype")
    assert call(train, *argv(made, run))[0] == 0 and weights(run) == weights(made.whole)  # and nothing of it was kept


def test_labels_that_are_mostly_empty_are_warned_of(made, tmp_path, monkeypatch):
    targets, said = train.targets, r"warning: (7\d|8\d) % of the samples had no label at all: .*tables.py heads"
    assert "warning" not in call(train, *argv(made, tmp_path / "fine", "--epochs", 1))[2]
    with monkeypatch.context() as m:
        m.setattr(train, "targets", lambda lesson, group: targets(lesson, group) if group[0].number % 4 == 0
                  else targets(lesson, group).fill_(-1))
        m.setattr(train, "read_groups", one_by_one(train.read_groups))
        code, _, err = call(train, *argv(made, tmp_path / "run", "--epochs", 1))
    assert code == 0 and re.search(said, err), err
    assert "on cpu (--device) in float32 (--dtype), 1 thread(s), OMP_WAIT_POLICY passive" in err


def one_by_one(read_groups):
    return lambda *a: ([sample] for group in read_groups(*a) for sample in group)


def test_an_rpn_that_learnt_nothing_is_not_installed(made, tmp_path):
    flat, run = shutil.copytree(made.ckpt, tmp_path / "flat"), tmp_path / "run"
    recipe = json.loads((flat / "recipe.json").read_text())
    recipe["sink"]["c"] = 1e-6  # every token is longer than that: all are sinks
    (flat / "recipe.json").write_text(json.dumps(recipe))
    for _ in range(2):
        one_line(train, *argv(made, run, "--ckpt", flat),
                 says="not one of 48 samples had a label.*tables.py heads.*recipe.json.*--fresh")
        assert not (run / "rpn.safetensors").exists() and not (tmp_path / "out/last").exists()
    (flat / "recipe.json").write_text((made.ckpt / "recipe.json").read_text())  # its remedy works
    assert call(train, *argv(made, run, "--ckpt", flat, "--fresh"))[0] == 0 and same_rpn(run, made.whole)


def test_bad_samples_are_skipped_counted_and_listed(made, tmp_path):
    data, lines = made.data.parent / "some-bad.jsonl", rows_of(made.data)
    (data.parent / "pictures/cut.png").write_bytes((data.parent / "pictures/1.png").read_bytes()[:300])
    lines[2]["image"], lines[5]["image"] = "pictures/cut.png", "none.png"
    lines[9]["question"] = "why " * 600
    lines[12]["question"] = ["why " * 80] * 6  # fits turn by turn, not as a conversation
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = tmp_path / "run"
    one_line(train, *argv(made, run, "--data", data),
             says=r"\d of 24 samples are bad, more than --max-bad 1.0 %; see .*skipped.jsonl")
    assert (run / "skipped.jsonl").is_file() and not (run / "rpn.safetensors").exists()
    code, _, err = call(train, *argv(made, run, "--data", data, "--max-bad", 20))
    skipped = {row["sample"]: row["why"] for row in rows_of(run / "skipped.jsonl")}
    assert code == 0 and sorted(skipped) == [1, 4, 8, 11], err
    assert "damaged" in skipped[1] and "no such" in skipped[4] and "tokens" in skipped[8] and "tokens" in skipped[11]
    assert sum(row["samples"] for row in rows_of(run / "log.jsonl")) == 2 * 20
    other = tmp_path / "stopped"
    assert fuzz.quiet(train, argv(made, other, "--data", data, "--max-bad", 20), stop_after=4) == 130
    assert call(train, *argv(made, other, "--data", data, "--max-bad", 20))[0] == 0
    assert everything(other)[Path("skipped.jsonl")] == everything(run)[Path("skipped.jsonl")]
    assert weights(other) == weights(run)
    one_line(train, *argv(made, tmp_path / "all", "--images", tmp_path, "--max-bad", 50), says="samples are bad")


def test_a_later_success_removes_the_list_of_an_earlier_failure(made, tmp_path):
    run, picture = tmp_path / "run", made.data.parent / "pictures/3.png"
    picture.rename(picture.with_suffix(".away"))
    one_line(train, *argv(made, run), says="1 of 24 samples are bad")
    assert [row["sample"] for row in rows_of(run / "skipped.jsonl")] == [3]
    picture.with_suffix(".away").rename(picture)
    assert call(train, *argv(made, run))[0] == 0 and weights(run) == weights(made.whole)
    assert not (run / "skipped.jsonl").exists()


# ---- the end of a run

def closing_command(err):
    """The words of the command that a run ends with, behind `python .../infer.py`."""
    python, program, image, *words = shlex.split(err.splitlines()[-1])
    assert python == "python" and Path(program).name == "infer.py" and image == "IMAGE", err
    return words


def test_any_out_is_remembered_and_the_closing_line_is_a_whole_command(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made.ckpt, tmp_path / "my model")
    code, _, err = call(train, *argv(made, "my $run", "--ckpt", "my model"))
    assert code == 0 and same_rpn(tmp_path / "my $run", made.whole)
    rpn = tmp_path / "my $run" / "rpn.safetensors"
    code, out, said = call(infer, made.image, *closing_command(err), "--json", "--max-new-tokens", 2)
    assert code == 0 and Path(json.loads(out)["rpn"]).resolve() == rpn, said
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for words in (closing_command(err)[:1], closing_command(err)):  # out/last, and the line itself, from anywhere
        code, out, said = call(infer, made.image, *words, "--json", "--max-new-tokens", 2)
        assert code == 0 and Path(json.loads(out)["rpn"]).resolve() == rpn, said


def test_the_usual_out_is_remembered_by_name(made, tmp_path):
    code, _, err = call(train, *argv(made, tmp_path / "out/llava-tiny"))
    assert code == 0 and (tmp_path / "out/last").read_text() == "llava-tiny\n"
    code, out, _ = call(infer, made.image, "Why?", "--json", "--max-new-tokens", 2)
    assert code == 0 and json.loads(out)["rpn"] == str(tmp_path / "out/llava-tiny/rpn.safetensors")
    assert json.loads(out)["ckpt"] == str(made.ckpt)


def test_out_last_that_names_nothing(made, tmp_path):
    run = tmp_path / "out/gone"
    run.mkdir(parents=True)
    (tmp_path / "out/last").write_text("gone\n")
    one_line(infer, made.image, "Why?", says="names .*gone, whose rpn.safetensors is gone; train again")
    shutil.copy(made.ckpt / "rpn.safetensors", run)
    (run / "config.json").write_text("{}")
    one_line(infer, made.image, "Why?", says="None: no such checkpoint folder")


def test_a_question_file_is_used_whole_and_only_the_scenes_take_the_recipes_number():
    training = {"lr": 1.0, "epochs": 1, "batch_size": 2, "grad_accum": 1, "samples": 7}
    recipe = {"frozen": 2, "layers": 3, "train": training}
    for flags, toy, samples in ([], True, 7), ([], False, None), (["--samples", "3"], False, 3):
        args = train.parser().parse_args(flags)
        train.fill_in(args, recipe, toy)
        assert args.samples == samples and args.lr == 1.0

"""Answers, conversations and scores: nothing is lost or overwritten, and what is said is true.

    python -m pytest tests/test_infer.py      # a quarter of a minute on one core, no network
"""
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import fuzz  # noqa: E402 (also puts the project on the path)
import infer  # noqa: E402
import model  # noqa: E402
import sdrpn  # noqa: E402
from calls import (ROOT, ask, call, everything, home, one_line, room_for, rows_of,  # noqa: E402, F401
                   shell)
from data.files import read_rows  # noqa: E402
from data.toy.scenes import SIZES, ToyQuestions  # noqa: E402


def kept(folder):
    return sorted(p.name for p in (folder / "out").iterdir() if p.is_file())


# ---- pictures of answers

def test_pictures_of_one_stem_and_turns_of_a_conversation_get_a_file_each(made, tmp_path, monkeypatch):
    other = tmp_path / "0.jpg"
    Image.open(made.image).save(other)
    for path in (made.image, other):
        assert call(infer, path, "Why?", *ask(made))[0] == 0
    first = everything(tmp_path / "out")
    assert kept(tmp_path) == ["0.roi-2.png", "0.roi.png"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\nAnd who?\n\n"))
    code, out, err = call(infer, made.image, *ask(made))
    assert code == 0 and err.count("picture ") == 2 and len(out.split("\n")) >= 3
    assert kept(tmp_path) == ["0.roi-2.png", "0.roi-3.png", "0.roi-4.png", "0.roi.png"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is this?\nAnd who?\n"))
    assert call(infer, made.image, *ask(made, "--save", tmp_path / "out/talk.jpg"))[0] == 0
    assert {"talk.jpg", "talk-2.jpg"} < set(kept(tmp_path))
    now = everything(tmp_path / "out")
    assert all(now[name] == content for name, content in first.items())


def test_the_input_is_never_overwritten(made, tmp_path, monkeypatch):
    own, link = tmp_path / "own.png", tmp_path / "link.png"
    own.write_bytes(made.image.read_bytes())
    link.symlink_to(own)
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    for image, save in ((own, own), (own, "own.png"), (own, link), (link, own), (own, "./x/../own.png")):
        (tmp_path / "x").mkdir(exist_ok=True)
        one_line(infer, image, "Why?", *ask(made, "--save", save), says="is the input, which is never overwritten")
    assert everything(tmp_path) == before


def test_the_suffix_says_the_format_or_is_refused(made, tmp_path):
    for suffix, form in ((".png", "PNG"), (".JPG", "JPEG"), (".webp", "WEBP")):
        path = tmp_path / f"a{suffix}"
        assert call(infer, made.image, "Why?", *ask(made, "--save", path))[0] == 0
        with Image.open(path) as saved:
            assert saved.format == form
    before = everything(tmp_path)
    for name in ("a", "a.txt", "a.safetensors", ".png"):
        one_line(infer, made.image, "Why?", *ask(made, "--save", tmp_path / name), says="no format of a picture")
    assert everything(tmp_path) == before


def test_a_picture_that_can_not_be_written(made, tmp_path):
    with room_for(1000):
        one_line(infer, made.image, "Why?", *ask(made, "--save", tmp_path / "a.png"),
                 says="too large; check the path, the rights and the free space")
    assert not list(tmp_path.iterdir())
    one_line(infer, made.image, "Why?", *ask(made, "--save", made.image / "a.png"), says=r"directory|exists")


# ---- answers

def test_stdin_that_is_not_text(made, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    one_line(infer, made.image, *ask(made), says="stdin or stdout .*PYTHONIOENCODING=utf-8")


def test_answers_kinds_and_file_names_can_not_control_the_terminal(made, tmp_path, monkeypatch):
    evil = "\x1b]0;owned\x07\x9b2J\u202e"
    monkeypatch.setattr(model.LLaVA, "detokenize", lambda m, ids: f"one\ntwo {evil}")
    image = tmp_path / f"a{evil}.png"
    image.write_bytes(made.image.read_bytes())
    code, out, err = call(infer, image, "Why?", *ask(made))
    assert code == 0 and out == "one\ntwo \\x1b]0;owned\\x07\\x9b2J\\u202e\n"
    lines = rows_of(made.data)
    lines[1]["kind"] = f"kind{evil}"
    data = made.data.parent / f"evil{evil}.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said, more = call(infer, "--eval", data, "--limit", 3, *ask(made))
    assert code == 0 and "\\x1b]0;owned" in more
    for text in (out, err, said, more):
        assert all(c.isprintable() or c == "\n" for c in text), text
    lines[1]["image"] = f"none{evil}.png"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one_line(infer, "--eval", data, *ask(made), says=r"question 1: .*none\\x1b\]0;owned\\x07\\x9b2J\\u202e.png: ")


def test_the_toy_says_what_it_does_not_know(tmp_path):
    note, size = "the toy knows only its own scenes", (640, 427)
    assert size not in SIZES
    Image.new("RGB", size, "red").save(tmp_path / "photo.png")
    ToyQuestions("test", 6)[0][0].save(tmp_path / "scene.png")
    for name, mode, times in (("photo.png", "mask", 1), ("photo.png", "plain", 1), ("scene.png", "mask", 0)):
        words = "--ckpt", "toy", "--device", "cpu", "--mode", mode, "--max-new-tokens", 2
        code, out, err = call(infer, tmp_path / name, "What number is on the star?", *words)
        assert code == 0 and err.count(note) == times and note not in out, err


def test_numbers_that_are_not_finite_stop_an_answer(made, monkeypatch):
    for target, name, wrong, says in (
            (model.LLaVA, "head", lambda llava, x: x.new_full((len(x), 407), float("inf")),
             "the model's logits are not finite in float32; try --dtype"),
            (sdrpn.RPN, "score", lambda *_: torch.full((1, 6, 1, 36), float("nan")),
             "its map is not finite in float32; try --dtype")):
        with monkeypatch.context() as m:
            m.setattr(target, name, wrong)
            one_line(infer, made.image, "Why?", *ask(made), says=says)
            one_line(infer, "--eval", made.data, *ask(made), says=f"questions.jsonl: question 1: .*{says[-30:]}")


# ---- scores

def the_file(folder):
    (file,) = (folder / "out/eval").glob("*.jsonl")
    return file


def without_times(rows):
    for row in rows:
        for name in ("plain", "two_stage"):
            row[name].pop("seconds", None)
    return rows


def test_eval_goes_on_and_scores_nothing_twice(made, tmp_path, monkeypatch):
    asked, answer, how = [], infer.answer, ["--eval", made.data, "--limit", 6, *ask(made)]
    monkeypatch.setattr(infer, "answer", lambda *a: asked.append(a[3]) or answer(*a))
    code, out, err = call(infer, *how)
    want, file = json.loads(out), the_file(tmp_path)
    rows, each = file.read_text().splitlines(), len(asked)
    assert code == 0 and want["questions"] == 6 and each == 12
    assert [json.loads(r)["n"] for r in rows] == list(range(6)) and f"answers: {file}" in err

    def again(text, fewer):
        file.write_text(text)
        asked.clear()
        code, out, err = call(infer, *how)
        assert code == 0 and len(asked) == fewer and json.loads(out) == want, (asked, err)
        assert sorted(row["n"] for row in rows_of(file)) == list(range(6))
        assert [file] == list(file.parent.iterdir()) and f"answers: {file}" in err
    again("\n".join(rows) + "\n", 0)
    again("\n".join(rows[:3]) + "\n" + rows[3][:40], 6)  # cut off in the fourth line
    again("\n".join(rows[:5]) + "\n" + rows[5], 2)  # whole, but for the end of the line
    again("\n".join([rows[0], "\0" * 50, '{"n"', *rows[2:]]) + "\n", 2)  # blocks lost by the file system
    asked.clear()
    how[3] = 8  # two questions more: six are scored already, the second of these has two turns
    assert call(infer, *how)[0] == 0 and len(asked) == 2 * 3 and the_file(tmp_path) == file
    (tmp_path / "out/eval/x").mkdir()
    assert call(infer, *how, "--tau", "0.9")[0] == 0
    assert len(list(file.parent.iterdir())) == 3  # another setting, another file
    file.write_text(json.dumps({"n": 0}) + "\n")
    one_line(infer, *how, says=f"{file.name}: what an earlier run scored is damaged; use --fresh")
    assert call(infer, *how, "--fresh")[0] == 0


def test_a_stored_score_is_not_shown_again_after_something_changed(made, tmp_path, monkeypatch):
    """The code, the pictures, the RPN or a setting: each is another file of answers."""
    data = shutil.copytree(made.data.parent, tmp_path / "set") / made.data.name
    project = fuzz.product(tmp_path / "project")
    monkeypatch.setattr(infer, "__file__", str(project / "infer.py"))
    ckpt, asked, answer = shutil.copytree(made.ckpt, tmp_path / "llava-tiny"), [], infer.answer
    monkeypatch.setattr(infer, "answer", lambda *a: asked.append(1) or answer(*a))

    def scored(*more):
        """How many questions are asked in two ways each."""
        asked.clear()
        code, _, err = call(infer, "--eval", data, "--limit", 2, *ask(made, "--ckpt", ckpt, *more))
        assert code == 0 and ("going on" in err) == (len(asked) == 0), err
        return len(asked) / 2

    assert scored() == 2 and scored() == 0
    for name in ("clip.py", "model.py", "sdrpn.py", "infer.py", "data/metrics.py"):
        (project / name).write_text((project / name).read_text() + "# changed\n")
        assert scored() == 2 and scored() == 0, name
    picture = data.parent / rows_of(data)[2]["image"]
    Image.open(picture).transpose(Image.Transpose.ROTATE_180).save(picture)
    assert scored() == 2 and scored() == 0
    os.utime(picture, ns=(1, 1))
    assert scored() == 2 and scored() == 0
    shutil.copy(ckpt / "anyone.safetensors", ckpt / "rpn.safetensors")
    assert scored() == 2 and scored() == 0
    assert scored("--fresh") == 2 and scored() == 0
    recipe = json.loads((ckpt / "recipe.json").read_text())
    (ckpt / "recipe.json").write_text(json.dumps(recipe | {"tau": 0.2}))
    assert scored() == 2 and scored() == 0
    with open(ckpt / "tokenizer.model", "ab") as tokenizer:
        tokenizer.write(b"\x98\x06\x01")  # a field that nothing reads
    assert scored() == 2 and scored() == 0
    for more in (["--mode", "box"], ["--tau", "0.9"], ["--max-new-tokens", "3"], ["--dtype", "float64"]):
        assert scored(*more) == 2 and scored(*more) == 0, more


def test_an_evaluation_asks_each_kind_with_its_own_tau(made, tmp_path, monkeypatch):
    ckpt, asked, answer = shutil.copytree(made.ckpt, tmp_path / "llava-tiny"), [], infer.answer
    recipe, lines = json.loads((ckpt / "recipe.json").read_text()), rows_of(made.data)[1:4]
    kinds = {"text": {"tau": 0.3}, "natural": {"tau": 0.4}}
    (ckpt / "recipe.json").write_text(json.dumps(recipe | {"kinds": kinds}))
    monkeypatch.setattr(infer, "answer", lambda *a: asked.append(a[4:6]) or answer(*a))
    data = tmp_path / "kinds.jsonl"
    told = ({"kind": "natural"}, {"kind": "unheard of"}, {"kind": "natural", "tau": 0.2})
    lines = [{"image": line["image"], "question": "Why?", "answers": ["a"]} | own for line, own in zip(lines, told)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = call(infer, "--eval", data, "--images", made.data.parent, *ask(made, "--ckpt", ckpt))
    assert code == 0 and [tau for mode, tau in asked if mode == "mask"] == [0.4, 0.3, 0.2], err


def test_eval_on_a_full_disk(made, tmp_path):
    how = ["--eval", made.data, "--limit", 3, *ask(made)]
    with room_for(600):
        one_line(infer, *how, says="File too large; check the path, the rights and the free space")
    assert call(infer, *how)[0] == 0
    assert sorted(row["n"] for row in rows_of(the_file(tmp_path))) == [0, 1, 2]


def torchrun(folder, *words, processes=2):
    """infer.py below torchrun, its ROOT moved to `folder` -> the result."""
    (folder / "moved.py").write_text(
        f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport infer\nfrom pathlib import Path\n"
        f"infer.ROOT = Path({str(folder)!r})\nscore = infer.score\n"
        "def failing(m, rpn, args, q, number, root):\n"
        "    if str(number) == os.environ.get('FAIL_AT'):\n        raise infer.BadInput('had enough')\n"
        "    return score(m, rpn, args, q, number, root)\ninfer.score = failing\ninfer.main()\n")
    return lambda **more: shell("-m", "torch.distributed.run", "--nproc_per_node", processes, folder / "moved.py",
                                *words, more=more)


def test_two_processes_score_what_one_does_and_go_on(made, tmp_path):
    how = ["--eval", made.data, "--limit", 7, *ask(made)]
    code, out, _ = call(infer, *how)
    want, one = json.loads(out), the_file(tmp_path)
    rows = without_times(rows_of(one))
    two = tmp_path / "two"
    two.mkdir()
    run = torchrun(two, *how)
    failed = run(FAIL_AT="5")  # the third question of the second process
    said = failed.stderr.decode()
    assert failed.returncode != 0 and said.count("infer.py: ") == 1 and "question 6: had enough" in said, said
    done = run()
    said = done.stderr.decode()
    assert done.returncode == 0, said
    (line,) = done.stdout.decode().splitlines()
    assert {k: v for k, v in json.loads(line).items() if "second" not in k} == \
        {k: v for k, v in want.items() if "second" not in k}
    file = the_file(two)
    assert re.search("going on: [2-6] of 7 questions are scored", said) and said.count("answers: ") == 1
    assert file.name == one.name and without_times(rows_of(file)) == rows
    assert list(file.parent.iterdir()) == [file]


def test_rows_that_a_crash_spoilt_leave_the_file(tmp_path):
    path, good = tmp_path / "a.jsonl", ['{"n": 0, "x": 1}', '{"n": 7, "x": 2}']
    spoilt = ["{", "[]", '{"x": 3}', '{"n": null}', '{"n": "7"}', '{"n": 7.5}', '{"n": Infinity}', "[" * 100_000]
    path.write_text("\n".join([good[0], *spoilt, good[1], '{"n": 8, "x"']))
    assert read_rows(path) == {0: {"n": 0, "x": 1}, 7: {"n": 7, "x": 2}}
    assert path.read_text().splitlines() == good

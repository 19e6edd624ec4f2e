"""infer.py: what it promises about answers, pictures, conversations and files of questions.

    python -m pytest tests/test_infer.py      # 10 seconds on one core, no network
"""
import io
import json
import os
import shutil
import sys

import pytest
import torch
from PIL import Image

import data.draw
import data.evaluate
import infer
import model
from calls import ROOT, ask, call, call_two, everything, one_line, rows_of, write_rows
from clip import load_image
from data.toy.scenes import ToyQuestions
from sdrpn import RPN, answer, explain_teacher, load_recipe


def ok(*words):
    """A call of infer that succeeds -> stdout, stderr."""
    code, out, err = call(infer, *words)
    assert code == 0, err
    return out, err


def files(folder):
    return sorted(path.name for path in (folder / "out").iterdir())


@pytest.fixture
def alone(made):
    """alone(image, question, ...): an answer with nothing before it."""
    m = model.load(made.ckpt, "cpu")
    rpn = RPN.load(made.ckpt, m)
    return lambda image, question, **how: answer(m, rpn, load_image(image), question, max_new_tokens=2, **how)


def type_in(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))


# ---- one question

def test_the_answer_is_printed_before_anything_is_drawn(made, monkeypatch):
    def draw(*how):
        raise OSError("no room")
    want, _ = ok(made.image, "Why?", *ask(made, "--save", "none"))
    monkeypatch.setattr(data.draw, "answer_picture", draw)
    code, out, err = call(infer, made.image, "Why?", *ask(made))
    assert want and (code, out) == (2, want) and err.endswith("infer.py: no room\n")


def test_json_is_one_object_and_flags_may_stand_anywhere(made, alone, tmp_path):
    flags = ask(made, "--json", "--mode", "box", "--tau", 0.2, "--save", "none")
    want = alone(made.image, "Why?", mode="box", tau=0.2)
    for words in ([made.image, "Why?", *flags], [made.image, *flags, "Why?"], [*flags, made.image, "Why?"]):
        found = json.loads(ok(*words)[0])
        assert want.boxes and found.pop("ms").keys() == {"prefill", "answer"}
        assert found == {"answer": want.text, "boxes": [*map(list, want.boxes)], "tau": 0.2, "mode": "box",
                         "ckpt": str(made.ckpt), "rpn": str(made.ckpt / "rpn.safetensors")}
    assert not (tmp_path / "out").exists()  # nothing was drawn


def test_no_picture_takes_the_name_of_another(made, tmp_path):
    for _ in range(2):
        ok(made.image, "Why?", *ask(made))
    assert files(tmp_path) == ["0.roi-2.png", "0.roi.png"]


def test_save_names_the_picture_and_never_overwrites_the_input(made, tmp_path):
    own = shutil.copy(made.image, tmp_path / "own.png")
    before = everything(tmp_path)
    for name, says in (("x/../own.png", "input picture"), ("a.txt", "written as")):
        one_line(infer, own, "Why?", *ask(made, "--save", tmp_path / name), says=says)
    one_line(infer, own, "Why?", *ask(made, "--save", tmp_path / "full.png"), says="full.png: File too large",
             room=1000)
    assert everything(tmp_path) == before
    ok(own, "Why?", *ask(made, "--save", tmp_path / "new.webp"))
    assert Image.open(tmp_path / "new.webp").format == "WEBP"


def test_explain_draws_every_step(made, tmp_path, monkeypatch):
    drawn, draw = [], data.draw.explain_picture
    monkeypatch.setattr(data.draw, "explain_picture", lambda steps: drawn.append(steps) or draw(steps))
    out, _ = ok(made.image, "Why?", *ask(made, "--explain", "--tau", 0.1))
    m, (steps,) = model.load(made.ckpt, "cpu"), drawn
    teacher = explain_teacher(m, load_recipe(made.ckpt), load_image(made.image), "Why?", 2)  # no prefix of another
    assert files(tmp_path) == ["0.explain.png"] and steps.response == teacher["response"]
    assert steps.two_stage == out.strip() and steps.tau == 0.1
    for name in ("raw", "clean", "labels", "sinks"):
        assert torch.allclose(torch.tensor(getattr(steps, name)), torch.tensor(teacher[name]), atol=1e-6), name
    one_line(infer, made.image, "Why?", *ask(made, "--explain", "--mode", "plain"), says="--explain")


def test_answers_and_names_can_not_control_the_terminal(made, tmp_path, monkeypatch):
    monkeypatch.setattr(model.LLaVA, "detokenize", lambda m, ids: "one\ntwo \x1b]0;owned\x07 क\u200dष")
    image = shutil.copy(made.image, tmp_path / "a\x1b[2J.png")
    out, err = ok(image, "Why?", *ask(made))
    assert out == "one\ntwo \\x1b]0;owned\\x07 क\u200dष\n" and "\\x1b[2J" in err and "\x1b" not in err


def test_the_toy_says_what_it_does_not_know(tmp_path):
    ToyQuestions("test", 6)[0][0].save(tmp_path / "scene.png")
    Image.new("RGB", (640, 427)).save(tmp_path / "photo.png")
    for name, question, times in (("scene.png", "What number is on the star?", 0), ("scene.png", "Who is it?", 1),
                                  ("photo.png", "What number is on the star?", 1)):
        _, err = ok(tmp_path / name, question, "--max-new-tokens", 2, "--device", "cpu", "--save", "none")
        assert err.count("the toy knows only its own scenes") == times, err


# ---- a conversation

def test_a_conversation_prefills_its_picture_once(made, alone, tmp_path, monkeypatch):
    first = alone(made.image, "What is this?").text
    second = alone(made.image, "And who?", history=[("What is this?", first)]).text
    prefills, prefill = [], model.LLaVA.prefill
    monkeypatch.setattr(model.LLaVA, "prefill", lambda m, *a, **k: prefills.append(1) or prefill(m, *a, **k))
    type_in(monkeypatch, b"What is this?\nAnd who?\n\nnever asked\n")
    assert ok(made.image, *ask(made, "--save", tmp_path / "talk.png"))[0] == f"{first}\n{second}\n"
    assert len(prefills) == 1 and (tmp_path / "talk.png").is_file() and (tmp_path / "talk-2.png").is_file()
    type_in(monkeypatch, b"caf\xe9\n")
    one_line(infer, made.image, *ask(made), says="utf-8")


# ---- which RPN answers

def test_which_rpn_answers(made, tmp_path):
    toy, bundled = ROOT / "data/toy/llava-toy/rpn.safetensors", made.ckpt / "rpn.safetensors"

    def chosen(*words):
        out, err = ok(made.image, "Why?", "--json", "--save", "none", "--max-new-tokens", 2, *words)
        return json.loads(out)["rpn"], err

    def trained(name, ckpt, rpn):
        run = tmp_path / "out" / name
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"ckpt": str(ckpt)}))
        (tmp_path / "out/last").write_text(f"{name}\n")
        return shutil.copy(rpn, run)
    one_line(infer, made.image, "Why?", "--rpn", "last", says="nothing has been trained; train first: python train.py")
    assert chosen()[0] == str(toy) and chosen("--ckpt", made.ckpt)[0] == str(bundled)
    own = trained("llava-tiny", made.ckpt, bundled)
    assert chosen("--rpn", "last")[0] == chosen("--ckpt", made.ckpt)[0] == own and chosen()[0] == str(toy)
    mine = trained("elsewhere", "toy", toy)
    assert chosen()[0] == mine
    os.remove(mine)
    assert chosen()[0] == str(toy) and "passed over" in chosen()[1]
    bare = shutil.copytree(made.ckpt, tmp_path / "bare")
    (bare / "rpn.safetensors").unlink()
    one_line(infer, made.image, "Why?", "--ckpt", bare, says="no RPN; train one: python train.py --ckpt .*bare")


# ---- a file of questions

@pytest.fixture
def asked(monkeypatch):
    """Every call of answer() by an evaluation: (question, mode, tau)."""
    calls = []
    monkeypatch.setattr(data.evaluate, "answer", lambda *a, **k: calls.append(a[3:6]) or answer(*a, **k))
    return calls


def evaluated(made, *more):
    out, err = ok("--eval", made.data, *ask(made, *more))
    return json.loads(out.splitlines()[-1]), err


def test_one_prefix_gives_the_answers_of_many(made, alone, tmp_path):
    """Six questions about two pictures, in both modes: as if each had been asked alone."""
    lines = [{"image": f"{i // 3}.png", "question": text, "id": i}
             for i, text in enumerate(("Who?", "What is this?", "x") * 2)]
    write_rows(tmp_path / "six.jsonl", lines)
    evaluated(made, "--eval", tmp_path / "six.jsonl", "--images", made.image.parent, "--mode", "box",
              "--out", tmp_path / "out.jsonl")
    for line, row in zip(lines, rows_of(tmp_path / "out.jsonl"), strict=True):
        image, question = made.image.parent / line["image"], line["question"]
        want, plain = alone(image, question, mode="box"), alone(image, question, mode="plain").text
        assert row.pop("ms").keys() == {"plain", "two_stage"}
        assert row == line | {
            "question": [question], "plain": plain, "two_stage": want.text, "tau": 0.4,
            "boxes": [*map(list, want.boxes)], "scores": {"plain": None, "two_stage": None}}


def test_nothing_is_asked_twice(made, tmp_path, asked):
    """A stopped evaluation resumes; a changed line, picture or setting asks again what depends on it, and no more."""
    data = shutil.copytree(made.data.parent, tmp_path / "set") / made.data.name

    def asks(count, *more):
        asked.clear()
        summary, _ = evaluated(made, "--eval", data, "--limit", 4, *more)
        assert len(asked) == count, asked
        return summary
    want = asks(8)
    assert want["questions"] == 4 and asks(0) == want
    for file in (tmp_path / "out/eval").iterdir():  # cut off in the third line of answers
        text = file.read_text().split("\n")
        assert json.loads(text[0])["mode"] in file.name and len(text) == 5
        file.write_text("\n".join(text[:3]) + "\n" + text[3][:30])
    assert asks(4) == want
    rows = rows_of(data)
    write_rows(data, [rows[0] | {"question": "Who else?"}, *rows[2:]])  # the lines behind move up; the last is new
    asks(4)
    os.utime(data.parent / rows[3]["image"], ns=(1, 1))
    asks(2)
    asks(4, "--tau", "0.2")  # plain answers serve every tau
    asks(0)
    asks(8, "--fresh")


def test_which_tau_a_question_is_asked_with(made, tmp_path, asked):
    ckpt, data = shutil.copytree(made.ckpt, tmp_path / "llava-tiny"), tmp_path / "taus.jsonl"
    recipe = json.loads((ckpt / "recipe.json").read_text())
    (ckpt / "recipe.json").write_text(json.dumps(recipe | {"taus": {"vstar": 0.3}}))
    write_rows(data, [{"image": made.image.name, "question": "Why?"} | own for own in (
        {}, {"benchmark": "vstar"}, {"benchmark": "pope"}, {"benchmark": "vstar", "tau": 0.2})])
    for flags, taus in ([], [0.4, 0.3, 0.4, 0.2]), (["--tau", "0.7"], [0.7] * 4):
        asked.clear()
        evaluated(made, "--eval", data, "--images", made.image.parent, "--ckpt", ckpt, *flags)
        assert [tau for _, mode, tau in asked if mode == "mask"] == taus


def test_a_picture_that_can_not_be_read_is_skipped_named_and_counted(made, tmp_path):
    data, lines = tmp_path / "some.jsonl", rows_of(made.data)
    lines[2]["image"], lines[4]["question"] = "none.png", "why " * 900
    write_rows(data, lines)
    flags = "--eval", data, "--images", made.data.parent
    summary, err = evaluated(made, *flags, "--max-bad", 20)
    assert summary["questions"] == 14 and "line 3 " in err and "none.png: " in err and "line 5 " in err, err
    one_line(infer, *ask(made, *flags), says="1 of 16 questions .* --max-bad 1.0 %; line 3: .*none.png")


def test_two_processes_answer_what_one_does(made, tmp_path):
    def answers():
        return {name: sorted((key, row["answer"]) for line in rows_of(tmp_path / "out/eval" / name)[1:]
                             for key, row in line.items()) for name in os.listdir(tmp_path / "out/eval")}
    want, _ = evaluated(made, "--limit", 7)
    one = answers()
    (code, out, err), (_, nothing, _) = call_two(infer, "--eval", made.data, "--limit", 7, "--fresh", *ask(made))
    assert code == 0 and json.loads(out) == want and not nothing, err
    assert answers() == one and [len(found) for found in one.values()] == [7, 7]  # none twice

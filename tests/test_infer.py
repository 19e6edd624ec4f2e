"""infer.py: what it promises about answers, pictures, conversations and files of questions.

    python -m pytest tests/test_infer.py      # half a minute on one core, no network
"""
import io
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

import data.draw
import data.evaluate
import infer
import model
from calls import ROOT, ask, call, everything, home, one_line, room_for, rows_of, shell, write_rows  # noqa: F401
from clip import load_image
from data.toy.scenes import ToyQuestions
from sdrpn import RPN, answer, explain_teacher, load_recipe


def kept(folder):
    return sorted(path.name for path in (folder / "out").iterdir() if path.is_file())


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
    want = call(infer, made.image, "Why?", *ask(made, "--save", "none"))
    monkeypatch.setattr(data.draw, "answer_picture", draw)
    code, out, err = call(infer, made.image, "Why?", *ask(made))
    assert want[0] == 0 and want[1] and (code, out) == (2, want[1]) and err.endswith("infer.py: no room\n")


def test_flags_may_stand_anywhere_and_save_none_draws_nothing(made, tmp_path):
    flags, outs = ask(made, "--mode", "box", "--save", "none"), []
    for words in ([made.image, "Why?", *flags], [made.image, *flags, "Why?"], [*flags, made.image, "Why?"]):
        code, out, err = call(infer, *words)
        assert code == 0, err
        outs.append(out)
    assert outs[0] and len(set(outs)) == 1 and not (tmp_path / "out").exists()


def test_json_is_one_object_with_the_answer_and_the_boxes(made, alone):
    code, out, _ = call(infer, made.image, "Why?", *ask(made, "--json", "--mode", "box", "--tau", 0.2))
    found, want = json.loads(out), alone(made.image, "Why?", mode="box", tau=0.2)
    assert code == 0 and want.boxes and found.pop("ms").keys() == {"prefill", "answer"}
    assert found == {"answer": want.text, "boxes": [list(box) for box in want.boxes], "tau": 0.2, "mode": "box",
                     "ckpt": str(made.ckpt), "rpn": str(made.ckpt / "rpn.safetensors")}


def test_no_picture_takes_the_name_of_another(made, tmp_path):
    """Neither of one answered before, nor of one that is answered at the same moment."""
    for _ in range(2):
        assert call(infer, made.image, "Why?", *ask(made))[0] == 0
    assert kept(tmp_path) == ["0.roi-2.png", "0.roi.png"]
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(infer.take_name, [tmp_path / "out/0.roi.png"] * 50))
    assert len(set(names)) == 50 and len(kept(tmp_path)) == 52


def test_save_names_the_picture_and_never_overwrites_the_input(made, tmp_path):
    own, link = tmp_path / "own.png", tmp_path / "link.jpg"
    shutil.copy(made.image, own)
    link.symlink_to(own)
    before = everything(tmp_path)
    for name in ("own.png", "x/../own.png", "link.jpg", "a.txt"):
        says = "written as" if name == "a.txt" else "input picture"
        one_line(infer, own, "Why?", *ask(made, "--save", tmp_path / name), says=says)
    with room_for(1000):
        code, out, err = call(infer, own, "Why?", *ask(made, "--save", tmp_path / "full.png"))
    assert code == 2 and out and "full.png: File too large; not written" in err and everything(tmp_path) == before
    assert call(infer, own, "Why?", *ask(made, "--save", tmp_path / "new.webp"))[0] == 0
    assert Image.open(tmp_path / "new.webp").format == "WEBP"


def test_explain_draws_every_step(made, tmp_path, monkeypatch):
    drawn, draw = [], data.draw.explain_picture
    monkeypatch.setattr(data.draw, "explain_picture", lambda steps: drawn.append(steps) or draw(steps))
    code, out, err = call(infer, made.image, "Why?", *ask(made, "--explain", "--tau", 0.1))
    assert code == 0 and kept(tmp_path) == ["0.explain.png"], err
    m, (steps,) = model.load(made.ckpt, "cpu"), drawn
    teacher = explain_teacher(m, load_recipe(made.ckpt), load_image(made.image), "Why?", 2)  # no prefix of another
    assert steps.response == teacher["response"] and steps.two_stage == out.strip() and steps.tau == 0.1
    for name in ("raw", "clean", "labels", "sinks"):
        assert torch.allclose(torch.tensor(getattr(steps, name)), torch.tensor(teacher[name]), atol=1e-6), name
    one_line(infer, made.image, "Why?", *ask(made, "--explain", "--mode", "plain"), says="--explain")


def test_answers_and_names_can_not_control_the_terminal(made, tmp_path, monkeypatch):
    monkeypatch.setattr(model.LLaVA, "detokenize", lambda m, ids: "one\ntwo \x1b]0;owned\x07 क\u200dष")
    image = tmp_path / "a\x1b[2J.png"
    shutil.copy(made.image, image)
    code, out, err = call(infer, image, "Why?", *ask(made))
    assert code == 0 and out == "one\ntwo \\x1b]0;owned\\x07 क\u200dष\n" and "\\x1b[2J" in err and "\x1b" not in err


def test_the_toy_says_what_it_does_not_know(tmp_path):
    ToyQuestions("test", 6)[0][0].save(tmp_path / "scene.png")
    Image.new("RGB", (640, 427), "red").save(tmp_path / "photo.png")
    for name, question, times in (("scene.png", "What number is on the star?", 0), ("scene.png", "Who is it?", 1),
                                  ("photo.png", "What number is on the star?", 1)):
        for mode in ("mask", "plain"):
            words = "--mode", mode, "--max-new-tokens", 2, "--device", "cpu", "--save", "none"
            code, _, err = call(infer, tmp_path / name, question, *words)
            assert code == 0 and err.count("the toy knows only its own scenes") == times, err


# ---- a conversation

def test_a_conversation_prefills_its_picture_once(made, alone, tmp_path, monkeypatch):
    first = alone(made.image, "What is this?").text
    second = alone(made.image, "And who?", history=[("What is this?", first)]).text
    prefills, prefill = [], model.LLaVA.prefill
    monkeypatch.setattr(model.LLaVA, "prefill", lambda m, *a, **k: prefills.append(1) or prefill(m, *a, **k))
    type_in(monkeypatch, b"What is this?\nAnd who?\n\nnever asked\n")
    code, out, err = call(infer, made.image, *ask(made, "--save", tmp_path / "talk.png"))
    assert code == 0 and len(prefills) == 1 and out == f"{first}\n{second}\n", err
    assert (tmp_path / "talk.png").is_file() and (tmp_path / "talk-2.png").is_file()
    type_in(monkeypatch, b"caf\xe9\n")
    one_line(infer, made.image, *ask(made), says="utf-8")


# ---- which RPN answers

def test_which_rpn_answers(made, tmp_path, monkeypatch):
    def chosen(*words):
        code, out, err = call(infer, made.image, "Why?", "--json", "--save", "none", "--max-new-tokens", 2, *words)
        assert code == 0, err
        return json.loads(out)["rpn"], err

    def trained(name, ckpt, rpn):
        run = tmp_path / "out" / name
        run.mkdir(parents=True)
        shutil.copy(rpn, run)
        (run / "config.json").write_text(json.dumps({"ckpt": str(ckpt)}))
        (tmp_path / "out/last").write_text(f"{name}\n")
        return str(run / "rpn.safetensors")
    toy = ROOT / "data/toy/llava-toy/rpn.safetensors"
    one_line(infer, made.image, "Why?", "--rpn", "last", says="nothing has been trained; train first: python train.py")
    assert chosen()[0] == str(toy) and str(toy) in chosen()[1]
    assert chosen("--ckpt", made.ckpt)[0] == str(made.ckpt / "rpn.safetensors")
    own = trained("llava-tiny", made.ckpt, made.ckpt / "rpn.safetensors")
    assert chosen("--rpn", "last")[0] == chosen("--ckpt", made.ckpt)[0] == own and chosen()[0] == str(toy)
    assert chosen("--rpn", made.ckpt / "anyone.safetensors", "--ckpt", made.ckpt)[0].endswith("anyone.safetensors")
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


def evaluated(made, *more, data=None):
    code, out, err = call(infer, "--eval", data or made.data, *ask(made, *more))
    assert code == 0, err
    return json.loads(out.splitlines()[-1]), err


def test_one_prefix_gives_the_answers_of_many(made, alone, tmp_path):
    """Six questions about two pictures, in both modes: as if each had been asked alone."""
    texts, file = ("Who?", "What is this?", "x"), tmp_path / "six.jsonl"
    lines = [{"image": f"pictures/{i // 3}.png", "question": texts[i % 3], "id": i} for i in range(6)]
    write_rows(file, lines)
    evaluated(made, "--images", made.data.parent, "--out", tmp_path / "out.jsonl", "--mode", "box", data=file)
    for line, row in zip(lines, rows_of(tmp_path / "out.jsonl"), strict=True):
        image, question = made.data.parent / line["image"], line["question"]
        want = alone(image, question, mode="box")
        assert row.pop("ms").keys() == {"plain", "two_stage"}
        assert row == line | {
            "question": [question], "plain": alone(image, question, mode="plain").text, "two_stage": want.text,
            "boxes": [list(box) for box in want.boxes], "tau": 0.4, "scores": {"plain": None, "two_stage": None}}


def test_nothing_is_asked_twice(made, tmp_path, asked):
    """A stopped evaluation resumes; a changed line, picture or setting asks again what depends on it, and no more."""
    data = shutil.copytree(made.data.parent, tmp_path / "set") / made.data.name

    def asks(count, *more):
        asked.clear()
        summary, _ = evaluated(made, "--limit", 6, *more, data=data)
        assert len(asked) == count, asked
        return summary
    want = asks(12)
    assert want["questions"] == 6 and asks(0) == want
    for file in (tmp_path / "out/eval").iterdir():  # cut off in the fifth line of answers
        text = file.read_text().split("\n")
        assert json.loads(text[0])["mode"] in file.name and len(text) == 7
        file.write_text("\n".join(text[:5]) + "\n" + text[5][:30])
    assert asks(4) == want
    rows = rows_of(data)
    write_rows(data, [*rows[:2], rows[2] | {"question": "Who?"}, *rows[3:]])
    asks(2)
    write_rows(data, [rows[0], *rows[2:]])  # a line less: the lines behind move up, and one of them is new
    asks(2)
    os.utime(data.parent / rows[3]["image"], ns=(1, 1))
    asks(2)
    asks(6, "--tau", "0.2")  # plain answers serve every tau
    asks(6, "--mode", "box")
    asks(12, "--dtype", "float64")
    asks(0, "--tau", "0.2")
    asks(12, "--fresh")
    assert len(list((tmp_path / "out/eval").iterdir())) == 6


def test_which_tau_a_question_is_asked_with(made, tmp_path, asked):
    ckpt, data = shutil.copytree(made.ckpt, tmp_path / "llava-tiny"), tmp_path / "taus.jsonl"
    recipe = json.loads((ckpt / "recipe.json").read_text())
    (ckpt / "recipe.json").write_text(json.dumps(recipe | {"taus": {"vstar": 0.3}}))
    shutil.copy(made.image, tmp_path)
    write_rows(data, [{"image": "0.png", "question": "Why?"} | own for own in (
        {}, {"benchmark": "vstar"}, {"benchmark": "pope"}, {"benchmark": "vstar", "tau": 0.2})])
    for flags, taus in ([], [0.4, 0.3, 0.4, 0.2]), (["--tau", "0.7"], [0.7] * 4):
        asked.clear()
        evaluated(made, "--ckpt", ckpt, *flags, data=data)
        assert [tau for _, mode, tau in asked if mode == "mask"] == taus


def test_a_picture_that_can_not_be_read_is_skipped_named_and_counted(made, tmp_path):
    data, lines = tmp_path / "some.jsonl", rows_of(made.data)
    lines[2]["image"] = "none.png"
    lines[4]["question"] = "why " * 900
    write_rows(data, lines)
    flags = "--images", made.data.parent, "--limit", 20
    summary, err = evaluated(made, *flags, "--max-bad", 10, data=data)
    assert summary["questions"] == 18 and "line 3 " in err and "none.png: " in err and "line 5 " in err, err
    one_line(infer, "--eval", data, *ask(made, *flags), says="1 of 20 questions .* --max-bad 1.0 %; line 3: .*none.png")


def test_two_processes_answer_what_one_does(made, tmp_path):
    want, _ = evaluated(made, "--limit", 7)
    files = sorted((tmp_path / "out/eval").iterdir())
    two = tmp_path / "two"
    two.mkdir()
    (two / "moved.py").write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport data.evaluate, infer\nfrom pathlib import Path\n"
        f"infer.ROOT = data.evaluate.ROOT = Path({str(two)!r})\ninfer.main()\n")
    done = shell("-m", "torch.distributed.run", "--nproc_per_node", 2, two / "moved.py", "--eval", made.data,
                 "--limit", 7, *ask(made))
    assert done.returncode == 0, done.stderr.decode()
    (line,) = done.stdout.decode().splitlines()
    assert json.loads(line) == want

    def answers(file):
        found = {}
        for row in rows_of(file)[1:]:
            found |= row
        return {key: row["answer"] for key, row in found.items()}
    for file in files:
        assert answers(two / "out/eval" / file.name) == answers(file) and len(answers(file)) == 7


def test_an_evaluation_beside_a_fresh_one(made, tmp_path, monkeypatch):
    """The files of answers vanish while it runs: it still ends with all its answers."""
    want, _ = evaluated(made, "--limit", 4)
    loaded, load_image = [], data.evaluate.load_image

    def vanishing(path):
        loaded.append(path)
        if len(loaded) == 2:
            shutil.rmtree(tmp_path / "out/eval")
            (tmp_path / "out/eval").mkdir()
        return load_image(path)
    monkeypatch.setattr(data.evaluate, "load_image", vanishing)
    summary, _ = evaluated(made, "--limit", 4, "--fresh")
    assert len(loaded) == 4 and summary == want

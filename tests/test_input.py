"""Bad input: a damaged or missing file is one line that names it; pictures of every kind; flags; safety.

    python -m pytest tests/test_input.py      # a quarter of a minute on one core, no network
"""
import io
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import infer
import train
from calls import ROOT, argv, ask, call, home, one_line  # noqa: F401
from clip import BadInput, load_image
from formula import picture


# ---- files

@pytest.mark.parametrize("how", ["damaged", "missing"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors", "recipe.json",
                                  "rpn.safetensors", "questions.jsonl", "0.png"])
def test_a_file_that_can_not_be_read_is_named_in_one_line(made, tmp_path, name, how):
    ckpt = shutil.copytree(made.ckpt, tmp_path / "ckpt")
    shutil.copy(made.data, ckpt)
    shutil.copy(made.image, ckpt)
    path = ckpt / name
    content = path.read_bytes()
    path.unlink()
    if how == "damaged":
        path.write_bytes(content[:len(content) // 2])
    flags = ask(made, "--ckpt", ckpt, "--rpn", ckpt / "rpn.safetensors")
    question = ["--eval", ckpt / name] if name == "questions.jsonl" else [ckpt / "0.png", "Why?"]
    one_line(infer, *question, *flags, says=re.escape(name))
    assert not (tmp_path / "out").exists()
    if name in ("config.json", "recipe.json", "questions.jsonl"):
        one_line(train, *argv(made, tmp_path / "run", "--ckpt", ckpt, "--data", ckpt / "questions.jsonl"),
                 says=re.escape(name))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("line, says", [
    (b"\xff\xfe\x00", "utf-8"), (b"[1]", "line 2"), (b'{"image": "a.png"}', "line 2.*question"),
    (b'{"image": "a.png", "question": "x", "tau": 2}', "line 2.*tau"),
    (b'{"image": "../secret.png", "question": "x"}', "line 2.*image"),
    (b'{"image": "a.png", "question": "x", "answers": ["x"], "metric": "letter"}', "line 2")])
def test_a_bad_line_of_a_question_file_is_refused_by_number(made, tmp_path, line, says):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"image": "a.png", "question": "Why?"}\n' + line + b"\n")
    one_line(infer, "--eval", path, *ask(made), says=f"bad.jsonl.*{says}")


# ---- pictures

def solid(mode, colour, **how):
    return lambda path: Image.new(mode, (40, 30), colour).save(path, **how)


def grey16(path):
    ramp = np.linspace(0, 65535, 40 * 30).reshape(30, 40)
    Image.fromarray(ramp.astype(np.uint16)).save(path)


def animate(path):
    picture(40, 30, 1).save(path, save_all=True, append_images=[picture(40, 30, 2)])


def palette(path):
    Image.new("RGB", (40, 30), (9, 99, 9)).quantize(4).save(path, transparency=0)


@pytest.mark.parametrize("name, write, right", [
    ("animated.gif", animate, lambda a: a.shape == (30, 40, 3)),
    ("cmyk.jpg", solid("CMYK", (0, 255, 255, 0)), lambda a: a[15, 20, 0] > 200 and a[15, 20, 1:].max() < 60),
    ("grey16.png", grey16, lambda a: a[0, 0].max() == 0 and a[-1, -1].min() == 255 and abs(int(a[15, 0, 0]) - 128) < 4),
    ("grey16.tif", grey16, lambda a: a[0, 0].max() == 0 and a[-1, -1].min() == 255),
    ("palette.png", palette, lambda a: (a == 255).all()),  # transparency is shown on white
    ("half.png", solid("RGBA", (0, 0, 255, 128)), lambda a: a[0, 0].tolist() == [127, 127, 255]),
    ("bilevel.tif", solid("1", 1), lambda a: (a == 255).all())])
def test_pictures_that_work(made, tmp_path, name, write, right):
    write(tmp_path / name)
    assert right(np.asarray(load_image(tmp_path / name)))
    code, _, err = call(infer, tmp_path / name, "What is this?", *ask(made, "--save", "none"))
    assert code == 0, err


@pytest.mark.parametrize("name, content", [
    ("empty.png", b""), ("page.pdf", b"%PDF-1.4\n1 0 obj\n"), ("macro.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n")])
def test_other_formats_are_refused(made, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    one_line(infer, tmp_path / name, "Why?", *ask(made), says=f"{name}: .*use an intact JPEG, PNG, WEBP")


def test_a_picture_with_a_very_long_side_is_refused(tmp_path):
    Image.new("1", (12000, 1)).save(tmp_path / "long.png")
    with pytest.raises(BadInput, match="long.png: .* a side"):
        load_image(tmp_path / "long.png")


def test_a_picture_on_stdin(made, tmp_path, monkeypatch):
    want = call(infer, made.image, "Why?", *ask(made))[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(made.image.read_bytes())))
    assert call(infer, "-", "Why?", *ask(made))[:2] == (0, want)
    assert (tmp_path / "out/stdin.roi.png").is_file()


# ---- flags

@pytest.mark.parametrize("words, says", [
    (["--tau", "1"], "--tau.*between 0 and 1"), (["--tau", "nan"], "--tau"), (["--dtype", "int8"], "--dtype"),
    (["--device", "gpu"], "--device gpu"), (["--mode", "zoom"], "--mode"), (["--nonsense\x1b[2J"], r"nonsense\\x1b"),
    (["--max-new-tokens", "0"], "--max-new-tokens"), (["--eval", "x.jsonl"], "a picture or --eval"),
    (["--budget", "1", "9"], "--budget.*one size"), (["--ckpt", "none"], "none: no such folder; .*llava-1.5-7b")])
def test_flags_of_infer(made, tmp_path, words, says):
    one_line(infer, made.image, "Why?", *ask(made, *words), says=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, says", [
    (["--samples", "0"], "--samples"), (["--epochs", "x"], "--epochs"),
    (["--loss", "mse"], "unrecognized arguments")])
def test_flags_of_train(made, tmp_path, words, says):
    one_line(train, *argv(made, tmp_path / "run", *words), says=says)
    assert not list(tmp_path.iterdir())


def test_a_question_that_is_too_long(made):
    one_line(infer, made.image, "what " * 2000, *ask(made), says=r"\d{4,} tokens, the model has room for 512; shorten")


# ---- safety

PRODUCT = [*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py"), *(ROOT / "backbones").rglob("*.py")]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_runs_foreign_code_or_talks_to_a_network(path):
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"torch\s*\.\s*load\(|pickle\.|\bimport\s+pickle|\bmarshal\b|\bshelve\b|torch\.hub", source)
    assert not re.search(r"(?<![\w.])(eval|exec|compile|__import__)\s*\(|os\.system|subprocess|ctypes", source)
    assert not re.search(r"^\s*(import|from)\s+(socket|ssl|http|urllib|requests|ftplib|huggingface_hub|transformers)\b",
                         source, re.M)

"""Bad input of every kind: pictures, questions, checkpoints, recipes, RPNs, flags; one line each, nothing written.

    python -m pytest tests/test_input.py      # half a minute on one core, no network; more rubbish: tests/fuzz.py
"""
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import fuzz  # noqa: E402 (also puts the project on the path)
import infer  # noqa: E402
import model  # noqa: E402
import sdrpn  # noqa: E402
import train  # noqa: E402
from calls import ROOT, argv, ask, call, everything, home, one_line, shell  # noqa: E402, F401
from clip import load_image  # noqa: E402
from formula import CONFIGS, picture, write_checkpoint  # noqa: E402


def test_an_old_torch_is_refused_at_import(monkeypatch, capsys):
    def again():
        spec = importlib.util.spec_from_file_location("clip_again", ROOT / "clip.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    for version in ("2.5.0", "2.13.0a0+gitabc", "3.0"):
        monkeypatch.setattr(torch, "__version__", version)
        again()
    for version in ("2.4.1+cu121", "1.13.0"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(SystemExit) as e:
            again()
        assert e.value.code == 2
        said = capsys.readouterr().err
        assert re.fullmatch(rf"torch {re.escape(version)}: .*pip install --upgrade torch\n", said)


# ---- pictures

def png(w, h, depth=8, colour=2, body=b"", level=-1):
    """A PNG with this header, whatever the data."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    data = zlib.compress(body, level)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def webp(w, h):
    """A lossless WEBP of one colour, 34 bytes at any size: only the header's width and height change."""
    buffer = io.BytesIO()
    Image.new("RGBA", (16, 16), (9, 90, 200, 80)).save(buffer, "WEBP", lossless=True, exact=True)
    data = bytearray(buffer.getvalue())
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at:at + 4], "little") >> 28 << 28 | (h - 1) << 14 | (w - 1)
    data[at:at + 4] = bits.to_bytes(4, "little")
    return bytes(data)


def grey16(path, low, high):
    Image.fromarray(np.linspace(low, high, 40 * 30).reshape(30, 40).astype(np.uint16)).save(path)


def animate(path):
    picture(40, 30, 1).save(path, save_all=True, append_images=[picture(40, 30, 2)])


def solid(mode, colour, size=(40, 30), **how):
    return lambda path: Image.new(mode, size, colour).save(path, **how)


def palette(path):
    Image.new("RGB", (40, 30), (9, 99, 9)).quantize(4).save(path, transparency=0)


PICTURES = {  # name: (what writes it, what load_image must make of it)
    "animated.gif": (animate, lambda a: a.shape == (30, 40, 3)),
    "cmyk.jpg": (solid("CMYK", (0, 255, 255, 0)), lambda a: a[15, 20, 0] > 200 and a[15, 20, 1:].max() < 60),
    "grey16.png": (lambda p: grey16(p, 0, 65535),
                   lambda a: a[0, 0].max() < 3 and a[-1, -1].min() > 252 and abs(int(a[15, 0, 0]) - 128) < 4),
    "dark16.png": (lambda p: grey16(p, 0, 255), lambda a: 100 < a[15, 0, 0] < 150),  # 8-bit values in a 16-bit file
    "grey16.tif": (lambda p: grey16(p, 0, 65535), lambda a: a[0, 0].max() < 3 and a[-1, -1].min() > 252),
    "float.tif": (solid("F", float("nan")), lambda a: a.shape == (30, 40, 3)),
    "palette.png": (palette, lambda a: (a == 255).all()),
    "alpha.webp": (solid("RGBA", (9, 9, 9, 0), lossless=True, exact=True), lambda a: (a == 255).all()),
    "half.png": (solid("RGBA", (0, 0, 255, 128)), lambda a: a[0, 0].tolist() == [127, 127, 255]),
    "grey-alpha.png": (solid("LA", (100, 0)), lambda a: (a == 255).all()),
    "bilevel.tif": (solid("1", 1), lambda a: (a == 255).all()),
    "dot.png": (solid("RGB", (1, 2, 3), (1, 1)), lambda a: a.tolist() == [[[1, 2, 3]]]),
    "strip.png": (solid("RGB", (1, 2, 3), (1, 5000)), lambda a: a.shape == (5000, 1, 3)),
    "wide.bmp": (solid("RGB", (1, 2, 3), (5000, 1)), lambda a: a.shape == (1, 5000, 3)),
}


@pytest.fixture
def middle(monkeypatch):
    """The RPN finds one region, in the middle of the picture."""
    cells = torch.zeros(6, 6, dtype=torch.bool)
    cells[2:4, 2:4] = True
    monkeypatch.setattr(sdrpn, "find_regions", lambda *how: [sdrpn.Region((2, 2, 4, 4), cells, 1.0)])


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_work(made, middle, tmp_path, name):
    write, right = PICTURES[name]
    write(tmp_path / name)
    assert right(np.asarray(load_image(tmp_path / name)))
    code, out, err = call(infer, tmp_path / name, "What is this?", *ask(made, "--json"))
    assert code == 0 and len(json.loads(out)["boxes"]) == 1, err
    assert (tmp_path / f"out/{Path(name).stem}.roi.png").is_file()


def test_exif_rotation_turns_picture_and_boxes(made, middle, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(60, 30, 1).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (30, 60)
    code, out, _ = call(infer, tmp_path / "a.jpg", "Why?", *ask(made, "--json"))
    assert code == 0 and json.loads(out)["boxes"] == [[5, 20, 25, 40]]  # cells of 10 px, 15 px of padding


@pytest.mark.parametrize("name, content, says", [
    ("none.png", None, "none.png: no such image file; check the path"),
    ("", None, "pictures: a folder; name one picture in it"),
    ("empty.png", b"", "empty.png: not an image in a known format; use one of JPEG, PNG"),
    ("text.jpg", b"hello", "text.jpg: not an image"),
    ("page.pdf", b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n", "page.pdf: not an image"),
    ("macro.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "macro.eps: not an image"),
    ("cut.png", lambda b: b[:len(b) // 2], r"cut.png: the image is damaged or truncated \(OSError\); save it again"),
    ("cut.jpg", lambda b: b[:len(b) // 2], "cut.jpg: the image is damaged"),
    ("huge.png", png(10000, 10001), "huge.png: 10000x10001 pixels is above the limit of 100 megapixels"),
    ("long.png", png(1 << 30, 1), r"1073741824x1 pixels is above the limit of .* or 11000 a side; make it smaller"),
    ("huge.webp", webp(13000, 13000), "huge.webp: 13000x13000 pixels is above the limit of 50 megapixels"),
    ("deep.png", png(9000, 9000, 16, 0), "deep.png: 9000x9000 pixels is above the limit of 50 megapixels"),
    ("line\nbreak.png", None, "line break.png: no such image file"),
    ("red\x1b[31m\x07\x7f.png", None, r"red\\x1b\[31m\\x07\\x7f.png: no such image file")])
def test_pictures_that_do_not(made, tmp_path, name, content, says):
    path = tmp_path / "pictures" / name
    (tmp_path / "pictures").mkdir()
    if callable(content):
        picture(90, 70, 1).save(path)
        content = content(path.read_bytes())
    if content is not None:
        path.write_bytes(content)
    began, before = time.process_time(), everything(tmp_path)
    one_line(infer, path, "Why?", *ask(made), says=says)
    assert time.process_time() - began < 1 and everything(tmp_path) == before


def test_too_little_memory_is_not_called_a_damaged_picture(made, monkeypatch):
    def full(*_, **__):
        raise MemoryError
    monkeypatch.setattr(Image, "open", full)
    one_line(infer, made.image, "Why?", *ask(made), says="out of memory")


def test_too_little_memory_in_torchs_words(made, monkeypatch):
    monkeypatch.setattr(infer, "load", lambda *how: torch.empty(1 << 50))
    one_line(infer, made.image, "Why?", *ask(made), says="out of memory; use --dtype float16")


def test_addresses_are_told_apart_from_files(made):
    for url in ("https://example.org/cat.jpg", "HTTP://example.org/a b.png", "file:///tmp/a.png", "s3://bucket/a.png"):
        one_line(infer, url, "Why?", *ask(made), says="pictures are not fetched; download it first: curl -LO '")


def test_a_picture_on_stdin(made, tmp_path, monkeypatch):
    want = call(infer, made.image, "Why?", *ask(made))[1]
    for name in ("-", "/dev/stdin"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(made.image.read_bytes())))
        code, out, err = call(infer, name, "Why?", *ask(made))
        assert code == 0 and out == want, err
    assert (tmp_path / "out/stdin.roi.png").is_file() and (tmp_path / "out/stdin.roi-2.png").is_file()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"not a picture")))
    one_line(infer, "-", "Why?", *ask(made), says="-: not an image in a known format")
    one_line(infer, "-", *ask(made), says="the image comes from stdin, so the question must be on the command line")


def test_memory_of_the_largest_pictures(tmp_path):
    """Read, padded and cropped, nothing that is legal takes more than 1.1 GB, torch included."""
    (tmp_path / "rgb.png").write_bytes(png(11000, 9090, body=b"\0" * (9090 * 33001), level=1))
    (tmp_path / "rgba.png").write_bytes(png(10000, 10000, 8, 6, b"\0" * (10000 * 40001), 1))
    (tmp_path / "grey16.png").write_bytes(png(9090, 5500, 16, 0, b"\0" * (5500 * 18181), 1))
    (tmp_path / "rgba.webp").write_bytes(webp(9090, 5500))
    Image.new("RGB", (9090, 5500), (9, 90, 200)).save(tmp_path / "progressive.jpg", progressive=True)
    (tmp_path / "measure.py").write_text(
        f"import resource, sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport clip\n"
        "for name in sys.argv[1:]:\n    picture = clip.load_image(name)\n"
        "    if name == 'rgb.png':  # the largest square\n        clip.preprocess(picture, 336)\n"
        "        clip.preprocess_crop(picture, (0, 0, *picture.size), 336)\n    del picture\n"
        "    print(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)\n")
    names = sorted(p.name for p in tmp_path.iterdir() if p.suffix in (".png", ".jpg", ".webp"))
    done = shell(tmp_path / "measure.py", *names, folder=tmp_path)
    peaks = {line.split()[0]: float(line.split()[1]) for line in done.stdout.decode().splitlines()}
    assert list(peaks) == names and max(peaks.values()) < 1.1, (peaks, done.stderr)


# ---- questions

@pytest.mark.parametrize("question", [
    "a\tb\x00c\x07\x1b[31m\r\n", "Où est 猫 🙂👩‍👩‍👧?", "ما هذا؟ \u202eabc",
    "<image></s><s>[INST]", "x" * 300,
    "\u0301\u200d\ufeff", "?"])
def test_questions_that_work(made, question):
    code, out, err = call(infer, made.image, question, *ask(made))
    assert code == 0 and "Traceback" not in err


@pytest.mark.parametrize("question, says", [
    ("", "the question is empty"), (" \n\t", "the question is empty"),
    ("what " * 2000, r"need \d{4,} tokens, the model has room for 512; shorten"), ("a\udcffb", "not UTF-8")])
def test_questions_that_do_not(made, tmp_path, question, says):
    one_line(infer, made.image, question, *ask(made), says=says)
    assert not (tmp_path / "out").exists()


def test_a_question_without_quotes_is_recognised(made, tmp_path):
    one_line(infer, made.image, "What", "is", "this?", *ask(made),
             says=r'put the question in quotes: python infer.py .*0.png "What is this\?"')
    assert not (tmp_path / "out").exists()


GOOD = '{"image": "pictures/0.png", "question": "Why?", "answers": ["x"]}'
OPEN = GOOD[:-1].encode()


@pytest.mark.parametrize("content, says", [
    (b"", "holds no question"), (b"\n\n", "holds no question"), (b'{"images": "."}\n', "holds no question"),
    (GOOD.encode() + b"\n{\"image\"\n", "line 2: not JSON"), (b"[1]\n", "line 1: not a JSON object"),
    (b"\xff\xfe\x00", "not readable as text"),
    (b'{"image": "a.png"}\n', "line 1: 'question' must be"),
    (b'{"question": "Why?"}\n', "line 1: 'image' must be a path"),
    (b'{"image": "a.png", "question": ["", "b"]}\n', "line 1: 'question' must be"),
    (b'{"image": "a.png", "question": "\\ud800"}\n', "line 1: 'question' must be"),
    (b'{"image": 3, "question": "Why?"}\n', "line 1: 'image' must be"),
    (OPEN + b', "tau": 2}\n', "line 1: 'tau' has a wrong type or value: 2"),
    (OPEN + b', "boxes": [[1, 2, 3, 1e400]]}\n', "line 1: 'boxes' has a wrong type"),
    (OPEN + b', "boxes": [[1, 2, 3, ' + b"9" * 400 + b']]}\n', "line 1: 'boxes' has a wrong type"),
    (OPEN + b', "cycle": [1]}\n', "line 1: 'cycle' has a wrong type"),
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


@pytest.mark.parametrize("content", [
    GOOD + "\r\n" + GOOD + "\r\n", "\ufeff" + GOOD, '\ufeff{"images": "."}\r\n' + GOOD + "\n\n" + GOOD + "   "])
def test_question_files_from_windows_work(made, content):
    path = made.data.parent / "windows.jsonl"
    path.write_bytes(content.encode())
    code, out, err = call(infer, "--eval", path, *ask(made))
    assert code == 0 and json.loads(out)["questions"] == content.count("Why?"), err


def test_what_is_wrong_with_one_question_is_said_with_its_number(made):
    path, long = made.data.parent / "third.jsonl", {"image": "pictures/0.png", "question": "why " * 900}
    for third, says in (({"image": "none.png", "question": "Why?"}, "question 3: .*none.png: no such image"),
                        (long, r"question 3: .* need \d+ tokens")):
        path.write_text(f"{GOOD}\n{GOOD}\n{json.dumps(third | {'answers': ['x']})}\n")
        one_line(infer, "--eval", path, *ask(made), says=f"third.jsonl: {says}")


# ---- checkpoints

def plain(made, ckpt):
    return [made.image, "Why?", "--ckpt", ckpt, "--mode", "plain", "--device", "cpu", "--max-new-tokens", 2]


def test_checkpoints_that_do_not_work(made, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    one_line(infer, *plain(made, empty), says="empty/config.json: missing")
    one_line(train, *argv(made, tmp_path / "run", "--ckpt", empty), says="empty/config.json: missing")
    one_line(infer, *plain(made, tmp_path / "none"), says="none: no such checkpoint folder, nor one of the names")
    sharded = fuzz.tiny(tmp_path / "sharded", 3)
    parts = sorted(sharded.glob("model-*.safetensors"))
    for a, b in ((parts[0], parts[1]), (parts[1], parts[2])):
        one = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(one)
    code, _, err = call(infer, *plain(made, sharded))
    assert code == 0, err  # swapped shards: every tensor is there under its name, only the index was wrong
    shutil.rmtree(tmp_path / "out")  # the picture of this answer, the only one here
    parts[1].write_bytes(parts[0].read_bytes())
    one_line(infer, *plain(made, sharded), says="is there twice|tensors missing")
    wrong = shutil.copytree(made.ckpt, tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors")
    tensors["language_model.model.layers.3.mlp.up_proj.weight"][5, 5] = float("nan")
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    one_line(infer, *plain(made, wrong), says="layers.3.mlp.up_proj.weight holds NaN")
    one_line(train, *argv(made, tmp_path / "run", "--ckpt", wrong), says="layers.3.mlp.up_proj.weight holds NaN")
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_a_tensor_name_with_an_escape_is_spelled_out(made, tmp_path):
    wrong = shutil.copytree(made.ckpt, tmp_path / "wrong")
    tensors = load_file(wrong / "model.safetensors") | {"\x1b]0;owned\x07": torch.zeros(1)}
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    one_line(infer, *plain(made, wrong), says=r"1 unknown; first unknown: \\x1b\]0;owned\\x07")


def test_tokenizers_of_another_vocabulary(made, tmp_path):
    for token, says in ((399, "400 pieces, but config.json has 407 embeddings and image token 399; "
                              "use the tokenizer.model of this checkpoint"),
                        ("402", "image token 402"), (None, "image token None")):
        folder = shutil.copytree(made.ckpt, tmp_path / f"ckpt{token}")
        change_config(folder, image_token_index=token)
        one_line(infer, *plain(made, folder), says=says)
    (folder / "tokenizer.model").write_bytes(b"not a model")
    one_line(infer, *plain(made, folder), says="tokenizer.model: not a sentencepiece model")


def change_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def test_checkpoints_of_other_kinds_are_told_what_to_do(made, tmp_path):
    def changed(name, change):
        folder = shutil.copytree(made.ckpt, tmp_path / name)
        change(folder)
        return folder

    def no_tokenizer(folder):
        (folder / "tokenizer.model").rename(folder / "tokenizer.json")

    def hub(folder):
        inner = folder / "snapshots/0123abc"
        inner.mkdir(parents=True)
        for path in list(folder.iterdir()):
            if path.is_file():
                path.rename(inner / path.name)

    def adapter(folder):
        for path in folder.iterdir():
            path.unlink()
        (folder / "adapter_config.json").write_text("{}")
        save_file({"base_model.model.x.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")

    def adapter_with_config(folder):
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")

    def adapter_keys(folder):
        save_file({"base_model.model.x.lora_A.weight": torch.zeros(1)}, folder / "model.safetensors")

    def pickle(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    for name, change, says in (
            ("json-only", no_tokenizer, "tokenizer.model: missing, and tokenizer.json is not read .*; copy the "),
            ("models--llava-hf--x", hub, "the root of a hub download; name its snapshot: .*snapshots/0123abc$"),
            ("lora", adapter, r"lora: an adapter \(LoRA\) alone; merge it into its base model"),
            ("lora2", adapter_with_config, r"lora2: an adapter \(LoRA\)"),
            ("lora3", adapter_keys, r"lora3: an adapter \(LoRA\), not a whole model; merge it"),
            ("pickled", pickle, "holds pytorch_model.bin, a pickle, which is never loaded; use the safetensors"),
            ("awq", lambda f: change_config(f, quantization_config={"quant_method": "awq"}),
             r"config.json: quantised weights \(AWQ, GPTQ, bitsandbytes\) are not read; use the float16"),
            ("original", lambda f: change_config(f, model_type="llava_llama", mm_vision_tower="openai/clip"),
             "the original LLaVA layout; use the same model as llava-hf/llava-1.5-7b-hf"),
            ("other", lambda f: change_config(f, model_type="llava_next"), "model_type is 'llava_next', not one of")):
        one_line(infer, *plain(made, changed(name, change)), says=says)
    one_line(infer, *plain(made, "liuhaotian/llava-v1.5-13b"), says="pickles, .* use --ckpt llava-1.5-13b, the same")


def test_a_folder_called_toy_does_not_take_the_name(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model.find_checkpoint("toy") == ROOT / "data/toy/llava-toy" and model.run_name("toy") == "toy"
    assert model.find_checkpoint("./toy") == Path("toy")


def test_the_hubs_own_names_are_known(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(model, "ROOT", tmp_path / "project")
    for name in ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b"):
        one_line(infer, *plain(made, name), says="llava-1.5-7b is not on this machine; download it with: hf download "
                 r"llava-hf/llava-1.5-7b-hf --local-dir .*checkpoints/llava-1.5-7b \(hf: pip install huggingface_hub\)")
    snapshot = tmp_path / "hub/models--llava-hf--llava-1.5-7b-hf/snapshots/abc"
    shutil.copytree(made.ckpt, snapshot)
    for name in ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b"):
        assert model.find_checkpoint(name) == snapshot and model.run_name(name) == "llava-1.5-7b"


# ---- recipes

TRAIN = {"lr": 1, "warmup": 0, "betas": [0.9, 0.98], "epochs": 1, "batch_size": 1, "grad_accum": 1, "clip": 1}


@pytest.mark.parametrize("key, value", [
    ("attention", {}), ("attention", {"6": [0]}), ("attention", {"1": [6]}), ("attention", {"1": []}),
    ("attention", [1]), ("attention", {"x": None}), ("attention", {"1": {}}), ("attention", {"1": ""}),
    ("attention", {"1": [True]}), ("softmax", "row"),
    ("sink", {"kind": "norm"}), ("sink", {"kind": "attention", "attention": {"9": None}, "threshold": 1}),
    ("sink", "norm"), ("frozen", 0), ("frozen", 6), ("frozen", "2"), ("layers", 5), ("tau", 1), ("tau", None),
    ("train", []), ("train", {"lr": 1}), ("train", TRAIN | {"lr": -1}), ("train", TRAIN | {"betas": [0.9]}),
    ("kinds", [1]), ("kinds", {"text": 3}), ("kinds", {"a": {"frozen": 1}}), ("labels", 3),
    ("labels", {"grow": -1}), ("labels", {"padding": "black"}), ("square", "no"), ("budget", 5),
    ("budget", [2, 1]), ("request", 3)])
def test_recipes_that_make_no_sense(made, tmp_path, key, value):
    folder = shutil.copytree(made.ckpt, tmp_path / "ckpt")
    recipe = json.loads((folder / "recipe.json").read_text()) | {key: value}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    one_line(train, *argv(made, tmp_path / "run", "--ckpt", folder),
             says=f"recipe.json: {key}.*: missing, or not of this model")
    assert not (tmp_path / "run").exists()


def test_a_recipe_of_a_kind_that_makes_no_sense(made, tmp_path):
    folder = shutil.copytree(made.ckpt, tmp_path / "ckpt")
    recipe = json.loads((folder / "recipe.json").read_text())
    kinds = {"text": {}, "natural": {"attention": {"6": [0]}, "tau": 2}}
    (folder / "recipe.json").write_text(json.dumps(recipe | {"kinds": kinds}))
    says = "recipe.json: attention of 'natural', tau of 'natural': missing, or not of this model"
    one_line(infer, made.image, "Why?", *ask(made), "--ckpt", folder, "--explain", says=says)


def test_recipes_that_are_no_recipes(made, tmp_path):
    folder = shutil.copytree(made.ckpt, tmp_path / "ckpt")
    for text, says in (("{}", "attention, softmax, sink, frozen, layers, tau, train: missing"),
                       ("[]", "not a JSON object"), ("{", "not readable as JSON")):
        (folder / "recipe.json").write_text(text)
        one_line(infer, made.image, "Why?", *ask(made), "--ckpt", folder, says=f"recipe.json: {says}")


def test_a_damaged_recipe_is_named_by_train_too(made, tmp_path):
    folder = shutil.copytree(made.ckpt, tmp_path / "ckpt")
    for text in ("{", "[]"):
        (folder / "recipe.json").write_text(text)
        one_line(train, "--ckpt", folder, says="recipe.json: ")


def test_a_missing_recipe_is_said_before_weights_load_and_plain_needs_none(made, tmp_path, monkeypatch):
    bare = shutil.copytree(made.ckpt, tmp_path / "bare")
    (bare / "recipe.json").unlink()
    assert call(infer, *plain(made, bare))[0] == 0
    for program in (infer, train):
        monkeypatch.setattr(program, "load", lambda *_: pytest.fail("weights were loaded"))
    says = "no recipe.json, and no released recipe for 6 layers of 72; `python tests/tables.py heads"
    one_line(infer, made.image, "Why?", *ask(made, "--ckpt", bare), says=says)
    one_line(train, *argv(made, tmp_path / "run", "--ckpt", bare), says=says)


def test_without_data_or_an_rpn_the_remedy_is_named(made, tmp_path):
    bare = write_checkpoint(tmp_path / "bare", CONFIGS["plain"])
    one_line(train, "--ckpt", bare, says="llava_mix.jsonl is missing; make it with: python data/llava_mix.py")
    untrained = shutil.copytree(made.ckpt, tmp_path / "untrained")
    (untrained / "rpn.safetensors").unlink()
    one_line(infer, made.image, "Why?", "--ckpt", untrained, says="no RPN is trained for it yet; .*train.py --ckpt")


# ---- RPNs

def with_facts(made, path, facts, change=lambda tensors: None):
    with safe_open(made.ckpt / "rpn.safetensors", framework="pt") as f:
        own = json.loads(f.metadata()["sdrpn"])
    tensors = load_file(made.ckpt / "rpn.safetensors")
    change(tensors)
    save_file(tensors, path, metadata={"sdrpn": json.dumps(own | facts) if isinstance(facts, dict) else facts})
    return path


@pytest.mark.parametrize("facts, says", [
    ({"fingerprint": "0123456789abcdef", "ckpt": "llava-other"},
     "trained for another checkpoint .llava-other, fingerprint 0123456789abcdef"),
    ({"layers": 9}, "needs 11 decoder layers"), ({"layers": 0}, "does not say its depth"),
    ({"frozen": -3}, "does not say its depth"), ({"frozen": 0}, "does not say its depth"),
    ({"frozen": "2"}, "does not say its depth"),
    ({"layers": 3}, r"twig_layers.\S+ is missing, .* needs \(.*damaged, or an RPN of another model"),
    ("{", "does not say"), ("[]", "does not say"), ("null", "does not say"), ('"x"', "does not say"),
    ("[" * 100_000, "does not say")])
def test_rpns_that_do_not_work(made, tmp_path, facts, says):
    path = with_facts(made, tmp_path / "rpn.safetensors", facts)
    one_line(infer, made.image, "Why?", *ask(made, "--rpn", path), says=f"rpn.safetensors: .*{says}")


def test_rpns_of_other_sizes_or_with_nan(made, tmp_path):
    name = "model.twig_norm.weight"
    for change, says in ((lambda t: t.update({name: torch.ones(60)}), r"is \(60,\), .* needs \(72,\)"),
                         (lambda t: t[name].fill_(float("nan")), "holds NaN"),
                         (lambda t: t.pop(name), r"twig_norm.weight is missing, .* needs \(72,\)")):
        path = with_facts(made, tmp_path / "rpn.safetensors", {}, change)
        one_line(infer, made.image, "Why?", *ask(made, "--rpn", path), says=says)
    path.write_bytes(path.read_bytes()[:1000])
    one_line(infer, made.image, "Why?", *ask(made, "--rpn", path), says="truncated or not safetensors")
    one_line(infer, made.image, "Why?", *ask(made, "--rpn", tmp_path / "none"), says="none: no such RPN")


# ---- flags

@pytest.mark.parametrize("words, says", [
    (["--tau", "0"], r"--tau 0.0: must lie between 0 and 1"), (["--tau", "1"], "--tau 1.0"),
    (["--tau", "nan"], "--tau nan"), (["--tau", "x"], "--tau: invalid float"),
    (["--device", "gpu"], "--device gpu: not on this machine; use cpu"),
    (["--device", "meta"], "--device meta: not on this machine"),
    (["--device", "cuda:99"], "--device cuda:99: not on this machine"),
    (["--dtype", "int8"], "--dtype int8: must be float16"), (["--nonsense"], "unrecognized arguments"),
    (["--nonsense\x1b[2J"], r"unrecognized arguments: --nonsense\\x1b\[2J"),
    (["--mode", "zoom"], "invalid choice"), (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    (["--limit", "-1"], "--limit -1: must be at least 1"), (["--eval", "x.jsonl"], "name an image .* or --eval"),
    (["--budget", "1", "9"], "--budget: this model shows every picture at one size; leave it out"),
    (["--explain", "--mode", "plain"], "--explain shows the method: leave out --mode plain")])
def test_flags_of_infer(made, tmp_path, words, says):
    one_line(infer, made.image, "Why?", "--ckpt", made.ckpt, *words, says=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, says", [
    (["--samples", "0"], "--samples 0: must be at least 1"),
    (["--frozen-layers", "0"], "--frozen-layers 0: must be at least 1"),
    (["--lr", "nan"], "--lr nan"), (["--lr", "-1"], "--lr -1.0"), (["--epochs", "x"], "invalid int"),
    (["--device", "tpu"], "--device tpu: not on this machine"), (["--loss", "mse"], "unrecognized arguments"),
    (["--data", "none.jsonl"], "none.jsonl: not readable as text .No such")])
def test_flags_of_train(made, tmp_path, words, says):
    one_line(train, *argv(made, tmp_path / "run", *words), says=says)
    assert not list(tmp_path.iterdir())


def test_an_rpn_of_more_layers_than_the_model_has(made, tmp_path):
    one_line(train, *argv(made, tmp_path / "run", "--rpn-layers", 9),
             says="--rpn-layers 9: both at least 1, together at most the model's 6")
    assert not list(tmp_path.iterdir())


def test_help_shows_the_defaults_that_hold():
    for program in (infer, train):
        parser = program.parser()
        for action in parser._actions:
            if action.default not in (None, False, "==SUPPRESS==") and action.option_strings:
                value = action.default
                said = f"{value:g}" if isinstance(value, float) else value
                assert f"default: {said}" in action.help, action.dest
        text = parser.format_help()
        assert "None" not in text and "(default" not in text
        from_recipe = {"samples", "batch_size", "grad_accum", "lr", "epochs", "frozen_layers", "rpn_layers"}
        silent = {a.dest for a in parser._actions if a.option_strings and a.nargs != 0 and "default:" not in a.help}
        if program is train:
            assert silent == from_recipe | {"images"} and "come from the checkpoint's recipe" in text
        else:
            assert silent == {"eval", "images", "limit", "font"}


# ---- security

PRODUCT = [*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py"), *(ROOT / "backbones").rglob("*.py")]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_runs_foreign_code_or_talks_to_a_network(path):
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"torch\s*\.\s*load|\bimport\s+pickle|pickle\.|\bmarshal\b|\bshelve\b|allow_pickle|"
                         "weights_only", source)
    assert not re.search(r"(?<![\w.])(eval|exec|compile|__import__)\s*\(|os\.system|subprocess|\bpty\b|"
                         r"shell\s*=\s*True|ctypes", source)
    assert not re.search(r"^\s*(import|from)\s+(socket|ssl|http|urllib|requests|ftplib|smtplib|aiohttp|huggingface_hub|"
                         r"transformers)\b", source, re.M)
    assert not re.search(r"urlopen|urlretrieve|hf_hub_download|torch\.hub|load_state_dict_from_url", source)


def test_pillow_opens_six_formats_only(tmp_path, monkeypatch):
    opened, open_ = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(k.get("formats")) or open_(*a, **k))
    for suffix in ("ppm", "ico", "tga", "pcx", "im", "eps", "pdf"):
        picture(20, 20, 1).save(tmp_path / f"a.{suffix}")
        with pytest.raises(infer.BadInput, match="not an image in a known format"):
            load_image(tmp_path / f"a.{suffix}")
    assert set(opened) == {("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")}
    others = [p for p in ROOT.glob("*.py") if p.name != "clip.py"]
    assert "Image.open(" not in "".join(p.read_text(encoding="utf-8") for p in others)


def test_nothing_is_written_but_out_and_what_was_named(made, tmp_path, monkeypatch):
    """Every file opened for writing, by name, while both programs run."""
    written, watching = set(), [True]

    def watch(event, args):
        if not watching:
            return
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                written.add(Path(os.fsdecode(args[0])).resolve())
        if event in ("os.rename", "os.mkdir", "shutil.rmtree", "os.remove"):
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


@pytest.mark.parametrize("flag", [("--images", "pictures"), ("--limit", "3"), ("--fresh",)])
def test_flags_of_an_evaluation_are_not_ignored_elsewhere(made, flag):
    one_line(infer, made.image, "Why?", *ask(made, *flag), says=f"{flag[0]}: belongs to --eval FILE; leave it out")


@pytest.mark.parametrize("flag", ["--max-bad", "--save-every"])
@pytest.mark.parametrize("value", ["nan", "-1"])
def test_flags_that_are_no_limit(made, tmp_path, flag, value):
    one_line(train, *argv(made, tmp_path / "run", flag, value), says=rf"{flag} {value}.*: must be 0 or more")

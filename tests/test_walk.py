"""A researcher's walk, command by command, with nothing left to guess: each prints the next one.

    python -m pytest tests/test_walk.py      # a quarter of a minute on one core, no network

LLaVA-1.5's training file -> questions, a checkpoint without a recipe -> its heads, an RPN, scores, an answer.
"""
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import fuzz  # noqa: E402 (also puts the project on the path)
from calls import ROOT, rows_of, shell  # noqa: E402
from formula import picture  # noqa: E402


@pytest.fixture
def project(tmp_path):
    """A copy of the programs, so that data/ and out/ are the test's own."""
    project = fuzz.product(tmp_path / "project")
    shutil.copytree(ROOT / "tests", project / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT / "backbones").is_dir():
        shutil.copytree(ROOT / "backbones", project / "backbones", ignore=shutil.ignore_patterns("__pycache__"))
    return project


def training_file(folder, count=20):
    """A miniature of llava_v1_5_mix665k.json and its pictures: half GQA, half OCR-VQA, and what is left out."""
    records = [{"id": "text", "conversations": []}]
    for i in range(count):
        part = ("gqa", "ocr_vqa")[i % 2]
        path = folder / part / "images" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(60 + i, 90 - i, i).save(path)
        question = f"<image>\n{fuzz.ASK[i % 3]}\nAnswer the question using a single word or phrase."
        records.append({"id": str(i), "image": str(path.relative_to(folder)), "conversations": [
            {"from": "human", "value": question}, {"from": "gpt", "value": "yes"},
            {"from": "human", "value": "And now?"}, {"from": "gpt", "value": "no"}]})
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(records))
    return folder / "llava_v1_5_mix665k.json"


def test_the_walk_of_a_researcher(project, tmp_path):
    def run(*words, code=0):
        done = shell(*words, folder=project)
        out, err = done.stdout.decode(), done.stderr.decode()
        assert done.returncode == code and "Traceback" not in err, (words, out, err)
        return out, err

    ckpt = fuzz.tiny(tmp_path / "llava-mine")  # a model of one's own: neither recipe nor RPN
    for name in ("recipe.json", "rpn.safetensors", "anyone.safetensors"):
        (ckpt / name).unlink()
    where = ["--ckpt", ckpt, "--device", "cpu", "--dtype", "float32"]

    # without questions and without a recipe, train.py says what to do
    _, err = run("train.py", *where, code=2)
    assert "python data/llava_mix.py llava_v1_5_mix665k.json --images IMAGES" in err
    original = training_file(tmp_path / "mix")
    out, _ = run("data/llava_mix.py", original, "--images", original.parent)
    assert "wrote 20 questions to data/llava_mix.jsonl; next: python train.py" in out
    data = project / "data/llava_mix.jsonl"
    assert len(rows_of(data)) == 21
    _, err = run("train.py", *where, code=2)
    (command,) = re.findall(r"`python (tests/tables.py heads --ckpt \S+)`", err)

    # the head finder prints a recipe, and how to use it
    out, err = run(*shlex.split(command), "--eval", data, "--max-new-tokens", 3, *where[2:])
    (copy,) = re.findall(r"cp .*recipe.json.*", err)
    _, source, target = shlex.split(copy)
    recipe = json.loads((project / source).read_text())
    assert set(recipe) >= {"attention", "softmax", "sink", "frozen", "layers", "tau", "train"}
    assert json.dumps(recipe["attention"]) in out and Path(target) == ckpt / "recipe.json"
    shutil.copy(project / source, target)

    # a plain train.py finds the questions and the recipe, and ends with a command that works
    _, err = run("train.py", *where, "--max-new-tokens", 3)
    trained = project / "out/llava-mine"
    assert (trained / "rpn.safetensors").is_file() and (trained / "report.png").is_file()
    assert [row["samples"] for row in rows_of(trained / "log.jsonl")] == [20]
    assert (project / "out/last").read_text() == "llava-mine\n"
    image = original.parent / "gqa/images/0.jpg"
    command = err.splitlines()[-1].replace("IMAGE", shlex.quote(str(image)))
    python, *words = shlex.split(command)
    assert python == "python"
    _, err = run(*words, "--max-new-tokens", 3, "--explain")
    assert str(trained / "rpn.safetensors") in err and (project / "out/0.explain.png").is_file()

    # scores side by side, with what was trained last
    out, err = run("infer.py", "--eval", data, "--max-new-tokens", 3)
    summary = json.loads(out.splitlines()[-1])
    assert summary["questions"] == 20 and {"plain", "two_stage"} <= set(summary)
    (file,) = (project / "out/eval").iterdir()
    assert f"answers: {file}" in err and [row["n"] for row in rows_of(file)] == list(range(20))

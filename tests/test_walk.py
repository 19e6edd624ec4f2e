"""A researcher's walk, command by command, with nothing left to guess: each prints the next one.

    python -m pytest tests/test_walk.py      # a quarter of a minute on one core, no network

LLaVA-1.5's training file -> questions, a model of one's own -> an RPN, an answer, scores.
"""
import json
import shlex
import shutil

import pytest

from calls import ASK, ROOT, copy_project, rows_of, shell
from formula import picture


def training_file(folder, count=20):
    """A miniature of llava_v1_5_mix665k.json and its pictures: half GQA, half OCR-VQA."""
    records = []
    for i in range(count):
        path = folder / ("gqa", "ocr_vqa")[i % 2] / "images" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(60 + i, 90 - i, i).save(path)
        question = f"<image>\n{ASK[i % 3]}\nAnswer the question using a single word or phrase."
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
        records.append({"id": str(i), "image": str(path.relative_to(folder)), "conversations": talk})
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(records))
    return folder / "llava_v1_5_mix665k.json"


@pytest.mark.background
def test_the_walk_of_a_researcher(tmp_path):
    project = copy_project(tmp_path / "project")

    def run(*words, code=0):
        done = shell(*words, folder=project)
        assert done.returncode == code and "Traceback" not in done.stderr, (words, done)
        return done.stdout, done.stderr

    ckpt = tmp_path / "llava-mine"  # a model of one's own, without an RPN
    make = f"import conftest, pathlib, calls; calls.tiny(pathlib.Path({str(ckpt)!r}))"
    assert shell("-c", make, folder=ROOT / "tests").returncode == 0
    (ckpt / "rpn.safetensors").unlink()
    recipe = (ckpt / "recipe.json").rename(tmp_path / "recipe.json")
    where = ["--ckpt", ckpt, "--device", "cpu", "--dtype", "float32"]
    _, err = run("train.py", *where, code=2)
    assert f"tests/paper/tables.py heads --ckpt {ckpt}" in err  # finds a recipe
    shutil.copy(recipe, ckpt)
    _, err = run("train.py", *where, code=2)
    assert "python data/llava_mix.py llava_v1_5_mix665k.json --images IMAGES" in err
    original = training_file(tmp_path / "mix")
    run("data/llava_mix.py", original, "--images", original.parent)

    _, err = run("train.py", *where, "--max-new-tokens", 3)
    trained = project / "out/llava-mine"
    assert (trained / "report.png").is_file() and (project / "out/last").read_text() == "llava-mine\n"
    image = original.parent / "gqa/images/0.jpg"
    python, *words = shlex.split(err.splitlines()[-1].replace("IMAGE", shlex.quote(str(image))))
    assert python == "python"
    _, err = run(*words, "--max-new-tokens", 3, "--explain")
    assert str(trained / "rpn.safetensors") in err and (project / "out/0.explain.png").is_file()

    data = project / "data/llava_mix.jsonl"
    rows = [row for row in rows_of(data) if "question" in row]
    out, _ = run("infer.py", "--eval", data, "--rpn", "last", "--max-new-tokens", 3)
    summary = json.loads(out.splitlines()[-1])
    assert summary["questions"] == len(rows) == 20 and {"plain", "two_stage"} <= summary.keys()

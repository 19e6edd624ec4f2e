"""Turns the public files of nine benchmarks into question files for `infer.py --eval`.

    python data/benchmarks.py textvqa TextVQA_0.5.1_val.json --images train_images   # -> data/textvqa_val.jsonl
    python data/benchmarks.py chartqa test_human.json test_augmented.json            # images: png/ beside the files
    python data/benchmarks.py hrbench4k hr_bench_4k.tsv                              # images: unpacked from the file
    python infer.py --eval data/textvqa_val.jsonl --ckpt llava-1.5-7b

A question file is JSON lines: first {"images": ROOT}, then one question each with its answers, its metric
(data/metrics.py) and the token limit and tau the paper used. The prompts are those of lmms-eval to the letter,
oddities included: answers of a 7B model change with a capital. Picture files are not opened, only looked for.

Left out: downloading (each function below says where its files come from), parquet copies, test splits whose
answers are secret. A question without its picture is left out too, and counted.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image

Image.MAX_IMAGE_PIXELS = None   # HR-Bench pictures are meant to be huge
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


# A converter takes (record r, its index i, the file's path, the folder of the images). In `image` the last folders
# are those of the original archive. The first line of each docstring is what --help and error messages quote.

def textvqa(r, i, file, root):
    """TextVQA_0.5.1_val.json and train_val_images.zip (holds train_images/) from textvqa.org/dataset

    5,000 questions, 10 answers each. No OCR tokens are given to the model."""
    # capitalize() also lower-cases all but the first letter ("the nasa sign"): the harness asks it like that
    return dict(id=str(r["question_id"]), image=f"train_images/{r['image_id']}.jpg",
                question=r["question"].capitalize() + SHORT, answers=texts(r["answers"]))


def docvqa(r, i, file, root):
    """val_v1.0_withQT.json and documents/ from rrc.cvc.uab.es, challenge 17, task 1 (needs an account)

    5,349 questions. The test split has no answers; its scores come from that server only."""
    return dict(id=str(r["questionId"]), image=r["image"], question=r["question"] + SHORT, answers=texts(r["answers"]))


def infovqa(r, i, file, root):
    """infographicsVQA_val_v1.0_withQT.json and infographicsvqa_images/ from rrc.cvc.uab.es, challenge 17, task 3

    2,801 questions."""
    return dict(id=str(r["questionId"]), image=f"infographicsvqa_images/{r['image_local_name']}",
                question=r["question"] + SHORT, answers=texts(r["answers"]))


def chartqa(r, i, file, root):
    """test_human.json, test_augmented.json and png/ from github.com/vis-nlp/ChartQA, "ChartQA Dataset/test"

    1,250 questions in each file; the published number is over both."""
    kind = kind_of(file, "human", "augmented")
    return dict(id=f"{kind}-{i}", kind=kind, image=f"png/{r['imgname']}",
                question=r["query"] + "\nAnswer the question with a single word.", answers=texts(r["label"]))


def ocrbench(r, i, file, root):
    """OCRBench/json_files/OCRBench.json and OCRBench_Images/ as linked from github.com/Yuliang-Liu/MultimodalOCR

    1,000 questions of 10 kinds. The harness reads JPEG copies of these images, so single answers can differ."""
    return dict(id=str(i), kind=r["type"], dataset=r["dataset_name"], image=f"OCRBench_Images/{r['image_path']}",
                question=r["question"].strip(), answers=texts(r["answers"]))


def vstar(r, i, file, root):
    """test_questions.jsonl, direct_attributes/ and relative_position/ from huggingface.co/datasets/craigwu/vstar_bench

    191 questions (115 attributes, 76 positions). True boxes come from the sa_xxxx.json beside each image."""
    head, *options = re.split(r"\(([A-D])\)", r["text"])
    question = "\n".join([head.strip()] + [f"{a}. {b.strip()}" for a, b in zip(options[::2], options[1::2])])
    # the file's text ends in the instruction already; the harness appends it again, so the model reads it twice
    found = dict(id=str(r["question_id"]), kind=r["category"], image=r["image"],
                 question=question + LETTER, answers=texts(r["label"]))
    notes = (root / r["image"]).with_suffix(".json")
    if notes.is_file():
        boxes = json.loads(notes.read_text(encoding="utf-8-sig"))["bbox"]
        found["boxes"] = [[x, y, x + w, y + h] for x, y, w, h in boxes]
    return found


def pope(r, i, file, root):
    """coco_pope_{random,popular,adversarial}.json from github.com/RUCAIBox/POPE, output/coco, and COCO's val2014/

    3,000 questions in each of the three files (older copies: 2,910 random ones); the published F1 is over all."""
    kind = kind_of(file, "random", "popular", "adversarial")
    return dict(id=f"{kind}-{r['question_id']}", kind=kind, image=f"val2014/{r['image']}",
                question=r["text"].strip() + SHORT, answers=texts(r["label"]))


def hrbench(r, i, file, root):
    """hr_bench_4k.tsv or hr_bench_8k.tsv from huggingface.co/datasets/DreamMr/HR-Bench

    800 rows each: 200 questions, the options in 4 orders. The pictures are in the file; each is written once."""
    options = {letter: r[letter] for letter in "ABCDEFGH" if r.get(letter)}
    try:
        picture = base64.b64decode(r["image"])
        kind = Image.open(io.BytesIO(picture)).format.lower()   # reads the header only
    except (OSError, ValueError):
        raise ValueError("its image is not a picture, or cut short") from None
    name = f"{hashlib.sha256(picture).hexdigest()[:16]}.{kind}"
    if not (root / name).exists():
        (root / name).write_bytes(picture)
    return dict(id=str(r["index"]), kind=r["category"], cycle=r["cycle_category"], image=name,
                question="\n".join([r["question"].strip(), *(f"{a}. {b}" for a, b in options.items()),
                                    "Answer the option letter directly."]), answers=texts(r["answer"]), options=options)


def texts(value):
    """Answers as a list of strings: the files hold strings, numbers and lists."""
    value = value if isinstance(value, list) else [value]
    if not value or None in value:
        raise ValueError("it has no answer")
    return [str(answer) for answer in value]


def kind_of(file, *kinds):
    return next((kind for kind in kinds if kind in file.stem.lower()), file.stem)


def json_file(file):
    data = json.loads(file.read_text(encoding="utf-8-sig"))   # -sig: some editors put a byte-order mark in front
    data = data.get("data") if isinstance(data, dict) else data
    if not isinstance(data, list):
        raise ValueError("holds no list of questions")
    return data


def json_lines(file):
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg})") from None


def tsv(file):
    csv.field_size_limit(2 ** 31 - 1)   # an 8K picture is one field of about 6 million letters
    with open(file, encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines, delimiter="\t")


# name: (converter, reader, number of questions, file written, what every question of it shares)
BENCHMARKS = {
    "textvqa": (textvqa, json_file, 5000, "textvqa_val", dict(metric="vqa", max_new_tokens=1024, tau=0.15)),
    "docvqa": (docvqa, json_file, 5349, "docvqa_val", dict(metric="anls", max_new_tokens=32, tau=0.10)),
    "infovqa": (infovqa, json_file, 2801, "infovqa_val", dict(metric="anls", max_new_tokens=32, tau=0.15)),
    "chartqa": (chartqa, json_file, 2500, "chartqa_test", dict(metric="relaxed", max_new_tokens=16, tau=0.15)),
    "ocrbench": (ocrbench, json_file, 1000, "ocrbench", dict(metric="ocrbench", max_new_tokens=128, tau=0.05)),
    "vstar": (vstar, json_lines, 191, "vstar", dict(metric="letter", max_new_tokens=16, tau=0.10)),
    "pope": (pope, json_lines, 9000, "pope", dict(metric="pope", max_new_tokens=128, tau=0.15)),
    "hrbench4k": (hrbench, tsv, 800, "hrbench4k", dict(metric="hr", max_new_tokens=1024, tau=0.10)),
    "hrbench8k": (hrbench, tsv, 800, "hrbench8k", dict(metric="hr", max_new_tokens=1024, tau=0.10)),
}


def locate(root, image):
    """`image` below root. --images may name the folder that holds the archive's folder, or that folder itself."""
    for path in (image, image.partition("/")[2]):
        if path and (root / path).is_file():
            return path


def questions(name, files, root):
    """Yield (question, path of its picture below root or None) from the original files of a benchmark."""
    convert, read, _, _, shared = BENCHMARKS[name]
    for file in files:
        i = 0
        try:
            for i, record in enumerate(read(file)):
                question = convert(record, i, file, root) | shared
                yield question, locate(root, question["image"])
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError, csv.Error) as error:   # ValueError: not even text, too
            problem = f"no field {error}" if isinstance(error, KeyError) else error
            fail(f"{file}: near question {i + 1}: {problem}; {needs(name)}")


def needs(name):
    return f"{name} is made from {BENCHMARKS[name][0].__doc__.splitlines()[0]}"


def fail(message):
    print("benchmarks.py:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:10} {row[0].__doc__.splitlines()[0]}" for name, row in BENCHMARKS.items()))
    parser.add_argument("name", choices=BENCHMARKS, metavar="BENCHMARK", help="one of: " + " ".join(BENCHMARKS))
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="its original file, or several: see below")
    parser.add_argument("--images", type=Path, metavar="DIR", help="its pictures; default: where the first FILE is")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: a file beside this script")
    parser.error = lambda message: fail(f"{message}; see --help")   # one line instead of the usage text
    args = parser.parse_args(argv)

    _, read, expected, stem, _ = BENCHMARKS[args.name]
    for file in args.files:
        if not file.is_file():
            fail(f"{file}: no such file; {needs(args.name)}")
    out = (args.out or Path(__file__).parent / f"{stem}.jsonl").resolve()
    if out in [file.resolve() for file in args.files]:
        fail(f"{out}: would be overwritten by its own result; give --out another name")
    unpacks = read is tsv
    if unpacks and args.images:
        fail(f"--images {args.images}: the pictures are inside the TSV; leave --images out")
    root = out.parent / f"{out.stem}_images" if unpacks else (args.images or args.files[0].parent).resolve()
    if not unpacks and not root.is_dir():
        fail(f"--images {root}: no such folder; {needs(args.name)}")

    kinds, missing = Counter(), []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # everything is made in a folder of its own and moved when complete: a failed run leaves nothing behind
        with tempfile.TemporaryDirectory(prefix=".", dir=out.parent) as work:
            pictures = Path(work) / "pictures"
            pictures.mkdir()
            with open(Path(work) / "questions", "w", encoding="ascii", newline="\n") as lines:
                lines.write(json.dumps({"images": str(root)}) + "\n")
                for question, image in questions(args.name, args.files, pictures if unpacks else root):
                    if image:
                        lines.write(json.dumps(question | {"image": image}) + "\n")
                        kinds[str(question.get("kind"))] += 1
                    else:
                        missing.append(question["image"])
            if not kinds:
                fail(f"{root}: none of the {len(missing)} pictures is here, the first is {missing[0]}; name their "
                     "folder with --images" if missing else f"{args.files[0]}: holds no question; {needs(args.name)}")
            if unpacks:
                root.mkdir(exist_ok=True)
                for picture in pictures.iterdir():
                    os.replace(picture, root / picture.name)
            os.replace(Path(work) / "questions", out)
    except OSError as error:
        path = error.filename2 or error.filename or out   # of a failed move, filename2 is where to
        fail(f"{path}: {error.strerror or error}; check the path, the rights and the free space")

    count = sum(kinds.values())
    print(f"{args.name}: {count} questions, pictures in {root}")
    for kind, number in kinds.items() if len(kinds) > 1 else ():
        print(f"  {number:5} {kind}")
    if missing:
        print(f"warning: {len(missing)} questions left out, their picture is not in {root}: "
              f"{', '.join(missing[:3])}{' ...' * (len(missing) > 3)}", file=sys.stderr)
    if count != expected:
        print(f"warning: {count} questions, the benchmark has {expected}: the score will not be comparable; "
              + needs(args.name), file=sys.stderr)
    infer, out = (os.path.relpath(path) for path in (Path(__file__).resolve().parent.parent / "infer.py", out))
    print(f"wrote {out}\nnext: python {shlex.quote(infer)} --eval {shlex.quote(out)} --ckpt llava-1.5-7b")


if __name__ == "__main__":
    main()

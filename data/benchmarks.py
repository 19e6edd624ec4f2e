"""Turns the public files of nine benchmarks into question files for `infer.py --eval`.

    python data/benchmarks.py textvqa TextVQA_0.5.1_val.json --images train_images
    python data/benchmarks.py chartqa test_human.json test_augmented.json   # pictures: png/ there
    python data/benchmarks.py docvqa DocVQA/validation-*.parquet            # pictures: inside
    python infer.py --eval data/textvqa_val.jsonl --ckpt llava-1.5-7b

The official files and the parquet files of the Hugging Face hub give the same questions. The
prompts are those of lmms-eval to the letter, oddities included: a 7B model's answers change with a
capital. Each question carries its benchmark, its metric (data/metrics.py) and its token limit.

Left out: downloading (--help says where the files come from) and test splits whose answers are
secret. A question that is malformed or has no picture is left out too, and counted.
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
import string
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only data/ is on the path
from clip import BadInput, printable, reading  # noqa: E402
from data.files import write_file  # noqa: E402
from data.program import log, run_program  # noqa: E402
from data.questions import check_question, describe, write_questions  # noqa: E402

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


# --------------------------------------------------------------------------------------- converters
# A converter turns a record r into a question without its picture. Fields have the names of the
# official files; r["file"] is the name of the file without its suffix.

def textvqa(r):
    """Ten answers each. The model is given no OCR tokens."""
    # quirk: capitalize() lower-cases the rest ("the nasa sign"), and the harness asks it like that
    return dict(id=str(r["question_id"]), question=r["question"].capitalize() + SHORT,
                answers=texts(r["answers"]))


def docvqa(r):
    return dict(id=str(r["questionId"]), question=r["question"] + SHORT,
                answers=texts(r["answers"]))


def chartqa(r):
    return dict(kind=kind_of(r.get("type") or r["file"], "human", "augmented"),
                question=r["query"] + "\nAnswer the question with a single word.",
                answers=texts(r["label"]))


def ocrbench(r):
    """The harness, like the parquet file, has JPEG copies of the official pictures."""
    return dict(kind=r["type"], dataset=r["dataset_name"], question=r["question"].strip(),
                answers=texts(r["answers"]))


def vstar(r):
    """
    >>> r = {"question_id": 0, "category": "c", "label": "A",
    ...      "text": "Glove (left)?\\n(A) dark (red)\\n(B) blue\\n(C) red"}
    >>> vstar(r)["question"].split("\\n")[:3]
    ['Glove (left)?', 'A. blue', 'B. red']
    """
    text = r["text"]
    # quirk: an option with a bracket in its text is lost, and the options behind it move up
    options = re.findall(r"\([A-D]\)\s*([^()]+?)\s*(?=\([A-D]\)|$)", text)
    if options:
        lines = [text.partition("(A)")[0].strip()]
        lines += [f"{letter}. {option.strip()}" for letter, option in zip("ABCD", options)]
        text = "\n".join(lines)
    # quirk: the text ends in the instruction already, and the harness appends it once more
    return dict(id=str(r["question_id"]), kind=r["category"], question=text + LETTER,
                answers=texts(r["label"]))


def pope(r):
    kind = kind_of(r.get("category") or r["file"], "random", "popular", "adversarial")
    return dict(id=f"{kind}-{r['question_id']}", kind=kind, question=r["text"].strip() + SHORT,
                answers=texts(r["label"]))


def hrbench(r):
    """200 questions, the options in 4 orders."""
    options = {letter: str(r[letter]) for letter in string.ascii_uppercase
               if not is_null(r.get(letter))}
    lines = [r["question"].strip(), *(f"{letter}. {text}" for letter, text in options.items()),
             "Answer the option letter directly."]
    return dict(id=str(r["index"]), kind=r["category"], cycle=r["cycle_category"],
                question="\n".join(lines), answers=texts(r["answer"]), options=options)


def is_null(value):
    """True for None and NaN."""
    return value is None or value != value


def texts(value):
    """Answers as a list of strings: the files hold strings, numbers and lists."""
    values = value if isinstance(value, list) else [value]
    if not values or any(map(is_null, values)):
        raise ValueError("it has no answer (a test split?)")
    return [str(answer) for answer in values]


def kind_of(name, *kinds):
    """The kind that a name holds: that of a file, or the hub's column of kinds."""
    return next((kind for kind in kinds if kind in name.lower()), name)


# --------------------------------------------------------------------------------------- benchmarks

@dataclass(frozen=True)
class Benchmark:
    convert: Callable    # record -> question
    picture: str         # its picture in the official archive, from the record's fields
    count: int           # questions of the whole benchmark
    out: str             # name of the question file
    metric: str
    max_new_tokens: int
    source: str          # where the official files come from
    hub: str             # data set on the hub whose parquet files hold the same
    split: str           # what the names of those files contain ...
    other: str = "\0"    # ... and what they do not
    renames: dict = field(default_factory=dict)  # parquet column: its name in the official file


BENCHMARKS = {
    "textvqa": Benchmark(
        textvqa, "train_images/{image_id}.jpg", 5000, "textvqa_val", "vqa", 1024,
        "TextVQA_0.5.1_val.json and train_val_images.zip (holds train_images/), "
        "textvqa.org/dataset", "lmms-lab/textvqa", "validation"),
    "docvqa": Benchmark(
        docvqa, "{image}", 5349, "docvqa_val", "anls", 32,
        "val_v1.0_withQT.json and documents/, rrc.cvc.uab.es/?ch=17, task 1 (needs an account)",
        "lmms-lab/DocVQA", "validation", other="InfographicVQA/"),
    "infovqa": Benchmark(
        docvqa, "infographicsvqa_images/{image_local_name}", 2801, "infovqa_val", "anls", 32,
        "infographicsVQA_val_v1.0_withQT.json and infographicsvqa_images/, rrc.cvc.uab.es/?ch=17, "
        "task 3", "lmms-lab/DocVQA", "validation", other="DocVQA/"),
    "chartqa": Benchmark(
        chartqa, "png/{imgname}", 2500, "chartqa_test", "relaxed", 16,
        "test_human.json, test_augmented.json and png/, github.com/vis-nlp/ChartQA, in its test/",
        "lmms-lab/ChartQA", "test", renames={"question": "query", "answer": "label"}),
    "ocrbench": Benchmark(
        ocrbench, "OCRBench_Images/{image_path}", 1000, "ocrbench", "ocrbench", 128,
        "OCRBench.json and OCRBench_Images/, as linked from github.com/Yuliang-Liu/MultimodalOCR",
        "echo840/OCRBench", "test",
        renames={"dataset": "dataset_name", "question_type": "type", "answer": "answers"}),
    "vstar": Benchmark(
        vstar, "{image}", 191, "vstar", "letter", 16,
        "test_questions.jsonl and the folders beside it (the sa_xxxx.json have the true boxes), "
        "huggingface.co/datasets/craigwu/vstar_bench", "lmms-lab/vstar-bench", "test"),
    "pope": Benchmark(
        pope, "val2014/{image}", 9000, "pope", "pope", 128,
        "coco_pope_{random,popular,adversarial}.json, github.com/RUCAIBox/POPE, and COCO's "
        "val2014/", "lmms-lab/POPE", "test", other="Full/",
        renames={"question": "text", "answer": "label"}),
    "hrbench4k": Benchmark(
        hrbench, "", 800, "hrbench4k", "hr", 1024,
        "hr_bench_4k.tsv, huggingface.co/datasets/DreamMr/HR-Bench", "DreamMr/HR-Bench", "4k"),
    "hrbench8k": Benchmark(
        hrbench, "", 800, "hrbench8k", "hr", 1024,
        "hr_bench_8k.tsv, huggingface.co/datasets/DreamMr/HR-Bench", "DreamMr/HR-Bench", "8k"),
}


def needs(name):
    b = BENCHMARKS[name]
    return (f"{name} is made from {b.source}; or from *{b.split}*.parquet, "
            f"huggingface.co/datasets/{b.hub} (pip install pyarrow)")


# ------------------------------------------------------------------------------------------ readers

def read_json(file):
    """Records of a JSON list, of an object whose "data" is the list, or of one object a line."""
    text = file.read_text(encoding="utf-8-sig")  # -sig drops a byte-order mark
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return data.get("data", [data]) if isinstance(data, dict) else data


def read_tsv(file):
    """Rows as dicts; an empty field and NaN are null."""
    csv.field_size_limit(2 ** 31 - 1)  # an 8K picture is one field of about 6 million letters
    with open(file, encoding="utf-8-sig", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t"):
            yield {key: None if value in ("", "nan", "NaN") else value
                   for key, value in row.items()}


def read_parquet(file):
    """Rows as dicts. One row group at a time is in memory, two to three times over."""
    from pyarrow.parquet import ParquetFile
    with ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(16, row_groups=[group], use_threads=False):
                yield from batch.to_pylist()


def records(name, file):
    """The records of a file with the field names of the official one, and "file"."""
    read = {".parquet": read_parquet, ".tsv": read_tsv}.get(file.suffix, read_json)
    renames = BENCHMARKS[name].renames if file.suffix == ".parquet" else {}
    with reading(file, needs(name)):
        for row in read(file):
            record = {renames.get(key, key): value for key, value in row.items()}
            yield record | {"file": file.stem}


def files_of(name, paths):
    """The files among paths; a folder stands for the parquet files of this benchmark's split."""
    benchmark, files = BENCHMARKS[name], []
    for path in paths:
        if not path.is_dir():
            files.append(path)
        for file in sorted(path.rglob("*.parquet")):
            inside = file.relative_to(path).as_posix()
            if benchmark.split in inside and benchmark.other not in inside:
                files.append(file)
    if not files:
        raise BadInput(f"{paths[0]}: holds no *{benchmark.split}*.parquet; {needs(name)}")
    return files


# -------------------------------------------------------------------------- from files to questions

def locate(root, image):
    """`image` below root. It starts with a folder of the official archive; root may be where that
    folder is, or the folder itself. Raises FileNotFoundError."""
    for path in (image, image.partition("/")[2]):
        if path and (root / path).is_file():
            return path
    raise FileNotFoundError(image)


def unpack(picture, root):
    """Write a picture that came in a file below root, once -> its name.

    The hub's files hold {"bytes": ..., "path": ...}, HR-Bench base64 text.
    """
    if isinstance(picture, dict):
        picture = picture["bytes"]
    if isinstance(picture, str):
        picture = base64.b64decode(picture)
    with Image.open(io.BytesIO(picture)) as opened:  # reads the header only
        suffix = opened.format.lower()
    path = root / f"{hashlib.sha256(picture).hexdigest()[:16]}.{suffix}"
    if not path.exists():
        write_file(path, lambda partial: partial.write_bytes(picture))
    return path.name


def true_boxes(notes):
    """{"boxes": ...} of V*'s file beside a picture, which has them as (x, y, w, h); {} without."""
    if not notes.is_file():
        return {}
    with reading(notes):
        boxes = json.loads(notes.read_text(encoding="utf-8-sig"))["bbox"]
        return {"boxes": [[x, y, x + w, y + h] for x, y, w, h in boxes]}


def convert(name, files, root, unpacks):
    """-> questions with pictures below root; {reason: [what was left out]}."""
    b, kept, left_out, seen = BENCHMARKS[name], [], {}, Counter()
    shared = dict(metric=b.metric, max_new_tokens=b.max_new_tokens, benchmark=name)
    for file in files:
        for number, record in enumerate(records(name, file), 1):
            try:
                question = b.convert(record) | shared
                kind = question.get("kind")
                question.setdefault("id", f"{kind}-{seen[kind]}")
                seen[kind] += 1
                if unpacks:
                    question["image"] = unpack(record["image"], root)
                else:
                    question["image"] = locate(root, b.picture.format_map(record))
                    question |= true_boxes((root / question["image"]).with_suffix(".json"))
                check_question(question)
                kept.append(question)
            except FileNotFoundError as error:
                left_out.setdefault("without a picture", []).append(str(error))
            except (AttributeError, LookupError, TypeError, ValueError,
                    UnidentifiedImageError) as error:
                problem = f"{file.name} question {number}: {type(error).__name__}: {error}"
                left_out.setdefault("malformed", []).append(problem)
    return kept, left_out


# ------------------------------------------------------------------------------------------ command

def report(name, kept, left_out, root, out):
    print(f"{name}: {len(kept)} questions, pictures in {printable(root)}")
    for kind, count in Counter(q["kind"] for q in kept if "kind" in q).items():
        print(f"  {count:5} {printable(kind)}")
    if left_out:
        log(f"warning: left out: {describe(left_out)}; pictures were looked for in {root}")
    if len(kept) != BENCHMARKS[name].count:
        log(f"warning: the benchmark has {BENCHMARKS[name].count} questions, so this score will "
            f"not be comparable; {needs(name)}")
    infer, out = (os.path.relpath(path) for path in (ROOT / "infer.py", out))
    print(f"wrote {printable(out)}")
    print(f"next: python {shlex.quote(infer)} --eval {shlex.quote(printable(out))} "
          "--ckpt llava-1.5-7b")


def run(args):
    files = files_of(args.name, args.files)
    out = args.out or ROOT / "data" / f"{BENCHMARKS[args.name].out}.jsonl"
    out = out.resolve()
    if out in [file.resolve() for file in files]:
        raise BadInput(f"{out}: would be overwritten by its own result; give --out another name")
    unpacks = files[0].suffix in (".parquet", ".tsv")
    if unpacks:
        root = out.parent / f"{out.stem}_images"
        root.mkdir(parents=True, exist_ok=True)
    else:
        root = (args.images or files[0].parent).resolve()
    kept, left_out = convert(args.name, files, root, unpacks)
    if not kept:
        raise BadInput(f"{files[0]}: no question can be used: {describe(left_out) or 'none there'};"
                       f" pictures were looked for in {root} (--images); {needs(args.name)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_questions(out, root, kept)
    report(args.name, kept, left_out, root, out)


def parser():
    p = argparse.ArgumentParser(
        "benchmarks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(map(needs, BENCHMARKS)))
    p.add_argument("name", choices=BENCHMARKS, metavar="BENCHMARK",
                   help="one of: " + " ".join(BENCHMARKS))
    p.add_argument("files", nargs="+", type=Path, metavar="FILE",
                   help="its official file, or several; or parquet files, or a folder of them")
    p.add_argument("--images", type=Path, metavar="DIR",
                   help="the pictures of an official file; default: where the first FILE is")
    p.add_argument("--out", type=Path, metavar="FILE", help="default: a file beside this script")
    return p


def main(argv=None):
    run_program(parser(), run, argv)


if __name__ == "__main__":
    main()

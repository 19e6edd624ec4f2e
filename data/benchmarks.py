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
import re
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only data/ is on the path
from clip import BadInput, reading  # noqa: E402
from data.files import write_file  # noqa: E402
from data.program import log, run_program  # noqa: E402
from data.questions import LeftOut, convert  # noqa: E402

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


# ------------------------------------------------------------------------------------------ readers

def read_json(file):
    """Records of a JSON list, or of an object whose "data" is the list."""
    data = json.loads(file.read_text(encoding="utf-8-sig"))  # -sig drops a byte-order mark
    return data["data"] if isinstance(data, dict) else data


def read_lines(file):
    """Records of a file with one JSON object a line."""
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def read_tsv(file):
    csv.field_size_limit(2 ** 31 - 1)  # an 8K picture is one field of about 6 million letters
    with open(file, encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines, delimiter="\t")


def read_parquet(file):
    """Rows as dicts. One row group at a time is in memory, two to three times over."""
    from pyarrow.parquet import ParquetFile
    with ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(16, row_groups=[group], use_threads=False):
                yield from batch.to_pylist()


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
    return dict(kind=kind, question=r["text"].strip() + SHORT, answers=texts(r["label"]))


def hrbench(r):
    """200 questions, the options in 4 orders."""
    options = {}
    for letter in string.ascii_uppercase:
        text = str(r.get(letter))
        if text not in ("None", "nan", "NaN", ""):  # an option 0 is one
            options[letter] = text
    lines = [r["question"].strip(), *(f"{letter}. {text}" for letter, text in options.items()),
             "Answer the option letter directly."]
    return dict(id=str(r["index"]), kind=r["category"], question="\n".join(lines),
                answers=texts(r["answer"]), options=options)


def texts(value):
    """Answers as a list of strings: the files hold strings, numbers and lists."""
    values = value if isinstance(value, list) else [value]
    if not values or None in values:
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
    parquet: str         # the names of those files
    read: Callable = read_json  # of an official file
    renames: dict = field(default_factory=dict)  # parquet column: its name in the official file


BENCHMARKS = {
    "textvqa": Benchmark(
        textvqa, "train_images/{image_id}.jpg", 5000, "textvqa_val", "vqa", 1024,
        "TextVQA_0.5.1_val.json and train_val_images.zip (holds train_images/), "
        "textvqa.org/dataset", "lmms-lab/textvqa", "*validation*"),
    "docvqa": Benchmark(
        docvqa, "{image}", 5349, "docvqa_val", "anls", 32,
        "val_v1.0_withQT.json and documents/, rrc.cvc.uab.es/?ch=17, task 1 (needs an account)",
        "lmms-lab/DocVQA", "DocVQA/*validation*"),
    "infovqa": Benchmark(
        docvqa, "infographicsvqa_images/{image_local_name}", 2801, "infovqa_val", "anls", 32,
        "infographicsVQA_val_v1.0_withQT.json and infographicsvqa_images/, rrc.cvc.uab.es/?ch=17, "
        "task 3", "lmms-lab/DocVQA", "InfographicVQA/*validation*"),
    "chartqa": Benchmark(
        chartqa, "png/{imgname}", 2500, "chartqa_test", "relaxed", 16,
        "test_human.json, test_augmented.json and png/, github.com/vis-nlp/ChartQA, in its test/",
        "lmms-lab/ChartQA", "*test*", renames={"question": "query", "answer": "label"}),
    "ocrbench": Benchmark(
        ocrbench, "OCRBench_Images/{image_path}", 1000, "ocrbench", "ocrbench", 128,
        "OCRBench.json and OCRBench_Images/, as linked from github.com/Yuliang-Liu/MultimodalOCR",
        "echo840/OCRBench", "*test*",
        renames={"dataset": "dataset_name", "question_type": "type", "answer": "answers"}),
    "vstar": Benchmark(
        vstar, "{image}", 191, "vstar", "letter", 16,
        "test_questions.jsonl and the folders beside it (the sa_xxxx.json have the true boxes), "
        "huggingface.co/datasets/craigwu/vstar_bench", "lmms-lab/vstar-bench", "*test*",
        read_lines),
    "pope": Benchmark(
        pope, "val2014/{image}", 9000, "pope", "pope", 128,
        "coco_pope_{random,popular,adversarial}.json, github.com/RUCAIBox/POPE, and COCO's "
        "val2014/", "lmms-lab/POPE", "data/*test*", read_lines,
        renames={"question": "text", "answer": "label"}),
    "hrbench4k": Benchmark(
        hrbench, "", 800, "hrbench4k", "hr", 1024,
        "hr_bench_4k.tsv, huggingface.co/datasets/DreamMr/HR-Bench", "DreamMr/HR-Bench",
        "*4k*", read_tsv),
    "hrbench8k": Benchmark(
        hrbench, "", 800, "hrbench8k", "hr", 1024,
        "hr_bench_8k.tsv, huggingface.co/datasets/DreamMr/HR-Bench", "DreamMr/HR-Bench",
        "*8k*", read_tsv),
}


def needs(name):
    b = BENCHMARKS[name]
    return (f"{name} is made from {b.source}; or from {b.parquet}.parquet, "
            f"huggingface.co/datasets/{b.hub} (pip install pyarrow)")


# -------------------------------------------------------------------------- from files to questions

def files_of(name, paths):
    """The files among paths; a folder stands for the parquet files of this benchmark's split."""
    files = []
    for path in paths:
        if path.is_dir():
            files += sorted(path.rglob(f"{BENCHMARKS[name].parquet}.parquet"))
        else:
            files.append(path)
    if not files:
        raise BadInput(f"{paths[0]}: holds none of its files; {needs(name)}")
    return files


def records(name, files):
    """All records, with the field names of the official files, and "file"."""
    b = BENCHMARKS[name]
    for file in files:
        read = read_parquet if file.suffix == ".parquet" else b.read
        with reading(file, needs(name)):
            for row in read(file):
                record = {b.renames.get(key, key): value for key, value in row.items()}
                yield record | {"file": file.stem}


def locate(root, image):
    """`image` below root. It starts with a folder of the official archive; root may be where that
    folder is, or the folder itself. Raises LeftOut."""
    for path in (image, image.partition("/")[2]):
        if path and (root / path).is_file():
            return path
    raise LeftOut("without a picture", image)


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
    boxes = json.loads(notes.read_text())["bbox"]
    return {"boxes": [[x, y, x + w, y + h] for x, y, w, h in boxes]}


# ------------------------------------------------------------------------------------------ command

def run(args):
    b, files = BENCHMARKS[args.name], files_of(args.name, args.files)
    out = (args.out or ROOT / "data" / f"{b.out}.jsonl").resolve()
    if out in [file.resolve() for file in files]:
        raise BadInput(f"{out}: would be overwritten by its own result; give --out another name")
    root = (args.images or files[0].parent).resolve()
    unpacks = files[0].suffix in (".parquet", ".tsv")
    if unpacks:
        root = out.parent / f"{out.stem}_images"
        root.mkdir(parents=True, exist_ok=True)

    def make(number, record):
        question = {"id": str(number)} | b.convert(record)
        question |= {"metric": b.metric, "max_new_tokens": b.max_new_tokens, "benchmark": args.name}
        if unpacks:
            return question | {"image": unpack(record["image"], root)}
        image = locate(root, b.picture.format_map(record))
        return question | {"image": image} | true_boxes((root / image).with_suffix(".json"))

    kept = convert(records(args.name, files), make, out, root)
    if len(kept) != b.count:
        log(f"warning: the benchmark has {b.count} questions, so this score will not be "
            f"comparable; {needs(args.name)}")
    print(f"next: python infer.py --ckpt llava-1.5-7b --eval {out}")


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

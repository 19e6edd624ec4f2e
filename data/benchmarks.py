"""Turns the public files of nine benchmarks into question files for `infer.py --eval`.

    python data/benchmarks.py textvqa TextVQA_0.5.1_val.json --images train_images
    python data/benchmarks.py chartqa test_human.json test_augmented.json   # pictures: png/ there
    python data/benchmarks.py docvqa DocVQA/validation-*.parquet            # pictures: inside
    python infer.py --eval data/textvqa_val.jsonl --ckpt llava-1.5-7b

Official files and the parquet files of the Hugging Face hub give the same questions. The prompts
are those of lmms-eval to the letter, oddities included: answers of a 7B model change with a
capital. Each question carries its metric (data/metrics.py) and the paper's token limit and tau.

Left out: downloading (--help says where the files come from) and test splits whose answers are
secret. A question without its picture is left out too, and counted.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only data/ is on the path
from clip import BadInput, printable  # noqa: E402
from data.program import first_few, run_program, say  # noqa: E402
from data.questions import write_questions  # noqa: E402

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


# --------------------------------------------------------------------------------------- converters
# A converter turns a record r into a question, all but its image. `seen` counts the questions of
# each kind so far; `stem` is the file's name; `root` the folder of the pictures. Fields are named
# as in the official file. The first line of each docstring is what --help and messages quote.

def textvqa(r, seen, stem, root):
    """TextVQA_0.5.1_val.json and train_val_images.zip (holds train_images/), textvqa.org/dataset

    5,000 questions, 10 answers each. No OCR tokens are given to the model."""
    # quirk: capitalize() lower-cases the rest ("the nasa sign"), and the harness asks it like that
    return dict(id=str(r["question_id"]), question=r["question"].capitalize() + SHORT,
                answers=texts(r["answers"]))


def docvqa(r, seen, stem, root):
    """val_v1.0_withQT.json and documents/, rrc.cvc.uab.es/?ch=17, task 1 (needs an account)

    5,349 questions. The test split has no answers; its scores come from that server only."""
    return dict(id=str(r["questionId"]), question=r["question"] + SHORT,
                answers=texts(r["answers"]))


def infovqa(r, seen, stem, root):
    """infographicsVQA_val_v1.0_withQT.json, infographicsvqa_images/, rrc.cvc.uab.es/?ch=17, task 3

    2,801 questions."""
    return docvqa(r, seen, stem, root)


def chartqa(r, seen, stem, root):
    """test_human.json, test_augmented.json and png/, github.com/vis-nlp/ChartQA, in its test/

    1,250 questions in each file; the published number is over both."""
    kind = kind_of(r.get("type") or stem, "human", "augmented")
    return dict(id=f"{kind}-{seen[kind]}", kind=kind, answers=texts(r["label"]),
                question=r["query"] + "\nAnswer the question with a single word.")


def ocrbench(r, seen, stem, root):
    """OCRBench.json and OCRBench_Images/, as linked from github.com/Yuliang-Liu/MultimodalOCR

    1,000 questions of 10 kinds. The harness, like the parquet file, has JPEG copies of the official
    pictures, so single answers can differ."""
    return dict(id=str(sum(seen.values())), kind=r["type"], dataset=r["dataset_name"],
                question=r["question"].strip(), answers=texts(r["answers"]))


def vstar(r, seen, stem, root):
    """test_questions.jsonl and the folders beside it, huggingface.co/datasets/craigwu/vstar_bench

    191 questions (115 attributes, 76 positions). True boxes come from the sa_xxxx.json beside each
    picture; the parquet files have none."""
    head, *options = re.split(r"\(([A-D])\)", r["text"])
    lines = [head.strip()]
    for letter, text in zip(options[::2], options[1::2]):
        lines.append(f"{letter}. {text.strip()}")
    # quirk: the text ends in the instruction already, and the harness appends it once more
    found = dict(id=str(r["question_id"]), kind=r["category"], question="\n".join(lines) + LETTER,
                 answers=texts(r["label"]))
    notes = (root / r["image"]).with_suffix(".json") if isinstance(r["image"], str) else None
    if notes and notes.is_file():
        boxes = json.loads(notes.read_text(encoding="utf-8-sig"))["bbox"]
        found["boxes"] = [[x, y, x + w, y + h] for x, y, w, h in boxes]
    return found


def pope(r, seen, stem, root):
    """coco_pope_{random,popular,adversarial}.json, github.com/RUCAIBox/POPE, and COCO's val2014/

    3,000 questions in each of the three (older copies: 2,910 random ones); the published F1 is over
    all of them."""
    kind = kind_of(r.get("category") or stem, "random", "popular", "adversarial")
    return dict(id=f"{kind}-{r['question_id']}", kind=kind, question=r["text"].strip() + SHORT,
                answers=texts(r["label"]))


def hrbench(r, seen, stem, root):
    """hr_bench_4k.tsv or hr_bench_8k.tsv of huggingface.co/datasets/DreamMr/HR-Bench

    800 rows each: 200 questions, the options in 4 orders."""
    options = {letter: str(r[letter]) for letter in "ABCDEFGH" if r.get(letter)}
    lines = [r["question"].strip(), *(f"{letter}. {text}" for letter, text in options.items()),
             "Answer the option letter directly."]
    return dict(id=str(r["index"]), kind=r["category"], cycle=r["cycle_category"],
                question="\n".join(lines), answers=texts(r["answer"]), options=options)


def texts(value):
    """Answers as a list of strings: the files hold strings, numbers and lists."""
    value = value if isinstance(value, list) else [value]
    if not value or None in value:
        raise ValueError("it has no answer (a test split?)")
    return [str(answer) for answer in value]


def kind_of(name, *kinds):
    """The kind that a name holds: of a file, or of the column that the hub's files have instead."""
    return next((kind for kind in kinds if kind in name.lower()), name)


# ------------------------------------------------------------------------------------------ readers

def json_file(file):
    data = json.loads(file.read_text(encoding="utf-8-sig"))  # -sig: drops a byte-order mark
    if isinstance(data, dict):
        data = data.get("data")
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
    csv.field_size_limit(2 ** 31 - 1)  # an 8K picture is one field of about 6 million letters
    with open(file, encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines, delimiter="\t")


def parquet(file):
    """The rows of a parquet file as dicts. In memory is one row group at a time, 2 to 3 times."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise BadInput(f"{file}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        with ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(16, row_groups=[group], use_threads=False):
                    yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"not a parquet file, or cut short ({str(error)[:80]})") from None


# --------------------------------------------------------------------------------------- benchmarks

@dataclass(frozen=True)
class Benchmark:
    convert: Callable        # record -> question
    picture: Callable | None  # record -> its picture in the official archive; None: in the file
    read: Callable           # official file -> records
    count: int               # questions of the whole benchmark
    out: str                 # name of the question file
    shared: dict             # what every question says
    hub: str                 # data set on the hub whose parquet files hold the same
    split: str               # what the names of those files hold ...
    other: str = "\0"        # ... and what they do not
    official_names: dict = field(default_factory=dict)  # of the parquet columns that differ


BENCHMARKS = {
    "textvqa": Benchmark(
        textvqa, lambda r: f"train_images/{r['image_id']}.jpg", json_file, 5000, "textvqa_val",
        dict(metric="vqa", max_new_tokens=1024, tau=0.15), "lmms-lab/textvqa", "validation"),
    "docvqa": Benchmark(
        docvqa, lambda r: r["image"], json_file, 5349, "docvqa_val",
        dict(metric="anls", max_new_tokens=32, tau=0.10), "lmms-lab/DocVQA", "validation",
        other="InfographicVQA/"),
    "infovqa": Benchmark(
        infovqa, lambda r: f"infographicsvqa_images/{r['image_local_name']}", json_file, 2801,
        "infovqa_val", dict(metric="anls", max_new_tokens=32, tau=0.15), "lmms-lab/DocVQA",
        "validation", other="DocVQA/"),
    "chartqa": Benchmark(
        chartqa, lambda r: f"png/{r['imgname']}", json_file, 2500, "chartqa_test",
        dict(metric="relaxed", max_new_tokens=16, tau=0.15), "lmms-lab/ChartQA", "test",
        official_names={"question": "query", "answer": "label"}),
    "ocrbench": Benchmark(
        ocrbench, lambda r: f"OCRBench_Images/{r['image_path']}", json_file, 1000, "ocrbench",
        dict(metric="ocrbench", max_new_tokens=128, tau=0.05), "echo840/OCRBench", "test",
        official_names={"dataset": "dataset_name", "question_type": "type", "answer": "answers"}),
    "vstar": Benchmark(
        vstar, lambda r: r["image"], json_lines, 191, "vstar",
        dict(metric="letter", max_new_tokens=16, tau=0.10), "lmms-lab/vstar-bench", "test"),
    "pope": Benchmark(
        pope, lambda r: f"val2014/{r['image']}", json_lines, 9000, "pope",
        dict(metric="pope", max_new_tokens=128, tau=0.15), "lmms-lab/POPE", "test",
        other="Full/", official_names={"question": "text", "answer": "label"}),
    "hrbench4k": Benchmark(
        hrbench, None, tsv, 800, "hrbench4k",
        dict(metric="hr", max_new_tokens=1024, tau=0.10), "DreamMr/HR-Bench", "4k"),
    "hrbench8k": Benchmark(
        hrbench, None, tsv, 800, "hrbench8k",
        dict(metric="hr", max_new_tokens=1024, tau=0.10), "DreamMr/HR-Bench", "8k"),
}


def sources(name):
    """Where a benchmark's files come from: the official ones, and those of the hub."""
    benchmark = BENCHMARKS[name]
    return (benchmark.convert.__doc__.splitlines()[0],
            f"*{benchmark.split}*.parquet, huggingface.co/datasets/{benchmark.hub}")


def needs(name):
    return f"{name} is made from " + "; or from ".join(sources(name))


# -------------------------------------------------------------------------- from files to questions

def files_of(name, paths):
    """The files among paths; a folder stands for the parquet files of this benchmark's split."""
    benchmark, files = BENCHMARKS[name], []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        found = []
        for file in sorted(path.rglob("*.parquet")):
            inside = file.relative_to(path).as_posix()
            if benchmark.split in inside and benchmark.other not in inside:
                found.append(file)
        if not found:
            raise BadInput(f"{path}: holds no *{benchmark.split}*.parquet; {needs(name)}")
        files += found
    for file in files:
        if not file.is_file():
            raise BadInput(f"{file}: no such file; {needs(name)}")
    if len({file.suffix == ".parquet" for file in files}) > 1:
        raise BadInput(f"{files[0]}: give parquet files or official ones, not both")
    return files


def records(name, file):
    """The records of a file, their fields named as in the official one."""
    benchmark = BENCHMARKS[name]
    if file.suffix != ".parquet":
        yield from benchmark.read(file)
        return
    for row in parquet(file):
        yield {benchmark.official_names.get(column, column): value for column, value in row.items()}


def locate(root, image):
    """`image` below root, or None. `image` starts with the folder that the official archive holds;
    root may be where that folder is, or the folder itself."""
    for path in (image, image.partition("/")[2]):
        if path and (root / path).is_file():
            return path


def unpack(picture, root):
    """Write a picture that came in a file below root, once -> its name.

    The hub's files hold {"bytes": ..., "path": ...}, HR-Bench base64 text.
    """
    if isinstance(picture, dict):
        picture = picture.get("bytes")
    try:
        if isinstance(picture, str):
            picture = base64.b64decode(picture)
        with Image.open(io.BytesIO(picture)) as opened:  # reads the header only
            suffix = opened.format.lower()
    except (OSError, TypeError, ValueError):
        raise ValueError("its image is not a picture, or cut short") from None
    path = root / f"{hashlib.sha256(picture).hexdigest()[:16]}.{suffix}"
    if not path.exists():
        path.write_bytes(picture)
    return path.name


def convert(name, files, root, unpacks):
    """Yield (question, its picture below root or None, where the picture was looked for)."""
    benchmark, seen = BENCHMARKS[name], Counter()
    for file in files:
        number = 0
        try:
            for number, record in enumerate(records(name, file)):
                question = benchmark.convert(record, seen, file.stem, root)
                question |= {"benchmark": name} | benchmark.shared
                seen[question.get("kind")] += 1
                if unpacks:
                    image = wanted = unpack(record["image"], root)
                else:
                    wanted = benchmark.picture(record)
                    image = locate(root, wanted)
                yield question | {"image": image}, image, wanted
        except KeyError as error:
            renamed = {new: old for old, new in benchmark.official_names.items()} if unpacks else {}
            lacking = renamed.get(error.args[0], error.args[0])
            raise BadInput(f"{file}: near question {number + 1}: no field {lacking!r}; "
                           f"{needs(name)}") from None
        except (TypeError, AttributeError, ValueError, RecursionError, csv.Error) as error:
            raise BadInput(f"{file}: near question {number + 1}: {error}; {needs(name)}") from None


def make(name, files, root, out, unpacks):
    """Write the question file and, if they come inside, the pictures -> (kinds counted, missing).

    All is made in a folder of its own and moved when complete: a failure leaves nothing behind.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=out.parent) as work:
        made = Path(work)
        (made / "pictures").mkdir()
        found, missing = [], []
        for question, image, wanted in convert(
                name, files, made / "pictures" if unpacks else root, unpacks):
            if image:
                found.append(question)
            else:
                missing.append(wanted)
        if missing and not found:
            raise BadInput(f"{root}: none of the {len(missing)} pictures is here, the first is "
                           f"{missing[0]}; name their folder with --images")
        if not found:
            raise BadInput(f"{files[0]}: holds no question; {needs(name)}")
        write_questions(made / "questions", root, found)
        for picture in (made / "pictures").iterdir():
            root.mkdir(exist_ok=True)
            os.replace(picture, root / picture.name)
        os.replace(made / "questions", out)
    return Counter(str(question.get("kind")) for question in found), missing


# ------------------------------------------------------------------------------------------ command

def report(name, kinds, missing, root, out):
    count, expected = sum(kinds.values()), BENCHMARKS[name].count
    print(f"{name}: {count} questions, pictures in {printable(root)}")
    if len(kinds) > 1:
        for kind, number in kinds.items():
            print(f"  {number:5} {printable(kind)}")
    if missing:
        say(f"warning: {len(missing)} questions left out, their picture is not in {root}: "
            f"{first_few(missing)}")
    if count != expected:
        say(f"warning: {count} questions, the benchmark has {expected}: the score will not be "
            f"comparable; {needs(name)}")
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
    unpacks = files[0].suffix == ".parquet" or BENCHMARKS[args.name].picture is None
    if unpacks and args.images:
        raise BadInput(f"--images {args.images}: the pictures are inside {files[0].name}; "
                       "leave --images out")
    if unpacks:
        root = out.parent / f"{out.stem}_images"
    else:
        root = (args.images or files[0].parent).resolve()
        if not root.is_dir():
            raise BadInput(f"--images {root}: no such folder; {needs(args.name)}")
    kinds, missing = make(args.name, files, root, out, unpacks)
    report(args.name, kinds, missing, root, out)


def parser():
    where = ["{:10} {}\n{:10} {}".format(name, sources(name)[0], "", sources(name)[1])
             for name in BENCHMARKS]
    p = argparse.ArgumentParser(
        "benchmarks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(where))
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

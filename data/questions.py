"""Reads and writes question files: one JSON object a line, as data/README.md describes.

    {"images": "pictures"}                    # optional first line: the folder of the pictures
    {"image": "a.jpg", "question": "What is written here?", "answers": ["stop"], "kind": "sign"}

    questions, root = read_questions("questions.jsonl")

The converters benchmarks.py and llava_mix.py end in convert(), which writes such a file.
Left out: opening the pictures.
"""
import json
import os
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from clip import BadInput, printable, reading
from data.files import write_text
from data.metrics import METRICS, check_answers
from data.program import log


def is_text(value):
    return type(value) is str


def is_texts(value):
    return type(value) is list and all(map(is_text, value))


def is_below_root(image):
    return not Path(image).is_absolute() and ".." not in Path(image).parts


def have_areas(boxes):
    """True if x0 < x1 and y0 < y1 in every box (x0, y0, x1, y1)."""
    return all(x1 - x0 > 0 and y1 - y0 > 0 for x0, y0, x1, y1 in boxes)


FIELDS = {  # name: does the question's field hold what it should?
    "image": is_below_root,
    "question": lambda turns: is_texts(turns) and turns and all(map(str.strip, turns)),
    "answers": is_texts,
    "kind": is_text,
    "dataset": is_text,
    "benchmark": is_text,
    "metric": lambda metric: metric in METRICS,
    "options": lambda options: is_texts(list(options.values())),
    "boxes": have_areas,
    "max_new_tokens": lambda count: type(count) is int and count > 0,
    "tau": lambda tau: 0 < tau < 1,
}


def check_question(record):
    """The question that a record holds: its turns in a list, and no null.

    Raises ValueError, TypeError, KeyError or AttributeError if it cannot be asked or scored.
    """
    q = {key: value for key, value in record.items() if value is not None}
    if is_text(q["question"]):
        q["question"] = [q["question"]]
    for field in ("image", *q):
        if field in FIELDS and not FIELDS[field](q[field]):
            raise ValueError(f"{field!r} cannot be {str(q[field])[:60]!r}")
    json.dumps(q, ensure_ascii=False).encode()  # fails on lone surrogates, as tokenisers do
    check_answers(q)
    return q


def read_questions(path, images=None):
    """-> (list of dicts, folder of the pictures). Raises BadInput with the number of the line.

    `question` becomes a list of turns, and "line" says where the question stands. The folder is
    `images`, else what the first line says, else the file's own. `image` stays relative to it.
    """
    path = Path(path)
    root, questions = Path(images or path.parent), []
    with reading(path, "give a text file with one JSON object a line"):
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # -sig drops a byte-order mark
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with reading(f"{path} line {number}", "data/README.md says what a question holds"):
            q = json.loads(line)
            if not questions and set(q) == {"images"}:
                root = Path(images or path.parent / q["images"])
                continue
            questions.append(check_question(q) | {"line": number})
    if not questions:
        raise BadInput(f"{path}: holds no question; one JSON object a line is needed")
    return questions, root


def write_questions(path, images, questions):
    """Write the file that read_questions reads, whole or not at all. Raises OSError."""
    lines = [json.dumps(line) + "\n" for line in ({"images": str(images)}, *questions)]
    write_text(path, "".join(lines))


class LeftOut(Exception):
    """LeftOut(reason, what) says that a converter does not use this record."""


def convert(records, make, out, root):
    """Write the questions that make(number, record) returns, and log what was left out.

    out: the question file. root: the folder of the pictures. Returns the questions; raises BadInput
    if there is none. make may raise LeftOut; whatever else is wrong with a record is "malformed".
    """
    kept, left_out = [], {}
    for number, record in enumerate(records):
        try:
            question = make(number, record)
            check_question(question)
            kept.append(question)
        except LeftOut as e:
            reason, what = e.args
            left_out.setdefault(reason, []).append(what)
        except (AttributeError, LookupError, TypeError, ValueError, UnidentifiedImageError,
                Image.DecompressionBombError) as e:
            problem = f"record {number}: {type(e).__name__}: {e}"
            left_out.setdefault("malformed", []).append(problem)
    said = f"left out: {describe(left_out) or 'nothing'}; pictures were looked for in {root}"
    if not kept:
        raise BadInput(f"no question can be used; {said}; see --help")
    if left_out:
        log(said)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_questions(out, root, kept)
    print(f"wrote {len(kept):,} questions to {printable(os.path.relpath(out))}")
    return kept


def describe(left_out):
    """{reason: [what was left out, ...]} in words.

    >>> describe({"malformed": ["record 3", "record 9"], "of other sources": [4]})
    '2 malformed (first: record 3), 1 of other sources (first: 4)'
    """
    return ", ".join(f"{len(items)} {reason} (first: {items[0]})"
                     for reason, items in left_out.items())

"""Reads and writes files of questions: one JSON object a line, as data/README.md describes.

    {"images": "pictures"}                    # optional first line: the folder of the pictures
    {"image": "a.jpg", "question": "What is written here?", "answers": ["stop"], "kind": "sign"}

    questions, root = read_questions("questions.jsonl")

Left out: the pictures themselves, which are not touched.
"""
import json
import re
from pathlib import Path

from clip import BadInput
from data.files import write_text
from data.metrics import METRICS


def is_text(value):
    """A string without half characters (lone surrogates), which no tokeniser can read."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_box(value):
    """Four numbers [x0, y0, x1, y1] of reasonable size; NaN is none."""
    return (isinstance(value, list) and len(value) == 4
            and all(type(x) in (int, float) and abs(x) < 1e7 for x in value))


def is_list_of(check):
    return lambda value: isinstance(value, list) and all(check(v) for v in value)


CHECKS = {  # of the fields that may be left out
    "answers": is_list_of(is_text),
    "boxes": is_list_of(is_box),
    "kind": is_text,
    "dataset": is_text,
    "benchmark": is_text,
    "metric": lambda value: isinstance(value, str) and value in METRICS,
    "options": lambda value: isinstance(value, dict) and all(map(is_text, value.values())),
    "cycle": lambda value: isinstance(value, (str, int, float)),
    "max_new_tokens": lambda value: type(value) is int and 0 < value <= 1 << 20,
    "tau": lambda value: type(value) in (int, float) and 0 < value < 1,
}


def read_questions(path, images=None):
    """-> (list of dicts, folder of the pictures). `question` becomes a list of turns.

    The folder is `images`, else what the first line says, else the file's own; the image paths stay
    relative to it. Raises BadInput with the number of the line.
    """
    path = Path(path)
    root, questions = Path(images or path.parent), []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        q = parse(line, where)
        if not questions and set(q) == {"images"} and is_text(q["images"]):
            if not images:
                root = path.parent / q["images"]  # an absolute path replaces the folder
            continue
        questions.append(checked(q, where, root))
    if not questions:
        raise BadInput(f"{path}: holds no question; one JSON object a line is needed")
    return questions, root


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: drops a byte-order mark
    except (OSError, ValueError) as e:
        problem = getattr(e, "strerror", None) or e
        raise BadInput(f"{path}: not readable as text ({problem}); "
                       "give a file with one JSON object a line") from None


def parse(line, where):
    try:
        q = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{where}: not JSON ({str(e)[:80]}); "
                       "one object a line is needed") from None
    if not isinstance(q, dict):
        raise BadInput(f"{where}: not a JSON object in braces")
    return q


def checked(q, where, root):
    """The question with its turns as a list; BadInput if a field is not what it may be."""
    turns = [q["question"]] if is_text(q.get("question")) else q.get("question")
    if not is_list_of(is_text)(turns) or not turns or not all(turn.strip() for turn in turns):
        raise BadInput(f"{where}: 'question' must be a non-empty text or a list of such texts")
    image = q.get("image")
    if not is_text(image) or not image:
        raise BadInput(f"{where}: 'image' must be a path relative to {root}")
    if Path(image).is_absolute() or ".." in Path(image).parts or "\0" in image:
        raise BadInput(f"{where}: image {image[:80]!r} leaves the image root; "
                       f"use a path below {root}")
    for key, is_good in CHECKS.items():
        if key in q and not is_good(q[key]):
            raise BadInput(f"{where}: {key!r} has a wrong type or value: {str(q[key])[:60]}; "
                           "data/README.md says what it may be")
    return q | {"question": turns}


def write_questions(path, images, questions):
    """The file that read_questions reads; whole or not at all. Raises OSError."""
    lines = [json.dumps(line) + "\n" for line in ({"images": str(images)}, *questions)]
    write_text(path, "".join(lines))

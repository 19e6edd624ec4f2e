"""Reads a file of questions: one JSON object a line, as README, "Files of questions", describes.

    {"images": "pictures"}                                                          (optional first line: the image root)
    {"image": "a.jpg", "question": "What is written here?", "answers": ["stop"], "kind": "sign"}

Left out: everything but the reading; the pictures themselves are not touched.
"""
import json
import re
from pathlib import Path

from clip import BadInput


def is_box(b):
    return isinstance(b, list) and len(b) == 4 and all(type(x) in (int, float) and abs(x) < 1e7 for x in b)  # which NaN is not


def is_list_of(check):
    return lambda value: isinstance(value, list) and all(check(v) for v in value)


def is_text(v):
    return isinstance(v, str) and not re.search("[\ud800-\udfff]", v)  # half a character: no tokeniser can read it


CHECKS = {
    "answers": is_list_of(is_text), "boxes": is_list_of(is_box), "kind": is_text, "dataset": is_text,
    "metric": lambda v: v in ("exact", "vqa", "anls", "relaxed", "ocrbench", "letter", "hr", "pope"),
    "options": lambda v: isinstance(v, dict) and all(map(is_text, v.values())),
    "cycle": lambda v: isinstance(v, (str, int, float)), "max_new_tokens": lambda v: type(v) is int and 0 < v <= 1 << 20,
    "tau": lambda v: type(v) in (int, float) and 0 < v < 1,
}


def read_questions(path, images=None):
    """-> (list of dicts, image root). `question` becomes a list of turns; image paths stay relative to the root.

    The root is `images`, else what the first line says, else the file's own folder. Raises BadInput.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError, ValueError) as e:
        raise BadInput(f"{path}: not readable as text ({getattr(e, 'strerror', None) or e}); give a file with one JSON object a line") from None
    root, questions = Path(images or path.parent), []
    for number, line in enumerate(lines, 1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            q = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise BadInput(f"{where}: not JSON ({str(e)[:80]}); one object a line is needed") from None
        if not isinstance(q, dict):
            raise BadInput(f"{where}: not a JSON object in braces")
        if not questions and set(q) == {"images"} and is_text(q["images"]):
            root = root if images else path.parent / q["images"]  # an absolute path replaces the folder
            continue
        turns = [q["question"]] if is_text(q.get("question")) else q.get("question")
        if not isinstance(turns, list) or not turns or not all(is_text(t) and t.strip() for t in turns):
            raise BadInput(f"{where}: 'question' must be a non-empty text or a list of such texts")
        image = q.get("image")
        if not is_text(image) or not image:
            raise BadInput(f"{where}: 'image' must be a path relative to {root}")
        if Path(image).is_absolute() or ".." in Path(image).parts or "\0" in image:
            raise BadInput(f"{where}: image {image[:80]!r} leaves the image root; use a path below {root}")
        for key, good in CHECKS.items():
            if key in q and not good(q[key]):
                raise BadInput(f"{where}: {key!r} has a wrong type or value: {str(q[key])[:60]}; the README's \"Files of questions\" says what it may be")
        questions.append(q | {"question": turns})
    if not questions:
        raise BadInput(f"{path}: holds no question; one JSON object a line is needed")
    return questions, root

"""Reads and writes question files: one JSON object a line, as data/README.md describes.

    {"images": "pictures"}                    # optional first line: the folder of the pictures
    {"image": "a.jpg", "question": "What is written here?", "answers": ["stop"], "kind": "sign"}

    questions, root = read_questions("questions.jsonl")

Left out: opening the pictures.
"""
import json
from pathlib import Path

from clip import BadInput, reading
from data.files import write_text
from data.metrics import METRICS, check_answers

TEXT, NUMBER = (str,), (int, float)
FIELDS = {  # name: the types its value may have; [...] is a list of such values, {...} a dict
    "image": TEXT, "question": [TEXT], "answers": [TEXT], "kind": TEXT, "dataset": TEXT,
    "benchmark": TEXT, "metric": TEXT, "options": {"letter": TEXT}, "cycle": TEXT + NUMBER,
    "boxes": [[NUMBER]], "max_new_tokens": (int,), "tau": NUMBER}


def fits(value, types):
    """
    >>> fits([[1, 2.5]], [[(int, float)]]), fits(["a", 5], [(str,)]), fits("a", [(str,)])
    (True, False, False)
    """
    if isinstance(types, dict):
        return type(value) is dict and fits(list(value.values()), list(types.values()))
    if isinstance(types, list):
        return type(value) is list and all(fits(each, types[0]) for each in value)
    return type(value) in types


def check_question(record):
    """The question that a record holds: turns in a list, and no null. Raises ValueError.

    Lone surrogates, which no tokeniser can encode, are refused as well.
    """
    q = {key: value for key, value in record.items() if value is not None}
    if fits(q["question"], TEXT):
        q["question"] = [q["question"]]
    for key, types in FIELDS.items():
        if key in q and not fits(q[key], types):
            raise ValueError(f"{key!r} is of a wrong type: {str(q[key])[:60]}")
    json.dumps(q, ensure_ascii=False).encode()
    path = Path(q["image"])
    rules = {
        "'question' is empty": q["question"] and all(map(str.strip, q["question"])),
        "'image' must be a path below the folder of the pictures":
            path.name and not path.is_absolute() and ".." not in path.parts,
        "'metric' must be one of " + ", ".join(METRICS): q.get("metric", "exact") in METRICS,
        "'boxes' must be [[x0, y0, x1, y1], ...] with x0 < x1 and y0 < y1":
            all(len(b) == 4 and b[0] < b[2] and b[1] < b[3] for b in q.get("boxes", [])),
        "'tau' must lie between 0 and 1": 0 < q.get("tau", 0.5) < 1,
        "'max_new_tokens' must be above 0": q.get("max_new_tokens", 1) > 0}
    for rule, is_kept in rules.items():
        if not is_kept:
            raise ValueError(rule)
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


def describe(left_out):
    """{reason: [what a converter left out, ...]} in words.

    >>> describe({"malformed": ["record 3", "record 9"], "of other sources": [4]})
    '2 malformed (first: record 3), 1 of other sources (first: 4)'
    """
    return ", ".join(f"{len(items)} {reason} (first: {items[0]})"
                     for reason, items in left_out.items())

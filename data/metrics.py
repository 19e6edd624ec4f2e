"""Scores answers by the rules of lmms-eval, so that the numbers compare with published ones.

    from data import metrics
    metrics.score({"metric": "relaxed", "answers": ["10"]}, "10.4")      # -> 1.0
    python -m doctest data/metrics.py                 # runs every example below

A metric compares strings and gives a score in [0, 1]; a letter function gives a letter or None. A
new metric is one function and its line in METRICS. The harness has oddities ("Cotton" counts as
option C). They move the published numbers, so they are kept, each marked `quirk` on its line.
Left out: asking GPT which option a reply means (HR-Bench does; here such a reply is wrong), and the
official scripts where they differ from lmms-eval.
"""
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import stdev

import numpy as np

from clip import BadInput, printable

PAPER = Path(__file__).parent / "paper.json"

# TextVQA's normaliser restores missing apostrophes: dont -> don't.
ONE_APOSTROPHE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't
    he'd he's how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't
    not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
    someone's something'd something'll that's there'd there're there's they'd they'll they're
    they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd
    you'll you're you've"""
MORE_APOSTROPHES = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've
    somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've
    y'all'll y'all'd've you'd've 'ow's'at"""
CONTRACTIONS = {word.replace("'", ""): word for word in ONE_APOSTROPHE.split()}
for word in MORE_APOSTROPHES.split():  # of these exactly one apostrophe may be missing
    for at, letter in enumerate(word):
        if letter == "'":
            CONTRACTIONS[word[:at] + word[at + 1:]] = word
CONTRACTIONS["somebody'd"] = "somebodyd"  # quirk: the table has this pair the wrong way round

NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
           "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
PUNCTUATION = ";/[]\"{}()=+\\_-><@`!"

# HR-Bench: a reply that contains one of these is a refusal.
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")


# ----------------------------------------------------------------------------- one reply, one score

def exact(prediction, answers):
    """1 if the reply is one of the answers. Case and outer spaces do not count. The default metric.

    >>> exact(" Red\\n", ["red", "dark red"]), exact("reddish", ["red"])
    (1.0, 0.0)
    """
    return float(prediction.strip().lower() in [answer.strip().lower() for answer in answers])


@lru_cache(100_000)
def normalise(text):
    """What TextVQA compares: no case, articles or number words, and little punctuation.

    >>> [normalise(t) for t in ("The Coca-Cola", "12,345", "U.S.A.", "3.5", "none", "dont")]
    ['coca cola', '12345', 'usa', '3.5', '0', "don't"]
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    before = text
    for mark in PUNCTUATION:  # dropped at a word's edge; a space inside words: 7-up -> 7 up
        at_an_edge = mark + " " in before or " " + mark in before
        text = text.replace(mark, "" if at_an_edge else " ")
    # quirks: the look-behind meant to keep "3." fails, and 32 was meant as a flag
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [NUMBERS.get(word, word) for word in text.split()]
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def vqa_accuracy(prediction, answers):
    """1 if 3 of 9 people gave this answer; the mean over leaving out each of the 10 in turn.

    It needs about 10 answers: with 3 or fewer no reply reaches 1, and with one none scores at all.
    >>> round(vqa_accuracy("The NASA!", ["nasa"] * 3 + ["esa"] * 7), 6)    # (3 * 2/3 + 7 * 1) / 10
    0.9
    """
    prediction = normalise(prediction)
    answers = [normalise(answer) for answer in answers]
    hits = answers.count(prediction)
    return mean(min(1, (hits - (answer == prediction)) / 3) for answer in answers)


def levenshtein(a, b):
    """Fewest insertions, deletions and replacements that turn a into b.

    >>> levenshtein("kitten", "sitting")
    3
    """
    if a == b:
        return 0
    before = list(range(len(b) + 1))  # distances from a[:i] to every prefix of b, here i = 0
    for i, x in enumerate(a, 1):
        after = [i]
        for j, y in enumerate(b, 1):
            replaced = before[j - 1] + (x != y)
            after.append(min(before[j] + 1, after[-1] + 1, replaced))
        before = after
    return before[-1]


def anls(prediction, answers):
    """1 - edit distance / length for the nearest answer; 0 if below 0.5 (DocVQA, InfoVQA).

    >>> anls("Helo", ["Hello"]), anls("ab", ["abcd"]), anls("a", ["abcd"])    # 0.5 itself is kept
    (0.8, 0.5, 0.0)
    """
    nearest = 1.0
    for answer in answers:
        want, got = (" ".join(text.lower().split()) for text in (answer, prediction))
        distance = levenshtein(want, got)
        # quirk: lengths of the raw upper-cased texts; spaces count, and "ß" is "SS", two letters
        length = max(len(answer.upper()), len(prediction.upper()))
        nearest = min(nearest, distance / length if length else 0.0)
    return 1 - nearest if 1 - nearest >= 0.5 else 0.0


def to_float(text):
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction, answer):
    """1 if a number is within 5 %, or a text is equal whatever its case (ChartQA).

    >>> relaxed_accuracy("10.4", "10"), relaxed_accuracy("10.6", "10")
    (1.0, 0.0)
    >>> relaxed_accuracy("10%", "0.1"), relaxed_accuracy("YES", "Yes")
    (1.0, 1.0)
    """
    got, want = to_float(prediction), to_float(answer)
    if got is not None and want:  # quirk: an answer of 0 falls through, so "0.0" is wrong
        return float(abs(got - want) / abs(want) <= 0.05)
    return float(prediction.lower() == answer.lower())  # quirk: no stripping


def ocrbench(prediction, answers, dataset):
    """1 if the reply contains an answer. Formulas (HME100k) are compared without spaces.

    >>> ocrbench("It says 'Centre'.", ["CENTRE"], "IIIT5K"), ocrbench("x ^ 2", ["x^2"], "HME100k")
    (1.0, 1.0)
    """
    prediction = prediction.lower().strip().replace("\n", " ")
    if dataset == "HME100k":
        prediction = prediction.replace(" ", "")
        # quirk: only the reply is lower-cased, so an answer with a capital never matches
        answers = [re.sub("[\n ]", "", answer.strip()) for answer in answers]
    else:
        answers = [answer.lower().strip().replace("\n", " ") for answer in answers]
    return float(any(answer in prediction for answer in answers))


LETTER_PATTERNS = (
    r"^([A-D])",  # quirk: any first word, so Cotton -> C, Blue -> B, "Answer: D" -> A
    r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
    r"\(([A-D])\)",
    r"([A-D])\s*[.)\]]",
    r"(?:^|\s)([A-D])(?:\s|$)",
)


def choice_letter(prediction):
    """The option A-D that a reply means (V*), by the first pattern that matches.

    >>> [choice_letter(t) for t in ("(b) red", "The answer is D.", "It is C", "Sorry", "")]
    ['B', 'D', 'C', None, None]
    """
    text = prediction.strip().upper()
    for pattern in LETTER_PATTERNS:
        found = re.search(pattern, text)
        if found:
            return found[1]
    letters = re.findall("[A-D]", text)
    return letters[0] if len(letters) == 1 else None  # quirk: kevlar -> A, its only one of the four


def hr_letter(prediction, options):
    """The option that a reply means (HR-Bench), "Z" for a refusal, or None.

    It is the only option letter among the words, else the only option whose text is in the reply.

    >>> options = {"A": "red", "B": "blue", "C": "light blue"}
    >>> [hr_letter(t, options) for t in ("B.", "It is Red", "light blue", "a", "A or B", "A dog")]
    ['B', 'A', None, None, None, 'A']
    """
    if any(refusal in prediction for refusal in REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", prediction).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    inside = [letter for letter, text in options.items() if text.lower() in prediction.lower()]
    return inside[0] if len(inside) == 1 else None


def mean(values):
    """The mean of the values that are not None; NaN without any.

    >>> mean([1, 2, None]), mean([])
    (1.5, nan)
    """
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


# ------------------------------------------------------------------------- many replies, one figure

def pope_official(rows):
    """POPE: F1, accuracy, precision, recall of "yes". Published numbers pool all three files.

    >>> pairs = ("Yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"), ("maybe", "yes")
    >>> pope_official([{"prediction": a, "answers": [b], "score": a == b} for a, b in pairs])["F1"]
    50.0
    """
    pairs = [(row["prediction"].strip().lower(), row["answers"][0].strip().lower()) for row in rows]
    # quirk: "maybe" is neither a yes nor a no, so it is no miss
    right, wrong_yes = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    wrong_no = pairs.count(("no", "yes"))
    return {"F1": 100 * 2 * right / max(1, 2 * right + wrong_yes + wrong_no),
            "accuracy": 100 * mean(row["score"] for row in rows),
            "precision": 100 * right / max(1, right + wrong_yes),
            "recall": 100 * right / max(1, right + wrong_no)}


def of_kind(rows, *kinds):
    return [row for row in rows if row.get("kind") in kinds]


def over_cycles(rows):
    """Mean over the rotations of the options (`cycle`) of the mean score within one.

    >>> over_cycles([{"cycle": c, "score": s} for c, s in ((0, 1), (0, 1), (0, 1), (1, 0))])
    0.5
    """
    cycles = {}
    for row in rows:
        cycles.setdefault(row.get("cycle"), []).append(row["score"])
    return mean(mean(scores) for scores in cycles.values())


def hr_official(rows):
    """HR-Bench: both kinds, single objects (FSP) and several (FCP), each a mean over rotations."""
    parts = {"average": rows, "FSP": of_kind(rows, "single"), "FCP": of_kind(rows, "cross")}
    return {name: 100 * over_cycles(part) for name, part in parts.items() if part}


OCRBENCH_GROUPS = {  # the kinds of each group: 300, 200, 200, 200 and 100 questions
    "Text Recognition": ("Regular Text Recognition", "Irregular Text Recognition",
                         "Artistic Text Recognition", "Handwriting Recognition",
                         "Digit String Recognition", "Non-Semantic Text Recognition"),
    "Scene Text-centric VQA": ("Scene Text-centric VQA",),
    "Doc-oriented VQA": ("Doc-oriented VQA",),
    "Key Information Extraction": ("Key Information Extraction",),
    "Handwritten Mathematical": ("Handwritten Mathematical Expression Recognition",),
}


def ocrbench_official(rows):
    """OCRBench: points, the number of right answers out of the benchmark's 1,000."""
    figures = mean_official(rows) | {"points": sum(row["score"] for row in rows)}
    for group, kinds in OCRBENCH_GROUPS.items():
        figures[group] = sum(row["score"] for row in of_kind(rows, *kinds))
    return figures


def mean_official(rows):
    return {"mean": 100 * mean(row["score"] for row in rows)}


def kinds_official(rows):
    """The mean over all questions and over each kind."""
    figures = mean_official(rows)
    for kind in sorted({row["kind"] for row in rows if row.get("kind")}):
        figures[kind] = 100 * mean(row["score"] for row in of_kind(rows, kind))
    return figures


# -------------------------------------------------------------------------------------- the metrics

def relaxed_score(prediction, answers):
    return max(relaxed_accuracy(prediction, answer) for answer in answers)


def is_right_letter(letter, answers, options):
    return float(letter in options and letter in [answer.strip().upper() for answer in answers])


def letter_score(prediction, answers, options):
    return is_right_letter(choice_letter(prediction), answers, options or list("ABCD"))


def hr_score(prediction, answers, options):
    return is_right_letter(hr_letter(prediction, options or {}), answers, options or {})


def pope_score(prediction, answers):
    """quirk: POPE wants the bare word; "Yes." is wrong."""
    return exact(prediction, [answer for answer in answers if exact(answer, ["yes", "no"])])


@dataclass(frozen=True)
class Metric:
    score: Callable                     # (prediction, answers) -> [0, 1]
    field: str | None = None            # the question's field that is its third argument
    official: Callable = mean_official  # rows -> figures that its authors report; first, in percent


METRICS = {
    "exact": Metric(exact),
    "vqa": Metric(vqa_accuracy),
    "anls": Metric(anls),
    "relaxed": Metric(relaxed_score, official=kinds_official),
    "ocrbench": Metric(ocrbench, "dataset", ocrbench_official),
    "letter": Metric(letter_score, "options", kinds_official),
    "hr": Metric(hr_score, "options", hr_official),
    "pope": Metric(pope_score, official=pope_official),
}


def score(question, prediction):
    """The score of a reply to a question of a question file, or None if it has no answers.

    >>> score({"metric": "letter", "answers": ["B"]}, "(B)"), score({"answers": ["Red"]}, "red ")
    (1.0, 1.0)
    """
    if not question.get("answers"):
        return None
    metric = METRICS[question.get("metric", "exact")]
    extra = [question.get(metric.field)] if metric.field else []
    return metric.score(prediction, question["answers"], *extra)


def check_answers(question):
    """Raise ValueError if an answer can never be right, or if every reply is.

    >>> check_answers({"metric": "letter", "answers": ["(A)"]})
    Traceback (most recent call last):
    ValueError: no reply can match the answer '(A)' by the metric 'letter'
    """
    # quirk: an HME100k answer with a capital never matches, and the benchmark has such answers
    question = question | {"dataset": None}
    metric = question.get("metric", "exact")
    for answer in dict.fromkeys(question.get("answers", [])):
        if re.fullmatch(r"""\s*\[\s*(["']).*\1\s*\]\s*""", answer, re.DOTALL):
            raise ValueError(f"the answer {answer!r} is a list written as a text")
        replies = answer.strip(), answer.strip().upper()  # HR-Bench wants a capital
        if not any(score(question, reply) for reply in replies):
            raise ValueError(f"no reply can match the answer {answer!r} by the metric {metric!r}")
        if score(question | {"answers": [answer]}, "\0"):
            raise ValueError(f"every reply matches the answer {answer!r} by the metric {metric!r}")


def union_area(boxes, size):
    """Area of the union of boxes (x0, y0, x1, y1) within a picture of `size` (w, h).

    >>> union_area([(0, 0, 2, 2), (1, 1, 3, 9)], (4, 4))      # 4 + 2 * 3 - 1
    9.0
    """
    boxes = np.clip(np.reshape(boxes, (-1, 4)), 0, [*size, *size])
    x0, y0, x1, y1 = boxes.T[:, :, None]  # (n, 1) each
    x, y = np.unique(boxes[:, ::2]), np.unique(boxes[:, 1::2])  # no box has an edge in between
    across = (x0 <= x[:-1]) & (x[:-1] < x1)  # (n, columns between edges)
    down = (y0 <= y[:-1]) & (y[:-1] < y1)  # (n, rows between edges)
    inside = down.T @ across  # (rows, columns) bool: inside any of the boxes
    return float((np.outer(np.diff(y), np.diff(x)) * inside).sum())


def overlap(crops, boxes, size):
    """(True if the crops cover half of every true box, IoU of crops and boxes), by exact areas.

    Boxes are in pixels of a picture of `size` (w, h), and only what lies inside it counts. Raises
    BadInput if a true box lies outside.

    >>> overlap([(0, 0, 50, 100)], [(0, 0, 100, 100)], (100, 100))
    (True, 0.5)
    """
    def common(some):  # the area that the crops share with them
        return seen + union_area(some, size) - union_area([*crops, *some], size)

    seen, covered = union_area(crops, size), []
    for box in boxes:
        own = union_area([box], size)
        if own == 0:
            raise BadInput(f"the box {box} lies outside the picture of {size[0]}x{size[1]} pixels")
        covered.append(common([box]) >= own / 2)
    return all(covered), common(boxes) / union_area([*crops, *boxes], size)


def paired(before, after):
    """Compare two methods by their scores of the same questions (None: not scored).

    won, lost: how many questions got better and worse. change: the mean difference. interval: half
    the width of its 95 % interval by the normal approximation, NaN below two questions.

    >>> paired([0, 0, 1, None], [1, 1, 0, 1])
    {'won': 2, 'lost': 1, 'change': 0.3333333333333333, 'interval': 1.3066666666666666}
    """
    changes = [b - a for a, b in zip(before, after) if a is not None and b is not None]
    interval = 1.96 * stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else float("nan")
    return {"won": sum(change > 0 for change in changes),
            "lost": sum(change < 0 for change in changes),
            "change": mean(changes), "interval": interval}


# ------------------------------------------------------------------------------------------- tables

def table(header, rows):
    """Lines of text: the first column flush left, the others flush right.

    >>> table(["kind", "n"], [["word", "100"], ["x", "7"]])
    ['kind    n', 'word  100', 'x       7']
    """
    rows = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return lines


def number(value, form):
    """A number as a cell of a table: percent without the sign, a dash for NaN (not known).

    >>> number(0.5, ".1%"), number(2.5, ".2f"), number(mean([]), ".1%")
    ('50.0', '2.50', '-')
    """
    return "-" if value != value else format(value, form).rstrip("%")


def average(rows, method, field):
    """Mean of a field of what a method answered, over the rows that have it; NaN if none has."""
    return mean(row[method].get(field) for row in rows if method in row)


def by_kind(rows):
    """{kind: rows}; the last one is "all", where questions without a kind count as well."""
    parts = {}
    for row in rows:
        parts.setdefault(row["kind"], []).append(row)
    parts.pop("all", None)
    return parts | {"all": rows}


def compare(questions, methods, log=print):
    """Ask every method every question -> a table: a line for each method, a column for each kind.

    questions: (picture, question of a question file) pairs; methods: {name: f(picture, question) ->
    answer}. Scores are in percent.
    """
    rows = []
    for picture, q in questions:
        rows.append({"kind": q["kind"]})
        for name, ask in methods.items():
            began = time.perf_counter()
            answer = ask(picture, q)
            rows[-1][name] = {"seconds": time.perf_counter() - began, "score": score(q, answer)}
        if len(rows) % 50 == 0:
            log(f"question {len(rows)}/{len(questions)}")
    parts, lines = by_kind(rows), []
    for name in methods:
        scores = [number(average(part, name, "score"), ".1%") for part in parts.values()]
        lines.append([name, *scores, number(average(rows, name, "seconds"), ".3f")])
    return "\n".join(table(["", *parts, "s/question"], lines))


COLUMNS = (  # heading, method and field of a row, format
    ("plain", "plain", "score", ".1%"),
    ("two-stage", "two_stage", "score", ".1%"),
    ("s plain", "plain", "seconds", ".3f"),
    ("s two", "two_stage", "seconds", ".3f"),
    ("tokens", "two_stage", "visual_tokens", ".0f"),
    ("recall", "two_stage", "covers", ".1%"),
    ("IoU", "two_stage", "iou", ".2f"),
)


def measures(rows):
    """A line of the table: {heading: text}, with a dash for what is not known."""
    cells = {"n": str(len(rows))}
    for heading, method, field, form in COLUMNS:
        cells[heading] = number(average(rows, method, field), form)
    if "two_stage" not in rows[0]:
        return cells
    two = [row["two_stage"] for row in rows]
    cells["RoI %"] = number(mean(bool(t["boxes"]) for t in two), ".0%")
    if cells["plain"] == "-":
        return cells
    pairs = paired([row["plain"].get("score") for row in rows], [t.get("score") for t in two])
    cells |= {"change": number(pairs["change"], "+.1%"), "\u00b1": number(pairs["interval"], ".1%"),
              "lost": str(pairs["lost"]), "won": str(pairs["won"])}
    return cells


def paper_figures(config, benchmark):
    """-> (the paper's name of the model of this config or None, {figure: [plain, SD-RPN]})."""
    sizes = config and f"{config.model_type} {config.num_hidden_layers} {config.hidden_size}"
    model = json.loads(PAPER.read_text()).get(sizes, {"name": None})
    return model["name"], model.get(benchmark, {})


def official_table(official, count, model, paper):
    """The official figures {"plain": {figure: value}, "two_stage"?: ...}, beside the paper's."""
    header = [f"official, {count} questions", *official]
    rows = [[name, *(number(figures[name], ".1f") for figures in official.values())]
            for name in official["plain"]]
    if paper:
        header.append(f"the paper's, {model}")
        for row in rows:
            known = ["-" if value is None else str(value) for value in paper.get(row[0], [])]
            row.append(" -> ".join(known))
    return table(header, rows)


def shared(questions, key, default=None):
    """What all questions say, or None if they differ."""
    values = {q.get(key, default) for q in questions}
    return values.pop() if len(values) == 1 else None


def side_by_side(rows, questions, log=print, config=None):
    """Log a line for each kind and the official figures -> a summary, scores in percent.

    rows: {"kind", "answers", "plain": {...}, "two_stage"?: {...}}, one for each question. A row
    without a score (its question has no answers) counts for times and boxes alone. config: the
    model's, by which the paper's figures are found.
    """
    lines = {kind: measures(part) for kind, part in by_kind(rows).items()}
    header = [name for name, text in lines["all"].items() if text != "-"]
    body = [[kind, *(cells.get(name, "-") for name in header)] for kind, cells in lines.items()]
    for line in table(["kind", *header], body):
        log(line)
    if "change" in header:
        log("lost: plain right, two-stage wrong; won: the reverse; \u00b1: 95 % interval of change")
    if "recall" in header:
        log("recall: the crops cover half of every true box")

    metric, benchmark = shared(questions, "metric", "exact"), shared(questions, "benchmark")
    summary = {"questions": len(rows), "metric": metric}
    scored = [row for row in rows if row["plain"].get("score") is not None]
    if len(scored) < len(rows):
        log(f"{len(rows) - len(scored)} of {len(rows)} questions have no answers: not scored")
        summary["scored"] = len(scored)
    if not scored:
        return summary
    rule = METRICS[metric].official if metric else mean_official
    official = {}
    for name in ("plain", "two_stage"):
        if name in rows[0]:
            figures = rule(
                [row | row[name] | {"prediction": row[name]["answer"]} for row in scored])
            official[name] = {key: round(value, 2) for key, value in figures.items()}
            summary[name] = next(iter(official[name].values()))
    if benchmark or rule is not mean_official:
        for line in official_table(official, len(scored), *paper_figures(config, benchmark)):
            log(line)
    return summary | {"official": official}

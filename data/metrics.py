"""Scores answers by the rules of lmms-eval, so that the numbers compare with published ones.

    from data import metrics
    metrics.score({"metric": "relaxed", "answers": ["10"]}, "10.4")      # -> 1.0
    python -m doctest data/metrics.py                 # runs every example below

A metric compares strings and gives a score in [0, 1]; a letter function gives a letter or None. A
new metric is one function and its line in METRICS. The harness has oddities ("Cotton" counts as
option C). They move the published numbers, so they are kept, each marked `quirk` on its line.
Left out: asking GPT which option a reply means (HR-Bench does; here such a reply is wrong),
HR-Bench's mean over the four orders of the options (the plain mean unless questions are missing),
and the official scripts where they differ from lmms-eval.
"""
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import stdev

import numpy as np

from clip import BadInput, printable

PAPER = Path(__file__).parent / "paper.json"

# TextVQA's normaliser restores an apostrophe: dont -> don't. Exactly one may be missing.
FULL_FORMS = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't
    he'd he's how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't
    not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
    someone's something'd something'll that's there'd there're there's they'd they'll they're
    they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd
    you'll you're you've couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've
    somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've
    y'all'll y'all'd've you'd've 'ow's'at"""
CONTRACTIONS = {}
for word in FULL_FORMS.split():
    for at, letter in enumerate(word):
        if letter == "'":
            CONTRACTIONS[word[:at] + word[at + 1:]] = word
CONTRACTIONS["somebody'd"] = "somebodyd"  # quirk: the table has this pair the wrong way round

NUMBERS = {"none": "0"}
for digit, word in enumerate("zero one two three four five six seven eight nine ten".split()):
    NUMBERS[word] = str(digit)
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


@cache
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
    words = [NUMBERS.get(word, word) for word in text.split() if word not in ("a", "an", "the")]
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
    before = list(range(len(b) + 1))  # distances from a[:i] to every prefix of b, here i = 0
    for i, x in enumerate(a, 1):
        after = [i]
        for j, y in enumerate(b, 1):
            after.append(min(before[j] + 1, after[-1] + 1, before[j - 1] + (x != y)))
        before = after
    return before[-1]


def anls(prediction, answers):
    """1 - edit distance / length for the nearest answer; 0 if below 0.5 (DocVQA, InfoVQA).

    >>> anls("Helo", ["Hello"]), anls("ab", ["abcd"]), anls("a", ["abcd"])    # 0.5 itself is kept
    (0.8, 0.5, 0.0)
    """
    best = 0.0
    for answer in answers:
        want, got = (" ".join(text.lower().split()) for text in (answer, prediction))
        # quirk: lengths of the raw upper-cased texts; spaces count, and "ß" is "SS", two letters
        length = max(1, len(answer.upper()), len(prediction.upper()))
        best = max(best, 1 - levenshtein(want, got) / length)
    return best if best >= 0.5 else 0.0


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
    gap = "" if dataset == "HME100k" else " "
    prediction = re.sub("[\n ]", gap, prediction.strip()).lower()
    answers = [re.sub("[\n ]", gap, answer.strip()) for answer in answers]
    if dataset != "HME100k":  # quirk: a capital in an HME100k answer never matches
        answers = [answer.lower() for answer in answers]
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

def by_kind(rows):
    """{kind: its rows}, and last all rows as "all", which is also the kind of those without one.

    >>> {kind: len(part) for kind, part in by_kind([{"kind": k} for k in "aba"]).items()}
    {'a': 2, 'b': 1, 'all': 3}
    """
    kinds = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    kinds.pop("all", None)
    return kinds | {"all": rows}


def mean_official(rows):
    """{kind: its mean score}, and last "all"."""
    return {kind: mean(row["score"] for row in part) for kind, part in by_kind(rows).items()}


def pope_official(rows):
    """POPE: accuracies, then precision, recall and F1 of "yes". Published F1s pool all three files.

    >>> pairs = ("Yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"), ("maybe", "yes")
    >>> rows = [{"kind": "a", "answer": a, "answers": [b], "score": a == b} for a, b in pairs]
    >>> pope_official(rows)
    {'a': 0.2, 'all': 0.2, 'precision': 0.5, 'recall': 0.5, 'F1': 0.5}
    """
    pairs = Counter((row["answer"].strip().lower(), row["answers"][0].strip().lower())
                    for row in rows)
    # quirk: "maybe" is neither a yes nor a no, so it is no miss
    right, wrong_yes, wrong_no = pairs["yes", "yes"], pairs["yes", "no"], pairs["no", "yes"]
    return mean_official(rows) | {"precision": right / max(1, right + wrong_yes),
                                  "recall": right / max(1, right + wrong_no),
                                  "F1": 2 * right / max(1, 2 * right + wrong_yes + wrong_no)}


# -------------------------------------------------------------------------------------- the metrics

def relaxed_score(prediction, answers):
    return max(relaxed_accuracy(prediction, answer) for answer in answers)


def exact_among(prediction, answers, allowed):
    """exact, where an answer that is not allowed is never right."""
    return exact(prediction, [a for a in answers if a.strip().upper() in allowed])


def letter_score(prediction, answers, options):
    return exact_among(choice_letter(prediction) or "", answers, options or list("ABCD"))


def hr_score(prediction, answers, options):
    options = options or {}
    return exact_among(hr_letter(prediction, options) or "", answers, options)


def pope_score(prediction, answers):
    """quirk: POPE wants the bare word; "Yes." is wrong."""
    return exact_among(prediction, answers, ["YES", "NO"])


@dataclass
class Metric:
    score: Callable                     # (prediction, answers) -> [0, 1]
    field: str | None = None            # the question's field that is its third argument
    official: Callable = mean_official  # rows -> {figure: value in [0, 1]}, the main one last


METRICS = {
    "exact": Metric(exact),
    "vqa": Metric(vqa_accuracy),
    "anls": Metric(anls),
    "relaxed": Metric(relaxed_score),
    "ocrbench": Metric(ocrbench, "dataset"),
    "letter": Metric(letter_score, "options"),
    "hr": Metric(hr_score, "options"),
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
    """Raise ValueError if an answer could never be right, or if every reply would be.

    >>> check_answers({"metric": "letter", "answers": ["(A)"]})
    Traceback (most recent call last):
    ValueError: the answer '(A)' does not fit the metric 'letter'
    """
    # quirk: an HME100k answer with a capital never matches, and the benchmark has such answers
    question = question | {"dataset": None}
    for answer in dict.fromkeys(question.get("answers", [])):
        text = answer.strip()
        is_right = score(question, text) or score(question, text.upper())  # HR-Bench: a capital
        is_always_right = score(question | {"answers": [answer]}, "\0")
        is_list = re.fullmatch(r"""(?s)\[\s*["'].*["']\s*\]""", text)  # written as a text
        if not is_right or is_always_right or is_list:
            raise ValueError(f"the answer {answer!r} does not fit the metric "
                             f"{question.get('metric', 'exact')!r}")


def union_area(boxes, size):
    """Area of the union of boxes (x0, y0, x1, y1) within a picture of `size` (w, h).

    >>> union_area([(0, 0, 2, 2), (1, 1, 3, 9)], (4, 4))      # 4 + 2 * 3 - 1
    9.0
    """
    boxes = np.clip(np.reshape(boxes, (-1, 4)), 0, [*size, *size])
    boxes, area = boxes[boxes[:, 1].argsort()], 0  # from the top
    for left, right in pairwise(np.unique(boxes[:, ::2])):  # a strip where no box begins or ends
        bottom = 0  # of what is counted in this strip
        for x0, y0, x1, y1 in boxes:
            if x0 <= left < x1 and y1 > bottom:
                area += (right - left) * (y1 - max(y0, bottom))
                bottom = y1
    return float(area)


def overlap(crops, boxes, size):
    """(True if the crops cover half of every true box, IoU of crops and boxes), by exact areas.

    Boxes are in pixels of a picture of `size` (w, h), and only what lies inside it counts. Raises
    BadInput if a true box lies outside.

    >>> overlap([(0, 0, 50, 100)], [(0, 0, 100, 100)], (100, 100))
    (True, 0.5)
    """
    def shared(some):  # the area that the crops share with these boxes
        return seen + union_area(some, size) - union_area([*crops, *some], size)

    seen, covers = union_area(crops, size), True
    for box in boxes:
        own = union_area([box], size)
        if own == 0:
            raise BadInput(f"the box {box} lies outside the picture of {size[0]}x{size[1]} pixels")
        covers = covers and shared([box]) >= own / 2
    return covers, shared(boxes) / union_area([*crops, *boxes], size)


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
    columns = []
    for column in zip(header, *rows):
        cells = [printable(cell) for cell in column]
        width = max(map(len, cells))
        justify = str.rjust if columns else str.ljust
        columns.append([justify(cell, width) for cell in cells])
    return ["  ".join(line).rstrip() for line in zip(*columns)]


def number(value, form):
    """A number as a cell of a table: percent without the sign, a dash for NaN (not known).

    >>> number(0.5, ".1%"), number(2.5, ".2f"), number(mean([]), ".1%")
    ('50.0', '2.50', '-')
    """
    return "-" if value != value else format(value, form).rstrip("%")


def values(rows, method, field):
    """What a method's answers hold in a field, one for each row; None where there is nothing."""
    return [row.get(method, {}).get(field) for row in rows]


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
        scores = [number(mean(values(part, name, "score")), ".1%") for part in parts.values()]
        lines.append([name, *scores, number(mean(values(rows, name, "seconds")), ".3f")])
    return "\n".join(table(["", *parts, "s/question"], lines))


COLUMNS = (  # heading, method and field of a row, format
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
        cells[heading] = number(mean(values(rows, method, field)), form)
    pairs = paired(values(rows, "plain", "score"), values(rows, "two_stage", "score"))
    cells["change"] = number(pairs["change"], "+.1%")
    if cells["change"] != "-":
        cells |= {"\u00b1": number(pairs["interval"], ".1%"),
                  "lost": str(pairs["lost"]), "won": str(pairs["won"])}
    return cells


def side_by_side(rows, log=print, config=None):
    """Log a table of kinds and official figures beside the paper's -> a summary, in percent.

    rows: questions with what was answered, {"kind", "answers", ..., "plain": {...}, "two_stage"?:
    {...}}. A row without a score (its question has no answers) counts for times and boxes alone.
    config: the model's; its sizes find the paper's figures.
    """
    said = {(row.get("metric", "exact"), row.get("benchmark")) for row in rows}
    metric, benchmark = said.pop() if len(said) == 1 else (None, None)  # several
    rule = METRICS[metric or "exact"].official
    summary = {"questions": len(rows), "metric": metric}
    scored = [row for row in rows if row["plain"].get("score") is not None]
    if len(scored) < len(rows):
        summary["scored"] = len(scored)
    lines = {kind: measures(part) for kind, part in by_kind(rows).items()}
    for name in ("plain", "two_stage"):
        answers = [row | row[name] for row in scored if name in row]
        if answers:
            percent = {}
            for figure, value in rule(answers).items():
                percent[figure] = round(100 * value, 2)
                lines.setdefault(figure, {})[name] = number(value, ".1%")
            summary[name] = percent[figure]  # the last is the main one
            summary.setdefault("official", {})[name] = percent

    header = [name for name, text in lines["all"].items() if text != "-"]
    sizes = config and f"{config.model_type} {config.num_hidden_layers} {config.hidden_size}"
    paper = json.loads(PAPER.read_text()).get(sizes, {}).get(benchmark, {})
    for column, figures in paper.items():
        header.append(column)
        for figure, line in lines.items():
            line[column] = str(figures.get(figure, "-"))
    body = [[kind, *(line.get(name, "-") for name in header)] for kind, line in lines.items()]
    for line in table(["kind", *header], body):
        log(line)
    return summary

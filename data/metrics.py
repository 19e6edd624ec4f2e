"""Scores of answers, by the rules of lmms-eval, so that numbers can be laid beside published ones.

    from data import metrics
    metrics.score({"metric": "relaxed", "answers": ["10"]}, "10.4")      # -> 1.0
    python -m doctest data/metrics.py                 # every example below; silence is good

Functions compare strings; a score lies in [0, 1], a letter function gives a letter or None. A new
metric is such a function and its line in METRICS, which all else here and data/questions.py read.
The harness has oddities ("Cotton" counts as option C). They move the published numbers, so they are
kept, each marked `quirk` beside its line. Left out: asking GPT which option a reply means (HR-Bench
does; here such a reply is wrong) and the official scripts where they differ from lmms-eval.
"""
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clip import printable

# The normaliser of TextVQA restores missing apostrophes: dont -> don't.
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

# HR-Bench: a reply holding one of these is a refusal.
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")


# ----------------------------------------------------------------------------- one reply, one score

def exact(prediction, answers):
    """1 if the reply is one of the answers, but for case and outer spaces. The default metric.

    >>> exact(" Red\\n", ["red", "dark red"]), exact("reddish", ["red"])
    (1.0, 0.0)
    """
    return float(prediction.strip().lower() in [answer.strip().lower() for answer in answers])


def normalise(text):
    """TextVQA's idea of the same answer: case, articles, most punctuation, number words go.

    >>> [normalise(t) for t in ("The Coca-Cola", "12,345", "U.S.A.", "3.5", "none", "dont")]
    ['coca cola', '12345', 'usa', '3.5', '0', "don't"]
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    before = text
    for mark in PUNCTUATION:  # at a word's edge it goes; inside words it parts them: 7-up -> 7 up
        at_an_edge = mark + " " in before or " " + mark in before
        text = text.replace(mark, "" if at_an_edge else " ")
    # quirks: the look-behind that was to keep "3." does not, and 32 was meant as a flag
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [NUMBERS.get(word, word) for word in text.split()]
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def vqa_accuracy(prediction, answers):
    """Full marks if 3 of 9 people gave this answer; the mean over leaving each of the 10 out.

    Meant for about 10 answers: with 3 or fewer no reply can reach 1 (use `exact` for those).
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
            replaced = before[j - 1] + (x != y)
            after.append(min(before[j] + 1, after[-1] + 1, replaced))
        before = after
    return before[-1]


def anls(prediction, answers):
    """1 - edit distance / length, for the nearest answer; below 0.5 it is 0 (DocVQA, InfoVQA).

    >>> anls("Helo", ["Hello"]), anls("ab", ["abcd"]), anls("a", ["abcd"])    # 0.5 itself is kept
    (0.8, 0.5, 0.0)
    """
    nearest = 1.0
    for answer in answers:
        want, got = (" ".join(text.lower().split()) for text in (answer, prediction))
        distance = levenshtein(want, got)
        length = max(len(answer), len(prediction))  # quirk: of the raw texts, spaces and all
        nearest = min(nearest, distance / length if length else 0.0)
    return 1 - nearest if 1 - nearest >= 0.5 else 0.0


def to_float(text):
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction, answer):
    """Numbers may be 5 % off; other answers must be equal but for case (ChartQA).

    >>> relaxed_accuracy("10.4", "10"), relaxed_accuracy("10.6", "10")
    (1.0, 0.0)
    >>> relaxed_accuracy("10%", "0.1"), relaxed_accuracy("YES", "Yes")
    (1.0, 1.0)
    """
    got, want = to_float(prediction), to_float(answer)
    if got is not None and want:  # quirk: a 0 that is wanted falls through, so "0.0" is wrong
        return float(abs(got - want) / abs(want) <= 0.05)
    return float(prediction.lower() == answer.lower())  # quirk: no stripping


def ocrbench(prediction, answers, dataset):
    """1 if an answer occurs in the reply. Formulas (HME100k) are compared without any spaces.

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
    r"^([A-D])",  # quirk: any word will do, so Cotton -> C, Blue -> B, "Answer: D" -> A
    r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
    r"\(([A-D])\)",
    r"([A-D])\s*[.)\]]",
    r"(?:^|\s)([A-D])(?:\s|$)",
)


def choice_letter(prediction):
    """The option A-D that a reply means (V*): the first of these patterns that occurs.

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
    """The option that a reply means (HR-Bench).

    It is the one letter among the words, else the one option whose text is in the reply, else None;
    "Z" is a refusal, which is never right.

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
    """
    >>> mean([1, 2]), mean([])
    (1.5, 0.0)
    """
    values = list(values)
    return sum(values) / len(values) if values else 0.0


# ------------------------------------------------------------------------- many replies, one figure

def pope_official(rows):
    """POPE: F1, precision and recall of "yes". The published numbers pool all three files.

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
    """HR-Bench: FSP (single objects), FCP (several) and both, each a mean over rotations."""
    single = [row for row in rows if row.get("kind") == "single"]
    cross = [row for row in rows if row.get("kind") == "cross"]
    parts = {"average": rows, "FSP": single, "FCP": cross}
    return {name: 100 * over_cycles(part) for name, part in parts.items()}


OCRBENCH_GROUPS = {  # what the kinds are added up to: 300, 200, 200, 200 and 100 questions
    "Text Recognition": ("Regular Text Recognition", "Irregular Text Recognition",
                         "Artistic Text Recognition", "Handwriting Recognition",
                         "Digit String Recognition", "Non-Semantic Text Recognition"),
    "Scene Text-centric VQA": ("Scene Text-centric VQA",),
    "Doc-oriented VQA": ("Doc-oriented VQA",),
    "Key Information Extraction": ("Key Information Extraction",),
    "Handwritten Mathematical": ("Handwritten Mathematical Expression Recognition",),
}


def ocrbench_official(rows):
    """Points: the questions answered right, of the whole benchmark's 1,000."""
    points = {"points": sum(row["score"] for row in rows)}
    for group, kinds in OCRBENCH_GROUPS.items():
        points[group] = sum(row["score"] for row in rows if row.get("kind") in kinds)
    return points


def mean_official(rows):
    return {"mean": 100 * mean(row["score"] for row in rows)}


def kinds_official(rows):
    """The mean, and that of each kind."""
    kinds = sorted({row["kind"] for row in rows if row.get("kind")})
    return mean_official(rows) | {
        kind: 100 * mean(row["score"] for row in rows if row.get("kind") == kind) for kind in kinds}


# -------------------------------------------------------------------------------------- the metrics

def relaxed_score(prediction, answers):
    return max(relaxed_accuracy(prediction, answer) for answer in answers)


def letter_score(prediction, answers):
    return float(choice_letter(prediction) == answers[0].strip().upper())


def hr_score(prediction, answers, options):
    return float(hr_letter(prediction, options or {}) == answers[0].strip().upper())


@dataclass(frozen=True)
class Metric:
    score: Callable                      # (prediction, answers) -> [0, 1]
    field: str | None = None             # of the question, if score() needs it as a third argument
    official: Callable = mean_official   # rows -> what its authors report, the main figure first
    pooled: bool = False                 # that one is no mean of scores, and stands in its place


METRICS = {
    "exact": Metric(exact),
    "vqa": Metric(vqa_accuracy),
    "anls": Metric(anls),
    "relaxed": Metric(relaxed_score, official=kinds_official),
    "ocrbench": Metric(ocrbench, field="dataset", official=ocrbench_official),
    "letter": Metric(letter_score, official=kinds_official),
    "hr": Metric(hr_score, field="options", official=hr_official, pooled=True),
    # quirk: POPE wants the bare word, "Yes." is wrong
    "pope": Metric(exact, official=pope_official, pooled=True),
}


def score(question, prediction):
    """The score of one reply to one question of a question file, which has answers.

    >>> score({"metric": "letter", "answers": ["B"]}, "(B)"), score({"answers": ["Red"]}, "red ")
    (1.0, 1.0)
    """
    rule = METRICS[question.get("metric", "exact")]
    extra = [question.get(rule.field)] if rule.field else []
    return rule.score(prediction, question["answers"], *extra)


# ---------------------------------------------------------------------------------- the paper's own

PAPER_MODELS = {  # (model_type, decoder layers, hidden width) of config.json: the paper's name
    ("llava", 32, 4096): "LLaVA-1.5-7B",
    ("llava", 40, 5120): "LLaVA-1.5-13B",
    ("multi_modality", 24, 2048): "DeepSeek-VL-1.3B",
    ("multi_modality", 30, 4096): "DeepSeek-VL-7B",
    ("qwen2_5_vl", 36, 2048): "Qwen2.5-VL-3B",
    ("qwen2_5_vl", 28, 3584): "Qwen2.5-VL-7B",
}
# {model: {benchmark: {figure: (plain, SD-RPN)}}}; None: the paper does not say. OCRBench's points
# are ten times the percent that it prints.
PAPER = {
    "LLaVA-1.5-7B": {
        "docvqa": {"mean": (21.5, 33.9)}, "chartqa": {"mean": (18.1, 20.1)},
        "ocrbench": {"points": (314, 370)}, "infovqa": {"mean": (20.4, 22.0)},
        "textvqa": {"mean": (46.1, 58.7)},
        "vstar": {"mean": (50.3, 67.5), "direct_attributes": (None, 67.8),
                  "relative_position": (None, 67.1)},
        "pope": {"F1": (85.9, 87.1), "accuracy": (None, 87.8)},
        "hrbench4k": {"average": (37.5, 48.0), "FSP": (None, 60.3), "FCP": (None, 35.8)},
        "hrbench8k": {"average": (33.8, 39.1), "FSP": (None, 46.5), "FCP": (None, 31.8)},
    },
    "LLaVA-1.5-13B": {
        "docvqa": {"mean": (23.5, 39.7)}, "chartqa": {"mean": (18.1, 21.4)},
        "ocrbench": {"points": (337, 388)}, "infovqa": {"mean": (23.4, 24.7)},
        "textvqa": {"mean": (48.7, 62.3)}, "vstar": {"mean": (50.8, 62.3)},
        "pope": {"F1": (85.9, 87.3)}, "hrbench4k": {"average": (43.0, 52.8)},
        "hrbench8k": {"average": (36.6, 43.6)},
    },
    "DeepSeek-VL-1.3B": {"vstar": {"mean": (42.9, 55.0)}},
    "DeepSeek-VL-7B": {"vstar": {"mean": (42.4, 52.4)}},
    "Qwen2.5-VL-3B": {"vstar": {"mean": (73.3, 81.2)}},
    "Qwen2.5-VL-7B": {
        "vstar": {"mean": (78.0, 89.5)}, "hrbench4k": {"average": (72.5, 78.5)},
        "hrbench8k": {"average": (63.6, 73.5)},
    },
}


def paper_model(config):
    """The paper's name of the model with this config (a dict of sizes), or None.

    >>> paper_model({"model_type": "llava", "num_hidden_layers": 32, "hidden_size": 4096})
    'LLaVA-1.5-7B'
    """
    keys = ("model_type", "num_hidden_layers", "hidden_size")
    return PAPER_MODELS.get(tuple(config.get(key) for key in keys))


# ---------------------------------------------------------------------------------- tables in print

def compare(questions, methods, say=print):
    """Ask every (picture, question) by every method -> a table by kind, in percent.

    methods: {name: f(picture, question) -> answer}; a question is a dict of a question file.
    """
    scores, seconds = {m: {} for m in methods}, dict.fromkeys(methods, 0.0)
    for n, (picture, q) in enumerate(questions, 1):
        for m, ask in methods.items():
            began = time.perf_counter()
            reply = ask(picture, q)
            seconds[m] += time.perf_counter() - began
            scores[m].setdefault(q["kind"], []).append(score(q, reply))
        if n % 50 == 0:
            say(f"question {n}/{len(questions)}")
    kinds = list(next(iter(scores.values())))
    head = "".join(f"{printable(kind):>9}" for kind in kinds)
    lines = [f"{'':15}{head}{'all':>9}{'s/question':>12}"]
    for m, by_kind in scores.items():
        everything = [s for values in by_kind.values() for s in values]
        cells = "".join(f"{100 * mean(values):9.1f}" for values in [*by_kind.values(), everything])
        lines.append(f"{m:15}{cells}{seconds[m] / len(questions):12.3f}")
    return "\n".join(lines)


def raster(boxes, size, side=256):
    """Which cells of side x side over a picture of `size` (w, h) the boxes (pixels) cover, bool."""
    canvas = np.zeros((side, side), bool)
    for x0, y0, x1, y1 in boxes:
        x0, x1 = (min(max(round(side * x / size[0]), 0), side) for x in (x0, x1))
        y0, y1 = (min(max(round(side * y / size[1]), 0), side) for y in (y0, y1))
        canvas[y0:max(y1, y0 + 1), x0:max(x1, x0 + 1)] = True
    return canvas


def overlap(crops, boxes, size):
    """Do the crops cover half of every true box, and the IoU of crops and boxes (source pixels).

    >>> overlap([(0, 0, 50, 100)], [(0, 0, 100, 100)], (100, 100))
    (True, 0.5)
    """
    seen, wanted = raster(crops, size), raster(boxes, size)
    covered = []
    for box in boxes:
        cells = raster([box], size)  # none, if the box lies outside
        covered.append(bool(cells.any() and (cells & seen).sum() >= 0.5 * cells.sum()))
    return all(covered), float((seen & wanted).sum() / max((seen | wanted).sum(), 1))


def measures_of(rows, two_stage):
    """[(heading, width, text)] of the table's line for these rows."""
    plain = [row["plain"] for row in rows]
    found = [("plain", 8, f"{100 * mean(p['score'] for p in plain):.1f}")]
    if not two_stage:
        return [*found, ("s", 9, f"{mean(p['seconds'] for p in plain):.3f}")]
    two = [row["two_stage"] for row in rows]
    change = [t["score"] - p["score"] for p, t in zip(plain, two)]
    found += [
        ("two-st.", 8, f"{100 * mean(t['score'] for t in two):.1f}"),
        ("change", 8, f"{100 * mean(change):+.1f}"),
        ("lost", 6, f"{sum(c < 0 for c in change)}"),
        ("won", 6, f"{sum(c > 0 for c in change)}"),
        ("RoI %", 7, f"{100 * mean(bool(t['boxes']) for t in two):.0f}"),
        ("s plain", 9, f"{mean(p['seconds'] for p in plain):.3f}"),
        ("s two", 8, f"{mean(t['seconds'] for t in two):.3f}"),
        ("tokens", 8, f"{mean(t['visual_tokens'] for t in two):.0f}")]
    located = [t for t in two if "iou" in t]
    if located:
        found.append(("recall", 8, f"{100 * mean(t['covers'] for t in located):.1f}"))
        found.append(("IoU", 7, f"{mean(t['iou'] for t in located):.2f}"))
    return found


def official_lines(official, count, benchmark, model):
    """Lines of text: official figures of `count` questions, and the paper's if it has this model.

    official: {"plain": {figure: value}, "two_stage"?: ...}; model: a name in PAPER, or None.
    """
    paper = PAPER.get(model, {}).get(benchmark, {})
    title = f"official, {count} questions"
    head = "".join(f"{name:>8}" for name in ("plain", "two-st.")[:len(official)])
    lines = [f"{title:28}{head}" + (f"   the paper's, {model}" if paper else "")]
    for name in official["plain"]:
        cells = "".join(f"{figures[name]:8.1f}" for figures in official.values())
        line = f"{printable(name)[:27]:28}{cells}"
        if name in paper:
            before, after = ("-" if value is None else value for value in paper[name])
            line += f"   {before} -> {after}"
        lines.append(line)
    return lines


def shared(questions, key, default=None):
    """What all questions say, or None if they differ."""
    values = {q.get(key, default) for q in questions}
    return values.pop() if len(values) == 1 else None


def side_by_side(rows, questions, say=print, config=None):
    """Say the table per kind, and a benchmark's official figures; return the summary, in percent.

    rows: {"kind", "plain": {...}, "two_stage"?: {...}}, one for each question; config: the model's
    sizes, by which the paper's figures are found.
    """
    names = [name for name in ("plain", "two_stage") if name in rows[0]]
    metric, benchmark = shared(questions, "metric", "exact"), shared(questions, "benchmark")
    by_name = {name: [row | row[name] | {"prediction": row[name]["answer"]} for row in rows]
               for name in names}
    parts = {}
    for row in rows:
        parts.setdefault(row["kind"], []).append(row)
    if len(parts) > 1:
        parts.pop("all", None)  # the questions without a kind have no line of their own
        parts["all"] = rows
    head = measures_of(rows, len(names) > 1)
    say(f"{'kind':24}{'n':>6}" + "".join(f"{name:>{width}}" for name, width, _ in head))
    for kind, part in parts.items():
        cells = "".join(f"{text:>{width}}" for _, width, text in measures_of(part, len(names) > 1))
        say(f"{printable(kind)[:24]:24}{len(part):6}{cells}")
    if len(names) > 1:
        say("lost: plain right, two-stage wrong; won: the reverse")
    if any(name == "recall" for name, _, _ in head):
        say("recall: the crops cover half of every true box")
    result = {name: round(100 * mean(row["score"] for row in part), 2)
              for name, part in by_name.items()}
    result |= {"questions": len(rows), "metric": metric}
    rule = METRICS.get(metric)
    if rule is None:  # the questions are of several metrics
        return result
    official = {name: rule.official(part) for name, part in by_name.items()}
    if benchmark or rule.official is not mean_official:
        for line in official_lines(official, len(rows), benchmark, paper_model(config or {})):
            say(line)
    if rule.pooled:
        result["official"] = {name: {figure: round(value, 2) for figure, value in figures.items()}
                              for name, figures in official.items()}
        result |= {name: next(iter(of.values())) for name, of in result["official"].items()}
    return result

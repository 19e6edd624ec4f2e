"""Scores of answers, by the rules of lmms-eval, so that numbers can be laid beside published ones.

    from data import metrics
    metrics.score({"metric": "relaxed", "answers": ["10"]}, "10.4")      # -> 1.0
    python -m doctest data/metrics.py                                    # every example below; silence is good

Every function compares strings; a score lies in [0, 1], a letter function gives a letter or None.
The harness has oddities ("Cotton" counts as option C). They move the published numbers, so they are
kept, each marked `quirk` beside its line. Left out: asking GPT which option a reply means (HR-Bench
does; here such a reply is wrong) and the official scripts where they differ from lmms-eval.
"""

import re
import time

import numpy as np

# The normaliser of TextVQA restores missing apostrophes: dont -> don't. First, words with one apostrophe ...
CONTRACTIONS = {word.replace("'", ""): word for word in """ain't aren't can't could've couldn't didn't doesn't don't
    hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't
    not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd
    something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
    wouldn't y'all you'd you'll you're you've""".split()}
for word in """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
        something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
        'ow's'at""".split():
    for i, letter in enumerate(word):   # ... then those with several, of which exactly one may be missing
        if letter == "'":
            CONTRACTIONS[word[:i] + word[i + 1:]] = word
CONTRACTIONS["somebody'd"] = "somebodyd"   # quirk: the table has this pair the wrong way round
NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"

# HR-Bench: a reply holding one of these is a refusal.
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")


def exact(prediction, answers):
    """1 if the reply is one of the answers, but for case and outer spaces. The default metric.

    >>> exact(" Red\\n", ["red", "dark red"]), exact("reddish", ["red"])
    (1.0, 0.0)
    """
    return float(prediction.strip().lower() in [answer.strip().lower() for answer in answers])


def normalise(text):
    """TextVQA's idea of the same answer: case, articles, number words and most punctuation do not count.

    >>> [normalise(t) for t in ("The Coca-Cola", "12,345", "U.S.A.", "3.5", "none", "dont", "Jack Daniel's")]
    ['coca cola', '12345', 'usa', '3.5', '0', "don't", "jack daniel 's"]
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    before = text = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in PUNCTUATION:   # at a word's edge it goes; inside words it parts them: 7-up -> 7 up
        text = text.replace(mark, "" if mark + " " in before or " " + mark in before else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)   # quirks: a look-behind meant to keep "3." fails; 32 was a flag
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(prediction, answers):
    """Full marks if 3 of 9 people gave this answer, averaged over the 10 ways to leave one of 10 people out.

    Meant for about 10 answers: with 3 or fewer no reply can reach 1 (use `exact` for those).
    >>> round(vqa_accuracy("The NASA!", ["nasa"] * 3 + ["esa"] * 7), 6)    # (3 * 2/3 + 7 * 1) / 10
    0.9
    """
    prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    hits = answers.count(prediction)
    return sum(min(1, (hits - (answer == prediction)) / 3) for answer in answers) / max(1, len(answers))


def levenshtein(a, b):
    """Fewest insertions, deletions and replacements that turn a into b.

    >>> levenshtein("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))   # distances from a[:i] to every prefix of b
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(prediction, answers):
    """1 - edit distance / length, for the nearest answer; below 0.5 it counts as 0 (DocVQA, InfoVQA).

    >>> anls("Helo", ["Hello"]), anls("ab", ["abcd"]), anls("a", ["abcd"])    # 0.5 itself is kept
    (0.8, 0.5, 0.0)
    """
    prediction, nearest = prediction.strip(), 1.0
    for answer in answers:
        distance = levenshtein(*(" ".join(text.lower().split()) for text in (answer, prediction)))
        length = max(len(answer), len(prediction))   # quirk: of the raw texts, spaces and all
        nearest = min(nearest, distance / length if length else 0.0)
    return 1 - nearest if 1 - nearest >= 0.5 else 0.0


def to_float(text):
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction, answer):
    """Numbers may be 5 % off; other answers must be equal but for case (ChartQA).

    >>> [relaxed_accuracy(*pair) for pair in (("10.4", "10"), ("10.6", "10"), ("10%", "0.1"), ("YES", "Yes"))]
    [1.0, 0.0, 1.0, 1.0]
    >>> relaxed_accuracy("1,000", "1000"), relaxed_accuracy("Yes.", "Yes"), relaxed_accuracy("2014", "2000")
    (0.0, 0.0, 1.0)
    """
    got, want = to_float(prediction), to_float(answer)
    if got is not None and want:   # quirk: a 0 that is wanted falls through, so "0.0" is wrong
        return float(abs(got - want) / abs(want) <= 0.05)
    return float(prediction.lower() == answer.lower())   # quirk: no stripping


def ocrbench(prediction, answers, dataset):
    """1 if an answer occurs in the reply. Formulas (HME100k) are compared without any spaces.

    >>> ocrbench("It says 'Centre'.", ["CENTRE"], "IIIT5K"), ocrbench("x ^ 2", ["x^{2}", "x^2"], "HME100k")
    (1.0, 1.0)
    """
    prediction = prediction.lower().strip().replace("\n", " ")
    if dataset == "HME100k":   # quirk: only the reply is lower-cased, so an answer with a capital never matches
        prediction = prediction.replace(" ", "")
        return float(any(re.sub("[\n ]", "", answer.strip()) in prediction for answer in answers))
    return float(any(answer.lower().strip().replace("\n", " ") in prediction for answer in answers))


def choice_letter(prediction):
    """The option A-D that a reply means (V*): the first of these patterns that occurs.

    >>> [choice_letter(t) for t in ("(b) red", "The answer is D.", "It is C", "Sorry", "")]
    ['B', 'D', 'C', None, None]
    """
    text = prediction.strip().upper()
    for pattern in (r"^([A-D])",   # quirk: any word will do, so Cotton -> C, Blue -> B, "Answer: D" -> A
                    r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])", r"\(([A-D])\)", r"([A-D])\s*[.)\]]",
                    r"(?:^|\s)([A-D])(?:\s|$)"):
        if found := re.search(pattern, text):
            return found[1]
    letters = re.findall("[A-D]", text)
    return letters[0] if len(letters) == 1 else None   # quirk: kevlar -> A, its only letter of the four


def hr_letter(prediction, options):
    """The option that a reply means (HR-Bench): the one letter among its words, else the one option text in it.
    "Z" is a refusal: never right, like None.

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
    inside = [letter for letter, text in options.items() if str(text).lower() in prediction.lower()]
    return inside[0] if len(inside) == 1 else None


def score(question, prediction):
    """The score of one reply to one question of a question file.

    >>> score({"metric": "letter", "answers": ["B"]}, "(B)"), score({"answers": ["Red"]}, "red ")
    (1.0, 1.0)
    """
    metric, answers = question.get("metric", "exact"), question.get("answers")
    answers = [answers] if isinstance(answers, str) else answers
    if not answers:
        raise ValueError("a question without answers can not be scored")
    if metric in ("exact", "pope"):   # quirk: POPE wants the bare word, "Yes." is wrong
        return exact(prediction, answers)
    if metric == "vqa":
        return vqa_accuracy(prediction, answers)
    if metric == "anls":
        return anls(prediction, answers)
    if metric == "relaxed":
        return max(relaxed_accuracy(prediction, answer) for answer in answers)
    if metric == "ocrbench":
        return ocrbench(prediction, answers, question.get("dataset"))
    if metric in ("letter", "hr"):
        letter = choice_letter(prediction) if metric == "letter" else hr_letter(prediction, question.get("options", {}))
        return float(letter == answers[0].strip().upper())
    raise ValueError(f"unknown metric {metric!r}; known: exact vqa anls relaxed ocrbench letter hr pope")


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def pope_f1(pairs):
    """F1 of "yes" over (reply, answer) pairs. The published POPE numbers pool all three files.

    >>> pope_f1([("Yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"), ("maybe", "yes")])
    0.5
    """
    pairs = [(reply.strip().lower(), answer.strip().lower()) for reply, answer in pairs]
    right, false_yes, false_no = (pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes")))
    return 2 * right / max(1, 2 * right + false_yes + false_no)   # quirk: "maybe" is neither yes nor no: no miss


def hr_summary(rows):
    """HR-Bench: FSP (single objects), FCP (several) and both; each the mean over rotations of the options
    (`cycle`) of the accuracy within one, which is the plain mean when the rotations are complete.

    >>> hr_summary([{"kind": "single", "cycle": c, "score": s} for c, s in ((0, 1), (0, 1), (0, 1), (1, 0))])
    {'FSP': 0.5, 'FCP': 0.0, 'average': 0.5}
    """
    def over_cycles(rows):
        return mean(mean(r["score"] for r in rows if r.get("cycle") == c) for c in {r.get("cycle") for r in rows})
    return {"FSP": over_cycles([r for r in rows if r.get("kind") == "single"]),
            "FCP": over_cycles([r for r in rows if r.get("kind") == "cross"]), "average": over_cycles(rows)}


def summarise(metric, rows):
    """One table from rows {"score", "kind"?, "answers", "prediction", "cycle"?}. "score" is what papers print:
    F1 for POPE (its accuracy stands beside it), the mean over rotations for HR-Bench, else the mean.

    >>> summarise("letter", [{"score": 1.0, "kind": "spatial"}, {"score": 0.0, "kind": "attributes"}])
    {'score': 0.5, 'questions': 2, 'kinds': {'attributes': 0.0, 'spatial': 1.0}}
    """
    table = {"score": mean(row["score"] for row in rows), "questions": len(rows)}
    if metric == "pope":
        table |= {"accuracy": table["score"], "score": pope_f1((row["prediction"], row["answers"][0]) for row in rows)}
    if metric == "hr":
        table |= hr_summary(rows)
        table["score"] = table["average"]
    kinds = sorted({row["kind"] for row in rows if row.get("kind")})
    if len(kinds) > 1:
        table["kinds"] = {kind: mean(row["score"] for row in rows if row.get("kind") == kind) for kind in kinds}
    return table


def compare(questions, methods, say=print):
    """Ask every (image, question dict) by every method {name: f(image, question) -> answer} -> a table in percent, by kind."""
    scores, seconds = {m: {} for m in methods}, dict.fromkeys(methods, 0.0)
    for n in range(len(questions)):
        image, q = questions[n]
        for m, ask in methods.items():
            began = time.perf_counter()
            reply = ask(image, q)
            seconds[m] += time.perf_counter() - began
            scores[m].setdefault(q["kind"], []).append(score(q, reply))
        if (n + 1) % 50 == 0:
            say(f"question {n + 1}/{len(questions)}")
    kinds = list(next(iter(scores.values())))
    lines = [f"{'':15}" + "".join(f"{k:>9}" for k in kinds) + f"{'all':>9}{'s/question':>12}"]
    for m, by_kind in scores.items():
        columns = [*by_kind.values(), [s for values in by_kind.values() for s in values]]
        lines.append(f"{m:15}" + "".join(f"{100 * mean(c):9.1f}" for c in columns) + f"{seconds[m] / len(questions):12.3f}")
    return "\n".join(lines)


def overlap(crops, boxes, size):
    """Do the crops cover at least half of every true box (source pixels), and IoU of crops and boxes, on a 256 x 256 raster."""
    def raster(rectangles):
        canvas = np.zeros((256, 256), bool)
        for x0, y0, x1, y1 in rectangles:
            x0, x1, y0, y1 = (round(256 * v / s) for v, s in ((x0, size[0]), (x1, size[0]), (y0, size[1]), (y1, size[1])))
            canvas[y0:max(y1, y0 + 1), x0:max(x1, x0 + 1)] = True
        return canvas
    seen, wanted = raster(crops), raster(boxes)
    covered = all((raster([b]) & seen).sum() >= 0.5 * raster([b]).sum() for b in boxes)
    return bool(covered), float((seen & wanted).sum() / max((seen | wanted).sum(), 1))


def side_by_side(rows, questions, say=print):
    """Say the table per kind of rows {"kind", "plain": {...}, "two_stage"?: {...}}; return the summary, scores in percent."""
    names = [n for n in ("plain", "two_stage") if n in rows[0]]
    metric = questions[0].get("metric", "exact")
    whole = {n: summarise(metric, [r | r[n] | {"prediction": r[n]["answer"]} for r in rows]) for n in names}
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    say(f"{'kind':24}{'n':>6}{'plain':>8}" + (f"{'two-st.':>8}{'change':>8}{'lost':>6}{'won':>6}{'RoI %':>7}{'s plain':>9}{'s two':>8}"
        f"{'tokens':>8}{'recall':>8}{'IoU':>7}" if len(names) > 1 else f"{'s':>9}"))
    for kind in [*kinds, "all"] if len(kinds) > 1 else kinds:
        part = [r for r in rows if kind in (r["kind"], "all")]
        plain = [r["plain"] for r in part]
        line = f"{kind[:24]:24}{len(part):6}{100 * mean([p['score'] for p in plain]):8.1f}"
        if len(names) > 1:
            two = [r["two_stage"] for r in part]
            lost = sum(p["score"] > t["score"] for p, t in zip(plain, two))
            won = sum(p["score"] < t["score"] for p, t in zip(plain, two))
            line += (f"{100 * mean([t['score'] for t in two]):8.1f}{100 * mean([t['score'] - p['score'] for p, t in zip(plain, two)]):+8.1f}"
                     f"{lost:6}{won:6}{100 * mean([bool(t['boxes']) for t in two]):7.0f}{mean([p['seconds'] for p in plain]):9.3f}"
                     f"{mean([t['seconds'] for t in two]):8.3f}{mean([t['visual_tokens'] for t in two]):8.0f}")
            located = [t for t in two if "iou" in t]
            line += f"{100 * mean([t['covers'] for t in located]):8.1f}{mean([t['iou'] for t in located]):7.2f}" if located else ""
        else:
            line += f"{mean([p['seconds'] for p in plain]):9.3f}"
        say(line)
    if len(names) > 1:
        say("lost: plain right, two-stage wrong; won: the reverse; recall: the crops cover half of every true box")
    result = {n: round(100 * whole[n]["score"], 2) for n in names} | {"questions": len(rows), "metric": metric}
    return result | {"details": whole} if metric in ("pope", "hr") else result

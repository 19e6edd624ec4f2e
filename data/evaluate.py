"""Answers a file of questions, plain and two-stage side by side, and scores it: infer.py --eval.

    summary = evaluate(m, rpn, recipe, "data/textvqa_val.jsonl", mode="mask", tau=0.1)

Answers are kept in out/eval/, in one file for each mode and setting, whose first line says the
settings. The next run asks only what is new: a question that was added or changed, a picture that
was repaired. The plain answers serve every two-stage run of the same model.
Both modes share a picture's prefix, and so do all questions about it that stand together.
Left out: batches of questions.
"""
import hashlib
import json
import math
import time
from contextlib import suppress
from pathlib import Path

import torch

from clip import BadInput, load_image
from data import metrics
from data.files import write_text
from data.program import gather, log, processes
from data.questions import read_questions
from data.run import attempt, read_ahead
from model import ROOT, note
from sdrpn import answer


def evaluate(m, rpn, recipe, path, images=None, mode="mask", tau=None, limit=None,
             max_new_tokens=None, fresh=False, out=None, max_bad=1.0):
    """Answer a file of questions -> the summary, in percent; under torchrun on rank 0, else None.

    rpn, recipe: None in plain mode. tau and max_new_tokens win over a question's own. limit: only
    the first questions. fresh: answer again. out: a file for answers and boxes. BadInput if more
    than max_bad percent of the questions can not be answered.
    """
    if out and Path(out).resolve() == Path(path).resolve():
        raise BadInput(f"--out {out}: is the question file itself; name another file")
    questions, root = read_questions(path, images)
    questions = questions[:limit]
    for q in questions:
        image = root / q["image"]
        q["max_new_tokens"] = max_new_tokens or q.get("max_new_tokens", 128)
        q["key"] = digest([q | {"line": None}, image.exists() and image.stat().st_mtime_ns])
        if rpn:
            q["tau"] = tau or q.get("tau") or recipe.taus.get(q.get("benchmark"), rpn.tau)
    settings = {"questions": Path(path).stem, "folder": m.folder.name, "mode": "plain",
                "model": m.fingerprint, "dtype": str(m.dtype), "budget": m.budget}
    kept = {"plain": Answers(settings, fresh)}
    if rpn:
        settings |= {"mode": mode, "rpn": sum(p.double().sum().item() for p in rpn.parameters()),
                     "tau": tau or recipe.taus | {"default": rpn.tau}}
        kept["two_stage"] = Answers(settings, fresh)

    rank, world = processes()
    share = math.ceil(len(questions) / world)
    ask_all(m, rpn, questions[rank * share:][:share], root, kept, max_bad)
    gather(None)
    if rank > 0:
        return None
    rows = []
    for answers in kept.values():
        answers.read()  # those of the other processes
    for q in questions:
        found = {name: answers.get(q["key"]) for name, answers in kept.items()}
        if all(found.values()):
            for row in found.values():
                row["score"] = metrics.score(q, row["answer"])
            rows.append({"kind": "all"} | q | found)
    if out:
        write_text(Path(out), "".join(result_line(row, kept) for row in rows))
    return metrics.side_by_side(rows, log, m.config) if rows else {"questions": 0}


def digest(facts):
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def result_line(row, modes):
    """One line of `out`."""
    line = {field: row.get(field) for field in ("image", "id", "question", "tau")}
    for name in modes:
        line |= {name: row[name]["answer"], "boxes": row[name]["boxes"]}
    line["ms"] = {name: round(1000 * row[name]["seconds"], 1) for name in modes}
    line["scores"] = {name: row[name]["score"] for name in modes}
    return json.dumps(line) + "\n"


class Answers(dict):
    """The answers of one mode and setting by key, and the file that keeps them."""

    def __init__(self, settings, fresh):
        self.mode = settings["mode"]
        name = f"{settings['questions']}-{settings['folder']}-{self.mode}-{digest(settings)}.jsonl"
        self.path = ROOT / "out" / "eval" / name
        if processes()[0] == 0 and (fresh or not self.path.exists()):
            write_text(self.path, json.dumps(settings))
        gather(None)
        self.read()

    def read(self):
        for line in self.path.read_text().split("\n")[1:]:
            with suppress(ValueError, TypeError):  # a line that a crash cut off
                self.update(json.loads(line))

    def add(self, key, row):
        self[key] = row
        with open(self.path, "ab", buffering=0) as f:  # one write: processes share the file
            f.write(b"\n" + json.dumps({key: row}).encode())


def ask_all(m, rpn, questions, root, kept, max_bad):
    """Ask every question that lacks an answer. BadInput if too many can not be answered."""
    def load(q):
        picture = load_image(root / q["image"])
        return picture, m.pixels(picture)[None]

    new = [q for q in questions if any(q["key"] not in answers for answers in kept.values())]
    log(f"{len(new)} of {len(questions)} questions are new; "
        f"answers are kept in {kept['plain'].path.parent}; after a change of the code use --fresh")
    began, bad, image = now(m), 0, None
    loading = read_ahead(lambda q: attempt(load, q), ([q] for q in new))
    for n, (q, (loaded,)) in enumerate(zip(new, loading), 1):
        if q["image"] != image:
            image, seen = q["image"], None  # None gives the memory of the last one back
            seen = loaded if isinstance(loaded, BadInput) else attempt(look, m, rpn, *loaded)
        problem = seen if isinstance(seen, BadInput) else attempt(ask, m, rpn, q, kept, *seen)
        if problem:
            bad += 1
            note(f"line {q['line']} is skipped: {problem}")
            if bad > max_bad / 100 * len(questions):
                raise BadInput(f"{bad} of {len(questions)} questions can not be answered, more "
                               f"than --max-bad {max_bad} %; line {q['line']}: {problem}")
        if n % max(1, len(new) // 50) == 0 or n == len(new):
            each = (now(m) - began) / n
            log(f"question {n}/{len(new)} | {each:.3f} s each, sharing prefixes | "
                f"ETA {each * (len(new) - n):.0f} s")


def look(m, rpn, picture, pixels):
    """-> the picture, its prefix, and the seconds that this took."""
    start = now(m)
    prefix = m.prefill(pixels, keep=[rpn.frozen] if rpn else [])
    return picture, prefix, now(m) - start


def ask(m, rpn, q, kept, picture, prefix, seconds):
    """Ask all turns of a question, each after the model's own answers, and keep the last answer.

    seconds: what the prefix took; it is added as if nothing else had used it.
    """
    for answers in kept.values():
        if q["key"] in answers:
            continue
        history, start = [], now(m)
        for turn in q["question"]:
            result = answer(m, rpn, picture, turn, answers.mode, q.get("tau"), q["max_new_tokens"],
                            history, prefix=prefix)
            history.append((turn, result.text))
        row = {"answer": result.text, "boxes": result.boxes, "seconds": seconds + now(m) - start}
        crops = sum(len(crop.tokens) for crop in result.crops)
        row["visual_tokens"] = math.prod(prefix.grid) + crops
        if q.get("boxes") and answers.mode != "plain":
            row["covers"], row["iou"] = metrics.overlap(result.boxes, q["boxes"], picture.size)
        answers.add(q["key"], row)


def now(m):
    """Seconds of a clock, once the device has done all that was asked of it."""
    if m.device.type == "cuda":
        torch.cuda.synchronize(m.device)
    return time.perf_counter()

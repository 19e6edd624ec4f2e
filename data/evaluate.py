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
import torch.distributed as dist

from clip import BadInput, load_image
from data import metrics
from data.files import write_text
from data.program import log
from data.questions import read_questions
from data.run import read_ahead
from model import ROOT, note
from sdrpn import answer


def evaluate(m, rpn, recipe, path, images=None, mode="mask", tau=None, limit=None,
             max_new_tokens=None, fresh=False, out=None, max_bad=1.0):
    """Answer a file of questions -> the summary, in percent; under torchrun on rank 0, else None.

    rpn, recipe: None in plain mode. tau and max_new_tokens win over a question's own. limit: only
    the first questions. fresh: answer again. out: a file for answers and boxes. BadInput if more
    than max_bad percent of the questions can not be answered.
    """
    questions, root = read_questions(path, images)
    questions = questions[:limit]
    for q in questions:
        q["max_new_tokens"] = max_new_tokens or q.get("max_new_tokens", 128)
        q["key"] = key_of(q, root / q["image"])
        if mode != "plain":
            q["tau"] = tau or q.get("tau") or recipe.taus.get(q.get("benchmark"), rpn.tau)
    settings = {"questions": Path(path).stem, "folder": m.folder.name, "mode": "plain",
                "model": m.fingerprint, "dtype": str(m.dtype), "budget": m.budget}
    kept = {"plain": Answers(settings, fresh)}
    if mode != "plain":
        weights = [p.double().sum().item() for p in rpn.parameters()]
        taus = tau or recipe.taus | {"default": rpn.tau}
        settings |= {"mode": mode, "rpn": digest(weights), "tau": taus}
        kept["two_stage"] = Answers(settings, fresh)

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = slice(len(questions) * rank // world, len(questions) * (rank + 1) // world)
    ask_all(m, rpn, questions[share], root, kept, max_bad)
    if world > 1:
        dist.barrier()
        for answers in kept.values():
            answers.read()  # those of the other processes
    if rank > 0:
        return None

    rows = []
    for q in questions:
        if all(q["key"] in answers for answers in kept.values()):
            row = {name: answers[q["key"]] for name, answers in kept.items()}
            rows.append({"kind": "all"} | q | row)
            for name in kept:
                rows[-1][name]["score"] = metrics.score(q, rows[-1][name]["answer"])
    if out:
        write_text(Path(out), "".join(result_line(row, list(kept)) for row in rows))
    return metrics.side_by_side(rows, rows, log, m.config) if rows else {"questions": 0}


def key_of(q, picture):
    """Names all that an answer depends on beside the settings: the question and its picture."""
    stat = picture.stat() if picture.exists() else None
    return digest([q | {"line": None}, stat and (stat.st_size, stat.st_mtime_ns)])


def digest(facts):
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def result_line(row, modes):
    """One line of `out`."""
    line = {field: row.get(field) for field in ("image", "id", "question", "tau")}
    line |= {"ms": {}, "scores": {}}
    for name in modes:
        line |= {name: row[name]["answer"], "boxes": row[name]["boxes"]}
        line["ms"][name] = round(1000 * row[name]["seconds"], 1)
        line["scores"][name] = row[name]["score"]
    return json.dumps(line) + "\n"


class Answers(dict):
    """The answers of one mode and setting by key, and the file that keeps them."""

    def __init__(self, settings, fresh):
        self.mode = settings["mode"]
        name = f"{settings['questions']}-{settings['folder']}-{self.mode}-{digest(settings)}.jsonl"
        self.path = ROOT / "out" / "eval" / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fresh and (not dist.is_initialized() or dist.get_rank() == 0):
            self.path.unlink(missing_ok=True)
        if dist.is_initialized():
            dist.barrier()
        with suppress(FileExistsError), open(self.path, "x", encoding="utf-8") as f:
            f.write(json.dumps(settings))
        self.read()

    def read(self):
        text = self.path.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n")[1:]:
            with suppress(ValueError, TypeError):  # a line that a crash cut off
                self.update(json.loads(line))

    def add(self, key, row):
        self[key] = row
        with open(self.path, "ab", buffering=0) as f:  # one write: processes share the file
            f.write(b"\n" + json.dumps({key: row}).encode())


def ask_all(m, rpn, questions, root, kept, max_bad):
    """Ask every question that lacks an answer. BadInput if too many can not be answered."""
    def load(q):
        try:
            return q, load_image(root / q["image"])
        except BadInput as e:
            return q, e

    new = [q for q in questions if not all(q["key"] in answers for answers in kept.values())]
    folder = kept["plain"].path.parent
    log(f"{len(new)} of {len(questions)} questions are new; answers are kept in {folder}")
    began, bad, image = now(m), 0, None
    for n, ((q, picture),) in enumerate(read_ahead(load, ([q] for q in new)), 1):
        try:
            if isinstance(picture, BadInput):
                raise picture
            if q["image"] != image:
                prefix, start = None, now(m)  # None gives the memory of the last one back
                prefix = m.prefill(m.pixels(picture)[None], keep=[rpn.frozen] if rpn else [])
                seconds, image = now(m) - start, q["image"]
            for answers in kept.values():
                if q["key"] not in answers:
                    answers.add(q["key"], ask(m, rpn, picture, q, answers.mode, prefix, seconds))
        except BadInput as e:
            bad += 1
            note(f"line {q['line']} is skipped: {e}")
            if bad > max_bad / 100 * len(questions):
                raise BadInput(f"{bad} of {len(questions)} questions can not be answered, more "
                               f"than --max-bad {max_bad} %; line {q['line']}: {e}") from None
        if n % max(1, len(new) // 50) == 0 or n == len(new):
            each = (now(m) - began) / n
            log(f"question {n}/{len(new)} | {each:.3f} s each, sharing prefixes | "
                f"ETA {each * (len(new) - n):.0f} s")


def ask(m, rpn, picture, q, mode, prefix, seconds):
    """All turns of a question, each after the model's own answers -> what is kept of the last.

    seconds: what the prefix took; it is added as if nothing else had used it.
    """
    history, start = [], now(m)
    for turn in q["question"]:
        result = answer(m, rpn, picture, turn, mode, q.get("tau"), q["max_new_tokens"], history,
                        prefix=prefix)
        history.append((turn, result.text))
    tokens = math.prod(prefix.grid) + sum(len(crop.tokens) for crop in result.crops)
    row = {"answer": result.text, "boxes": result.boxes, "visual_tokens": tokens,
           "seconds": seconds + now(m) - start}
    if q.get("boxes") and mode != "plain":
        row["covers"], row["iou"] = metrics.overlap(result.boxes, q["boxes"], picture.size)
    return row


def now(m):
    """Seconds of a clock, once the device has done all that was asked of it."""
    if m.device.type == "cuda":
        torch.cuda.synchronize(m.device)
    return time.perf_counter()

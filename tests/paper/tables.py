"""The paper's tables and figures, one command each: on the toy by default, on any checkpoint and question file by flag.

    python tests/paper/tables.py table3            # what each part is worth: plain, #1 to #5, and the true box
    python tests/paper/tables.py table4a           # frozen layers B        (table7: RPN layers R)
    python tests/paper/tables.py table4b           # training samples, and labels from the data set's answers
    python tests/paper/tables.py table8            # the Gaussian on the map or on the labels
    python tests/paper/tables.py tau               # the threshold, box and mask
    python tests/paper/tables.py peers             # raw attention, ViCrop rel-att, SD-RPN, true box: score, recall, time
    python tests/paper/tables.py settings          # learning rate, epochs and batch of the recipe
    python tests/paper/tables.py fig3              # is an attended token inside the true box, with and without sinks?
    python tests/paper/tables.py fig5              # score against time: over tau, or over pixels where a model takes any
    python tests/paper/tables.py heads             # which layers and heads to teach from: a recipe for a new backbone
    python tests/paper/tables.py compare A B       # two answer files (infer.py --eval FILE --out A), question by question
    python tests/paper/tables.py peers --ckpt llava-1.5-7b --rpn RELEASED_FOLDER --eval data/vstar.jsonl

Rows that need training run train.py below --out; finished runs are used again. What is printed is also appended to
out/tables/<name>.txt. Figures marked as the paper's are for LLaVA-1.5-7B; the toy's are not meant to equal them.
All rows of a question share the picture's prefix, whose seconds count for each as if it were alone.
Left out: S2 and DeepEyes (other models), F1 for POPE and rotations for HR-Bench (infer.py --eval has them; here the
mean score), questions of several turns.
Shapes: Q questions, L layers, H heads, N = h*w image tokens; boxes in source pixels.
"""
import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import mean

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import ablations  # noqa: E402 (the project is on the path only now)
import heads as finder  # noqa: E402
import peers as rivals  # noqa: E402
import plots  # noqa: E402
from clip import BadInput, load_image  # noqa: E402
from data import draw, metrics  # noqa: E402
from data.checkpoints import NAMES, find_checkpoint, run_name  # noqa: E402
from data.evaluate import tau_of  # noqa: E402
from data.files import read_rows, write_text  # noqa: E402
from data.program import at_least_1, log, run_program  # noqa: E402
from data.questions import read_questions  # noqa: E402
from data.run import read_ahead  # noqa: E402
from data.toy.scenes import KINDS, ToyQuestions  # noqa: E402
from model import DTYPES, ROOT, load, read_config  # noqa: E402
from sdrpn import (RECIPES, RPN, Recipe, answer, load_recipe, prefix_layers, released_recipe, teach,  # noqa: E402
                   teacher_question, training_view)

PAPER = "the paper's: LLaVA-1.5-7B, mean of OCRBench, TextVQA, POPE and V*, plain 53.4"
CELL = 28 * 28  # pixels of an image token where the number of tokens follows the picture
BUDGETS = [(n * CELL, n * CELL) for n in (144, 256, 576, 1024, 2304)]


# ----------------------------------------------------------------------------------------- rows and questions

@dataclass
class Row:
    name: str
    method: str           # "plain", "raw attention", "RPN + MSE", "ViCrop rel-att", "box", "mask" or "true box"
    flags: list = None    # how train.py is called; None: nothing is trained
    paper: str = ""
    tau: float = None     # None: the question's, else the RPN's
    budget: tuple = None  # least and most pixels of a picture; None: the model's
    ablation: ablations.Ablation = ablations.NONE


class FileQuestions:
    """Questions of one turn from a file, at most `most` of each kind; items are (picture, question)."""

    def __init__(self, path, most, scored):
        questions, self.root = read_questions(path)
        by_kind, self.questions = {}, []
        for n, q in enumerate(questions):
            if len(q["question"]) == 1 and (q.get("answers") or not scored):
                own = {"kind": "all", "boxes": []} | q | {"id": f"file/{n}"}
                by_kind.setdefault(own["kind"], []).append(own)
        for of_kind in by_kind.values():
            random.Random(0).shuffle(of_kind)
            self.questions += of_kind[:most]
        if not self.questions:
            raise BadInput(f"{path}: no question of one turn{' with answers' * scored}")

    def __len__(self):
        return len(self.questions)

    def __getitem__(self, n):
        return load_image(self.root / self.questions[n]["image"]), self.questions[n]


def read(args, per_kind=60):
    """{seed: questions}. A file's are the same for every seed."""
    if args.eval:
        scored = args.what not in ("heads", "fig3")
        return dict.fromkeys(args.seeds, FileQuestions(args.eval, args.count or (None if scored else per_kind), scored))
    return {seed: ToyQuestions(f"tables/{seed}", (args.count or per_kind) * len(KINDS)) for seed in args.seeds}


def in_order(questions):
    """All (picture, question) pairs; pictures are read ahead."""
    for (pair,) in read_ahead(questions.__getitem__, ([n] for n in range(len(questions))), ahead=8):
        yield pair


def open_model(args, recipe):
    """The model with --budget, or the recipe's. Loaded after all training: one model in memory at a time."""
    m = load(find_checkpoint(args.ckpt), args.device, args.dtype)
    if args.budget and m.budget is None:
        raise BadInput("--budget: this model shows every picture at one size; leave it out")
    m.budget = args.budget[0] if args.budget else recipe and recipe.budget or m.budget
    return m


# ---------------------------------------------------------------------------------------------- trained RPNs

def trained(args, row, seed):
    """The RPN of train.py for this row, trained now or earlier -> path. --rpn replaces the run without flags."""
    if args.rpn and not row.flags and row.ablation is ablations.NONE:
        return Path(args.rpn)
    out = args.out / run_name(args.ckpt) / folder_name(args, row, seed)
    words = ["--ckpt", args.ckpt, "--seed", seed, "--out", out, *row.flags]
    for flag in ("data", "images", "samples", "max_new_tokens", "device", "dtype"):
        value = getattr(args, flag)
        if value is not None and f"--{flag}" not in words:
            words += [f"--{flag.replace('_', '-')}", value]
    path = out / "rpn.safetensors"
    if path not in args.made:  # for another row of this table
        log(f"--- {out.name}")
        ablations.train(row.ablation, [str(word) for word in words] + ["--fresh"] * args.fresh)
        args.made.add(path)
    return path


def folder_name(args, row, seed):
    """One folder for each seed, data and way of training: seed0-frozen-layers-2"""
    parts = [f"seed{seed}", args.data and args.data.stem, args.samples and str(args.samples)]
    if row.ablation is not ablations.NONE:
        parts.append(row.ablation.name.replace(",", "").replace("'", "").replace(" ", "-"))
    parts += [flag.removeprefix("--") for flag in row.flags]
    return "-".join(part for part in parts if part)


def final_loss(paths):
    """Mean training loss over the last tenth of the steps of these runs, as text; a dash for others."""
    losses = []
    for path in paths:
        log_file = path.parent / "log.jsonl"
        steps = [row["loss"] for row in read_rows(log_file)] if log_file.is_file() else []
        losses += steps[-max(1, len(steps) // 10):]
    return f"{mean(losses):.3g}" if losses else "-"


# ------------------------------------------------------------------------------------------------- measuring

def ask(args, m, rpn, recipe, picture, q, row, prefix):
    """One question by one row -> Answer."""
    question, limit, regions, mode = q["question"][-1], args.max_new_tokens or q.get("max_new_tokens", 32), None, "box"
    if row.method == "ViCrop rel-att":
        return rivals.vicrop(m, picture, question, args.vicrop_layer, limit, prefix)
    if row.method in ("plain", "box", "mask"):
        mode = row.method
    elif row.method == "raw attention":
        regions = ablations.raw_regions(m, recipe.for_kind(q.get("kind")), picture, question, limit, prefix)
    elif row.method == "RPN + MSE":
        regions = ablations.regressed_regions(m, rpn, question, prefix)
    else:
        regions = ablations.true_regions(m, picture, q["boxes"])
    tau = row.tau or (tau_of(q, rpn, recipe) if rpn else None)
    with ablations.asking(row.ablation):
        return answer(m, rpn, picture, question, mode, tau, limit, regions=regions, prefix=prefix)


def timed(args, m, rpn, recipe, picture, q, row, keep):
    """One question by one row -> its result: score in percent, seconds, and where the answer looked."""
    m.budget = row.budget or m.budget
    began = time.perf_counter()
    prefix = m.prefill(m.pixels(picture)[None], keep)
    got = ask(args, m, rpn, recipe, picture, q, row, prefix)
    result = {"id": q["id"], "kind": q["kind"], "score": 100 * metrics.score(q, got.text),
              "seconds": time.perf_counter() - began}
    if row.method != "plain":
        result["cropped"] = 100 * bool(got.boxes)
        if q["boxes"]:
            covers, iou = metrics.overlap(got.boxes, q["boxes"], picture.size)
            result |= {"covers": 100 * covers, "iou": iou}
    return result

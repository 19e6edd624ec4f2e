"""The paper's tables and figures, one command each: on the toy by default, on any checkpoint and question file by flag.

    python tests/paper/tables.py table3            # what each part is worth: plain, #1 to #5, and the true box
    python tests/paper/tables.py table4a           # frozen layers B        (table7: RPN layers R)
    python tests/paper/tables.py table4b           # training samples, and labels from the data set's answers
    python tests/paper/tables.py table8            # the Gaussian on the map or on the labels
    python tests/paper/tables.py tau               # the threshold, box and mask
    python tests/paper/tables.py peers             # raw attention, ViCrop rel-att, SD-RPN, true box
    python tests/paper/tables.py fig3              # is an attended token inside the true box, with sinks and without?
    python tests/paper/tables.py fig5              # score against time: over tau, or over the pixels a model is shown
    python tests/paper/tables.py heads             # which layers and heads to teach from: a recipe for a new backbone
    python tests/paper/tables.py compare A B       # two answer files of infer.py --eval --out, question by question
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
import re
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import mean

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import ablations  # noqa: E402 (the project is on the path only now)
import heads as finder  # noqa: E402
import peers as rivals  # noqa: E402
import plots  # noqa: E402
import train  # noqa: E402
from clip import BadInput, reading  # noqa: E402
from data import draw, metrics  # noqa: E402
from data.checkpoints import NAMES, find_checkpoint, run_name  # noqa: E402
from data.evaluate import now  # noqa: E402
from data.files import write_text  # noqa: E402
from data.program import at_least_1, log, run_program  # noqa: E402
from data.run import read_ahead  # noqa: E402
from data.toy.compare import ask  # noqa: E402
from data.toy.scenes import KINDS, ToyQuestions  # noqa: E402
from model import DTYPES, ROOT, load, read_config  # noqa: E402
from sdrpn import (RELEASED, RPN, Recipe, Sink, answer, explain_teacher, load_recipe, prefix_layers,  # noqa: E402
                   released_recipe)

PAPER = "the paper's: LLaVA-1.5-7B, mean of OCRBench, TextVQA, POPE and V*, plain 53.4"
CELL = 28 * 28  # pixels of an image token where the number of tokens follows the picture
BUDGETS = [(n * CELL, n * CELL) for n in (144, 256, 576, 1024, 2304)]


# ----------------------------------------------------------------------------------------- rows and questions

@dataclass
class Row:
    name: str
    method: str           # one of data.toy.compare.METHODS, "RPN + MSE" or "ViCrop rel-att"
    flags: dict = None    # {flag of train.py: value}, {} for the recipe's; None: nothing is trained
    paper: str = ""
    tau: float = None     # None: the question's, else the RPN's
    budget: tuple = None  # least and most pixels of a picture; None: the model's
    ablation: ablations.Ablation = ablations.NONE
    rpns: dict = None     # {seed: its RPN}
    results: dict = None  # {(question's id, RPN): score, seconds, ...}


def read(args, most=None):
    """{seed: questions}; what is asked of a file is the same for every seed. most: the default number of questions."""
    if args.eval is None:
        count = (args.count or (most or 300) // len(KINDS)) * len(KINDS)
        return {seed: ToyQuestions(f"tables/{seed}", count) for seed in args.seeds}
    file, asked = train.FileQuestions(args.eval), []
    for q in file.questions:
        if len(q["question"]) == 1 and (q.get("answers") or args.what in ("heads", "fig3")):
            asked.append({"kind": "all", "boxes": []} | q | {"id": q["line"]})
    if not asked:
        raise BadInput(f"{args.eval}: no question of one turn with answers")
    random.Random(0).shuffle(asked)
    file.questions = sorted(asked[:args.count or most], key=lambda q: q["id"])
    return dict.fromkeys(args.seeds, file)


def have_boxes(questions):
    return isinstance(questions, ToyQuestions) or any(q["boxes"] for q in questions.questions)


def in_order(questions, boxed=False):
    """All (picture, question) pairs, or those with true boxes; pictures are read ahead."""
    for ((picture, q),) in read_ahead(questions.__getitem__, ([n] for n in range(len(questions))), ahead=8):
        if q["boxes"] or not boxed:
            yield picture, q


def open_model(args, recipe):
    """Loaded after all training: one model in memory at a time."""
    m = load(args.folder, args.device, args.dtype)
    m.budget = recipe and recipe.budget or m.budget
    return m


# ---------------------------------------------------------------------------------------------- trained RPNs

def trained(args, row, seed):
    """The RPN of train.py for this row, trained now or earlier -> path. --rpn replaces the run without flags."""
    if args.rpn and not row.flags and row.ablation is ablations.NONE:
        return Path(args.rpn)
    name = f"seed {seed} {Path(args.data or '').stem} {args.samples or ''} {row.flags} {row.ablation.name}"
    out = args.out / run_name(args.ckpt) / "-".join(re.findall(r"[\w.]+", name))
    path, p = out / "rpn.safetensors", train.parser()
    if path not in args.made:  # for another row of this table
        log(f"--- {out.name}")
        for flag in ("ckpt", "data", "samples", "max_new_tokens", "device", "dtype", "fresh"):
            p.set_defaults(**{flag: getattr(args, flag) or p.get_default(flag)})
        p.set_defaults(seed=seed, out=out, **row.flags)
        with ablations.training(row.ablation):
            train.work(p.parse_args([]))
        args.made.add(path)
    return path


def final_loss(row):
    """Mean training loss over the last tenth of the steps of all its runs; NaN if an RPN lies in no run's folder."""
    losses = []
    for rpn in row.rpns.values():
        steps = rpn.path.with_name("log.jsonl")
        lines = steps.read_text().splitlines() if steps.is_file() else []
        losses += [json.loads(line)["loss"] for line in lines[-max(1, len(lines) // 10):]]
    return metrics.mean(losses)


# ------------------------------------------------------------------------------------------------- measuring

def ask_row(args, m, rpn, recipe, picture, q, row, prefix):
    """One question by one row -> Answer."""
    most, question = limit(args, q), q["question"][-1]
    if row.method == "ViCrop rel-att":
        return rivals.vicrop(m, picture, question, vicrop_layer(m), most, prefix)
    if row.method == "RPN + MSE":
        regions = ablations.regressed_regions(m, rpn, question, prefix)
        return answer(m, rpn, picture, question, "box", max_new_tokens=most, regions=regions, prefix=prefix)
    threshold = row.tau or q.get("tau") or recipe.taus.get(q.get("benchmark")) or (rpn or recipe).tau
    own = replace(recipe.for_kind(q.get("kind")), tau=threshold)
    with ablations.asking(row.ablation):
        return ask(m, rpn, own, picture, q, row.method, prefix, most)


def limit(args, q):
    return args.max_new_tokens or q.get("max_new_tokens", 32)


def vicrop_layer(m):
    return round(14 * m.depth / 32)


def timed(args, m, rpn, recipe, picture, q, row, keep, prefixes):
    """One question by one row -> its result: score in percent, seconds, and where the answer looked.

    prefixes {budget: (prefix, its seconds)} of this picture; its seconds count as if the row were alone.
    """
    m.budget = row.budget or m.budget
    began = now(m)
    if row.budget not in prefixes:
        prefixes[row.budget] = m.prefill(m.pixels(picture)[None], keep), now(m) - began
        began = now(m)
    prefix, seconds = prefixes[row.budget]
    got = ask_row(args, m, rpn, recipe, picture, q, row, prefix)
    result = {"id": q["id"], "kind": q["kind"], "seconds": seconds + now(m) - began,
              "score": 100 * metrics.score(q, got.text)}
    if row.method != "plain":
        result["cropped"] = 100 * bool(got.boxes)
        if q["boxes"]:
            covers, result["iou"] = metrics.overlap(got.boxes, q["boxes"], picture.size)
            result["covers"] = 100 * covers
    return result


def measure(args, m, recipe, rows, questions):
    """Ask every question by every row, with each of its RPNs, into row.results."""
    keep, done = {vicrop_layer(m), *prefix_layers(recipe)}, 0
    for row in rows:
        keep |= {rpn.frozen for rpn in row.rpns.values()}
    for seed, of_seed in questions.items():
        for picture, q in in_order(of_seed):
            prefixes = {}
            for row in rows:
                rpn = row.rpns.get(seed)
                how = args, m, rpn, recipe, picture, q, row, keep
                if not row.results:
                    timed(*how, {})  # warms up
                if (q["id"], rpn) not in row.results:
                    row.results[q["id"], rpn] = timed(*how, prefixes) | {"seed": seed}
            done += 1
            if done % 25 == 0:
                log(f"question {done}/{sum(map(len, questions.values()))}")


# --------------------------------------------------------------------------------------- from results to text

# title, key of a result, format
COLUMNS = (("RoI %", "cropped", ".0f"), ("recall", "covers", ".0f"), ("IoU", "iou", ".2f"),
           ("s/question", "seconds", ".4f"))


def means(row, key, of, kinds=None):
    """{a seed, or a question: its mean}. of: "seed" or "id"; kinds: None for all."""
    groups = {}
    for r in row.results.values():
        if key in r and (kinds is None or r["kind"] in kinds):
            groups.setdefault(r[of], []).append(r[key])
    return {name: mean(values) for name, values in groups.items()}


def over_seeds(row, key, kinds=None):
    """The mean over the seeds of each seed's mean (NaN: no result), and half their range (None: one seed)."""
    by_seed = list(means(row, key, "seed", kinds).values())
    return metrics.mean(by_seed), (max(by_seed) - min(by_seed)) / 2 if len(by_seed) > 1 else None


def change(row, base, kinds):
    """The mean change of the score against the row `base`, and half its 95 % interval, as text.

    Question by question: one that was asked under several seeds counts once, with its mean.
    """
    before, after = means(base, "score", "id", kinds), means(row, "score", "id", kinds)
    found = metrics.paired([before[name] for name in after], list(after.values()))
    return f"{found['change']:+.1f} ±{found['interval']:.1f}"


def lay_out(rows, without):
    """Lines of text: scores with what they cost, changes against plain, and against raw attention."""
    found = list(dict.fromkeys(r["kind"] for r in rows[0].results.values()))
    kinds = {kind: [kind] for kind in found} | {"all": found}
    if without:
        kinds["no " + ", ".join(without)] = [kind for kind in found if kind not in without]
    table = []
    for row in rows:
        cells = [row.name]
        for of_kinds in kinds.values():
            middle, half = over_seeds(row, "score", of_kinds)
            cells.append(f"{middle:.1f}" if half is None else f"{middle:.1f} ±{half:.1f}")
        for _, key, form in COLUMNS:
            cells.append(metrics.number(over_seeds(row, key)[0], form))
        speed = over_seeds(rows[0], "seconds")[0] / over_seeds(row, "seconds")[0]
        table.append([*cells, f"{speed:.2f}", metrics.number(final_loss(row), ".3g"), row.paper])
    titles = [title for title, _, _ in COLUMNS]
    lines = metrics.table(["", *kinds, *titles, "speed", "loss", "paper's"], table)
    lines += changes("change", rows[1:], rows[0], kinds)
    if rows[1].method == "raw attention":
        lines += changes("against raw", [row for row in rows if row.rpns], rows[1], kinds)
    return [*lines, "",
            "scores: ± half their range over seeds; change: question by question, ± half the 95 % interval",
            "change and speed: against the first row; recall: the crops cover half of every true box"]


def changes(title, rows, base, kinds):
    table = [[row.name, *(change(row, base, k) for k in kinds.values())] for row in rows]
    return ["", *metrics.table([title, *kinds], table)]


def emit(args, *texts):
    print(*texts, sep="\n", flush=True)
    with open(args.out / f"{args.what}.txt", "a", encoding="utf-8") as f:
        print(*texts, "", sep="\n", file=f)


def about(args, m, questions):
    asked = f"questions of {Path(args.eval).name}" if args.eval else "toy questions"
    more = f", --samples {args.samples}" if args.samples else ""
    return (f"{args.what}: {run_name(args.ckpt)} ({m.fingerprint}), {str(m.dtype)[6:]} on {m.device.type}; "
            f"{len(questions[args.seeds[0]])} {asked}, seeds {' '.join(map(str, args.seeds))}{more}")


# ------------------------------------------------------------------------------------------------ the tables

def show(args, rows, *notes):
    """Train what the rows need, ask all questions by every row, print the table -> the rows with their results."""
    recipe, questions = load_recipe(args.folder), read(args)
    boxed = have_boxes(questions[args.seeds[0]])
    rows = [replace(row, rpns={}, results={}) for row in rows if boxed or row is not TRUE]
    for row in rows:
        if row.flags is not None:
            row.rpns = {seed: trained(args, row, seed) for seed in args.seeds}
    m = open_model(args, recipe)
    open_rpn = cache(lambda path: RPN.load(path, m))
    for row in rows:
        row.rpns = {seed: open_rpn(path) for seed, path in row.rpns.items()}
    measure(args, m, recipe, rows, questions)
    emit(args, about(args, m, questions), *lay_out(rows, args.without), *notes)
    return rows


PLAIN, TRUE = Row("plain", "plain"), Row("true box", "true box")
TAUS = ("the paper's tau, one for each benchmark: 0.15 TextVQA, InfoVQA, ChartQA, POPE; 0.10 DocVQA, V*, HR-Bench; "
        "0.05 OCRBench")


def sweep(flag, own, values, paper):
    """Masked Upscaling for each value of a flag; the recipe's own needs none, so that all tables share that run."""
    rows = []
    for value in values:
        flags = {} if value == own else {flag.replace("-", "_"): value}
        rows.append(Row(f"{flag} {value or 'all'}", "SD-RPN masked", flags, paper.get(value, "")))
    return rows


def table3(args):
    show(args, [
        PLAIN,
        Row("#1 raw attention", "raw attention", paper="+3.8"),
        Row("#2 RPN + MSE", "RPN + MSE", {}, "+5.3", ablation=ablations.REGRESSED),
        Row("#3 + label assignment", "SD-RPN box", {}, "+7.9", ablation=ablations.WITH_SINKS),
        Row("#4 + sink removal", "SD-RPN box", {}, "+9.0"),
        Row("#5 masked", "SD-RPN masked", {}, "+9.2"),
        TRUE], PAPER + "; #1 to #4 crop boxes; the loss of #2 is in another unit")


def table4a(args):
    recipe, depth = load_recipe(args.folder), read_config(args.folder)[1].num_hidden_layers
    B, step = recipe.frozen_layers, max(1, depth // 8)
    values = [b for b in range(B - 2 * step, B + 2 * step + 1, step) if 1 <= b <= depth - recipe.rpn_layers]
    rows = sweep("frozen-layers", B, args.values or values, {B: "+9.2 (B = 15 of 32)"})
    show(args, [PLAIN, *rows, TRUE], PAPER + "; it falls on both sides of B = 15")


def table4b(args):
    full = args.samples or load_recipe(args.folder).train.samples
    fewer = [full // 8, full // 4, full // 2] if full else [10000, 20000, 40000]
    rows = sweep("samples", full, [*(args.values or fewer), full], {full: "62.6 (152K)"})
    given = Row("data set's answers", "SD-RPN masked", {}, "60.7 (152K)", ablation=ablations.GIVEN)
    show(args, [PLAIN, *rows, given, TRUE], PAPER)


def table7(args):
    R = load_recipe(args.folder).rpn_layers
    rows = sweep("rpn-layers", R, args.values or (1, 2, 3, 4), {1: "58.4", 3: "62.6"})
    show(args, [PLAIN, *rows, TRUE], PAPER)


def table8(args):
    before = Row("smooth the labels", "SD-RPN masked", {}, "2.1 lower, loss 0.05", ablation=ablations.PRESMOOTHED)
    show(args, [PLAIN, Row("smooth the map", "SD-RPN masked", {}, "62.6, loss 0.02"), before, TRUE], PAPER,
         "labels: the attention is blurred before labels are assigned, and the RPN's map is not")


def peers(args):
    show(args, [
        Row("plain", "plain", paper="TextVQA 46.1, V* 50.3"),
        Row("#1 raw attention", "raw attention"),
        Row("ViCrop rel-att", "ViCrop rel-att", paper="TextVQA 57.2, V* 52.4, speed 0.42"),
        Row("SD-RPN box", "SD-RPN box", {}, "speed 0.55"),
        Row("SD-RPN masked", "SD-RPN masked", {}, "TextVQA 58.7, V* 67.5, speed 0.62"),
        TRUE],
        "the paper's: LLaVA-1.5-7B; its RoI stage is 1.5 x faster than ViCrop's",
        "ViCrop reads its map off layer 14 of 32, other depths in proportion, divided by the map for",
        f"'{rivals.GENERAL}', for the toy words it never learnt; its three passes share the prefix here")


def tau_rows(args):
    rows = [PLAIN]
    for name, method in ("box", "SD-RPN box"), ("mask", "SD-RPN masked"):
        for value in args.values or (0.02, 0.05, 0.1, 0.15, 0.3, 0.5):
            rows.append(Row(f"{name} {value}", method, {}, tau=value))
    return [*rows, TRUE]


def tau(args):
    show(args, tau_rows(args), TAUS)


def fig5(args):
    """Score against time: over the budget of pixels in families that have one, else over tau."""
    what, rows, note = "tau", tau_rows(args), TAUS
    if read_config(args.folder)[1].budget:
        what, rows = "image tokens", []
        for name, method, flags in (("plain", "plain", None), ("SD-RPN", "SD-RPN masked", {})):
            for least, most in args.budget or BUDGETS:
                rows.append(Row(f"{name} {most // CELL}", method, flags, budget=(least, most)))
        note = "the paper's (7B, V*): SD-RPN 77.5 with 576 tokens, which plain reaches with 4096"
    series = {}
    for row in show(args, rows, note):
        curve, _, value = row.name.partition(" ")
        if curve != "true":
            point = over_seeds(row, "seconds")[0], over_seeds(row, "score")[0], value or curve
            series.setdefault(curve, []).append(point)
    chart = plots.line_plot(series, "seconds per question", "score, %", f"Score against time; the numbers are {what}")
    draw.save(chart, args.out / "fig5.png")
    emit(args, f"drawn in fig5.png, each point with its {what}")


# ------------------------------------------------------------------------------------ what teachers attend to

def taught(args, m, recipe, samples):
    """The teacher's maps and the true boxes -> [(raw (N,), clean (N,), inside (N,) bool, grid)], a question each."""
    lessons = []
    for picture, q in samples:
        found = explain_teacher(m, recipe.for_kind(q["kind"]), picture, q["question"][-1], limit(args, q))
        raw, clean = (torch.as_tensor(found[name]).flatten() for name in ("raw", "clean"))
        letterbox = found["letterbox"]
        lessons.append((raw, clean, letterbox.cells_of(q["boxes"]).flatten(), letterbox.grid))
        if len(lessons) % 25 == 0:
            log(f"{len(lessons)} questions taught")
    return lessons


EDGES = [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]  # of Figure 3's bins


def share(chosen):
    """Percent of True; NaN of none."""
    return 100 * chosen.float().mean().item()


def fig3_bins(relative, inside):
    """-> the percent inside the true box of the tokens in each bin [low, high), the last one with 1; their number."""
    bins = torch.bucketize(relative, torch.tensor(EDGES[1:-1]), right=True)
    chosen = [inside[bins == k] for k in range(len(EDGES) - 1)]
    return [share(c) for c in chosen], [len(c) for c in chosen]


def fig3(args):
    recipe, questions = load_recipe(args.folder), read(args)
    m = open_model(args, recipe)
    lessons = [lesson for asked in set(questions.values()) for lesson in taught(args, m, recipe, in_order(asked, True))]
    lessons = [lesson for lesson in lessons if lesson[0].any()]  # that were answered
    if not lessons:
        raise BadInput("no question has both a true box and an answer; use --eval FILE whose questions have 'boxes'")
    raw, clean, inside, _ = zip(*lessons)
    inside, parts, notes = torch.cat(inside), {}, []
    for name, maps in ("with sinks", raw), ("sinks removed", clean):
        relative = torch.cat([a / a.max().clamp(min=1e-12) for a in maps])
        parts[name] = fig3_bins(relative, inside)
        notes.append(f"{name}: inside the true box are, above 0.2: {share(inside[relative > 0.2]):.1f} %, "
                     f"below 0.1: {share(inside[relative < 0.1]):.1f} %, of all: {share(inside):.1f} %")
    rows = []
    for k, low in enumerate(EDGES[:-1]):
        rows.append([f"{low:g} - {EDGES[k + 1]:g}"])
        for shares, counts in parts.values():
            rows[-1] += [str(counts[k]), f"{shares[k]:.1f}"]
    table = metrics.table(["a / a_max", "tokens with sinks", "%", "tokens, sinks removed", "%"], rows)
    chart = plots.bar_plots(parts, EDGES, "relative attention a / a_max", "tokens inside the true box, %")
    draw.save(chart, args.out / "fig3.png")
    emit(args, about(args, m, questions), *table, *notes,
         "the paper's (TextVQA, LLaVA-1.5-7B): above 0.2: 40 %, below 0.1: 10 %",
         "inside: the token's cell overlaps the box; removed sinks count as 0; drawn in fig3.png")


# ------------------------------------------------------------------------------------------ the head finder

def heads(args):
    """With boxes, every other question chooses; the rest compare the found recipe with the shipped one."""
    args.seeds = args.seeds[:1]
    released, shipped = released_recipe(*read_config(args.folder)), None
    if (args.folder / "recipe.json").is_file() or "attention" in released:
        shipped = load_recipe(args.folder)
    m, questions = open_model(args, shipped), read(args, 100)
    asked, base = questions[args.seeds[0]], shipped or bare_recipe(m.depth, released)
    seen = look(args, m, base, asked)
    emit(args, about(args, m, questions), *finder.report(seen))
    gaze = finder.beats_chance(seen)
    if not gaze.any():
        raise BadInput("no head beats chance: none looks at the true box more than at the boxes of other questions, "
                       "so there is nothing to teach from; use questions that this model can answer")
    pairs, c = finder.choose(seen, gaze)
    attention = {}
    for layer, head in sorted(pairs):
        attention.setdefault(layer, []).append(head)
    sink = Sink("norm", c) if c < float("inf") else None
    recipe = replace(base, attention=attention, softmax="image", sink=sink, kinds={}, request=None)
    for name, each in ("this recipe", recipe), ("the shipped one", shipped):
        if each and seen[0].inside is not None:
            lessons = taught(args, m, each, islice(in_order(asked, True), 1, None, 2))
            fit = mean(finder.agreement(clean, inside, grid) for _, clean, inside, grid in lessons)
            emit(args, f"IoU of the labelled foreground's box and the true box, {len(lessons)} other questions: "
                       f"{fit:.3f} with {name}")
    text = json.dumps({key: value for key, value in asdict(recipe).items() if value}, indent=1)
    write_text(args.out / "recipe.json", text + "\n")
    emit(args, "recipe.json, to put beside config.json (table4a and table7 sweep B and R):", text)


def bare_recipe(depth, released):
    """B and R as published for this shape, else in LLaVA-1.5's proportion, 15 of 32, and 3; heads are to be found."""
    B = max(1, min(round(15 * depth / 32), depth - 3))
    own = {"attention": {0: None}, "frozen_layers": B, "rpn_layers": min(3, depth - B), "train": RELEASED["train"]}
    return Recipe(**own | {key: value for key, value in released.items() if key != "note"})


def look(args, m, recipe, asked):
    """What every head attended to, a Seen for each question that is answered: every other one with a box, else all."""
    seen, boxed = [], have_boxes(asked)
    for picture, q in islice(in_order(asked, boxed), 0, None, 1 + boxed):
        one = finder.observe(m, recipe, picture, q, limit(args, q))
        seen += [one] if one else []
        if len(seen) % 10 == 1:
            log(f"{len(seen)} questions seen, of at most {len(asked)}")
    if len(seen) < 8:
        raise BadInput(f"{len(seen)} answered questions are too few to tell a head from chance; use more (--count)")
    return seen


# ---------------------------------------------------------------------------------------------- answer files

def compare(args):
    """Two files that infer.py --eval --out wrote: question by question, which one scores higher?"""
    rows = []
    for path in args.files:
        with reading(path, "name two files that infer.py --eval FILE --out wrote"):
            lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
            rows.append({(row["image"], str(row["question"])): row["scores"] for row in lines})
    before, after = rows
    both = [key for key in before if key in after]
    for mode in "plain", "two_stage":
        found = metrics.paired([before[key].get(mode) for key in both], [after[key].get(mode) for key in both])
        emit(args, f"{mode}, of {len(both)} questions: {args.files[1]} won {found['won']} and lost {found['lost']} "
                   f"against {args.files[0]}; {100 * found['change']:+.1f} ± {100 * found['interval']:.1f} points")


# ---------------------------------------------------------------------------------------------- command line

COMMANDS = {f.__name__: f for f in (table3, table4a, table4b, table7, table8, tau, peers, fig3, fig5, heads, compare)}


def parser():
    p = argparse.ArgumentParser("tables.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("what", choices=COMMANDS, help="see above")
    add("files", nargs="*", metavar="ANSWERS", help="compare: two answer files")
    add("--ckpt", default="toy", help=f"checkpoint folder, or one of {', '.join(NAMES)}; default: toy")
    add("--eval", metavar="FILE", help="question file to score; default: toy scenes that no training saw")
    add("--without", metavar="KIND", nargs="+", default=[], help="one more column: the mean without these kinds")
    add("--rpn", help="use this RPN for the rows with default settings, instead of training one")
    add("--data", help="question file to train on; default: train.py's")
    add("--samples", type=at_least_1, help="train on this many questions; default: the recipe's")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training and the toy's questions; default: 0 1 2")
    add("--count", type=at_least_1,
        help="questions: of a file in all, of the toy of each kind; default: the file, or 60 (heads: 100, or 20)")
    add("--values", type=json.loads, nargs="+", help="what table4a, table4b, table7, tau and fig5 sweep")
    add("--budget", type=at_least_1, nargs=2, action="append", metavar=("MIN", "MAX"),
        help="fig5, in families that take any size: pixels of a picture; give several")
    add("--max-new-tokens", type=at_least_1, help="longest answer; default: the question's, else 32 (in training 128)")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--dtype", choices=DTYPES, help="default: as infer.py and train.py choose")
    add("--out", type=Path, default=ROOT / "out" / "tables", help="of runs, texts and pictures; default: out/tables")
    add("--fresh", action="store_true", help="train again what --out holds")
    return p


def work(args):
    args.made, args.folder = set(), find_checkpoint(args.ckpt)
    args.out.mkdir(parents=True, exist_ok=True)
    COMMANDS[args.what](args)


def main(argv=None):
    run_program(parser(), work, argv, memory="use --dtype float16, lower --max-new-tokens, or --device cpu",
                again="stopped; finished trainings are kept, and the same command goes on")


if __name__ == "__main__":
    main()

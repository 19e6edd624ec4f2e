"""
The paper's tables and figures, one command each: on the toy by default, on any checkpoint and question file by flag.

    python tests/tables.py table3            # what each part is worth: plain, #1 to #5, and the true box
    python tests/tables.py table4a           # frozen layers B        (table7: RPN layers R)
    python tests/tables.py table4b           # training samples, and labels from the data set's answers
    python tests/tables.py table8            # the Gaussian on the map or on the labels
    python tests/tables.py tau               # the threshold, box and mask
    python tests/tables.py peers             # raw attention, ViCrop rel-att, SD-RPN, true box: score, recall, time
    python tests/tables.py settings          # learning rate, epochs and batch of the recipe
    python tests/tables.py fig3              # is an attended token inside the true box, with sinks and without?
    python tests/tables.py fig5              # score against time: over tau, or over pixels where a model takes any
    python tests/tables.py heads             # which layers and heads to teach from: a recipe for a new backbone
    python tests/tables.py peers --ckpt llava-1.5-7b --rpn RELEASED_FOLDER --eval data/vstar.jsonl

Trained rows are runs of train.py below --out, which go on or are used again. What is printed is also appended to
out/tables/<name>.txt. Figures marked as the paper's are for LLaVA-1.5-7B; the toy's are not meant to equal them.
Left out: S2 and DeepEyes (other models), F1 for POPE and rotations for HR-Bench (infer.py --eval has them; here the
mean score), questions of several turns.
Shapes: Q questions, L layers, H heads, N = h*w image tokens; boxes in source pixels.
"""
import argparse
import json
import math
import random
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import ablations  # noqa: E402 (the project is on the path only now)
import heads as finder  # noqa: E402
import peers as rivals  # noqa: E402
import plots  # noqa: E402
import train  # noqa: E402
from ablations import Ablation  # noqa: E402
from clip import BadInput, printable  # noqa: E402
from data import draw, metrics  # noqa: E402
from data.files import write_text  # noqa: E402
from data.program import run_program, say  # noqa: E402
from data.toy.scenes import KINDS, ToyQuestions  # noqa: E402
from model import KNOWN, ROOT, find_checkpoint, load, read_family, run_name  # noqa: E402
from sdrpn import (RELEASED_TRAINING, RPN, load_recipe, recipe_for, released_recipe, teach,  # noqa: E402
                   teacher_question, training_view)

PAPER = "the paper's: LLaVA-1.5-7B, mean of OCRBench, TextVQA, POPE and V*, plain 53.4"
CELL = 28 * 28  # pixels of an image token where the number of tokens follows the picture
BUDGETS = [(n * CELL, n * CELL) for n in (144, 256, 576, 1024, 2304)]


# ----------------------------------------------------------------------------------------- rows and questions

@dataclass
class Row:
    name: str
    method: str               # one of train.METHODS, "RPN + MSE" or "ViCrop rel-att"
    flags: list = None        # how train.py is called; None: nothing is trained
    paper: str = ""
    tau: float = None         # None: the question's, else the recipe's
    budget: tuple = None      # least and most pixels of a picture; None: the model's
    ablation: Ablation = field(default_factory=lambda: ablations.NONE)


def limit_of(args, q):
    return args.max_new_tokens or q.get("max_new_tokens", 32)


def read(args, per_kind=60):
    """{seed: questions}. A file's are the same for every seed: all, or --count of each kind, drawn with seed 0."""
    if args.eval is None:
        count = (args.count or per_kind) * len(KINDS)
        return {seed: ToyQuestions(f"tables/{seed}", count) for seed in args.seeds}
    file, by_kind = train.FileQuestions(args.eval, None, None, 0), {}
    for n, q in enumerate(file.questions):
        fault = None
        if args.what not in ("heads", "fig3") and not q.get("answers"):
            fault = "no 'answers', so it can not be scored"
        if len(q["question"]) > 1:
            fault = "several turns; use infer.py --eval"
        if fault:
            raise BadInput(f"{args.eval}: question {n + 1} has {fault}")
        of_kind = by_kind.setdefault(q.get("kind", "all"), [])
        of_kind.append({"kind": "all", "boxes": []} | q | {"id": f"file/{n}"})
    for of_kind in by_kind.values():
        random.Random(0).shuffle(of_kind)
    most = args.count or (per_kind if args.what == "heads" else None)
    file.questions = [q for of_kind in by_kind.values() for q in of_kind[:most]]
    return dict.fromkeys(args.seeds, file)


def open_model(args, recipe):
    """The model, with --budget or the recipe's. Loaded after all training: one model in memory at a time."""
    m = load(find_checkpoint(args.ckpt), args.device, args.dtype)
    if args.budget:
        check_budget(args, m)
        m.budget = args.budget[0]
    elif recipe and "budget" in recipe:  # what its RPN and tau belong to
        m.budget = tuple(recipe["budget"])
    return m


def check_budget(args, m):
    if m.budget is None:
        raise BadInput("--budget: this model shows every picture at one size; leave it out")
    if not all(0 < least <= most for least, most in args.budget):
        raise BadInput("--budget: least and most pixels of a picture are needed")
    if len(args.budget) > 1 and args.what != "fig5":
        raise BadInput(f"--budget: one is enough for {args.what}; fig5 takes several")


# ---------------------------------------------------------------------------------------------- trained RPNs

def trained(args, row, seed):
    """The RPN of train.py for this row, trained now or earlier -> path. --rpn stands for the run without flags."""
    plain = not row.flags and row.ablation is ablations.NONE
    if args.rpn and plain:
        return args.rpn
    flags = train.parser().parse_args(row.flags)
    for key in ("ckpt", "device", "dtype", "data", "images"):
        setattr(flags, key, getattr(args, key))
    flags.seed, flags.samples = seed, flags.samples or args.samples
    flags.max_new_tokens = args.max_new_tokens or flags.max_new_tokens
    flags.out = args.out / run_name(args.ckpt) / folder_name(args, row, seed)
    path, flags.fresh = flags.out / "rpn.safetensors", args.fresh
    if path in args.made:
        return path  # for another row of this table
    train.check_flags(flags)
    say(f"--- {flags.out.name}")
    with ablations.training(row.ablation):
        m, recipe, questions, run = train.start(flags)
        try:  # what train.py does, but for its own table and picture
            if not run.finished:
                train.train(flags, m, recipe, questions, run)
        finally:
            run.close()
    args.made.add(path)
    return path


def folder_name(args, row, seed):
    """One folder for each seed, data and way of training: seed0-frozen-layers-2"""
    parts = [f"seed{seed}"]
    if args.data:
        parts.append(args.data.stem)
    if args.samples:
        parts.append(str(args.samples))
    if row.ablation is not ablations.NONE:
        parts.append(row.ablation.name.replace(",", "").replace("'", "").replace(" ", "-"))
    return "-".join([*parts, *(flag.removeprefix("--") for flag in row.flags)])


def final_loss(rpn_path):
    """Mean training loss over the last tenth of the steps, or None."""
    log = Path(rpn_path).parent / "log.jsonl"
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.is_file() else []
    return mean(losses[-max(1, len(losses) // 10):]) if losses else None


# ------------------------------------------------------------------------------------------------- measuring

def ask(args, m, rpn, recipe, picture, q, row):
    """One question by one row -> Answer."""
    recipe, question, limit = recipe_for(recipe, q.get("kind")), q["question"][-1], limit_of(args, q)
    if row.budget:
        m.budget = row.budget
    if row.method == "RPN + MSE":
        return ablations.ask_regressed(m, rpn, picture, question, limit)
    if row.method == "ViCrop rel-att":
        layer = args.vicrop_layer if args.vicrop_layer is not None else round(14 * m.depth / 32)
        return rivals.vicrop(m, picture, question, layer, limit)
    recipe["tau"] = row.tau or q.get("tau", recipe["tau"])
    with ablations.asking(row.ablation):
        return train.ask(m, rpn, recipe, picture, q, row.method, limit)


def measure(args, m, recipe, rows, questions, rpns):
    """-> {row: [a result for each seed and question]}. What no training touches is asked once, for all seeds."""
    results, known, began, done = {row.name: [] for row in rows}, {}, time.time(), 0
    total = sum(len(questions[seed]) for seed in args.seeds)
    for seed in args.seeds:
        for n in range(len(questions[seed])):
            picture, q = questions[seed][n]
            for row in rows:
                key = row.name, q["id"], None if row.flags is None else seed
                rpn = rpns.get((row.name, seed))
                if done == 0:
                    ask(args, m, rpn, recipe, picture, q, row)  # warm-up, not timed
                if key not in known:
                    start = time.perf_counter()
                    answer = ask(args, m, rpn, recipe, picture, q, row)
                    known[key] = result_of(answer, row, picture, q, time.perf_counter() - start)
                results[row.name].append(known[key] | {"seed": seed})
            done += 1
            if done % 25 == 0:
                say(f"question {done}/{total} | ETA {(time.time() - began) / done * (total - done):.0f} s")
    return results


def result_of(answer, row, picture, q, seconds):
    """Score in percent, seconds, and where the answer looked."""
    score = 100 * metrics.score(q, answer.text)
    result = {"id": q["id"], "kind": q["kind"], "score": score, "seconds": seconds}
    if row.method != "plain":
        result["cropped"] = 100 * bool(answer.boxes)
        if q["boxes"]:
            covers, iou = metrics.overlap(answer.boxes, q["boxes"], picture.size)
            result |= {"covers": 100 * covers, "iou": iou}
    if row.method not in ("plain", "true box"):
        read_again = sum(answer.ms.get(stage, 0) for stage in ("crop", "prefill", "decode"))
        result["look"] = seconds - read_again / 1000
    return result


# --------------------------------------------------------------------------------------- from results to text

# title, key of a result, format
COLUMNS = (("RoI %", "cropped", "7.0f"), ("recall", "covers", "8.0f"), ("IoU", "iou", "7.2f"),
           ("s RoI", "look", "9.4f"), ("s/question", "seconds", "12.4f"))


def over_seeds(results, key, kinds=None):
    """Mean over the seeds of each seed's mean, and half their range; None if nothing was measured."""
    by_seed = {}
    for r in results:
        if key in r and (kinds is None or r["kind"] in kinds):
            by_seed.setdefault(r["seed"], []).append(r[key])
    means = [mean(values) for values in by_seed.values()]
    return (mean(means), (max(means) - min(means)) / 2) if means else None


def paired(results, base, kinds=None):
    """Mean difference to `base` and the half width of its 95 % interval, normal approximation over questions.

    A question asked under several seeds counts once, with its mean difference.
    """
    by_question = {}
    for r, b in zip(results, base):
        if kinds is None or r["kind"] in kinds:
            by_question.setdefault(r["id"], []).append(r["score"] - b["score"])
    d = [mean(values) for values in by_question.values()]
    return mean(d), 1.96 * stdev(d) / len(d) ** 0.5 if len(d) > 1 else math.nan


def summaries(kinds, without=()):
    """{title: kinds} of the score columns: each kind, all of them, and all but those of --without.

    >>> summaries(["word", "same"], ["same"])
    {'word': ['word'], 'same': ['same'], 'all': ['word', 'same'], 'no same': ['word']}
    """
    if len(kinds) == 1:
        return {"all": kinds}
    columns = {kind: [kind] for kind in kinds} | {"all": kinds}
    if without:
        columns["no " + ", ".join(without)] = [kind for kind in kinds if kind not in without]
    return columns


def lay_out(rows, results, losses, without=()):
    """Blocks of text: scores with what they cost, changes against plain, and against raw attention."""
    plain = results["plain"] if "plain" in results else results[rows[0].name]
    kinds = summaries(list(dict.fromkeys(r["kind"] for r in plain)), without)
    several = len({r["seed"] for r in plain}) > 1
    width = max(len(row.name) for row in rows) + 2
    head = "".join(f"{printable(title)[:11]:>12}" for title in kinds)
    costs = "".join(f"{name:>{form.split('.')[0]}}" for name, _, form in COLUMNS)
    lines = [" " * width + head + costs + "  speed    loss  paper's"]
    for row in rows:
        scores = "".join(cell(over_seeds(results[row.name], "score", k), several) for k in kinds.values())
        line = f"{row.name:{width}}{scores}{cost_cells(results[row.name], plain, losses.get(row.name))}"
        lines.append(f"{line}  {row.paper}".rstrip())
    lines += ["", f"{'change':{width}}" + head]
    lines += [change(row, width, results[row.name], plain, kinds) for row in rows if results[row.name] is not plain]
    raw = next((row.name for row in rows if row.method == "raw attention"), None)
    if raw:
        others = [row for row in rows if row.method not in ("plain", "raw attention", "true box")]
        lines += ["", f"{'against raw':{width}}" + head]
        lines += [change(row, width, results[row.name], results[raw], kinds) for row in others]
    scores = "mean over seeds ± half their range" if several else "one seed"
    return [*lines, "", f"scores: {scores}; change: against plain on the same questions, ± half the 95 % interval",
            "recall: the crops cover half of every true box; s RoI: until it is known where to look; "
            "speed: relative to plain"]


def cell(found, several):
    """A score (mean, half the range over seeds) -> 12 characters."""
    middle, half = found
    return (f"{middle:.1f} ±{half:.1f}" if several else f"{middle:.1f}").rjust(12)


def cost_cells(results, plain, loss):
    """RoI, recall, IoU, seconds, speed and loss of a row; a dash where nothing was measured."""
    text = ""
    for _, key, form in COLUMNS:
        found = over_seeds(results, key)
        text += format(found[0], form) if found else "-".rjust(int(form.split(".")[0]))
    text += f"{over_seeds(plain, 'seconds')[0] / over_seeds(results, 'seconds')[0]:7.2f}"
    return text + (f"{loss:8.3g}" if loss is not None else f"{'-':>8}")


def change(row, width, results, base, kinds):
    cells = [paired(results, base, k) for k in kinds.values()]
    return f"{row.name:{width}}" + "".join(f"{middle:+.1f} ±{half:.1f}".rjust(12) for middle, half in cells)


def emit(args, lines):
    print("\n".join(lines), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / f"{args.what}.txt", "a", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n\n")


def about(args, m, questions):
    asked = "toy questions" if args.eval is None else f"questions of {Path(args.eval).name}"
    seeds = " ".join(map(str, args.seeds))
    more = f", --samples {args.samples}" if args.samples else ""
    more += "".join(f", --budget {least} {most}" for least, most in args.budget or ())
    return (f"{args.what}: {run_name(args.ckpt)} ({m.fingerprint}), {str(m.dtype)[6:]} on {m.device.type}; "
            f"{len(questions[args.seeds[0]])} {asked}, seeds {seeds}{more}")


# ------------------------------------------------------------------------------------------------ the tables

def depth_and_recipe(args):
    """The decoder's number of layers and the recipe, without reading weights."""
    folder = find_checkpoint(args.ckpt)
    return read_family(folder)[1]["num_hidden_layers"], load_recipe(folder)


def show(args, rows, *notes):
    """Train what the rows need, ask all questions by every row, print the table -> results."""
    depth, recipe = depth_and_recipe(args)
    if args.vicrop_layer is not None and not 0 <= args.vicrop_layer < depth:
        raise BadInput(f"--vicrop-layer {args.vicrop_layer}: the model has layers 0 to {depth - 1}")
    questions = read(args)
    if args.eval:
        asked = questions[args.seeds[0]].questions
        strange = set(args.without) - {q["kind"] for q in asked}
        if not any(q["boxes"] for q in asked):
            rows = [row for row in rows if row.method != "true box"]
    else:
        strange = set(args.without) - set(KINDS)
    if strange:
        raise BadInput(f"--without {sorted(strange)[0]}: no question is of this kind")
    needed = [(row, seed) for row in rows if row.flags is not None for seed in args.seeds]
    paths = {(row.name, seed): trained(args, row, seed) for row, seed in needed}
    m = open_model(args, recipe)
    opened = {path: RPN.load(path, m) for path in set(paths.values())}
    results = measure(args, m, recipe, rows, questions, {key: opened[path] for key, path in paths.items()})
    losses = {}
    for row in rows:
        found = [final_loss(paths[row.name, seed]) for seed in args.seeds if (row.name, seed) in paths]
        if found and None not in found:
            losses[row.name] = mean(found)
    emit(args, [about(args, m, questions), *lay_out(rows, results, losses, args.without), *notes])
    return results


PLAIN, TRUE = Row("plain", "plain"), Row("true box", "true box")


def sweep(args, flag, own, values, paper):
    """Masked Upscaling for each value of a flag; the recipe's own needs none, so that all tables share that run."""
    values = [int(v) for v in args.values] if args.values else values
    return [Row(f"{flag[2:]} {v}", "SD-RPN masked", [] if v == own else [flag, str(v)], paper.get(v, ""))
            for v in values]


def table3(args):
    show(args, [
        PLAIN,
        Row("#1 raw attention", "raw attention", paper="+3.8"),
        Row("#2 RPN + MSE", "RPN + MSE", [], "+5.3", ablation=ablations.REGRESSED),
        Row("#3 + label assignment", "SD-RPN box", [], "+7.9", ablation=ablations.WITH_SINKS),
        Row("#4 + sink removal", "SD-RPN box", [], "+9.0"),
        Row("#5 masked", "SD-RPN masked", [], "+9.2"),
        TRUE], PAPER + "; #1 to #4 crop boxes; the loss of #2 is in another unit")


def table4a(args):
    depth, recipe = depth_and_recipe(args)
    B, R, step = recipe["frozen"], recipe["layers"], max(1, depth // 8)
    values = [b for b in range(B - 2 * step, B + 2 * step + 1, step) if 1 <= b <= depth - R]
    rows = sweep(args, "--frozen-layers", B, values, {B: "+9.2 (B = 15 of 32)"})
    show(args, [PLAIN, *rows, TRUE], PAPER + "; it falls on both sides of B = 15")


def table4b(args):
    full = args.samples or depth_and_recipe(args)[1]["train"].get("samples")
    values = [full // 8, full // 4, full // 2] if full else [10000, 20000, 40000]
    few = [row for row in sweep(args, "--samples", full, values, {}) if row.flags]
    whole = Row(f"samples {full or 'all'}", "SD-RPN masked", [], "62.6 (152K)")
    given = Row("data set's answers", "SD-RPN masked", [], "60.7 (152K)", ablation=ablations.GIVEN)
    show(args, [PLAIN, *few, whole, given, TRUE], PAPER)


def table7(args):
    depth, recipe = depth_and_recipe(args)
    values = [r for r in (1, 2, 3, 4) if recipe["frozen"] + r <= depth]
    rows = sweep(args, "--rpn-layers", recipe["layers"], values, {1: "58.4", 3: "62.6"})
    show(args, [PLAIN, *rows, TRUE], PAPER)


def table8(args):
    before = Row("smooth the labels", "SD-RPN masked", [], "2.1 lower, loss 0.05", ablation=ablations.PRESMOOTHED)
    show(args, [PLAIN, Row("smooth the map", "SD-RPN masked", [], "62.6, loss 0.02"), before, TRUE], PAPER,
         "labels: the attention is blurred before labels are assigned, and the RPN's map is not")


def settings(args):
    own = depth_and_recipe(args)[1]["train"]
    tried = [("lr", own["lr"] / 3), ("lr", 3 * own["lr"]), ("epochs", 1), ("epochs", 2 * own["epochs"]),
             ("batch-size", 4 * own["batch_size"])]
    rows = [Row("the recipe's", "SD-RPN masked", [])]
    for flag, value in tried:
        if value != own[flag.replace("-", "_")]:
            rows.append(Row(f"{flag} {value:.3g}", "SD-RPN masked", [f"--{flag}", f"{value:.3g}"]))
    show(args, [PLAIN, *rows, TRUE])


def peers(args):
    show(args, [
        Row("plain", "plain", paper="TextVQA 46.1, V* 50.3"),
        Row("raw attention", "raw attention"),
        Row("ViCrop rel-att", "ViCrop rel-att", paper="TextVQA 57.2, V* 52.4, speed 0.42"),
        Row("SD-RPN box", "SD-RPN box", [], "speed 0.55"),
        Row("SD-RPN masked", "SD-RPN masked", [], "TextVQA 58.7, V* 67.5, speed 0.62"),
        TRUE],
        "the paper's: LLaVA-1.5-7B; its RoI stage is 1.5 x faster than ViCrop's",
        "ViCrop reads its map off layer 14 of 32, other depths in proportion (--vicrop-layer), divided by the map for",
        f"'{rivals.GENERAL}', for the toy words it never learnt; both passes stop at that layer")


def tau(args):
    rows = []
    for name, method in (("box", "SD-RPN box"), ("mask", "SD-RPN masked")):
        for value in args.values or (0.02, 0.05, 0.1, 0.15, 0.3, 0.5):
            note = "its default" if value == 0.15 else ""
            rows.append(Row(f"{name} {value:g}", method, [], note, value))
    return show(args, [PLAIN, *rows, TRUE], "the paper's tau, tuned a benchmark: 0.15 TextVQA, InfoVQA, ChartQA, POPE; "
                "0.10 DocVQA, V*, HR-Bench; 0.05 OCRBench")


def fig5(args):
    """Score against time. Over the budget of pixels in families that have one, else over tau."""
    _, config = read_family(find_checkpoint(args.ckpt))
    if "budget" in config or args.budget:
        results, what = over_budgets(args), "image tokens"
    else:
        results, what = tau(args), "tau"
    series = {}
    for name, got in results.items():
        curve, _, value = name.partition(" ")
        if name != "true box":
            point = over_seeds(got, "seconds")[0], over_seeds(got, "score")[0], value or curve
            series.setdefault(curve, []).append(point)
    title = f"Score against time; the numbers are {what}"
    chart = plots.line_plot(series, "seconds per question", "score, %", title)
    draw.save(chart, args.out / "fig5.png")
    note = "; the paper's Figure 5 varies the resolution of Qwen2.5-VL instead" if what == "tau" else ""
    emit(args, [f"drawn in fig5.png, each point with its {what}{note}"])


def over_budgets(args):
    """Plain and masked at each --budget; the number in a row's name is that of image tokens at most."""
    rows = []
    for method, name, flags in (("plain", "plain", None), ("SD-RPN masked", "SD-RPN", [])):
        for budget in args.budget or BUDGETS:
            rows.append(Row(f"{name} {budget[1] // CELL}", method, flags, budget=budget))
    return show(args, rows, "the paper's (7B, V*): SD-RPN 77.5 with 576 tokens, which plain reaches with 4096",
                f"change and speed: against {rows[0].name}")


# ------------------------------------------------------------------------------------ what teachers attend to

def boxed(questions):
    """The questions with a true box -> (picture, question), one picture in memory at a time."""
    for n in range(len(questions)):
        picture, q = questions[n]
        if q.get("boxes"):
            yield picture, q


def taught(args, m, recipe, samples):
    """The teacher's maps and the true boxes -> [(raw (N,), clean (N,), inside (N,) bool, grid)], a question each."""
    lessons = []
    for picture, q in samples:
        own = recipe_for(recipe, q.get("kind"))
        pixels, letterbox = training_view(m, own, picture)
        prompt = m.prompt_ids(teacher_question(own, q["question"][-1]))
        lesson = teach(m, own, pixels[None], [prompt], limit_of(args, q))
        inside = letterbox.cells_of(q["boxes"]).flatten()
        lessons.append((lesson.raw[0].cpu(), lesson.clean[0].cpu(), inside, letterbox.grid))
    return lessons


EDGES = [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]  # of Figure 3's bins


def relative_attention(maps, masks):
    """Maps (N,) and true boxes' cells (N,), a question each -> a / a_max and inside, of all tokens in one row.

    >>> relative_attention([torch.tensor([0.2, 0.4]), torch.zeros(2)], [torch.tensor([False, True])] * 2)
    (tensor([0.5000, 1.0000]), tensor([False,  True]))
    """
    seen = [(a / a.max(), inside) for a, inside in zip(maps, masks) if a.max() > 0]
    if not seen:
        raise BadInput("no question has both a true box and an answer with attention; "
                       "use --eval FILE whose questions have 'boxes'")
    relative, inside = zip(*seen)
    return torch.cat(relative), torch.cat(inside)


def share(chosen):
    """Percent of True; NaN of none."""
    return 100 * chosen.float().mean().item()


def fig3_bins(relative, inside):
    """-> tokens in each bin [low, high), the last one with 1, and the percent of them inside the true box."""
    bins = torch.bucketize(relative, torch.tensor(EDGES[1:-1]), right=True)
    chosen = [bins == k for k in range(len(EDGES) - 1)]
    return [int(c.sum()) for c in chosen], [share(inside[c]) for c in chosen]


def fig3(args):
    recipe = load_recipe(find_checkpoint(args.ckpt))
    m, questions = open_model(args, recipe), read(args)
    seeds = args.seeds if args.eval is None else args.seeds[:1]
    lessons = taught(args, m, recipe, (sample for seed in seeds for sample in boxed(questions[seed])))
    raw, clean, masks, _ = zip(*lessons) if lessons else ((), (), (), ())
    parts = {"with sinks": relative_attention(raw, masks), "sinks removed": relative_attention(clean, masks)}
    columns = {name: fig3_bins(*part) for name, part in parts.items()}
    lines = [about(args, m, questions), f"{'a / a_max':>12}" + "".join(f"{name:>26}" for name in columns)]
    for k, (low, high) in enumerate(zip(EDGES, EDGES[1:])):
        cells = [f"{counts[k]:>11} tokens{shares[k]:6.1f} %" for counts, shares in columns.values()]
        lines.append(f"{f'{low:g} - {high:g}':>12}" + "".join(f"{text:>26}" for text in cells))
    for name, (relative, inside) in parts.items():
        lines.append(f"{name}: inside the true box are, above 0.2: {share(inside[relative > 0.2]):.1f} %, "
                     f"below 0.1: {share(inside[relative < 0.1]):.1f} %, of all: {share(inside):.1f} %")
    charts = [plots.bar_plot(EDGES, shares, "relative attention a / a_max", "tokens inside the true box, %",
                            f"Attention and localisation, {name}", counts)
              for name, (counts, shares) in columns.items()]
    draw.save(side_by_side(charts), args.out / "fig3.png")
    emit(args, lines + ["the paper's (TextVQA, LLaVA-1.5-7B): above 0.2: 40 %, below 0.1: 10 %",
                        "inside: the token's cell overlaps the box; removed sinks count as 0; drawn in fig3.png"])


def side_by_side(charts):
    sheet = Image.new("RGB", (sum(chart.width for chart in charts), charts[0].height), "white")
    x = 0
    for chart in charts:
        sheet.paste(chart, (x, 0))
        x += chart.width
    return sheet


# ------------------------------------------------------------------------------------------ the head finder

def heads(args):
    """With boxes, every other question chooses; the rest compare the found recipe with the shipped one."""
    args.seeds = args.seeds[:1]
    shipped = recipe_or_none(find_checkpoint(args.ckpt))
    m, questions = open_model(args, shipped), read(args, 20)
    asked = questions[args.seeds[0]]
    seen = look(args, m, {"square": (shipped or {}).get("square", False)}, asked)
    with_boxes = seen[0].inside is not None
    lines, gaze = head_lines(seen, with_boxes)
    lines = [about(args, m, questions), *lines]
    if not gaze.any():
        emit(args, lines)
        raise BadInput("no head beats chance: none looks at the true box more than at the boxes of other questions, "
                       "so there is nothing to teach from; use questions that this model can answer")
    recipe = found_recipe(m, *finder.choose(seen, gaze), shipped)
    if with_boxes:
        lines += compared(args, m, asked, {"this recipe": recipe, "the shipped one": shipped})
    else:
        lines.append("without true boxes nothing tells these heads from chance: look at train.py's report.png")
    text = "{" + ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in recipe.items()) + "}"
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "recipe.json", text + "\n")
    emit(args, [*lines, "recipe.json, to put beside config.json (table4a, table7 sweep `frozen` and `layers`):", text])
    say(f"to use it: cp {args.out / 'recipe.json'} {m.folder / 'recipe.json'}")


def look(args, m, view, asked):
    """What every head attended to, a Seen for each question that tells: every other one with a box, else all."""
    def observed(samples):
        found = [finder.observe(m, view, picture, q, limit_of(args, q)) for picture, q in samples]
        return [one for one in found if one is not None]
    seen = observed(islice(boxed(asked), 0, None, 2))
    if 0 < len(seen) < 8:
        raise BadInput(f"{len(seen)} questions with a true box and an answer are too few to tell a head from chance; "
                       "use more (--count), or leave the boxes out")
    if not seen:
        seen = observed((picture, q | {"boxes": []}) for picture, q in (asked[n] for n in range(len(asked))))
    if not seen:
        raise BadInput("the model answered none of the questions, so there is no attention to rank; "
                       "use other questions")
    return seen


def recipe_or_none(folder):
    try:
        return load_recipe(folder)
    except BadInput:
        return None


def head_lines(seen, with_boxes):
    """A line a layer, the best heads, the layers that park -> lines, (L, H) bool of the heads that beat chance."""
    scores, columns = finder.head_scores(seen), finder.parking(seen)
    parked = [layer for layer, row in enumerate(zip(*columns)) if finder.parks(*row[1:])]
    unit, gaze = "attention on the image x (1 - spatial entropy)", torch.ones_like(scores, dtype=torch.bool)
    if with_boxes:
        unit, gaze = "share of the attention inside the true box, sinks not counted", finder.beats_chance(seen)
    lines = [f"{unit}; mean of {len(seen)} questions",
             f"{'layer':>6}{'mean':>8}{'best':>8}{'gaze heads':>12}{'longest norm':>14}{'long tokens':>13}"
             f"{'attention on them':>19}"]
    for layer, (norm, tokens, attention) in enumerate(zip(*columns)):
        found = str(int(gaze[layer].sum())) if with_boxes else "-"
        row = scores[layer]
        lines.append(f"{layer:6}{row.mean():8.3f}{row.max():8.3f}{found:>12}{norm:12.1f} x{tokens:11.1f} %"
                     f"{attention:17.1f} %{'  parks' * (layer in parked)}")
    H = scores.shape[1]
    best = [divmod(i, H) for i in scores.flatten().argsort(descending=True)[:12].tolist()]
    lines.append("best, as layer.head: " + ", ".join(f"{layer}.{h} {scores[layer, h]:.3f}" for layer, h in best))
    if with_boxes:
        chance = finder.inside_and_chance(seen)[1].mean().item()
        lines.append(f"gaze heads: {int(gaze.sum())} of {gaze.numel()} hold more in the true box than in the boxes of "
                     f"other questions ({chance:.3f})")
    lines.append("layers that park on sinks: " + (", ".join(map(str, parked)) or "none")
                 + f" (long: above {finder.LONG:g} x the median norm where the layer begins)")
    return lines, gaze


def found_recipe(m, pairs, c, shipped):
    """The recipe of these heads; what was not looked for is the shipped one's, else LLaVA-1.5's."""
    H = m.config["num_attention_heads"]
    B, R = known_depths(m)
    rest = {"frozen": B, "layers": R, "tau": 0.15, "train": RELEASED_TRAINING}
    if shipped:
        kept = (*rest, "square", "budget", "labels")
        rest = {key: shipped[key] for key in kept if key in shipped}
    attention = {}
    for layer in sorted({layer for layer, _ in pairs}):
        chosen = sorted(h for at, h in pairs if at == layer)
        attention[str(layer)] = None if len(chosen) == H else chosen
    sink = {"kind": "norm", "c": c} if c else None
    return {"attention": attention, "softmax": "image", "sink": sink} | rest


def known_depths(m):
    """B and R as published for this shape, if only without heads; else LLaVA-1.5's 15 of 32, and 3."""
    partly, L = released_recipe(type(m), m.config), m.depth
    if partly:
        return partly["frozen"], partly["layers"]
    B = max(1, min(round(15 * L / 32), L - 3))
    return B, min(3, L - B)


def compared(args, m, asked, recipes):
    """Lines: how well the labels of each recipe, made by teach(), fit the true boxes of the other questions."""
    lines = []
    for name, recipe in recipes.items():
        lessons = taught(args, m, recipe, islice(boxed(asked), 1, None, 2)) if recipe else []
        if lessons:
            fit = mean(finder.agreement(clean, inside, grid) for _, clean, inside, grid in lessons)
            lines.append(f"IoU of the labelled foreground's box and the true box, {len(lessons)} other questions: "
                         f"{fit:.3f} with {name}")
    return lines


# ---------------------------------------------------------------------------------------------- command line

COMMANDS = {f.__name__: f for f in (table3, table4a, table4b, table7, table8, tau, peers, settings, fig3, fig5, heads)}


def parser():
    p = argparse.ArgumentParser("tables.py", description="The paper's tables and figures.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("what", choices=COMMANDS, help="see the top of this file")
    add("--ckpt", default="toy", help=f"checkpoint folder, or one of {', '.join(KNOWN)}")
    add("--eval", metavar="FILE", help="question file to score; default: toy scenes that no training saw")
    add("--without", metavar="KIND", nargs="+", default=[], help="one more column: the mean without these kinds")
    add("--rpn", help="use this RPN for the rows with default settings, instead of training one")
    add("--data", type=Path, help="question file to train on; default: train.py's")
    add("--images", type=Path, help="folder that --data's image paths are relative to")
    add("--samples", type=int, help="train on this many questions; default: the recipe's")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training, and of the toy's questions")
    add("--count", type=int, help="questions of each kind; default: 60 toy questions (heads: 20), or the whole file")
    add("--values", type=float, nargs="+", help="what table4a, table4b, table7, tau and fig5 sweep")
    add("--budget", type=int, nargs=2, action="append", metavar=("MIN", "MAX"),
        help="pixels of a picture, in families that take any size; fig5 sweeps several")
    add("--vicrop-layer", type=int, help="layer of ViCrop's map; default: 14 of 32, in proportion")
    add("--max-new-tokens", type=int, help="longest answer; default: the question's, else 32 (in training 128)")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--dtype", help="float16, bfloat16, float32, float64; default: as infer.py and train.py choose")
    add("--out", type=Path, default=ROOT / "out" / "tables", help="folder for runs, texts and pictures")
    add("--fresh", action="store_true", help="train again what --out holds")
    return p


def check_flags(args):
    for key in ("samples", "count", "max_new_tokens"):
        value = getattr(args, key)
        if value is not None and value < 1:
            raise BadInput(f"--{key.replace('_', '-')} {value}: must be at least 1")
    for value in args.values or []:
        if args.what in ("tau", "fig5"):
            if not 0 < value < 1:
                raise BadInput(f"--values: numbers between 0 and 1 are needed for {args.what}")
        elif value < 1 or value != int(value):
            raise BadInput(f"--values: whole numbers from 1 on are needed for {args.what}")


def work(args):
    args.seeds, args.made = list(dict.fromkeys(args.seeds)), set()
    check_flags(args)
    COMMANDS[args.what](args)


def main(argv=None):
    run_program(parser(), work, argv, memory="use --dtype float16, lower --max-new-tokens, or --device cpu",
                again="finished trainings are kept, and the same command goes on")


if __name__ == "__main__":
    main()

"""
The paper's tables and figures, one command each: on the toy by default, on any checkpoint and question file by flag.

    python tests/tables.py table3            # what each part of the method is worth: plain, #1 to #5, and the true box
    python tests/tables.py table4a           # frozen layers B        (table7: RPN layers R)
    python tests/tables.py table4b           # training samples, and labels from the data set's answers
    python tests/tables.py table8            # the Gaussian on the map or on the labels
    python tests/tables.py tau               # the threshold, box and mask      (fig5: the same, drawn against time)
    python tests/tables.py peers             # raw attention, ViCrop rel-att, SD-RPN, true box: score, localisation, time
    python tests/tables.py settings          # learning rate, epochs and batch of the recipe
    python tests/tables.py fig3              # is an attended token inside the true box?
    python tests/tables.py heads             # which layers and heads to teach from: a recipe for a new backbone
    python tests/tables.py peers --ckpt llava-1.5-7b --rpn RELEASED_FOLDER --eval data/vstar.jsonl

Trained rows are runs of train.py below --out, which go on or are used again; the text is also appended to out/tables/<name>.txt.
Figures marked as the paper's are for LLaVA-1.5-7B; the toy's are not meant to equal them. Left out: S2 and DeepEyes (other models),
F1 for POPE and rotations for HR-Bench (infer.py --eval has them; here the mean score), questions of several turns.
Shapes: Q questions, L layers, H heads, g grid side, N = g*g image tokens, T tokens, D hidden width; boxes in source pixels.
"""
import argparse
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402 (the project is on the path only now)
from clip import BadInput, preprocess, preprocess_crop  # noqa: E402
from data import draw, metrics  # noqa: E402
from data.toy.scenes import KINDS  # noqa: E402
from data.metrics import overlap  # noqa: E402
from model import ROOT, KVCache, LLaVA, find_checkpoint, read_json, read_sizes, run_name  # noqa: E402
from data.recipe import LLAVA_TRAINING  # noqa: E402
from sdrpn import (RPN, Answer, Clock, answer, assign_labels, bounding_cells, load_recipe, picture_cells,  # noqa: E402
                   response_attention, teach)
from train import attention_mask, say, true_mask  # noqa: E402

GENERAL = "Write a general description of the image."  # ViCrop's second question
PAPER = "the paper's: LLaVA-1.5-7B, mean of OCRBench, TextVQA, POPE and V*, plain 53.4"


# --------------------------------------------------------------------------- baselines that the method does without

@torch.no_grad()
def regressed(llava, rpn, image, question, limit):
    """Table 3 #2: an RPN that regressed the raw map predicts it as the mean over heads of each head's softmax."""
    hidden, columns = llava.embed_prompt(llava.prompt_ids(question), llava.view(image))  # (1, T, D)
    scores = rpn.score(llava.run(hidden, 0, rpn.frozen), columns, [-1])[0, :, 0]  # (H, N)
    mask = attention_mask(scores.softmax(-1).mean(0), llava.grid)
    return answer(llava, rpn, image, question, "plain" if mask is None else "box", max_new_tokens=limit, mask=mask)


def vicrop_window(relative, image_size, side):
    """ViCrop's choice on a relative attention map (g, g) -> a box in source pixels, from `side` to 2 x side of them wide.

    For each width the window of largest sum; of these the one that stands out most from its neighbours, per cell.
    """
    g, long, found = len(relative), max(image_size), []
    cell = long / g  # source pixels; the grid covers the padded square
    for r in (1.0, 1.2, 1.4, 1.6, 1.8, 2.0):
        n = min(max(int(side * r / cell), 1), g)
        if n == g and r == 1:
            return 0, 0, *image_size
        if n < g:
            sums = F.avg_pool2d(relative[None].double(), n, stride=1, divisor_override=1)[0]  # (g-n+1, g-n+1)
            y, x = divmod(sums.argmax().item(), g - n + 1)
            near = [(v, u) for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)) if 0 <= min(v, u) and max(v, u) <= g - n]
            sharpness = (sums[y, x].item() - mean(sums[at].item() for at in near)) / n ** 2
            found.append((sharpness, r, (x + n / 2, y + n / 2)))
    _, r, centre = max(found, key=lambda f: f[0])
    size = [min(round(side * r), length) for length in image_size]
    low = [min(max(round(c * cell - (long - length) // 2 - s / 2), 0), length - s) for c, s, length in zip(centre, size, image_size)]
    return low[0], low[1], low[0] + size[0], low[1] + size[1]


@torch.no_grad()
def vicrop(llava, image, question, layer, limit):
    """ViCrop rel-att: two passes say where to look (up to `layer`; the released code runs them whole), a third reads image and crop."""
    clock, side, g = Clock(llava.device), llava.vision_tower.image_size, llava.grid
    view = llava.view(image)  # (1, N, D)

    def look(text):
        """The last prompt token's attention to the image, ordinary softmax, mean of all heads -> (N,)"""
        embeds, columns = llava.embed_prompt(llava.prompt_ids(text), view)  # (1, T, D)
        cache = KVCache(llava, 1, embeds.shape[1])
        cache.queries = {layer: []}
        llava.run(embeds, 0, layer + 1, cache)
        q, k = cache.queries[layer][0]  # (1, H, T, d), (1, Hkv, T, d)
        return response_attention(q[0, :, -1:], k[0], columns, embeds.shape[1] - 1, "sequence").mean(0)

    relative = (look(question) / look(GENERAL).clamp(min=1e-12)).view(g, g).cpu() * picture_cells(g, image.size)  # nothing in the padding
    box = vicrop_window(relative, image.size, side)
    clock.lap("regions")
    crop = llava.encode_images(preprocess_crop(image, box, side)[None])  # (1, N, D)
    clock.lap("crop")
    embeds, _ = llava.embed_prompt(llava.prompt_ids(question), torch.cat([view, crop], 1))  # (1, T+N, D)
    T = embeds.shape[1]
    llava.check_length(T + limit)
    cache = KVCache(llava, 1, T + limit)
    hidden = llava.run(embeds, 0, llava.config["num_hidden_layers"], cache)
    clock.lap("prefill")
    ids = llava.decode(hidden[:, -1], cache, T, limit)[0]
    clock.lap("decode")
    return Answer(llava.detokenize(ids), [box], None, 2 * g * g, clock.ms)


# ---------------------------------------------------------------------------------- rows, questions, trained RPNs

@dataclass
class Row:
    name: str
    method: str          # one of train.METHODS, "RPN + MSE" or "ViCrop rel-att"
    flags: list = None   # how train.py is called; None: nothing is trained
    paper: str = ""
    tau: float = None    # None: the question's, else the recipe's


def limit_of(args, q):
    return args.max_new_tokens or q.get("max_new_tokens", 32)


def read(args, per_kind=60):
    """{seed: questions}. A file's are the same for every seed: all of them, or --count of each kind, drawn with seed 0."""
    if args.eval is None:
        return {seed: train.ToyQuestions(f"tables/{seed}", (args.count or per_kind) * len(KINDS)) for seed in args.seeds}
    file, by_kind = train.FileQuestions(args.eval, None, None, 0), {}
    for n, q in enumerate(file.questions):
        lacks = "no 'answers', so it can not be scored" if args.what not in ("heads", "fig3") and not q.get("answers") else None
        if lacks or len(q["question"]) > 1:
            raise BadInput(f"{args.eval}: question {n + 1} has {lacks or 'several turns; use infer.py --eval'}")
        by_kind.setdefault(q.get("kind", "all"), []).append({"kind": "all", "boxes": []} | q | {"id": f"file/{n}"})
    for questions in by_kind.values():
        random.Random(0).shuffle(questions)
    most = args.count or (per_kind if args.what == "heads" else None)
    file.questions = [q for questions in by_kind.values() for q in questions[:most]]
    return dict.fromkeys(args.seeds, file)


def trained(args, flags, seed):
    """The RPN of train.py with these flags, trained now or by an earlier call -> path. --rpn stands for the run without flags."""
    if args.rpn and not flags:
        return args.rpn
    t = train.parser().parse_args(flags)
    t.ckpt, t.seed, t.device, t.dtype, t.data, t.images = args.ckpt, seed, args.device, args.dtype, args.data, args.images
    t.samples, t.max_new_tokens = t.samples or args.samples, args.max_new_tokens or t.max_new_tokens
    name = "-".join([f"seed{seed}", *([args.data.stem] if args.data else []), *([f"{args.samples}"] if args.samples else []), *flags])
    t.out = args.out / run_name(args.ckpt) / name.replace("---", "-")
    say(f"--- {t.out.name}")
    train.Run(t).train()  # what train.main does, but for its own table and picture
    return t.out / "rpn.safetensors"


def final_loss(rpn_path):
    """Mean training loss over the last tenth of the steps, or None."""
    log = Path(rpn_path).parent / "log.jsonl"
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.is_file() else []
    return mean(losses[-max(1, len(losses) // 10):]) if losses else None


def ask(llava, rpn, recipe, image, q, row, args):
    question, limit = q["question"][-1], limit_of(args, q)
    if row.method == "RPN + MSE":
        return regressed(llava, rpn, image, question, limit)
    if row.method == "ViCrop rel-att":
        layer = round(14 * llava.config["num_hidden_layers"] / 32) if args.vicrop_layer is None else args.vicrop_layer
        return vicrop(llava, image, question, layer, limit)
    return train.ask(llava, rpn, recipe | {"tau": row.tau or q.get("tau", recipe["tau"])}, image, q, row.method, limit)


def measure(args, llava, recipe, rows, questions, rpns):
    """-> {row: [one result for each seed and question]}. What no training touches is asked once, whatever the number of seeds."""
    results, known, began, done = {r.name: [] for r in rows}, {}, time.time(), 0
    total = sum(len(questions[s]) for s in args.seeds)
    for seed in args.seeds:
        for n in range(len(questions[seed])):
            image, q = questions[seed][n]
            for row in rows:
                key, rpn = (row.name, q["id"], seed if row.flags is not None else None), rpns.get((row.name, seed))
                if done == 0:
                    ask(llava, rpn, recipe, image, q, row, args)  # warm-up, not timed
                if key not in known:
                    start = time.perf_counter()
                    a = ask(llava, rpn, recipe, image, q, row, args)
                    seconds = time.perf_counter() - start
                    result = known[key] = {"id": q["id"], "kind": q["kind"], "score": 100 * metrics.score(q, a.text), "seconds": seconds}
                    if row.method != "plain":
                        result["cropped"] = 100 * bool(a.boxes)
                        covers, iou = overlap(a.boxes, q["boxes"], image.size)
                        result |= {"covers": 100 * covers, "iou": iou} if q["boxes"] else {}
                    if row.method not in ("plain", "true box"):
                        result["look"] = seconds - sum(a.ms.get(k, 0) for k in ("crop", "prefill", "decode")) / 1000
                results[row.name].append(known[key] | {"seed": seed})
            done += 1
            if done % 25 == 0:
                say(f"question {done}/{total} | ETA {(time.time() - began) / done * (total - done):.0f} s")
    return results


# ----------------------------------------------------------------------------------------------- from results to text

COLUMNS = (("RoI %", "cropped", "7.0f"), ("recall", "covers", "8.0f"), ("IoU", "iou", "7.2f"), ("s RoI", "look", "9.4f"),
           ("s/question", "seconds", "12.4f"))


def over_seeds(results, key, kind="all"):
    """Mean over the seeds of each seed's mean, and half their range; None if nothing was measured."""
    by_seed = {}
    for r in results:
        if key in r and kind in (r["kind"], "all"):
            by_seed.setdefault(r["seed"], []).append(r[key])
    means = [mean(values) for values in by_seed.values()]
    return (mean(means), (max(means) - min(means)) / 2) if means else None


def paired(results, plain, kind="all"):
    """Mean difference to plain and the half width of its 95 % interval, normal approximation over questions.

    A question asked under several seeds counts once, with its mean difference.
    """
    by_question = {}
    for r, p in zip(results, plain):
        if kind in (r["kind"], "all"):
            by_question.setdefault(r["id"], []).append(r["score"] - p["score"])
    d = [mean(values) for values in by_question.values()]
    return mean(d), 1.96 * stdev(d) / len(d) ** 0.5 if len(d) > 1 else math.nan


def lay_out(rows, results, losses):
    """Blocks of text: scores with what they cost, changes against plain, and of the RPN against raw attention."""
    plain = results["plain"]
    raw = next((row.name for row in rows if row.method == "raw attention"), None)
    kinds, seeds = list(dict.fromkeys(r["kind"] for r in plain)), {r["seed"] for r in plain}
    kinds = [*kinds, "all"] if len(kinds) > 1 else ["all"]
    width = max(len(r.name) for r in rows) + 2
    head = "".join(f"{k[:11]:>12}" for k in kinds)
    top = [" " * width + head + "".join(f"{name:>{form.split('.')[0]}}" for name, _, form in COLUMNS) + "  speed    loss  paper's"]
    bottom, to_raw = ["", f"{'change':{width}}" + head], ["", f"{'against raw':{width}}" + head] if raw else []
    change = lambda name, got, base: f"{name:{width}}" + "".join(f"{m:+.1f} ±{h:.1f}".rjust(12) for m, h in (paired(got, base, k) for k in kinds))
    for row in rows:
        got = results[row.name]
        line = "".join(f"{m:.1f}{f' ±{s:.1f}' if len(seeds) > 1 else ''}".rjust(12) for m, s in (over_seeds(got, "score", k) for k in kinds))
        for _, key, form in COLUMNS:
            found = over_seeds(got, key)
            line += format(found[0], form) if found else "-".rjust(int(form.split(".")[0]))
        line += f"{over_seeds(plain, 'seconds')[0] / over_seeds(got, 'seconds')[0]:7.2f}"
        line += f"{losses[row.name]:8.3g}" if losses.get(row.name) is not None else f"{'-':>8}"
        top.append(f"{row.name:{width}}{line}  {row.paper}".rstrip())
        if row.method != "plain":
            bottom.append(change(row.name, got, plain))
        if raw and row.method.startswith("SD-RPN"):
            to_raw.append(change(row.name, got, results[raw]))
    return [*top, *bottom, *to_raw, "",
            ("scores: mean over seeds ± half their range; " if len(seeds) > 1 else "scores of one seed; ")
            + "change: against plain on the same questions, ± half the 95 % interval",
            "recall: the crops cover half of every true box; s RoI: until it is known where to look; speed: relative to plain"]


def emit(args, lines):
    print("\n".join(lines), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / f"{args.what}.txt", "a", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n\n")


def about(args, llava, questions):
    what = "toy questions" if args.eval is None else f"questions of {Path(args.eval).name}"
    return (f"{args.what}: {run_name(args.ckpt)} ({llava.fingerprint}), {str(llava.dtype)[6:]} on {llava.device.type}; "
            f"{len(questions[args.seeds[0]])} {what}, seeds {' '.join(map(str, args.seeds))}{f', --samples {args.samples}' if args.samples else ''}")


# --------------------------------------------------------------------------------------------------- the tables

def sizes_and_recipe(args):
    """The decoder's sizes and the recipe, without reading weights."""
    folder = find_checkpoint(args.ckpt)
    config = read_sizes(folder, read_json(folder / "config.json"))[0]
    return config, load_recipe(SimpleNamespace(folder=folder, config=config))


def show(args, rows, *notes):
    """Train what the rows need, ask all questions by every row, print the table -> results."""
    config, recipe = sizes_and_recipe(args)
    if args.vicrop_layer is not None and not 0 <= args.vicrop_layer < config["num_hidden_layers"]:
        raise BadInput(f"--vicrop-layer {args.vicrop_layer}: the model has layers 0 to {config['num_hidden_layers'] - 1}")
    questions = read(args)
    if args.eval and not any(q["boxes"] for q in questions[args.seeds[0]].questions):
        rows = [r for r in rows if r.method != "true box"]
    paths = {(r.name, s): trained(args, r.flags, s) for r in rows if r.flags is not None for s in args.seeds}
    llava = LLaVA.load(find_checkpoint(args.ckpt), args.device, args.dtype)  # only now: one model in memory at a time
    opened = {path: RPN.load(path, llava) for path in set(paths.values())}
    results = measure(args, llava, recipe, rows, questions, {key: opened[path] for key, path in paths.items()})
    losses = {r.name: [final_loss(paths[r.name, s]) for s in args.seeds] for r in rows if r.flags is not None}
    losses = {name: mean(found) for name, found in losses.items() if None not in found}
    emit(args, [about(args, llava, questions), *lay_out(rows, results, losses), *notes])
    return results


PLAIN, TRUE = Row("plain", "plain"), Row("true box", "true box")


def sweep(args, flag, own, values, paper):
    """Masked Upscaling for each value of a flag; the recipe's own value needs none, so that all tables share that run."""
    return [Row(f"{flag[2:]} {v}", "SD-RPN masked", [] if v == own else [flag, str(v)], paper.get(v, ""))
            for v in ([int(v) for v in args.values] if args.values else values)]


def table3(args):
    show(args, [PLAIN, Row("#1 raw attention", "raw attention", paper="+3.8"), Row("#2 RPN + MSE", "RPN + MSE", ["--loss", "mse"], "+5.3"),
                Row("#3 + label assignment", "SD-RPN box", ["--no-sink-removal"], "+7.9"), Row("#4 + sink removal", "SD-RPN box", [], "+9.0"),
                Row("#5 masked", "SD-RPN masked", [], "+9.2"), TRUE],
         PAPER + "; #1 to #4 crop boxes; the loss of #2 is in another unit")


def table4a(args):
    config, recipe = sizes_and_recipe(args)
    L, B, R = config["num_hidden_layers"], recipe["frozen"], recipe["layers"]
    step = max(1, L // 8)
    values = [b for b in range(B - 2 * step, B + 2 * step + 1, step) if 1 <= b <= L - R]
    show(args, [PLAIN, *sweep(args, "--frozen-layers", B, values, {B: "+9.2 (B = 15 of 32)"}), TRUE], PAPER + "; it falls on both sides of B = 15")


def table4b(args):
    full = args.samples or sizes_and_recipe(args)[1]["train"].get("samples")
    few = sweep(args, "--samples", full, [full // 8, full // 4, full // 2] if full else [10000, 20000, 40000], {})
    show(args, [PLAIN, *(r for r in few if r.flags), Row(f"samples {full or 'all'}", "SD-RPN masked", [], "62.6 (152K)"),
                Row("data set's answers", "SD-RPN masked", ["--answers", "given"], "60.7 (152K)"), TRUE], PAPER)


def table7(args):
    config, recipe = sizes_and_recipe(args)
    values = [r for r in (1, 2, 3, 4) if recipe["frozen"] + r <= config["num_hidden_layers"]]
    show(args, [PLAIN, *sweep(args, "--rpn-layers", recipe["layers"], values, {1: "58.4", 3: "62.6"}), TRUE], PAPER)


def table8(args):
    show(args, [PLAIN, Row("smooth the map", "SD-RPN masked", [], "62.6, loss 0.02"),
                Row("smooth the labels", "SD-RPN masked", ["--smooth", "labels"], "2.1 lower, loss 0.05"), TRUE],
         PAPER, "labels: the attention is blurred before labels are assigned, and the RPN's map is not")


def settings(args):
    recipe = sizes_and_recipe(args)[1]["train"]
    others = [("lr", recipe["lr"] / 3), ("lr", 3 * recipe["lr"]), ("epochs", 1), ("epochs", 2 * recipe["epochs"]), ("batch-size", 4 * recipe["batch_size"])]
    rows = [("the recipe's", []), *((f"{flag} {v:.3g}", [f"--{flag}", f"{v:.3g}"]) for flag, v in others if v != recipe[flag.replace("-", "_")])]
    show(args, [PLAIN, *(Row(name, "SD-RPN masked", flags) for name, flags in rows), TRUE])


def peers(args):
    show(args, [Row("plain", "plain", paper="TextVQA 46.1, V* 50.3"), Row("raw attention", "raw attention"),
                Row("ViCrop rel-att", "ViCrop rel-att", paper="TextVQA 57.2, V* 52.4, speed 0.42"), Row("SD-RPN box", "SD-RPN box", [], "speed 0.55"),
                Row("SD-RPN masked", "SD-RPN masked", [], "TextVQA 58.7, V* 67.5, speed 0.62"), TRUE],
         "the paper's: LLaVA-1.5-7B; its RoI stage is 1.5 x faster than ViCrop's",
         "ViCrop reads its map off layer 14 of 32, other depths in proportion (--vicrop-layer), divided by the map for another pass:",
         f"'{GENERAL}', for the toy words it never learnt; its windows scale with the encoder's input; both passes stop at that layer")


def tau(args):
    rows = [Row(f"{name} {v:g}", f"SD-RPN {method}", [], "its default" if v == 0.15 else "", v)
            for name, method in (("box", "box"), ("mask", "masked")) for v in args.values or (0.02, 0.05, 0.1, 0.15, 0.3, 0.5)]
    return show(args, [PLAIN, *rows, TRUE], "the paper's tau, tuned a benchmark: 0.15 TextVQA, InfoVQA, ChartQA, POPE; 0.10 DocVQA, V*, "
                "HR-Bench; 0.05 OCRBench")


def fig5(args):
    series = {"plain": [], "box": [], "mask": []}
    for name, got in tau(args).items():
        curve, _, value = name.partition(" ")
        series.get(curve, []).append((over_seeds(got, "seconds")[0], over_seeds(got, "score")[0], value or curve))
    draw.save(draw.line_plot(series, "seconds per question", "score, %", "Score against time; the numbers are tau"), args.out / "fig5.png")
    emit(args, ["drawn in fig5.png, each point with its tau; the paper's Figure 5 varies the resolution of Qwen2.5-VL instead"])


# ------------------------------------------------------------------------------------- what teachers attend to

def boxed(llava, questions):
    """The questions with a true box -> (image, question, cells of the box (N,)), one picture in memory at a time."""
    for n in range(len(questions)):
        image, q = questions[n]
        mask = true_mask(q["boxes"], llava.grid, image.size)
        if mask is not None:
            yield image, q, mask.flatten()


def taught(args, llava, recipe, samples):
    """The teacher's maps after sink removal, and the true boxes' cells: (Q, N) each, Q = 0 without samples."""
    side, N = llava.vision_tower.image_size, llava.num_image_tokens
    maps, masks = [torch.zeros(0, N)], [torch.zeros(0, N, dtype=torch.bool)]
    for image, q, mask in samples:
        prompts = [llava.prompt_ids(q["question"][-1])]
        maps.append(teach(llava, recipe, preprocess(image, side)[None], prompts, limit_of(args, q), frozen=1).clean.cpu())
        masks.append(mask[None])
    return torch.cat(maps), torch.cat(masks)


def fig3(args):
    edges = [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    llava, questions = LLaVA.load(find_checkpoint(args.ckpt), args.device, args.dtype), read(args)
    recipe, seeds = load_recipe(llava), args.seeds if args.eval is None else args.seeds[:1]
    a, inside = taught(args, llava, recipe, (sample for s in seeds for sample in boxed(llava, questions[s])))
    seen = a.amax(-1) > 0  # (Q,)
    if not seen.any():
        raise BadInput("no question has both a true box and an answer with attention; use --eval FILE whose questions have 'boxes'")
    relative, inside = (a / a.amax(-1, keepdim=True))[seen].flatten(), inside[seen].flatten()
    share = lambda chosen: 100 * inside[chosen].float().mean().item()  # NaN of an empty bin
    bins = torch.bucketize(relative, torch.tensor(edges[1:-1]), right=True)  # [low, high), the last with 1
    counts, shares = zip(*((int((bins == k).sum()), share(bins == k)) for k in range(len(edges) - 1)))
    draw.save(draw.bar_plot(edges, shares, "relative attention a / a_max, after sink removal", "tokens inside the true box, %",
                            "Attention and localisation", counts), args.out / "fig3.png")
    emit(args, [about(args, llava, questions), f"{'a / a_max':>12}{'tokens':>10}{'inside the true box':>22}",
                *(f"{f'{low:g} - {high:g}':>12}{n:10}{s:20.1f} %" for low, high, n, s in zip(edges, edges[1:], counts, shares)),
                f"above 0.2: {share(relative > 0.2):.1f} %, below 0.1: {share(relative < 0.1):.1f} %, all: {share(relative >= 0):.1f} %",
                "the paper's (TextVQA, LLaVA-1.5-7B): above 0.2 40 %, below 0.1 10 %",
                "inside: the token's cell overlaps the box; removed sinks count as 0; drawn in fig3.png"])


@torch.no_grad()
def observe(llava, image, question, limit):
    """Every head's response-to-image attention, or None if the model answers nothing: maps (L, H, N), softmax over the image;
    mass on the image (L, H), ordinary softmax; norms of the image tokens (L, N) where each layer begins."""
    L = llava.config["num_hidden_layers"]
    hidden, columns = llava.embed_prompt(llava.prompt_ids(question), llava.view(image))  # (1, T, D)
    T, norms, maps, mass = hidden.shape[1], [], [], []
    llava.check_length(T + limit)
    cache = KVCache(llava, 1, T + limit)
    for layer in range(L):
        norms.append(hidden[0, columns].float().norm(dim=-1))
        hidden = llava.run(hidden, layer, layer + 1, cache)
    cache.queries = {layer: [] for layer in range(L)}
    llava.decode(hidden[:, -1], cache, T, limit)
    if not cache.queries[0]:
        return None
    for layer in range(L):
        q = torch.cat([q[0] for q, _ in cache.queries[layer]], 1)  # (H, m, d)
        k = cache.k[layer][0, :, :T + q.shape[1]]  # (Hkv, T+m, d)
        maps.append(response_attention(q, k, columns, T, "image"))
        mass.append(response_attention(q, k, columns, T, "sequence").sum(-1))
    return tuple(torch.stack(x).cpu() for x in (maps, mass, norms))


def without_sinks(maps, norms, c):
    """Eq. 1 with tau_norm = c x the median norm: maps and norms (..., N)."""
    return maps.masked_fill(norms > c * norms.median(-1, keepdim=True).values, 0.0)


def head_scores(maps, mass, inside=None):
    """maps (Q, L, H, N), mass (Q, L, H), true boxes' cells (Q, N) -> (L, H), higher is better.

    With boxes: the share of a head's attention to the image that falls inside. Without: attention on the image
    x (1 - its spatial entropy), so that a head must look at the picture, and at little of it.
    """
    p = maps / maps.sum(-1, keepdim=True).clamp(min=1e-12)
    if inside is not None:
        return (p * inside[:, None, None]).sum(-1).mean(0)
    entropy = -(p * p.clamp(min=1e-12).log()).sum(-1) / math.log(maps.shape[-1])  # (Q, L, H), 0 to 1
    return (mass * (1 - entropy)).mean(0)


def agreement(clean, inside):
    """IoU of the labelled foreground's bounding box and the true box: maps (Q, N), cells (Q, N) -> mean. Without labels: 0."""
    g = math.isqrt(clean.shape[-1])
    box = bounding_cells((assign_labels(clean, g) == 1).unflatten(-1, (g, g))).flatten(1)
    return ((box & inside).sum(-1) / (box | inside).sum(-1).clamp(min=1)).mean().item()


def choose(maps, mass, norms, inside=None):
    """-> scores (L, H), the recipe's (layer, head) pairs, and c of its sink criterion.

    Candidates are the best 1 to 8 heads, compared by the labels they make. (Whole layers among them may make labels that overlap
    the boxes more and answer worse: on the toy layer 2 does.) Without boxes nothing tells them apart: the best three, c = 4.
    """
    L, H = maps.shape[1:3]
    scores = head_scores(without_sinks(maps, norms[:, :, None], 4.0), mass, inside)
    order = [divmod(i, H) for i in scores.flatten().argsort(descending=True).tolist()]
    if inside is None:
        return scores, order[:3], 4.0

    def worth(pairs, c=4.0):
        pool = torch.stack([maps[:, layer, h] for layer, h in pairs]).mean(0)  # (Q, N)
        return agreement(without_sinks(pool, norms[:, min(pairs)[0]], c), inside)
    pairs = max((order[:k] for k in range(1, 9)), key=worth)
    return scores, pairs, max((1000.0, 10.0, 6.0, 4.0, 3.0, 2.0), key=lambda c: worth(pairs, c))  # 1000: none is removed


def heads(args):
    """With boxes, every other question chooses; the rest compare the found recipe with the shipped one by way of teach()."""
    args.seeds = args.seeds[:1]
    llava, questions = LLaVA.load(find_checkpoint(args.ckpt), args.device, args.dtype), read(args, 20)
    asked = questions[args.seeds[0]]
    look = lambda image, q: observe(llava, image, q["question"][-1], limit_of(args, q))
    seen = [(look(image, q), mask) for image, q, mask in islice(boxed(llava, asked), 0, None, 2)]
    if not seen:
        seen = [(look(*asked[n]), None) for n in range(len(asked))]
    seen = [(*found, mask) for found, mask in seen if found]
    if not seen:
        raise BadInput("the model answered none of the questions, so there is no attention to rank; use other questions")
    *found, masks = zip(*seen)
    maps, mass, norms = map(torch.stack, found)
    inside = None if masks[0] is None else torch.stack(masks)
    scores, pairs, c = choose(maps, mass, norms, inside)
    L, H = scores.shape
    by_layer = {layer: sorted(h for at, h in pairs if at == layer) for layer in sorted({layer for layer, _ in pairs})}
    B = max(1, min(round(15 * L / 32), L - 3))  # LLaVA's proportion
    rest = {"frozen": B, "layers": min(3, L - B), "tau": 0.15, "train": LLAVA_TRAINING}
    try:
        shipped = load_recipe(llava)
        rest = {key: shipped[key] for key in rest}
    except BadInput:
        shipped = None
    recipe = {"attention": {str(layer): None if len(chosen) == H else chosen for layer, chosen in by_layer.items()}, "softmax": "image",
              "sink": {"kind": "norm", "c": c}} | rest
    best = [divmod(i, H) for i in scores.flatten().argsort(descending=True)[:12].tolist()]
    unit = "attention on the image x (1 - spatial entropy)" if inside is None else \
        f"share of the attention inside the true box, by chance {inside.float().mean():.3f}"
    lines = [about(args, llava, questions), f"{unit}, mean of {len(seen)} questions", f"{'layer':>6}{'mean':>8}{'best':>8}"]
    lines += [f"{layer:6}{row.mean():8.3f}{row.max():8.3f}" for layer, row in enumerate(scores)]
    lines += ["best, as layer.head: " + ", ".join(f"{layer}.{h} {scores[layer, h]:.3f}" for layer, h in best)]
    for name, r in (("this recipe", recipe), ("the shipped one", shipped)):
        clean, cells = taught(args, llava, r, islice(boxed(llava, asked), 1, None, 2)) if r else ((), ())
        if len(clean):
            lines.append(f"IoU of the labelled foreground's box and the true box, {len(clean)} other questions: {agreement(clean, cells):.3f} with {name}")
    emit(args, lines + ["recipe.json, to paste beside config.json (table4a and table7 sweep `frozen` and `layers`):",
                        "{" + ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in recipe.items()) + "}"])


# ------------------------------------------------------------------------------------------------- command line

COMMANDS = {f.__name__: f for f in (table3, table4a, table4b, table7, table8, tau, peers, settings, fig3, fig5, heads)}


def parser():
    p = argparse.ArgumentParser(description="The paper's tables and figures.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("what", choices=COMMANDS, help="see the top of this file")
    p.add_argument("--ckpt", default="toy", help="checkpoint folder, or toy, llava-1.5-7b, llava-1.5-13b")
    p.add_argument("--eval", metavar="FILE", help="question file to score; default: toy scenes that no training saw")
    p.add_argument("--rpn", help="use this RPN for the rows with default settings, instead of training one")
    p.add_argument("--data", type=Path, help="question file to train on; default: train.py's")
    p.add_argument("--images", type=Path, help="folder that --data's image paths are relative to")
    p.add_argument("--samples", type=int, help="train on this many questions; default: the recipe's")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training, and of the toy's questions")
    p.add_argument("--count", type=int, help="questions of each kind; default: 60 toy questions (heads: 20), or the whole file")
    p.add_argument("--values", type=float, nargs="+", help="what table4a, table4b, table7, tau and fig5 sweep; default: around the recipe's")
    p.add_argument("--vicrop-layer", type=int, help="layer of ViCrop's map; default: 14 of 32, in proportion")
    p.add_argument("--max-new-tokens", type=int, help="longest answer; default: the question's, else 32 (in training 128)")
    p.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    p.add_argument("--dtype", help="float16, bfloat16, float32, float64; default: as infer.py and train.py choose")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "tables", help="folder for runs, texts and pictures")
    return p


def main(argv=None):
    p = parser()
    fail = lambda message, code=2: sys.exit(print(f"tables.py: {message}", file=sys.stderr) or code)
    p.error = lambda message: fail(f"{message}; see python tests/tables.py --help")
    args = p.parse_args(argv)
    try:
        for key in ("samples", "count", "max_new_tokens"):
            if getattr(args, key) is not None and getattr(args, key) < 1:
                raise BadInput(f"--{key.replace('_', '-')} {getattr(args, key)}: must be at least 1")
        thresholds = args.what in ("tau", "fig5")
        if not all(0 < v < 1 if thresholds else v >= 1 and v == int(v) for v in args.values or []):
            raise BadInput(f"--values: {'numbers between 0 and 1' if thresholds else 'whole numbers from 1 on'} are needed for {args.what}")
        args.seeds = list(dict.fromkeys(args.seeds))
        COMMANDS[args.what](args)
    except (BadInput, FloatingPointError) as e:
        fail(e)
    except (torch.OutOfMemoryError, MemoryError):
        fail("out of memory; use --dtype float16, lower --max-new-tokens, or --device cpu")
    except OSError as e:
        fail(f"{e.filename or 'output'}: {e.strerror or e}; check the path, the rights and the free space")
    except KeyboardInterrupt:
        fail("stopped; finished trainings are kept, and the same command goes on", 130)


if __name__ == "__main__":
    main()

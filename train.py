"""
Images + questions -> an RPN, distilled from the model's own attention: Algorithm 1.

    python train.py                                  # the toy: two minutes, a table and a picture
    python train.py --ckpt llava-1.5-7b              # questions from data/llava_mix.jsonl
    torchrun --nproc_per_node 4 train.py --ckpt llava-1.5-7b

A run may be stopped at any moment; the same command goes on. Everything lands in out/<ckpt name>/
(--out). No box and no answer of the data is used. The numbers in train() are the lines of Alg. 1's
listing (the paper's text counts its two halves otherwise).
Left out: callbacks, mixed data sets, and evaluation beyond the toy, which infer.py --eval does.
Shapes: b samples of a group, n turns, T tokens, N = h*w image tokens, D hidden width, H heads.
"""
import argparse
import contextlib
import hashlib
import math
import os
import random
import shlex
from dataclasses import dataclass, field
from pathlib import Path

# On 2 cores, threads that wait passively train the toy a quarter slower than threads that spin, but
# twice as fast beside two busy programs (tests/bench.py --only busy).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch
import torch.distributed as dist

from clip import BadInput, load_image
from data import draw, metrics
from data.files import write_text
from data.program import run_program, say
from data.questions import read_questions
from data.run import Run, Tally
from data.toy.scenes import ToyQuestions, knows_scenes
from model import KNOWN, ROOT, find_checkpoint, load, run_name, wider
from sdrpn import (RPN, Letterbox, Region, answer, check_depth, conversation, load_recipe,
                   make_labels, recipe_for, regions_above, roi_loss, smooth, teach, teach_one,
                   teacher_question, training_view)

TOO_FAR = ("the learning rate is likely too high or the dtype too narrow: "
           "use --dtype float32 or a lower --lr, with --fresh")
TOY_TRAIN, TOY_HELD_OUT = "train", "held-out"  # names of the scenes' random streams


# ------------------------------------------------------------------------------------- Algorithm 1

def train(args, m, recipe, questions, run):
    """Algorithm 1 -> a trained RPN. Raises BadInput, FloatingPointError; SystemExit on Ctrl-C."""
    B, R, training = recipe["frozen"], recipe["layers"], recipe["train"]
    rpn = RPN.from_layers(m, B, R).to(wider(m.dtype))  # 3
    optimizer = torch.optim.AdamW(rpn.parameters(), betas=training["betas"], weight_decay=0.0)
    run.restore(rpn, optimizer)
    parameters = sum(p.numel() for p in rpn.parameters()) / 1e6
    say(f"{len(questions)} questions, {run.total_steps} steps of {run.global_batch}; "
        f"RPN: layers {B}..{B + R - 1}, {parameters:.1f} M parameters; {run.world} process(es)")

    for step in run.steps():
        tally, made = Tally(), {}
        optimizer.zero_grad(set_to_none=True)
        for group in read_groups(args, m, recipe, questions, run):  # 4: (x_v, x_t) of D
            with naming(group, run):
                student = None
                if group[0].labels is None:
                    student = label(args, m, group)  # 6-12: the teacher
                    made |= {sample.number: (sample.labels, sample.responses) for sample in group}
                if student is None:  # labels from disk, a conversation, or another question
                    student = frozen_pass(m, B, group)  # 15: layers 0..B-1
                hidden, columns, rows, rope = student
                labels = torch.stack([sample.labels for sample in group]).to(m.device)  # (b, n, N)
                with autocast(m):
                    scores = rpn.score(hidden.to(wider(m.dtype)), columns, rows, rope)  # 15-17
                loss = loss_sum(scores, labels)  # 13, 18: scores (b, H, n, N)
                loss.backward()
                tally.add(count(loss, labels))
        run.keep(made)
        tally = run.reduce(tally)
        lr = learning_rate(args.lr, training["warmup"], step, run.total_steps)
        if tally.labelled:
            for p in rpn.parameters():
                p.grad /= tally.labelled  # 18: the mean, over the whole step on all processes
            norm = torch.nn.utils.clip_grad_norm_(rpn.parameters(), training["clip"])
            check_finite(norm, f"step {step}: gradient norm {norm.item()}; {TOO_FAR}")
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()  # 19
        run.record(tally, lr)

    rpn.eval().requires_grad_(False).to(m.dtype)
    run.finish(rpn, {"frozen": B, "layers": R, "ckpt": m.folder.name,
                     "fingerprint": m.fingerprint, "settings": run.settings})
    return rpn


@dataclass
class Sample:
    number: int                  # in the shuffled data set
    name: str                    # in the question file
    turns: list                  # its n questions
    pixels: torch.Tensor         # (3, H, W)
    on: torch.Tensor             # (h, w) bool, the cells that hold picture
    recipe: dict                 # for this kind of question
    lengths: tuple = ()          # of its first prompt in ids, the teacher's and the student's
    labels: torch.Tensor = None  # (n, N) int8 in {-1, 0, 1}
    responses: list = field(default_factory=list)  # n answers of the teacher

    def prompt(self, m, turn):
        """What the teacher is asked, after its own answers to the turns before."""
        question = teacher_question(self.recipe, self.turns[turn])
        return m.prompt_ids(question, list(zip(self.turns[:turn], self.responses)))


def read_sample(args, m, recipe, questions, number):
    """-> Sample. Raises BadInput if the picture can not be read, or the prompt is too long."""
    picture, q = questions[number]
    recipe = recipe_for(recipe, q.get("kind"))
    pixels, letterbox = training_view(m, recipe, picture)
    on = letterbox.holds_picture()
    sample = Sample(number, q.get("id", number), q["question"], pixels, on, recipe)
    teachers = students = len(sample.prompt(m, 0))
    if "request" in recipe:  # then the student is asked otherwise
        students = len(m.prompt_ids(sample.turns[0]))
    sample.lengths = teachers, students
    m.check_length(teachers - 1 + on.numel() + args.max_new_tokens)
    return sample


def read_groups(args, m, recipe, questions, run):
    """This process's samples of the step, in groups that the model can take together.

    They share prompt lengths, grid and recipe; a conversation is alone, since its answers differ in
    length. The samples have their labels if those of all are on disk.
    """
    numbers, groups = run.share(run.step), {}
    known = run.has_labels(numbers)
    for number in numbers:
        if known and number in run.skipped:
            continue
        try:
            sample = read_sample(args, m, recipe, questions, number)
        except BadInput as e:
            run.skip(number, e)
            continue
        if known:
            sample.labels, sample.responses = run.labels.read(number)
        alone = number if len(sample.turns) > 1 else -1
        key = sample.lengths, tuple(sample.pixels.shape), alone, str(sample.recipe)
        groups.setdefault(key, []).append(sample)
    most = min(args.teacher_batch, args.batch_size)
    for key in sorted(groups):
        for at in range(0, len(groups[key]), most):
            yield groups[key][at:at + most]


def label(args, m, group):
    """Lines 6-12 for a group: every sample gets its labels (n, N) and its responses.

    Returns what the student goes on from, or None where it needs a pass of its own: after a
    conversation, or where the label prompt is not the question.
    """
    pixels, recipe = torch.stack([sample.pixels for sample in group]), group[0].recipe
    labels = []
    for turn in range(len(group[0].turns)):
        prompts = [sample.prompt(m, turn) for sample in group]
        m.check_length(len(prompts[0]) - 1 + group[0].on.numel() + args.max_new_tokens)
        lesson = teach(m, recipe, pixels, prompts, args.max_new_tokens)  # 6-11
        check_finite(lesson.raw, "attention is not finite; likely the dtype: try --dtype float32")
        labels.append(targets(lesson, group))  # 12: (b, N)
        for sample, response in zip(group, lesson.responses):
            sample.responses.append(response)
    for sample, own in zip(group, torch.stack(labels, 1).cpu()):
        sample.labels = own  # (n, N)
    if len(labels) == 1 and "request" not in recipe:
        return lesson.hidden, lesson.columns, [-1], lesson.rope
    return None


def targets(lesson, group):
    """Line 12: what the student learns of each sample, (b, N) int8. Ablations replace it."""
    labels = [make_labels(clean, s.recipe, s.on) for clean, s in zip(lesson.clean, group)]
    return torch.stack(labels).to(torch.int8)


@torch.no_grad()
def frozen_pass(m, B, group):
    """Layers 0..B-1 on questions and known answers -> hidden (b, T, D), columns, rows, rope."""
    pixels = torch.stack([sample.pixels for sample in group])
    grid = m.token_grid(pixels)
    talks = [conversation(m, sample.turns, sample.responses, grid) for sample in group]
    hidden, columns, positions = m.prepare([ids for ids, _ in talks], pixels)
    rope = m.rope(positions)
    return m.run(hidden, 0, B, rope), columns, talks[0][1], rope  # rows are those of all


def loss_sum(scores, labels):
    """Lines 13, 18: scores (b, H, n, N), labels (b, n, N) -> loss summed over labelled tokens.

    Its division by their number waits for all of the step. Ablations replace it.
    """
    return roi_loss(scores.mean(1), labels, count=1)


def count(loss, labels):
    """One group's part of the step's counts; (b, n, N) labels."""
    check_finite(loss, f"loss {loss.item()}; {TOO_FAR}")
    known = labels >= 0
    empty = (~known.any(-1).any(-1)).sum().item()
    return Tally(loss.item(), known.sum().item(), empty, len(labels))


def learning_rate(peak, warmup, step, steps):
    """Linear up over the first `warmup` of the steps, then a cosine down to 0."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def autocast(m):
    """Trainable weights are float32; a half-precision model computes in bfloat16."""
    if m.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(m.device.type, torch.bfloat16)
    return contextlib.nullcontext()


def check_finite(value, message):
    if not value.isfinite().all():
        raise FloatingPointError(message)


@contextlib.contextmanager
def naming(group, run):
    """Errors say which samples they are about; a conversation that outgrew the model is skipped."""
    try:
        yield
    except FloatingPointError as e:
        names = [sample.name for sample in group]
        raise FloatingPointError(f"step {run.step}, samples {names}: {e}") from None
    except BadInput as e:
        if len(group[0].turns) == 1:
            raise
        run.skip(group[0].number, e)


# --------------------------------------------------------------------------- a run, from its flags

class FileQuestions:
    """A question file's (picture, question) by number; `samples` of them, shuffled, if given."""

    def __init__(self, path, images, samples, seed):
        self.questions, self.root = read_questions(path, images)
        if samples:
            random.Random(seed).shuffle(self.questions)
            self.questions = self.questions[:samples]

    def __len__(self):
        return len(self.questions)

    def __getitem__(self, i):
        q = self.questions[i]
        return load_image(self.root / q["image"]), q


def start(args):
    """Load all that a run needs -> model, recipe, questions, Run. Fills in args from the recipe."""
    folder = find_checkpoint(args.ckpt)
    toy = args.data is None and knows_scenes(folder)
    if args.data is None and not toy:
        args.data = ROOT / "data" / "llava_mix.jsonl"
        if not args.data.is_file():
            raise BadInput(f"{args.data} is missing; make it with: python data/llava_mix.py "
                           "llava_v1_5_mix665k.json --images IMAGES")
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = args.device or gpu
    dtype = args.dtype or ("float32" if toy and device == "cpu" else "bfloat16")
    recipe = load_recipe(folder)
    m = load(folder, device, dtype)
    threads = ""
    if m.device.type == "cpu":
        policy = os.environ.get("OMP_WAIT_POLICY", "default").lower()
        threads = f", {torch.get_num_threads()} thread(s), OMP_WAIT_POLICY {policy}"
    say(f"{folder} on {device} ({'--device' if args.device else 'default'}) in {dtype} "
        f"({'--dtype' if args.dtype else 'default for training'}){threads}")
    fill_in(args, recipe, toy)
    recipe = recipe | {"frozen": args.frozen_layers or recipe["frozen"],
                       "layers": args.rpn_layers or recipe["layers"]}
    check_depth(m, recipe["frozen"], recipe["layers"])  # before the run's folder is made
    m.budget = recipe.get("budget", m.budget)
    if toy:
        questions, source = ToyQuestions(f"{TOY_TRAIN}/{args.seed}", args.samples), "toy scenes"
    else:
        questions = FileQuestions(args.data, args.images, args.samples, args.seed)
        source = hashlib.sha256(args.data.read_bytes()).hexdigest()[:16]
    images = str(args.images.resolve()) if args.images else None
    ckpt = str(folder.resolve()) if Path(args.ckpt).is_dir() else args.ckpt  # found from anywhere
    settings = {"ckpt": ckpt, "fingerprint": m.fingerprint, "data": source,
                "images": images, "questions": len(questions), "recipe": recipe, "dtype": dtype}
    for key in ("seed", "lr", "epochs", "batch_size", "grad_accum", "max_new_tokens"):
        settings[key] = getattr(args, key)
    out = Path(args.out) if args.out else ROOT / "out" / run_name(args.ckpt)
    run = Run(out, settings, len(questions), args.batch_size * args.grad_accum, args.epochs,
              args.fresh, args.save_every, args.max_bad)
    return m, recipe, questions, run


def fill_in(args, recipe, toy):
    """Flags that were not given take the recipe's values; a file is used whole."""
    for key in ("lr", "epochs", "batch_size", "grad_accum", *(["samples"] if toy else [])):
        if getattr(args, key) is None:
            setattr(args, key, recipe["train"][key])


# ----------------------------------------------------------- the toy's comparison, and the picture

METHODS = ("plain", "raw attention", "SD-RPN box", "SD-RPN masked", "true box")


def ask(m, rpn, recipe, picture, q, method, max_new_tokens=32):
    """One question by one method of the comparison -> Answer."""
    question, regions, mode = q["question"][-1], None, "box"
    if method == "plain":
        mode = "plain"
    elif method == "raw attention":  # Table 3 #1: the whole plain answer first, then its attention
        pixels, prompts = m.pixels(picture)[None], [m.prompt_ids(question)]
        lesson = teach(m, recipe | {"sink": None}, pixels, prompts, max_new_tokens)
        regions = attention_regions(lesson.raw[0], m.token_grid(pixels))
    elif method == "true box":
        regions = true_regions(q["boxes"], Letterbox.of(m, picture))
    elif method == "SD-RPN masked":
        mode = "mask"
    return answer(m, rpn, picture, question, mode, recipe["tau"], max_new_tokens, regions=regions)


def attention_regions(raw, grid):
    """Table 3 #1: an attention map (N,), smoothed, above 0.15 of its maximum."""
    p = smooth(raw.view(grid).float().cpu())
    return regions_above(p, 0.15 * p.max().item())


def true_regions(boxes, letterbox):
    """True boxes in source pixels -> a Region each."""
    regions = []
    for box in boxes:
        cells = letterbox.cells_of([box])
        if cells.any():
            y, x = cells.nonzero(as_tuple=True)
            around = x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1
            regions.append(Region(around, cells, cells.sum().item()))
    return regions


def finish(args, m, rpn, recipe, questions, run):
    """Write report.png and out/last, and print the toy's table."""
    scenes = run.settings["data"] == "toy scenes"
    if scenes:
        questions = ToyQuestions(TOY_HELD_OUT, args.held_out or recipe["train"]["held_out"])
    report(args, m, rpn, recipe, questions, run.out / "report.png")
    if scenes:
        methods = {name: lambda picture, q, name=name: ask(m, rpn, recipe, picture, q, name).text
                   for name in METHODS}
        print(metrics.compare(questions, methods, say))
    path, default = run.out / "rpn.safetensors", run.out.resolve().parent == ROOT / "out"
    (ROOT / "out").mkdir(exist_ok=True)
    write_text(ROOT / "out" / "last", (run.out.name if default else str(run.out.resolve())) + "\n")
    say(f"wrote {path} and {run.out / 'report.png'}; ask it something:")
    program, ckpt = os.path.relpath(ROOT / "infer.py"), run.settings["ckpt"]
    words = ["--ckpt", ckpt, "--rpn", str(path.resolve())]
    say(f'python {shlex.quote(program)} IMAGE "question" {shlex.join(words)}')


def report(args, m, rpn, recipe, questions, path):
    """The contact sheet of Figures 2 and 6: picture, attention, without sinks, labels, RPN map."""
    rows = []
    for n in range(min(6, len(questions))):
        try:
            picture, q = questions[n]
            own, question = recipe_for(recipe, q.get("kind")), q["question"][0]
            steps = teach_one(m, own, picture, question, args.max_new_tokens)
            heat = rpn(m, picture, question).sigmoid().numpy()
        except BadInput:  # no picture, or one of a shape that this model does not take
            continue
        maps = [(steps[name], steps["teacher_letterbox"]) for name in ("raw", "clean", "labels")]
        rows.append({"picture": picture, "maps": [*maps, (heat, Letterbox.of(m, picture))],
                     "sinks": steps["sinks"], "title": f"{question}  {steps['response']}"})
    columns = ["picture", "attention", "without sinks", "labels", "RPN"]
    draw.save(draw.contact_sheet(rows, columns), path)


# ------------------------------------------------------------------------------------ command line

def parser():
    p = argparse.ArgumentParser(
        "train.py", description="Distil an RPN from a model's own attention.")
    add = p.add_argument
    add("--ckpt", default="toy",
        help=f"checkpoint folder, or one of {', '.join(KNOWN)}; default: toy")
    add("--data", type=Path,
        help="question file; default: the toy draws its own scenes, else data/llava_mix.jsonl")
    add("--images", type=Path, help="folder that the question file's image paths are relative to")
    add("--out", help="folder of this run; default: out/<ckpt name>")
    add("--samples", type=int,
        help="train on this many questions, shuffled with --seed; 10000 already helps (Table 4b)")
    add("--seed", type=int, default=0, help="order of the data; default: 0")
    add("--batch-size", type=int, help="as the paper has it; see --grad-accum")
    add("--grad-accum", type=int,
        help="a step is batch-size x grad-accum samples, on any number of processes")
    add("--teacher-batch", type=int, default=8,
        help="most samples at a time, teacher and student; lower it when memory runs out; "
             "default: 8")
    add("--lr", type=float, help="peak learning rate; lower it if the loss jumps")
    add("--epochs", type=int, help="passes over the questions; labels are made in the first only")
    add("--frozen-layers", type=int, help="B: decoder layers below the RPN (Table 4a)")
    add("--rpn-layers", type=int, help="R: trainable blocks (Table 7)")
    add("--max-new-tokens", type=int, default=128,
        help="longest answer of the teacher; default: 128")
    add("--max-bad", type=float, default=1.0,
        help="percent of unreadable samples that is tolerated; default: 1")
    add("--held-out", type=int,
        help="toy: fresh questions to compare the methods on at the end; default: the recipe's")
    add("--save-every", type=float, default=300, help="seconds between resume points; default: 300")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--dtype", help="of the frozen weights: float16, bfloat16, float32, float64; "
                        "default: bfloat16, the toy on a CPU float32")
    add("--fresh", action="store_true", help="throw away what --out holds and start over")
    p.epilog = "Values without a default here come from the checkpoint's recipe."
    return p


def check_flags(args):
    for key in ("samples", "batch_size", "grad_accum", "teacher_batch", "epochs", "max_new_tokens",
                "frozen_layers", "rpn_layers", "held_out"):
        value = getattr(args, key)
        if value is not None and value < 1:
            raise BadInput(f"--{key.replace('_', '-')} {value}: must be at least 1")
    if args.lr is not None and not 0 < args.lr < 10:
        raise BadInput(f"--lr {args.lr}: must be positive and finite")
    for flag, value in (("--max-bad", args.max_bad), ("--save-every", args.save_every)):
        if not value >= 0:  # NaN neither
            raise BadInput(f"{flag} {value}: must be 0 or more")


def join_processes(args):
    """With torchrun: meet the others."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        gpu = torch.cuda.is_available() and args.device != "cpu"
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if gpu else "gloo")


def work(args):
    join_processes(args)
    check_flags(args)
    m, recipe, questions, run = start(args)
    try:
        if run.finished:
            say(f"{run.out} holds this very run, finished; --fresh trains it again")
            rpn = RPN.load(run.out / "rpn.safetensors", m)
        else:
            rpn = train(args, m, recipe, questions, run)
        if run.rank == 0:
            finish(args, m, rpn, recipe, questions, run)
    finally:
        run.close()


def main(argv=None):
    again = "the same command goes on"
    run_program(parser(), work, argv, again=again, memory=f"lower --teacher-batch; {again}",
                disk=f"check the path, free some space, or name another --out; then {again}")


if __name__ == "__main__":
    main()

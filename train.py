"""
Images + questions -> an RPN, distilled from the model's own attention: Algorithm 1.

    python train.py                                  # the toy: three minutes, a table and a picture
    python train.py --ckpt llava-1.5-7b              # questions from data/llava_mix.jsonl
    torchrun --nproc_per_node 4 train.py --ckpt llava-1.5-7b

You can stop a run at any time; run the same command to resume. Ctrl-C loses nothing, kill -9 at
most the last five minutes. Everything lands in out/<ckpt name>/ (--out). Boxes and answers of the
data are not used. The numbers in train() are the lines of Alg. 1 in arXiv's HTML, where Require and
Ensure are lines 1 and 2 (the paper's text counts two less).
Left out: callbacks, mixed data sets, and evaluation beyond the toy, which infer.py --eval does.
Shapes: b samples of a group, n turns, T tokens, N = h*w image tokens, D hidden width, H heads.
"""
import argparse
import hashlib
import math
import os
import random
import shlex
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

# On 2 cores, threads that wait passively train the toy a quarter slower than threads that spin, but
# twice as fast beside two busy programs (tests/speed/bench.py --only busy).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

from clip import BadInput, load_image
from data.checkpoints import NAMES, find_checkpoint, run_name
from data.files import write_text
from data.program import at_least_1, between_0_and_1, join_processes, log, run_program
from data.questions import read_questions
from data.run import Run
from model import DTYPES, ROOT, load, wider
from sdrpn import (RPN, Recipe, check_depth, conversation, load_recipe, make_labels,
                   prefix_layers, roi_loss, teach, teacher_question, training_view)

TOY = "toy scenes"  # a recipe's train.data, where the checkpoint brings its own questions


# ------------------------------------------------------------------------------------- Algorithm 1

def train(m, recipe, questions, run, largest_group=8, max_new_tokens=128):
    """Algorithm 1 -> a trained RPN, which is also saved in the run's folder.

    Raises BadInput, FloatingPointError; SystemExit on Ctrl-C.
    """
    B, R, training = recipe.frozen_layers, recipe.rpn_layers, recipe.train
    rpn = RPN.from_layers(m, B, R).to(wider(m.dtype))  # 3
    optimizer = torch.optim.AdamW(rpn.parameters(), betas=training.betas, weight_decay=0.0,
                                  fused=m.device.type == "cuda", foreach=False)
    run.restore(rpn, optimizer)

    for step, samples in run.steps(partial(read_sample, m, recipe, questions, max_new_tokens)):
        labelled_before = all(sample.number in run.labels for sample in samples)
        counts = torch.zeros(4, dtype=torch.float64)
        optimizer.zero_grad()
        for group in make_groups(samples, largest_group):  # 4: (x_v, x_t) of D
            pixels = torch.stack([sample.pixels for sample in group])  # (b, 3, H, W)
            if labelled_before:  # in an earlier epoch: the student needs only the B frozen layers
                prefix = m.prefill(pixels, keep=(B,), depth=B)
            else:
                prefix = m.prefill(pixels, keep=prefix_layers(group[0].recipe))
                run.labels |= label_group(m, group, pixels, prefix, max_new_tokens)  # 6-12
            labels, responses = zip(*(run.labels[sample.number] for sample in group))
            labels = torch.stack(labels).to(m.device)  # (b, n, N)
            hidden, columns, rows, rope = student_states(m, B, group, responses, prefix)  # 15
            del prefix  # the backward pass needs its memory
            with torch.autocast(m.device.type, torch.bfloat16, enabled=m.dtype.itemsize == 2):
                scores = rpn.score(hidden, columns, rows, rope)  # 15-17: (b, H, n, N)
            loss = group_loss(scores, labels)  # lines 13 and 18, summed over the labelled tokens
            loss.backward()
            known = (labels >= 0).flatten(1)  # (b, n*N)
            unlabelled = (~known.any(1)).sum()
            counts += counts.new_tensor([loss.item(), known.sum(), unlabelled, len(group)])
        if not labelled_before:
            run.write_labels([sample.number for sample in samples])

        loss, labelled, *others = run.add_up(counts, rpn.parameters())
        lr = learning_rate(training.lr, training.warmup, step, run.total_steps)
        if labelled:
            for p in rpn.parameters():
                p.grad /= labelled  # 18: the mean over the whole step, on all processes
            norm = torch.nn.utils.clip_grad_norm_(rpn.parameters(), training.clip)
            if not norm.isfinite():
                raise FloatingPointError(f"step {step}: the gradient is {norm.item()}; use a lower "
                                         "--lr or --dtype float32, with --fresh")
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()  # 19
        run.record(lr, loss / max(labelled, 1), labelled, *others)

    rpn.eval().requires_grad_(False).to(m.dtype)
    rpn.tau = recipe.tau
    run.finish(rpn, {"frozen": B, "layers": R, "tau": recipe.tau, "budget": recipe.budget,
                     "ckpt": m.folder.name, "fingerprint": m.fingerprint, "settings": run.settings})
    return rpn


@dataclass
class Sample:
    number: int                # in the data set
    turns: list                # its n questions
    recipe: Recipe             # for this kind of question
    pixels: torch.Tensor       # (3, H, W)
    has_picture: torch.Tensor  # (h, w) bool; the other cells are padding
    group: tuple               # samples that agree in this can share a batch


def read_sample(m, recipe, questions, max_new_tokens, number):
    """-> Sample. Raises BadInput if the picture cannot be read, or the model has too little room.

    The samples of a group have prompts of one length, one grid and one recipe. A conversation is
    alone, since its answers differ in length.
    """
    picture, q = questions[number]
    recipe, turns = recipe.for_kind(q.get("kind")), q["question"]
    pixels, letterbox = training_view(m, recipe, picture)
    has_picture = letterbox.holds_picture()
    earlier = [(turn, "") for turn in turns[:-1]]
    prompt = m.prompt_ids(teacher_question(recipe, turns[-1]), earlier)
    m.check_length(len(prompt) - 1 + has_picture.numel() + len(turns) * max_new_tokens)
    lengths = len(prompt), len(m.prompt_ids(turns[0]))
    alone = number if len(turns) > 1 else -1
    group = lengths, tuple(pixels.shape), alone, repr(recipe)
    return Sample(number, turns, recipe, pixels, has_picture, group)


def make_groups(samples, largest):
    """Samples -> lists of at most `largest` that share a batch."""
    groups = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    for key in sorted(groups):
        for at in range(0, len(groups[key]), largest):
            yield groups[key][at:at + largest]


def label_group(m, group, pixels, prefix, max_new_tokens):
    """Lines 6-12: the teacher answers turn by turn, after its own answers to the turns before.

    -> {number of the sample: (labels (n, N) int8, its n responses)}
    """
    recipe, labels, responses = group[0].recipe, [], [[] for _ in group]
    for turn in range(len(group[0].turns)):
        prompts = []
        for sample, answers in zip(group, responses):
            question = teacher_question(recipe, sample.turns[turn])
            prompts.append(m.prompt_ids(question, zip(sample.turns, answers)))
        lesson = teach(m, recipe, pixels, prompts, max_new_tokens, prefix)  # 6-11
        labels.append(make_targets(lesson, group))  # 12: (b, N)
        for answers, response in zip(responses, lesson.responses):
            answers.append(response)
    labels = torch.stack(labels, 1).cpu()  # (b, n, N)
    return {sample.number: made for sample, *made in zip(group, labels, responses)}


def make_targets(lesson, group):
    """Line 12: what the student learns of each sample, (b, N) int8. Ablations replace it."""
    targets = []
    for clean, sample in zip(lesson.clean, group):
        targets.append(make_labels(clean, sample.recipe, sample.has_picture))
    return torch.stack(targets).to(torch.int8)


@torch.no_grad()
def student_states(m, B, group, responses, prefix):
    """Line 15: questions and the teacher's answers through layers 0..B-1, behind the pictures.

    -> hidden (b, T, D), the image's columns and the n query tokens' rows in T, rope (2, T, d).
    """
    tails = []
    for sample, answers in zip(group, responses):
        ids, rows = conversation(m, sample.turns, answers, prefix.grid)
        tails.append(m.embed(m.tail(ids)))
    tail = torch.cat(tails)  # (b, t, D)
    rope = m.text_rope(prefix.position, tail.shape[1])
    tail = m.run(tail, 0, B, rope, prefix.cache, prefix.columns.stop)
    hidden = torch.cat([prefix.hidden[B], tail], 1).to(wider(m.dtype))
    rope = torch.cat([prefix.rope, rope], 1)
    return hidden, prefix.columns, rows, rope  # the last sample's rows are those of all


def group_loss(scores, labels):
    """Lines 13, 18: scores (b, H, n, N), labels (b, n, N) -> loss summed over the labelled tokens.

    Its division by their number waits for the whole step. Ablations replace it.
    """
    return roi_loss(scores.mean(1), labels, count=1)


def learning_rate(peak, warmup, step, steps):
    """Linear up over the first `warmup` of the steps, then a cosine down to 0."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


# --------------------------------------------------------------------------- a run, from its flags

class FileQuestions:
    """A question file's (picture, question) by number; `samples` of them, shuffled, if given."""

    def __init__(self, path, images=None, samples=None, seed=0):
        self.questions, self.root = read_questions(path, images)
        if samples:
            random.Random(seed).shuffle(self.questions)
            self.questions = self.questions[:samples]

    def __len__(self):
        return len(self.questions)

    def __getitem__(self, i):
        q = self.questions[i]
        return load_image(self.root / q["image"]), q


def open_questions(training, images, samples, seed):
    """-> the questions to train on, and what identifies them in the run's settings."""
    if training.data == TOY:
        from data.toy.scenes import ToyQuestions
        return ToyQuestions(f"train/{seed}", training.samples), TOY
    path = Path(training.data or ROOT / "data" / "llava_mix.jsonl")
    if training.data is None and not path.is_file():
        raise BadInput(f"{path} is missing; make it with: python data/llava_mix.py "
                       "llava_v1_5_mix665k.json --images IMAGES")
    questions = FileQuestions(path, images, samples, seed)  # not the recipe's, which counts scenes
    return questions, hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def override(record, args):
    """Copy a dataclass, replacing the fields for which a flag of the same name was given."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    names = given.keys() & vars(record).keys()
    return replace(record, **{name: given[name] for name in names})


def finish(m, rpn, recipe, questions, run, max_new_tokens):
    """Write report.png and out/last, and print the toy's table."""
    from data.toy.compare import compare, report
    if recipe.train.data == TOY:
        from data.toy.scenes import ToyQuestions
        questions = ToyQuestions("held-out", recipe.train.held_out)
    report(m, rpn, recipe, questions, run.out / "report.png", max_new_tokens)
    if recipe.train.data == TOY:
        log(f"comparing five methods on {len(questions)} new questions")
        print(compare(m, rpn, recipe, questions))
    path = run.out / "rpn.safetensors"
    (ROOT / "out").mkdir(exist_ok=True)
    write_text(ROOT / "out" / "last", os.path.relpath(run.out, ROOT / "out") + "\n")
    log(f"wrote {path} and {run.out / 'report.png'}; ask it something:")
    words = ["--ckpt", run.settings["ckpt"], "--rpn", str(path.resolve())]
    program = shlex.quote(os.path.relpath(ROOT / "infer.py"))
    log(f'python {program} IMAGE "question" {shlex.join(words)}')


# ------------------------------------------------------------------------------------ command line

def parser():
    p = argparse.ArgumentParser(
        "train.py", description="Distil an RPN from a model's own attention.")
    add = p.add_argument
    add("--ckpt", default="toy",
        help=f"checkpoint folder, or one of {', '.join(NAMES)}; default: toy")
    add("--data",
        help="question file; default: the toy draws its own scenes, else data/llava_mix.jsonl")
    add("--images", type=Path, help="folder that the question file's image paths are relative to")
    add("--out", type=Path, help="folder of this run; default: out/<ckpt name>")
    add("--samples", type=at_least_1,
        help="train on this many questions, shuffled with --seed; 10000 already helps (Table 4b)")
    add("--seed", type=int, default=0, help="order of the data; default: 0")
    add("--batch-size", type=at_least_1, help="a step is this times --grad-accum samples")
    add("--grad-accum", type=at_least_1,
        help="see --batch-size; a step has as many samples on any number of processes")
    add("--teacher-batch", type=at_least_1, default=8,
        help="most samples at a time, teacher and student; lower it when memory runs out; "
             "default: 8")
    add("--lr", type=between_0_and_1, help="peak learning rate; lower it if the loss jumps")
    add("--epochs", type=at_least_1,
        help="passes over the questions; labels are made in the first only")
    add("--frozen-layers", type=at_least_1, help="B: decoder layers below the RPN (Table 4a)")
    add("--rpn-layers", type=at_least_1, help="R: trainable blocks (Table 7)")
    add("--max-new-tokens", type=at_least_1, default=128,
        help="longest answer of the teacher; default: 128")
    add("--max-bad", type=float, default=1.0,
        help="stop if more than this percentage of the samples cannot be read; default: 1")
    add("--held-out", type=at_least_1,
        help="toy: new questions to compare the methods on at the end; default: the recipe's")
    add("--save-every", type=float, default=300, help="seconds between resume points; default: 300")
    add("--device", help="cpu, cuda, cuda:1, or mps (untested); default: a GPU if there is one")
    add("--dtype", choices=DTYPES,
        help="of the frozen weights; default: bfloat16, the toy on a CPU float32")
    add("--fresh", action="store_true", help="delete what --out holds and start over")
    p.epilog = "Values without a default here come from the checkpoint's recipe."
    return p


def work(args):
    device, folder = join_processes(args.device), find_checkpoint(args.ckpt)
    recipe = load_recipe(folder)
    recipe = replace(override(recipe, args), train=override(recipe.train, args))
    training = recipe.train
    questions, source = open_questions(training, args.images, args.samples, args.seed)
    toy_on_cpu = source == TOY and device == "cpu"
    m = load(folder, device, args.dtype or ("float32" if toy_on_cpu else "bfloat16"))
    check_depth(m, recipe.frozen_layers, recipe.rpn_layers)  # before a folder is made
    m.budget = recipe.budget or m.budget
    settings = asdict(recipe)
    settings |= settings.pop("train") | {
        "samples": None, "held_out": None, "seed": args.seed, "data": source,
        "max_new_tokens": args.max_new_tokens,
        "images": args.images and str(args.images.resolve()), "questions": len(questions),
        "ckpt": str(folder.resolve()) if Path(args.ckpt).is_dir() else args.ckpt,
        "fingerprint": m.fingerprint, "dtype": str(m.dtype)}
    run = Run(args.out or ROOT / "out" / run_name(args.ckpt), settings, len(questions),
              training.batch_size * training.grad_accum, training.epochs, args.fresh,
              args.save_every, args.max_bad)
    try:
        if run.finished:
            log(f"{run.out} holds this very run, finished; --fresh trains it again")
            rpn = RPN.load(run.out / "rpn.safetensors", m)
        else:
            log(f"{folder} on {device} in {str(m.dtype)[6:]}, {torch.get_num_threads()} thread(s), "
                f"{run.world} process(es); {run.total_steps} steps of {run.batch}")
            group = min(args.teacher_batch, training.batch_size)
            rpn = train(m, recipe, questions, run, group, args.max_new_tokens)
        if run.rank == 0:
            finish(m, rpn, recipe, questions, run, args.max_new_tokens)
    finally:
        run.close()


def main(argv=None):
    again = "run the same command to resume"
    run_program(parser(), work, argv, memory=f"lower --teacher-batch or --rpn-layers; {again}",
                again=f"stopped; {again}")


if __name__ == "__main__":
    main()

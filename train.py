"""
Images + questions -> an RPN, distilled from the model's own attention (Alg. 1): teacher and student in one pass.

    python train.py                                            # the toy: two minutes on a laptop, ends with a table and a picture
    python train.py --ckpt llava-1.5-7b                        # questions from data/llava_mix.jsonl
    torchrun --nproc_per_node 4 train.py --ckpt llava-1.5-7b

Stopped at any moment, the same command goes on. Everything lands in out/<ckpt name>/ (--out): labels/, log.jsonl, config.json,
and at the end rpn.safetensors and report.png. No box and no answer of the data is used (--answers given: Table 4b's ablation).
Left out: callbacks, mixed data sets, and evaluation of anything but the toy (infer.py --eval does that).
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clip import load_image, preprocess
from data import draw, metrics
from data.files import BadInput, Labels, write_file, write_text
from data.questions import read_questions
from data.toy.scenes import ToyQuestions
from model import ROOT, LLaVA, find_checkpoint, read_json, run_name
from sdrpn import (RPN, answer, assign_labels, load_recipe, regions_above, roi_loss_sum, smooth, teach)

FILES = ("rpn.safetensors", "resume.safetensors", "labels", "log.jsonl", "report.png", "skipped.jsonl", "config.json")  # all a run writes
TOO_FAR = "the learning rate is likely too high or the dtype too narrow: use --dtype float32 or a lower --lr, with --fresh"
TOY_TRAIN, TOY_HELD_OUT = "train", "held-out"  # names of the scenes' random streams


def say(*words):
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ data

class FileQuestions:
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


# --------------------------------------------------------------------------------------------- teacher

def target(lesson, row, args, grid):
    """What the student learns of one sample (1, N): labels (Eq. 2), or for --loss mse the raw map, normalised to sum 1 (Table 3 #2)."""
    if args.loss == "mse":
        raw = lesson.raw[row:row + 1]
        return raw / raw.sum().clamp(min=1e-12)
    clean = lesson.clean[row:row + 1]
    if args.smooth == "labels":
        clean = smooth(clean.view(1, grid, grid)).flatten(1)
    return assign_labels(clean, grid).to(torch.int8)


def conversation_ids(llava, turns, responses):
    """All turns with the model's own answers, up to the last question; and the n query tokens' places in it (Eq. 4).

    n = 2:  <s>SYSTEM USER: <image> question 1 ASSISTANT: answer 1</s>USER: question 2 ASSISTANT:
                                                        ^ row 1                                 ^ row 2, the last token
    The decoder is causal: row 1 sees nothing of turn 2, so one forward pass teaches all turns.
    """
    prompts = [llava.prompt_ids(turn, list(zip(turns[:n], responses))) for n, turn in enumerate(turns)]
    return prompts[-1], [len(ids) - 1 + llava.num_image_tokens - 1 for ids in prompts]  # the image's one id stands for N tokens


# ---------------------------------------------------------------------------------------------- the run

class Run:
    def __init__(self, args):
        self.args, self.stop = args, False
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        folder = find_checkpoint(args.ckpt)
        recipe_file = folder / "recipe.json"
        training = read_json(recipe_file).get("train") if recipe_file.is_file() else None
        self.toy = isinstance(training, dict) and training.get("data") == "toy scenes"
        device = args.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
        dtype = args.dtype or ("float32" if self.toy and device == "cpu" else "bfloat16")
        self.out = Path(args.out) if args.out else ROOT / "out" / run_name(args.ckpt)
        if args.data is None and not self.toy:
            args.data = ROOT / "data" / "llava_mix.jsonl"
            if not args.data.is_file():
                raise BadInput(f"{args.data} is missing; make it with: python data/llava_mix.py llava_v1_5_mix665k.json --images IMAGES")
        self.llava = llava = LLaVA.load(folder, device, dtype)
        say(f"{folder} on {device} ({'--device' if args.device else 'default'}) in {dtype} ({'--dtype' if args.dtype else 'default for training'})")
        self.recipe = recipe = load_recipe(llava)
        r = recipe["train"]
        for key in ("lr", "epochs", "batch_size", "grad_accum", "samples"):
            if getattr(args, key) is None:
                setattr(args, key, r.get(key))
        args.frozen_layers, args.rpn_layers = args.frozen_layers or recipe["frozen"], args.rpn_layers or recipe["layers"]
        self.questions = ToyQuestions(f"{TOY_TRAIN}/{args.seed}", args.samples) if args.data is None else \
            FileQuestions(args.data, args.images, args.samples, args.seed)
        self.global_batch = args.batch_size * args.grad_accum  # whatever the number of processes
        self.steps_per_epoch = -(-len(self.questions) // self.global_batch)
        self.steps = args.epochs * self.steps_per_epoch
        self.rpn = RPN.from_layers(llava, args.frozen_layers, args.rpn_layers)
        if llava.dtype == torch.float64:
            self.rpn.double()
        self.optimizer = torch.optim.AdamW(self.rpn.parameters(), lr=args.lr, betas=r["betas"], weight_decay=0.0)
        self.amp = torch.autocast(llava.device.type, torch.bfloat16) if llava.dtype in (torch.bfloat16, torch.float16) else contextlib.nullcontext()
        source = "toy scenes" if args.data is None else hashlib.sha256(Path(args.data).read_bytes()).hexdigest()[:16]
        self.settings = {"fingerprint": llava.fingerprint, "data": source, "questions": len(self.questions), "recipe": recipe} | {
            k: getattr(args, k) for k in ("seed", "lr", "epochs", "batch_size", "grad_accum", "frozen_layers", "rpn_layers", "loss",
                                          "sink_removal", "answers", "smooth", "max_new_tokens")} | {"dtype": str(llava.dtype)[6:]}

    # ---- one step

    def batch(self, step):
        """This process's share of the step's samples: the order is a function of seed and epoch alone."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.questions)))
        random.Random(f"{self.args.seed}/{epoch}").shuffle(order)
        return order[at * self.global_batch:(at + 1) * self.global_batch][self.rank::self.world]

    def read(self, samples):
        """Images and turns of the readable ones, in groups of one prompt length of at most --teacher-batch."""
        groups = {}
        for i in samples:
            try:
                image, q = self.questions[i]
                if self.args.answers == "given" and len(q.get("answers") or ()) < len(q["question"]):
                    raise BadInput("fewer answers than turns, and --answers given needs one for each")
                length = len(self.llava.prompt_ids(q["question"][0])) - 1 + self.llava.num_image_tokens
                self.llava.check_length(length + self.args.max_new_tokens)
                key = (length, i if len(q["question"]) > 1 else -1)  # several turns: alone, answers of different length follow the first
            except BadInput as e:
                self.skipped[i] = str(e)
                continue
            groups.setdefault(key, []).append((i, preprocess(image, self.llava.vision_tower.image_size), q))
        for key in sorted(groups):
            for at in range(0, len(groups[key]), self.args.teacher_batch):
                yield groups[key][at:at + self.args.teacher_batch]

    def teach(self, group):
        """-> targets and responses per sample; and (hidden, image, rows) that the student goes on from, or None (several turns)."""
        llava, args = self.llava, self.args
        pixels = torch.stack([p for _, p, _ in group])
        how = dict(max_new_tokens=args.max_new_tokens, sinks=args.sink_removal, frozen=args.frozen_layers)
        targets, responses = [[] for _ in group], [[] for _ in group]
        for turn in range(len(group[0][2]["question"])):
            prompts = [llava.prompt_ids(q["question"][turn], list(zip(q["question"], r)))  # r: one response for each turn before
                       for (_, _, q), r in zip(group, responses)]
            given = [llava.tokenizer.encode(q["answers"][turn])[:args.max_new_tokens - 1] for _, _, q in group] if args.answers == "given" else None
            llava.check_length(max(map(len, prompts)) - 1 + llava.num_image_tokens + args.max_new_tokens)
            lesson = teach(llava, self.recipe, pixels, prompts, given=given, **how)
            if not lesson.raw.isfinite().all():
                raise FloatingPointError("attention is not finite; likely the dtype: try --dtype float32")
            for row in range(len(group)):
                targets[row].append(target(lesson, row, args, llava.grid))
                responses[row].append(lesson.responses[row])
        one_turn = len(responses[0]) == 1
        return [torch.cat(t).cpu() for t in targets], responses, (lesson.hidden, lesson.image, [-1]) if one_turn else None

    def backbone(self, group, responses):
        """The frozen layers alone: hidden states (b, T, D), the image's columns, the query rows. Labels come from disk."""
        llava = self.llava
        tokens = llava.encode_images(torch.stack([p for _, p, _ in group]))
        prompts = [conversation_ids(llava, q["question"], r) for (_, _, q), r in zip(group, responses)]
        embeds = [llava.embed_prompt(ids, tokens[k:k + 1]) for k, (ids, _) in enumerate(prompts)]
        with torch.no_grad():
            return llava.run(torch.cat([e for e, _ in embeds]), 0, self.args.frozen_layers), embeds[0][1], prompts[0][1]

    def loss_sum(self, hidden, image, rows, targets):
        """Student: (b, T, D) and targets (b, n, N) -> summed loss, number of labelled tokens."""
        with self.amp:
            scores = self.rpn.score(hidden.to(next(self.rpn.parameters()).dtype), image, rows)  # (b, H, n, N)
        if self.args.loss == "mse":
            return (100 * scores.softmax(-1).mean(1) - 100 * targets).square().sum(), targets.numel()  # in percent, or the loss is tiny
        return roi_loss_sum(scores.mean(1), targets), (targets >= 0).sum().item()  # of (b, n, N) and (b, n, N)

    def learn(self, group, known, made):
        """Labels of one group (read, or made now) and the student's gradient -> (loss, labelled tokens, samples without a label, samples)."""
        if known:
            targets, responses = zip(*(self.labels.read(i) for i, _, _ in group))
            student = self.backbone(group, responses)
        else:
            targets, responses, student = self.teach(group)
            made |= {i: (t, r) for (i, _, _), t, r in zip(group, targets, responses)}
            student = student or self.backbone(group, responses)
        hidden, image, rows = student
        targets = torch.stack(targets).to(self.llava.device)  # (b, n, N)
        empty = (targets < 0).all(-1).all(-1).sum().item() if self.args.loss == "bce" else 0
        total = torch.tensor([0, 0, empty, len(group)], dtype=torch.float64)
        for at in range(0, len(group), self.args.batch_size):
            part = slice(at, at + self.args.batch_size)
            loss, count = self.loss_sum(hidden[part], image, rows, targets[part])
            loss.backward()
            total[:2] += torch.tensor([loss.item(), count], dtype=torch.float64)
        if not total.isfinite().all():
            raise FloatingPointError(f"loss {total[0]}; {TOO_FAR}")
        return total

    def step(self, step):
        """One optimiser step over the global batch: {loss, tokens, empty, samples}."""
        args, device = self.args, self.llava.device
        if self.world > 1 and step % self.steps_per_epoch == 0:  # from now on a process meets samples that another one labelled
            dist.barrier()
            self.labels.refresh()
        samples = self.batch(step)
        known = all(i in self.labels.where or i in self.skipped for i in samples)
        made, total = {}, torch.zeros(4, dtype=torch.float64)  # loss, labelled tokens, samples without a label, samples
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.read([i for i in samples if i not in self.skipped] if known else samples):
            try:
                total += self.learn(group, known, made)
            except FloatingPointError as e:
                raise FloatingPointError(f"step {step}, samples {[q.get('id', i) for i, _, q in group]}: {e}") from None
            except BadInput as e:
                if len(group[0][2]["question"]) == 1:
                    raise
                self.skipped[group[0][0]] = str(e)  # a conversation, always alone in its group, that outgrew the context
        if made:
            self.labels.write(f"{step:06d}-{self.rank}of{self.world}", list(made), [t for t, _ in made.values()], [r for _, r in made.values()])
        if self.world > 1:
            total = total.to(device)
            dist.all_reduce(total)
            dist.all_gather_object(everywhere := [None] * self.world, self.skipped)
            self.skipped = {i: why for skipped in everywhere for i, why in skipped.items()}
            for p in self.rpn.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        loss, count, empty, seen = total.tolist()
        if count:
            for p in self.rpn.parameters():
                p.grad /= count
            norm = torch.nn.utils.clip_grad_norm_(self.rpn.parameters(), self.recipe["train"]["clip"])
            if not norm.isfinite():
                raise FloatingPointError(f"step {step}, samples number {samples[:8]} and on: gradient norm {norm.item()}; {TOO_FAR}")
            warm = max(1, round(self.recipe["train"]["warmup"] * self.steps))
            progress = (step - warm) / max(1, self.steps - warm)
            lr = args.lr * ((step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * progress)))
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
        return {"loss": loss / max(count, 1), "tokens": int(count), "empty": int(empty), "samples": int(seen),
                "lr": self.optimizer.param_groups[0]["lr"]}

    # ---- stop and go on

    def save(self, step):
        """resume.safetensors: weights, AdamW moments, step. The data order needs no state: it follows from the seed."""
        if self.rank:
            return
        tensors = {f"rpn.{k}": v for k, v in self.rpn.state_dict().items()}
        for i, p in enumerate(self.rpn.parameters()):
            tensors |= {f"adam.{i}.{k}": v for k, v in self.optimizer.state.get(p, {}).items()}
        tensors, facts = {k: v.contiguous() for k, v in tensors.items()}, {"step": str(step), "skipped": json.dumps(self.skipped)}
        write_file(self.out / "resume.safetensors", lambda partial: save_file(tensors, partial, metadata=facts))

    def restore(self):
        """-> the step to go on with. Makes the folder, removes a crash's leftovers, refuses other settings."""
        out, config = self.out, self.out / "config.json"
        if self.rank == 0:
            if self.args.fresh and config.is_file():
                for name in FILES:
                    shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
            if out.is_dir() and not config.is_file() and any(p.name != "config.json.partial" for p in out.iterdir()):
                raise BadInput(f"{out}: not empty and not a run of this program; name another --out")
            out.mkdir(parents=True, exist_ok=True)
            for leftover in [*out.glob("*.partial"), *out.glob("labels/*.partial")]:
                leftover.unlink()
            if config.is_file():
                try:
                    old = dict(json.loads(config.read_text(encoding="utf-8")))
                except (ValueError, TypeError, RecursionError):
                    raise BadInput(f"{config}: damaged; use --fresh to start over, or another --out") from None
                changed = [k for k in self.settings if old.get(k) != json.loads(json.dumps(self.settings[k]))]
                if changed:
                    raise BadInput(f"{out}: holds a run with another {', '.join(changed)}; use --fresh to start over, or another --out")
            else:
                write_text(config, json.dumps({"ckpt": str(self.args.ckpt)} | self.settings, indent=1) + "\n")
        if self.world > 1:
            dist.barrier()
        self.labels, self.skipped = Labels(out / "labels"), {}
        path = out / "resume.safetensors"
        if (out / "rpn.safetensors").is_file():
            say(f"{out} holds this very run, finished; --fresh trains it again")
            self.rpn = RPN.load(out / "rpn.safetensors", self.llava)
            return self.steps
        if not path.is_file():
            return 0
        try:
            with safe_open(path, framework="pt") as f:
                step, tensors = int(f.metadata()["step"]), {k: f.get_tensor(k).to(self.llava.device) for k in f.keys()}
                self.skipped = {int(k): v for k, v in json.loads(f.metadata()["skipped"]).items()}
            self.rpn.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("rpn.")})
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise BadInput(f"{path}: damaged; delete it to start at step 0 with the labels kept, or use --fresh") from None
        for i, p in enumerate(self.rpn.parameters()):
            self.optimizer.state[p] = {k.split(".")[2]: v.cpu() if k.endswith("step") else v.clone()
                                       for k, v in tensors.items() if k.startswith(f"adam.{i}.")}
        say(f"going on at step {step} of {self.steps}; {len(self.labels.where)} samples are labelled")
        return step

    def train(self):
        args, log = self.args, self.out / "log.jsonl"
        step = self.restore()
        if step == self.steps and not (self.out / "resume.safetensors").is_file():
            return
        if self.rank == 0:
            lines = log.read_text(errors="replace").splitlines()[:step] if log.is_file() else []
            write_text(log, "".join(line + "\n" for line in lines))
        parameters = sum(p.numel() for p in self.rpn.parameters())
        say(f"{len(self.questions)} questions, {self.steps} steps of {self.global_batch}; RPN: layers {args.frozen_layers}.."
            f"{args.frozen_layers + args.rpn_layers - 1}, {parameters / 1e6:.1f} M parameters; {self.world} process(es)")
        self.stop = False
        before = signal.signal(signal.SIGINT, self.finish_step)
        began, saved, first, mean, empty, seen = time.time(), time.time(), step, None, 0, 0
        while step < self.steps:
            row = self.step(step)
            step += 1
            mean = row["loss"] if mean is None else 0.95 * mean + 0.05 * row["loss"]
            empty, seen = empty + row["empty"], seen + row["samples"]
            if self.rank == 0:
                with open(log, "a") as f:
                    f.write(json.dumps({"step": step, **row, "seconds": round(time.time() - began, 3)}) + "\n")
            eta = (time.time() - began) / (step - first) * (self.steps - step)
            memory = f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if self.llava.device.type == "cuda" else ""
            say(f"\rstep {step}/{self.steps} ({100 * step / self.steps:.0f}%) | loss {mean:.4f} | lr {row['lr']:.1e} | empty {empty}/{seen} | "
                f"{seen / (time.time() - began):.1f} samples/s{memory} | ETA {eta:.0f} s ")
            if empty > 0.5 * seen and (step == self.steps or seen >= 256 > seen - row["samples"]):  # once early, once at the end
                say(f"warning: {100 * empty / seen:.0f} % of the samples had no label at all: the recipe's heads hardly point anywhere "
                    "(`python tests/tables.py heads`)")
            if len(self.skipped) > args.max_bad / 100 * len(self.questions):
                self.list_skipped()
                raise BadInput(f"{len(self.skipped)} of {len(self.questions)} samples are bad, more than --max-bad {args.max_bad} %; "
                               f"see {self.out / 'skipped.jsonl'}")
            stop = torch.tensor(float(self.stop))
            if self.world > 1:
                stop = stop.to(self.llava.device)
                dist.all_reduce(stop)
            if stop or time.time() - saved > args.save_every:
                self.save(step)
                saved = time.time()
            if stop:
                say("stopped after a whole step; the same command goes on" + " (without --fresh)" * args.fresh)
                sys.exit(130)
        signal.signal(signal.SIGINT, before)
        self.list_skipped()
        if self.rank:
            return
        facts = {"frozen": args.frozen_layers, "layers": args.rpn_layers, "ckpt": self.llava.folder.name, "step": step,
                 "smooth": args.smooth, "loss": args.loss, "fingerprint": self.llava.fingerprint, "recipe": self.recipe}
        self.rpn.eval().requires_grad_(False).to(self.llava.dtype)
        self.rpn.save(self.out / "rpn.safetensors", facts)
        (self.out / "resume.safetensors").unlink(missing_ok=True)

    def finish_step(self, *_):
        """Ctrl-C: stop after this step. A second one stops at once (with torchrun, which sends it twice, none does)."""
        self.stop = True
        if self.world == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def list_skipped(self):
        if self.skipped and self.rank == 0:
            write_text(self.out / "skipped.jsonl", "".join(json.dumps({"sample": i, "why": why}) + "\n" for i, why in sorted(self.skipped.items())))


# ---------------------------------------------------------------------------------------------- results

def attention_mask(raw, grid):
    """Table 3 #1: the raw map (N,), smoothed, above 0.15 of its maximum -> (g, g) weights for answer(mask=...), or None."""
    p = smooth(raw.view(grid, grid).float().cpu())
    regions = regions_above(p, 0.15 * p.max().item())
    # A grown region may own cells of weight 0: a little keeps them in the mask.
    return torch.where(torch.stack([r.cells for r in regions]).any(0), p.clamp(min=1e-9), 0.0) if regions else None


def true_mask(boxes, grid, size):
    """Cells that overlap a true box (source pixels) -> (g, g) bool, or None without a box."""
    side, mask = max(size), torch.zeros(grid, grid, dtype=torch.bool)
    pad, cell = [(side - s) // 2 for s in size], side / grid
    for x0, y0, x1, y1 in boxes:
        x0, x1, y0, y1 = (max(v, 0) for v in (x0 + pad[0], x1 + pad[0], y0 + pad[1], y1 + pad[1]))
        mask[int(y0 / cell):math.ceil(y1 / cell), int(x0 / cell):math.ceil(x1 / cell)] = True
    return mask if mask.any() else None


METHODS = ("plain", "raw attention", "SD-RPN box", "SD-RPN masked", "true box")


def ask(llava, rpn, recipe, image, q, method, max_new_tokens=32):
    """One question by one method -> Answer: its text, the source boxes that were cropped, the time of each stage."""
    question, g = q["question"][-1], llava.grid
    if method == "plain":
        mode, mask = "plain", None
    elif method == "raw attention":  # the whole plain answer first, then its attention
        lesson = teach(llava, recipe, preprocess(image, llava.vision_tower.image_size)[None], [llava.prompt_ids(question)], max_new_tokens, sinks=False)
        mask = attention_mask(lesson.raw[0], g)
        mode = "box" if mask is not None else "plain"
    elif method == "true box":
        mask = true_mask(q["boxes"], g, image.size)
        mode = "box" if mask is not None else "plain"
    else:
        mode, mask = ("box" if method == "SD-RPN box" else "mask"), None
    return answer(llava, rpn, image, question, mode, recipe["tau"], max_new_tokens, mask=mask)


def report(run, questions, path):
    """The contact sheet of Figures 2 and 6: picture, raw attention, without sinks, labels, RPN map."""
    llava, rows = run.llava, []
    for n in range(min(6, len(questions))):
        try:
            image, q = questions[n]
        except BadInput:  # listed in skipped.jsonl already
            continue
        g = llava.grid
        lesson = teach(llava, run.recipe, preprocess(image, llava.vision_tower.image_size)[None], [llava.prompt_ids(q["question"][0])],
                       sinks=run.args.sink_removal)
        maps = [m.view(g, g).float().cpu().numpy() for m in (lesson.raw, lesson.clean)]
        labels = target(lesson, 0, run.args, g).view(g, g).cpu().numpy()
        heat = run.rpn(llava, image, q["question"][0]).sigmoid().cpu().numpy()
        rows.append({"image": image, "maps": [*maps, labels, heat], "title": f"{q['question'][0]}  {lesson.responses[0]}"})
    draw.save(draw.contact_sheet(rows, ["image", "attention", "without sinks", "labels", "RPN"]), path)


def parser():
    p = argparse.ArgumentParser(description="Distil an RPN from a LLaVA's own attention.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--ckpt", default="toy", help="checkpoint folder, or toy, llava-1.5-7b, llava-1.5-13b")
    p.add_argument("--data", type=Path, help="question file; the toy draws its own scenes, else data/llava_mix.jsonl")
    p.add_argument("--images", type=Path, help="folder that the question file's image paths are relative to")
    p.add_argument("--out", help="folder of this run; default out/<ckpt name>")
    p.add_argument("--samples", type=int, help="train on this many questions, shuffled with --seed; 10000 already helps (Table 4b)")
    p.add_argument("--seed", type=int, default=0, help="order of the data")
    p.add_argument("--batch-size", type=int, help="samples a student's micro-batch; lower it when the GPU runs out of memory")
    p.add_argument("--grad-accum", type=int, help="micro-batches a step; a step is batch-size x grad-accum samples on any number of processes")
    p.add_argument("--teacher-batch", type=int, default=8, help="questions answered together; lower it when the teacher runs out of memory")
    p.add_argument("--lr", type=float, help="peak learning rate; lower it if the loss jumps")
    p.add_argument("--epochs", type=int, help="passes over the questions; labels are made in the first only")
    p.add_argument("--frozen-layers", type=int, help="B: decoder layers below the RPN (Table 4a)")
    p.add_argument("--rpn-layers", type=int, help="R: trainable blocks (Table 7)")
    p.add_argument("--loss", choices=("bce", "mse"), default="bce", help="mse regresses the raw attention (Table 3 #2)")
    p.add_argument("--no-sink-removal", dest="sink_removal", action="store_false", help="keep sink tokens in the labels (Table 3 #3)")
    p.add_argument("--answers", choices=("own", "given"), default="own", help="whose answers' attention: the model's, or the data set's (Table 4b)")
    p.add_argument("--smooth", choices=("map", "labels"), default="map", help="where the Gaussian goes (Table 8)")
    p.add_argument("--max-new-tokens", type=int, default=128, help="longest answer of the teacher")
    p.add_argument("--max-bad", type=float, default=1.0, help="percent of unreadable samples that is tolerated")
    p.add_argument("--held-out", type=int, help="toy: fresh questions to compare the methods on at the end; default: the recipe's")
    p.add_argument("--save-every", type=float, default=300, help="seconds between resume points")
    p.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    p.add_argument("--dtype", help="of the frozen weights: float16, bfloat16, float32, float64; default bfloat16, the toy on a CPU float32")
    p.add_argument("--fresh", action="store_true", help="throw away what --out holds and start over")
    return p


def main(argv=None):
    p = parser()
    p.error = lambda message: fail(f"{message}; see python train.py --help")
    args = p.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        gpu = torch.cuda.is_available() and args.device != "cpu"
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if gpu else "gloo")
    try:
        for key in ("samples", "batch_size", "grad_accum", "teacher_batch", "epochs", "max_new_tokens", "frozen_layers", "rpn_layers", "held_out"):
            if getattr(args, key) is not None and getattr(args, key) < 1:
                raise BadInput(f"--{key.replace('_', '-')} {getattr(args, key)}: must be at least 1")
        if args.lr is not None and not 0 < args.lr < 10:
            raise BadInput(f"--lr {args.lr}: must be positive and finite")
        run = Run(args)
        run.train()
        if run.rank == 0:
            finish(run)
    except (BadInput, FloatingPointError) as e:
        fail(e)
    except (torch.OutOfMemoryError, MemoryError):
        fail("out of memory; lower --teacher-batch, then --batch-size (raise --grad-accum as much); the same command goes on")
    except OSError as e:
        fail(f"{e.filename or 'disk'}: {e.strerror or e}; free some space or name another --out; the same command goes on")
    except KeyboardInterrupt:
        fail("stopped; the same command goes on", 130)
    except RuntimeError:
        if not first_to_fail():  # a process that lost its partner
            sys.exit(1)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(message, code=2):
    """One line on stderr, from one process: with torchrun the others stop because of it, or for the same reason."""
    if first_to_fail():
        print("train.py:", *str(message).split(), file=sys.stderr)
    sys.exit(code)


def first_to_fail():
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the store went with the process that failed first
        return False


def finish(run):
    """The picture, the table (toy), and out/last; nothing of it for an RPN whose map is no probability."""
    if run.args.loss == "mse":
        return say(f"wrote {run.out / 'rpn.safetensors'}; only `python tests/tables.py table3` reads an RPN of --loss mse")
    held_out = ToyQuestions(TOY_HELD_OUT, run.args.held_out or run.recipe["train"]["held_out"]) if run.args.data is None else run.questions
    report(run, held_out, run.out / "report.png")
    if run.args.data is None:
        methods = {m: lambda image, q, m=m: ask(run.llava, run.rpn, run.recipe, image, q, m).text for m in METHODS}
        print(metrics.compare(held_out, methods, say))
    if run.out.parent == ROOT / "out":
        write_text(ROOT / "out" / "last", run.out.name + "\n")
    say(f"wrote {run.out / 'rpn.safetensors'} and {run.out / 'report.png'}; try: python infer.py IMAGE \"question\"")


if __name__ == "__main__":
    main()

"""A training run's folder, and all of a run that is not the method, so that it may stop and go on.

    run = Run(out, settings, samples=1000, batch=32, epochs=2)
    run.restore(rpn, optimizer)
    for step in run.steps():                 # from the resume point on; Ctrl-C ends after a step
        for i in run.share(step): ...        # this process's samples
        tally = run.reduce(tally)            # gradients and counts of all processes
        run.record(tally, lr)
    run.finish(rpn, facts)

    out/<name>/config.json           the settings; its "sdrpn" key marks the folder as a run
               labels/*.safetensors  one file a step and process, read again in later epochs
               log.jsonl             one line a step
               skipped.jsonl         samples that could not be read, and why
               resume.safetensors    while it runs: weights, AdamW moments, step
               rpn.safetensors       only when training has finished

Left out: what labels mean and how they are made (sdrpn.py, train.py).
Shapes: n turns, N image tokens a sample.
"""
import json
import os
import random
import re
import signal
import sys
import time
from dataclasses import astuple, dataclass, fields

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clip import BadInput
from data.files import load_state, save_state, write_file, write_text
from data.program import say

try:
    import fcntl
except ImportError:  # Windows: two runs on one folder are not noticed there
    fcntl = None

FILES = ("config.json", "resume.safetensors", "rpn.safetensors", "log.jsonl", "skipped.jsonl",
         "report.png")
LABELS = re.compile(r"\d{6,}-\d+of\d+\.safetensors")
SHUT = (SafetensorError, KeyError, TypeError, ValueError, RuntimeError)  # how a damaged file shows


@dataclass
class Tally:
    """Counts of one step, over all its samples."""
    loss: float = 0.0     # summed over labelled tokens
    labelled: float = 0.0  # tokens
    empty: float = 0.0    # samples without any label
    samples: float = 0.0

    def add(self, other):
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


class Labels:
    """labels/*.safetensors: targets (n, N) and n responses of each sample, found by its number."""

    def __init__(self, folder):
        self.folder, self.where, self.opened = folder, {}, None

    def refresh(self):
        """Look at the folder again: others write there too. What is damaged is made again."""
        for path in sorted(self.folder.iterdir()):
            if not LABELS.fullmatch(path.name) or path.is_symlink():
                continue
            try:
                samples, targets, responses = self.load(path)
                rows = enumerate(zip(samples, targets, responses, strict=True))
                self.where |= {i: (path, row) for row, (i, _, _) in rows}
            except (FileNotFoundError, *SHUT):  # another process may have been quicker
                path.unlink(missing_ok=True)

    def load(self, path):
        """-> samples, their targets (n, N), their n responses."""
        with safe_open(path, framework="pt") as f:
            shapes = f.get_tensor("shapes").tolist()
            parts = f.get_tensor("targets").split([n * N for n, N in shapes])
            targets = [part.view(shape) for part, shape in zip(parts, shapes)]
            return f.get_tensor("samples").tolist(), targets, json.loads(f.metadata()["responses"])

    def write(self, name, made):
        """made: {sample: (targets (n, N), responses)}"""
        path = self.folder / f"{name}.safetensors"
        targets, responses = zip(*made.values())
        tensors = {"samples": torch.tensor(list(made)),
                   "targets": torch.cat([t.flatten() for t in targets]),  # grids may differ
                   "shapes": torch.tensor([t.shape for t in targets])}  # (n, N) of each sample
        metadata = {"responses": json.dumps(responses)}
        write_file(path, lambda partial: save_file(tensors, partial, metadata=metadata))
        self.where |= {i: (path, row) for row, i in enumerate(made)}
        self.opened = None

    def read(self, sample):
        """-> targets (n, N) and the n responses. Raises BadInput if the file is gone."""
        path, row = self.where[sample]
        if path != self.opened:  # the samples of a file are mostly read one after the other
            try:
                (_, self.targets, self.responses), self.opened = self.load(path), path
            except (OSError, *SHUT):
                raise BadInput(f"{path}: removed or damaged while the run went on; the same "
                               "command makes these labels again") from None
        return self.targets[row], self.responses[row]


class Run:
    """One run: its steps over shuffled samples, in a folder of its own."""

    def __init__(self, out, settings, samples, batch, epochs, fresh=False, save_every=300.0,
                 max_bad=1.0):
        self.out, self.settings, self.fresh = out, settings, fresh
        self.samples, self.global_batch = samples, batch
        self.save_every, self.max_bad = save_every, max_bad
        self.steps_per_epoch = -(-samples // batch)
        self.total_steps = epochs * self.steps_per_epoch
        together = dist.is_initialized()
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if together else (1, 0)
        self.step, self.stop, self.skipped, self.so_far = 0, False, {}, Tally()
        self.locked = None
        if self.rank == 0:
            try:
                self.open_folder()
            except BaseException:
                self.close()
                raise
        self.wait()
        self.labels = Labels(out / "labels")
        self.labels.refresh()

    # ---- the folder

    def open_folder(self):
        """Make the folder, or take up the run in it. A stranger's raises BadInput, untouched."""
        config = self.out / "config.json"
        old = self.read_marker(config)
        if old is None and self.out.exists() and not self.is_untouched():
            raise BadInput(f"{self.out}: not empty and not a run of this program; "
                           "name another --out")
        if (self.out / "labels").is_symlink():
            raise BadInput(f"{self.out / 'labels'}: a link, which is not followed; "
                           "name another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock()
        if self.fresh:
            self.clear()
        # again: one that has ended meanwhile may have made it
        old = None if self.fresh else self.read_marker(config)
        for leftover in [*self.out.glob("*.partial"), *self.out.glob("labels/*.partial")]:
            of = leftover.name.removesuffix(".partial")
            if of in FILES or LABELS.fullmatch(of):
                leftover.unlink()
        if old:
            new = {"sdrpn": 1} | json.loads(json.dumps(self.settings))
            changed = [key for key in new | old
                       if old.get(key) != new.get(key) and key != "ckpt"]
            if changed:
                raise BadInput(f"{self.out}: holds a run with another {', '.join(changed)}; "
                               "use --fresh to start over, or another --out")
        else:
            write_text(config, json.dumps({"sdrpn": 1} | self.settings, indent=1) + "\n")
        (self.out / "labels").mkdir(exist_ok=True)
        if self.finished:  # stopped between the two, at the very end
            (self.out / "resume.safetensors").unlink(missing_ok=True)

    def read_marker(self, config):
        """The settings of the run in this folder; None: no run; {}: a damaged one, with --fresh."""
        if not config.is_file():
            return None
        text = config.read_text(encoding="utf-8", errors="replace")
        try:
            old = json.loads(text)
            return old if isinstance(old, dict) and "sdrpn" in old else None
        except (ValueError, TypeError, RecursionError):
            if not text.startswith('{\n "sdrpn": '):  # how ours begins
                return None
            if self.fresh:
                return {}
            raise BadInput(f"{config}: damaged; use --fresh to start over, "
                           "or another --out") from None

    def is_untouched(self):
        """Nothing in the folder but what a crash in the very first moment leaves."""
        return self.out.is_dir() and {p.name for p in self.out.iterdir()} <= {"config.json.partial"}

    def lock(self):
        """Held by the operating system for as long as this process lives, however it ends."""
        if fcntl is None:
            return
        self.locked = os.open(self.out, os.O_RDONLY)
        try:
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"{self.out}: another train.py is running there; wait for it, "
                           "or name another --out") from None

    def close(self):
        """Let another run have the folder."""
        if self.locked is not None:
            os.close(self.locked)
            self.locked = None

    def clear(self):
        """Delete what a run writes, by its names; links and all else stay.

        config.json is written over afterwards: until then it says that this folder is a run.
        """
        for name in FILES:
            if name != "config.json" and not (self.out / name).is_symlink():
                (self.out / name).unlink(missing_ok=True)
        for path in (self.out / "labels").glob("*"):
            if LABELS.fullmatch(path.name) and not path.is_symlink():
                path.unlink()

    def wait(self):
        if self.world > 1:
            dist.barrier()

    # ---- resume point

    @property
    def finished(self):
        return (self.out / "rpn.safetensors").is_file()

    def restore(self, rpn, optimizer):
        """Take up weights, moments and step where a run was stopped. Raises BadInput if damaged."""
        self.rpn, self.optimizer = rpn, optimizer
        path = self.out / "resume.safetensors"
        if path.is_file():
            try:
                facts = load_state(path, {"rpn": rpn}, optimizer)
                self.step, self.so_far = facts["step"], Tally(*facts["so_far"])
                self.skipped = {int(i): why for i, why in facts["skipped"].items()}
            except (*SHUT, AttributeError):
                raise BadInput(f"{path}: damaged; delete it to start at step 0 with the labels "
                               "kept, or use --fresh") from None
            say(f"going on at step {self.step} of {self.total_steps}; "
                f"{len(self.labels.where)} samples are labelled")
        if self.rank == 0:
            log = self.out / "log.jsonl"
            lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
            write_text(log, "".join(line + "\n" for line in lines[:self.step]))

    def save(self):
        """resume.safetensors. The order of the data needs no state: it follows from the seed."""
        if self.rank == 0:
            facts = {"step": self.step, "so_far": astuple(self.so_far), "skipped": self.skipped}
            save_state(self.out / "resume.safetensors", {"rpn": self.rpn}, self.optimizer, facts)

    # ---- the loop

    def steps(self):
        """Step numbers from the resume point on. Between two of them: resume point, stop."""
        before = signal.signal(signal.SIGINT, self.ask_to_stop)
        self.began, self.first, saved = time.time(), self.step, time.time()
        try:
            while self.step < self.total_steps:
                if self.world > 1 and self.step % self.steps_per_epoch == 0:  # meets others' labels
                    self.wait()
                    self.labels.refresh()
                yield self.step
                stop = self.any_stops()
                if stop or time.time() - saved > self.save_every:
                    self.save()
                    saved = time.time()
                if stop:
                    say("stopped after a whole step; the same command goes on"
                        + (" (without --fresh)" if self.fresh else ""))
                    sys.exit(130)
        finally:
            signal.signal(signal.SIGINT, before)

    def share(self, step):
        """This process's samples of a step: the order is a function of seed and epoch alone."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = list(range(self.samples))
        random.Random(f"{self.settings['seed']}/{epoch}").shuffle(order)
        return order[at * self.global_batch:(at + 1) * self.global_batch][self.rank::self.world]

    def has_labels(self, samples):
        """Are the labels of all these on disk, but for those that were skipped?"""
        return all(i in self.labels.where or i in self.skipped for i in samples)

    def keep(self, made):
        """Write the labels of this step's samples: {sample: (targets (n, N), responses)}."""
        if made:
            self.labels.write(f"{self.step:06d}-{self.rank}of{self.world}", made)

    def skip(self, sample, why):
        self.skipped[sample] = str(why)

    def reduce(self, tally):
        """Sum counts and gradients over the processes, and share the list of what was skipped."""
        if self.world == 1:
            return tally
        device = next(self.rpn.parameters()).device
        total = torch.tensor(astuple(tally), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        everywhere = [None] * self.world
        dist.all_gather_object(everywhere, self.skipped)
        self.skipped = {i: why for skipped in everywhere for i, why in skipped.items()}
        for p in self.rpn.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        return Tally(*total.tolist())

    def record(self, tally, lr):
        """Count a step, log it and show it. Raises BadInput above --max-bad."""
        self.step += 1
        self.so_far.add(tally)
        seconds = time.time() - self.began
        row = {"step": self.step, "loss": tally.loss / max(tally.labelled, 1),
               "tokens": int(tally.labelled), "empty": int(tally.empty),
               "samples": int(tally.samples), "lr": lr, "seconds": round(seconds, 3)}
        if self.rank == 0:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
        self.show(row, seconds)
        if len(self.skipped) > self.max_bad / 100 * self.samples:
            self.list_skipped()
            raise BadInput(f"{len(self.skipped)} of {self.samples} samples are bad, more than "
                           f"--max-bad {self.max_bad} %; see {self.out / 'skipped.jsonl'}")

    def show(self, row, seconds):
        first, all_so_far = self.step == self.first + 1, self.so_far
        self.mean = row["loss"] if first else 0.95 * self.mean + 0.05 * row["loss"]
        self.seen = row["samples"] if first else self.seen + row["samples"]
        eta = seconds / (self.step - self.first) * (self.total_steps - self.step)
        memory = ""
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            memory = f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        say(f"step {self.step}/{self.total_steps} ({100 * self.step / self.total_steps:.0f}%) | "
            f"loss {self.mean:.4f} | lr {row['lr']:.1e} | "
            f"empty {all_so_far.empty:.0f}/{all_so_far.samples:.0f} | "
            f"{self.seen / seconds:.1f} samples/s{memory} | ETA {eta:.0f} s")
        early = all_so_far.samples >= 256 > all_so_far.samples - row["samples"]
        if all_so_far.empty > 0.5 * all_so_far.samples and (early or self.step == self.total_steps):
            say(f"warning: {100 * all_so_far.empty / all_so_far.samples:.0f} % of the samples had "
                "no label at all: the recipe's heads hardly point anywhere "
                "(`python tests/tables.py heads`)")

    def ask_to_stop(self, *_):
        """Ctrl-C: stop after this step; a second one at once (not under torchrun: it sends two)."""
        self.stop = True
        if self.world == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def any_stops(self):
        if self.world == 1:
            return self.stop
        stop = torch.tensor(float(self.stop), device=next(self.rpn.parameters()).device)
        dist.all_reduce(stop)
        return bool(stop)

    # ---- the end

    def list_skipped(self):
        path = self.out / "skipped.jsonl"
        lines = [json.dumps({"sample": i, "why": why}) for i, why in sorted(self.skipped.items())]
        if self.rank == 0 and lines:
            write_text(path, "".join(line + "\n" for line in lines))
        elif self.rank == 0:
            path.unlink(missing_ok=True)

    def finish(self, rpn, facts):
        """Write rpn.safetensors. Raises BadInput if no sample had a label: such an RPN is none."""
        self.list_skipped()
        if self.so_far.labelled == 0:
            raise BadInput(f"{self.out}: not one of {self.so_far.samples:.0f} samples had a "
                           "label, so nothing was learnt: the recipe's heads point nowhere; find "
                           "others with `python tests/tables.py heads`, put its recipe.json "
                           "beside config.json, and start over with --fresh")
        if self.rank == 0:
            facts = facts | {"step": self.step}
            write_file(self.out / "rpn.safetensors", lambda partial: rpn.save(partial, facts))
            (self.out / "resume.safetensors").unlink(missing_ok=True)

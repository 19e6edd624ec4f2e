"""A training run's folder. A run can stop at any step and resume, alone or under torchrun.

    run = Run(out, settings, samples=1000, batch=32, epochs=2)
    run.restore(rpn, optimizer)
    for step, samples in run.steps(load):       # load(number) -> a sample, called ahead of time
        loss, *counts = run.add_up(counts, rpn.parameters())
        run.record(lr, loss, *counts)
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
import math
import os
import random
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from clip import BadInput, reading
from data.files import load_state, save_state, write_file, write_rows, write_text
from data.program import gather, log, processes

LABELS = "labels/*-*of*.safetensors"


def read_ahead(load, steps, ahead=2, threads=4):
    """Yield [load(item) for item in step] for each step, while threads load the next `ahead` steps.

    Errors of load() are raised when their step's turn comes.
    >>> list(read_ahead(abs, [[-1, 2], [], [-3]]))
    [[1, 2], [], [3]]
    """
    pool = ThreadPoolExecutor(threads)
    loading = (pool.map(load, step) for step in steps)
    waiting = deque(islice(loading, ahead + 1))
    try:
        while waiting:
            yield list(waiting.popleft())
            waiting.extend(islice(loading, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def attempt(work, *args):
    """-> what work(...) returns, or the BadInput that it raises.

    >>> attempt(abs, -1)
    1
    """
    try:
        return work(*args)
    except BadInput as e:
        return e


@dataclass
class Run:
    """Steps over shuffled samples, in a folder of their own."""
    out: Path
    settings: dict
    samples: int
    batch: int                  # samples a step, of all processes together
    epochs: int
    fresh: bool = False         # delete the run that the folder holds
    save_every: float = 300.0   # seconds
    max_bad: float = 1.0        # percent of the samples that may be skipped

    def __post_init__(self):
        self.rank, self.world = processes()
        self.steps_per_epoch = math.ceil(self.samples / self.batch)
        self.total_steps = self.epochs * self.steps_per_epoch
        self.step, self.stop, self.lock = 0, False, None
        self.rows = []     # of log.jsonl, one for each step
        self.skipped = {}  # {sample: why}
        self.labels = {}   # {sample: (labels (n, N), its n responses)}
        if self.rank == 0:
            self.open_folder()
        self.read_labels()

    # ---- the folder

    def open_folder(self):
        """Make the folder, or take up the run in it. BadInput if it holds anything else."""
        config, old = self.out / "config.json", {}
        new = {"sdrpn": 1} | json.loads(json.dumps(self.settings))  # as a file gives it back
        if config.is_file():
            with reading(config, "name another --out"):
                old = dict(json.loads(config.read_text(encoding="utf-8")))
        if "sdrpn" not in old and {*self.out.glob("*")} - {self.out / "config.json.partial"}:
            raise BadInput(f"{self.out}: not empty and not a training run; name another --out")
        changed = [key for key in new | old if old.get(key) != new.get(key) and key != "ckpt"]
        if old and changed and not self.fresh:
            raise BadInput(f"{self.out}: holds a run with another {', '.join(changed)}; "
                           "use --fresh to start over, or another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock_folder()
        if self.fresh:
            for pattern in (LABELS, "resume.safetensors", "rpn.safetensors"):
                for path in self.out.glob(pattern):
                    path.unlink()
        write_text(config, json.dumps(new, indent=1) + "\n")

    def lock_folder(self):
        """Keep other runs out until close(), or until this process ends, however it ends."""
        with suppress(ImportError):  # Windows: two runs in one folder are not noticed there
            import fcntl
            self.lock = os.open(self.out, os.O_RDONLY)
            with reading(self.out, "another train.py is running there; name another --out"):
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self):
        """Let another run have the folder."""
        if self.lock:
            os.close(self.lock)

    def read_labels(self):
        """Read the labels on disk, once all processes have written theirs."""
        gather(None)
        for path in sorted(self.out.glob(LABELS)):
            with reading(path, "delete it; the same command makes its labels again"):
                with safe_open(path, "pt") as f:
                    responses = json.loads(f.metadata()["responses"])
                    for number in f.keys():
                        self.labels[int(number)] = f.get_tensor(number), responses[number]

    def write_labels(self, samples):
        """Write the labels of this step's samples."""
        labels = {str(number): self.labels[number][0] for number in samples}
        responses = json.dumps({number: self.labels[number][1] for number in samples})
        path = self.out / "labels" / f"{self.step:06d}-{self.rank}of{self.world}.safetensors"
        write_file(path, lambda partial: save_file(labels, partial, {"responses": responses}))

    # ---- resume point

    @property
    def finished(self):
        return (self.out / "rpn.safetensors").is_file()

    def restore(self, rpn, optimizer):
        """Take up weights, moments and step where the run was stopped, if it was."""
        self.rpn, self.optimizer = rpn, optimizer
        path = self.out / "resume.safetensors"
        if path.is_file():
            self.rows, skipped = load_state(path, {"rpn": rpn}, optimizer)
            self.step, self.skipped = len(self.rows), dict(skipped)
            log(f"resuming at step {self.step} of {self.total_steps}; "
                f"{len(self.labels)} samples have labels")

    def save(self):
        """The order of the samples needs no state: it follows from the seed."""
        if self.rank == 0:
            facts = self.rows, list(self.skipped.items())
            save_state(self.out / "resume.safetensors", {"rpn": self.rpn}, self.optimizer, facts)

    # ---- the loop

    def steps(self, load):
        """Yield (step, its samples) from the resume point on; save, and stop, between two of them.

        load(number) -> a sample, in a background thread. Where it raises BadInput, the sample is
        skipped when its step comes.
        """
        stops, hangup = {signal.SIGINT, signal.SIGTERM}, getattr(signal, "SIGHUP", signal.SIGTERM)
        if signal.getsignal(hangup) != signal.SIG_IGN:  # nohup ignores it
            stops.add(hangup)
        before = {each: signal.signal(each, self.ask_to_stop) for each in stops}
        self.first, self.began = self.step, time.monotonic()
        saved = self.began
        try:
            shares = list(self.shares())[self.step:]
            ahead = read_ahead(lambda number: attempt(load, number), shares)
            for numbers, loaded in zip(shares, ahead):
                if self.step % self.steps_per_epoch == 0:
                    self.read_labels()
                samples = []
                for number, sample in zip(numbers, loaded):
                    if isinstance(sample, BadInput):
                        self.skipped[number] = str(sample)
                    if number not in self.skipped:
                        samples.append(sample)
                yield self.step, samples
                stop = self.any_stops()
                if stop or time.monotonic() - saved > self.save_every:
                    self.save()
                    saved = time.monotonic()
                if stop:
                    log("stopped after a whole step; run the same command, without --fresh, "
                        "to resume")
                    sys.exit(130)
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def shares(self):
        """This process's samples of every step; their order follows from seed and epoch alone."""
        for epoch in range(self.epochs):
            order = list(range(self.samples))
            random.Random(f"{self.settings['seed']}/{epoch}").shuffle(order)
            for at in range(0, self.samples, self.batch):
                yield order[at:at + self.batch][self.rank::self.world]

    def ask_to_stop(self, *_):
        """Stop after this step, or at once if asked twice (torchrun always asks twice)."""
        self.stop = True
        if self.world == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def any_stops(self):
        return any(gather(self.stop))

    def add_up(self, counts, parameters):
        """Sum a step's counts and gradients over the processes -> the counts, as a list."""
        for skipped in gather(self.skipped):
            self.skipped |= skipped
        if self.world > 1:
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        return sum(gather(counts)).tolist()

    def record(self, lr, loss, tokens, empty, samples):
        """Log a step: its mean loss, labelled tokens, samples without a label, all samples.

        Raises BadInput if more than max_bad percent of the samples were skipped.
        """
        self.step += 1
        seconds = time.monotonic() - self.began
        self.rows.append({"step": self.step, "loss": loss, "tokens": int(tokens),
                          "empty": int(empty), "samples": int(samples), "lr": lr,
                          "seconds": round(seconds, 3)})
        bad = [{"sample": number, "why": why} for number, why in self.skipped.items()]
        if self.rank == 0:
            write_rows(self.out / "log.jsonl", self.rows)
            write_rows(self.out / "skipped.jsonl", bad)
        each = seconds / (self.step - self.first)
        left = each * (self.total_steps - self.step)
        log(f"step {self.step}/{self.total_steps} | loss {loss:.4f} | lr {lr:.1e} | "
            f"{empty / max(samples, 1):.0%} of the samples got no label | "
            f"{self.batch / each:.1f} samples/s | ETA {left:.0f} s")
        if len(bad) > self.max_bad / 100 * self.samples:
            raise BadInput(f"{len(bad)} of {self.samples} samples are bad, more than "
                           f"--max-bad {self.max_bad} %; see {self.out / 'skipped.jsonl'}")

    # ---- the end

    def finish(self, rpn, facts):
        """Write rpn.safetensors. Raises BadInput if no sample had a label."""
        if not self.optimizer.state:  # it never took a step
            raise BadInput(f"{self.out}: none of the samples got a label, so nothing was learnt; "
                           "find better heads with `python tests/paper/tables.py heads`, put its "
                           "recipe.json beside config.json, and start over with --fresh")
        if self.rank == 0:
            facts = facts | {"step": self.step}
            write_file(self.out / "rpn.safetensors", lambda partial: rpn.save(partial, facts))
            (self.out / "resume.safetensors").unlink(missing_ok=True)

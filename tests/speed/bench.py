"""Speed and memory on random weights of the true shapes, each figure beside the bound of FLOPs and bytes (bounds.py).

    python tests/speed/bench.py --report                                # all that this machine can measure: report.py
    python tests/speed/bench.py --random small                          # every part, some minutes on two cores
    python tests/speed/bench.py --random llava-1.5-7b --only prefix --repeat 1     # 15 GB in bfloat16
    python tests/speed/bench.py --random llava-1.5-7b --one-layer --dtype float32 --only prefix --repeat 1
    python tests/speed/bench.py --random qwen2.5-vl-3b --device cuda
    python tests/speed/bench.py --only memory                           # memory of training, from shapes alone

Ratios are taken in one run: rounds over all variants, medians (--repeat 1: one round, nothing warmed up). A part that
does not fit into the free memory, or runs out of it, is left out and named. Nothing is asserted.
Left out: the answers' quality (weights are random), several GPUs, disk.
"""
import argparse
import contextlib
import re
import resource
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
from PIL import Image

from bounds import NEW, Machine, Work, best  # also puts the project on the path
from random_llava import CONFIGS, QUESTION, SQUARE, TINY, band, give_weights, skeleton, squares, steered

import report
import train
from data.evaluate import now
from model import KVCache
from sdrpn import Letterbox, answer, find_regions, teach

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from peers import GENERAL, all_maps, attention_to_image  # noqa: E402

QUESTIONS = 6  # POPE's for each picture


@contextlib.contextmanager
def stages(m, rpn):
    """-> {"encode", "rpn", "decode": ms spent in them so far}, while this lasts."""
    ms = Counter()

    def timed(stage, function):
        def call(*how, **more):
            began = now(m)
            result = function(*how, **more)
            ms[stage] += 1000 * (now(m) - began)
            return result
        return call
    patched = {name: timed("encode", getattr(m, name)) for name in ("pixels", "features", "project")}
    with (mock.patch.multiple(m, decode=timed("decode", m.decode), **patched),
          mock.patch.object(rpn, "score", timed("rpn", rpn.score))):
        yield ms


def free_bytes(device):
    """What can still be taken; unlimited where this can not be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return float("inf")
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])


class Bench:
    """One model on one device. Built without weights, so that it can be asked what it will need; then fill().

    A part yields rows: (name, measured, bound, unit).
    """

    def __init__(self, args):
        self.args, self.device, self.filled = args, args.device, False
        self.cuda, self.tiny = self.device.type == "cuda", args.random in TINY
        self.small = self.tiny or args.random == "small"
        self.dtype = getattr(torch, args.dtype or ("float32" if self.small and not self.cuda else "bfloat16"))
        self.m, self.rpn, self.recipe = skeleton(args.random, args.layers)
        self.w = Work(self.m, self.recipe, SQUARE, self.dtype.itemsize)
        self.grid, self.N, self.batch = self.w.grid, self.w.N, 8 if self.cuda or self.tiny else 1
        self.ids = self.m.prompt_ids(QUESTION)
        self.T, self.P = len(self.ids) + self.N - 1, self.ids.index(self.m.config.image_token) + self.N
        self.n = round(300 / 576 * self.N)
        self.machine = Machine(self.device, self.dtype, self.tiny)
        fewer = f", {args.layers} layers only" if args.layers else ", one layer's weights" if args.one_layer else ""
        self.entry = f"{args.random}{fewer}, {str(self.dtype)[6:]}"
        self.facts = (f"{self.w.L} layers of {self.w.D}, B={self.w.B}, R={self.w.R}, prompt {self.T} tokens of which "
                      f"{self.N} are the image's; {self.machine.peak / 1e12:.3g} TFLOP/s in matmul, "
                      f"{self.machine.bandwidth / 1e9:.3g} GB/s read")

    def fill(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()  # of measuring the machine
        if self.args.one_layer:
            layers = self.m.language_model.layers
            self.m.language_model.layers = nn.ModuleList([layers[0]] * len(layers))
        give_weights(self.m, self.rpn, self.device, self.dtype)
        self.picture = Image.effect_noise((SQUARE, SQUARE), 60).convert("RGB")
        self.filled = True

    def ask(self, cells=None, mode="mask", new=NEW, **how):
        """An answer in two stages that crops these cells, the RPN running; without cells a plain one."""
        if cells is None:
            return answer(self.m, self.rpn, self.picture, QUESTION, "plain", max_new_tokens=new, **how)
        return steered(self.m, self.rpn, cells, self.picture, QUESTION, mode, max_new_tokens=new, **how)

    def interleave(self, **runs):
        """name=function -> {name: {stage: median ms}}. "all" is the whole, "prefill" all but encoding and decoding."""
        rounds, warm = [], int(self.args.repeat > 1)
        for _ in range(self.args.repeat + warm):
            rounds.append({})
            for name, run in runs.items():
                with torch.no_grad(), stages(self.m, self.rpn) as ms:
                    began = now(self.m)
                    run()
                    ms["all"] = 1000 * (now(self.m) - began)
                ms["prefill"] = ms["all"] - ms["encode"] - ms["decode"]
                rounds[-1][name] = ms
        return {name: {stage: statistics.median(one[name][stage] for one in rounds[warm:]) for stage in rounds[0][name]}
                for name in runs}

    def memory(self):
        """Peak so far, in GB: allocated on a GPU, else resident with all libraries."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9

    # ---- parts

    def answers(self):
        """One question by both ways: time of each stage, peak memory. It goes first, since a peak stays."""
        w, machine, T, P, n = self.w, self.machine, self.T, self.P, self.n
        t = self.interleave(plain=self.ask, two=lambda: self.ask(band(self.grid, n)))
        for name, ms, images, flops, tokens in (
                ("plain", t["plain"], w.encode(), w.plain(T), T),
                ("two-stage", t["two"], w.encode(2, w.N + n), w.two_stage(T, P, n), T + n)):
            bounds = {"encode": machine.seconds(images), "prefill": w.prefill_seconds(machine, flops),
                      "decode": w.decode_seconds(machine, tokens)}
            yield f"{name}: from picture to text", ms["all"], 1000 * sum(bounds.values()), " ms"
            for stage, bound in bounds.items():
                yield f"    {stage}", ms[stage], 1000 * bound, " ms"
        yield "peak memory; bound: weights, cache, widest activation", self.memory(), w.answer_bytes(T) / 1e9, " GB"

    def prefix(self):
        """Questions about one picture, in prefills of a plain answer; then whole answers."""
        w, T, P, n, m = self.w, self.T, self.P, self.n, self.m
        cells, none = band(self.grid, n), band(self.grid, 0)
        shared = self.ask(cells).prefix
        t = self.interleave(
            plain=self.ask, first=lambda: self.ask(cells), further=lambda: self.ask(cells, prefix=shared),
            after=lambda: self.ask(prefix=shared), none=lambda: self.ask(none), again=self.whole_prefill(T + n),
            roi=lambda: self.rpn(m, self.picture, QUESTION))
        for name, ms, flops in (
                ("first two-stage question", t["first"]["prefill"], w.two_stage(T, P, n)),
                ("further question, same picture", t["further"]["prefill"], w.question(T, P, n)),
                ("plain answer after it", t["after"]["prefill"], w.plain(T, P)),
                ("two-stage question, no region", t["none"]["prefill"], w.two_stage(T, P, 0)),
                ("two-stage question, everything recomputed", t["roi"]["prefill"] + t["again"]["all"],
                 w.recomputed(T, n)),
                ("the RPN's own blocks", t["first"]["rpn"], w.rpn(T))):
            yield f"{name}, in plain prefills", ms / t["plain"]["prefill"], flops / w.plain(T), " x"
        for name, key, crop in ("two-stage", "first", n), ("no region", "none", 0):
            bound = w.plain_seconds(self.machine, T) / w.two_stage_seconds(self.machine, T, P, crop)
            yield (f"throughput, {name} / plain, {NEW} new, {crop} crop tokens", t["plain"]["all"] / t[key]["all"],
                   bound, " x")
        logits, has_picture = torch.where(cells, 9.0, -9.0), Letterbox.of(m, self.picture).holds_picture()
        host = best(lambda: find_regions(logits, 0.15, has_picture), torch.device("cpu"))
        yield "finding regions, on the host", 1000 * host, None, " ms"

    def pope(self):
        """A picture's six questions, each plain and two-stage, 2 new tokens: each alone, or all on one prefix."""
        w, T, P, n, cells = self.w, self.T, self.P, self.n, band(self.grid, self.n)

        def all_questions(share):
            prefix = None
            for how in (None, cells) * QUESTIONS:
                got = self.ask(how, new=2, prefix=prefix)
                prefix = got.prefix if share else None
        t = self.interleave(alone=lambda: all_questions(False), shared=lambda: all_questions(True))
        alone = w.encode(3, 2 * w.N + n) + w.plain(T) + w.two_stage(T, P, n)
        shared = w.encode(1, n) + w.plain(T, P) + w.question(T, P, n)
        bound = QUESTIONS * alone / (w.encode() + w.plain(P) + QUESTIONS * shared)
        yield (f"POPE: {QUESTIONS} questions a picture, each alone / on one prefix",
               t["alone"]["all"] / t["shared"]["all"], bound, " x")
        yield "    a question, plain and two-stage, on one prefix", t["shared"]["all"] / QUESTIONS, None, " ms"

    def whole_prefill(self, T):
        """-> a function that runs T tokens through all layers, as a second stage does that starts over."""
        hidden = torch.randn(1, T, self.w.D, device=self.device).to(self.dtype)
        rope = self.m.text_rope(0, T)
        return lambda: self.m.run(hidden, 0, self.m.depth, rope, KVCache())

    def peers(self):
        """The RoI stage, picture to map, against what ViCrop rel-att does before its crop: two prompts, one layer."""
        m, w, layer = self.m, self.w, min(self.recipe.attention)
        T, T2 = (len(m.prompt_ids(question)) + self.N - 1 for question in (QUESTION, GENERAL))

        def start(depth):
            return m.prefill(m.pixels(self.picture)[None], keep=[depth], depth=depth)

        def published():
            for question in QUESTION, GENERAL:
                prefix, tail = start(0), m.embed(m.tail(m.prompt_ids(question)))
                rope = torch.cat([prefix.rope, m.text_rope(prefix.position, tail.shape[1])], 1)
                all_maps(m, torch.cat([prefix.hidden[0], tail], 1), rope)[layer][0, :, -1].mean(0).cpu()

        def stopped():
            for question in QUESTION, GENERAL:
                attention_to_image(m, start(layer), question, layer).cpu()

        def shared():
            prefix = start(layer)
            for question in QUESTION, GENERAL:
                attention_to_image(m, prefix, question, layer).cpu()
        t = self.interleave(ours=lambda: self.rpn(m, self.picture, QUESTION), published=published, stopped=stopped,
                            shared=shared)
        enc, ours, first = w.encode(), w.encode() + w.roi(T), layer * w.layer(T) + w.row(T)
        yield "RoI stage, picture to map", t["ours"]["all"], 1000 * self.machine.seconds(ours), " ms"
        for name, key, flops in (
                ("ViCrop as published, two passes with all maps", "published", 2 * enc + w.plain(T) + w.plain(T2)),
                (f"ViCrop stopped after layer {layer}", "stopped", 2 * enc + first + layer * w.layer(T2) + w.row(T2)),
                ("ViCrop stopped, image prefix shared", "shared",
                 enc + first + layer * w.layer(T2 - self.P, self.P) + w.row(T2 - self.P, self.P))):
            yield f"{name} / RoI stage", t[key]["all"] / t["ours"]["all"], flops / ours, " x"

    @torch.no_grad()
    def prefill(self, b, new):
        """The prompt of a plain answer b times, from pixels -> what m.decode() takes."""
        m = self.m
        prefix = m.prefill(m.pixels(self.picture).expand(b, -1, -1, -1))
        tail = m.embed(m.tail(self.ids)).expand(b, -1, -1)  # (b, t, D)
        t, cache = tail.shape[1], prefix.cache
        m.reserve(cache, self.T + new)
        last = m.run(tail, 0, m.depth, m.text_rope(prefix.position, t), cache, self.P)[:, -1]
        return last, cache, self.T, prefix.position + t, new

    def generate(self, b, new):
        return self.m.decode(*self.prefill(b, new))

    def labels(self):
        """Labelling a sample against answering it, both from pixels, answers of a fixed length."""
        w, b, sink = self.w, self.batch, self.recipe.sink
        taps = len(self.recipe.attention) + len(sink.attention if sink else ())
        pixels = self.m.pixels(self.picture).expand(b, -1, -1, -1)
        for new in (5, 20):
            t = self.interleave(answer=lambda: self.generate(b, new),
                                teach=lambda: teach(self.m, self.recipe, pixels, [self.ids] * b, new))
            extra = self.machine.seconds(b * taps * 2 * w.q * (new - 1) * (self.T + new))
            yield (f"labelling / answering, batch {b}, {new} tokens", t["teach"]["all"] / t["answer"]["all"],
                   1 + extra / w.plain_seconds(self.machine, self.T, new, b), " x")

    def scaling(self):
        """How cost grows, against a plain answer of the same conversation, or 8 single ones. Bounds: their ratios."""
        w, machine, grid, N = self.w, self.machine, self.grid, self.N
        past = tuple((f"{QUESTION} {i}", "a red sign") for i in range(3))
        third, middle = grid[0] // 3, grid[0] // 2
        cases = [(f"{n} crop tokens", n, 1, band(grid, n), {}) for n in (0, N // 4, self.n, N)]
        cases += [("1 region, Box Upscaling", N, 1, squares(grid, (1, third)), {"mode": "box"}),
                  ("2 regions, Box Upscaling", 2 * N, 2, squares(grid, (1, third), (middle + 1, grid[0] - 1)),
                   {"mode": "box"}),
                  (f"4 turns, {self.n} crop tokens", self.n, 1, band(grid, self.n), {"history": past})]
        for name, n, crops, cells, how in cases:
            history = how.get("history", ())
            t = self.interleave(plain=lambda: self.ask(history=history), two=lambda: self.ask(cells, **how))
            T = len(self.m.prompt_ids(QUESTION, history)) + N - 1
            bound = w.two_stage_seconds(machine, T, self.P, n, crops) / w.plain_seconds(machine, T)
            yield f"two-stage / plain answer: {name}", t["two"]["all"] / t["plain"]["all"], bound, " x"
        t = self.interleave(one=lambda: self.generate(1, NEW), eight=lambda: self.generate(8, NEW))
        yield ("a plain batch of 8 / 8 plain answers", t["eight"]["all"] / (8 * t["one"]["all"]),
               w.plain_seconds(machine, self.T, b=8) / (8 * w.plain_seconds(machine, self.T)), " x")

    def shares(self):
        """How near the prefill comes to the matmul peak (MFU), and decoding to the read bandwidth."""
        w, machine, T, new = self.w, self.machine, self.T, 24
        for b in (1, 8):
            prefill = self.interleave(it=lambda: self.prefill(b, new))["it"]["prefill"]
            state = self.prefill(b, new)
            decode = self.interleave(it=lambda: self.m.decode(*state))["it"]["all"]
            bound = 1000 * w.decode_seconds(machine, T, new, b)
            yield f"MFU: prefill, batch {b}", 1000 * b * w.plain(T) / machine.peak / prefill, 1, ""
            yield f"decode, batch {b}: share of the bandwidth limit", bound / decode, 1, ""
            yield f"    a token, batch {b}", decode / new, bound / new, " ms"

    def training(self):
        """Whole steps of train.py. Every sample gets labels, whatever its random map says."""
        w, machine, new = self.w, self.machine, 5
        batch, accumulate = (8, 4) if self.cuda else (2 if self.small else 8, 1)
        for teacher in (batch, 1):
            rate = self.training_rate(batch, accumulate, teacher, new)  # samples a second
            flops = w.encode() + w.plain(self.T) + 3 * w.rpn(self.T)  # of a sample
            bound = 1 / (machine.seconds(flops) + w.decode_seconds(machine, self.T, new, teacher) / teacher)
            name = f"label + train step, {batch} x {accumulate}, teacher batch {teacher}, answers of {new}"
            yield name, rate, bound, " /s"
            yield ("    MFU: training step, decoding not counted", flops * rate / machine.peak,
                   flops * bound / machine.peak, "")
        yield "    peak memory of the whole bench", self.memory(), None, " GB"

    def training_rate(self, batch, accumulate, teacher, new):
        told = (torch.arange(self.N) % 3 - 1).to(self.device, torch.int8)
        samples = (self.args.repeat + 1) * batch * accumulate  # the first step warms up
        with (tempfile.TemporaryDirectory() as folder,
              mock.patch.object(train, "make_targets", lambda lesson, group: told.expand(len(group), -1)),
              mock.patch.object(train.Run, "finish")):
            run = train.Run(Path(folder, "run"), {"seed": 0}, samples, batch * accumulate, 1)
            questions = [(self.picture, {"question": [QUESTION]})] * samples
            train.train(self.m, self.recipe, questions, run, teacher, new)
            run.close()
            return report.training_rate(run.out)

    def run(self, part):
        """Yield a part's rows. Raises MemoryError if it can not fit."""
        needed = self.w.answer_bytes(self.T, 8 if part in ("labels", "scaling", "shares") else 1)
        if part == "training":
            needed = report.training_bytes(self.args.random, layers=self.args.layers)
        room = free_bytes(self.device) + self.filled * self.w.answer_bytes(0, 0)
        if needed > room and not self.args.one_layer:
            raise MemoryError(f"needs {needed / 1e9:.1f} GB, {room / 1e9:.1f} are free")
        if not self.filled:
            self.fill()
        yield from PARTS[part](self)


PARTS = {"answer": Bench.answers, "prefix": Bench.prefix, "pope": Bench.pope, "peers": Bench.peers,
         "labels": Bench.labels, "shares": Bench.shares, "training": Bench.training, "scaling": Bench.scaling}


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--report", action="store_true", help="all that this machine can measure, and one line of JSON")
    add("--random", choices=CONFIGS, default="small", help="whose shapes; default: small")
    add("--layers", type=int, help="fewer decoder layers, at least 3; B and R shrink along")
    add("--one-layer", action="store_true", help="all decoder layers share the first one's weights, so that little "
        "memory holds any depth")
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 for a small model on a CPU, else bfloat16")
    add("--device", help="cpu, cuda; default: a GPU if there is one")
    add("--only", nargs="+", choices=[*PARTS, *report.ALONE], help="parts; default: all of a model")
    add("--models", nargs="+", choices=CONFIGS, help="with --report: only these")
    add("--repeat", type=int, default=3, help="rounds that count; from 2 on, one more warms up; default: 3")
    add("--minutes", type=float, help="with --report: stop after so many; default: 8 on a GPU, else 90")
    add("--results", type=Path, help="append what was measured to this file, a JSON line for each part")
    args = p.parse_args(argv)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return args


def main(argv=None, log=lambda text: print(text, flush=True)):
    args = arguments(argv)
    if args.report:
        return report.main(args, log)
    log(f"{report.stamp(args.device)}\npython tests/speed/bench.py {' '.join(argv or sys.argv[1:])}\n")
    done, rows, bench = [(part["entry"], part["part"]) for part in report.kept(args.results)], [], None
    for part in args.only or PARTS:
        entry, facts = part, ""
        if part in PARTS:
            if bench is None:
                bench = Bench(args)
                log(f"{bench.entry}: {bench.facts}\n{'':66}{'measured':>14}{'bound':>12}")
            entry, facts = bench.entry, bench.facts
        if (entry, part) not in done:
            found, why = measure(bench.run(part) if part in PARTS else report.ALONE[part](args.device), log)
            if why:
                log(f"{part}: left out: {why}")
            report.keep(args.results, entry, part, facts, found, why)
            rows += found
    return rows


def measure(part, log):
    """-> the rows of a part, and why not all of them could be measured, or None."""
    rows = []
    try:
        for row in part:
            log(report.line(*row))
            rows.append(row)
    except (torch.OutOfMemoryError, MemoryError) as e:
        return rows, str(e)
    return rows, None


if __name__ == "__main__":
    main()

"""Speed and memory on random weights of the true shapes, each figure beside the bound of FLOPs and bytes (bounds.py).

    python tests/speed/bench.py --report                                # all that this machine can measure: report.py
    python tests/speed/bench.py --random small                          # every part, some minutes on two cores
    python tests/speed/bench.py --random llava-1.5-7b --only prefix --repeat 1     # 15 GB in bfloat16
    python tests/speed/bench.py --random qwen2.5-vl-3b --device cuda
    python tests/speed/bench.py --only memory                           # memory of training, from shapes alone

Ratios are taken in one run: rounds over all variants, medians (--repeat 1: one round, nothing warmed up). A part that
does not fit into the free memory, or runs out of it, is left out and named. Nothing is asserted.
Left out: the answers' quality (weights are random), several GPUs, disk.
"""
import argparse
import contextlib
import importlib.util
import re
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

from bounds import NEW, Machine, Work, best, sync  # also puts the project on the path
from random_llava import CONFIGS, QUESTION, SQUARE, TINY, band, give_weights, skeleton, squares, steered

import report
import train
from model import KVCache
from sdrpn import Letterbox, answer, find_regions, teach
from slow import regions_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from peers import GENERAL, all_maps, attention_to_image  # noqa: E402

QUESTIONS = 6  # POPE's for each picture


@contextlib.contextmanager
def stages(m, rpn, device):
    """-> {"encode", "rpn", "decode": ms spent in them so far}, while this lasts."""
    ms = Counter(encode=0, rpn=0, decode=0)

    def timed(stage, function):
        def call(*how, **more):
            sync(device)
            began = time.perf_counter()
            result = function(*how, **more)
            sync(device)
            ms[stage] += 1000 * (time.perf_counter() - began)
            return result
        return call
    with (mock.patch.multiple(m, pixels=timed("encode", m.pixels), features=timed("encode", m.features),
                              project=timed("encode", m.project), decode=timed("decode", m.decode)),
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
    """One model on one device. Built without weights, so that it can be asked what it will need; then fill()."""

    def __init__(self, args, log):
        self.args, self.log, self.rows, self.filled = args, log, [], False
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.cuda, self.tiny = self.device.type == "cuda", args.random in TINY
        small = self.tiny or args.random == "small"
        self.dtype = getattr(torch, args.dtype or ("float32" if small and not self.cuda else "bfloat16"))
        self.m, self.rpn, self.recipe = skeleton(args.random, args.layers)
        self.w = Work(self.m, self.recipe, SQUARE, self.dtype.itemsize)
        self.grid, self.N, self.batch = self.w.grid, self.w.N, 8 if self.cuda or self.tiny else 1
        self.ids = self.m.prompt_ids(QUESTION)
        self.T, self.P = len(self.ids) + self.N - 1, self.ids.index(self.m.config.image_token) + self.N
        self.n = round(300 / 576 * self.N)
        self.machine = Machine(self.device, self.dtype, self.tiny)
        fewer = f", {args.layers} layers only" if args.layers else ""
        self.entry = f"{args.random}{fewer}, {str(self.dtype)[6:]}"
        self.facts = (f"{self.w.L} layers of {self.w.D}, B={self.w.B}, R={self.w.R}, prompt {self.T} tokens of which "
                      f"{self.N} are the image's; {self.machine.peak / 1e12:.3g} TFLOP/s in matmul, "
                      f"{self.machine.bandwidth / 1e9:.3g} GB/s read")

    def fill(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        give_weights(self.m, self.rpn, self.device, self.dtype)
        self.picture = Image.effect_noise((SQUARE, SQUARE), 60).convert("RGB")
        self.filled = True

    def put(self, name, measured, bound=None, unit="", note=""):
        self.rows.append((name, measured, bound, unit, note))
        self.log(report.line(*self.rows[-1]))

    def ask(self, cells=None, mode="mask", new=NEW, **how):
        """An answer in two stages that crops these cells, the RPN running; without cells a plain one."""
        if cells is None:
            return answer(self.m, self.rpn, self.picture, QUESTION, "plain", max_new_tokens=new, **how)
        return steered(self.m, self.rpn, cells, self.picture, QUESTION, mode, max_new_tokens=new, **how)

    def interleave(self, **runs):
        """name=function -> {name: {stage: median ms}}. "all" is the whole, "prefill" all but encoding and decoding."""
        times, warm = {name: [] for name in runs}, int(self.args.repeat > 1)
        for _ in range(self.args.repeat + warm):
            for name, run in runs.items():
                with torch.no_grad(), stages(self.m, self.rpn, self.device) as ms:
                    sync(self.device)
                    began = time.perf_counter()
                    run()
                    sync(self.device)
                    ms["all"] = 1000 * (time.perf_counter() - began)
                ms["prefill"] = ms["all"] - ms["encode"] - ms["decode"]
                times[name].append(ms)
        return {name: {stage: statistics.median(one[stage] for one in rounds[warm:]) for stage in rounds[0]}
                for name, rounds in times.items()}

    def memory(self):
        """Peak so far, in GB: allocated on a GPU, else resident with all libraries."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9

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
            self.put(f"{name}: from picture to text", ms["all"], 1000 * sum(bounds.values()), " ms")
            for stage, bound in bounds.items():
                self.put(f"    {stage}", ms[stage], 1000 * bound, " ms")
        self.put("peak memory; bound: weights, cache, widest activation", self.memory(), w.answer_bytes(T) / 1e9, " GB",
                 "allocated on the GPU" if self.cuda else "resident, libraries included")

    def prefix(self):
        """Questions about one picture, in prefills of a plain answer; then whole answers."""
        w, T, P, n, m = self.w, self.T, self.P, self.n, self.m
        cells, none = band(self.grid, n), band(self.grid, 0)
        shared = self.ask(cells).prefix
        t = self.interleave(
            plain=self.ask, first=lambda: self.ask(cells), further=lambda: self.ask(cells, prefix=shared),
            after=lambda: self.ask(prefix=shared), none=lambda: self.ask(none), again=self.whole_prefill(T + n),
            roi=lambda: self.rpn(m, self.picture, QUESTION))
        plain = t["plain"]["prefill"]
        for name, ms, flops, note in (
                ("first two-stage question", t["first"]["prefill"], w.two_stage(T, P, n), "target 1.65"),
                ("further question, same picture", t["further"]["prefill"], w.question(T, P, n), "target 0.65"),
                ("plain answer after it", t["after"]["prefill"], w.plain(T, P), "target 0.08"),
                ("two-stage question, no region", t["none"]["prefill"], w.two_stage(T, P, 0), "target 1.1"),
                ("two-stage question, everything recomputed", t["roi"]["prefill"] + t["again"]["all"],
                 w.recomputed(T, n), ""),
                ("the RPN's own blocks", t["first"]["rpn"], w.rpn(T), "target 0.12")):
            self.put(f"{name}, in plain prefills", ms / plain, flops / w.plain(T), " x", note)
        for name, key, crop, note in (("two-stage", "first", n, "target 0.80 on a GPU; published 0.62"),
                                      ("no region", "none", 0, "target 0.96 on a GPU, 0.90 on a CPU")):
            self.put(f"throughput, {name} / plain, {NEW} new, {crop} crop tokens", t["plain"]["all"] / t[key]["all"],
                     w.plain_seconds(self.machine, T) / w.two_stage_seconds(self.machine, T, P, crop), " x", note)
        logits, has_picture = torch.where(cells, 9.0, -9.0), Letterbox.of(m, self.picture).holds_picture()
        host = best(lambda: find_regions(logits, 0.15, has_picture), torch.device("cpu"))
        self.put("finding regions, on the host", 1000 * host, None, " ms", "target 2 ms")

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
        self.put(f"POPE: {QUESTIONS} questions a picture, each alone / on one prefix",
                 t["alone"]["all"] / t["shared"]["all"], bound, " x", "target 2.2")
        self.put("    a question, plain and two-stage, on one prefix", t["shared"]["all"] / QUESTIONS, None, " ms")

    def whole_prefill(self, T):
        """-> a function that runs T tokens through all layers, as a second stage does that starts over."""
        hidden = torch.randn(1, T, self.w.D, device=self.device).to(self.dtype)
        rope = self.m.text_rope(0, T)
        return lambda: self.m.run(hidden, 0, self.m.depth, rope, KVCache())

    def peers(self):
        """The RoI stage, picture to map, against what ViCrop rel-att does before its crop: two prompts, one layer."""
        m, w, layer = self.m, self.w, min(self.recipe.attention)
        T, T2 = (len(m.prompt_ids(question)) + self.N - 1 for question in (QUESTION, GENERAL))

        def published():
            for question in QUESTION, GENERAL:
                prefix = m.prefill(m.pixels(self.picture)[None], keep=[0], depth=0)
                tail = m.embed(m.tail(m.prompt_ids(question)))
                rope = torch.cat([prefix.rope, m.text_rope(prefix.position, tail.shape[1])], 1)
                all_maps(m, torch.cat([prefix.hidden[0], tail], 1), rope)[layer][0, :, -1].mean(0).cpu()

        def stopped(share):
            prefix = None
            for question in QUESTION, GENERAL:
                if not (share and prefix):
                    prefix = m.prefill(m.pixels(self.picture)[None], keep=[layer], depth=layer)
                attention_to_image(m, prefix, question, layer).cpu()

        t = self.interleave(ours=lambda: self.rpn(m, self.picture, QUESTION), published=published,
                            stopped=lambda: stopped(False), shared=lambda: stopped(True))
        enc, ours, first = w.encode(), w.encode() + w.roi(T), layer * w.layer(T) + w.row(T)
        self.put("RoI stage, picture to map", t["ours"]["all"], 1000 * self.machine.seconds(ours), " ms")
        for name, what, flops, note in (
                ("published", "ViCrop as published, two passes with all maps", 2 * enc + w.plain(T) + w.plain(T2),
                 "target 3.0"),
                ("stopped", f"ViCrop stopped after layer {layer}", 2 * enc + first + layer * w.layer(T2) + w.row(T2),
                 "target 1.5"),
                ("shared", "ViCrop stopped, image prefix shared",
                 enc + first + layer * w.layer(T2 - self.P, self.P) + w.row(T2 - self.P, self.P), "")):
            self.put(f"{what} / RoI stage", t[name]["all"] / t["ours"]["all"], flops / ours, " x", note)

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
            self.put(f"labelling / answering, batch {b}, {new} tokens", t["teach"]["all"] / t["answer"]["all"],
                     1 + extra / w.plain_seconds(self.machine, self.T, new, b), " x", "target 1.05")

    def scaling(self):
        """How cost grows, against a plain answer of the same conversation, or 8 single ones. Bounds: their ratios."""
        w, machine, grid, N = self.w, self.machine, self.grid, self.N
        past = tuple((f"{QUESTION} {i}", "a red sign") for i in range(3))
        long, third = len(self.m.prompt_ids(QUESTION, past)) + N - 1, grid[0] // 3
        one, two = squares(grid, (1, third)), squares(grid, (1, third), (grid[0] // 2 + 1, grid[0] - 1))
        cases = [(f"{n} crop tokens", self.T, n, 1, band(grid, n), {}) for n in (0, N // 4, self.n, N)]
        cases += [("1 region, Box Upscaling", self.T, N, 1, one, {"mode": "box"}),
                  ("2 regions, Box Upscaling", self.T, 2 * N, 2, two, {"mode": "box"}),
                  (f"4 turns, {self.n} crop tokens", long, self.n, 1, band(grid, self.n), {"history": past})]
        for name, T, n, crops, cells, how in cases:
            t = self.interleave(plain=lambda: self.ask(history=how.get("history", ())),
                                two=lambda: self.ask(cells, **how))
            bound = w.two_stage_seconds(machine, T, self.P, n, crops) / w.plain_seconds(machine, T)
            self.put(f"two-stage / plain answer: {name}", t["two"]["all"] / t["plain"]["all"], bound, " x")
        t = self.interleave(one=lambda: self.generate(1, NEW), eight=lambda: self.generate(8, NEW))
        self.put("a plain batch of 8 / 8 plain answers", t["eight"]["all"] / (8 * t["one"]["all"]),
                 w.plain_seconds(machine, self.T, b=8) / (8 * w.plain_seconds(machine, self.T)), " x")

    def shares(self):
        """How near the prefill comes to the matmul peak (MFU), and decoding to the read bandwidth."""
        w, machine, T, new = self.w, self.machine, self.T, 24
        self.put("matmul peak", machine.peak / 1e12, None, " TFLOP/s")
        self.put("read bandwidth", machine.bandwidth / 1e9, None, " GB/s")
        for b, target in ((1, "0.45"), (8, "0.60")):
            prefill = self.interleave(it=lambda: self.prefill(b, new))["it"]["prefill"]
            state = self.prefill(b, new)
            decode = self.interleave(it=lambda: self.m.decode(*state))["it"]["all"]
            bound = 1000 * w.decode_seconds(machine, T, new, b)
            self.put(f"MFU: prefill, batch {b}", 1000 * b * w.plain(T) / machine.peak / prefill, 1, "",
                     f"target {target} on a GPU")
            self.put(f"decode, batch {b}: share of the bandwidth limit", bound / decode, 1, "", "target 0.65 on a GPU")
            self.put(f"    a token, batch {b}", decode / new, bound / new, " ms")

    def training(self):
        """Whole steps of train.py. Every sample gets labels, whatever its random map says."""
        batch, accumulate = (8, 4) if self.cuda else (2 if self.tiny or self.args.random == "small" else 8, 1)
        for teacher, new in ((batch, 5), (1, 5)):
            seconds = self.step_seconds(batch, accumulate, teacher, new)
            samples, w, machine = batch * accumulate, self.w, self.machine
            flops = samples * (w.encode() + w.plain(self.T) + 3 * w.rpn(self.T))
            bound = machine.seconds(flops) + samples / teacher * w.decode_seconds(machine, self.T, new, teacher)
            name = f"label + train step, {batch} x {accumulate}, teacher batch {teacher}, answers of {new}"
            self.put(name, samples / seconds, samples / bound, " /s")
            self.put("    MFU: training step, decoding not counted", flops / machine.peak / seconds,
                     flops / machine.peak / bound, "", "target 0.45")
        self.put("    peak memory", self.memory(), None, " GB", "target 26 GB" if self.cuda else "of the whole bench")

    def step_seconds(self, batch, accumulate, teacher, new):
        real, record, ends = train.make_targets, train.Run.record, []
        told = (torch.arange(self.N) % 3 - 1).to(torch.int8)

        def make_targets(lesson, group):
            real(lesson, group)
            return told.expand(len(group), -1).to(self.device)

        def record_and_look(run, *how):
            sync(self.device)
            ends.append(time.perf_counter())
            record(run, *how)
        samples = (self.args.repeat + 1) * batch * accumulate  # the first step warms up
        with (tempfile.TemporaryDirectory() as folder, mock.patch.object(train, "make_targets", make_targets),
              mock.patch.multiple(train.Run, record=record_and_look, finish=lambda *how: None)):
            run = train.Run(Path(folder, "run"), {"seed": 0}, samples, batch * accumulate, 1)
            questions = [(self.picture, {"question": [QUESTION]})] * samples
            train.train(self.m, self.recipe, questions, run, teacher, new)
            run.close()
        return statistics.median(b - a for a, b in zip(ends, ends[1:]))

    def reference(self):
        """Plain answers against a reference library's, around the same weights. Needs transformers."""
        import bench_reference
        model, words = bench_reference.reference(self.m), self.m.tokenizer.get_piece_size()
        self.m.lm_head.weight[words:] = 0.0  # we never choose these ids, the library may
        tokens = {}

        def ours():
            tokens["ours"] = [int(i) for i in self.m.generate(self.picture, QUESTION, NEW).split()]  # Words prints ids

        def theirs():
            tokens["theirs"] = bench_reference.generate(model, self.m, self.picture, QUESTION, NEW)
        t = self.interleave(ours=ours, theirs=theirs)
        same = sum(a == b for a, b in zip(tokens["ours"], tokens["theirs"], strict=True))
        self.put("plain answer: throughput / the reference library's", t["theirs"]["all"] / t["ours"]["all"], None,
                 " x", f"target 0.95 on a CPU, 2 on a GPU; {same} of {NEW} tokens the same; {bench_reference.VERSION}")

    # ---- what does not fit

    def left_out(self, part):
        """Why a part can not be measured here, or None."""
        if part == "reference":
            if self.m.config.model_type != "llava" or importlib.util.find_spec("transformers") is None:
                return "it needs a LLaVA, and transformers"
        needed = self.w.answer_bytes(self.T, {"labels": self.batch, "scaling": 8, "shares": 8}.get(part, 1))
        if part == "training":
            needed = report.training_bytes(self.args.random, layers=self.args.layers)
        room = free_bytes(self.device) + self.filled * self.w.answer_bytes(0, 0)
        return f"needs {needed / 1e9:.1f} GB, {room / 1e9:.1f} are free" if needed > room else None


PARTS = {"answer": Bench.answers, "prefix": Bench.prefix, "pope": Bench.pope, "peers": Bench.peers,
         "labels": Bench.labels, "shares": Bench.shares, "training": Bench.training, "scaling": Bench.scaling,
         "reference": Bench.reference}


def measure(bench, parts, keep=lambda *how: None):
    """These parts of one model, as far as they fit. keep(part, rows, why it is left out) after each."""
    for part in parts:
        before, why = len(bench.rows), bench.left_out(part)
        if not why and not bench.filled:
            bench.fill()
        if not why:
            try:
                PARTS[part](bench)
            except (torch.OutOfMemoryError, MemoryError) as e:
                why = f"ran out of memory ({e})"
        if why:
            bench.log(f"{part}: left out: {why}")
        keep(part, bench.rows[before:], why)


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--report", action="store_true", help="all that this machine can measure, and one line of JSON")
    p.add_argument("--random", choices=CONFIGS, default="small", help="whose shapes; default: small")
    p.add_argument("--layers", type=int, help="fewer decoder layers, at least 3; B and R shrink along")
    p.add_argument("--device", help="cpu, cuda; default: a GPU if there is one")
    p.add_argument("--dtype", help="default: bfloat16; on a CPU small and tiny ones float32")
    p.add_argument("--only", nargs="+", choices=[*PARTS, *report.ALONE], help="parts; default: all of a model")
    p.add_argument("--models", nargs="+", choices=CONFIGS, help="with --report: only these")
    p.add_argument("--repeat", type=int, default=3, help="rounds that count; from 2 on, one more warms up; default: 3")
    p.add_argument("--minutes", type=float, help="with --report: stop after so many; default: 8 on a GPU, else 90")
    p.add_argument("--results", type=Path, help="append what was measured to this file, a JSON line for each part")
    return p.parse_args(argv)


def main(argv=None, log=lambda text: print(text, flush=True)):
    args = arguments(argv)
    if args.report:
        return report.main(args, log)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    log(f"{report.stamp(device)}\npython tests/speed/bench.py {' '.join(sys.argv[1:] if argv is None else argv)}\n")
    parts, rows = args.only or list(PARTS), []
    done = [(part["entry"], part["part"]) for part in report.kept(args.results)]
    for part, run in report.ALONE.items():
        if part in parts and (part, part) not in done:
            own = []
            for row in run(device):
                log(report.line(*row))
                own.append(row)
            report.keep(args.results, part, part, rows=own)
            rows += own
    parts = [part for part in parts if part in PARTS]
    if parts:
        bench = Bench(args, log)
        log(f"{bench.entry}: {bench.facts}\n{'':66}{'measured':>14}{'bound':>12}")
        measure(bench, [part for part in parts if (bench.entry, part) not in done],
                lambda part, *how: report.keep(args.results, bench.entry, part, bench.facts, *how))
        rows += bench.rows
    return rows


if __name__ == "__main__":
    main()

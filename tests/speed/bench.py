"""
Speed and memory on random weights of the true shapes, each figure beside the bound of FLOPs and bytes (bounds.py).

    python tests/bench.py --report                                  # all that this machine can measure: report.py
    python tests/bench.py --random small                            # every part, some minutes on two cores
    python tests/bench.py --random llava-1.5-7b --only answer ratios --repeat 1    # 15 GB in bfloat16
    python tests/bench.py --random qwen2.5-vl-3b --device cuda
    python tests/bench.py --load llava-1.5-7b                       # seconds and memory of loading a checkpoint

Ratios are taken in one run: rounds over all variants, medians (--repeat 1: one round, nothing warmed up). Before a part
its memory and time are estimated; what does not fit is left out and said. Nothing is asserted.
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
import threading
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

from bounds import NEW, Machine, best, sync  # also puts the project on the path
from random_llava import CONFIGS, QUESTION, SQUARE, TINY, Work, band, give_weights, skeleton, squares, steered

import data.run
import model
import report
import train
from model import KVCache, compile_decode, next_position, torch_dtype
from peers import GENERAL, all_maps, attention_row
from sdrpn import Answer, Letterbox, answer, find_regions, head_lists, teach
from slow import regions_of

VIEWS = {f"aten::{name}" for name in (  # they start nothing on the device
    "_local_scalar_dense _reshape_alias _unsafe_view alias as_strided chunk detach empty empty_like empty_strided "
    "expand flatten item lift_fresh mT narrow numpy_T permute promote_types reshape resize_ resolve_conj resolve_neg "
    "result_type select slice split split_with_sizes squeeze t to transpose unbind unflatten unsqueeze view").split()}
ONE = {f"aten::{name}" for name in (  # whatever they are made of
    "_fused_rms_norm add linear mean mul roll scaled_dot_product_attention").split()}


# ---------------------------------------------------------------------------------- what runs on the device

def profiler(device):
    kinds = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if device.type == "cuda" else [kinds.CPU])


def profiled(run, device):
    """The profile of one call."""
    with profiler(device) as profile:
        run()
        sync(device)
    return profile


def launches(profile, device):
    """Kernels that one call starts -> Counter of names. On a CPU the operators that are a kernel each on a GPU."""
    if device.type == "cuda":
        return Counter(e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)

    def within(event):
        inner = [child for child in event.cpu_children if child.name.startswith("aten::")]
        inner = [name for child in inner for name in within(child)]
        if event.name in ONE or event.name not in VIEWS and not inner:
            return [event.name.removeprefix("aten::")]
        return inner
    top = [e for e in profile.events() if e.name.startswith("aten::") and e.cpu_parent is None]
    return Counter(name for event in top for name in within(event))


def shares_of_time(profile, device):
    """-> {"products": share of the time, "attention": ..., an operator's name: ...}, the largest first."""
    times = Counter()
    for e in profile.key_averages():
        if e.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time is also that of the operator that started it
        us = e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total
        name = e.key.removeprefix("aten::")
        if re.search(r"^_?(add|b|badd)?mm|convolution", name):
            name = "products"
        elif re.search(r"scaled_dot_product|flash|efficient_attention", name):
            name = "attention"
        times[name] += us
    whole = sum(times.values()) or 1
    return {name: us / whole for name, us in times.most_common()}


def free_bytes(device):
    """What can still be taken; None where this can not be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])


class Timed(data.run.Run):
    """A run of train.py that looks at the clock between steps, profiles the last one, and leaves no RPN behind."""

    def time_on(self, device):
        self.device, self.seconds, self.profile = device, [], None

    def steps(self):
        with contextlib.closing(super().steps()) as steps:
            for step in steps:
                last = step == self.total_steps - 1
                with profiler(self.device) if last else contextlib.nullcontext() as self.profile:
                    sync(self.device)
                    began = time.perf_counter()
                    yield step
                    sync(self.device)
                    self.seconds.append(time.perf_counter() - began)

    def finish(self, rpn, facts):
        pass


# -------------------------------------------------------------------------------------------------- parts

class Bench:
    """One model on one device. Built without weights, so that it can be asked what it will need; then fill()."""

    def __init__(self, args, say):
        self.args, self.say, self.rows = args, say, []
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.cuda = self.device.type == "cuda"
        self.dtype = torch_dtype(args.dtype) or self.usual_dtype()
        self.m, self.rpn, self.recipe = skeleton(args.random, args.layers)
        self.w = Work(self.m, self.recipe, SQUARE, self.dtype.itemsize)
        self.grid, self.N, self.batch = self.w.grid, self.w.N, 8 if self.cuda or args.random in TINY else 1
        self.ids = self.m.prompt_ids(QUESTION)
        self.T = len(self.ids) + self.N - 1
        self.P = self.ids.index(self.m.config["image_token"]) + self.N
        self.n = round(300 / 576 * self.N)
        self.room = free_bytes(self.device)
        self.machine = Machine(self.device, self.dtype, args.random in TINY)
        self.plain_seconds = None

    def usual_dtype(self):
        """The file's on a GPU, as infer.py does; on a CPU bfloat16 for what is large."""
        if self.args.random in (*TINY, "small"):
            return torch.float16 if self.cuda else torch.float32
        return torch.float16 if self.cuda and "llava" in self.args.random else torch.bfloat16

    def fill(self):
        """Weights, and the seconds of one plain answer, by which the rest is estimated."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        give_weights(self.m, self.rpn, self.device, self.dtype)
        self.picture = Image.effect_noise((SQUARE, SQUARE), 60).convert("RGB")
        self.pixels = self.m.pixels(self.picture)
        if self.cuda:
            self.ask()
        self.plain_seconds = best(self.ask, self.device, 1, 1)

    def entry(self):
        """What its rows are kept under."""
        fewer = f", {self.args.layers} layers only" if self.args.layers else ""
        return f"{self.args.random}{fewer}, {str(self.dtype)[6:]}"

    def facts(self):
        w, machine = self.w, self.machine
        return (f"{w.L} layers of {w.D}, B={w.B}, R={w.R}, prompt {self.T} tokens of which {self.N} are the image's; "
                f"{machine.peak / 1e12:.3g} TFLOP/s in matmul, {machine.bandwidth / 1e9:.3g} GB/s read")

    def put(self, name, measured, bound=None, unit="", note=""):
        self.rows.append((name, measured, bound, unit, note))
        self.say(report.line(*self.rows[-1]))

    def ask(self, cells=None, mode="mask", new=NEW, **how):
        """An answer in two stages that crops these cells, the RPN running; without cells a plain one, by the clock."""
        if cells is None:
            return answer(self.m, None, self.picture, QUESTION, regions=[], max_new_tokens=new, **how)
        return steered(self.m, self.rpn, cells, self.picture, QUESTION, mode, max_new_tokens=new, **how)

    def interleave(self, **runs):
        """name=function -> {name: {stage: median ms}}; "all" is the wall time of the whole."""
        times, warm = {name: [] for name in runs}, int(self.args.repeat > 1)
        for _ in range(self.args.repeat + warm):
            for name, run in runs.items():
                sync(self.device)
                began = time.perf_counter()
                out = run()
                sync(self.device)
                stages = out.ms if isinstance(out, Answer) else {}
                times[name].append({"all": 1000 * (time.perf_counter() - began)} | stages)
        return {name: {stage: statistics.median(one[stage] for one in rounds[warm:]) for stage in rounds[0]}
                for name, rounds in times.items()}

    def memory(self):
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9

    def answers(self):
        """One question by both ways: time per stage, peak memory. It goes first, since a peak can not be taken back."""
        w, machine, T, n = self.w, self.machine, self.T, self.n
        encode, second = machine.seconds(w.encode()), w.second(T, self.P, n)
        bounds = {
            "plain": dict(encode=encode, prefill=w.prefill_seconds(machine, w.plain(T)),
                          decode=w.decode_seconds(machine, T, NEW)),
            "two-stage": dict(encode=encode, rpn=machine.seconds(w.roi(T)), regions=0,
                              crop=machine.seconds(w.encode(1, n)), prefill=w.prefill_seconds(machine, second),
                              decode=w.decode_seconds(machine, T + n, NEW))}
        runs = {"plain": self.ask, "two-stage": lambda: self.ask(band(self.grid, n))}
        for name, ms in self.interleave(**runs).items():
            self.put(f"{name}: from picture to text", ms["all"], 1000 * sum(bounds[name].values()), " ms")
            for stage, bound in bounds[name].items():
                self.put(f"    {stage}", ms[stage], 1000 * bound, " ms")
        self.put("peak memory; bound: weights, cache, widest activation", self.memory(), w.answer_bytes(T) / 1e9, " GB",
                 "allocated on the GPU" if self.cuda else "resident, libraries included")

    def ratios(self):
        w, machine, T, P, n = self.w, self.machine, self.T, self.P, self.n
        cells, none = band(self.grid, n), band(self.grid, 0)
        told = regions_of(cells)
        again = self.whole_prefill(T + n)
        t = self.interleave(
            plain=self.ask, two=lambda: self.ask(cells), none=lambda: self.ask(none), again=again,
            told=lambda: answer(self.m, self.rpn, self.picture, QUESTION, max_new_tokens=NEW, regions=told))
        plain, rpn = t["plain"]["prefill"], t["two"]["rpn"]
        for name, ms, crop, reuse, note in (
                ("", t["two"]["prefill"], n, True, "target 1.65"), (", recomputed", t["again"]["all"], n, False, ""),
                (", no RoI", t["none"]["prefill"], 0, True, "")):
            self.put(f"two-stage prefill{name} / plain prefill", (rpn + ms) / plain,
                     w.two_stage(T, P, crop, reuse) / w.plain(T), " x", note)
        for name, key, crop, note in (
                ("two-stage", "two", n, "target 0.80 on a GPU; published 0.62"),
                ("no RoI", "none", 0, "target 0.96 on a GPU, 0.90 on a CPU")):
            bound = w.plain_seconds(machine, T) / w.two_stage_seconds(machine, T, P, crop)
            self.put(f"throughput, {name} / plain, {NEW} new, {crop} crop tokens",
                     t["plain"]["all"] / t[key]["all"], bound, " x", note)
        given = t["told"]["regions"]  # layers 0..B-1
        self.put("RoI stage in an answer: with RPN minus without, in prefills", (rpn - given) / plain,
                 w.rpn(T) / w.plain(T), " x", "target 0.12")
        logits = torch.where(cells, 9.0, -9.0)
        on = Letterbox(self.picture.size, self.grid).holds_picture()
        host = statistics.median(best(lambda: find_regions(logits, 0.15, on), torch.device("cpu"), 1) for _ in range(5))
        self.put("    its post-processing on the host", 1000 * host, None, " ms", "target 2 ms")

    def whole_prefill(self, T):
        """-> a function that runs T tokens through all layers, as a second stage does that starts over."""
        hidden = torch.randn(1, T, self.w.D, device=self.device).to(self.dtype)
        positions = torch.arange(T, device=self.device)
        if self.m.config["mrope_section"]:
            positions = positions.expand(3, -1)
        rope = self.m.rope(positions)

        def run():
            self.m.run(hidden, 0, self.m.depth, rope, KVCache(self.m, 1, T))
        return torch.no_grad()(run)

    @torch.no_grad()
    def peers(self):
        """The RoI stage, picture to map, against what ViCrop rel-att does before its crop: two prompts, one layer."""
        m, w, layer = self.m, self.w, min(head_lists(self.m, self.recipe["attention"]))
        prompts = [self.ids, m.prompt_ids(GENERAL)]
        ropes = [m.rope(m.positions(ids, self.grid)) for ids in prompts]
        T, T2 = (len(ids) + self.N - 1 for ids in prompts)
        tail = prompts[1][prompts[1].index(m.config["image_token"]) + 1:]

        def look(i):
            return m.embed_prompt(prompts[i], m.encode(m.pixels(self.picture)[None]))[0]

        def published():
            return [all_maps(m, look(i), ropes[i])[layer][0, :, -1].mean(0).cpu() for i in (0, 1)]

        def stopped():
            return [attention_row(m, look(i), layer, ropes[i], KVCache(m, 1, T)).cpu() for i in (0, 1)]

        def shared():
            cache = KVCache(m, 1, max(T, T2))
            own = attention_row(m, look(0), layer, ropes[0], cache).cpu()
            return own, attention_row(m, m.embed(tail), layer, ropes[1][:, self.P:], cache, self.P).cpu()

        t = self.interleave(ours=lambda: self.rpn(m, self.picture, QUESTION), published=published, stopped=stopped,
                            shared=shared)
        below = layer * w.layer(T) + w.row(T) + layer * w.layer(T2) + w.row(T2)
        behind = layer * w.layer(T2 - self.P, self.P) + w.row(T2 - self.P, self.P)
        enc, ours = w.encode(), w.encode() + w.roi(T)
        self.put("RoI stage, picture to map", t["ours"]["all"], 1000 * self.machine.seconds(ours), " ms")
        for name, what, flops, note in (
                ("published", "ViCrop as published, two passes with all maps", 2 * enc + w.plain(T) + w.plain(T2),
                 "target 3.0"),
                ("stopped", f"ViCrop stopped after layer {layer}", 2 * enc + below, "target 1.5"),
                ("shared", "ViCrop stopped, image prefix shared", enc + layer * w.layer(T) + w.row(T) + behind, "")):
            self.put(f"{what} / RoI stage", t[name]["all"] / t["ours"]["all"], flops / ours, " x", note)

    @torch.no_grad()
    def prefill(self, b, new):
        """Encode and embed b times the picture -> a function that runs the prefill: last hidden state, cache."""
        m = self.m
        tokens = m.encode(self.pixels.expand(b, -1, -1, -1))
        hidden = torch.cat([m.embed_prompt(self.ids, tokens[i:i + 1])[0] for i in range(b)])
        positions = m.positions(self.ids, self.grid)
        rope = m.rope(positions)

        def run():
            cache = KVCache(m, b, self.T + new)
            cache.shift = next_position(positions) - self.T
            return m.run(hidden, 0, m.depth, rope, cache)[:, -1], cache
        return torch.no_grad()(run)

    def generate(self, b, new):
        """What LLaVA.generate does, for a batch of pixels."""
        return self.m.decode(*self.prefill(b, new)(), self.T, new)

    def labels(self):
        """Labelling a sample against answering it, both from pixels, answers of a fixed length."""
        w, b, sink = self.w, self.batch, self.recipe["sink"] or {}
        taps = len(self.recipe["attention"]) + len(sink.get("attention", {}))
        pixels, prompts = self.pixels.expand(b, -1, -1, -1), [self.ids] * b
        for new in (5, 20):
            t = self.interleave(
                answer=lambda: self.generate(b, new),
                teach=lambda: teach(self.m, self.recipe, pixels, prompts, max_new_tokens=new))
            extra = self.machine.seconds(b * taps * 2 * w.q * (new - 1) * (self.T + new))
            self.put(f"labelling / answering, batch {b}, {new} tokens", t["teach"]["all"] / t["answer"]["all"],
                     1 + extra / w.plain_seconds(self.machine, self.T, new, b), " x", "target 1.05")

    def scaling(self):
        """How cost grows, against a plain answer of the same conversation, or 8 single ones. Bounds: their ratios."""
        w, machine, grid, P = self.w, self.machine, self.grid, self.P
        past = tuple((f"{QUESTION} {i}", "a red sign") for i in range(3))
        long, third = len(self.m.prompt_ids(QUESTION, past)) + self.N - 1, grid[0] // 3
        one, two = squares(grid, (1, third)), squares(grid, (1, third), (grid[0] // 2 + 1, grid[0] - 1))
        cases = {f"{n} crop tokens": (self.T, n, 1, band(grid, n), {})
                 for n in (round(share * self.N / 576) for share in (0, 144, 300, 576))}
        cases["1 region, Box Upscaling"] = self.T, self.N, 1, one, {"mode": "box"}
        cases["2 regions, Box Upscaling"] = self.T, 2 * self.N, 2, two, {"mode": "box"}
        cases[f"4 turns, {self.n} crop tokens"] = long, self.n, 1, band(grid, self.n), {"history": past}
        runs = {name: lambda cells=cells, how=how: self.ask(cells, **how)
                for name, (_, _, _, cells, how) in cases.items()}
        t = self.interleave(**{str(self.T): self.ask, str(long): lambda: self.ask(history=past)}, **runs)
        for name, (T, n, crops, *_) in cases.items():
            bound = w.two_stage_seconds(machine, T, P, n, crops) / w.plain_seconds(machine, T)
            self.put(f"two-stage / plain answer: {name}", t[name]["all"] / t[str(T)]["all"], bound, " x")
        t = self.interleave(one=lambda: self.generate(1, NEW), eight=lambda: self.generate(8, NEW))
        self.put("a plain batch of 8 / 8 plain answers", t["eight"]["all"] / (8 * t["one"]["all"]),
                 w.plain_seconds(machine, self.T, b=8) / (8 * w.plain_seconds(machine, self.T)), " x")

    def shares(self):
        """How near the prefill comes to the matmul peak, and decoding to the read bandwidth."""
        w, machine, T, new = self.w, self.machine, self.T, 24
        self.put("matmul peak", machine.peak / 1e12, None, " TFLOP/s")
        self.put("read bandwidth", machine.bandwidth / 1e9, None, " GB/s")
        for b, target in ((1, "0.45"), (8, "0.60")):
            run = self.prefill(b, new)
            prefill = self.interleave(it=run)["it"]["all"]
            state = run()
            decode = self.interleave(it=lambda: self.m.decode(*state, T, new))["it"]["all"]
            bound = 1000 * w.decode_seconds(machine, T, new, b)
            self.put(f"prefill, batch {b}: share of the matmul peak", 1000 * b * w.plain(T) / machine.peak / prefill, 1,
                     "", f"target {target} on a GPU")
            self.put(f"decode, batch {b}: share of the bandwidth limit", bound / decode, 1, "", "target 0.65 on a GPU")
            self.put(f"    a token, batch {b}", decode / new, bound / new, " ms")

    @torch.no_grad()
    def kernels(self):
        """What one decoding step of a plain answer starts in one layer."""
        state, cache = self.prefill(1, 2)()
        rope = self.m.rope(torch.tensor([self.T + cache.shift], device=self.device))
        hidden = state[:, None]  # (1, 1, D)

        def step():
            return self.m.run(hidden, 0, self.m.depth, rope, cache, self.T)
        step()
        count = launches(profiled(step, self.device), self.device)
        what = "kernels" if self.cuda else "operators"
        most = ", ".join(f"{n / self.w.L:g} {name[:40]}" for name, n in count.most_common(9))
        self.put(f"{what} a layer in one decoding step", sum(count.values()) / self.w.L, None, "", most)

    def training(self):
        """Steps of train.py, whole. Every sample gets labels, whatever its random map says."""
        batch, accumulate, variants = self.steps_of()
        for teacher, new in variants:
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            self.training_steps(batch, accumulate, teacher, new)

    def steps_of(self):
        """-> samples at a time, how often a step, [(teacher batch, tokens an answer), ...]"""
        if self.cuda:
            return 8, 4, [(8, 5), (1, 5), (8, 20)]
        batch = 2 if self.args.random in (*TINY, "small") else 8
        return batch, 1, [(batch, 5), (1, 5)]

    def training_steps(self, batch, accumulate, teacher, new):
        w, machine, real, samples = self.w, self.machine, train.targets, batch * accumulate
        steps = self.args.repeat + 2 if self.args.repeat > 1 else 2  # the first warms up, the last is profiled
        told = (torch.arange(self.N) % 3 - 1).to(torch.int8)

        def targets(lesson, group):
            real(lesson, group)
            return told.expand(len(group), -1).to(self.device)
        question = {"question": [QUESTION]}
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            for module, name, value in ((train, "targets", targets), (train, "say", quiet), (data.run, "say", quiet)):
                stack.enter_context(mock.patch.object(module, name, value))
            args = train.parser().parse_args(f"--ckpt random --batch-size {batch} --grad-accum {accumulate} --epochs 1 "
                                             f"--teacher-batch {teacher} --max-new-tokens {new}".split())
            train.fill_in(args, self.recipe, toy=False)
            run = Timed(Path(folder, "run"), {"seed": 0}, steps * samples, samples, 1)
            run.time_on(self.device)
            train.train(args, self.m, self.recipe, [(self.picture, question)] * (steps * samples), run)
            run.close()
        seconds = statistics.median(run.seconds[self.args.repeat > 1:-1])  # the last was profiled
        flops = samples * (w.encode() + w.plain(self.T) + 3 * w.rpn(self.T))
        bound = machine.seconds(flops) + samples / teacher * w.decode_seconds(machine, self.T, new, teacher)
        name = f"label + train step, {batch} x {accumulate}, teacher batch {teacher}, answers of {new}"
        self.put(name, samples / seconds, samples / bound, " /s")
        self.put("    share of the matmul peak, decoding not counted", flops / machine.peak / seconds,
                 flops / machine.peak / bound, "", "target 0.45")
        shares = shares_of_time(run.profile, self.device)
        others = [f"{name[:30]} {100 * share:.0f} %" for name, share in shares.items() if name != "products"]
        self.put("    of its time in products", 100 * shares.get("products", 0), None, " %", ", ".join(others[:6]))
        self.put("    peak memory", self.memory(), None, " GB", "target 26 GB" if self.cuda else "of the whole bench")

    def reference(self):
        """Plain answers against a reference library's, around the same weights."""
        import bench_reference  # needs transformers
        model, picture = bench_reference.reference(self.m), self.picture
        self.m.lm_head.weight[self.m.pieces:] = 0.0  # we never choose these ids, the library may
        tokens = {}

        def ours():
            tokens["ours"] = [int(i) for i in self.m.generate(picture, QUESTION, NEW).split()]  # Words prints ids

        def theirs():
            tokens["theirs"] = bench_reference.generate(model, self.m, picture, QUESTION, NEW)
        t = self.interleave(ours=ours, theirs=theirs)
        same = sum(a == b for a, b in zip(tokens["ours"], tokens["theirs"], strict=True))
        self.put("plain answer: throughput / the reference library's", t["theirs"]["all"] / t["ours"]["all"], None,
                 " x", f"target 0.95 on a CPU, 2 on a GPU; {same} of {NEW} tokens the same; {bench_reference.VERSION}")

    def compiled(self):
        """Decoding with the compiled step, and back to the eager one."""
        new, T = 64, self.T
        eager = self.interleave(it=lambda: self.ask(new=new))["it"]["decode"]
        self.put("compiling the decoding step, once", compile_decode(self.m, T + new), None, " s")
        fast = self.interleave(it=lambda: self.ask(new=new))["it"]["decode"]
        del self.m.advance
        self.m.static = None
        self.put(f"decode, eager / compiled, {new} tokens", eager / fast, None, " x")
        bound = 1000 * self.w.decode_seconds(self.machine, T, new)
        self.put("    compiled: share of the bandwidth limit", bound / fast, 1)

    # ---- what does not fit

    def left_out(self, part, seconds_left):
        """Why a part can not be measured here and now, or None."""
        if part == "reference" and self.m.config["model_type"] != "llava":
            return "only LLaVA is compared"
        if part == "reference" and importlib.util.find_spec("transformers") is None:
            return "transformers is not installed"
        needed = self.bytes_needed(part)
        if self.room is not None and needed > self.room:
            return f"needs {needed / 1e9:.1f} GB, {self.room / 1e9:.1f} are free"
        seconds = self.cost(part) * (self.plain_seconds or 3 * self.w.plain_seconds(self.machine, self.T))
        if seconds > seconds_left:
            return f"needs about {seconds:.0f} s, {max(seconds_left, 0):.0f} are left; the same command goes on"
        return None

    def bytes_needed(self, part):
        batch = {"labels": self.batch, "scaling": 8, "shares": 8, "training": self.steps_of()[0]}.get(part, 1)
        if part == "training":
            return self.w.training_bytes(self.T, batch)
        maps = 2 * self.w.L * self.m.config["num_attention_heads"] * self.T ** 2 * self.dtype.itemsize
        return self.w.answer_bytes(self.T, batch) + (maps if part == "peers" else 0)

    def cost(self, part):
        """In plain answers, all rounds."""
        rounds = self.args.repeat + (self.args.repeat > 1)
        if part == "training":
            batch, accumulate, variants = self.steps_of()
            return (rounds + 1) * 1.5 * batch * accumulate * len(variants) / (3 if self.cuda else 1)
        return rounds * COST[part] * (self.batch if part == "labels" else 1)


def quiet(*words, **how):
    pass


PARTS = {
    "answer": Bench.answers, "ratios": Bench.ratios, "peers": Bench.peers, "labels": Bench.labels,
    "shares": Bench.shares, "kernels": Bench.kernels, "training": Bench.training, "scaling": Bench.scaling,
    "reference": Bench.reference, "compile": Bench.compiled}
COST = {"answer": 3, "ratios": 8, "peers": 7, "labels": 2.5, "shares": 14, "kernels": 2, "scaling": 32, "reference": 2,
        "compile": 8}  # plain answers a round, roughly


def measure(bench, parts, until=float("inf"), store=None):
    """These parts of one model, as far as they fit; what the store holds is not measured again."""
    entry = bench.entry()
    for part in parts:
        if store and store.rows(entry, part):
            continue
        why = bench.left_out(part, until - time.time()) or store and store.stopped_twice(entry, part)
        if not why and bench.plain_seconds is None:
            bench.fill()
            why = bench.left_out(part, until - time.time())
        before = len(bench.rows)
        if not why:
            if store:
                store.begin(entry, part)
            try:
                PARTS[part](bench)
            except torch.OutOfMemoryError:
                why = "ran out of memory"
        if why:
            bench.say(f"{part}: left out: {why}")
        if store:
            store.end(entry, part, bench.rows[before:], why)


def load(name, device, dtype, say):
    """Time and peak anonymous memory of loading: file pages that Linux may drop at any time do not count."""
    def anonymous():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    before, seen, done = anonymous(), [], threading.Event()

    def watch():
        while not done.wait(0.002):
            seen.append(anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    m = model.load(name, device, dtype)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    weights = sum(p.nbytes for p in m.parameters())
    say(f"{name}: {weights / 1e9:.2f} GB of weights in {str(m.dtype)[6:]} on {m.device}, loaded in {seconds:.1f} s; "
        f"peak host memory {max(seen) / 1e9:.2f} GB, {before / 1e9:.2f} of it from before; "
        f"grown by {(max(seen) - before) / weights:.3f} x the weights")


def arguments(argv=None):
    p = argparse.ArgumentParser(description="Speed and memory beside their bounds, on random weights.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--report", action="store_true", help="all that this machine can measure, as a block for the README")
    p.add_argument("--random", choices=CONFIGS, default="small", help="whose shapes")
    p.add_argument("--load", metavar="CKPT", help="only load this checkpoint, folder or name")
    p.add_argument("--layers", type=int, help="fewer decoder layers, at least 3; B and R shrink along")
    p.add_argument("--device", help="cpu, cuda; default: a GPU if there is one")
    p.add_argument("--dtype", help="default: the file's on a GPU; on a CPU bfloat16, small and tiny ones float32")
    p.add_argument("--only", nargs="+", choices=[*PARTS, "check", "busy"], help="parts; default: all")
    p.add_argument("--models", nargs="+", choices=CONFIGS, help="with --report: only these")
    p.add_argument("--repeat", type=int, default=3, help="rounds that count; from 2 on, one more warms up")
    p.add_argument("--minutes", type=float, help="start nothing that ends later; with --report 8 on a GPU, else 90")
    p.add_argument("--results", type=Path, help="JSON file to go on with: what is in it is not measured again")
    return p.parse_args(argv)


def main(argv=None, say=lambda text: print(text, flush=True)):
    args = arguments(argv)
    if args.load:
        return load(args.load, args.device, args.dtype, say)
    if args.report:
        return report.main(args, say)
    parts = args.only or list(PARTS)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    say(report.stamp(device))
    say(f"python tests/bench.py {' '.join(sys.argv[1:] if argv is None else argv)}\n")
    for part in ("check", "busy"):
        if part in parts:
            for row in getattr(report, part)(device, say):
                say(report.line(*row))
    parts = [part for part in parts if part in PARTS]
    if not parts:
        return []
    bench = Bench(args, say)
    say(f"{bench.entry()}: {bench.facts()}")
    say(f"{'':66}{'measured':>14}{'bound':>12}")
    store = report.Store(args.results) if args.results else None
    if store:
        store.describe(bench.entry(), bench.facts())
    until = time.time() + 60 * args.minutes if args.minutes else float("inf")
    measure(bench, parts, until, store)
    return bench.rows


if __name__ == "__main__":
    main()

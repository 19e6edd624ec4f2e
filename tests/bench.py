"""
Speed and memory on random weights of the true shapes, each figure beside the bound that FLOPs and bytes set (bounds.py).

    python tests/bench.py --random small                                          # every part, some minutes on two cores
    python tests/bench.py --random llava-1.5-7b --only answer ratios --repeat 1   # 15 GB in bfloat16
    python tests/bench.py --random llava-1.5-13b --device cuda --dtype float16
    python tests/bench.py --load llava-1.5-7b                                     # seconds and memory of loading a checkpoint

Ratios are taken in one run: rounds over all variants, medians (--repeat 1: one round, nothing warmed up). Nothing is asserted.
Left out: the answers' quality (weights are random), several GPUs, disk.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

from bounds import NEW, SIZES, Machine, best, sync  # also puts the project on the path
from random_llava import QUESTION, Steered, band, random_model, squares

import train
from clip import preprocess
from model import KVCache, LLaVA, rope_table, rotate, torch_dtype
from sdrpn import Answer, answer, head_pairs, picture_cells, regions_above, smooth, teach

GENERAL = "Write a general description of the image."  # ViCrop's second prompt


# ---------------------------------------------------------------------------------------------- the peer

def all_maps(llava, x):
    """ViCrop as published: every layer works out and keeps its attention map (1, H, T, T)."""
    T, c, maps = x.shape[1], llava.config, []
    rope = rope_table(0, T, c["head_dim"], c["rope_theta"], x.device, x.dtype)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    for block in llava.language_model.layers:
        a, y = block.self_attn, block.input_layernorm(x)
        q, k, v = rotate(a.split(a.q_proj(y)), rope), rotate(a.split(a.k_proj(y)), rope), a.split(a.v_proj(y))
        maps.append((q @ k.mT / a.d ** 0.5).masked_fill(future, float("-inf")).float().softmax(-1).to(x.dtype))
        x = x + a.o_proj((maps[-1] @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return maps


def attention_row(llava, x, layer, cache, start=0):
    """The layers below run as usual; of this one only k of the tokens and the last token's attention, (start + t) on the host."""
    x, c, t = llava.run(x, 0, layer, cache, start), llava.config, x.shape[1]
    block, rope = llava.language_model.layers[layer], rope_table(start, t, c["head_dim"], c["rope_theta"], x.device, x.dtype)
    a, y = block.self_attn, block.input_layernorm(x)
    cache.k[layer][:, :, start:start + t] = rotate(a.split(a.k_proj(y)), rope)
    q = rotate(a.split(a.q_proj(y[:, -1:])), tuple(r[-1:] for r in rope))
    return (q @ cache.k[layer][:, :, :start + t].mT / a.d ** 0.5).float().softmax(-1).mean(1)[0, 0].cpu()


# ------------------------------------------------------------------------------------------------- parts

class Bench:
    def __init__(self, args, say):
        self.args, self.say, self.rows = args, say, []
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.cuda = self.device.type == "cuda"
        self.dtype = torch_dtype(args.dtype) or (torch.float16 if self.cuda else torch.bfloat16 if "llava" in args.random else torch.float32)
        self.m = Machine(self.device, self.dtype, args.random == "tiny")
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.llava, self.rpn, self.recipe, self.w = random_model(args.random, self.device, self.dtype, args.layers)
        self.image = Image.effect_noise((480, 480), 60).convert("RGB")  # square: no padding, so every cell may be cropped
        self.pixels = preprocess(self.image, self.llava.vision_tower.image_size)
        self.ids = self.llava.prompt_ids(QUESTION)
        self.g, self.N = self.llava.grid, self.llava.num_image_tokens
        self.T, self.P = len(self.ids) + self.N - 1, self.ids.index(self.llava.image_token) + self.N
        self.n = round(300 / 576 * self.N)

    def put(self, name, measured, bound=None, unit="", note=""):
        show = lambda x: "" if x is None else f"{x:,.{3 if abs(x) < 10 else 1 if abs(x) < 1000 else 0}f}{unit}"
        self.rows.append((name, measured, bound))
        self.say(f"{name:62}{show(measured):>12}{show(bound):>12}  {note}".rstrip())

    def ask(self, cells=None, mode="mask", new=NEW, **how):
        """An answer in two stages that crops these cells, the RPN running; without cells a plain one."""
        return answer(self.llava, Steered(self.rpn, cells) if cells is not None else self.rpn, self.image, QUESTION,
                      mode if cells is not None or "mask" in how else "plain", max_new_tokens=new, ignore_eos=True, **how)

    def interleave(self, **runs):
        """name=function -> {name: {stage: median ms}}; "all" is the wall time of the whole."""
        times, warm = {name: [] for name in runs}, int(self.args.repeat > 1)
        for _ in range(self.args.repeat + warm):
            for name, run in runs.items():
                sync(self.device)
                began = time.perf_counter()
                out = run()
                sync(self.device)
                times[name].append({"all": 1000 * (time.perf_counter() - began)} | (out.ms if isinstance(out, Answer) else {}))
        return {name: {k: statistics.median(r[k] for r in rounds[warm:]) for k in rounds[0]} for name, rounds in times.items()}

    def host(self, run):
        """Median ms of something small on the host."""
        return 1000 * statistics.median(best(run, torch.device("cpu"), 1) for _ in range(5))

    def memory(self):
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9

    def answers(self):
        """One question by both ways: time per stage, peak memory. It goes first, since a peak can not be taken back."""
        w, m, T, n = self.w, self.m, self.T, self.n
        encode, second = m.seconds(w.encode()), w.second(T, self.P, n)
        bounds = {"plain": dict(encode=encode, prefill=w.prefill_seconds(m, w.plain(T)), decode=w.decode_seconds(m, T, NEW)),
                  "two-stage": dict(encode=encode, rpn=m.seconds(w.roi(T)), crop=m.seconds(w.encode(1, n)),
                                    prefill=w.prefill_seconds(m, second), decode=w.decode_seconds(m, T + n, NEW))}
        for name, ms in self.interleave(plain=self.ask, **{"two-stage": lambda: self.ask(band(self.g, n))}).items():
            for stage, value in ms.items():
                bound = sum(bounds[name].values()) if stage == "all" else bounds[name].get(stage, 0)
                self.put(f"{name}: {'from picture to text' if stage == 'all' else stage}", value, 1000 * bound, " ms")
        size = w.itemsize * sum(p.numel() for net in (self.llava, self.rpn) for p in net.parameters())
        size += w.cache_bytes(T + self.N + NEW) + 3 * w.c["intermediate_size"] * (T + n) * w.itemsize
        self.put("peak memory; bound: weights, cache, widest activation", self.memory(), size / 1e9, " GB",
                 "allocated on the GPU" if self.cuda else "resident, libraries included")

    def ratios(self):
        w, m, T, P, n = self.w, self.m, self.T, self.P, self.n
        cells, none = band(self.g, n), band(self.g, 0)
        t = self.interleave(plain=self.ask, **{
            "reuse": lambda: self.ask(cells), "recompute": lambda: self.ask(cells, reuse=False), "supplied": lambda: self.ask(mask=cells),
            "no RoI": lambda: self.ask(none), "no RoI recompute": lambda: self.ask(none, reuse=False)})
        prefill = {k: v["prefill"] + v.get("rpn", 0) for k, v in t.items()}
        two = {"reuse": (n, True), "recompute": (n, False), "no RoI": (0, True), "no RoI recompute": (0, False)}
        for name, (crop, reuse) in two.items():
            self.put(f"two-stage prefill, {name} / plain prefill", prefill[name] / prefill["plain"],
                     w.two_stage(T, P, crop, reuse) / w.plain(T), " x", "target 1.65" if name == "reuse" else "")
        targets = {"reuse": "target 0.80 on a GPU; published 0.62", "no RoI": "target 0.96 on a GPU, 0.90 on a CPU"}
        for name, (crop, reuse) in two.items():
            self.put(f"throughput, {name} / plain, {NEW} new, {crop} crop tokens", t["plain"]["all"] / t[name]["all"],
                     w.plain_seconds(m, T) / w.two_stage_seconds(m, T, P, crop, reuse=reuse), " x", targets.get(name, ""))
        for stage, parts in {"encode": ("encode", "crop"), "prefill": ("rpn", "prefill"), "decode": ("decode",)}.items():
            self.put(f"    {stage}: plain", t["plain"][stage], None, " ms")
            self.put(f"    {stage}: two-stage", sum(t["reuse"][p] for p in parts), None, " ms")
        told = torch.where(cells, 9.0, -9.0)
        given = t["supplied"]["regions"] - self.host(lambda: regions_above(cells.float(), 0.0, small=False))  # layers 0..B-1
        self.put("RoI stage in an answer: RPN minus supplied mask, in prefills", (t["reuse"]["rpn"] - given) / t["plain"]["prefill"],
                 w.rpn(T) / w.plain(T), " x", "target 0.12")
        self.put("    its post-processing on the host", self.host(
            lambda: regions_above(smooth(told.sigmoid() * picture_cells(self.g, self.image.size)), 0.15)), None, " ms", "target 2 ms")

    @torch.no_grad()
    def peers(self):
        """The RoI stage, picture to map, against what ViCrop rel-att does before its crop: two prompts, one layer's attention."""
        llava, w, layer, view = self.llava, self.w, min(head_pairs(self.recipe["attention"], 1)), lambda: self.llava.view(self.image)
        prompts = [self.ids, llava.prompt_ids(GENERAL)]
        T, T2 = (len(p) + self.N - 1 for p in prompts)

        def published():
            return [all_maps(llava, llava.embed_prompt(p, view())[0])[layer][0, :, -1].mean(0).cpu() for p in prompts]

        def stopped():
            return [attention_row(llava, llava.embed_prompt(p, view())[0], layer, KVCache(llava, 1, T)) for p in prompts]

        def shared():
            cache, tail = KVCache(llava, 1, T), prompts[1][prompts[1].index(llava.image_token) + 1:]
            return [attention_row(llava, llava.embed_prompt(prompts[0], view())[0], layer, cache),
                    attention_row(llava, llava.embed(tail), layer, cache, self.P)]

        t = self.interleave(ours=lambda: self.rpn(llava, self.image, QUESTION).cpu(), published=published, stopped=stopped, shared=shared)
        enc, ours, below = w.encode(), w.encode() + w.roi(T), lambda t, start=0: layer * w.layer(t, start) + w.row(t, start)
        self.put("RoI stage, picture to map", t["ours"]["all"], 1000 * self.m.seconds(ours), " ms")
        for name, what, flops, note in (
                ("published", "ViCrop as published, two passes with all maps", 2 * enc + w.plain(T) + w.plain(T2), "target 3.0"),
                ("stopped", f"ViCrop stopped after layer {layer}", 2 * enc + below(T) + below(T2), "target 1.5"),
                ("shared", "ViCrop stopped, image prefix shared", enc + below(T) + below(T2 - self.P, self.P), "")):
            self.put(f"{what} / RoI stage", t[name]["all"] / t["ours"]["all"], flops / ours, " x", note)

    @torch.no_grad()
    def prefill(self, b, new):
        """Encode and embed b times the picture -> a function that runs the prefill: last hidden state, cache."""
        tokens = self.llava.encode_images(self.pixels.expand(b, -1, -1, -1))
        hidden = torch.cat([self.llava.embed_prompt(self.ids, tokens[i:i + 1])[0] for i in range(b)])

        def run():
            cache = KVCache(self.llava, b, self.T + new)
            return self.llava.run(hidden, 0, self.w.L, cache)[:, -1], cache
        return torch.no_grad()(run)

    def generate(self, b, new):
        """What LLaVA.generate does, for a batch of pixels."""
        return self.llava.decode(*self.prefill(b, new)(), self.T, new)

    def labels(self):
        """Labelling a sample against answering it, both from pixels, answers of a fixed length."""
        w, b = self.w, 8 if self.cuda else 1
        taps = len(self.recipe["attention"]) + len(self.recipe["sink"].get("attention", {}))
        for new in (5, 20):
            t = self.interleave(answer=lambda: self.generate(b, new), teach=lambda: teach(
                self.llava, self.recipe, self.pixels.expand(b, -1, -1, -1), [self.ids] * b, max_new_tokens=new))
            extra = self.m.seconds(b * taps * 2 * w.q * (new - 1) * (self.T + new))
            self.put(f"labelling / answering, batch {b}, {new} tokens", t["teach"]["all"] / t["answer"]["all"],
                     1 + extra / w.plain_seconds(self.m, self.T, new, b), " x", "target 1.05")

    def scaling(self):
        """How cost grows, against a plain answer of the same conversation, or 8 single ones; predictions are ratios of bounds."""
        w, m, g, P = self.w, self.m, self.g, self.P
        past = tuple((f"{QUESTION} {i}", "a red sign") for i in range(3))
        long = len(self.llava.prompt_ids(QUESTION, past)) + self.N - 1
        cases = {f"{n} crop tokens": (self.T, n, 1, band(g, n), {}) for n in (round(share * self.N / 576) for share in (0, 144, 300, 576))}
        cases["1 region, Box Upscaling"] = self.T, self.N, 1, squares(g, (1, g // 3)), {"mode": "box"}
        cases["2 regions, Box Upscaling"] = self.T, 2 * self.N, 2, squares(g, (1, g // 3), (g // 2 + 1, g - 1)), {"mode": "box"}
        cases[f"4 turns, {self.n} crop tokens"] = long, self.n, 1, band(g, self.n), {"history": past}
        t = self.interleave(**{str(self.T): self.ask, str(long): lambda: self.ask(history=past)},
                            **{name: lambda cells=cells, how=how: self.ask(cells, **how) for name, (*_, cells, how) in cases.items()})
        for name, (T, n, crops, *_) in cases.items():
            self.put(f"two-stage / plain answer: {name}", t[name]["all"] / t[str(T)]["all"],
                     w.two_stage_seconds(m, T, P, n, crops) / w.plain_seconds(m, T), " x")
        t = self.interleave(one=lambda: self.generate(1, NEW), eight=lambda: self.generate(8, NEW))
        self.put("a plain batch of 8 / 8 plain answers", t["eight"]["all"] / (8 * t["one"]["all"]),
                 w.plain_seconds(m, self.T, b=8) / (8 * w.plain_seconds(m, self.T)), " x")

    def shares(self):
        """How near the prefill comes to the matmul peak, and decoding to the read bandwidth."""
        w, m, T, new = self.w, self.m, self.T, 24
        self.put("matmul peak", m.peak / 1e12, None, " TFLOP/s")
        self.put("read bandwidth", m.bandwidth / 1e9, None, " GB/s")
        for b, target in ((1, "0.45"), (8, "0.60")):
            run = self.prefill(b, new)
            prefill = self.interleave(it=run)["it"]["all"]
            state = run()
            decode = self.interleave(it=lambda: self.llava.decode(*state, T, new))["it"]["all"]
            self.put(f"prefill, batch {b}: share of the matmul peak", 1000 * b * w.plain(T) / m.peak / prefill, 1, "", f"target {target} on a GPU")
            self.put(f"decode, batch {b}: share of the bandwidth limit", 1000 * w.decode_seconds(m, T, new, b) / decode, 1, "", "target 0.65 on a GPU")
            self.put(f"    a token, batch {b}", decode / new, 1000 * w.decode_seconds(m, T, new, b) / new, " ms")

    def training(self):
        """Whole steps of train.py: read, teach, label, student, AdamW. Every sample gets labels, whatever its random map says."""
        if not self.cuda and self.args.random.startswith("llava"):
            return self.say("training step: left out on a CPU at this size")
        w, (micro, accumulate) = self.w, (8, 4) if self.cuda else (2, 1)
        teacher = min(self.args.teacher_batch, micro * accumulate)
        steps, real = self.args.repeat + (self.args.repeat > 1), train.target
        told = (torch.arange(self.N, device=self.device) % 3 - 1).to(torch.int8)[None]
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(vars(train), dict(
                find_checkpoint=lambda name: Path(folder), LLaVA=types.SimpleNamespace(load=lambda *how: self.llava), say=lambda *words: None,
                load_recipe=lambda llava: self.recipe, target=lambda *how: (real(*how), told)[1])):
            self.image.save(Path(folder, "a.png"))
            Path(folder, "q.jsonl").write_text((json.dumps({"image": "a.png", "question": QUESTION}) + "\n") * steps * micro * accumulate)
            for new in (5, 20, 128) if self.cuda else (5,):
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                run = train.Run(train.parser().parse_args(
                    f"--ckpt random --data {folder}/q.jsonl --out {folder}/{new} --max-new-tokens {new} --batch-size {micro} "
                    f"--grad-accum {accumulate} --teacher-batch {teacher} --epochs 1 --device {self.device}".split()))
                run.restore()
                todo = iter(range(steps))
                rate = 1000 * micro * accumulate / self.interleave(step=lambda: run.step(next(todo)))["step"]["all"]
                flops = w.encode() + w.plain(self.T) + 3 * w.rpn(self.T)
                seconds = self.m.seconds(flops) + w.decode_seconds(self.m, self.T, new, teacher) / teacher
                self.put(f"training, answers of {new} tokens, batch {micro} x {accumulate}", rate, 1 / seconds, " /s")
                self.put("    share of the matmul peak, decoding not counted", rate * flops / self.m.peak, flops / self.m.peak / seconds, "",
                         "target 0.45 on a GPU" if new == 5 else "")
                if self.cuda:
                    self.put("    peak memory", self.memory(), None, " GB", "target 26 GB")
                del run

    def compile(self):
        """From here on both sides decode with the compiled step; one answer decoded both ways first."""
        new, T = 64, self.T
        eager = self.interleave(it=lambda: self.ask(new=new))["it"]["decode"]
        self.put("compiling the decode step, once", self.llava.compile_decode(T + new, T + self.N + new), None, " s")
        self.put(f"decode, eager / compiled, {new} tokens", eager / self.interleave(it=lambda: self.ask(new=new))["it"]["decode"], None, " x")


def load(name, device, dtype, say):
    """Time and peak anonymous memory of loading a checkpoint: file pages that Linux may drop at any time do not count."""
    def anonymous():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    before, seen, done = anonymous(), [], threading.Event()

    def watch():
        while not done.wait(0.002):
            seen.append(anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    llava = LLaVA.load(name, device, dtype)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    weights = sum(p.nbytes for p in llava.parameters())
    say(f"{name}: {weights / 1e9:.2f} GB of weights in {str(llava.dtype)[6:]} on {llava.device}, loaded in {seconds:.1f} s; "
        f"peak host memory {max(seen) / 1e9:.2f} GB, {before / 1e9:.2f} of it from before; grown by {(max(seen) - before) / weights:.3f} x the weights")


PARTS = {"answer": Bench.answers, "ratios": Bench.ratios, "peers": Bench.peers, "labels": Bench.labels, "scaling": Bench.scaling,
         "shares": Bench.shares, "training": Bench.training}


def main(argv=None, say=lambda line: print(line, flush=True)):
    p = argparse.ArgumentParser(description="Speed and memory beside their bounds, on random weights.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--random", choices=SIZES, default="small", help="whose shapes")
    p.add_argument("--load", metavar="CKPT", help="only load this checkpoint, folder or name")
    p.add_argument("--layers", type=int, help="fewer decoder layers, at least 3; B and R shrink along")
    p.add_argument("--device", help="cpu, cuda; default: a GPU if there is one")
    p.add_argument("--dtype", help="default: float16 on a GPU; on a CPU bfloat16, small float32")
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    p.add_argument("--repeat", type=int, default=3, help="rounds that count; from 2 on, one more warms up")
    p.add_argument("--teacher-batch", type=int, default=8, help="of the training step")
    p.add_argument("--compile", action="store_true", help="compile the decode step first")
    args = p.parse_args(argv)
    if args.load:
        return load(args.load, args.device, args.dtype, say)
    bench, root = Bench(args, say), Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip() or "unknown"
    cpu = Path("/proc/cpuinfo")
    name = torch.cuda.get_device_name(bench.device) if bench.cuda else re.search(r"model name\s*: (.*)|$", cpu.read_text() if cpu.is_file() else "")[1] or "CPU"
    say(f"{name}, {str(bench.dtype)[6:]}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}: "
        f"{bench.m.peak / 1e12:.3g} TFLOP/s in matmul, {bench.m.bandwidth / 1e9:.3g} GB/s read")
    say(f"python tests/bench.py {' '.join(sys.argv[1:] if argv is None else argv)}")
    say(f"{args.random}: {bench.w.L} layers of {bench.w.D}, B={bench.w.B}, R={bench.w.R}, prompt {bench.T} tokens of which {bench.N} are the image's\n")
    say(f"{'':62}{'measured':>12}{'bound':>12}")
    if args.compile:
        bench.compile()
    for name in args.only:
        PARTS[name](bench)
    return bench.rows


if __name__ == "__main__":
    main()

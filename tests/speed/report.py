"""`python tests/speed/bench.py --report`: every speed and memory figure that this machine can measure, as one block.

Beside the parts of bench.py, which run model by model in processes of their own so that memory comes back, it has:

    check     do the device's answers equal the CPU's, on the toy and on the golden cases?
    busy      what a busy machine costs (CPU)
    reading   pictures per second with and without reading ahead, the model replaced by a sleep
    memory    memory of a training step, from shapes alone

The last line is one JSON object of all rows. What was measured is kept in out/bench/; if you stop it, the same command
resumes. Left out: several GPUs, answers' quality.
"""
import contextlib
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from random_llava import CONFIGS, QUESTION, SQUARE, TINY, skeleton  # also puts the project on the path

import deepseek_formula
import formula
import qwen_formula
import slow
import train
from clip import load_image, preprocess
from data.checkpoints import TOY
from data.run import read_ahead
from data.toy.scenes import ToyQuestions
from model import ROOT, load
from sdrpn import RPN, answer

MODELS = [  # layers if not all, parts; the small model of each family first
    ("small", None, ["answer", "prefix", "shares", "training", "scaling"]),
    ("deepseek-vl-1.3b", None, ["answer", "prefix", "shares"]),
    ("qwen2.5-vl-3b", None, ["answer", "prefix", "shares"]),
    ("llava-1.5-7b", None, ["answer", "prefix", "pope", "peers", "labels", "shares", "training"]),
    ("llava-1.5-7b", 8, ["training"]),
    ("deepseek-vl-7b", None, ["answer", "prefix"]),
    ("qwen2.5-vl-7b", None, ["answer", "prefix"]),
    ("llava-1.5-13b", None, ["answer", "prefix"]),
]


# ------------------------------------------------------------------------------------------- what is kept

def stamp(device):
    """The machine, the versions, the commit (and a short name of what was changed since), in one line."""
    cpu = Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        found = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.is_file() else None
        name = f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"
    commit, changed = git("rev-parse", "--short", "HEAD"), git("diff", "HEAD", "--", "*.py")
    if changed:
        commit += f"+{hashlib.sha256(changed.encode()).hexdigest()[:6]}"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}, commit {commit}"


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def line(name, measured, bound=None, unit=""):
    """A row of a table, as text."""
    def show(x):
        return "" if x is None else f"{x:,.{3 if abs(x) < 10 else 1 if abs(x) < 1000 else 0}f}{unit}"
    return f"{name:66}{show(measured):>14}{show(bound):>12}".rstrip()


def keep(path, entry, part, facts="", rows=(), why=None):
    """Append a part's rows, or why it was left out, to the results file, if there is one."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as f:
            print(json.dumps({"entry": entry, "part": part, "facts": facts, "rows": rows, "left_out": why}), file=f)


def kept(path):
    return [json.loads(text) for text in path.read_text().splitlines()] if path and path.is_file() else []


def block(results):
    """The kept parts as lines of text, one heading for each model."""
    lines, entry = [], None
    for part in results:
        if part["entry"] != entry:
            entry = part["entry"]
            lines += ["", f"{entry}: {part['facts']}".rstrip(": "), f"{'':66}{'measured':>14}{'bound':>12}"]
        lines += [line(*row) for row in part["rows"]]
        if part["left_out"]:
            lines.append(f"{part['part']}: left out: {part['left_out']}")
    return lines


# ------------------------------------------------------------------- the device's answers are the CPU's

def check(device, count=20):
    """Answers on this device in float32, against the CPU's (a CPU's: its own in float64)."""
    torch.backends.cudnn.allow_tf32 = False
    other = "float32" if device.type == "cuda" else "float64"
    for name, answers in (("the toy, answers and crops", toy_answers),
                          ("golden cases, greedy answers", golden_answers)):
        ours, theirs = answers(device, "float32", count), answers("cpu", other, count)
        same = [a[1:] == b[1:] for a, b in zip(ours, theirs)]
        off = [(a[0].double() - b[0].double()).abs().max().item() for a, b in zip(ours, theirs)]
        yield f"{name} equal the CPU's in {other}, of {len(same)}", sum(same), len(same)
        yield "    largest difference of a logit", max(off), 1e-3


def toy_answers(device, dtype, count):
    """-> [(the RPN's logits, answer, crops, plain answer)] of so many of the toy's questions."""
    m, found = load(TOY, device, dtype), []
    rpn = RPN.load(TOY, m)
    for picture, q in ToyQuestions("bench", count):
        got = answer(m, rpn, picture, q["question"][-1], max_new_tokens=16)
        found.append((got.logits, got.text, got.boxes, m.generate(picture, q["question"][-1], 16, prefix=got.prefix)))
    return found


def golden_answers(device, dtype, count):
    """-> [(logits of the prompt, greedy answer)] of so many golden cases of each family."""
    found = []
    for module in formula, deepseek_formula, qwen_formula:
        configs = getattr(module, "TINY", module.CONFIGS)
        for case in list(module.CASES.values())[:count]:
            how = {"budget": case["budget"]} if "budget" in case else {}
            with tempfile.TemporaryDirectory() as folder:
                m = load(module.write_checkpoint(Path(folder), configs[case["config"]], **how), device, dtype)
            picture, question, history = formula.picture(*case["picture"]), case["question"], case["history"]
            logits = slow.logits(m, picture, module.prompt(question, history)).cpu()
            found.append((logits, m.generate(picture, question, 16, history)))
    return found


# ------------------------------------------------------------------------------------- a busy machine

SETTINGS = {  # environment of a program
    "as it comes": {}, "one thread": {"OMP_NUM_THREADS": "1"},
    "all threads, that wait passively": {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "PASSIVE"},
    "all threads, that spin": {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "ACTIVE"}}
TRAIN = ("import sys, train; train.finish = lambda *how: None; "
         "train.main(['--samples', '256', '--epochs', '1', '--device', 'cpu', '--out', sys.argv[1]])")
ASK = ["infer.py", "data/toy/samples/images/00002.png", "What colour is the dot on the star?", "--ckpt", "toy",
       "--device", "cpu", "--rpn", "data/toy/llava-toy/rpn.safetensors", "--save", "none"]


def busy(device):
    """Wall time of an answer of the toy, and samples a second of its training: quiet, and beside two busy programs."""
    for load_name, programs in (("quiet", 0), ("beside 2 busy programs", 2)):
        for name, settings in SETTINGS.items():
            environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")} | settings
            how = dict(cwd=ROOT, env=environment, check=True, capture_output=True)
            with busy_programs(programs), tempfile.TemporaryDirectory() as folder:
                seconds = []
                for _ in range(3):
                    began = time.perf_counter()
                    subprocess.run([sys.executable, *ASK], **how)
                    seconds.append(time.perf_counter() - began)
                subprocess.run([sys.executable, "-c", TRAIN, f"{folder}/run"], **how)
                rate = training_rate(Path(folder, "run"))
            yield f"infer.py on the toy, {load_name}, {name}", statistics.median(seconds), None, " s"
            yield "    the worst of three", max(seconds), None, " s"
            yield f"    train.py on the toy, {load_name}, {name}", rate, None, " /s"


def training_rate(run):
    """Samples a second of a run's folder, its first step left out."""
    first, *others = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return sum(step["samples"] for step in others) / (others[-1]["seconds"] - first["seconds"])


@contextlib.contextmanager
def busy_programs(count):
    code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # it ends with this process
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


# ------------------------------------------------------------------------------------------ reading ahead

def reading(device, steps=40, batch=4):
    """Steps whose pictures take as long to read and scale as a sample takes the model, which sleeps: like a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture.png")
        Image.effect_noise((640, 480), 60).convert("RGB").save(path)

        def load_one(_):
            return preprocess(load_image(path), 336)
        began = time.perf_counter()
        for _ in range(20):
            load_one(0)
        one = (time.perf_counter() - began) / 20
        seconds = {}
        for name, ahead in (("without", 0), ("with", 2)):
            began = time.perf_counter()
            for loaded in read_ahead(load_one, [range(batch)] * steps, ahead=ahead, threads=2):
                time.sleep(one * len(loaded))
            seconds[name] = (time.perf_counter() - began) / steps
    yield "reading and scaling a picture of 640 x 480", 1000 * one, None, " ms"
    for name, each in seconds.items():
        yield f"pictures per second, {name} reading ahead", batch / each, 1 / one, " /s"
    yield "a step with reading ahead / its larger half", seconds["with"] / (batch * one), 1, " x"


# ------------------------------------------------------------------------------------ memory, from shapes

class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it lasts: `now`, and the most at once, `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.device.type != "meta" and t.untyped_storage() not in self.known:
                storage, size = t.untyped_storage(), t.untyped_storage().nbytes()
                self.known.add(storage)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, size)
        return result

    def free(self, size):
        self.now -= size


def training_bytes(name, batch=8, layers=None):
    """The most that train.py holds at once in bfloat16: the last group of a step, the teacher's prompt and the student.

    From the shapes of fake tensors; nothing is computed. Libraries and the allocator's waste are not counted.
    """
    shape = skeleton(name)[0].pixels(Image.new("RGB", (SQUARE, SQUARE))).shape
    honest = mock.patch.object(FakeTensorMode, "avoid_device_init", False)  # else it feigns a GPU: no forks then
    with honest, FakeTensorMode(), Peak() as peak:
        m, rpn, recipe = skeleton(name, layers)
        B = recipe.frozen_layers
        for module, dtype in (m, torch.bfloat16), (rpn, torch.float32):
            weights = {key: torch.empty(p.shape, dtype=dtype) for key, p in module.state_dict().items()}
            module.load_state_dict(weights, assign=True)
        m.requires_grad_(False)
        del weights
        for p in rpn.parameters():
            p.grad = torch.empty_like(p)  # of the groups before
        optimizer = torch.optim.AdamW(rpn.parameters(), fused=True)
        optimizer.step()  # makes its moments
        with torch.no_grad():
            prefix = m.prefill(torch.empty(batch, *shape), keep=train.prefix_layers(recipe))
            tail = m.embed(m.tail(m.prompt_ids(QUESTION))).repeat(batch, 1, 1)
            rope, P = m.text_rope(prefix.position, tail.shape[1]), prefix.columns.stop
            tail = m.run(tail, 0, B, rope, prefix.cache, P)
            m.head(m.run(tail, B, m.depth, rope, prefix.cache, P)[:, -1])
        hidden, columns = torch.cat([prefix.hidden[B], tail], 1), prefix.columns
        rope = torch.cat([prefix.rope, rope], 1)
        del prefix
        with torch.autocast("cpu", torch.bfloat16):
            scores = rpn.score(hidden, columns, [-1], rope)
        train.group_loss(scores, torch.ones(batch, 1, scores.shape[-1])).backward()
    return peak.peak


def memory(device):
    for name in CONFIGS:
        if name not in (*TINY, "small"):
            yield f"{name}: a training step of 8 samples, bfloat16", training_bytes(name) / 2 ** 30, None, " GiB"


ALONE = {"check": check, "busy": busy, "reading": reading, "memory": memory}


# --------------------------------------------------------------------------------------- the whole of it

def bench_process(words, seconds):
    """bench.py in a process of its own, stopped after so many seconds -> its exit code, or None; stdout to stderr."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run([sys.executable, Path(__file__).with_name("bench.py"), *words], stdout=sys.stderr,
                              timeout=max(seconds, 0.1)).returncode


def main(args, log, run=bench_process):
    """Everything within --minutes: a block of text, then one line of JSON."""
    cuda, head = args.device.type == "cuda", stamp(args.device)
    until = time.time() + 60 * (args.minutes or (8 if cuda else 90))
    store = ROOT / "out" / "bench" / (re.sub(r"[^\w.+-]+", "-", head) + ".jsonl")
    print(f"results so far: {store}", file=sys.stderr, flush=True)
    for name, layers, parts in [("", None, ["check", "memory", "reading"]), *MODELS, ("", None, ["busy"])]:
        parts = [part for part in parts if part in (args.only or parts)]
        if not parts or name and args.models and name not in args.models or cuda and (layers or parts == ["busy"]):
            continue
        words = ["--only", *parts, "--results", store, "--repeat", args.repeat, "--device", args.device]
        words += ["--random", name] if name else []
        words += ["--layers", layers] if layers else []
        code = run([str(word) for word in words], until - time.time())
        if code != 0:
            why = "the minutes are over" if code is None else f"ended with {code}"
            print(f"{name or parts[0]}: {why}; the same command resumes", file=sys.stderr, flush=True)
        if code is None:
            break
    results = kept(store)
    log("\n".join(["```", head, f"python tests/speed/bench.py {' '.join(sys.argv[1:])}", *block(results), "```"]))
    log(json.dumps({"machine": head, "parts": results}))

"""
`python tests/bench.py --report`: every row of the README's tables of speed that this machine can measure, as one block.

    1. do the device's answers equal the CPU's, on the toy and on the golden cases?
    2. what a busy machine costs (on a CPU)
    3. the parts of bench.py, model by model, each in a process of its own, so that memory comes back

Results so far lie in out/bench/<device, versions, commit>.json: stopped at any moment, the same command goes on.
Left out: several GPUs, answers' quality.
"""
import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE / "golden")]

from data.files import write_text  # noqa: E402 (the project is on the path only now)
from data.toy.scenes import ToyQuestions  # noqa: E402
from model import load  # noqa: E402
from sdrpn import RPN, answer  # noqa: E402

ON_GPU = [  # model, layers, parts: the most wanted first
    ("llava-1.5-7b", None, "answer ratios peers labels shares kernels training compile reference".split()),
    ("llava-1.5-13b", None, ["answer", "ratios"]),
    ("deepseek-vl-1.3b", None, ["answer", "ratios", "shares", "kernels"]),
    ("qwen2.5-vl-3b", None, ["answer", "ratios", "shares", "kernels"]),
    ("deepseek-vl-7b", None, ["answer", "ratios"]),
    ("qwen2.5-vl-7b", None, ["answer", "ratios"]),
    ("llava-1.5-7b", None, ["scaling"]),
]
ON_CPU = [  # the smallest of each family first
    ("deepseek-vl-1.3b", None, ["answer", "ratios", "kernels"]),
    ("qwen2.5-vl-3b", None, ["answer", "ratios", "kernels"]),
    ("llava-1.5-7b", None, ["answer", "ratios", "peers", "labels", "kernels"]),
    ("llava-1.5-7b", 8, ["training"]),  # of all its layers, with AdamW's moments, it needs more memory than most have
    ("small", None, ["scaling", "reference", "compile"]),
    ("llava-1.5-7b", None, ["shares"]),
    ("deepseek-vl-7b", None, ["answer", "ratios"]),
    ("qwen2.5-vl-7b", None, ["answer", "ratios"]),
    ("llava-1.5-13b", None, ["answer", "ratios"]),
]
FAMILIES = ("formula", "deepseek_formula", "qwen_formula")  # tests/golden/: tiny models of each


# ------------------------------------------------------------------------------------------- what is kept

def stamp(device):
    """The machine, the versions, the commit, in one line."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        cpu = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.is_file() else None
        name = f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}, commit {commit()}"


def commit():
    """The commit; with what was changed since, as a short name of the change."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    name, changed = git("rev-parse", "--short", "HEAD"), git("diff", "HEAD", "--", "*.py")
    if changed:
        name += f"+{hashlib.sha256(changed.encode()).hexdigest()[:6]}"
    return name or "unknown"


def line(name, measured, bound=None, unit="", note=""):
    """A row of a table, as text."""
    def show(x):
        return "" if x is None else f"{x:,.{3 if abs(x) < 10 else 1 if abs(x) < 1000 else 0}f}{unit}"
    return f"{name:66}{show(measured):>14}{show(bound):>12}  {note}".rstrip()


class Store:
    """Rows so far: {entry: {"facts": text, "parts": {part: {"rows": [...], "left_out": why, "begun": times}}}}."""

    def __init__(self, path):
        self.path = Path(path)
        self.entries = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def write(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.entries, indent=1) + "\n")

    def part(self, entry, part):
        parts = self.entries.setdefault(entry, {"facts": "", "parts": {}})["parts"]
        return parts.setdefault(part, {"rows": [], "left_out": None, "begun": 0})

    def describe(self, entry, facts):
        self.entries.setdefault(entry, {"facts": "", "parts": {}})["facts"] = facts

    def rows(self, entry, part):
        return self.part(entry, part)["rows"]

    def begin(self, entry, part):
        self.part(entry, part)["begun"] += 1
        self.write()

    def stopped_twice(self, entry, part):
        found = self.part(entry, part)
        return "stopped in it twice" if found["begun"] >= 2 and not found["rows"] else None

    def end(self, entry, part, rows, left_out=None):
        found = self.part(entry, part)
        found |= {"rows": rows, "left_out": left_out}
        if not (rows or left_out):
            found["left_out"] = "gave no row"
        self.write()

    def block(self, head):
        """The markdown block for the README."""
        lines = [*head, ""]
        for entry, found in self.entries.items():
            lines += [f"{entry}: {found['facts']}".rstrip(": "), f"{'':66}{'measured':>14}{'bound':>12}"]
            lines += [line(*row) for part in found["parts"].values() for row in part["rows"]]
            lines += [f"{part}: left out: {kept['left_out']}" for part, kept in found["parts"].items()
                      if not kept["rows"] and kept["left_out"]]
            lines.append("")
        return "\n".join(["```", *lines[:-1], "```"])


# ------------------------------------------------------------------- 1. the device's answers are the CPU's

def check(device, say):
    """The toy's answers and the golden cases on this device in float32, against the CPU's (a CPU: its float64)."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        return [*check_toy(device, 20), *check_golden(device)]
    finally:
        torch.backends.cudnn.allow_tf32 = before


def other_dtype(device):
    return "float32" if device.type == "cuda" else "float64"


def check_toy(device, count):
    said, other = [], other_dtype(device)
    for where, dtype in ((device, "float32"), ("cpu", other)):
        m = load("toy", where, dtype)
        rpn = RPN.load(m.folder / "rpn.safetensors", m)
        questions = ToyQuestions("bench", count)
        asked = [(picture, q["question"][-1]) for picture, q in (questions[i] for i in range(count))]
        said.append([(m.generate(picture, question, 16), answer(m, rpn, picture, question, max_new_tokens=16))
                     for picture, question in asked])
    pairs = list(zip(*said, strict=True))
    plain = sum(ours[0] == theirs[0] for ours, theirs in pairs)
    two = sum((ours[1].text, ours[1].boxes) == (theirs[1].text, theirs[1].boxes) for ours, theirs in pairs)
    off = max((ours[1].logits - theirs[1].logits).abs().max().item() for ours, theirs in pairs)
    yield f"the toy, answers equal the CPU's in {other}, of {count}", plain, count
    yield "    two-stage: answers and crops", two, count
    yield "    largest difference of an RPN logit", off, None


def golden_cases():
    """-> (family's module, name, config, case) of every golden case that is here."""
    for name in FAMILIES:
        if importlib.util.find_spec(name) is None:
            continue
        module = importlib.import_module(name)
        configs = module.TINY if hasattr(module, "TINY") else module.CONFIGS
        for case, facts in module.CASES.items():
            yield module, case, configs[facts["config"]], facts


def check_golden(device):
    """Tiny models of every family: logits of a prompt, and a greedy answer."""
    from formula import picture
    other, cases, same, off = other_dtype(device), 0, 0, 0.0
    for module, _, config, case in golden_cases():
        with tempfile.TemporaryDirectory() as folder:
            how = {"budget": case["budget"]} if "budget" in case else {}
            module.write_checkpoint(Path(folder), config, **how)
            found = []
            for where, dtype in ((device, "float32"), ("cpu", other)):
                m = load(folder, where, dtype)
                shown, text = picture(*case["picture"]), module.prompt(case["question"], case["history"])
                greedy = m.generate(shown, case["question"], 16, case["history"])
                found.append((m.logits(shown, text).double().cpu(), greedy))
        cases += 1
        same += found[0][1] == found[1][1]
        off = max(off, (found[0][0] - found[1][0]).abs().max().item())
    yield f"golden cases, greedy answers equal the CPU's in {other}, of {cases}", same, cases
    yield "    largest difference of a logit", off, 1e-3


# ------------------------------------------------------------------------------------- 2. a busy machine

SETTINGS = {  # environment of a program; None: not set
    "as it comes": {}, "one thread": {"OMP_NUM_THREADS": "1"},
    "all threads, that wait passively": {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "PASSIVE"},
    "all threads, that spin": {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "ACTIVE"}}
TRAIN = ("import sys, train; train.finish = lambda *how: None; "
         "train.main(['--samples', '256', '--epochs', '1', '--device', 'cpu', '--out', sys.argv[1]])")


def busy(device, say, repeat=3):
    """Wall time of an answer of the toy, and samples a second of its training: quiet, and beside two busy programs."""
    for load_name, programs in (("quiet", 0), ("beside 2 busy programs", 2)):
        for name, settings in SETTINGS.items():
            with busy_programs(programs):
                answers = [seconds_of_answer(settings) for _ in range(repeat)]
                rate = statistics.median(samples_per_second(settings) for _ in range(repeat))
            yield (f"infer.py on the toy, {load_name}, {name}", statistics.median(answers), None, " s",
                   f"worst {max(answers):.1f} s" + ("; target 4" if name == "as it comes" else ""))
            yield f"    train.py on the toy, {load_name}, {name}", rate, None, " /s"


@contextlib.contextmanager
def busy_programs(count):
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def environment(settings):
    plain = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    return plain | settings


def seconds_of_answer(settings):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "infer.py", "data/toy/samples/images/00002.png",
                   "What colour is the dot on the star?", "--ckpt", "toy", "--device", "cpu",
                   "--rpn", "data/toy/llava-toy/rpn.safetensors", "--save", f"{folder}/answer.png"]
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment(settings), check=True, capture_output=True)
        return time.perf_counter() - began


def samples_per_second(settings):
    """Of the steps after the first, from the run's log. What follows training is left out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", TRAIN, f"{folder}/run"]
        subprocess.run(command, cwd=ROOT, env=environment(settings), check=True, capture_output=True)
        first, *others = map(json.loads, Path(folder, "run", "log.jsonl").read_text().splitlines())
    return sum(step["samples"] for step in others) / (others[-1]["seconds"] - first["seconds"])


# --------------------------------------------------------------------------------------- 3. the whole of it

def bench_process(name, layers, parts, args, store, minutes):
    """Parts of one model in a process of its own; what it says goes to stderr."""
    command = [sys.executable, str(HERE / "bench.py"), "--random", name, "--only", *parts, "--results", str(store.path),
               "--repeat", str(args.repeat), "--minutes", f"{minutes:.2f}"]
    for flag, value in (("--layers", layers), ("--device", args.device), ("--dtype", args.dtype)):
        if value:
            command += [flag, str(value)]
    return subprocess.run(command, stdout=sys.stderr).returncode


def main(args, say, run=bench_process):
    """Everything within --minutes -> the block, which is also said."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda, head = device.type == "cuda", stamp(device)
    until = time.time() + 60 * (args.minutes or (8 if cuda else 90))
    key = re.sub(r"[^\w.+-]+", "-", head)
    store = Store(ROOT / "out" / "bench" / f"{key}.json")
    print(f"results so far: {store.path}", file=sys.stderr, flush=True)
    for part, measure in (("check", check), ("busy", busy)):
        wanted = part in (args.only or ["check", *([] if cuda else ["busy"])])
        if wanted and not store.rows(part, part):
            rows = []
            for row in measure(device, say):
                print(line(*row), file=sys.stderr, flush=True)
                rows.append(row)
            store.end(part, part, rows)
    for name, layers, parts in ON_GPU if cuda else ON_CPU:
        parts = [part for part in parts if part in (args.only or parts)]
        if not parts or args.models and name not in args.models:
            continue
        left = (until - time.time()) / 60
        code = run(name, layers, parts, args, store, left)
        store = Store(store.path)
        if code:
            print(f"{name}: ended with {code}; the same command goes on", file=sys.stderr)
    command = "python tests/bench.py " + " ".join(sys.argv[1:])
    say(store.block([head, command]))
    return store

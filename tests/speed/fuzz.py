"""Rubbish in, one line out: damaged pictures, question files, configs, tokenizers, weights and run folders.

    python tests/fuzz.py --seed 0 --count 10000    # 20 minutes of one core; failures are printed, their files kept
    python tests/fuzz.py --seed 0 --only 4711      # one of these cases again, with all it says
    python tests/fuzz.py --kills 100               # SIGKILL at random moments of training; every run must end as
                                                   # if undisturbed

A case passes if the program ends with 0, or with 2 and one line that begins with its name; within 10 s of CPU
time and 4 GB, with no half-written file left behind. Case i depends on (seed, i) alone.
Left out: rubbish on the command line beyond a question's text, and what only a GPU would do.
"""
import argparse
import base64
import contextlib
import copy
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]

import infer  # noqa: E402
import train  # noqa: E402
from data import benchmarks, llava_mix  # noqa: E402
from data.run import Run  # noqa: E402
from formula import CONFIGS, picture, write_checkpoint  # noqa: E402
from model import load  # noqa: E402
from sdrpn import RPN  # noqa: E402

PROGRAMS = {"infer.py": infer, "train.py": train, "data/llava_mix.py": llava_mix, "data/benchmarks.py": benchmarks}
SECONDS, GIGABYTES = 10, 4
ASK = ("What is this?", "Is the red cup left of 12 books?", "And who?")


# ------------------------------------------------------------------------------------------- the intact files

def tiny(folder, shards=1):
    """A checkpoint of 100 KB, its recipe and an untrained RPN.

    Its attention is peaked enough that labels exist (with --max-new-tokens 3).
    """
    folder = write_checkpoint(folder, CONFIGS["grouped"], shards=shards)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("layers.1.self_attn.q_proj.weight") and "vision" not in name:
                tensors[name] *= 16
        save_file(tensors, path, metadata={"format": "pt"})
    (folder / "recipe.json").write_text(json.dumps({
        "attention": {"1": [1]}, "softmax": "image", "sink": {"kind": "norm", "c": 100.0},
        "frozen": 2, "layers": 2, "tau": 0.4,
        "train": {"lr": 1e-3, "warmup": 0.03, "betas": [0.9, 0.98], "epochs": 2, "batch_size": 4, "grad_accum": 2,
                  "clip": 1.0}}))
    m = load(folder, "cpu", "float32")
    facts = {"frozen": 2, "layers": 2, "ckpt": folder.name}
    RPN.from_layers(m, 2, 2).save(folder / "anyone.safetensors", facts)  # as released: of no checkpoint in particular
    RPN.from_layers(m, 2, 2).save(folder / "rpn.safetensors", facts | {"fingerprint": m.fingerprint})
    return folder


def question_file(folder, count, name="questions.jsonl"):
    """`count` questions, every eighth a conversation, with answers and boxes, over small pictures."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = [{"images": "."}]
    for i in range(count):
        picture(40 + 3 * i % 50, 70 - i % 40, i).save(folder / "pictures" / f"{i}.png")
        lines.append({
            "image": f"pictures/{i}.png", "question": list(ASK[:2]) if i % 8 == 7 else ASK[i % 3], "id": f"q{i}",
            "kind": ASK[i % 3][:3], "answers": ["a cup", "yes"], "boxes": [[2, 3, 20, 30]],
            "metric": ("exact", "vqa", "anls", "relaxed", "letter")[i % 5], "max_new_tokens": 4, "tau": 0.3})
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


def pictures(folder):
    """One small picture of every kind that must open."""
    folder.mkdir(parents=True, exist_ok=True)
    one, exif = picture(61, 47, 3), Image.Exif()
    exif[0x0112] = 6
    grey16 = one.convert("I").point(lambda v: v * 257).convert("I;16")
    for name, made, how in (
            ("a.jpg", one, dict(exif=exif)), ("cmyk.jpg", one.convert("CMYK"), {}), ("a.png", one, {}),
            ("a.bmp", one, {}), ("grey16.png", grey16, {}), ("alpha.png", one.convert("RGBA"), {}),
            ("palette.png", one.quantize(16), dict(transparency=3)), ("a.webp", one, {}),
            ("lossless.webp", one, dict(lossless=True)),
            ("a.gif", one, dict(save_all=True, append_images=[picture(61, 47, 4)])), ("a.tif", one, {}),
            ("float.tif", one.convert("F"), {}), ("deflate.tif", one, dict(compression="tiff_deflate")),
            ("progressive.jpg", one, dict(progressive=True))):
        made.save(folder / name, **how)
    return sorted(folder.iterdir())


def originals(folder):
    """Miniatures of files as their makers publish them -> {benchmark or "mix": path}."""
    (folder / "train_images").mkdir(parents=True)
    for part in ("gqa/images", "val2014"):
        (folder / part).mkdir(parents=True)
        picture(30, 20, 1).save(folder / part / "1.jpg")
    picture(30, 20, 1).save(folder / "train_images/1.jpg")
    buffer = io.BytesIO()
    picture(30, 20, 2).save(buffer, "PNG")
    talk = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Ann"}]
    encoded = base64.b64encode(buffer.getvalue()).decode()
    files = {
        "mix": [{"id": "1", "image": "gqa/images/1.jpg", "conversations": talk}, {"id": "2", "conversations": []}] * 2,
        "textvqa": {"data": [{"question_id": i, "image_id": "1", "question": "What?", "answers": ["a"] * 10}
                             for i in range(3)]},
        "pope": "".join(json.dumps({"question_id": i, "image": "1.jpg", "text": "Is it?", "label": "yes"}) + "\n"
                        for i in range(3)),
        "hrbench4k": "index\tquestion\timage\tanswer\tcategory\tcycle_category\tA\tB\n"
                     + f"0\tWhat?\t{encoded}\tA\tsingle\t0\tred\tblue\n" * 2}
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return {name: folder / name for name in files}


class World:
    """Everything intact, made once; a case takes what it damages from here."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        self.ckpt, self.shards = tiny(folder / "llava-tiny"), tiny(folder / "llava-shards", 3)
        self.questions, self.pictures = question_file(folder / "set", 8), pictures(folder / "mixed")
        self.originals = originals(folder / "originals")
        self.run = folder / "run"  # a training run stopped half-way
        quiet(train, train_argv(self.ckpt, self.questions, self.run, *RUN), stop_after=1)


RUN = ("--save-every", 0, "--epochs", 2, "--max-bad", 100)


def train_argv(ckpt, data, out, *more):
    return ["--ckpt", ckpt, "--data", data, "--out", out, "--max-new-tokens", 3, "--dtype", "float32",
            "--device", "cpu", *more]


def quiet(module, argv, stop_after=None):
    """main(argv) with nothing printed -> exit code; stop_after: as if Ctrl-C came in that step."""
    any_stops = Run.any_stops
    if stop_after:
        Run.any_stops = lambda run: run.step == stop_after
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module.main([str(a) for a in argv])
        return 0
    except SystemExit as e:
        return e.code or 0
    finally:
        Run.any_stops = any_stops


# -------------------------------------------------------------------------------------------------- damage

RUBBISH = [
    None, True, 0, 1, -1, 2, 7, 3.5, 1e-300, 1e308, float("nan"), float("inf"), 2 ** 31, 2 ** 63, 10 ** 30, "", " ",
    "x", "0", "../../x", "/etc/passwd", "a\0b", "\ud800", "\u202eabc", "\x1b[2J", "😀" * 50, "x" * 5000,
    "line\nbreak", [], {}, [[]], [None], {"a": 1}, [1, 2, 3]]


def damage_bytes(rng, data):
    if rng.random() < 0.03:
        return rng.choice((b"", b"\0", data[:rng.randrange(len(data) + 1)], rng.randbytes(300), data[::-1]))
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        i = rng.randrange(min(len(data), rng.choice((64, 1024, 1 << 30))) + 1)
        j = min(len(data), i + rng.choice((1, 1, 2, 4, 16, 256)))
        data[i:j] = rng.choice((
            rng.randbytes(j - i), bytes(j - i), b"\xff" * (j - i), b"", data[i:j] * 2,
            bytes(b ^ 1 << rng.randrange(8) for b in data[i:j]),
            rng.choice((b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\1\0", b"9" * 30, b"{", b"\"", b"\n", b"\r\n",
                        b"\xef\xbb\xbf"))))
    return bytes(data)


def damage_json(rng, value):
    """One or two entries of a JSON value replaced, dropped, renamed, wrapped or doubled -> text."""
    holder = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2))):
        places, todo = [], [holder]
        while todo:
            node = todo.pop()
            for key in (node if isinstance(node, dict) else range(len(node))):
                places.append((node, key))
                if isinstance(node[key], (dict, list)) and len(places) < 2000:
                    todo.append(node[key])
        node, key = rng.choice(places[1:] or places)
        what = rng.random()
        if what < 0.6:
            node[key] = copy.deepcopy(rng.choice(RUBBISH))
        elif what < 0.62:
            return '{"a": ' * 100000  # deeper than any parser goes
        elif what < 0.8:
            del node[key]
        elif what < 0.9 and isinstance(node, dict):
            node[key + "s"] = node.pop(key)
        else:
            node[key] = [node[key], node[key]]
        if not holder:
            return ""
    return json.dumps(holder[0], ensure_ascii=rng.random() < 0.5)


def damage_lines(rng, text):
    lines = text.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = damage_json(rng, json.loads(lines[i]))
    return rng.choice(("\n", "\n", "\r\n")).join(lines) + rng.choice(("\n", ""))


def damage_tensors(rng, data):
    """A safetensors file: its header changed, correctly framed or not; any bytes; numbers that are not finite."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8:8 + size], data[8 + size:]
    what = rng.random()
    if what < 0.5:
        header = damage_json(rng, json.loads(header)).encode(errors="replace")
        length = len(header) if what < 0.45 else rng.choice((0, 7, size, 1 << 40, (1 << 63) - 1))
        return length.to_bytes(8, "little") + header + body
    if what < 0.8:
        return damage_bytes(rng, data)
    i = rng.randrange(len(body) // 4) * 4
    wrong = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\0" * 50))
    return data[:8 + size] + body[:i] + wrong + body[i + 4:]


def damage_file(rng, path):
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return damage_tensors(rng, data)
    if rng.random() < 0.25 or path.suffix not in (".json", ".jsonl", "") or path.name == "hrbench4k":
        return damage_bytes(rng, data)
    text = data.decode()
    if path.suffix == ".jsonl" or path.name == "pope":
        return damage_lines(rng, text).encode(errors="replace")
    return damage_json(rng, json.loads(text)).encode(errors="replace")


# --------------------------------------------------------------------------------------------------- cases

def with_damaged(rng, folder, name, case):
    """A copy of `folder` in which `name` is damaged and all else is linked."""
    for path in folder.rglob("*"):
        if path.is_file():
            there = case / folder.name / path.relative_to(folder)
            there.parent.mkdir(parents=True, exist_ok=True)
            if path.name == name:
                there.write_bytes(damage_file(rng, path))
            elif folder.name == "run":
                shutil.copy(path, there)
            else:
                there.symlink_to(path)
    return case / folder.name


KINDS = {"image": 30, "eval": 12, "train": 5, "config": 11, "recipe": 6, "index": 4, "tokenizer": 6, "weights": 9,
         "rpn": 6, "run": 4, "rows": 2, "mix": 5, "benchmark": 8, "text": 3}  # with their weights
FILES = {"config": "config.json", "recipe": "recipe.json", "index": "model.safetensors.index.json",
         "tokenizer": "tokenizer.model", "weights": "model.safetensors"}
SHORT = ("--samples", 4, "--epochs", 1, "--batch-size", 2, "--grad-accum", 2, "--max-bad", 100)


def make_case(world, seed, i, case):
    """-> program, argv. `case` is a folder of its own for the damaged file and all output."""
    rng = random.Random(f"{seed}/{i}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    ckpt, image, question = world.ckpt, world.pictures[0], rng.choice(ASK)
    mode = rng.choice(("mask", "box", "plain"))
    how = ["--max-new-tokens", 2, "--device", "cpu", "--mode", mode]
    if kind in ("mix", "benchmark"):
        return case_of_originals(world, rng, kind, case)
    if kind in ("eval", "train"):
        data = case / "questions.jsonl"
        data.write_bytes(damage_file(rng, world.questions))
        images = ["--images", world.questions.parent]
        if kind == "eval":
            return "infer.py", ["--eval", data, *images, "--limit", 2, "--ckpt", ckpt, *how]
        return "train.py", train_argv(ckpt, data, case / "run", *images, *SHORT)
    if kind == "rows":
        argv = ["--eval", world.questions, "--limit", 2, "--ckpt", ckpt, *how]
        infer.ROOT = case
        quiet(infer, argv)
        for path in (case / "out" / "eval").glob("*.jsonl"):
            path.write_bytes(damage_file(rng, path))
        return "infer.py", argv
    if kind == "run":
        name = rng.choice([p.name for p in sorted(world.run.rglob("*")) if p.is_file()])
        run = with_damaged(rng, world.run, name, case)
        return "train.py", train_argv(ckpt, world.questions, run, *RUN)
    if kind == "image":
        source = rng.choice(world.pictures)
        image = case / source.name
        image.write_bytes(damage_bytes(rng, source.read_bytes()))
    elif kind == "text":
        question = random_text(rng).lstrip("-")
    elif kind == "rpn":
        name = rng.choice(("rpn.safetensors", "anyone.safetensors"))
        ckpt = with_damaged(rng, ckpt, name, case)
        how[-1] = rng.choice(("mask", "box"))
        how += ["--rpn", ckpt / name]
    else:
        ckpt = with_damaged(rng, world.shards if kind == "index" else ckpt, FILES[kind], case)
        how += ["--rpn", ckpt / "anyone.safetensors"]
        if kind == "recipe" and rng.random() < 0.5:
            return "train.py", train_argv(ckpt, world.questions, case / "run", *SHORT)
    return "infer.py", [image, question, "--ckpt", ckpt, "--save", case / "picture.png", *how]


def case_of_originals(world, rng, kind, case):
    name = "mix" if kind == "mix" else rng.choice(("textvqa", "pope", "hrbench4k"))
    path = case / name
    path.write_bytes(damage_file(rng, world.originals[name]))
    images = [] if name == "hrbench4k" else ["--images", world.folder / "originals"]
    argv = [path, *images, "--out", case / "made.jsonl"]
    if kind == "mix":
        return "data/llava_mix.py", argv
    return "data/benchmarks.py", [name, *argv]


def random_text(rng):
    ranges = lambda: (rng.randrange(32, 127), rng.randrange(1, 0x3000), rng.randrange(0x10ffff))
    return "".join(chr(rng.choice(ranges())) for _ in range(rng.randrange(300)))


class Hang(BaseException):
    pass


def hang(*_):
    raise Hang


def attempt(program, argv, case):
    """Call main(argv) in this process -> what is wrong with its end (None: nothing), what it said, exit code."""
    module, said, code = PROGRAMS[program], io.StringIO(), 0
    infer.ROOT = train.ROOT = case
    before = signal.signal(signal.SIGPROF, hang)
    stdin, sys.stdin = sys.stdin, io.StringIO("")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            module.main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code or 0
    except Hang:
        return f"more than {SECONDS} s of CPU time", said.getvalue(), None
    except BaseException:  # also KeyboardInterrupt: nobody pressed it
        return "a traceback", said.getvalue() + traceback.format_exc(), None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        sys.stdin = stdin
        infer.ROOT = train.ROOT = ROOT
    return judge(program, code, said.getvalue(), case), said.getvalue(), code


def judge(program, code, said, case):
    lines = [line for line in said.splitlines() if line.startswith(Path(program).name + ":")]
    halves = [p for p in Path(case).rglob("*") if p.suffix in (".partial", ".part")]
    if code not in (0, 2):
        return f"exit code {code!r}"
    if code == 2 and (len(lines) != 1 or said.splitlines()[-1] != lines[0]):
        return "not one line"
    if "Traceback" in said or "out of memory" in said:
        return "a traceback, or too much memory"
    if any(ord(c) < 32 and c not in "\n\r\t" or c == "\x7f" for c in said):
        return "control characters on the terminal"
    if halves:
        return f"left {halves[0].name} behind"
    return f"{memory():.1f} GB of memory" if memory() > GIGABYTES else None


def memory():
    """The most this process ever held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def fuzz(seed, indices, folder, every=500):
    """Run these cases -> list of (index, program, what is wrong, where its files are)."""
    torch.set_num_threads(1)
    limit_memory()
    folder = Path(folder)
    world, failures, ended, began = World(folder / "intact"), [], Counter(), time.time()
    for n, i in enumerate(indices, 1):
        case = folder / f"case-{seed}-{i}"
        case.mkdir()
        program, argv = make_case(world, seed, i, case)
        wrong, said, code = attempt(program, argv, case)
        ended[f"{program} {code}"] += 1
        if wrong:
            failures.append((i, program, wrong, case))
            words = " ".join(map(str, argv))
            print(f"--- case {i} of seed {seed}: {wrong}: python {program} {words!r}\n{said[-1500:]}", flush=True)
        else:
            shutil.rmtree(case)
        if n % every == 0:
            print(f"{n} cases, {len(failures)} failures, {time.time() - began:.0f} s, {memory():.2f} GB at most; "
                  f"exit codes {dict(ended)}", flush=True)
    return failures


def limit_memory():
    """4 GB more address space than is mapped already."""
    with contextlib.suppress(OSError, ValueError):
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (mapped + GIGABYTES * 2 ** 30, most))


def product(folder):
    """A copy of the programs, so that what they write to out/ and data/ stays in `folder`."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py"), *(ROOT / "data/toy").glob("*.py")]:
        there = Path(folder) / path.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, there)
    return Path(folder)


def fuzz_processes(seed, indices, folder):
    """The same as real processes -> list of (index, program, what is wrong, where its files are)."""
    folder = Path(folder)
    world, home, failures = World(folder / "intact"), product(folder / "product"), []
    for i in indices:
        case = folder / f"process-{seed}-{i}"
        case.mkdir()
        program, argv = make_case(world, seed, i, case)
        done = subprocess.run([sys.executable, program, *map(str, argv)], cwd=home, capture_output=True, text=True,
                              errors="replace", timeout=300, stdin=subprocess.DEVNULL)
        wrong = judge(program, done.returncode, done.stderr, case)
        if wrong:
            failures.append((i, program, wrong, case))
            print(f"--- case {i} of seed {seed} as a process: {wrong}: python {program} {argv}\n{done.stderr[-1500:]}",
                  flush=True)
    return failures


# --------------------------------------------------------------------------------------------------- kills

def processes():
    """A multiprocessing context whose processes start with train.py imported, copies of a server that never ran."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fuzz", "torch._dynamo"])
    paths = str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(filter(None, paths))}):
        forkserver.ensure_running()
    return context


def dot(*how):
    """In place of train.report, which takes a third of so small a run's time."""
    Image.new("RGB", (1, 1)).save(how[-1])


def child(argv, log, environment=None):
    """The body of a process: train.py's main(argv), stdout and stderr to the file `log`."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    train.ROOT = Path(log).parent  # what was trained last, for whoever uses this project, stays so
    train.report = dot
    train.main([str(a) for a in argv])


def start(argv, log, environment=None):
    process = processes().Process(target=child, args=([str(a) for a in argv], str(log), environment))
    process.start()
    return process


def finish(process):
    process.join(600)
    return process.exitcode


def cpu_seconds(pid):
    """CPU time of a process, so that "a random moment" means the same on a busy machine; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kills(count, seed, folder):
    """SIGKILL `count` times at random moments; a run is killed up to three times and then left to end.

    -> kills, runs, the runs that ended otherwise than an undisturbed one.
    """
    folder, rng = Path(folder), random.Random(seed)
    ckpt, data = tiny(folder / "llava-tiny"), question_file(folder / "set", 24)
    argv = lambda name, *more: train_argv(ckpt, data, folder / name, "--seed", 5, *more)
    whole = start(argv("whole"), folder / "log")
    length = 0.0
    while (now := cpu_seconds(whole.pid)) is not None:
        length = now
        time.sleep(0.005)
    assert finish(whole) == 0, (folder / "log").read_text()
    want, done, runs, wrong = (folder / "whole/rpn.safetensors").read_bytes(), 0, 0, []
    while done < count:
        run, moments = folder / f"run{runs}", []
        how = argv(run.name, "--save-every", rng.choice((0, 0, 0.2, 300)))
        for _ in range(rng.randint(1, 3)):
            process, moment = start(how, folder / f"log{runs}"), rng.uniform(0, length)
            while (now := cpu_seconds(process.pid)) is not None and now < moment:
                time.sleep(0.001)
            process.kill()
            if finish(process) == -signal.SIGKILL:
                done, moments = done + 1, [*moments, round(moment, 3)]
        code = finish(start(how, folder / f"log{runs}"))
        left = [p.name for p in run.rglob("*") if p.suffix in (".partial", ".part")]
        if code or left or (run / "resume.safetensors").exists() or (run / "rpn.safetensors").read_bytes() != want:
            wrong.append((run, moments, code, left))
            print(f"--- killed at {moments} of {length:.2f} s: exit code {code}, left {left}; "
                  f"see {run} and {folder / f'log{runs}'}", flush=True)
        else:
            shutil.rmtree(run)
        runs += 1
        if runs % 10 == 0:
            print(f"{done} kills, {runs} runs, {len(wrong)} wrong", flush=True)
    return done, runs, wrong


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--count", type=int, default=300, help="how many cases; 10000 were run for the README")
    p.add_argument("--start", type=int, default=0, help="number of the first case")
    p.add_argument("--only", type=int, help="this case alone, verbosely")
    p.add_argument("--kills", type=int, help="kill a training run so many times instead")
    args = p.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    if args.kills:
        done, runs, wrong = kills(args.kills, args.seed, folder)
        print(f"{done} kills of {runs} runs: {len(wrong)} ended otherwise than an undisturbed run")
    elif args.only is not None:
        world, case = World(folder / "intact"), folder / "case"
        case.mkdir()
        program, argv = make_case(world, args.seed, args.only, case)
        limit_memory()
        print("python", program, *argv)
        wrong, said, _ = attempt(program, argv, case)
        print(said, wrong or "passes", sep="\n")
        return bool(wrong)
    else:
        wrong = fuzz(args.seed, range(args.start, args.start + args.count), folder)
        print(f"{args.count} cases of seed {args.seed}, {len(wrong)} failures, {memory():.2f} GB at most")
    if not wrong:
        shutil.rmtree(folder)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

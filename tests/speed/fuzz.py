"""Rubbish in, one line out: damaged pictures, question files, checkpoints, RPNs, runs and originals of benchmarks.

    python tests/speed/fuzz.py --seed 0 --count 300     # failures are printed with their command, their files kept

A case damages one file at random. It passes if the program ends with 0, or with 2 and one last line that begins with
its name, without a traceback or a half-written file. Case i depends on (seed, i) alone.
Left out: rubbish on the command line, killed runs (tests/test_run.py), what only a GPU would do, and a time limit: if
it hangs, stop it and look.
"""
import argparse
import json
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "golden")]

import data.evaluate  # noqa: E402 (the project is on the path only now)
import infer  # noqa: E402
import train  # noqa: E402
from calls import ASK, ask, call, move, question_file, tiny, train_argv  # noqa: E402
from data import benchmarks, llava_mix  # noqa: E402
from formula import picture  # noqa: E402

RUBBISH = [None, True, 0, -1, 3.5, 1e308, float("nan"), 10 ** 30, "", "x", "../../x", "a\0b", "\ud800", "\x1b[2J",
           "x" * 5000, [], {}, [[]], {"a": 1}]


class World:
    """All intact files, made once."""

    def __init__(self, folder):
        self.folder, self.ckpt = folder, tiny(folder / "llava-tiny", shards=2)
        self.questions = question_file(folder / "set", 8)
        for part in "pictures", "originals":
            (folder / part).mkdir()
        for name in "a.jpg", "a.png", "a.webp", "a.gif", "a.tif":
            picture(61, 47, 3).save(folder / "pictures" / name)
        talk = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Ann"}]
        mix = [{"id": "1", "image": "a.png", "conversations": talk}, {"id": "2", "conversations": []}]
        (folder / "originals/mix.json").write_text(json.dumps(mix))
        asked = {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}
        (folder / "originals/pope.jsonl").write_text((json.dumps(asked) + "\n") * 3)
        call(train, *train_argv(self.ckpt, self.questions, folder / "run", *SHORT))


SHORT = "--samples", 4, "--epochs", 1, "--batch-size", 2, "--grad-accum", 1, "--max-bad", 100


def damage(rng, source):
    """The bytes of a file, with an entry of its JSON replaced, or some bytes changed, cut or doubled."""
    content = source.read_bytes()
    if content and source.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        lines = content.decode().splitlines() if source.suffix == ".jsonl" else [content.decode()]
        n = rng.randrange(len(lines))
        lines[n] = json.dumps(damage_json(rng, json.loads(lines[n])))
        return "\n".join(lines).encode()
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 5, 20))):
        i = rng.randrange(min(len(changed), rng.choice((64, 1024, 1 << 30))) + 1)  # more often at the start
        j = i + rng.choice((1, 4, 16, 256))
        changed[i:j] = rng.choice((rng.randbytes(j - i), bytes(j - i), b"", changed[i:j] * 2))
    return bytes(changed)


def damage_json(rng, value):
    """One entry, somewhere inside, replaced, dropped or wrapped."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return rng.choice([*RUBBISH, [value]])
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.2:
        del value[key]
    else:
        value[key] = damage_json(rng, value[key])
    return value


KINDS = "picture", "checkpoint", "checkpoint", "rpn", "eval", "train", "run", "mix.json", "pope.jsonl"


def make_case(world, seed, i, case):
    """-> program, its words. `case` is a folder of its own for the damaged file and all output."""
    rng = random.Random(f"{seed}/{i}")
    kind, intact, image, copy = rng.choice(KINDS), world.folder, world.folder / "pictures" / "a.png", case / "copy"

    def damaged(folder, pattern="*"):
        """A copy of the folder, in which one of these files is damaged -> that file."""
        shutil.copytree(folder, copy)
        path = rng.choice(sorted(path for path in copy.rglob(pattern) if path.is_file()))
        path.write_bytes(damage(rng, path))
        return path
    words = ask(world, "--save", case / "picture.png", "--rpn", world.ckpt / "anyone.safetensors")
    if kind in ("mix.json", "pope.jsonl"):
        words = [damaged(intact / "originals", kind), "--images", intact / "pictures", "--out", case / "made.jsonl"]
        return (llava_mix, words) if kind == "mix.json" else (benchmarks, ["pope", *words])
    if kind == "run":
        damaged(intact / "run")
        return train, train_argv(world.ckpt, world.questions, copy, *SHORT)
    if kind == "train":
        return train, train_argv(world.ckpt, damaged(world.questions.parent, "*.jsonl"), case / "run", *SHORT)
    if kind == "eval":
        damaged(world.questions.parent)
        return infer, ["--eval", copy / world.questions.name, *words, "--limit", 2]
    if kind == "picture":
        image = damaged(intact / "pictures")
    elif kind == "rpn":
        words[-1] = damaged(world.ckpt, "*n*.safetensors")
    else:
        damaged(world.ckpt)
        words[1] = copy
    return infer, [image, rng.choice(ASK), *words]


def attempt(program, words, case):
    """Run main(words) in this process -> what is wrong with its end (None: nothing), and what it said."""
    try:
        code, _, said = call(program, *words)
    except Exception:
        return "a traceback", traceback.format_exc()
    last, name = (said.splitlines() or [""])[-1], Path(program.__file__).name
    if "Traceback" in said or code and (code != 2 or not last.startswith(f"{name}:")):
        return f"exit code {code}, not with one line", said
    return "a half-written file" if list(case.rglob("*.partial")) else None, said


def fuzz(seed, count, folder):
    """Run so many cases -> how many failed. The files of those that pass are deleted."""
    torch.set_num_threads(1)
    (folder / "intact").mkdir()
    world, failures = World(folder / "intact"), 0
    for i in range(count):
        case = folder / f"case-{seed}-{i}"
        case.mkdir()
        program, words = make_case(world, seed, i, case)
        wrong, said = attempt(program, words, case)
        if wrong:
            failures += 1
            print(f"--- case {i} of seed {seed}: {wrong}: {program.__file__} {list(map(str, words))}\n{said[-1500:]}")
        else:
            shutil.rmtree(case)
    return failures


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0, help="default: 0")
    p.add_argument("--count", type=int, default=300, help="how many cases; default: 300")
    args = p.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    move(SimpleNamespace(setattr=setattr), folder)  # like pytest's monkeypatch, for good
    failures = fuzz(args.seed, args.count, folder)
    print(f"{args.count} cases of seed {args.seed}, {failures} failures; files in {folder}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

"""The pages against the code: commands, flags, files, line counts, equation tags. Prose that drifts fails here."""
import argparse
import ast
import functools
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from calls import copy_project, shell

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAGES = {name: (ROOT / name).read_text(encoding="utf-8")
         for name in ("README.md", "data/README.md", "tests/RESULTS.md")}
README = PAGES["README.md"]
BLOCKS = [block for text in PAGES.values() for block in re.findall(r"```\n(.*?)```", text, re.S)]
LINES = [line.split(" #")[0].strip().removeprefix("$ ") for block in BLOCKS for line in block.splitlines()]
COMMANDS = list(dict.fromkeys(line for line in LINES if re.match(r"(python3?|torchrun) ", line)))
SETUP = "python3 -m venv .venv && . .venv/bin/activate && pip install -q -r requirements.txt && "
SCRIPTS = ("train.py", "infer.py", "data/toy/scenes.py", "data/toy/pretrain.py", "data/llava_mix.py",
           "data/benchmarks.py", "tests/speed/bench.py", "tests/paper/tables.py", "tests/speed/fuzz.py",
           "tests/speed/random_llava.py")


class Parsed(Exception):
    pass


def parse(script, argv, monkeypatch):
    """Run a script's main() only as far as its own argument parser; raises what the parser raises."""
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    spec = importlib.util.spec_from_file_location("script_under_test", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script_under_test", module)
    if script != "tests/paper/walk.py":  # it has no flags; test_equations.py runs it
        spec.loader.exec_module(module)
    for name in ("parse_args", "parse_intermixed_args"):
        def stop(self, args=None, namespace=None, real=getattr(argparse.ArgumentParser, name)):
            raise Parsed(real(self, args, namespace))
        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    if script == "tests/paper/walk.py":
        raise Parsed
    module.main()


def script_and_arguments(command):
    """`python x.py --flag`, `torchrun ... train.py --flag`: ("x.py", ["--flag"]), the last of a && chain."""
    words = shlex.split(command.split("&&")[-1])
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at], words[at + 1:]


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py" in c])
def test_commands_parse(command, monkeypatch):
    script, argv = script_and_arguments(command)
    assert (ROOT / script).is_file()
    with pytest.raises(Parsed):
        parse(script, argv, monkeypatch)


def test_the_two_commands():
    assert SETUP + "python train.py" in COMMANDS and SETUP + "python -m pytest -q tests" in COMMANDS
    assert SETUP + "python -m pytest -q tests" in (ROOT / ".ci/run").read_text().splitlines()


def test_flags_exist():
    sources = "".join((ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS)
    known = set(re.findall(r'"(--[a-z][a-z-]*)"', sources))
    foreign = {"--help", "--local-dir", "--nproc_per_node", "--repo-type", "--include"}
    for name, text in PAGES.items():
        assert not set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", text)) - known - foreign, name


def test_files_and_links_exist():
    made = {"data/llava_mix.jsonl", "data/textvqa_val.jsonl", "data/docvqa_val.jsonl"}
    for page, text in PAGES.items():
        named = set(re.findall(r"`((?:data|tests|backbones)/[\w./-]+\.\w+)`", text)) - made
        assert not [name for name in named if not (ROOT / name).exists()], page
        links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        assert not [link for link in links if not (ROOT / page).parent.joinpath(link).exists()], page


def test_equation_table():
    """Every row names functions that exist, whose files carry the equation, and tests that use one of them."""
    rows = re.findall(r"^\| ((?:Sec|Eq|Alg).*?) \| (.*?) \| (.*?) \|$", README, re.M)
    assert len(rows) >= 9
    bodies = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        lines = source.split("\n")
        bodies |= {node.name: "\n".join(lines[node.lineno - 1:node.end_lineno]) for node in ast.parse(source).body
                   if isinstance(node, ast.FunctionDef)}
    for claim, where, tests in rows:
        places = [(module, name) for module, names in re.findall(r"`(\w+)\.py: ([\w., ]+)`", where)
                  for name in names.split(", ")]
        for module, name in places:
            thing = importlib.import_module(module)
            for part in name.split("."):
                thing = getattr(thing, part)
        tags = set(re.findall(r"(?:Eq|Sec|Alg)\. [\d.]*\d", claim))
        text = "".join((ROOT / f"{module}.py").read_text() for module, _ in places)
        assert all(tag in text for tag in tags), (claim, tags)
        for test in re.findall(r"`(\w+)`", tests):
            assert any(name.split(".")[-1] in bodies[test] for _, name in places), (claim, test)


def test_every_difference_names_its_place():
    """The numbered list: each item ends in files and functions that exist."""
    items = re.split(r"\n(?=\d+\. )", README[README.index("## Differences"):README.index("## What is left out")])[1:]
    assert [int(item.split(".")[0]) for item in items] == list(range(1, len(items) + 1)) and len(items) > 20
    for item in items:
        places = re.findall(r"`([\w/]+)\.py(?:: ([\w., ]+))?`", item)
        assert places, item
        for path, names in places:
            thing = importlib.import_module(path.replace("/", "."))
            for name in filter(None, names.split(", ")):
                assert functools.reduce(getattr, name.split("."), thing) is not None


def test_the_walk_is_quoted():
    walk = (ROOT / "tests/paper/walk.py").read_text(encoding="utf-8")
    quoted = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    assert quoted.strip() in walk and quoted.count("# %%") == 3


def test_nothing_is_left_to_fill_in():
    assert not [name for name, text in PAGES.items() if re.search("TBD|[A-Z]_(TABLE|TIME|SIZE|ROWS|CELLS)", text)]


def test_the_readmes_own_script_runs_on_the_toy(capsys):
    script, toy = re.findall(r"```python\n(.*?)```", README, re.S)[-1], ROOT / "data/toy"
    for old, new in (("checkpoints/llava-1.5-7b", toy / "llava-toy"), ("rpn.safetensors", toy / "llava-toy"),
                     ("img.jpg", toy / "samples/images/00001.png")):
        assert f'"{old}"' in script
        script = script.replace(f'"{old}"', repr(str(new)))
    places = {}
    exec(script, places)
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert places["heat"].shape == places["picture"].size[::-1]


@pytest.mark.background
def test_toy_commands_run(tmp_path):
    """The commands a newcomer types first, in real processes, with the answer the README promises."""
    project = copy_project(tmp_path / "project")  # what is trained here is not what infer.py takes elsewhere
    run = functools.partial(shell, folder=project)
    command, promised = re.search(r"python (infer\.py data/toy/samples/images/\d+\.png \".*?\") +# prints: (.+)",
                                  README).groups()
    bundled = ["--ckpt", "toy", "--rpn", "data/toy/llava-toy/rpn.safetensors"]
    shown = subprocess.run([sys.executable, "-X", "importtime", *shlex.split(command), *bundled, "--save",
                            tmp_path / "a.png"], cwd=project, capture_output=True, text=True, timeout=300)
    assert "sdrpn" in shown.stderr and "torch._dynamo" not in shown.stderr  # the compiler takes as long as the answer
    assert shown.stdout.strip() == promised and (tmp_path / "a.png").is_file(), shown.stderr
    as_json = run(*shlex.split(command), *bundled, "--json", "--explain", "--save", str(tmp_path / "b.png"))
    assert json.loads(as_json.stdout)["boxes"], as_json.stderr
    assert run("data/toy/scenes.py", "--seed", "7", "--count", "3", "--out", str(tmp_path / "scenes")).returncode == 0
    scored = run("infer.py", "--eval", str(tmp_path / "scenes/questions.jsonl"), *bundled)
    assert json.loads(scored.stdout.splitlines()[-1])["questions"] == 3, scored.stderr
    trained = run("train.py", "--samples", "8", "--epochs", "1", "--out", str(tmp_path / "run"), "--held-out", "2")
    assert trained.returncode == 0 and "SD-RPN masked" in trained.stdout, trained.stderr
    assert all((tmp_path / "run" / name).is_file() for name in ("rpn.safetensors", "report.png", "log.jsonl"))

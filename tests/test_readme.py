"""The README against the code: commands, flags, file names, line counts, equation tags. Prose that drifts fails here."""
import argparse
import ast
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)```", README, re.S)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()
            if re.match(r"(python|torchrun|hf|python3) ", line)]
FIVE = ("clip.py", "model.py", "sdrpn.py", "train.py", "infer.py")
TOY = (ROOT / "data/toy/llava-toy/model.safetensors").is_file()


class Parsed(Exception):
    pass


def parse(script, argv, monkeypatch):
    """Run a script's main() only as far as its own argument parser; raises what the parser raises."""
    spec = importlib.util.spec_from_file_location("script_under_test", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script_under_test", module)
    spec.loader.exec_module(module)
    real = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(real(self, args, namespace))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    module.main()


def script_and_arguments(command):
    """`python x.py --flag` or `torchrun ... train.py --flag` -> ("x.py", ["--flag"]), the last of a && chain."""
    words = shlex.split(command.split("&&")[-1])
    at = next(i for i, w in enumerate(words) if w.endswith(".py"))
    return words[at], words[at + 1:]


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py" in c])
def test_commands_parse(command, monkeypatch):
    script, argv = script_and_arguments(command)
    assert (ROOT / script).is_file()
    with pytest.raises(Parsed):
        parse(script, argv, monkeypatch)


def test_the_two_commands():
    setup = "python3 -m venv .venv && . .venv/bin/activate && pip install -q -r requirements.txt && "
    assert setup + "python train.py" in COMMANDS and setup + "python -m pytest -q tests" in COMMANDS
    assert setup + "python -m pytest -q tests" in (ROOT / ".ci/run").read_text().splitlines()


def test_flags_exist():
    sources = "".join((ROOT / p).read_text(encoding="utf-8") for p in (
        "train.py", "infer.py", "data/toy/scenes.py", "data/llava_mix.py", "data/benchmarks.py", "tests/bench.py", "tests/tables.py", "tests/fuzz.py"))
    known = set(re.findall(r'"(--[a-z][a-z-]*)"', sources))
    foreign = {"--local-dir", "--nproc_per_node", "--nproc"}
    assert not {f for f in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", README)} - known - foreign


def test_files_exist():
    names = set(re.findall(r"`((?:data|tests)/[\w./-]+|[\w-]+\.(?:py|txt))`", README)) | set(re.findall(r"\((data/[\w./-]+)\)", README))
    made = {"data/llava_mix.jsonl", "data/textvqa_val.jsonl"}
    assert names and not [n for n in names - made if not (ROOT / n).exists()]


def code_lines(path):
    """Lines that are neither blank, comment nor docstring."""
    source, docs, code = path.read_text(encoding="utf-8"), set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docs)


def test_line_counts():
    for name in FIVE:
        quoted = re.search(rf"\| `{name}` \| (\d+) \|", README)
        assert quoted and int(quoted[1]) == code_lines(ROOT / name), f"{name} has {code_lines(ROOT / name)} lines of code"
    assert sum(code_lines(ROOT / name) for name in FIVE) < 1500
    assert code_lines(ROOT / "sdrpn.py") < 350


def test_equation_table():
    """Every row names functions that exist, whose files carry the equation, and tests that use one of them."""
    import clip, model, sdrpn, train  # noqa: E401, F401
    rows = re.findall(r"^\| ((?:Sec|Eq|Alg).*?) \| (.*?) \| (.*?) \|$", README, re.M)
    assert len(rows) >= 9
    source = (ROOT / "tests/test_method.py").read_text()
    bodies = {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    for claim, where, tests in rows:
        places = [(module, name) for module, names in re.findall(r"`(\w+)\.py: ([\w., ]+)`", where) for name in names.split(", ")]
        for module, name in places:
            thing = sys.modules[module]
            for part in name.split("."):
                thing = getattr(thing, part)
        tags = set(re.findall(r"(?:Eq|Sec|Alg)\. [\d.]*\d", claim))
        text = "".join((ROOT / f"{module}.py").read_text() for module, _ in places)
        assert tags and all(t in text for t in tags), (claim, tags)
        for test in re.findall(r"`(\w+)`", tests):
            assert any(name.split(".")[-1] in bodies[test] for _, name in places), (claim, test)


def test_equation_tags_are_the_papers():
    for name in FIVE:
        for number in re.findall(r"Eq\. (\d+)", (ROOT / name).read_text()):
            assert 1 <= int(number) <= 8


@pytest.mark.skipif(not TOY, reason="the bundled toy is not here")
def test_toy_commands_run(tmp_path):
    """The commands a newcomer types first, in real processes, with the answer the README promises."""
    def run(*words):
        return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    command, promised = re.search(r"python (infer\.py data/toy/samples/images/\d+\.png \".*?\") +# prints: ([^;]+);", README).groups()
    bundled = ["--ckpt", "toy", "--rpn", "data/toy/llava-toy/rpn.safetensors"]
    shown = run(*shlex.split(command), *bundled, "--save", str(tmp_path / "a.png"))
    assert shown.stdout.strip() == promised and (tmp_path / "a.png").is_file(), shown.stderr
    as_json = run(*shlex.split(command), *bundled, "--json", "--save", str(tmp_path / "b.png"))
    assert json.loads(as_json.stdout)["boxes"], as_json.stderr
    assert run("data/toy/scenes.py", "--seed", "7", "--count", "3", "--out", str(tmp_path / "scenes")).returncode == 0
    scored = run("infer.py", "--eval", str(tmp_path / "scenes/questions.jsonl"), *bundled)
    assert json.loads(scored.stdout.splitlines()[-1])["questions"] == 3, scored.stderr
    trained = run("train.py", "--samples", "32", "--epochs", "1", "--out", str(tmp_path / "run"), "--held-out", "5")
    assert trained.returncode == 0 and "SD-RPN masked" in trained.stdout, trained.stderr
    assert all((tmp_path / "run" / f).is_file() for f in ("rpn.safetensors", "report.png", "config.json", "log.jsonl"))

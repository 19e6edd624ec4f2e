"""The shape of the house: what imports what, what runs alone, how wide and how long the code may be."""
import ast
import doctest
import functools
import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

from calls import shell

ROOT = Path(__file__).resolve().parents[1]
FIVE = ["clip.py", "model.py", "sdrpn.py", "train.py", "infer.py"]
PRODUCT = [ROOT / name for name in FIVE] + sorted([*ROOT.glob("backbones/**/*.py"), *ROOT.glob("data/**/*.py")])
TESTS = sorted(ROOT.glob("tests/**/*.py"))
TOY = ROOT / "data" / "toy" / "llava-toy"
ALLOWED = {"torch", "safetensors", "sentencepiece", "PIL", "numpy"}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def every(check, paths):
    """check(path) -> what is wrong there; the list of all of it must be empty."""
    assert len(paths) > 4
    return [f"{name_of(path)}: {fault}" for path in paths for fault in check(path)]


# ---- width and length

@pytest.mark.parametrize("paths, most", [(PRODUCT, 100), (TESTS, 120)])
def test_columns(paths, most):
    def wide(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [f"line {n} has {len(line)} columns" for n, line in enumerate(lines, 1) if len(line) > most]
    assert every(wide, paths) == []


def length(function, lines):
    """Lines of code of a function: its docstring, comments and blank lines are not counted."""
    inner = set(range(function.lineno, function.end_lineno + 1))
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        inner -= set(range(first.lineno, first.end_lineno + 1))
    code = [lines[n - 1].strip() for n in inner]
    return sum(bool(line) and not line.startswith("#") for line in code)


def test_a_function_fits_a_screen():
    def long(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef)]
        sizes = [(f.name, length(f, lines)) for f in functions]
        return [f"{name} has {size} lines" for name, size in sizes if size > 50]
    assert every(long, PRODUCT) == []


# ---- arrows

def imports(path):
    """Dotted names of all modules that a file imports, wherever in it; a sibling by the name of its package."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module)
            if node.module in ("data", "backbones", "data.toy"):  # from data import draw
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    package = "" if path.parent == ROOT else ".".join(path.parent.relative_to(ROOT).parts) + "."
    return {package + name if (path.parent / f"{name}.py").is_file() else name for name in found}


def ours(path):
    top = {Path(name).stem for name in FIVE} | {"data", "backbones", "tests"}
    return {name for name in imports(path) if name.split(".")[0] in top}


def may_import(path):
    """Names of our modules or packages that a file of the product may import."""
    name = name_of(path)
    if name.startswith("data/"):
        programs = {"data/evaluate.py", "data/toy/compare.py", "data/toy/pretrain.py"}
        return {"clip", "data"} | ({"model", "sdrpn"} if name in programs else set())
    if name.startswith("backbones/"):
        return {"clip", "model", "backbones"}
    return {"clip.py": set(), "model.py": {"clip"}, "sdrpn.py": {"clip", "model"}}.get(
        name, {"clip", "model", "sdrpn", "data"})


def test_imports_point_one_way():
    def wrong(path):
        return [f"imports {module}" for module in sorted(ours(path)) if module.split(".")[0] not in may_import(path)]
    assert every(wrong, PRODUCT) == []
    assert ours(ROOT / "sdrpn.py") == {"clip", "model"} and "data.run" in ours(ROOT / "train.py")  # it sees something


def test_run_time_packages():
    def foreign(path):
        tops = {module.split(".")[0] for module in imports(path) - ours(path)}
        return sorted(tops - set(sys.stdlib_module_names) - ALLOWED - {"__future__"})
    assert {fault.split(": ")[1] for fault in every(foreign, PRODUCT)} <= {"pyarrow"}
    holders = [path for path in PRODUCT if "pyarrow" in path.read_text(encoding="utf-8")]
    for path in holders:  # inside the function that needs it, not where the file is read
        top = [n for n in parse(path).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not any("pyarrow" in ast.dump(node) for node in top)
    assert len(holders) <= 1


@pytest.mark.parametrize("name", ["sdrpn.py", "train.py", "infer.py"])
def test_no_family_is_named(name):
    found = re.findall(r"qwen|deepseek", (ROOT / name).read_text(encoding="utf-8"), re.IGNORECASE)
    assert found == []


# ---- examples

@pytest.mark.parametrize("path", [path for path in PRODUCT + TESTS if re.search(
    "^ *>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)], ids=name_of)
def test_examples_in_docstrings(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "data/toy"))
    package = "" if path.parent in (ROOT, ROOT / "tests", ROOT / "data/toy") else f"{path.parent.name}."
    result = doctest.testmod(importlib.import_module(package + path.stem))
    assert result.attempted >= {"sdrpn": 25, "metrics": 10}.get(path.stem, 1) and result.failed == 0


# ---- what runs alone

def places(tmp_path):
    """An empty folder to copy into, and another to stand in."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "alone", tmp_path / "elsewhere"


EXAMPLES = """
import sys
sys.path.insert(0, {folder!r})
import doctest, {module}
result = doctest.testmod({module})
ours = [name for name in sys.modules if name.split(".")[0] in ("clip", "model", "sdrpn", "train", "infer", "data")]
print(result.attempted, result.failed, *sorted(ours))
"""


@pytest.mark.parametrize("files", [["clip.py"], ["clip.py", "model.py"], ["clip.py", "model.py", "sdrpn.py"]])
@pytest.mark.background
def test_it_runs_alone_with_its_examples(tmp_path, files):
    folder, elsewhere = places(tmp_path)
    for name in files:
        shutil.copy(ROOT / name, folder)
    module = files[-1].removesuffix(".py")
    run = shell("-c", EXAMPLES.format(folder=str(folder), module=module), folder=elsewhere)
    assert run.returncode == 0, run.stderr
    attempted, failed, *loaded = run.stdout.split()[-2 - len(files):]
    assert int(attempted) > 0 and failed == "0", run.stdout
    assert loaded == sorted(name.removesuffix(".py") for name in files)


SCRIPT = """
import sys
from clip import load_image
from model import load
from sdrpn import RPN, answer

m = load(sys.argv[1])
rpn = RPN.load(sys.argv[1], m)
result = answer(m, rpn, load_image(sys.argv[2]), sys.argv[3])
print(result.text, len(result.boxes))
"""


def test_a_students_script_beside_three_copied_files(tmp_path):
    """The toy's folder, its bundled RPN, a picture: the answer, and that it looked twice."""
    from data.toy.scenes import ToyQuestions
    from model import load
    from sdrpn import RPN, answer
    folder, elsewhere = places(tmp_path)
    picture, q = ToyQuestions("house", 1)[0]
    picture.save(elsewhere / "scene.png")
    for name in ("clip.py", "model.py", "sdrpn.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "ask.py").write_text(SCRIPT)
    run = shell(folder / "ask.py", TOY, "scene.png", q["question"][0], folder=elsewhere)
    assert run.returncode == 0 and run.stderr == "", run.stderr
    m = load(TOY, "cpu", "float32")
    want = answer(m, RPN.load(TOY, m), picture, q["question"][0])
    assert want.text and len(want.boxes) == 1
    assert run.stdout == f"{want.text} {len(want.boxes)}\n"


@pytest.mark.background
def test_one_question_loads_little_of_ours(tmp_path):
    """No scoring, no training, no other family; what draws is loaded after the answer."""
    code = "import sys, infer\ninfer.main()\nprint(*(m for m in sys.modules if 'data' in m or m in ('train', 'sdrpn')))"
    shot = ROOT / "data/toy/samples/images/00007.png"
    run = shell("-c", code, shot, "What number is on the star?", "--save", "none")
    answer, loaded = run.stdout.splitlines()
    ours = {name for name in loaded.split() if name.split(".")[0] in ("data", "train", "sdrpn")}
    assert answer and "sdrpn" in ours and "train" not in ours
    needed = {"data", "data.checkpoints", "data.program", "data.draw", "data.files"}
    assert ours - needed <= {"sdrpn", "data.toy", "data.toy.scenes"}, ours  # the last two: the toy's note

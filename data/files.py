"""Files that are either the old version or the new one, whatever happens while they are written.

    write_text(path, "done")
    save_state(path, {"rpn": rpn}, optimizer, {"step": 9})    # a training's resume point

Left out: what is in them.
"""
import json
import os

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from clip import reading


def write_file(path, write):
    """Call write(partial) on a temporary name, flush it to disk, and rename it to `path`.

    Makes the folder. Raises BadInput if that fails; `path` then stays as it was.
    """
    partial = path.with_name(path.name[:60] + ".partial")
    with reading(path, "not written; check the folder and the free space"):
        if path.exists() and not path.is_file():
            raise ValueError("is no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.touch()
            mode = partial.stat().st_mode
            write(partial)
            partial.chmod(mode)  # safetensors lets nobody but the owner read a file
            with open(partial, "rb+") as f:
                os.fsync(f.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path, text):
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_rows(path, rows):
    """Write a .jsonl file: one JSON object a line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def save_state(path, modules, optimizer, facts):
    """Write the weights of {name: module}, the optimizer's moments and `facts` to one file."""
    tensors = nn.ModuleDict(modules).state_dict()
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{name}": tensor for name, tensor in moments.items()}
    facts = {"run": json.dumps(facts)}
    write_file(path, lambda partial: save_file(tensors, partial, facts))


def load_state(path, modules, optimizer):
    """Restore what save_state() wrote, and return its facts. Raises BadInput if damaged."""
    modules, moments = nn.ModuleDict(modules), {}
    with reading(path, "delete it to start at step 0"), safe_open(path, "pt") as f:
        modules.load_state_dict({key: f.get_tensor(key) for key in modules.state_dict()})
        for key in f.keys():
            if key.startswith("adam."):
                _, i, name = key.split(".")
                moments.setdefault(int(i), {})[name] = f.get_tensor(key)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        return json.loads(f.metadata()["run"])

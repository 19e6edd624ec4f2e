"""Files that are the old one or the new one, whole, whatever happens while they are written.

    write_text(path, "done")
    save_state(path, {"rpn": rpn}, optimizer, {"step": 9})    # a training's resume point

Left out: what is in them.
"""
import errno
import json
import os

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def write_file(path, write):
    """write(name) under another name, flushed, renamed. OSError leaves `path` as it was."""
    partial = path.with_name(path.name[:60] + ".partial")  # so that a long name has room for it
    try:
        write(partial)
        with open(partial, "rb+") as f:
            os.fsync(f.fileno())
        partial.replace(path)
    except SafetensorError as e:  # its own way to report a full disk, or a folder that is gone
        number = None if path.parent.is_dir() else errno.ENOENT
        raise OSError(number, str(e), str(path)) from None
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def save_state(path, modules, optimizer, facts):
    """Weights of {name: module}, the optimizer's moments and facts, in one safetensors file."""
    tensors = {f"{name}.{key}": tensor for name, module in modules.items()
               for key, tensor in module.state_dict().items()}
    for i, p in enumerate(parameters_of(optimizer)):
        tensors |= {f"adam.{i}.{key}": t for key, t in optimizer.state.get(p, {}).items()}
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    metadata = {"run": json.dumps(facts)}
    write_file(path, lambda partial: save_file(tensors, partial, metadata=metadata))


def load_state(path, modules, optimizer):
    """Take up what save_state() wrote -> facts. A damaged file raises one of many errors."""
    with safe_open(path, framework="pt") as f:
        tensors, facts = {key: f.get_tensor(key) for key in f.keys()}, f.metadata()["run"]

    def below(prefix):
        return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    for name, module in modules.items():
        module.load_state_dict(below(f"{name}."))
    for i, p in enumerate(parameters_of(optimizer)):
        optimizer.state[p] = {key: t.clone() if key == "step" else t.to(p.device, copy=True)
                              for key, t in below(f"adam.{i}.").items()}
    return json.loads(facts)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def read_rows(path):
    """Finished rows {n: row} of an earlier run; what a crash cut off or spoilt leaves the file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows = {}
    for line in text.split("\n")[:-1]:  # a whole line ends in a newline
        try:
            row = json.loads(line)
            if type(row["n"]) is int:
                rows[row["n"]] = row
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    whole = "".join(json.dumps(row) + "\n" for row in rows.values())
    if whole != text:
        write_text(path, whole)
    return rows

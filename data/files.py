"""What a run leaves on disk: every file is the old one or the new one, whole, and labels are looked up by sample.

    write_file(path, lambda partial: partial.write_text("done"))
    labels = Labels(folder); labels.write("000000-0of1", samples, targets, responses); targets, responses = labels.read(sample)

Left out: what the labels mean (sdrpn.py) and when they are made (train.py).
"""
import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class BadInput(Exception):
    """Something the user gave is wrong; the message is one line: the file, the problem, the remedy."""


def write_file(path, write):
    """write(name) under another name, flushed, then renamed. Raises OSError, and `path` is what it was."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with open(partial, "rb+") as f:
            os.fsync(f.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as e:  # safetensors reports a full disk in its own way
        raise OSError(getattr(e, "errno", None), getattr(e, "strerror", None) or str(e), str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


class Labels:
    """labels/*.safetensors: one file per step and process; n turns, N image tokens a sample."""

    def __init__(self, folder):
        self.folder, self.where, self.opened = folder, {}, None
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def refresh(self):
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                samples, targets, responses = self.load(path)
                self.where |= {i: (path, row) for i, row, _, _ in zip(samples, range(len(samples)), targets, responses, strict=True)}
            except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError):  # the disk's doing, not ours: these are made again
                path.unlink(missing_ok=True)

    def load(self, path):
        """-> samples, their targets (n, N), their n responses."""
        with safe_open(path, framework="pt") as f:
            return (f.get_tensor("samples").tolist(), f.get_tensor("targets").split(f.get_tensor("turns").tolist()),
                    json.loads(f.metadata()["responses"]))

    def write(self, name, samples, targets, responses):
        """targets: one (n, N) tensor a sample; responses: n texts a sample."""
        path = self.folder / f"{name}.safetensors"
        tensors = {"samples": torch.tensor(samples), "turns": torch.tensor([len(t) for t in targets]), "targets": torch.cat(targets)}
        write_file(path, lambda partial: save_file(tensors, partial, metadata={"responses": json.dumps(responses)}))
        self.where |= {i: (path, row) for row, i in enumerate(samples)}
        self.opened = None

    def read(self, sample):
        """-> targets (n, N) and the n responses."""
        path, row = self.where[sample]
        if path != self.opened:  # the samples of a file are mostly read one after the other
            (_, self.targets, self.responses), self.opened = self.load(path), path
        return self.targets[row], self.responses[row]


def read_rows(path):
    """Finished questions of an earlier run; what a crash cut off or spoilt is dropped from the file."""
    rows, text = {}, path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.split("\n")[:-1]:  # a whole line ends in a newline
        try:
            row = json.loads(line)
            rows[row["n"]] = row
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    whole = "".join(json.dumps(row) + "\n" for row in rows.values())
    if whole != text:
        write_text(path, whole)
    return rows

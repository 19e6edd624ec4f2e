"""Files that are the old one or the new one, whole, whatever happens while they are written.

    write_file(path, lambda partial: save_file(tensors, partial))
    write_text(path, "done")

Left out: what is in them.
"""
import errno
import json
import os

from safetensors import SafetensorError


def write_file(path, write):
    """write(name) under another name, flushed, renamed. OSError leaves `path` as it was."""
    partial = path.with_name(path.name + ".partial")
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


def read_rows(path):
    """Finished rows {n: row} of an earlier run; what a crash cut off or spoilt leaves the file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows = {}
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

"""What all programs share: what they say on stderr, and how they end when something is wrong.

    say("step 3 of 60")                  # from one process of several
    run_program(parser(), work)          # work(args); a fault is one line and exit code 2

Left out: their flags, and what they do.
"""
import os
import sys

import torch
import torch.distributed as dist

from clip import BadInput, printable


def say(text):
    """Print a line to stderr, from one process."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(printable(text), file=sys.stderr, flush=True)


def first_few(texts):
    """
    >>> first_few(["a", "b", "c", "d"])
    'a, b, c ...'
    """
    return ", ".join(texts[:3]) + (" ..." if len(texts) > 3 else "")


def first_to_fail():
    """Is this the process that says what is wrong? The others stop for the same reason."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the store went with the process that failed first
        return False


def run_program(parser, work, argv=None, memory="close other programs", again="",
                disk="check the path, the rights and the free space"):
    """Read the flags and do the work. SystemExit with one line: code 2 for a fault, 130 for Ctrl-C.

    memory, disk: what helps where these fail. again: what the same command does after a stop.
    """
    def fail(message, code=2):
        if first_to_fail():
            print(f"{parser.prog}:", BadInput(message), file=sys.stderr)
        sys.exit(code)

    parser.error = lambda message: fail(f"{message}; see --help")  # instead of the usage text
    args = parser.parse_args(argv)
    try:
        work(args)
    except (BadInput, FloatingPointError) as e:
        fail(e)
    except UnicodeError as e:
        fail(f"stdin or stdout can not hold this text ({e}); set PYTHONIOENCODING=utf-8")
    except OSError as e:
        path = e.filename2 or e.filename or "disk"  # of a failed move, filename2 is where to
        fail(f"{path}: {e.strerror or e}; {disk}")
    except KeyboardInterrupt:
        fail(f"stopped; {again}" if again else "stopped", 130)
    except (MemoryError, RuntimeError) as e:
        full = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if full or "can't allocate memory" in str(e):  # the latter is how torch says it on a CPU
            fail(f"out of memory; {memory}")
        if not first_to_fail():  # a process that lost its partner
            sys.exit(1)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

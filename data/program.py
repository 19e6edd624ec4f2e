"""What all programs share: their log, the processes of torchrun, and how they end.

    log("step 3 of 60")                  # printed by one process of several
    run_program(parser(), work)          # work(args); a fault is one line and exit code 2

Left out: their flags, and what they do.
"""
import argparse
import os
import re
import sys
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from clip import BadInput, printable


def log(text):
    """Print a line to stderr, from one process of several. A closed terminal stops nothing."""
    if processes()[0] == 0:
        with suppress(OSError):
            print(printable(text), file=sys.stderr, flush=True)


def processes():
    """-> the number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """-> the values that all processes give, once each of them has."""
    values = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def join_processes(device):
    """Meet the other processes of torchrun, if any -> the device of this one; default: a GPU."""
    backend = "gloo"
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        dist.init_process_group(backend, timeout=timedelta(days=30))
    return device or "cpu"


def at_least_1(text):
    """An argparse type, which names itself when it refuses."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def between_0_and_1(text):
    """An argparse type."""
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def first_to_fail():
    """Is this the process that says what is wrong? The others stop for the same reason."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    with suppress(RuntimeError):  # the store is gone with the process that failed first
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1


def run_program(parser, work, argv=None, memory="close other programs", again="stopped"):
    """Parse the flags and do the work. SystemExit with one line: 2 for a fault, 130 for Ctrl-C.

    memory: what helps when memory is full. again: what to print after Ctrl-C.
    """
    def fail(message, code=2):
        if first_to_fail():
            print(f"{parser.prog}:", BadInput(message), file=sys.stderr)
        sys.exit(code)

    sys.stderr = sys.stderr or open(os.devnull, "w")  # None where it is closed
    parser.error = lambda message: fail(f"{message}; see --help")
    args = parser.parse_intermixed_args(argv)
    try:
        work(args)
    except (BadInput, FloatingPointError, OSError, UnicodeError) as e:
        fail(e)
    except KeyboardInterrupt:
        fail(again, 130)
    except (MemoryError, RuntimeError) as e:
        if re.search("MemoryError|allocate memory", repr(e)):  # on a GPU, on a CPU
            fail(f"out of memory; {memory}")
        if first_to_fail():
            raise
        sys.exit(1)  # this process lost its partner
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

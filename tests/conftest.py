"""What all tests share: one thread, the project on the path, tiny models read from checkpoint folders.

The models here are so small that a second thread only waits for the first.
"""
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), *(str(HERE / name) for name in ("golden", "paper", "speed"))]
torch.set_num_threads(1)

from calls import home  # noqa: E402, F401 (each test of a program has an out/ of its own)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A tiny checkpoint and finished runs of it, for the tests of the programs; they change nothing in it."""
    import calls
    return calls.make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """load(config name, dtype, ...): a tiny LLaVA read from a folder written for it; each is made once."""
    import model
    from formula import CONFIGS, write_checkpoint
    loaded = {}

    def load(config, dtype="float32", **how):
        key = (config, dtype, *how.items())
        if key not in loaded:
            folder = write_checkpoint(tmp_path_factory.mktemp(config), CONFIGS[config], **how)
            loaded[key] = model.load(folder, device="cpu", dtype=dtype)
        return loaded[key]
    return load

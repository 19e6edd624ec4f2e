"""What all tests share: one thread, the project on the path, tiny models read from checkpoint folders.

The models here are so small that a second thread only waits for the first.
"""
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), *(str(HERE / name) for name in ("golden", "paper", "speed"))]
torch.set_num_threads(1)

from calls import home  # noqa: E402, F401 (each test of a program has an out/ of its own)


def pytest_configure(config):
    config.addinivalue_line("markers", "background: all but files happens in other processes; takes tmp_path, and "
                            "no other fixture")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("background") is not None)  # to be asked last


def pytest_collection_finish(session):
    """Tests marked `background` begin at once, the last one first, on the second core."""
    pool = ThreadPoolExecutor(1)
    for item in reversed(session.items):
        if item.get_closest_marker("background") and not session.config.option.collectonly:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            folder = session.config._tmp_path_factory.mktemp("background")
            item.future = pool.submit(item.obj, tmp_path=folder, **params)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that the second core has not begun yet is run here."""
    if hasattr(pyfuncitem, "future") and not pyfuncitem.future.cancel():
        pyfuncitem.future.result()
        return True


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

"""data/checkpoints.py: where a name of --ckpt leads."""
import pytest

from clip import BadInput
from data import checkpoints
from data.checkpoints import TOY, find_checkpoint, run_name


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A project, the folder it lies in and a Hugging Face cache, all empty."""
    monkeypatch.setattr(checkpoints, "ROOT", tmp_path / "work" / "project")
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path


def snapshot(places, revision, *files):
    folder = places / "home/hub/models--llava-hf--llava-1.5-7b-hf/snapshots" / revision
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("{}")
    return folder


def test_the_caches_main_revision_decides(places):
    old = snapshot(places, "old", "config.json", "model.safetensors")
    refs = old.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("old")
    snapshot(places, "newer", "config.json", "model.safetensors"), snapshot(places, "newest", "config.json")
    assert find_checkpoint("llava-1.5-7b") == find_checkpoint("llava-hf/llava-1.5-7b-hf") == old
    (refs / "main").write_text("newest")  # holds no weights
    with pytest.raises(BadInput, match="not on this machine"):
        find_checkpoint("llava-1.5-7b")


def test_a_folder_nearby_comes_first(places, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(places / "elsewhere"))
    for folder in (checkpoints.ROOT / "checkpoints/llava-1.5-7b", checkpoints.ROOT.parent / "llava-1.5-7b"):
        folder.mkdir(parents=True)
        assert find_checkpoint("llava-1.5-7b") == folder
    assert find_checkpoint(str(folder)) == folder and run_name(folder) == "llava-1.5-7b" and run_name(TOY) == "toy"


def test_a_missing_checkpoint_comes_with_its_download_command(places):
    with pytest.raises(BadInput, match="qwen2.5-vl-3b is not on this machine; download it with: hf download "
                                       "Qwen/Qwen2.5-VL-3B-Instruct --local-dir .*checkpoints/qwen2.5-vl-3b"):
        find_checkpoint("qwen2.5-vl-3b")
    with pytest.raises(BadInput, match="llava-1.5-70b: no such folder; the known names are toy, llava-1.5-7b"):
        find_checkpoint("llava-1.5-70b")

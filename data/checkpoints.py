"""Where a checkpoint lies: a folder, or one of the names that --ckpt knows.

    find_checkpoint("llava-1.5-7b")  # beside the project, in checkpoints/, or in the hub's cache

Left out: downloading. If a checkpoint is missing, the message is the command that downloads it.
"""
import os
from pathlib import Path

from clip import BadInput

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "data" / "toy" / "llava-toy"
NAMES = {  # name -> repository on the Hugging Face hub
    "toy": None,
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "deepseek-vl-1.3b": "deepseek-ai/deepseek-vl-1.3b-chat",
    "deepseek-vl-7b": "deepseek-ai/deepseek-vl-7b-chat",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
}


def short_name(given):
    """A repository of NAMES -> its name; anything else stays as it is."""
    return next((name for name, hub in NAMES.items() if hub == str(given)), str(given))


def find_checkpoint(given):
    """A folder, a name or a repository -> Path of the folder. BadInput if it is not there."""
    name = short_name(given)
    if name == "toy":
        return TOY
    for folder in (Path(given), ROOT.parent / name, ROOT / "checkpoints" / name):
        if folder.is_dir():
            return folder
    if name not in NAMES:
        raise BadInput(f"{name}: no such folder; the known names are {', '.join(NAMES)}")
    cached = hub_cache() / ("models--" + NAMES[name].replace("/", "--"))
    main = cached / "refs" / "main"  # holds the revision; the newest folder may be an older one
    snapshot = cached / "snapshots" / (main.read_text().strip() if main.is_file() else "")
    if any(snapshot.glob("*.safetensors")):
        return snapshot
    raise BadInput(f"{name} is not on this machine; download it with: hf download {NAMES[name]} "
                   f"--local-dir {ROOT / 'checkpoints' / name} (hf: pip install huggingface_hub)")


def hub_cache():
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(home, "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))


def run_name(given):
    """What a checkpoint's folder in out/ is called: its name in NAMES, else its folder's name."""
    name = short_name(given)
    if name in NAMES:
        return name
    folder = find_checkpoint(given).resolve()
    return "toy" if folder == TOY else folder.name

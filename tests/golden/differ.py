"""Where does parity with the reference break first? LLaVA against its golden tensors, stage by stage.

    python tests/golden/differ.py  # every case
    python tests/golden/differ.py grouped  # one

    [ok]   decoder layer 2: max=2.4e-06 mean=3.1e-07
    [DIFF] decoder layer 3: max=1.7e+00 mean=2.2e-01

Each stage is fed by our own stages before it, so only the first [DIFF] says where to look.
"""
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE)]

from clip import preprocess, to_tensor  # noqa: E402
from formula import CASES, CONFIGS, picture, prompt, write_checkpoint  # noqa: E402
from model import load  # noqa: E402
from slow import logits, tokenize  # noqa: E402

TOLERANCE = 1e-4  # absolute, in float32; ids must be equal


def load_golden(name):
    """-> the tensors of a case, and its notes (prompt, text, versions)."""
    with safe_open(HERE / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def centre_crop(shot, size):
    """What the library does where it does not pad: the short side to `size`, then the middle -> (3, S, S)."""
    w, h = shot.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    left, top = (w - size) // 2, (h - size) // 2
    whole = shot.convert("RGB").resize((w, h), Image.BICUBIC)
    return to_tensor(whole.crop((left, top, left + size, top + size)))


def ours(llava, case):
    """What our model makes of a case: {golden name: tensor}, in the order of computation. By hooks alone."""
    shot, decoder, tower = picture(*case["picture"]), llava.language_model, llava.vision_tower
    size = CONFIGS[case["config"]]["vision_config"]["image_size"]
    text = prompt(case["question"], case["history"])
    got = {"pixel_values": preprocess(shot, size), "pixel_values_crop": centre_crop(shot, size)}
    token, count = CONFIGS[case["config"]]["image_token_index"], llava.vision_tower.grid ** 2
    got["input_ids"] = torch.tensor([i for t in tokenize(llava, text) for i in ([t] * count if t == token else [t])])

    def keep(name):
        def hook(module, args, output=None):
            got[name] = (args[0] if output is None else output)[0]
        return hook

    hooks = [tower.pre_layrnorm.register_forward_hook(keep("clip.0")),
             llava.multi_modal_projector.register_forward_hook(keep("projector")),
             decoder.layers[0].register_forward_pre_hook(keep("layer.in")),
             decoder.norm.register_forward_hook(keep("norm"))]
    hooks += [layer.register_forward_hook(keep(f"clip.{n}")) for n, layer in enumerate(tower.encoder.layers, 1)]
    hooks += [layer.register_forward_hook(keep(f"layer.{n}")) for n, layer in enumerate(decoder.layers)]
    final = logits(llava, shot, text)
    for hook in hooks:
        hook.remove()
    return got | {"logits": final, "argmax": final.argmax(-1), "logsumexp": final.float().logsumexp(-1)}


LABELS = {"pixel_values": "pixels, padded", "pixel_values_crop": "pixels, centre crop", "input_ids": "prompt ids",
          "layer.in": "embeddings with the image", "norm": "final norm", "argmax": "argmax of every token",
          "logsumexp": "logsumexp of every token"}


def label(name):
    kind, _, n = name.partition(".")
    if kind == "clip":
        return "CLIP embeddings, pre_layrnorm" if n == "0" else f"CLIP layer {int(n) - 1}"
    return LABELS.get(name) or name.replace("layer.", "decoder layer ")


def compare(llava, name, tolerance=TOLERANCE):
    """-> [(ok, line)], a line per stage of a case."""
    want, _ = load_golden(name)
    got = ours(llava, CASES[name])
    layers = [key for key in want if key.startswith(("clip.", "layer."))]
    report = [(False, f"[DIFF] {label(key)}: our model never computes it") for key in sorted(set(layers) - set(got))]
    for key, tensor in got.items():
        if key not in want:
            report.append((False, f"[DIFF] {label(key)}: the reference never computes it"))
            continue
        if key in ("layer.in", "norm", "logits") or key.startswith("layer."):
            tensor = tensor[want["rows"].long()]  # only some positions are stored
        if tensor.shape != want[key].shape:
            report.append((False, f"[DIFF] {label(key)}: shape {tuple(tensor.shape)}, not {tuple(want[key].shape)}"))
            continue
        off = (tensor.double() - want[key].double()).abs()
        ok = bool(off.max() <= (tolerance if want[key].is_floating_point() else 0))  # NaN is not ok
        report.append((ok, f"{'[ok]  ' if ok else '[DIFF]'} {label(key)}: max={off.max():.1e} mean={off.mean():.1e}"))
    return report


def first_break(report):
    """-> "" or the line of the first stage that differs."""
    return next((line for ok, line in report if not ok), "")


def main(names):
    broken = False
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, CONFIGS[CASES[name]["config"]])
            llava = load(folder, device="cpu", dtype="float32")
        report = compare(llava, name)
        print(name, *(line for _, line in report), sep="\n  ")
        print(f"  parity breaks first at: {first_break(report)}\n" if first_break(report) else "  parity holds\n")
        broken |= bool(first_break(report))
    return broken


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

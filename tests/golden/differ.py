"""Where does parity with the reference break first? LLaVA against its golden tensors, stage by stage.

    python tests/golden/differ.py  # every case
    python tests/golden/differ.py grouped  # one

    [ok]   layer.2: max=2.4e-06 mean=3.1e-07
    [DIFF] layer.3: max=1.7e+00 mean=2.2e-01

make_golden.py says what the names mean. Each stage is fed by our own stages before it, so only the first [DIFF] says
where to look.
"""
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE)]

from clip import preprocess  # noqa: E402
from formula import CASES, CONFIGS, picture, prompt, write_checkpoint  # noqa: E402
from model import load  # noqa: E402
from slow import logits, tokenize  # noqa: E402

TOLERANCE = 1e-4  # absolute, in float32; ids must be equal


def load_golden(name):
    """-> the tensors of a case, and its notes (prompt, text, versions)."""
    with safe_open(HERE / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def ours(llava, case):
    """What our model makes of a case: {golden name: tensor}, in the order of computation. By hooks alone."""
    shot, text = picture(*case["picture"]), prompt(case["question"], case["history"])
    decoder, tower, ids = llava.language_model, llava.vision_tower, []
    for token in tokenize(llava, text):
        ids += [token] * (tower.grid ** 2 if token == llava.config.image_token else 1)
    got = {"pixel_values": preprocess(shot, tower.image_size), "input_ids": torch.tensor(ids)}

    def keep(name):
        def hook(module, args, output):
            got[name] = output[0]
        return hook

    modules = {"clip.0": tower.pre_layrnorm, "projector": llava.multi_modal_projector, "norm": decoder.norm}
    modules |= {f"clip.{n}": layer for n, layer in enumerate(tower.encoder.layers, 1)}
    modules |= {f"layer.{n}": layer for n, layer in enumerate(decoder.layers)}
    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    hooks.append(decoder.layers[0].register_forward_pre_hook(lambda _, args: got.update({"layer.in": args[0][0]})))
    final = logits(llava, shot, text)
    for hook in hooks:
        hook.remove()
    return got | {"logits": final, "argmax": final.argmax(-1), "logsumexp": final.float().logsumexp(-1)}


def compare(llava, name):
    """-> [(ok, line)], a line per stage of a case."""
    want, _ = load_golden(name)
    got = ours(llava, CASES[name])
    report = [(False, f"[DIFF] {key}: our model never computes it") for key in want
              if key.startswith(("clip.", "layer.")) and key not in got]
    for key, tensor in got.items():
        if key in ("norm", "logits") or key.startswith("layer."):
            tensor = tensor[want["rows"].long()]  # only some positions are stored
        off = (tensor.double() - want[key].double()).abs()
        ok = bool(off.max() <= (TOLERANCE if tensor.is_floating_point() else 0))  # NaN is not ok
        report.append((ok, f"{'[ok]  ' if ok else '[DIFF]'} {key}: max={off.max():.1e} mean={off.mean():.1e}"))
    return report


def first_break(report):
    """-> "" or the line of the first stage that differs."""
    return next((line for ok, line in report if not ok), "")


def main(names):
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, CONFIGS[CASES[name]["config"]])
            report = compare(load(folder, device="cpu", dtype="float32"), name)
        print(name, *(line for _, line in report), sep="\n  ")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Checks a recipe: which layers and heads are read, how sink tokens are told, where the RPN sits, and how it is trained.

    {"attention": {"14": [13, 24, 26]}, "softmax": "image" | "sequence", "sink": {"kind": "norm", "c": 4.0},
     "frozen": 15, "layers": 3, "tau": 0.15, "train": {"lr": 5e-5, "warmup": 0.03, "betas": [0.9, 0.98], "epochs": 1,
     "batch_size": 8, "grad_accum": 16, "clip": 1.0, "samples"?, "held_out"?, "data"?: "toy scenes"}}

Layers and heads count from 0; null in place of a list of heads means all. Left out: whether the heads are good ones.
"""
# What the authors released for the two LLaVA-1.5 decoders, by (layers, hidden width). {layer: heads}, null = all heads.
LLAVA_TRAINING = dict(lr=5e-5, warmup=0.03, betas=[0.9, 0.98], epochs=1, batch_size=8, grad_accum=16, clip=1.0)
RECIPES = {
    (32, 4096): dict(attention={"14": [13, 24, 26]}, softmax="sequence", sink=dict(kind="attention", attention={"2": None}, threshold=1e-3),
                     frozen=15, layers=3, tau=0.15, train=LLAVA_TRAINING),
    (40, 5120): dict(attention={"13": [21, 23, 26], "15": [2], "16": [2, 21, 30]}, softmax="sequence",
                     sink=dict(kind="attention", attention={"16": [17, 22]}, threshold=1e-3), frozen=15, layers=3, tau=0.15, train=LLAVA_TRAINING),
}


def whole(low=1, high=1 << 30):
    return lambda v: type(v) is int and low <= v <= high


def real(low, high):
    """A number between low and high, neither of them included."""
    return lambda v: type(v) in (int, float) and low < v < high


def faults(recipe, layers, heads):
    """Names of the entries that are missing, or that a decoder of so many layers and heads can not follow.

    >>> faults({"frozen": 7, "tau": 1.5, "softmax": "image"}, 8, 5)
    ['attention', 'sink', 'layers', 'tau', 'train']
    """
    def pairs(v):
        return bool(v) and all(int(layer) in range(layers) and (chosen is None or chosen and all(map(whole(0, heads - 1), chosen)))
                               for layer, chosen in v.items())

    train = {"lr": real(0, 10), "warmup": real(-1e-9, 1), "betas": lambda v: len(v) == 2 and all(map(real(-1e-9, 1), v)), "epochs": whole(),
             "batch_size": whole(), "grad_accum": whole(), "clip": real(0, 1e9)}
    checks = {
        "attention": pairs, "softmax": lambda v: v in ("image", "sequence"),
        "sink": lambda v: v["kind"] == "norm" and real(0, 1e9)(v["c"]) or
        v["kind"] == "attention" and pairs(v["attention"]) and real(0, 1e9)(v["threshold"]),
        "frozen": whole(1, layers - 1), "layers": lambda v: whole(1, layers - recipe["frozen"])(v), "tau": real(0, 1),
        "train": lambda v: all(good(v[key]) for key, good in train.items()) and
        all(whole()(v.get(key, 1)) and (key in v or v.get("data") != "toy scenes") for key in ("samples", "held_out"))}

    def passes(key):
        try:
            return checks[key](recipe[key])
        except (KeyError, TypeError, ValueError, AttributeError):
            return False
    return [key for key in checks if not passes(key)]

"""
What the stages must cost: FLOPs and bytes by plain counting, seconds on a measured machine. For bench.py.

    w = Work(m, recipe, 480)              # m may be on the meta device, without any weight
    w.two_stage(636, 611, 300) / w.plain(636)                               # LLaVA-1.5-7B: 1.56 plain prefills
    machine = Machine(device, dtype)
    machine.seconds(w.plain(636))

Counted: matrix products, 2 FLOPs per multiply-add; in the decoder attention over the visible pairs only; the tower's as
torch counts them. Time is the larger of FLOPs over the measured matmul peak and bytes over the measured read bandwidth.
Left out: norms, softmax, rotary embedding, launches, the host.
T prompt tokens, P of them up to the image's end, N of them the image's; n crop tokens; t tokens behind `start` others;
b batch.
"""
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

NEW = 10  # tokens an answer


class Work:
    """FLOPs and bytes of the stages of a model with that recipe, asked about a square picture of `side` pixels."""

    def __init__(self, m, recipe, side, itemsize=2):
        c = self.c = m.config
        self.B, self.R, self.itemsize = recipe["frozen"], recipe["layers"], itemsize
        self.D, self.L = c["hidden_size"], c["num_hidden_layers"]
        self.q, self.kv = (c[heads] * c["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
        self.weights = 2 * self.D * (self.q + self.kv) + 3 * self.D * c["intermediate_size"]  # of one layer
        pixels = m.pixels(Image.new("RGB", (side, side)))[None]
        self.grid = m.token_grid(pixels)
        self.N = self.grid[0] * self.grid[1]
        self.tower, self.projector = self.count(m, pixels)
        self.parameters = sum(p.numel() for p in m.parameters())
        if c["tied"]:
            self.parameters -= self.D * c["vocab_size"]
        self.rpn_parameters = (self.R - 1) * self.weights + self.D * (self.q + self.kv)

    @staticmethod
    @torch.no_grad()
    def count(m, pixels):
        """FLOPs of the tower for one picture, and of the projector for all its tokens. The model has no weights yet."""
        with FlopCounterMode(display=False) as tower:
            features = m.features(pixels)
        with FlopCounterMode(display=False) as projector:
            m.project(features)
        return tower.get_total_flops(), projector.get_total_flops()

    def layer(self, t, start=0):
        return 2 * t * self.weights + 4 * self.q * (t * start + t * (t + 1) // 2)

    def rpn(self, T):
        """R - 1 whole blocks; of the last one q of one token, k of the image, and their products."""
        return (self.R - 1) * self.layer(T) + 2 * self.D * (self.q + self.N * self.kv) + 2 * self.q * self.N

    def roi(self, T):
        """Stage 1 without the encoder."""
        return self.B * self.layer(T) + self.rpn(T)

    def plain(self, T):
        return self.L * self.layer(T)

    def second(self, T, P, n, reuse=True):
        """Stage 2: what follows the image through layers 0..B-1, then all of it through the others; or all anew."""
        if not reuse:
            return self.L * self.layer(T + n)
        return (self.B * self.layer(T - P + n, P) if n else 0) + (self.L - self.B) * self.layer(T + n)

    def two_stage(self, T, P, n, reuse=True):
        return self.roi(T) + self.second(T, P, n, reuse)

    def encode(self, images=1, projected=None):
        """The tower, and the projector on that many tokens, by default on all."""
        share = images if projected is None else projected / self.N
        return images * self.tower + share * self.projector

    def row(self, t, start=0):
        """What ViCrop needs of its layer: k of the tokens, the last one's attention."""
        return 2 * self.D * (self.q + t * self.kv) + 2 * self.q * (start + t)

    def cache_bytes(self, tokens):
        return 2 * self.L * self.kv * tokens * self.itemsize

    # ---- bytes that must fit

    def answer_bytes(self, T, b=1):
        """Weights, the cache of a batch with crops, the widest activation."""
        tokens = b * (T + self.N + 64)
        activation = 3 * self.c["intermediate_size"] * tokens * self.itemsize
        return (self.parameters + self.rpn_parameters) * self.itemsize + self.cache_bytes(tokens) + activation

    def training_bytes(self, T, b):
        """What an answer needs, the RPN with gradients and moments in float32, activations kept for the gradient."""
        kept = b * T * (self.R - 1) * (12 * self.D + 5 * self.c["intermediate_size"] + 4 * self.q)
        return self.answer_bytes(T, b) + 16 * self.rpn_parameters + 3 * kept

    # ---- seconds on a machine

    def prefill_seconds(self, m, flops):
        return m.seconds(flops, self.L * self.weights * self.itemsize)

    def decode_seconds(self, m, T, new, b=1):
        """The head is read `new` times; the layers, and the cache, once less."""
        head = self.D * self.c["vocab_size"]
        layers = self.L * self.weights * self.itemsize

        def step(T):
            return m.seconds(b * self.L * self.layer(1, T), layers + b * self.cache_bytes(T))
        return new * m.seconds(2 * b * head, head * self.itemsize) + sum(step(T + i) for i in range(new - 1))

    def plain_seconds(self, m, T, new=NEW, b=1):
        prefill = self.prefill_seconds(m, b * self.plain(T))
        return m.seconds(b * self.encode()) + prefill + self.decode_seconds(m, T, new, b)

    def two_stage_seconds(self, m, T, P, n, crops=1, reuse=True, new=NEW):
        crop = m.seconds(self.encode(crops, n)) if n else 0
        prefill = self.prefill_seconds(m, self.two_stage(T, P, n, reuse))
        return m.seconds(self.encode()) + crop + prefill + self.decode_seconds(m, T + n, new)


class Machine:
    """What the device does at best: matmul FLOP/s in that dtype, bytes read per second."""

    def __init__(self, device, dtype, tiny=False):
        side, size = (2048, 1 << 28)
        if tiny:
            side, size = (256, 1 << 20)
        elif device.type == "cuda":
            side, size = (8192, 1 << 32)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
        self.peak = 2 * side ** 3 / best(lambda: a @ b.T, device)
        x = torch.ones(size // 4, device=device)
        self.bandwidth = size / best(x.sum, device)

    def seconds(self, flops=0, size=0):
        return max(flops / self.peak, size / self.bandwidth)


def best(run, device, loops=4, tries=6):
    """Seconds of the fastest of some short loops."""
    times = []
    for _ in range(tries):
        sync(device)
        began = time.perf_counter()
        for _ in range(loops):
            run()
        sync(device)
        times.append((time.perf_counter() - began) / loops)
    return min(times)


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()

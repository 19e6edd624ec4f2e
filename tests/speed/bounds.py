"""What the stages must cost: FLOPs and bytes by plain counting, seconds on a measured machine. For bench.py.

    w = Work(m, recipe, 480)                                    # m may be on the meta device, without any weight
    w.question(636, 611, 300) / w.plain(636)                    # LLaVA-1.5-7B: a further question costs 0.59 prefills
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
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

NEW = 10  # tokens of an answer


class Work:
    """FLOPs and bytes of the stages of a model with that recipe, asked about a square picture of `side` pixels."""

    def __init__(self, m, recipe, side, itemsize=2):
        c, self.itemsize = m.config, itemsize
        self.B, self.R = recipe.frozen_layers, recipe.rpn_layers
        self.D, self.L, self.inner = c.hidden_size, c.num_hidden_layers, c.intermediate_size
        self.q, self.kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.words = self.D * c.vocab_size
        self.weights = 2 * self.D * (self.q + self.kv) + 3 * self.D * self.inner  # of one layer
        self.m, self.pixels = m, m.pixels(Image.new("RGB", (side, side)))[None]
        self.grid = m.token_grid(self.pixels)
        self.N = self.grid[0] * self.grid[1]
        self.parameters = sum(p.numel() for p in m.parameters()) - c.tied * self.words
        self.rpn_parameters = (self.R - 1) * self.weights + self.D * (self.q + self.kv)

    @cached_property
    def image(self):
        """FLOPs of the tower, and of the projector."""
        with torch.no_grad(), FlopCounterMode(display=False) as tower:
            features = self.m.features(self.pixels)
        with torch.no_grad(), FlopCounterMode(display=False) as projector:
            self.m.project(features)
        return tower.get_total_flops(), projector.get_total_flops()

    def layer(self, t, start=0):
        return 2 * t * self.weights + 4 * self.q * (t * start + t * (t + 1) // 2)

    def row(self, t, start=0):
        """What ViCrop needs of its layer: k of the tokens, the last one's attention."""
        return 2 * self.D * (self.q + t * self.kv) + 2 * self.q * (start + t)

    def rpn(self, T):
        """R - 1 whole blocks; of the last one q of one token, k of the image, and their products."""
        return (self.R - 1) * self.layer(T) + 2 * self.D * (self.q + self.N * self.kv) + 2 * self.q * self.N

    def roi(self, T):
        """Where to look, without the encoder: B layers and the RPN."""
        return self.B * self.layer(T) + self.rpn(T)

    def plain(self, T, P=0):
        """A whole prefill; behind a prefix of P tokens only the rest of it."""
        return self.L * self.layer(T - P, P)

    def question(self, T, P, n):
        """A two-stage question behind a prefix: the tail through B layers, RPN, then crop and tail through all."""
        stage2 = self.B * self.layer(T - P + n, P) if n else 0
        return self.B * self.layer(T - P, P) + self.rpn(T) + stage2 + (self.L - self.B) * self.layer(T - P + n, P)

    def two_stage(self, T, P, n):
        """The first question about a picture: prefix and question."""
        return self.plain(P) + self.question(T, P, n)

    def recomputed(self, T, n):
        """A two-stage question whose second stage starts over."""
        return self.roi(T) + self.plain(T + n)

    def encode(self, images=1, projected=None):
        """The tower, and the projector on that many tokens, by default on all."""
        share = images if projected is None else projected / self.N
        return images * self.image[0] + share * self.image[1]

    # ---- bytes

    def cache_bytes(self, tokens):
        return 2 * self.L * self.kv * tokens * self.itemsize

    def answer_bytes(self, T, b=1):
        """Weights, the cache of a batch with crops, the widest activation."""
        tokens = b * (T + self.N + 64)
        activation = 3 * self.inner * tokens * self.itemsize
        return (self.parameters + self.rpn_parameters) * self.itemsize + self.cache_bytes(tokens) + activation

    # ---- seconds on a machine

    def prefill_seconds(self, machine, flops):
        return machine.seconds(flops, self.L * self.weights * self.itemsize)

    def decode_seconds(self, machine, T, new=NEW, b=1):
        """The head is read `new` times; the layers, and the cache, once less."""
        layers = self.L * self.weights * self.itemsize
        seconds = new * machine.seconds(2 * b * self.words, self.words * self.itemsize)
        for t in range(T, T + new - 1):
            seconds += machine.seconds(b * self.plain(t + 1, t), layers + b * self.cache_bytes(t))
        return seconds

    def plain_seconds(self, machine, T, new=NEW, b=1):
        prefill = self.prefill_seconds(machine, b * self.plain(T))
        return machine.seconds(b * self.encode()) + prefill + self.decode_seconds(machine, T, new, b)

    def two_stage_seconds(self, machine, T, P, n, crops=1, new=NEW):
        crop = machine.seconds(self.encode(crops, n)) if n else 0
        prefill = self.prefill_seconds(machine, self.two_stage(T, P, n))
        return machine.seconds(self.encode()) + crop + prefill + self.decode_seconds(machine, T + n, new)


class Machine:
    """What the device does at best: matmul FLOP/s in that dtype, bytes read per second."""

    def __init__(self, device, dtype, tiny=False):
        side, size = (8192, 1 << 32) if device.type == "cuda" else (2048, 1 << 28)
        if tiny:
            side, size = 256, 1 << 20
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
        x = torch.ones(size // 4, device=device)
        self.peak = 2 * side ** 3 / best(lambda: a @ b.T, device)
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


if __name__ == "__main__":
    print(__doc__)

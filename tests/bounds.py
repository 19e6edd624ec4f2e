"""
What the stages must cost: FLOPs and bytes by plain counting, seconds on a measured machine. For bench.py.

    w = work("llava-1.5-7b"); w.two_stage(636, 611, 300) / w.plain(636)        # 1.56 plain prefills
    m = Machine(device, dtype); m.seconds(w.plain(636))

Counted: matrix products, 2 FLOPs per multiply-add, attention over the visible pairs only. Time is the larger of FLOPs over the
measured matmul peak and bytes over the measured read bandwidth. Left out: norms, softmax, rotary embedding, launches, the host.
T prompt tokens, P of them up to the image's end, N of them the image's; n crop tokens; t tokens behind `start` others; b batch.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clip import VIT_L_14_336  # noqa: E402

SIZES = {  # width, MLP, layers, heads, frozen layers B, RPN layers R
    "llava-1.5-7b": (4096, 11008, 32, 32, 15, 3), "llava-1.5-13b": (5120, 13824, 40, 40, 15, 3),
    "small": (1024, 2816, 12, 16, 6, 2), "tiny": (48, 80, 6, 4, 3, 2)}
TINY_TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=6)
NEW = 10  # tokens an answer


def work(name, layers=None, itemsize=2):
    """The sizes of that name; with fewer layers B and R shrink along."""
    D, I, L, H, B, R = SIZES[name]
    if layers:
        B, L = max(1, B * layers // L), layers
        R = min(R, L - B)
    config = dict(hidden_size=D, intermediate_size=I, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=H, head_dim=D // H,
                  rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=4096, vocab_size=32064)
    return Work(config, VIT_L_14_336 | (TINY_TOWER if name == "tiny" else {}), B, R, itemsize)


class Work:
    """FLOPs and bytes of the stages. c, v: the decoder's and the tower's sizes."""

    def __init__(self, c, v, B, R, itemsize):
        self.c, self.v, self.B, self.R, self.itemsize = c, v, B, R, itemsize
        self.D, self.L, self.N = c["hidden_size"], c["num_hidden_layers"], (v["image_size"] // v["patch_size"]) ** 2
        self.q, self.kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        self.weights = 2 * self.D * (self.q + self.kv) + 3 * self.D * c["intermediate_size"]  # of one layer

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
        """Stage 2: with reuse, what follows the image through layers 0..B-1, then all of it through the others."""
        if not reuse:
            return self.L * self.layer(T + n)
        return (self.B * self.layer(T - P + n, P) if n else 0) + (self.L - self.B) * self.layer(T + n)

    def two_stage(self, T, P, n, reuse=True):
        return self.roi(T) + self.second(T, P, n, reuse)

    def encode(self, images=1, projected=None):
        """The tower up to its feature layer, and the projector on that many tokens."""
        v, t, C = self.v, self.N + 1, self.v["hidden_size"]
        layer = 2 * t * (4 * C * C + 2 * C * v["intermediate_size"]) + 4 * C * t * t
        tower = (v["num_hidden_layers"] - 1) * layer + 2 * self.N * 3 * v["patch_size"] ** 2 * C
        return images * tower + 2 * (images * self.N if projected is None else projected) * (C * self.D + self.D ** 2)

    def row(self, t, start=0):
        """What ViCrop needs of its layer: k of the tokens, the last one's attention."""
        return 2 * self.D * (self.q + t * self.kv) + 2 * self.q * (start + t)

    def cache_bytes(self, tokens):
        return 2 * self.L * self.kv * tokens * self.itemsize

    # ---- seconds on a machine

    def prefill_seconds(self, m, flops):
        return m.seconds(flops, self.L * self.weights * self.itemsize)

    def decode_seconds(self, m, T, new, b=1):
        """The head is read `new` times; the layers, and the cache, once less."""
        head = self.D * self.c["vocab_size"]
        step = lambda T: m.seconds(b * self.L * self.layer(1, T), self.L * self.weights * self.itemsize + b * self.cache_bytes(T))
        return new * m.seconds(2 * b * head, head * self.itemsize) + sum(step(T + i) for i in range(new - 1))

    def plain_seconds(self, m, T, new=NEW, b=1):
        return m.seconds(b * self.encode()) + self.prefill_seconds(m, b * self.plain(T)) + self.decode_seconds(m, T, new, b)

    def two_stage_seconds(self, m, T, P, n, crops=1, reuse=True, new=NEW):
        crop = m.seconds(self.encode(crops, n)) if n else 0
        return m.seconds(self.encode()) + crop + self.prefill_seconds(m, self.two_stage(T, P, n, reuse)) + self.decode_seconds(m, T + n, new)


class Machine:
    """What the device does at best: matmul FLOP/s in that dtype, bytes read per second."""

    def __init__(self, device, dtype, tiny=False):
        side, size = (256, 1 << 20) if tiny else (8192, 1 << 32) if device.type == "cuda" else (2048, 1 << 28)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
        self.peak = 2 * side ** 3 / best(lambda: a @ b.T, device)
        x = torch.ones(size // 4, device=device)
        self.bandwidth = size / best(x.sum, device)

    def seconds(self, flops=0, size=0):
        return max(flops / self.peak, size / self.bandwidth)


def best(run, device, loops=4):
    """Seconds of the fastest of some short loops."""
    times = []
    for _ in range(6):
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

"""ViCrop rel-att (Zhang et al. 2025), the peer without training: the model's own attention says where to look.

    answer = vicrop(m, picture, "What is written on the sign?", layer=14, max_new_tokens=32)

The last prompt token's attention to the image is divided by the same for a general request. Of windows of a few
sizes, the one that stands out most from its neighbours becomes the crop, and the model reads image and crop. It works
with any backbone. All three passes share the prefix of the picture here; the published code runs each from the start,
which tests/speed/bench.py --only peers measures.
Left out: its other variants (grad-att, pure-grad). Its released code maps the grid onto the whole picture after a
centre crop; here the window is mapped through the padding.
Shapes: t tokens behind a prefix of P, N = h*w image tokens, D hidden width, H heads (Hkv for k), d head size.
"""
import sys
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model import rotate  # noqa: E402 (the project is on the path only now)
from sdrpn import Answer, Crop, Letterbox  # noqa: E402

GENERAL = "Write a general description of the image."  # the attention to this divides that of the question
WINDOW = 336  # source pixels, where the encoder's input has no fixed size


def last_row(block, hidden, rope):
    """The last token's attention in one decoder layer, mean over its heads: hidden (1, T, D) -> (T,) float32."""
    a, x = block.self_attn, block.input_layernorm(hidden)
    q = rotate(a.split(a.q_proj(x[:, -1:])), rope[:, -1:])  # (1, H, 1, d)
    k = rotate(a.split(a.k_proj(x)), rope)  # (1, Hkv, T, d)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.float() @ k.float().mT / a.d ** 0.5  # (1, H, 1, T)
    return scores.softmax(-1).mean(1)[0, 0]


def attention_to_image(m, prefix, question, layer):
    """(N,) float32 at one layer, for a prefix that keeps the hidden states entering it. Runs only the layers below."""
    tail = m.embed(m.tail(m.prompt_ids(question)))  # (1, t, D)
    rope = m.text_rope(prefix.position, tail.shape[1])
    tail = m.run(tail, 0, layer, rope, prefix.cache, prefix.columns.stop)
    hidden, rope = torch.cat([prefix.hidden[layer], tail], 1), torch.cat([prefix.rope, rope], 1)
    return last_row(m.language_model.layers[layer], hidden, rope)[prefix.columns]


def all_maps(m, hidden, rope):
    """As published: every layer computes and keeps its whole attention (1, H, T, T). Only for timing."""
    T, maps = hidden.shape[1], []
    future = torch.ones(T, T, dtype=torch.bool, device=hidden.device).triu(1)
    for block in m.language_model.layers:
        a, x = block.self_attn, block.input_layernorm(hidden)
        q, k, v = rotate(a.split(a.q_proj(x)), rope), rotate(a.split(a.k_proj(x)), rope), a.split(a.v_proj(x))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # (1, H, T, d)
        scores = (q @ k.mT / a.d ** 0.5).masked_fill(future, float("-inf"))
        maps.append(scores.float().softmax(-1).to(x.dtype))
        hidden = hidden + a.o_proj((maps[-1] @ v).transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return maps


def vicrop_window(relative, letterbox, side):
    """A relative attention map (h, w) -> the chosen box in source pixels, `side` to 2 x `side` wide.

    For each width: the window with the largest sum. Of these: the one that stands out most from its neighbours.
    Cells of 10 px; windows of 20 px are 2 x 2 cells:
    >>> relative = torch.zeros(6, 6)
    >>> relative[1:3, 3:5] = 1.
    >>> vicrop_window(relative, Letterbox((60, 60), 6), 20)
    (30, 10, 50, 30)
    """
    h, w = relative.shape
    cell_w, cell_h = letterbox.frame[0] / w, letterbox.frame[1] / h  # source pixels
    found = []
    for r in (1.0, 1.2, 1.4, 1.6, 1.8, 2.0):
        nx, ny = min(max(int(side * r / cell_w), 1), w), min(max(int(side * r / cell_h), 1), h)
        if (nx, ny) != (w, h):
            sharpness, x, y = sharpest(relative, nx, ny)
            found.append((sharpness, r, (x + nx / 2) * cell_w, (y + ny / 2) * cell_h))
        elif r == 1:
            return 0, 0, *letterbox.picture_size
    _, r, *centre = max(found, key=lambda window: window[0])
    low, high = [], []
    for middle, offset, length in zip(centre, letterbox.offset, letterbox.picture_size):
        size = min(round(side * r), length)
        start = min(max(round(middle - offset - size / 2), 0), length - size)  # shifted inside
        low.append(start)
        high.append(start + size)
    return *low, *high


def sharpest(relative, nx, ny):
    """The window of nx x ny cells with the largest sum -> how far it exceeds its up to 4 neighbours, per cell; x, y."""
    sums = F.avg_pool2d(relative[None].double(), (ny, nx), stride=1, divisor_override=1)[0]
    rows, columns = sums.shape
    y, x = divmod(sums.argmax().item(), columns)
    near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    near = [sums[v, u].item() for v, u in near if 0 <= v < rows and 0 <= u < columns]
    return (sums[y, x].item() - mean(near)) / (nx * ny), x, y


@torch.no_grad()
def vicrop(m, picture, question, layer, max_new_tokens, prefix=None):
    """-> Answer. prefix: m.prefill() of this picture that keeps the hidden states entering `layer`."""
    pixels, letterbox = m.pixels(picture), Letterbox.of(m, picture)
    if prefix is None:
        prefix = m.prefill(pixels[None], keep=[layer])
    own, general = (attention_to_image(m, prefix, text, layer) for text in (question, GENERAL))
    relative = (own / general.clamp(min=1e-12)).view(prefix.grid).cpu() * letterbox.holds_picture()
    box = vicrop_window(relative, letterbox, WINDOW if m.budget else pixels.shape[-1])

    of_crop = m.pixels(picture, box)[None]
    tokens = m.project(m.features(of_crop))[0]  # (n, D)
    crop = Crop(box, tokens, torch.ones(m.token_grid(of_crop), dtype=torch.bool))
    tail = m.embed(m.tail(m.prompt_ids(question)))
    tail, rope, position = m.splice(tail, prefix.position, [crop])  # (1, t, D)
    P, T, cache = prefix.columns.stop, prefix.columns.stop + tail.shape[1], prefix.cache
    m.reserve(cache, T + max_new_tokens)
    last = m.run(tail, 0, m.depth, rope, cache, P)[:, -1]
    text = m.detokenize(m.decode(last, cache, T, position, max_new_tokens)[0])
    return Answer(text, [crop], None, [], prefix)


if __name__ == "__main__":
    print(__doc__)

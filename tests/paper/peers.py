"""
ViCrop rel-att (Zhang et al. 2025), the peer without training: two passes of attention say where to look.

    answer = vicrop(m, picture, "What is written on the sign?", layer=14, max_new_tokens=32)

The last prompt token's attention to the image, divided by the same for a general request; the window of a few sizes
that stands out most from its neighbours becomes the crop; a third pass reads image and crop. Any backbone.
Left out: its other variants (grad-att, pure-grad). Its released code maps the grid onto the whole picture after a
centre crop; here the window is mapped through the padding.
Shapes: T or t tokens, N = h*w image tokens, D hidden width, H heads (Hkv of them for k), d head size.
"""
import sys
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import Crop, KVCache, next_position, rotate  # noqa: E402 (the project is on the path only now)
from sdrpn import Answer, Clock, Letterbox  # noqa: E402

GENERAL = "Write a general description of the image."  # what every question's attention is divided by
WINDOW = 336  # source pixels, where the encoder's input has no fixed size


def attention_row(m, hidden, layer, rope, cache, start=0):
    """The last token's ordinary attention at one layer, mean of its heads: (1, t, D) -> (start + t,) float32.

    The layers below run as usual; of this one only the keys, and the query of the last token.
    """
    hidden = m.run(hidden, 0, layer, rope, cache, start)
    block = m.language_model.layers[layer]
    a, x = block.self_attn, block.input_layernorm(hidden)
    k = rotate(a.split(a.k_proj(x)), rope)  # (1, Hkv, t, d)
    q = rotate(a.split(a.q_proj(x[:, -1:])), rope[:, -1:])  # (1, H, 1, d)
    k, _, _ = cache.update(layer, start, k, k)  # values are not needed
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # (1, H, start + t, d)
    scores = q.float() @ k.float().mT / a.d ** 0.5
    return scores.softmax(-1).mean(1)[0, 0]


def all_maps(m, hidden, rope):
    """As published: every layer works out and keeps its attention (1, H, T, T). -> one a layer; for timing."""
    T, maps = hidden.shape[1], []
    future = torch.ones(T, T, dtype=torch.bool, device=hidden.device).triu(1)
    for block in m.language_model.layers:
        a, x = block.self_attn, block.input_layernorm(hidden)
        q, k = rotate(a.split(a.q_proj(x)), rope), rotate(a.split(a.k_proj(x)), rope)
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, a.split(a.v_proj(x))))  # (1, H, T, d)
        scores = (q @ k.mT / a.d ** 0.5).masked_fill(future, float("-inf"))
        maps.append(scores.float().softmax(-1).to(x.dtype))
        hidden = hidden + a.o_proj((maps[-1] @ v).transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return maps


def attention_to_image(m, ids, image_tokens, grid, layer):
    """(N,) of the prompt `ids` with image tokens (1, N, D)."""
    embeds, columns = m.embed_prompt(ids, image_tokens)  # (1, T, D)
    rope = m.rope(m.positions(ids, grid))
    return attention_row(m, embeds, layer, rope, KVCache(m, 1, embeds.shape[1]))[columns]


def vicrop_window(relative, letterbox, side):
    """A relative attention map (h, w) -> the chosen box in source pixels, from `side` to 2 x side of them wide.

    For each width the window of largest sum; of these the one that stands out most from its neighbours, per cell.
    Two by two cells of 10 px; windows of 20 px are 2 x 2 cells:
    >>> relative = torch.zeros(6, 6)
    >>> relative[1:3, 3:5] = 1.
    >>> vicrop_window(relative, Letterbox((60, 60), 6), 20)
    (30, 10, 50, 30)
    """
    h, w = relative.shape
    cell = [frame / cells for frame, cells in zip(letterbox.frame, letterbox.cells)]  # source pixels along x, y
    found = []
    for r in (1.0, 1.2, 1.4, 1.6, 1.8, 2.0):
        nx, ny = (min(max(int(side * r / c), 1), n) for c, n in zip(cell, (w, h)))
        if (nx, ny) != (w, h):
            sharpness, x, y = sharpest(relative, nx, ny)
            found.append((sharpness, r, (x + nx / 2, y + ny / 2)))
        elif r == 1:
            return 0, 0, *letterbox.picture_size
    _, r, centre = max(found, key=lambda window: window[0])
    low, high = [], []
    for axis, length in enumerate(letterbox.picture_size):
        size = min(round(side * r), length)
        start = round(centre[axis] * cell[axis] - letterbox.offset[axis] - size / 2)
        start = min(max(start, 0), length - size)  # shifted inside
        low.append(start)
        high.append(start + size)
    return *low, *high


def sharpest(relative, nx, ny):
    """The window of nx x ny cells with the largest sum -> how far it exceeds its up to 4 neighbours, a cell; x, y."""
    sums = F.avg_pool2d(relative[None].double(), (ny, nx), stride=1, divisor_override=1)[0]
    rows, columns = sums.shape
    y, x = divmod(sums.argmax().item(), columns)
    near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    near = [sums[v, u].item() for v, u in near if 0 <= v < rows and 0 <= u < columns]
    return (sums[y, x].item() - mean(near)) / (nx * ny), x, y


@torch.no_grad()
def vicrop(m, picture, question, layer, max_new_tokens):
    """-> Answer. Both looks stop at `layer`; the released code runs them whole."""
    clock = Clock(m.device)
    pixels, ids = m.pixels(picture)[None], m.prompt_ids(question)
    grid, image_tokens = m.token_grid(pixels), m.encode(pixels)  # (1, N, D)
    letterbox = Letterbox(picture.size, grid, m.frame(picture.size))
    own = attention_to_image(m, ids, image_tokens, grid, layer)
    general = attention_to_image(m, m.prompt_ids(GENERAL), image_tokens, grid, layer)
    relative = (own / general.clamp(min=1e-12)).view(grid).cpu() * letterbox.holds_picture()
    side = WINDOW if m.budget else pixels.shape[-1]
    box = vicrop_window(relative, letterbox, side)
    clock.lap("regions")

    of_crop = m.pixels(picture, box)[None]
    crop_grid, tokens = m.token_grid(of_crop), m.encode(of_crop)[0]
    crop = Crop(tokens, crop_grid, torch.ones(len(tokens), dtype=torch.bool, device=m.device))
    clock.lap("crop")

    embeds, columns = m.embed_prompt(ids, image_tokens)
    P, positions = columns.stop, m.positions(ids, grid)
    tail, after = m.splice(embeds[:, P:], int(positions[..., P].max()), [crop])
    hidden = torch.cat([embeds[:, :P], tail], 1)  # (1, T, D)
    positions, T = torch.cat([positions[..., :P], after], -1), hidden.shape[1]
    m.check_length(T + max_new_tokens)
    cache = KVCache(m, 1, T + max_new_tokens)
    cache.shift = next_position(positions) - T
    hidden = m.run(hidden, 0, m.depth, m.rope(positions), cache)
    clock.lap("prefill")
    text = m.detokenize(m.decode(hidden[:, -1], cache, T, max_new_tokens)[0])
    clock.lap("decode")
    return Answer(text, [box], visual_tokens=image_tokens.shape[1] + len(tokens), ms=clock.ms)

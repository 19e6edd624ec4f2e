"""The method the slow way: nothing is reused, nothing is tapped. The proof that the quick ways are the same function.

    slow.answer(m, rpn, picture, question, ...)           # sdrpn.answer(), but stage 2 starts over
    slow.maps(m, recipe, pixels, prompts, responses)      # teach()'s maps of given answers, from whole matrices

Also `regions_of`: any map of weights as regions, for answer(regions=...).
Left out: batches, sinks by norm.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import KVCache, next_position, rotate  # noqa: E402
from sdrpn import Answer, Letterbox, Region, components, find_regions, head_lists, look_again  # noqa: E402


@torch.no_grad()
def answer(m, rpn, picture, question, mode="mask", tau=0.15, max_new_tokens=128, history=(), max_regions=2,
           regions=None):
    """Two-stage answer whose stage 2 runs [system][image][crops][text] through all layers, like the authors' code."""
    logits = None
    pixels, ids = m.pixels(picture)[None], m.prompt_ids(question, history)
    grid = m.token_grid(pixels)
    letterbox = Letterbox(picture.size, grid, m.frame(picture.size))
    if regions is None:
        logits = rpn(m, picture, question, history)
        regions = find_regions(logits, tau, letterbox.holds_picture())
    crops, boxes = look_again(m, picture, letterbox, regions, mode, max_regions)

    embeds, columns = m.embed_prompt(ids, m.encode(pixels))  # (1, T, D)
    positions, P = m.positions(ids, grid), columns.stop
    if crops:
        new, after = m.splice(embeds[:, P:], int(positions[..., P].max()), crops)
        embeds = torch.cat([embeds[:, :P], new], 1)
        positions = torch.cat([positions[..., :P], after], -1)
    T = embeds.shape[1]
    cache = KVCache(m, 1, T + max_new_tokens)
    cache.shift = next_position(positions) - T
    last = m.run(embeds, 0, m.depth, m.rope(positions), cache)[:, -1]
    text = m.detokenize(m.decode(last, cache, T, max_new_tokens)[0])
    keeps = [crop.keep.view(crop.grid) for crop in crops]
    read = columns.stop - columns.start + sum(len(crop.tokens) for crop in crops)
    return Answer(text, boxes, logits, regions, keeps, read)


@torch.no_grad()
def maps(m, recipe, pixels, prompts, responses):
    """Attention of given answers, all their tokens being rows -> raw and clean maps (b, N) float64."""
    found = [one_map(m, recipe, pixels[i:i + 1], *texts) for i, texts in enumerate(zip(prompts, responses))]
    return torch.stack([raw for raw, _ in found]), torch.stack([clean for _, clean in found])


def one_map(m, recipe, pixels, prompt, response):
    embeds, columns = m.embed_prompt(prompt, m.encode(pixels))  # (1, T, D)
    N, T, grid = columns.stop - columns.start, embeds.shape[1], m.token_grid(pixels)
    if not response:
        return torch.zeros(2, N, dtype=torch.float64)
    positions = m.positions(prompt, grid)
    first = next_position(positions)
    fed = torch.arange(first, first + len(response)).expand(*positions.shape[:-1], -1)
    rope = m.rope(torch.cat([positions, fed], -1))
    hidden, attention = torch.cat([embeds, m.embed(response)], 1), []
    for layer in range(m.depth):
        attention.append(whole_attention(m.language_model.layers[layer], hidden, rope))  # (H, T + m, T + m)
        hidden = m.run(hidden, layer, layer + 1, rope)

    def pool(heads_of, softmax):
        rows = [attention[layer][heads, T:, columns] for layer, heads in head_lists(m, heads_of).items()]
        rows = torch.cat(rows)  # (pairs, m, N)
        if softmax == "image":
            rows = rows / rows.sum(-1, keepdim=True)
        return rows.mean((0, 1))
    raw = pool(recipe["attention"], recipe["softmax"])
    sink, clean = recipe["sink"], raw
    if sink is not None and sink["kind"] == "attention":
        seen = pool(sink["attention"], "sequence")
        clean = torch.where(seen >= sink["threshold"] * 576 / N, 0.0, raw)
    return raw, clean


def whole_attention(block, hidden, rope):
    """The attention matrix of one layer, causal: hidden states that enter it (1, T, D) -> (H, T, T) float64."""
    attention = block.self_attn
    x = block.input_layernorm(hidden)
    q = rotate(attention.split(attention.q_proj(x)), rope)[0].double()  # (H, T, d)
    k = rotate(attention.split(attention.k_proj(x)), rope)[0].double()
    k = k.repeat_interleave(len(q) // len(k), 0)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


def regions_of(weights):
    """Weights (h, w), none negative -> a Region for each component above 0: any size, its own box, nothing grown."""
    weights = torch.as_tensor(weights).float()
    found = []
    for component in components(weights > 0):
        ys, xs = zip(*component)
        cells = torch.zeros(weights.shape, dtype=torch.bool)
        cells[ys, xs] = True
        found.append(Region((min(xs), min(ys), max(xs) + 1, max(ys) + 1), cells, weights[cells].sum().item()))
    return found

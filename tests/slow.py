"""The method the slow way: nothing is reused, nothing is tapped. The fast ways must be the same function.

    slow.logits(m, picture, prompt_text)                  # of a rendered prompt, (T, vocab)
    slow.answer(m, rpn, picture, question, ...)           # sdrpn.answer(), but everything starts over
    slow.maps(m, recipe, pixels, prompts, responses)      # teach()'s maps of given answers, from whole matrices

Also `regions_of`: any map of weights as regions, for answer(regions=...).
Left out: batches, sinks by norm.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import KVCache, rotate  # noqa: E402
from sdrpn import Answer, Letterbox, Region, components, find_regions, upscale  # noqa: E402


def tokenize(m, prompt_text):
    """A rendered prompt with one image placeholder -> ids. Special tokens are taken by name."""
    encode = m.tokenizer.encode
    if hasattr(m.tokenizer, "token_id"):  # byte-level BPE
        ids, start = encode(prompt_text, special=True), m.prompt_ids("")[0]
        return ids if ids[0] == start else [start, *ids]
    before, _, after = prompt_text.partition("<image>")
    first, *rest = after.split("</s>")
    ids = [m.tokenizer.bos_id(), *encode(before), m.config.image_token, *encode(first)]
    for piece in rest:
        ids.append(m.tokenizer.eos_id())
        if piece:
            ids += m.encode_after_eos(piece)
    return ids


def sequence(m, ids, pixels):
    """A prompt as one whole: embeddings (1, T, D), the image's columns, rotary table (2, T, d), next position."""
    image, at, tail = m.project(m.features(pixels)), ids.index(m.config.image_token), m.tail(ids)
    positions, after = m.image_positions(at, m.token_grid(pixels))
    embeds = torch.cat([m.embed(ids[:at]), image, m.embed(tail)], 1)
    rope = torch.cat([m.text_rope(0, at), m.rope(positions), m.text_rope(after, len(tail))], 1)
    return embeds, slice(at, at + image.shape[1]), rope, after + len(tail)


@torch.no_grad()
def logits(m, picture, prompt_text):
    embeds, _, rope, _ = sequence(m, tokenize(m, prompt_text), m.pixels(picture)[None])
    return m.head(m.run(embeds, 0, m.depth, rope))[0]


@torch.no_grad()
def answer(m, rpn, picture, question, mode="mask", tau=0.15, max_new_tokens=128, history=(), max_regions=2,
           regions=None):
    """Two-stage answer whose stage 2 runs [system][image][crops][text] through all layers, like the authors' code."""
    found = None
    ids, letterbox = m.prompt_ids(question, history), Letterbox.of(m, picture)
    if regions is None:
        found = rpn(m, picture, question, history)
        regions = find_regions(found, tau, letterbox.holds_picture())
    crops = upscale(m, picture, letterbox, regions, mode, max_regions)
    embeds, columns, rope, position = sequence(m, ids, m.pixels(picture)[None])
    if crops:
        P, text = columns.stop, len(m.tail(ids))
        new, after, position = m.splice(embeds[:, P:], position - text, crops)
        embeds, rope = torch.cat([embeds[:, :P], new], 1), torch.cat([rope[:, :P], after], 1)
    cache = KVCache()
    last = m.run(embeds, 0, m.depth, rope, cache)[:, -1]
    ids = m.decode(last, cache, embeds.shape[1], position, max_new_tokens)[0]
    return Answer(m.detokenize(ids), crops, found, regions)


@torch.no_grad()
def maps(m, recipe, pixels, prompts, responses):
    """Attention of given answers, all their tokens being rows -> raw and clean maps (b, N) float64."""
    found = [one_map(m, recipe, pixels[i:i + 1], *texts) for i, texts in enumerate(zip(prompts, responses))]
    return torch.stack([raw for raw, _ in found]), torch.stack([clean for _, clean in found])


def one_map(m, recipe, pixels, prompt, response):
    embeds, columns, rope, position = sequence(m, prompt, pixels)
    N, T = columns.stop - columns.start, embeds.shape[1]
    if not response:
        return torch.zeros(2, N, dtype=torch.float64)
    rope = torch.cat([rope, m.text_rope(position, len(response))], 1)
    hidden, attention = torch.cat([embeds, m.embed(response)], 1), []
    for layer in range(m.depth):
        attention.append(whole_attention(m.language_model.layers[layer], hidden, rope))  # (H, T + m, T + m)
        hidden = m.run(hidden, layer, layer + 1, rope)

    def pool(heads_of, softmax):
        rows = [attention[layer][slice(None) if heads is None else heads, T:, columns]
                for layer, heads in heads_of.items()]
        rows = torch.cat(rows)  # (pairs, m, N)
        if softmax == "image":
            rows = rows / rows.sum(-1, keepdim=True)
        return rows.mean((0, 1))
    raw, sink = pool(recipe.attention, recipe.softmax), recipe.sink
    if sink is None or sink.kind == "norm":
        return raw, raw
    seen = pool(sink.attention, "sequence")
    return raw, torch.where(seen >= sink.threshold * 576 / N, 0.0, raw)


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

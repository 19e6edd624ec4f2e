"""
Which layers and heads look at the thing that is asked about: a recipe for a new backbone.

    seen = [observe(m, recipe, picture, q, 32) for picture, q in ...]      # every head's attention, a question each
    gaze = beats_chance(seen)                                              # (L, H) bool
    pairs, c = choose(seen, gaze)                                          # the recipe's heads and its sink criterion

A head looks at the thing if more of its attention falls into the true box than into the boxes of other questions: a
head that likes the middle of every picture, where things mostly are, is no better than chance. A layer parks if much
of its attention rests on a few image tokens whose hidden states are long: sinks (Kang 2025, Darcet 2023).
Left out: how well an RPN learns from these heads (tables.py table3), and B and R (table4a, table7).
Shapes: L layers, H heads, (h, w) grid, N = h*w image tokens, T tokens, m response rows, D hidden width.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, mean

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import KVCache, next_position  # noqa: E402 (the project is on the path only now)
from sdrpn import assign_labels, bounding_cells, response_attention, teacher_question, training_view  # noqa: E402

LONG = 1.5  # times the median norm: a sink, where it is only to be counted
CONSTANTS = (None, 10.0, 6.0, 4.0, 3.0, 2.5, 2.0, 1.7, 1.5, 1.3)  # c of the sink criterion to try; None: no sink


@dataclass
class Seen:
    """What every head attended to while one question was answered."""
    maps: torch.Tensor           # (L, H, N) softmax over the image, mean over the response's rows
    mass: torch.Tensor           # (L, H) share of the ordinary softmax that lies on the image
    norms: torch.Tensor          # (L, N) lengths of the image tokens where each layer begins
    grid: tuple                  # (h, w)
    inside: torch.Tensor = None  # (N,) bool, the cells of the true box


@torch.no_grad()
def observe(m, recipe, picture, q, max_new_tokens):
    """One question of one turn -> Seen, or None if the model answers nothing. recipe: how the teacher is shown it."""
    question = teacher_question(recipe, q["question"][-1])
    pixels, letterbox = training_view(m, recipe, picture)
    ids, grid = m.prompt_ids(question), letterbox.grid
    hidden, columns = m.embed_prompt(ids, m.encode(pixels[None]))  # (1, T, D)
    T, positions = hidden.shape[1], m.positions(ids, grid)
    m.check_length(T + max_new_tokens)
    cache, rope, norms = KVCache(m, 1, T + max_new_tokens), m.rope(positions), []
    cache.shift = next_position(positions) - T
    for layer in range(m.depth):
        norms.append(hidden[0, columns].float().norm(dim=-1))
        hidden = m.run(hidden, layer, layer + 1, rope, cache)
    cache.queries = {layer: [] for layer in range(m.depth)}
    m.decode(hidden[:, -1], cache, T, max_new_tokens)
    if not cache.queries[0]:
        return None
    maps, mass = [], []
    for layer in range(m.depth):
        rows = torch.cat(cache.queries[layer], 2)[0]  # (H, m, d)
        k = cache.k[layer][0, :, :T + rows.shape[1]]  # (Hkv, T+m, d)
        maps.append(response_attention(rows, k, columns, T, "image"))
        mass.append(response_attention(rows, k, columns, T, "sequence").sum(-1))
    inside = letterbox.cells_of(q["boxes"]).flatten() if q.get("boxes") else None
    stacked = [torch.stack(values).cpu() for values in (maps, mass, norms)]
    return Seen(*stacked, grid, inside)


def without_sinks(maps, norms, c):
    """Eq. 1 with tau_norm = c x the median norm: maps and norms (..., N); c None: as they are.

    >>> without_sinks(torch.tensor([.2, .8]), torch.tensor([1., 4.]), 3.0)
    tensor([0.2000, 0.0000])
    """
    if c is None:
        return maps
    return maps.masked_fill(norms > c * norms.median(-1, keepdim=True).values, 0.0)


def shares(one, c=LONG):
    """A Seen -> (L, H, N) every head's attention to the image without sinks, summing to 1."""
    clean = without_sinks(one.maps, one.norms[:, None], c)
    return clean / clean.sum(-1, keepdim=True).clamp(min=1e-12)


def resized(inside, grid, other):
    """The cells of a box on one grid -> on another, (N,) bool."""
    if grid == other:
        return inside
    return F.interpolate(inside.view(1, 1, *grid).float(), other, mode="nearest").flatten() > 0


def inside_and_chance(seen):
    """Every head's share inside the true box, and inside the boxes of the other questions: (Q, L, H) each."""
    own, others = [], []
    for i, one in enumerate(seen):
        p = shares(one)
        strange = [resized(two.inside, two.grid, one.grid) for j, two in enumerate(seen) if j != i]
        own.append((p * one.inside).sum(-1))
        others.append((p * torch.stack(strange).float().mean(0)).sum(-1))
    return torch.stack(own), torch.stack(others)


def beats_chance(seen, level=0.01):
    """(L, H) bool: the heads with more attention in the true box than in other boxes, significantly among L*H.

    One-sided, normal approximation over the questions, level / (L*H) for a head (Bonferroni).
    """
    own, others = inside_and_chance(seen)
    excess = own - others  # (Q, L, H)
    heads = excess[0].numel()
    error = excess.std(0) / len(seen) ** 0.5
    return excess.mean(0) > NormalDist().inv_cdf(1 - level / heads) * error


def head_scores(seen):
    """(L, H), higher is better. With boxes: the mean share inside the true box.

    Without: mass on the image x (1 - spatial entropy): a head must look at the picture, and at little of it.
    """
    if seen[0].inside is not None:
        return torch.stack([(shares(one) * one.inside).sum(-1) for one in seen]).mean(0)
    scores = []
    for one in seen:
        p = shares(one)
        entropy = -(p * p.clamp(min=1e-12).log()).sum(-1) / math.log(p.shape[-1])  # (L, H), 0 to 1
        scores.append(one.mass * (1 - entropy))
    return torch.stack(scores).mean(0)


def agreement(clean, inside, grid):
    """IoU of the labelled foreground's bounding box and the true box: map (N,), cells (N,). No label: 0."""
    labels = assign_labels(clean, grid).view(grid)
    box = bounding_cells(labels == 1).flatten()
    return ((box & inside).sum() / (box | inside).sum().clamp(min=1)).item()


def worth(seen, pairs, c):
    """Mean agreement of the labels that these (layer, head) pairs make with the true boxes."""
    found = []
    for one in seen:
        pool = torch.stack([one.maps[layer, head] for layer, head in pairs]).mean(0)  # (N,)
        clean = without_sinks(pool, one.norms[min(pairs)[0]], c)
        found.append(agreement(clean, one.inside, one.grid))
    return mean(found)


def choose(seen, gaze=None):
    """-> the recipe's (layer, head) pairs, and c of its sink criterion (None: no sink is removed).

    gaze (L, H) bool: the heads that may be chosen. Candidates are the best 1 to 8 of them, compared by the labels
    they make. Without boxes nothing tells them apart: the best three of all, c = 4.
    """
    scores = head_scores(seen)
    H = scores.shape[1]
    order = [divmod(i, H) for i in scores.flatten().argsort(descending=True).tolist()]
    if seen[0].inside is None:
        return order[:3], 4.0
    order = [(layer, head) for layer, head in order if gaze is None or gaze[layer, head]]
    candidates = [(order[:n], c) for n in range(1, min(8, len(order)) + 1) for c in CONSTANTS]
    return max(candidates, key=lambda candidate: worth(seen, *candidate))


def parking(seen):
    """How each layer parks -> lists of L: longest norm in medians, long tokens in %, attention on them in %.

    Long: more than LONG x the median norm where the layer begins. Attention: on the image, mean of all heads.
    """
    longest, tokens, attention = [], [], []
    for one in seen:
        median = one.norms.median(-1, keepdim=True).values
        long = one.norms > LONG * median  # (L, N)
        longest.append(one.norms.amax(-1) / median[:, 0])
        tokens.append(100 * long.float().mean(-1))
        attention.append(100 * (one.maps * long[:, None]).sum(-1).mean(-1))
    return [torch.stack(values).mean(0).tolist() for values in (longest, tokens, attention)]


def parks(tokens, attention):
    """Does a layer park, from its row of parking()? A tenth of its attention on a few tokens, at a high rate.

    >>> parks(tokens=1.4, attention=40.0), parks(tokens=30.0, attention=40.0)
    (True, False)
    """
    return attention >= 10 and attention >= 4 * tokens

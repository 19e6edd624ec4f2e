"""Which layers and heads look at the thing that is asked about: a recipe for a new backbone.

    python tests/paper/tables.py heads --ckpt FOLDER --eval FILE          # the whole report, and recipe.json

    seen = [observe(m, recipe, picture, q, 32) for picture, q in ...]     # every head's attention, one question each
    gaze = beats_chance(seen)                                             # (L, H) bool
    pairs, c = choose(seen, gaze)                                         # the recipe's heads and its sink criterion

A head looks at the thing if more of its attention falls into the true box than into the boxes of other questions. A
head that likes the middle of every picture, where things mostly are, is no better than chance. A layer parks if much
of its attention rests on a few image tokens with long hidden states: sinks (Kang 2025, Darcet 2023).
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.metrics import table  # noqa: E402
from sdrpn import (assign_labels, bounding_cells, response_attention, teacher_question,  # noqa: E402 (the project is
                   training_view)                                                        # on the path only now)

LONG = 1.5  # times the median norm: longer tokens count as sinks in the report
CONSTANTS = (math.inf, 10.0, 6.0, 4.0, 3.0, 2.5, 2.0, 1.7, 1.5, 1.3)  # c of the sink criterion to try; inf: no sink


@dataclass
class Seen:
    """What every head attended to while one question was answered."""
    maps: torch.Tensor    # (L, H, N) softmax over the image, mean over the response's rows
    mass: torch.Tensor    # (L, H) share of the ordinary softmax that lies on the image
    norms: torch.Tensor   # (L, N) lengths of the image tokens entering each layer, in medians
    grid: tuple           # (h, w)
    inside: torch.Tensor  # (N,) bool, the cells of the true box; None without boxes


@torch.no_grad()
def observe(m, recipe, picture, q, max_new_tokens):
    """One question of one turn -> Seen, or None if the answer is empty. recipe: how the teacher is shown it."""
    pixels, letterbox = training_view(m, recipe, picture)
    prefix = m.prefill(pixels[None], keep=range(m.depth))
    cache, columns = prefix.cache, prefix.columns
    cache.queries = {layer: [] for layer in range(m.depth)}
    m.generate(picture, teacher_question(recipe, q["question"][-1]), max_new_tokens, prefix=prefix)
    maps, mass, norms = [], [], []
    for layer, (tail, *steps) in cache.queries.items():  # of the question, of each response token
        if not steps:
            return None
        rows, T = torch.cat(steps, 2)[0], columns.stop + tail.shape[2]  # (H, m, d)
        k = cache.k[layer][0, :, :T + len(steps)]  # (Hkv, T+m, d)
        maps.append(response_attention(rows, k, columns, T))
        mass.append(response_attention(rows, k, columns, T, "sequence").sum(-1))
        norm = prefix.hidden[layer][0, columns].float().norm(dim=-1)
        norms.append(norm / norm.median())
    inside = letterbox.cells_of(q["boxes"]).flatten() if q["boxes"] else None
    return Seen(*(torch.stack(of_layers).cpu() for of_layers in (maps, mass, norms)), letterbox.grid, inside)


def without_sinks(maps, norms, c):
    """Eq. 1 with tau_norm = c x the median norm: maps and norms in medians, (..., N).

    >>> without_sinks(torch.tensor([.2, .8]), torch.tensor([1., 4.]), 3.0)
    tensor([0.2000, 0.0000])
    """
    return maps.masked_fill(norms > c, 0.0)


def shares(one):
    """A Seen -> (L, H, N) every head's attention to the image without sinks, summing to 1."""
    clean = without_sinks(one.maps, one.norms[:, None], LONG)
    return clean / clean.sum(-1, keepdim=True).clamp(min=1e-12)


def inside_and_chance(seen):
    """Every head's share inside the true box, and inside the boxes of the other questions: (Q, L, H) each."""
    own, others = [], []
    for one in seen:
        p, strange = shares(one), []
        for two in seen:
            if two is not one:  # its box, on this one's grid
                cells = two.inside.view(1, 1, *two.grid).float()
                strange.append(F.interpolate(cells, one.grid, mode="nearest").flatten())
        own.append((p * one.inside).sum(-1))
        others.append((p * torch.stack(strange).mean(0)).sum(-1))
    return torch.stack(own), torch.stack(others)


def beats_chance(seen, level=0.01):
    """(L, H) bool: the heads with more attention in the true box than in other boxes, significantly among L*H.

    One-sided, normal approximation over the questions, level / (L*H) for each head (Bonferroni). Without boxes
    nothing tells the heads apart: all of them.
    """
    if seen[0].inside is None:
        return torch.ones(seen[0].mass.shape, dtype=torch.bool)
    own, others = inside_and_chance(seen)
    excess = own - others  # (Q, L, H)
    error = excess.std(0) / len(seen) ** 0.5
    return excess.mean(0) > NormalDist().inv_cdf(1 - level / error.numel()) * error


def head_scores(seen):
    """(L, H), higher is better. With boxes: the mean share inside the true box.

    Without: mass on the image x (1 - spatial entropy). A head must look at the picture, and at little of it.
    """
    scores = []
    for one in seen:
        p = shares(one)
        if one.inside is not None:
            scores.append((p * one.inside).sum(-1))
        else:
            entropy = -(p * p.clamp(min=1e-12).log()).sum(-1) / math.log(p.shape[-1])  # (L, H), 0 to 1
            scores.append(one.mass * (1 - entropy))
    return torch.stack(scores).mean(0)


def ranked(scores):
    """(L, H) -> all (layer, head), the best first."""
    H = scores.shape[1]
    return [divmod(i, H) for i in scores.flatten().argsort(descending=True).tolist()]


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


def choose(seen, gaze):
    """-> the recipe's (layer, head) pairs, and c of its sink criterion (inf: no sink is removed).

    gaze (L, H) bool: the heads that may be chosen. Candidates are the best 1 to 8 of them, compared by the labels
    they make. Without boxes nothing tells them apart: the best three of all, c = 4.
    """
    order = [pair for pair in ranked(head_scores(seen)) if gaze[pair]]
    if seen[0].inside is None:
        return order[:3], 4.0
    candidates = [(order[:n], c) for n in range(1, min(8, len(order)) + 1) for c in CONSTANTS]
    return max(candidates, key=lambda candidate: worth(seen, *candidate))


def parking(seen):
    """How each layer parks -> (3, L): longest norm in medians, long tokens in %, attention on them in %.

    Long: above LONG x the median norm. Attention: on the image, mean of all heads.
    """
    found = []
    for one in seen:
        long = one.norms > LONG  # (L, N)
        on_long = (one.maps * long[:, None]).sum(-1).mean(-1)
        found.append(torch.stack([one.norms.amax(-1), 100 * long.float().mean(-1), 100 * on_long]))
    return torch.stack(found).mean(0)


def parks(tokens, attention):
    """Does a layer park, from its row of parking()? At least 10 % of its attention, on few tokens.

    >>> parks(tokens=1.4, attention=40.0), parks(tokens=30.0, attention=40.0)
    (True, False)
    """
    return attention >= 10 and attention >= 4 * tokens


def report(seen):
    """A line for each layer, the best heads, the layers that park -> lines of text."""
    scores, gaze, rows, parked = head_scores(seen), beats_chance(seen), [], []
    for layer, (norm, tokens, attention) in enumerate(parking(seen).T.tolist()):
        own = scores[layer]
        rows.append([f"{layer}", f"{own.mean():.3f}", f"{own.max():.3f}", f"{gaze[layer].sum()}", f"{norm:.1f} x",
                     f"{tokens:.1f} %", f"{attention:.1f} %"])
        if parks(tokens, attention):
            parked.append(str(layer))
    best = ", ".join(f"{layer}.{head} {scores[layer, head]:.3f}" for layer, head in ranked(scores)[:12])
    lines = [*table(["layer", "mean", "best", "gaze heads", "longest norm", "long tokens", "attention on them"], rows),
             f"best, as layer.head: {best}",
             f"layers that park on sinks: {', '.join(parked) or 'none'} (long: above {LONG:g} x the median norm)"]
    if seen[0].inside is None:
        return ["attention on the image x (1 - spatial entropy): without true boxes nothing tells these heads from "
                "chance; look at train.py's report.png", *lines]
    return [f"share of the attention inside the true box, sinks not counted; mean of {len(seen)} questions", *lines,
            f"gaze heads: {gaze.sum()} of {gaze.numel()} hold more in the true box than in the boxes of other "
            f"questions ({inside_and_chance(seen)[1].mean():.3f})"]


if __name__ == "__main__":
    print(__doc__)

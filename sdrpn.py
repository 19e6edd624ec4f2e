"""
SD-RPN, the method whole: a question -> where to look -> look again (arXiv 2509.16944; Sec., Eq. and Alg. are the paper's).

    teach()    the frozen model answers, and its response-to-image attention becomes labels      Sec. 3.2, Eq. 1-2
    RPN        R blocks on top of the first B frozen layers learn those labels                   Sec. 3.3, Eq. 3-5
    answer()   the RPN's map is cut into regions, these are cropped at full resolution and read  Sec. 3.4, Eq. 6-8

    rpn = RPN.load("data/toy/llava-toy/rpn.safetensors", llava)
    print(answer(llava, rpn, image, "What number is on the star?").text)

Left out: the training loop (train.py), the ablations' baselines (tests/tables.py).
Shapes: b batch, n turns, m response rows, T tokens, N = g*g image tokens, D hidden width, H heads, d head size.
Maps are (..., N) row by row, or (g, g); boxes are half-open (x0, y0, x1, y1), in grid cells or in source pixels.
"""
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from clip import preprocess_crop
from data.files import BadInput, write_file
from data.recipe import RECIPES, faults
from model import Block, KVCache, RMSNorm, open_safetensors, open_shards, read_json, rope_table, wider


def load_recipe(llava):
    """recipe.json beside the checkpoint, else the released constants for its decoder's shape."""
    path = llava.folder / "recipe.json"
    if path.is_file():
        recipe = read_json(path)
        wrong = faults(recipe, llava.config["num_hidden_layers"], llava.config["num_attention_heads"])
        if wrong:
            raise BadInput(f"{path}: {', '.join(wrong)}: missing, or not of this model; `python tests/tables.py heads` prints a recipe")
        return recipe
    shape = llava.config["num_hidden_layers"], llava.config["hidden_size"]
    if shape not in RECIPES:
        raise BadInput(f"{llava.folder}: no recipe.json, and no released recipe for {shape[0]} layers of {shape[1]}; "
                       "`python tests/tables.py heads --ckpt FOLDER` finds layers and heads and prints one")
    return RECIPES[shape]


# ------------------------------------------------------------------------------ 1. teacher: pseudo-labels

def response_attention(q, k, image, prompt, softmax="image"):
    """Sec. 3.1, Alg. 1 lines 8-10: how much each response row looks at each image token, mean over the rows.

    q (H, m, d): rotated queries of the m response tokens fed back in. k (Hkv, prompt + m, d): rotated keys of the prompt
    and of those tokens. `image` is the slice of the image's columns. Returns (H, N) in float32.
    softmax="image" is the paper's, over the image tokens alone; "sequence" is the model's ordinary one, sliced.
    >>> k = torch.tensor([[[0., 0.], [math.log(3), 0.], [0., 0.], [0., 0.]]])    # one head; [text] [image] [image] [response]
    >>> response_attention(torch.tensor([[[2 ** 0.5, 0.]]]), k, slice(1, 3), prompt=3)
    tensor([[0.7500, 0.2500]])
    >>> response_attention(torch.tensor([[[2 ** 0.5, 0.]]]), k, slice(1, 3), prompt=3, softmax="sequence")
    tensor([[0.5000, 0.1667]])
    """
    k = k.repeat_interleave(len(q) // len(k), 0)  # (H, prompt + m, d): grouped heads share keys
    if softmax == "image":
        k = k[:, image]
    scores = q.float() @ k.float().mT / q.shape[-1] ** 0.5  # (H, m, N or prompt + m)
    if softmax == "image":
        return scores.softmax(-1).mean(1)
    future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(prompt + 1)  # row i sees itself and before
    return scores.masked_fill(future, -math.inf).softmax(-1)[..., image].mean(1)


def remove_sink_tokens(roi_map, hidden, tau_norm):
    """Eq. 1: zero the map where the image token's hidden state is longer than tau_norm: attention sinks, not objects.

    roi_map (..., N), hidden (..., N, D) -> (..., N).
    >>> remove_sink_tokens(torch.tensor([.25, .5, .25]), torch.tensor([[3., 4.], [30., 40.], [0., 5.]]), 5.).tolist()
    [0.25, 0.0, 0.25]
    """
    return roi_map.masked_fill(hidden.float().norm(dim=-1) > tau_norm, 0.0)


def assign_labels(roi_map, grid, tau_fg=0.2, tau_bg=0.1, max_box_fraction=0.5):
    """Eq. 2: a denoised map (..., N) -> labels (..., N) int64: 1 foreground, 0 background, -1 ignored.

    Foreground: at least tau_fg of the maximum. Background: outside the foreground's bounding box and at most tau_bg of the maximum.
    What lies between is ambiguous, and what lies inside the box may be the object's unattended part: neither is taught.
    All -1 if the map is zero, or if the box covers max_box_fraction of the grid or more (the released code's rule).
    >>> assign_labels(torch.tensor([.9, .05, .3, .15, .0, .0, .0, .0, .0]), grid=3).view(3, 3).tolist()    # from .18 on, up to .09
    [[1, -1, 1], [-1, 0, 0], [0, 0, 0]]
    """
    a = roi_map.unflatten(-1, (grid, grid))  # (..., g, g)
    peak = a.amax((-2, -1), keepdim=True)
    fg = (a >= tau_fg * peak) & (peak > 0)
    inside = bounding_cells(fg)
    bg = ~inside & (a <= tau_bg * peak)
    labels = torch.full(a.shape, -1, dtype=torch.int64, device=a.device)
    labels[fg], labels[bg] = 1, 0
    too_big = inside.sum((-2, -1), keepdim=True) >= max_box_fraction * grid * grid
    return labels.masked_fill(too_big | (peak <= 0), -1).flatten(-2)


def bounding_cells(fg):
    """(..., g, g) bool -> (..., g, g) bool, the cells of its bounding box."""
    def span(lines, dim):  # True from the first line with foreground to the last
        return (lines.cumsum(dim) > 0) & (lines.flip(dim).cumsum(dim).flip(dim) > 0)
    return span(fg.any(-1, keepdim=True), -2) & span(fg.any(-2, keepdim=True), -1)


@dataclass
class Lesson:
    """What the teacher says of b samples of one prompt length, and what the student can take over from it."""
    responses: list         # b answers as text
    raw: torch.Tensor       # (b, N) response-to-image attention
    clean: torch.Tensor     # (b, N) the same without sinks
    hidden: torch.Tensor    # (b, T, D) the prompt's hidden states after the frozen layers
    image: slice            # the image's columns in T; the query token is the last of T


def head_pairs(attention, H):
    """{"14": [13, 24]} -> {14: [13, 24]}, null meaning all H heads."""
    return {int(layer): list(range(H)) if heads is None else heads for layer, heads in attention.items()}


@torch.no_grad()
def teach(llava, recipe, pixels, prompts, max_new_tokens=128, given=None, sinks=True, frozen=None):
    """Alg. 1 lines 6-11 for b samples: answer, and read off where the answers looked.

    pixels (b, 3, S, S); prompts: b lists of ids of one length (so no padding, no mask). `given` answers (ids) replace the
    model's own (Table 4b); sinks=False keeps sink tokens (Table 3). Rows are the response tokens fed back in: every token
    of a response but EOS, and but the last of one cut at max_new_tokens. No row: the map is zero, so all is ignored.
    Costs beyond answering: q of the response rows, which decoding computes anyway, times k at the recipe's layers.
    """
    L, B, H = llava.config["num_hidden_layers"], frozen or recipe["frozen"], llava.config["num_attention_heads"]
    pools = {"roi": head_pairs(recipe["attention"], H)}
    sink = recipe["sink"] if sinks else None
    if sink and sink["kind"] == "attention":
        pools["sink"] = head_pairs(sink["attention"], H)
    tapped = sorted({layer for pool in pools.values() for layer in pool})
    lowest = min(pools["roi"])  # H^l of Eq. 1 enters this layer

    tokens = llava.encode_images(pixels)  # (b, N, D)
    embeds = [llava.embed_prompt(ids, tokens[i:i + 1]) for i, ids in enumerate(prompts)]
    image, hidden = embeds[0][1], torch.cat([e for e, _ in embeds])  # (b, T, D)
    b, T, _ = hidden.shape
    cache = KVCache(llava, b, T + max([max_new_tokens, *map(len, given or [])]))
    done, kept = 0, {}  # kept[l]: the prompt's hidden states (b, T, D) after the first l layers
    for stop in sorted({lowest, B, L}):
        hidden = kept[stop] = llava.run(hidden, done, stop, cache)
        done = stop
    keys = {layer: cache.k[layer][:, :, :T].clone() for layer in tapped}  # (b, Hkv, T, d); the cache's batch shrinks while decoding
    cache.queries = {layer: [] for layer in tapped}
    if given is None:
        ids = llava.decode(hidden[:, -1], cache, T, max_new_tokens)
        fed = [reply[:max_new_tokens - 1] for reply in ids]
    else:
        ids = fed = given
        width = max(map(len, given))
        padded = [g + [0] * (width - len(g)) for g in given]  # rows beyond an answer's end are cut below
        if width:
            llava.run(llava.language_model.embed_tokens(torch.tensor(padded, device=llava.device)), 0, L, cache, start=T)
    maps = {name: torch.zeros(b, image.stop - image.start, device=llava.device) for name in pools}
    for row, reply in enumerate(fed):
        if not reply:
            continue
        for name, pool in pools.items():
            heads = []
            for layer, chosen in pool.items():
                q, k = tapped_rows(cache.queries[layer], ids if given is None else None, row, len(reply))  # (H, m, d), (Hkv, m, d)
                a = response_attention(q, torch.cat([keys[layer][row], k], 1), image, T, "sequence" if name == "sink" else recipe["softmax"])
                heads.append(a[chosen])  # (chosen, N)
            maps[name][row] = torch.cat(heads).mean(0)  # (N,): one pool of all (layer, head) pairs
    clean = maps["roi"]
    if sink and sink["kind"] == "attention":
        clean = clean.masked_fill(maps["sink"] >= sink["threshold"] * 576 / clean.shape[1], 0.0)  # a threshold is for 576 tokens
    elif sink:
        h = kept[lowest][:, image]
        clean = remove_sink_tokens(clean, h, sink["c"] * h.float().norm(dim=-1).median(-1, keepdim=True).values)
    return Lesson([llava.detokenize(i) for i in ids], maps["roi"], clean, kept[B], image)


def tapped_rows(steps, ids, row, m):
    """The m rows that sample `row` fed, out of what the cache kept -> q (H, m, d), k (Hkv, m, d).

    One entry per decoding step, of the samples still running then; or, for given answers (ids None), one entry in all.
    Say sample 0 answers with 1 token and sample 1 with 3: sample 1 is at place 1 in step 0, and at place 0 afterwards.
    """
    if ids is None:
        return tuple(t[row, :, :m] for t in steps[0])
    at = [sum(len(reply) > s for reply in ids[:row]) for s in range(m)]  # its place in the batch that was left at step s
    return tuple(torch.cat([steps[s][i][at[s]] for s in range(m)], 1) for i in (0, 1))


# --------------------------------------------------------------------------------- 2. student: the RPN

class ScoreLayer(nn.Module):
    """What is left of the RPN's last block: its input norm, q_proj and k_proj."""

    def __init__(self, c):
        super().__init__()
        D, self.d = c["hidden_size"], c["head_dim"]
        self.input_layernorm = RMSNorm(D, c["rms_norm_eps"])
        self.self_attn = nn.Module()  # only for the names of the keys
        self.self_attn.q_proj = nn.Linear(D, c["num_attention_heads"] * self.d, bias=False)
        self.self_attn.k_proj = nn.Linear(D, c["num_key_value_heads"] * self.d, bias=False)

    def forward(self, queries, image):
        """Eq. 5, per head: normed hidden states (b, n, D) and (b, N, D) -> scores (b, H, n, N).

        Without rotary embedding: a score says what a patch holds, not how far from the question it stands.
        >>> layer = ScoreLayer(dict(hidden_size=2, head_dim=2, num_attention_heads=1, num_key_value_heads=1, rms_norm_eps=0.0))
        >>> _ = [p.weight.data.copy_(torch.eye(2)) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)]
        >>> layer(torch.tensor([[[1., 1.]]]), torch.tensor([[[5., 5.], [3., -3.], [-1., -1.]]])).detach()    # 3 patches: alike, across, opposite
        tensor([[[[ 1.4142,  0.0000, -1.4142]]]])
        """
        q = self.self_attn.q_proj(self.input_layernorm(queries)).unflatten(-1, (-1, self.d)).transpose(1, 2)  # (b, H, n, d)
        k = self.self_attn.k_proj(self.input_layernorm(image)).unflatten(-1, (-1, self.d)).transpose(1, 2)  # (b, Hkv, N, d)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # (b, H, N, d)
        return (q @ k.mT).to(wider(q.dtype)) / self.d ** 0.5


class RPN(nn.Module):
    """The region proposal network: R trainable blocks behind the first B (`frozen`) layers of a frozen LLaVA (Sec. 3.3).

    Parameters keep the released names: twig_layers.{0..R-1}.*, twig_norm.weight.
    """

    def __init__(self, config, frozen, layers):
        super().__init__()
        self.config, self.frozen = config, frozen
        self.twig_layers = nn.ModuleList([*(Block(config) for _ in range(layers - 1)), ScoreLayer(config)])
        self.twig_norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.smooth = True  # False: trained on smoothed labels, so its map is not smoothed again (Table 8)
        self.path, self.loss = None, "bce"

    def score(self, hidden, image, rows):
        """Eq. 3-5: hidden states after the frozen layers (b, T, D) -> per-head scores (b, H, n, N) in float32 or wider.

        rows: positions of the n query tokens, the last prompt token before each response: one forward pass for all turns.
        """
        c = self.config
        rope = rope_table(0, hidden.shape[1], c["head_dim"], c["rope_theta"], hidden.device, hidden.dtype)
        for block in self.twig_layers[:-1]:
            hidden = block(hidden, rope)
        return self.twig_layers[-1](self.twig_norm(hidden[:, rows]), self.twig_norm(hidden[:, image]))  # of (b, n, D) and (b, N, D)

    @torch.no_grad()
    def forward(self, llava, image, question, history=()):
        """Where to look for this question: logits (g, g) float32, from one pass through B + R layers."""
        hidden, columns = llava.embed_prompt(llava.prompt_ids(question, history), llava.view(image))
        hidden = llava.run(hidden, 0, self.frozen)
        return self.logits(hidden, columns)

    def logits(self, hidden, columns):
        """The last token is the query: (1, T, D) -> (g, g)."""
        return self.score(hidden, columns, [-1])[0].mean(0).float().view(math.isqrt(columns.stop - columns.start), -1)

    @classmethod
    def from_layers(cls, llava, frozen, layers):
        """An untrained RPN: float32 copies of decoder layers B..B+R-1 and of the final norm."""
        L = llava.config["num_hidden_layers"]
        if not (1 <= frozen and 1 <= layers and frozen + layers <= L):
            raise BadInput(f"--frozen-layers {frozen} and --rpn-layers {layers}: both at least 1, together at most the model's {L} layers")
        rpn = cls(llava.config, frozen, layers)
        backbone = {f"twig_layers.{i}.{k}": v for i in range(layers)
                    for k, v in llava.language_model.layers[frozen + i].state_dict().items()}
        backbone["twig_norm.weight"] = llava.language_model.norm.weight
        rpn.load_state_dict({k: backbone[k].float() for k in rpn.state_dict()})
        return rpn.to(llava.device)

    @classmethod
    def load(cls, path, llava):
        """Our rpn.safetensors, or a folder as the authors released it (only model.twig_* is read). Raises BadInput."""
        path = Path(path)
        if path.is_dir() and not (path / "rpn.safetensors").is_file():
            config = read_json(path / "config.json")
            shards = [(path / name, f) for name, f in open_shards(path).items()]
            facts = {"frozen": config.get("twig_K"), "layers": config.get("twig_T")}
        else:
            path = path / "rpn.safetensors" if path.is_dir() else path
            if not path.is_file():
                raise BadInput(f"{path}: no such RPN; train one with: python train.py")
            shards = [(path, open_safetensors(path))]
            try:
                facts = dict(json.loads((shards[0][1].metadata() or {}).get("sdrpn", "{}")))
            except (ValueError, TypeError, RecursionError):
                facts = {}
        frozen, layers = facts.get("frozen"), facts.get("layers")
        if type(frozen) is not int or type(layers) is not int or min(frozen, layers) < 1:
            raise BadInput(f"{path}: does not say its depth (twig_K, twig_T): not an RPN of this program nor a released one")
        if facts.get("fingerprint", llava.fingerprint) != llava.fingerprint:
            raise BadInput(f"{path}: trained for another checkpoint ({facts.get('ckpt')}, fingerprint {facts['fingerprint']}; this one is "
                           f"{llava.fingerprint}); name its --ckpt, or train again with: python train.py --ckpt {llava.folder}")
        if frozen + layers > llava.config["num_hidden_layers"]:
            raise BadInput(f"{path}: needs {frozen + layers} decoder layers, {llava.folder} has {llava.config['num_hidden_layers']}: "
                           "an RPN of another model")
        with torch.device("meta"):
            rpn = cls(llava.config, frozen, layers)
        wanted, found = rpn.state_dict(), {}
        for file, shard in shards:
            for name in shard.keys():
                key = name.removeprefix("model.")
                if key in wanted:
                    tensor = shard.get_tensor(name).to(llava.device, llava.dtype)
                    if tensor.shape != wanted[key].shape:
                        raise BadInput(f"{file}: {name} has shape {tuple(tensor.shape)}, {llava.folder} needs {tuple(wanted[key].shape)}: "
                                       "an RPN of another model")
                    if not tensor.isfinite().all():
                        raise BadInput(f"{file}: {name} holds NaN or infinite values; train again with --fresh")
                    found[key] = tensor
        absent = sorted(wanted.keys() - found.keys())
        if absent:
            raise BadInput(f"{path}: {len(absent)} RPN tensors missing, first model.{absent[0]}; download or train it again")
        rpn.load_state_dict(found, assign=True)
        rpn.path, rpn.smooth, rpn.loss = path, facts.get("smooth", "map") == "map", facts.get("loss", "bce")
        return rpn.requires_grad_(False).eval()

    def save(self, path, facts):
        """Write model.twig_* with `facts` (frozen, layers, fingerprint, ...) as metadata, under another name first."""
        tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        write_file(Path(path), lambda partial: save_file(tensors, partial, metadata={"sdrpn": json.dumps(facts)}))


def roi_loss(logits, labels):
    """BCE over the labelled tokens, mean (Alg. 1 line 18); logits and labels (..., N). No label: 0, still attached to the graph.

    >>> round(roi_loss(torch.tensor([0., 2., 9.]), torch.tensor([1, 0, -1])).item(), 4)
    1.41
    """
    return roi_loss_sum(logits, labels) / (labels >= 0).sum().clamp(min=1)


def roi_loss_sum(logits, labels):
    """The same without the division, so that micro-batches can share the count of the whole batch."""
    return F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).to(logits.dtype), (labels >= 0).to(logits.dtype), reduction="sum")


# ------------------------------------------------------------------------------ 3. inference: look again

@dataclass
class Region:
    box: tuple           # in grid cells
    cells: torch.Tensor  # (g, g) bool
    weight: float        # summed smoothed probability


def smooth(p):
    """G of Eq. 6 on (..., g, g): Gaussian 3x3, sigma 1, reflect padding.

    >>> p = torch.zeros(5, 5); p[2, 2] = 1.
    >>> smooth(p)[2]
    tensor([0.0000, 0.1238, 0.2042, 0.1238, 0.0000])
    """
    w = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=p.dtype, device=p.device) / 2)
    w = w / w.sum()
    padded = F.pad(p.reshape(-1, 1, *p.shape[-2:]), (1, 1, 1, 1), mode="reflect")  # (maps, 1, g+2, g+2)
    return F.conv2d(padded, (w[:, None] * w).view(1, 1, 3, 3)).view(p.shape)


def regions_above(p, threshold, small=True):
    """8-connected components of p > threshold on a (g, g) CPU map, in raster order of their top-left corner.

    Specks of one cell are dropped; a side shorter than 3 of a component of 2 or 3 cells grows to 3 around its centre
    (small=False: neither). A grown component owns all cells of its box.
    >>> p = torch.zeros(6, 6); p[0, 5] = .9; p[2, 2] = p[3, 3] = .5    # a speck, and two cells that touch at a corner
    >>> [(r.box, r.weight) for r in regions_above(p, 0.15)]
    [((1, 1, 4, 4), 1.0)]
    """
    g, todo, found = p.shape[0], {(y, x) for y, x in (p > threshold).nonzero().tolist()}, []
    while todo:
        component, edge = [], [todo.pop()]
        while edge:
            y, x = edge.pop()
            component.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= near
            edge += near
        ys, xs = zip(*component)
        box = [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
        cells = torch.zeros(g, g, dtype=torch.bool)
        cells[ys, xs] = True
        weight = p[cells].sum().item()
        if small and len(component) == 1:
            continue
        if small and len(component) < 4:
            for i in (0, 1):
                if box[i + 2] - box[i] < 3:
                    start = (box[i] + box[i + 2] - 3) // 2
                    box[i], box[i + 2] = max(start, 0), min(start + 3, g)  # clipped at the border, not shifted
            cells[box[1]:box[3], box[0]:box[2]] = True
        found.append(Region(tuple(box), cells, weight))
    return sorted(found, key=lambda r: (r.box[1], r.box[0]))


def find_regions(logits, tau=0.15):
    """Eq. 6 and the boxes of Eq. 7: logits (g, g) -> grid boxes of the regions where the smoothed probability exceeds tau.

    >>> logits = torch.full((6, 6), -9.); logits[1:3, 2:4] = 9.    # smoothed: .53 inside, .20 beside it, .08 at its corners
    >>> find_regions(logits)
    [(1, 0, 5, 4)]
    """
    return [r.box for r in regions_above(smooth(logits.float().cpu().sigmoid()), tau)]


def grid_to_image(box, grid, image_size):
    """A box in cells of the padded square -> source pixels: floor, ceil, clamped, at least 1 px.

    >>> grid_to_image((0, 3, 2, 6), 12, (672, 504))    # cells of 56 px; 84 px of padding above
    (0, 84, 112, 252)
    """
    side, pixels = max(image_size), []
    for i, length in enumerate(image_size):
        pad = (side - length) // 2
        low = min(max(box[i] * side // grid - pad, 0), length - 1)
        high = max(min(-(-box[i + 2] * side // grid) - pad, length), low + 1)
        pixels.append((low, high))
    (x0, x1), (y0, y1) = pixels
    return x0, y0, x1, y1


def picture_cells(grid, image_size):
    """(g, g) bool: the cells that hold at least one pixel of the picture, the others are padding."""
    side, on = max(image_size), []
    for length in image_size:
        pad = (side - length) // 2
        i = torch.arange(grid)
        on.append((i * side < (pad + length) * grid) & ((i + 1) * side > pad * grid))
    return on[1][:, None] & on[0]


def crop_tokens(llava, image, regions, mode, max_regions=2):
    """Eq. 7 (mode "box") or Eq. 8 ("mask"): regions -> new image tokens (1, n, D) and the source boxes they show.

    Box Upscaling: the heaviest max_regions regions, N tokens each. Masked Upscaling: one crop around all regions, of whose
    patch features only those under the mask are projected (all, if none is). A mask of 2 x 2 cells on a crop of 4 x 4 tokens:
    >>> (F.interpolate(torch.tensor([[[[1., 0.], [1., 1.]]]]), (4, 4), mode="bilinear")[0, 0] > 0.5).int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    size, g = llava.vision_tower.image_size, llava.grid
    if mode == "box":
        best = sorted(range(len(regions)), key=lambda i: -regions[i].weight)[:max_regions]
        boxes = [grid_to_image(regions[i].box, g, image.size) for i in sorted(best)]
    else:
        cells = torch.stack([r.cells for r in regions]).any(0)  # B of Eq. 8
        lefts, tops, rights, bottoms = zip(*(r.box for r in regions))
        x0, y0, x1, y1 = around = min(lefts), min(tops), max(rights), max(bottoms)
        boxes = [grid_to_image(around, g, image.size)]
    pixels = torch.stack([preprocess_crop(image, box, size) for box in boxes]).to(llava.device, llava.dtype)
    features = llava.vision_tower(pixels)  # (boxes, N, C)
    if mode == "mask":
        keep = F.interpolate(cells[None, None, y0:y1, x0:x1].float(), (g, g), mode="bilinear")[0, 0] > 0.5  # (g, g) of the crop
        if keep.any():
            features = features[:, keep.flatten().to(features.device)]  # (1, kept, C)
    return llava.multi_modal_projector(features).flatten(0, 1)[None], boxes  # (1, boxes * N or kept, D)


@dataclass
class Answer:
    text: str
    boxes: list = field(default_factory=list)  # crops that were read, in source pixels; empty: the plain picture sufficed
    logits: torch.Tensor = None                # (g, g) float32 on the CPU, None if the RPN did not run
    visual_tokens: int = 0
    ms: dict = field(default_factory=dict)     # wall time of each stage


@torch.no_grad()
def answer(llava, rpn, image, question, mode="mask", tau=0.15, max_new_tokens=128, history=(), max_regions=2, mask=None, reuse=True,
           ignore_eos=False):
    """Two-stage answer (Sec. 3.4). mode: "mask" (Eq. 8), "box" (Eq. 7) or "plain"; history = ((question, answer), ...).

    `mask` (g, g), bool or non-negative weights, takes the RPN's place. The crop's tokens go right behind the image's, for this question only.
    reuse: [system][image] comes before the crop in a causal decoder, so its keys and values in layers 0..B-1 and its hidden
    states after them are already what stage 2 needs, and only what follows the image is run through those layers again.
    reuse=False starts stage 2 over: the same function, the reference for the tests.
    """
    if mode not in ("mask", "box", "plain"):
        raise BadInput(f"mode {mode!r}: must be mask, box or plain")
    if not 0 < tau < 1:
        raise BadInput(f"--tau {tau}: must lie between 0 and 1")
    clock = Clock(llava.device)
    L, g = llava.config["num_hidden_layers"], llava.grid
    B = rpn.frozen if rpn is not None else L // 2  # a supplied mask needs no RPN
    embeds, image_columns = llava.embed_prompt(llava.prompt_ids(question, history), llava.view(image))  # (1, T, D)
    T, P = embeds.shape[1], image_columns.stop  # P tokens of [system][image]
    most_crops = {"plain": 0, "mask": 1, "box": max_regions}[mode] * g * g
    llava.check_length(T + most_crops + max_new_tokens)
    cache = KVCache(llava, 1, T + most_crops + max_new_tokens)
    clock.lap("encode")

    hidden, logits, regions = embeds, None, []
    if mode != "plain":
        hidden = llava.run(embeds, 0, B, cache)  # (1, T, D): stage 1 stops here
        if mask is None:
            logits = rpn.logits(hidden, image_columns).cpu()  # (g, g)
            if not logits.isfinite().all():
                raise BadInput(f"{rpn.path or 'RPN'}: its map is not finite in {str(llava.dtype)[6:]}; try --dtype bfloat16 or float32")
            clock.lap("rpn")
            p = logits.sigmoid() * picture_cells(g, image.size)  # the padding holds no evidence
            regions = regions_above(smooth(p) if rpn.smooth else p, tau)
        else:
            regions = regions_above(torch.as_tensor(mask).float().cpu().view(g, g), 0.0, small=False)
        clock.lap("regions")

    boxes, first = [], 0 if mode == "plain" else B
    if regions:
        crop, boxes = crop_tokens(llava, image, regions, mode, max_regions)  # (1, n, D)
        clock.lap("crop")
        new = torch.cat([crop, embeds[:, P:]], 1)  # what follows the image now
        if reuse:
            new = llava.run(new, 0, B, cache, start=P)  # overwrites the question's old keys and values from P on
            hidden = torch.cat([hidden[:, :P], new], 1)
        else:
            hidden, first = torch.cat([embeds[:, :P], new], 1), 0
    elif not reuse:
        hidden, first = embeds, 0  # with reuse and no region, stage 1's states go on from layer B: the plain answer, nothing run twice
    T = hidden.shape[1]
    hidden = llava.run(hidden, first, L, cache)
    clock.lap("prefill")
    ids = llava.decode(hidden[:, -1], cache, T, max_new_tokens, ignore_eos)[0]
    clock.lap("decode")
    crop_count = T - embeds.shape[1]
    return Answer(llava.detokenize(ids), boxes, logits, g * g + crop_count, clock.ms)


class Clock:
    """Milliseconds of each stage; on CUDA each lap waits for the device."""

    def __init__(self, device):
        self.device, self.ms = device, {}
        self.last = time.perf_counter()

    def lap(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.ms[name] = round(1000 * (now - self.last), 3)
        self.last = now

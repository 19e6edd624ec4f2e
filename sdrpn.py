"""
SD-RPN, the method whole: a question -> where to look -> look again.

Sec., Eq. and Alg. are those of the paper, arXiv 2509.16944.

    teach()        the frozen model answers; its attention says where it looked  Sec. 3.1-2, Eq. 1
    make_labels()  that map becomes foreground, background, and what is ignored  Sec. 3.2, Eq. 2
    RPN            R blocks on top of the first B frozen layers learn the labels Sec. 3.3, Eq. 3-5
    answer()       regions of the RPN's map are cropped and read again           Sec. 3.4, Eq. 6-8

    m = load("toy")
    rpn = RPN.load("data/toy/llava-toy/rpn.safetensors", m)
    print(answer(m, rpn, picture, "What number is on the star?").text)

Left out: the training loop (train.py); ablations and ViCrop (tests/ablations.py, tests/peers.py).
Shapes: b batch, n turns, T tokens, N = h*w image tokens, D hidden width, H heads, d head size.
Maps are (..., N) row by row, or (h, w); a grid is (h, w), or an int where it is square. Boxes are
half-open (x0, y0, x1, y1), in grid cells or in source pixels.
"""
import json
import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from clip import BadInput, pad_to_square
from model import (Attention, Block, Crop, KVCache, RMSNorm, next_position, open_safetensors,
                   open_shards, read_family, read_json, rotate, wider)


# ----------------------------------------------------------------------- 1. teacher: pseudo-labels

@dataclass
class Lesson:
    """What the teacher says of b samples of one length, and what the student goes on from."""
    responses: list       # b answers as text
    raw: torch.Tensor     # (b, N) response-to-image attention, M_RoI
    clean: torch.Tensor   # (b, N) the same without sinks, M'_RoI
    hidden: torch.Tensor  # (b, T, D) the prompt's hidden states after the frozen layers
    columns: slice        # the image's columns in T; the query token is the last of T
    rope: torch.Tensor    # (2, T, d) rotary table of the prompt


@torch.no_grad()
def teach(m, recipe, pixels, prompts, max_new_tokens=128):
    """Alg. 1 lines 6-11 for b samples: answer, and read off where the answers looked.

    pixels (b, 3, H, W); prompts: b lists of ids of one length, so there is no padding and no mask.
    recipe["sink"] None: no sink is removed (Table 3 #3). Query rows are the response tokens that
    were fed back: all but EOS, and without the last if the answer was cut. An empty answer has
    none; its map is zero, so it gets no label and teaches nothing. What it costs beyond answering
    is the rows' q (which decoding computes anyway) times k, at the recipe's layers; and in a batch
    all samples are decoded for as long as the longest answer.
    """
    B, attention, sink = recipe["frozen"], head_lists(m, recipe["attention"]), recipe["sink"]
    lowest = min(attention)  # H^l of Eq. 1 enters this layer
    hidden, columns, positions = m.prepare(prompts, pixels)  # (b, T, D)
    (b, T, _), rope = hidden.shape, m.rope(positions)
    cache = KVCache(m, b, T + max_new_tokens)
    cache.shift = next_position(positions) - T

    after = {0: hidden}  # the prompt's hidden states (b, T, D) after so many layers
    for first, last in pairwise(sorted({0, lowest, B, m.depth})):
        after[last] = m.run(after[first], first, last, rope, cache)
    by_attention = sink is not None and sink["kind"] == "attention"
    sink_heads = head_lists(m, sink["attention"]) if by_attention else {}
    cache.queries = {layer: [] for layer in {*attention, *sink_heads}}
    # Line 6; 7 and 8 come with it: decoding feeds the answer back, and keeps its q and all k.
    answers = m.decode(after[m.depth][:, -1], cache, T, max_new_tokens)

    counts = [min(len(ids), max_new_tokens - 1) for ids in answers]  # rows of each sample
    # Lines 9-10, where the recipe says "image"; the released LLaVA recipes say "sequence".
    raw = roi_maps(cache, attention, columns, T, counts, recipe["softmax"])  # (b, N)
    clean = raw
    if by_attention:  # the released code's rule; its threshold is for 576 tokens
        seen = roi_maps(cache, sink_heads, columns, T, counts, "sequence")
        clean = raw.masked_fill(seen >= sink["threshold"] * 576 / raw.shape[1], 0.0)
    elif sink is not None:  # line 11
        entering = after[lowest][:, columns]  # (b, N, D)
        norms = entering.float().norm(dim=-1)
        clean = remove_sink_tokens(raw, entering, sink["c"] * norms.median(-1, keepdim=True).values)
    responses = [m.detokenize(ids) for ids in answers]
    return Lesson(responses, raw, clean, after[B], columns, rope)


# A recipe may change what training shows of a picture, what it asks, and the rules of labels.

def training_view(m, recipe, picture):
    """The picture as training shows it, to teacher and student -> pixels (3, H, W), a Letterbox."""
    shown, frame = picture, m.frame(picture.size)
    if recipe.get("square"):
        shown = pad_to_square(picture, (127, 127, 127))
        frame = shown.size
    pixels = m.pixels(shown)
    return pixels, Letterbox(picture.size, m.token_grid(pixels), frame)


def teacher_question(recipe, question):
    r"""The question as the teacher is asked it: a recipe may ask for a box, not for a short answer.

    >>> teacher_question({"request": "Give the box."}, "Who?\nAnswer briefly.")
    'Who?\nGive the box.'
    >>> teacher_question({"request": "Give the box."}, "Who?")
    'Who?\nGive the box.'
    """
    if "request" not in recipe:
        return question
    asked, _, last = question.rpartition("\n")
    if not asked or not last.startswith("Answer"):
        asked = question
    return asked + "\n" + recipe["request"]


def make_labels(clean, recipe, on):
    """Line 12 by a recipe's rules: a denoised map (N,), `on` (h, w) holds picture -> (N,) int64."""
    rules = recipe.get("labels", {})
    padding = on if rules.get("padding") == "background" else None
    more = {key: rules[key] for key in ("grow", "min_peak") if key in rules}
    return assign_labels(clean, tuple(on.shape), on=padding, **more)


def teach_one(m, recipe, picture, question, max_new_tokens=128, history=()):
    """What the teacher says of one question, for figures: a dict.

    raw, clean, labels, sinks: maps (h, w) as arrays; teacher_letterbox: their grid; response.
    """
    pixels, letterbox = training_view(m, recipe, picture)
    prompts = [m.prompt_ids(teacher_question(recipe, question), history)]
    lesson = teach(m, recipe, pixels[None], prompts, max_new_tokens)
    raw, clean = lesson.raw[0].cpu(), lesson.clean[0].cpu()
    labels = make_labels(clean, recipe, letterbox.holds_picture())
    maps = {"raw": raw, "clean": clean, "labels": labels, "sinks": (raw > 0) & (clean == 0)}
    maps = {name: value.view(letterbox.grid).numpy() for name, value in maps.items()}
    return maps | {"teacher_letterbox": letterbox, "response": lesson.responses[0]}


def head_lists(m, attention):
    """A recipe's {"14": [13, 24]} -> {14: [13, 24]}, null meaning all heads."""
    every = list(range(m.config["num_attention_heads"]))
    return {int(layer): every if heads is None else heads for layer, heads in attention.items()}


def roi_maps(cache, attention, columns, prompt, counts, softmax):
    """M_RoI of b samples: mean over a sample's rows and over the recipe's (layer, head) pairs.

    cache: all keys, and the rows' queries. counts: rows of each sample. -> (b, N) float32
    """
    maps = []
    for layer, heads in attention.items():
        k, steps = cache.k[layer], cache.queries[layer]  # (b, Hkv, length, d); a (b, H, 1, d) each
        q = torch.cat(steps, 2) if steps else k[:, :, :0]  # (b, H, steps, d)
        N = columns.stop - columns.start
        of_layer = torch.zeros(len(counts), len(heads), N, device=k.device)
        for i, count in enumerate(counts):
            if count:
                own = q[i, :, :count], k[i, :, :prompt + count]
                of_layer[i] = response_attention(*own, columns, prompt, softmax)[heads]
        maps.append(of_layer)
    return torch.cat(maps, 1).mean(1)


def response_attention(q, k, columns, prompt, softmax="image"):
    """Sec. 3.1, Alg. 1 lines 9-10: how much response rows look at each image token, mean over rows.

    q (H, m, d): rotated queries of the m response tokens fed back in. k (Hkv, prompt + m, d):
    rotated keys of the prompt and of those tokens. columns: the slice that is the image.
    softmax: "image" is the paper's, over the image alone; "sequence" the model's own, sliced.
    Returns (H, N) float32.
    >>> k = [[0., 0.], [math.log(3), 0.], [0., 0.], [0., 0.]]  # of text, two patches, response
    >>> q, k = torch.tensor([[[2 ** 0.5, 0.]]]), torch.tensor([k])
    >>> response_attention(q, k, slice(1, 3), prompt=3)
    tensor([[0.7500, 0.2500]])
    >>> response_attention(q, k, slice(1, 3), prompt=3, softmax="sequence")
    tensor([[0.5000, 0.1667]])
    """
    k = k.repeat_interleave(len(q) // len(k), 0)  # (H, prompt + m, d): grouped heads share keys
    if softmax == "image":
        k = k[:, columns]
    scores = q.float() @ k.float().mT / q.shape[-1] ** 0.5  # (H, m, N or prompt + m)
    if softmax == "image":
        return scores.softmax(-1).mean(1)
    future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(prompt + 1)
    return scores.masked_fill(future, -math.inf).softmax(-1)[..., columns].mean(1)


def remove_sink_tokens(roi_map, hidden, tau_norm):
    """Eq. 1: zero the map where an image token's hidden state is longer than tau_norm: a sink.

    roi_map (..., N), hidden (..., N, D) -> (..., N). teach() takes the states that enter the lowest
    layer it reads, and c times their median norm.
    >>> hidden = torch.tensor([[3., 4.], [30., 40.], [0., 5.]])
    >>> remove_sink_tokens(torch.tensor([.25, .5, .25]), hidden, 5.).tolist()
    [0.25, 0.0, 0.25]
    """
    return roi_map.masked_fill(hidden.float().norm(dim=-1) > tau_norm, 0.0)


def assign_labels(roi_map, grid, tau_fg=0.2, tau_bg=0.1, max_box_fraction=0.5, grow=0, min_peak=0.0,
                  on=None):
    """Eq. 2: a denoised map -> labels, (..., N) int64: 1 foreground, 0 background, -1 ignored.

    Foreground: at least tau_fg of the maximum. Background: outside the foreground's bounding box
    and at most tau_bg of the maximum. What lies between is ambiguous; what else lies in the box may
    be a part of the object that was not attended to: neither is taught. All -1 where the map is
    zero, or where the box covers max_box_fraction of the grid or more (the released code's rule).
    Some released recipes also let the box grow by `grow` cells, ask for a maximum of min_peak, and
    call all padding background: `on` (h, w) bool says which cells hold picture.
    >>> roi_map = torch.tensor([.9, .05, .3, .15, .0, .0, .0, .0, .0])  # foreground from .18 on
    >>> assign_labels(roi_map, grid=3).view(3, 3).tolist()              # background up to .09
    [[1, -1, 1], [-1, 0, 0], [0, 0, 0]]
    """
    h, w = as_pair(grid)
    on = torch.ones(h, w, dtype=torch.bool) if on is None else on
    on = on.to(roi_map.device)
    a = roi_map.unflatten(-1, (h, w)) * on  # (..., h, w)
    peak = a.amax((-2, -1), keepdim=True)
    fg = (a >= tau_fg * peak) & (peak > 0)
    inside = bounding_cells(fg)
    if grow:
        wide = F.max_pool2d(inside.reshape(-1, 1, h, w).float(), 2 * grow + 1, 1, grow)
        inside = wide.view(inside.shape) > 0
    bg = ~on | ~inside & (a <= tau_bg * peak)
    labels = torch.full(a.shape, -1, dtype=torch.int64, device=a.device)
    labels[bg] = 0
    labels[fg] = 1
    too_big = inside.sum((-2, -1), keepdim=True) >= max_box_fraction * h * w
    return labels.masked_fill(too_big | (peak <= 0) | (peak < min_peak), -1).flatten(-2)


def bounding_cells(fg):
    """(..., h, w) bool -> (..., h, w) bool, the cells of its bounding box."""
    def span(lines, dim):  # True from the first line with foreground to the last
        return (lines.cumsum(dim) > 0) & (lines.flip(dim).cumsum(dim).flip(dim) > 0)
    return span(fg.any(-1, keepdim=True), -2) & span(fg.any(-2, keepdim=True), -1)


# ----------------------------------------------------------------------------- 2. student: the RPN

class ScoreLayer(nn.Module):
    """What is left of the RPN's last block: its input norm, q_proj and k_proj.

    A score needs q and k only; v, o and the MLP would never be used.
    """

    def __init__(self, config):
        super().__init__()
        D, self.d, bias = config["hidden_size"], config["head_dim"], config["qkv_bias"]
        self.rotated = config["score_rope"]
        self.input_layernorm = RMSNorm(D, config["rms_norm_eps"])
        self.self_attn = nn.Module()  # only for the names of the keys
        self.self_attn.q_proj = nn.Linear(D, config["num_attention_heads"] * self.d, bias=bias)
        self.self_attn.k_proj = nn.Linear(D, config["num_key_value_heads"] * self.d, bias=bias)

    split = Attention.split  # (b, t, heads * d) -> (b, heads, t, d)

    def forward(self, queries, image, query_rope, image_rope):
        """Eq. 5, per head: (b, n, D) and (b, N, D), after twig_norm -> scores (b, H, n, N).

        LLaVA's score is not rotated: it says what a patch holds, not how far from the question it
        stands.
        >>> config = dict(hidden_size=2, head_dim=2, num_attention_heads=1, num_key_value_heads=1,
        ...               rms_norm_eps=0.0, qkv_bias=False, score_rope=False)
        >>> layer = ScoreLayer(config).requires_grad_(False)
        >>> for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj):
        ...     _ = proj.weight.copy_(torch.eye(2))
        >>> patches = torch.tensor([[[5., 5.], [3., -3.], [-1., -1.]]])  # alike, across, opposite
        >>> layer(torch.tensor([[[1., 1.]]]), patches, None, None)
        tensor([[[[ 1.4142,  0.0000, -1.4142]]]])
        """
        q = self.split(self.self_attn.q_proj(self.input_layernorm(queries)))  # (b, H, n, d)
        k = self.split(self.self_attn.k_proj(self.input_layernorm(image)))  # (b, Hkv, N, d)
        if self.rotated:
            q, k = rotate(q, query_rope), rotate(k, image_rope)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # (b, H, N, d)
        return (q @ k.mT).to(wider(q.dtype)) / self.d ** 0.5


class RPN(nn.Module):
    """R-1 trainable blocks and a ScoreLayer behind the first B (`frozen`) layers (Sec. 3.3).

    Parameters keep the released names: twig_layers.{0..R-1}.*, twig_norm.weight.
    """

    def __init__(self, config, frozen, layers):
        super().__init__()
        self.frozen, self.path = frozen, None
        blocks = [Block(config) for _ in range(layers - 1)]
        self.twig_layers = nn.ModuleList([*blocks, ScoreLayer(config)])
        norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.twig_norm = norm if config["final_norm"] else nn.Identity()

    def score(self, hidden, columns, rows, rope):
        """Eq. 3-5: hidden states after the frozen layers (b, T, D) -> scores (b, H, n, N).

        columns: the image's. rows: where the n query tokens stand, the last prompt token before
        each response; one pass serves all turns. rope (2, T, d). The map of a turn is the mean over
        heads, which logits() and the training loss take.
        """
        for block in self.twig_layers[:-1]:
            hidden = block(hidden, rope)  # (b, T, D), Eq. 3
        queries = self.twig_norm(hidden[:, rows])  # (b, n, D), Eq. 4
        image = self.twig_norm(hidden[:, columns])  # (b, N, D)
        return self.twig_layers[-1](queries, image, rope[:, rows], rope[:, columns])

    def logits(self, hidden, columns, rope, grid):
        """Where to look, the last token being the query: (1, T, D) -> (h, w) float32 on the CPU.

        Raises FloatingPointError if a logit is not finite.
        """
        logits = self.score(hidden, columns, [-1], rope)[0].mean(0).float().view(grid).cpu()
        if not logits.isfinite().all():
            raise FloatingPointError(f"{self.path or 'the RPN'}: its map is not finite in "
                                     f"{str(hidden.dtype)[6:]}; try --dtype bfloat16 or float32")
        return logits

    @torch.no_grad()
    def forward(self, m, picture, question, history=()):
        """Where to look for this question: logits (h, w), from one pass through B + R layers."""
        pixels, prompts = m.pixels(picture)[None], [m.prompt_ids(question, history)]
        hidden, columns, positions = m.prepare(prompts, pixels)
        rope = m.rope(positions)
        hidden = m.run(hidden, 0, self.frozen, rope)
        return self.logits(hidden, columns, rope, m.token_grid(pixels))

    @classmethod
    def from_layers(cls, m, frozen, layers):
        """An untrained RPN: float32 copies of decoder layers B..B+R-1 and of the final norm."""
        check_depth(m, frozen, layers)
        rpn = cls(m.config, frozen, layers)
        backbone = {"twig_norm.weight": m.language_model.norm.weight}
        for i in range(layers):
            layer = m.language_model.layers[frozen + i].state_dict()
            backbone |= {f"twig_layers.{i}.{name}": tensor for name, tensor in layer.items()}
        rpn.load_state_dict({name: backbone[name].float() for name in rpn.state_dict()})
        return rpn.to(m.device)

    @classmethod
    def load(cls, path, m):
        """Our rpn.safetensors, or a folder as the authors released it. Raises BadInput."""
        path, shards, facts = open_rpn(Path(path))
        frozen, layers = facts.get("frozen"), facts.get("layers")
        if type(frozen) is not int or type(layers) is not int or min(frozen, layers) < 1:
            raise BadInput(f"{path}: does not say its depth (twig_K, twig_T): not an RPN of this "
                           "program nor a released one")
        if facts.get("fingerprint", m.fingerprint) != m.fingerprint:
            raise BadInput(f"{path}: trained for another checkpoint ({facts.get('ckpt')}, "
                           f"fingerprint {facts['fingerprint']}; this one is {m.fingerprint}); "
                           f"name its --ckpt, or train again with: "
                           f"python train.py --ckpt {m.folder}")
        if frozen + layers > m.depth:
            raise BadInput(f"{path}: needs {frozen + layers} decoder layers, {m.folder} has "
                           f"{m.depth}: an RPN of another model")
        with torch.device("meta"):
            rpn = cls(m.config, frozen, layers)
        wanted = rpn.state_dict()
        found = {}
        for shard in shards:
            for name in shard.keys():
                key = name.removeprefix("model.")
                if key in wanted:
                    found[key] = shard.get_tensor(name).to(m.device, m.dtype)
        for key, expected in wanted.items():
            if key not in found or found[key].shape != expected.shape:
                shape = tuple(found[key].shape) if key in found else "missing"
                raise BadInput(f"{path}: model.{key} is {shape}, {m.folder} needs "
                               f"{tuple(expected.shape)}: damaged, or an RPN of another model")
            if not found[key].isfinite().all():
                raise BadInput(f"{path}: model.{key} holds NaN or infinite values; "
                               "train again with --fresh")
        rpn.load_state_dict(found, assign=True)
        rpn.path = path
        return rpn.requires_grad_(False).eval()

    def save(self, path, facts):
        """Write model.twig_*, with `facts` (frozen, layers, fingerprint, ...) as metadata."""
        tensors = {f"model.{key}": tensor.detach().cpu().contiguous()
                   for key, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={"sdrpn": json.dumps(facts)})


def open_rpn(path):
    """A file or folder -> the path, its opened shards, and {"frozen": B, "layers": R, ...}."""
    if path.is_dir() and (path / "rpn.safetensors").is_file():
        path = path / "rpn.safetensors"
    if path.is_dir():  # as released: the authors call B and R twig_K and twig_T
        config = read_json(path / "config.json")
        facts = {"frozen": config.get("twig_K"), "layers": config.get("twig_T")}
        return path, list(open_shards(path).values()), facts
    if not path.is_file():
        raise BadInput(f"{path}: no such RPN; train one with: python train.py")
    shard = open_safetensors(path)
    try:
        facts = dict(json.loads((shard.metadata() or {}).get("sdrpn", "{}")))
    except (ValueError, TypeError, RecursionError):
        facts = {}
    return path, [shard], facts


def check_depth(m, frozen, layers):
    if not (1 <= frozen and 1 <= layers and frozen + layers <= m.depth):
        raise BadInput(f"--frozen-layers {frozen} and --rpn-layers {layers}: both at least 1, "
                       f"together at most the model's {m.depth} layers")


def conversation(m, turns, responses, grid):
    """All turns with the model's own answers, up to the last question -> ids, query tokens' rows.

    n = 2:  <s>SYSTEM USER: <image> question 1 ASSISTANT: answer 1</s>USER: question 2 ASSISTANT:
                                                        ^ row 1                            row 2 ^
    The decoder is causal: row 1 sees nothing of turn 2, so one pass teaches all turns (Eq. 4).
    """
    prompts = [m.prompt_ids(turn, zip(turns[:n], responses)) for n, turn in enumerate(turns)]
    N = grid[0] * grid[1]  # each prompt's last index, moved by the N-1 ids that the image gains
    return prompts[-1], [len(ids) - 1 + N - 1 for ids in prompts]


def roi_loss(logits, labels, count=None):
    """Alg. 1 line 18: BCE over the labelled tokens. logits, labels (..., N) -> scalar with a graph.

    Divided by `count`, by default the number of labelled tokens; without any it is 0. Micro-batches
    of one step pass 1 and are divided later, by the count of the whole step.
    >>> round(roi_loss(torch.tensor([0., 2., 9.]), torch.tensor([1, 0, -1])).item(), 4)
    1.41
    """
    known = (labels >= 0).to(logits.dtype)
    target = labels.clamp(min=0).to(logits.dtype)
    total = F.binary_cross_entropy_with_logits(logits, target, known, reduction="sum")
    return total / (known.sum().clamp(min=1) if count is None else count)


# ------------------------------------------------------------------------ 3. inference: look again

MOST = 225 / 576  # of a grid: beyond it a crop hardly magnifies (the released code's max_area)


@dataclass
class Region:
    box: tuple           # (x0, y0, x1, y1) in grid cells
    cells: torch.Tensor  # (h, w) bool
    weight: float        # summed smoothed probability


@dataclass
class Answer:
    text: str
    boxes: list = field(default_factory=list)  # crops that were read, in source pixels; none: plain
    logits: torch.Tensor = None                # (h, w) float32, CPU; None if the RPN did not run
    regions: list = field(default_factory=list)
    keeps: list = field(default_factory=list)  # per crop, the cells of its own grid that were read
    visual_tokens: int = 0
    ms: dict = field(default_factory=dict)     # wall time of each stage; "rpn": with layers below


@torch.no_grad()
def answer(m, rpn, picture, question, mode="mask", tau=0.15, max_new_tokens=128, history=(),
           max_regions=2, regions=None):
    """Two-stage answer (Sec. 3.4). mode: "mask" (Eq. 8), "box" (Eq. 7), "plain" (generate()).

    history = ((question, answer), ...). The crop belongs to this question only. A list of Region as
    `regions` takes the RPN's place. Stage 2 does not start over: what comes before the crop in a
    causal decoder does not see it, so its keys, values and hidden states after B layers stay.
    """
    if mode == "plain":
        h, w = m.grid_of(picture)
        return Answer(m.generate(picture, question, max_new_tokens, history), visual_tokens=h * w)
    clock, B = Clock(m.device), rpn.frozen if rpn is not None else 0
    pixels, prompts = m.pixels(picture)[None], [m.prompt_ids(question, history)]
    letterbox = Letterbox.of(m, picture)
    embeds, columns, positions = m.prepare(prompts, pixels)  # (1, T, D)
    T, P = embeds.shape[1], columns.stop  # of these, P are [system][image]
    rope = m.rope(positions)
    m.check_length(T + max_new_tokens)
    cache = KVCache(m, 1, T + max_new_tokens)
    clock.lap("encode")

    hidden, logits = m.run(embeds, 0, B, rope, cache), None  # (1, T, D)
    if regions is None:
        logits = rpn.logits(hidden, columns, rope, letterbox.grid)  # (h, w)
        clock.lap("rpn")
        regions = find_regions(logits, tau, letterbox.holds_picture())
    clock.lap("regions")

    crops, boxes = look_again(m, picture, letterbox, regions, mode, max_regions)
    clock.lap("crop")
    if crops:
        new, positions = m.splice(embeds[:, P:], int(positions[..., P].max()), crops)  # (1, t, D)
        new_rope = m.rope(positions)
        T = P + new.shape[1]
        m.check_length(T + max_new_tokens)
        cache.grow(T + max_new_tokens)
        new = m.run(new, 0, B, new_rope, cache, start=P)  # overwrites what stood behind the image
        hidden, rope = torch.cat([hidden[:, :P], new], 1), torch.cat([rope[:, :P], new_rope], 1)
    hidden = m.run(hidden, B, m.depth, rope, cache)  # (1, T, D)
    clock.lap("prefill")
    cache.shift = next_position(positions) - T
    ids = m.decode(hidden[:, -1], cache, T, max_new_tokens)[0]
    clock.lap("decode")
    read = columns.stop - columns.start + sum(len(crop.tokens) for crop in crops)
    keeps = [crop.keep.view(crop.grid).cpu() for crop in crops]
    return Answer(m.detokenize(ids), boxes, logits, regions, keeps, read, clock.ms)


def find_regions(logits, tau=0.15, on=None):
    """Eq. 6, and boxes of Eq. 7: logits (h, w) -> regions whose smoothed probability exceeds tau.

    on: (h, w) bool, the cells that hold picture; padding holds no evidence.
    >>> logits = torch.full((6, 6), -9.)
    >>> logits[1:3, 2:4] = 9.  # smoothed: .53 inside, .20 beside it, .08 at its corners
    >>> [region.box for region in find_regions(logits)]
    [(1, 0, 5, 4)]
    """
    p = logits.float().cpu().sigmoid()
    return regions_above(smooth(p if on is None else p * on), tau)


def smooth(p):
    """G of Eq. 6 on (..., h, w): Gaussian 3x3, sigma 1, reflect padding.

    >>> p = torch.zeros(5, 5)
    >>> p[2, 2] = 1.
    >>> smooth(p)[2]
    tensor([0.0000, 0.1238, 0.2042, 0.1238, 0.0000])
    """
    w = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=p.dtype, device=p.device) / 2)
    w = w / w.sum()
    maps = p.reshape(-1, 1, *p.shape[-2:])  # (maps, 1, h, w)
    edge = "reflect" if min(p.shape[-2:]) > 1 else "replicate"  # a single row has none to reflect
    padded = F.pad(maps, (1, 1, 1, 1), mode=edge)
    return F.conv2d(padded, (w[:, None] * w).view(1, 1, 3, 3)).view(p.shape)


def regions_above(p, threshold):
    """The regions R^i of Eq. 7 on a map (h, w), p > threshold, in raster order of the first cell.

    Specks of one cell are dropped, and so are regions of more than 225 cells in 576, which a crop
    would hardly magnify. The box of a region of 2 or 3 cells is grown to 3 a side, fewer at the
    border; its cells stay.
    >>> p = torch.zeros(6, 6)
    >>> p[0, 5] = .9            # a speck
    >>> p[2, 2] = p[3, 3] = .5  # two cells that touch at a corner
    >>> [(region.box, region.cells.sum().item()) for region in regions_above(p, 0.15)]
    [((1, 1, 4, 4), 2)]
    """
    h, w = p.shape
    found = []
    for component in components(p > threshold):
        if len(component) == 1 or len(component) > MOST * h * w:
            continue
        ys, xs = zip(*component)
        x0, y0, x1, y1 = min(xs), min(ys), max(xs) + 1, max(ys) + 1
        if len(component) < 4:
            (x0, x1), (y0, y1) = grown(x0, x1, w), grown(y0, y1, h)
        cells = torch.zeros(h, w, dtype=torch.bool)
        cells[ys, xs] = True
        found.append(Region((x0, y0, x1, y1), cells, p[cells].sum().item()))
    return found


def components(mask):
    """8-connected components of a (h, w) bool map, in raster order: lists of (y, x)."""
    order = [tuple(cell) for cell in mask.nonzero().tolist()]
    unseen, found = set(order), []
    for cell in order:
        if cell not in unseen:
            continue
        unseen.remove(cell)
        component, edge = [], [cell]
        while edge:
            y, x = edge.pop()
            component.append((y, x))
            around = {(v, u) for v in (y - 1, y, y + 1) for u in (x - 1, x, x + 1)}
            edge += around & unseen
            unseen -= around
        found.append(component)
    return found


def grown(low, high, length):
    """A side [low, high) of fewer than 3 cells -> 3 around its centre, cut at the border.

    >>> grown(4, 6, 9), grown(0, 1, 9), grown(2, 5, 9)
    ((3, 6), (0, 2), (2, 5))
    """
    if high - low >= 3:
        return low, high
    start = (low + high - 3) // 2
    return max(start, 0), min(start + 3, length)


def look_again(m, picture, letterbox, regions, mode, max_regions=2):
    """Eq. 7 (mode "box") or Eq. 8 ("mask"): regions -> crops as image tokens, boxes in pixels.

    Box Upscaling: the heaviest max_regions regions, all cells of each crop. Masked Upscaling: one
    crop around all regions; of its features only those under the mask are projected.
    """
    if mode not in ("mask", "box"):
        raise BadInput(f"mode {mode!r}: must be mask, box or plain")
    if mode == "mask" and regions:
        regions = [union(regions)]
    by_weight = sorted(range(len(regions)), key=lambda i: -regions[i].weight)
    crops, boxes = [], []
    for i in sorted(by_weight[:max_regions]):  # in raster order again
        box = letterbox.to_pixels(regions[i].box)
        pixels = m.pixels(picture, box)[None]
        grid, features = m.token_grid(pixels), m.features(pixels)  # (1, h*w, C)
        keep = torch.ones(grid, dtype=torch.bool)
        if mode == "mask":
            keep = kept_cells(regions[i], grid)
        keep = keep.flatten().to(features.device)
        crops.append(Crop(m.project(features[:, keep])[0], grid, keep))  # (kept, D)
        boxes.append(box)
    return crops, boxes


def union(regions):
    """b_all of Eq. 8: the box around all regions' boxes, and all their cells."""
    x0, y0, x1, y1 = zip(*(region.box for region in regions))
    cells = torch.stack([region.cells for region in regions]).any(0)
    weight = sum(region.weight for region in regions)
    return Region((min(x0), min(y0), max(x1), max(y1)), cells, weight)


def kept_cells(region, grid):
    """The mask of Eq. 8 on a crop of the region's box -> (h, w) bool of the crop's own grid.

    Bilinear, and more than half (the released code's rule); all cells, if that leaves none (ours).
    >>> cells = torch.tensor([[True, False], [True, True]])
    >>> kept_cells(Region((0, 0, 2, 2), cells, 1.0), (4, 4)).int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    x0, y0, x1, y1 = region.box
    mask = region.cells[None, None, y0:y1, x0:x1].float()
    kept = F.interpolate(mask, grid, mode="bilinear")[0, 0] > 0.5
    return kept if kept.any() else torch.ones(grid, dtype=torch.bool)


class Clock:
    """Milliseconds of each stage; on CUDA each lap waits for the device."""

    def __init__(self, device):
        self.device, self.ms = device, {}
        self.last = time.perf_counter()

    def lap(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.ms[name] = round(1000 * (now - self.last), 3)
        self.last = now


# ----------------------------------------------------------------------------- 4. cells and pixels

def as_pair(grid):
    return (grid, grid) if isinstance(grid, int) else tuple(grid)


class Letterbox:
    """How a grid of cells lies over a picture: centred, an odd rest of padding at the far side.

    picture_size, frame: (w, h) in source pixels; the frame is what the grid covers, by default the
    padded square for a square grid, the picture itself for another. Boxes are (x0, y0, x1, y1).
    >>> letterbox = Letterbox((672, 504), 12)  # cells of 56 px; 84 px of padding above and below
    >>> letterbox.to_pixels((0, 3, 2, 6))
    (0, 84, 112, 252)
    >>> letterbox.cells_of([(0, 84, 112, 252)]).nonzero().tolist()
    [[3, 0], [3, 1], [4, 0], [4, 1], [5, 0], [5, 1]]
    """

    def __init__(self, picture_size, grid, frame=None):
        self.picture_size, self.grid = tuple(picture_size), as_pair(grid)
        square = self.grid[0] == self.grid[1]
        self.frame = frame or ((max(picture_size),) * 2 if square else self.picture_size)
        self.offset = [(whole - part) // 2 for whole, part in zip(self.frame, self.picture_size)]
        self.cells = self.grid[::-1]  # cells along x and along y

    @classmethod
    def of(cls, m, picture):
        """A picture under the grid that the model sees it with."""
        return cls(picture.size, m.grid_of(picture), m.frame(picture.size))

    def to_pixels(self, box):
        """A box in cells -> source pixels: floor, ceil, cut at the edge, at least 1 px a side."""
        sides = []
        for axis, length in enumerate(self.picture_size):
            frame, cells, offset = self.frame[axis], self.cells[axis], self.offset[axis]
            low = box[axis] * frame // cells - offset
            high = -(-box[axis + 2] * frame // cells) - offset
            low = min(max(low, 0), length - 1)
            sides.append((low, max(min(high, length), low + 1)))
        (x0, x1), (y0, y1) = sides
        return x0, y0, x1, y1

    def to_grid(self, at, axis):
        """A coordinate in source pixels (axis 0: x, 1: y) -> in cells, a float; arrays too."""
        return (at + self.offset[axis]) * self.cells[axis] / self.frame[axis]

    def cells_of(self, boxes):
        """(h, w) bool: the cells that overlap one of these boxes in source pixels."""
        mask = torch.zeros(self.grid, dtype=torch.bool)
        for x0, y0, x1, y1 in boxes:
            left, right = self.to_grid(x0, 0), self.to_grid(x1, 0)
            top, bottom = self.to_grid(y0, 1), self.to_grid(y1, 1)
            rows = slice(max(math.floor(top), 0), max(math.ceil(bottom), 0))
            mask[rows, max(math.floor(left), 0):max(math.ceil(right), 0)] = True
        return mask

    def holds_picture(self):
        """(h, w) bool: the cells with at least one pixel of the picture; the others are padding."""
        return self.cells_of([(0, 0, *self.picture_size)])


def grid_to_image(box, grid, picture_size):
    """A box in cells -> source pixels (x0, y0, x1, y1), ints."""
    return Letterbox(picture_size, grid).to_pixels(box)


# -------------------------------------------------------------------------------------- 5. recipes

# A recipe says where the teacher looks, where the RPN sits, and how it is trained:
#   attention   {layer: heads}, null = all heads; (layer, head) pairs are one pool
#   softmax     "image" (the paper's) or "sequence" (the model's own, sliced)
#   sink        {"kind": "norm", "c": times the median norm}, null, or
#               {"kind": "attention", "attention": {layer: heads}, "threshold": for 576 tokens}
#   frozen, layers, tau     B, R and the threshold of Eq. 6
#   train       lr, warmup, betas, epochs, batch_size, grad_accum, clip;
#               of the toy also data, samples, held_out
#   kinds?      {kind of question: entries that replace others; not those of the RPN itself}
#   labels?     {"grow", "min_peak", "padding"}: what else assign_labels is told
#   square?     true: training pictures are padded to a square
#   budget?     [min, max] pixels of a picture, in training and, without --budget, in answering
#   request?    ends the question when labels are made, in place of a line "Answer ..."
# The two below are what the authors released, by model_type, layers and hidden width.
RELEASED_TRAINING = dict(
    lr=5e-5, warmup=0.03, betas=[0.9, 0.98], epochs=1, batch_size=8, grad_accum=16, clip=1.0)
RECIPES = {
    ("llava", 32, 4096): dict(
        attention={"14": [13, 24, 26]}, softmax="sequence",
        sink=dict(kind="attention", attention={"2": None}, threshold=1e-3),
        frozen=15, layers=3, tau=0.15, train=RELEASED_TRAINING),
    ("llava", 40, 5120): dict(
        attention={"13": [21, 23, 26], "15": [2], "16": [2, 21, 30]}, softmax="sequence",
        sink=dict(kind="attention", attention={"16": [17, 22]}, threshold=1e-3),
        frozen=15, layers=3, tau=0.15, train=RELEASED_TRAINING),
}


def load_recipe(folder):
    """recipe.json beside a checkpoint, else what was released for its shape. Raises BadInput."""
    family, config = read_family(folder)
    depth, width, path = config["num_hidden_layers"], config["hidden_size"], folder / "recipe.json"
    if path.is_file():
        recipe = read_json(path)
        heads, kinds = config["num_attention_heads"], recipe.get("kinds", {})
        wrong = recipe_faults(recipe, depth, heads)
        if not wrong:
            each = [recipe_faults(recipe_for(recipe, kind), depth, heads) for kind in kinds]
            wrong = [f"{key} of {kind!r}" for kind, faults in zip(kinds, each) for key in faults]
        if wrong:
            raise BadInput(f"{path}: {', '.join(wrong)}: missing, or not of this model; "
                           "`python tests/tables.py heads` prints a recipe")
        return recipe
    released = released_recipe(family, config)
    if "attention" not in released:
        note = released.get("note", f"no released recipe for {depth} layers of {width}")
        raise BadInput(f"{folder}: no recipe.json, and {note}; `python tests/tables.py heads "
                       f"--ckpt {folder}` finds layers and heads and prints one")
    return released


def released_recipe(family, config):
    """What was released for a model of this shape: a recipe, a part of one and a note, or {}."""
    key = config["model_type"], config["num_hidden_layers"], config["hidden_size"]
    return (RECIPES | family.recipes).get(key, {})


def recipe_for(recipe, kind):
    """The recipe for one kind of question; for one that `kinds` does not name, that of the first.

    >>> recipe = {"tau": 0.15, "kinds": {"text": {"tau": 0.1}, "natural": {}}}
    >>> [recipe_for(recipe, kind) for kind in ("text", "natural", "other")]
    [{'tau': 0.1}, {'tau': 0.15}, {'tau': 0.1}]
    """
    kinds = recipe.get("kinds") or {"": {}}
    own = kinds.get(kind, next(iter(kinds.values())))
    return {key: value for key, value in recipe.items() if key != "kinds"} | own


def recipe_faults(recipe, depth, heads):
    """Names of entries that are missing, or that a decoder of these sizes can not follow.

    >>> recipe_faults({"frozen": 7, "tau": 1.5, "softmax": "image"}, 8, 5)
    ['attention', 'sink', 'layers', 'tau', 'train']
    """
    def whole(v, low, high=1 << 30):
        return type(v) is int and low <= v <= high

    def pairs(v):
        lists = [chosen for chosen in v.values() if chosen is not None]
        return (len(v) > 0 and all(int(layer) in range(depth) for layer in v)
                and all(type(chosen) is list and chosen for chosen in lists)
                and all(whole(head, 0, heads - 1) for chosen in lists for head in chosen))

    def sink(v):
        if v is None or v["kind"] == "norm":
            return v is None or 0 < v["c"] < 1e9
        return v["kind"] == "attention" and pairs(v["attention"]) and 0 < v["threshold"] < 1e9

    def train(v):
        scenes = ("samples", "held_out") if v.get("data") == "toy scenes" else ()
        return (all(whole(v[key], 1) for key in ("epochs", "batch_size", "grad_accum", *scenes))
                and 0 < v["lr"] < 10 and 0 <= v["warmup"] < 1 and 0 < v["clip"] < 1e9
                and len(v["betas"]) == 2 and all(0 <= beta < 1 for beta in v["betas"]))

    def labels(v):
        return (whole(v.get("grow", 0), 0) and 0 <= v.get("min_peak", 0) < 1
                and v.get("padding") in (None, "background"))

    rules = {
        "attention": pairs, "softmax": lambda v: v in ("image", "sequence"), "sink": sink,
        "frozen": lambda v: whole(v, 1, depth - 1),
        "layers": lambda v: whole(v, 1, depth - recipe["frozen"]),
        "tau": lambda v: 0 < v < 1, "train": train}
    of_the_rpn = ("frozen", "layers", "train", "budget")  # one RPN serves all kinds
    further = {  # may be left out
        "kinds": lambda v: all(own.keys().isdisjoint(of_the_rpn) for own in v.values()),
        "labels": labels, "square": lambda v: type(v) is bool,
        "budget": lambda v: len(v) == 2 and whole(v[0], 1) and whole(v[1], v[0]),
        "request": lambda v: isinstance(v, str)}
    rules |= {key: rule for key, rule in further.items() if key in recipe}

    def fits(key):
        try:
            return bool(rules[key](recipe[key]))
        except (KeyError, TypeError, ValueError, AttributeError):
            return False
    return [key for key in rules if not fits(key)]

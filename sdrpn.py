"""
SD-RPN, the whole method: a question -> where to look -> look again.

Sec., Eq. and Alg. are those of the paper, arXiv 2509.16944.

    teach()        the frozen model answers; its attention says where it looked   Sec. 3.1-2, Eq. 1
    make_labels()  the map becomes foreground, background and ignored tokens      Sec. 3.2, Eq. 2
    RPN            R blocks on top of the first B frozen layers learn the labels  Sec. 3.3, Eq. 3-5
    answer()       regions of the RPN's map are cropped and read again            Sec. 3.4, Eq. 6-8

    m = load("data/toy/llava-toy")
    rpn = RPN.load("data/toy/llava-toy/rpn.safetensors", m)
    print(answer(m, rpn, picture, "What number is on the star?").text)

Left out: the training loop (train.py); ablations and ViCrop (tests/paper/).
Shapes: b batch, n turns, T tokens, N = h*w image tokens, P tokens of [system][image], D hidden
width, H heads, d head size. Maps are (..., N) row by row, or (h, w); a grid is (h, w), or an int
where it is square. Boxes are half-open (x0, y0, x1, y1), in grid cells or in source pixels.
"""
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from clip import BadInput, pad_to_square, reading
from model import (Attention, Block, Checkpoint, Config, RMSNorm, check_types, expect, read_config,
                   read_json, rotate, wider)


# ---------------------------------------------------------------------------------------- recipes

@dataclass
class Sink:
    """Which image tokens are attention sinks."""
    kind: str                # "norm": Eq. 1; "attention": the released code's rule
    c: float = None          # norm: tau_norm is c times the median norm of the image tokens
    attention: dict = None   # attention: {layer: heads} to average
    threshold: float = None  # attention: a sink receives at least this much, on a grid of 576

    def __post_init__(self):
        check_types(self)
        expect(vars(self), kind=["norm", "attention"])
        if None in ((self.c,) if self.kind == "norm" else (self.attention, self.threshold)):
            raise ValueError("sink: norm needs c; attention needs attention and threshold")
        self.attention = by_layer(self.attention or {})


@dataclass
class LabelRules:
    """Options of assign_labels()."""
    tau_fg: float = 0.2
    tau_bg: float = 0.1
    grow: int = 0         # cells by which the foreground's box grows
    min_peak: float = 0.0  # a sample whose maximum is lower is ignored
    padding: str = None   # "background": cells without picture are background

    def __post_init__(self):
        check_types(self)
        expect(vars(self), padding=["background"])


@dataclass
class Training:
    lr: float
    warmup: float      # share of the steps
    betas: list        # AdamW's
    epochs: int
    batch_size: int
    grad_accum: int    # a step is batch_size x grad_accum samples
    clip: float        # of the gradient's norm
    data: str = None      # "toy scenes": the toy, which draws its own questions
    samples: int = None   # number of questions it draws to train on
    held_out: int = None  # number of questions it draws to compare the methods on

    __post_init__ = check_types


@dataclass
class Recipe:
    """Where the teacher looks, where the RPN sits, and how it is trained: recipe.json's entries."""
    attention: dict      # {layer: heads}, None = all; all (layer, head) pairs count equally
    frozen_layers: int   # B
    rpn_layers: int      # R
    train: Training
    softmax: str = "image"  # over the image alone (the paper), or "sequence": the model's, sliced
    sink: Sink = None    # None: no sink is removed
    tau: float = 0.15    # threshold of Eq. 6
    taus: dict = field(default_factory=dict)   # {benchmark: the tau it was published with}
    kinds: dict = field(default_factory=dict)  # {kind of question: {field: value} that replace}
    labels: LabelRules = field(default_factory=LabelRules)
    square: bool = False  # training pads pictures to a square
    budget: list = None   # (least, most) pixels of a picture that the RPN was trained for
    request: str = None   # ends the teacher's question, in place of a last line "Answer ..."

    def __post_init__(self):
        check_types(self)
        expect(vars(self), softmax=["image", "sequence"])
        self.attention = by_layer(self.attention)
        self.sink = Sink(**self.sink) if isinstance(self.sink, dict) else self.sink
        self.labels = LabelRules(**self.labels) if isinstance(self.labels, dict) else self.labels
        self.train = Training(**self.train) if isinstance(self.train, dict) else self.train
        for kind, fields in self.kinds.items():
            if fields.keys() & {"frozen_layers", "rpn_layers", "train", "budget"}:
                raise ValueError(f"kinds: {kind} has its own {sorted(fields)}; one RPN serves all")
            self.for_kind(kind)

    def for_kind(self, kind):
        """The recipe for one kind of question; an unknown kind counts as the first of `kinds`."""
        own = self.kinds.get(kind, next(iter(self.kinds.values()), {}))
        return replace(self, kinds={}, **own)


def by_layer(attention):
    """JSON's {"14": [13, 24]} -> {14: [13, 24]}"""
    return {int(layer): heads for layer, heads in attention.items()}


# What the authors released for LLaVA, by (model_type, layers, width).
RELEASED = dict(
    softmax="sequence", frozen_layers=15, rpn_layers=3, tau=0.15,
    taus=dict(docvqa=0.1, vstar=0.1, hrbench4k=0.1, hrbench8k=0.1, ocrbench=0.05),
    train=dict(lr=5e-5, warmup=0.03, betas=[0.9, 0.98], epochs=1, batch_size=8, grad_accum=16,
               clip=1.0))
RECIPES = {
    ("llava", 32, 4096): RELEASED | dict(
        attention={14: [13, 24, 26]},
        sink=dict(kind="attention", attention={2: None}, threshold=1e-3)),
    ("llava", 40, 5120): RELEASED | dict(
        attention={13: [21, 23, 26], 15: [2], 16: [2, 21, 30]},
        sink=dict(kind="attention", attention={16: [17, 22]}, threshold=1e-3)),
}


def released_recipe(family, config):
    """The released recipe's fields for a model of this shape; {} if there is none."""
    key = config.model_type, config.num_hidden_layers, config.hidden_size
    return (RECIPES | family.recipes).get(key, {})


def load_recipe(folder):
    """recipe.json beside a checkpoint, else what was released for its shape -> Recipe.

    Raises BadInput if there is neither, or if an entry is unknown or not of this model.
    """
    path = Path(folder) / "recipe.json"
    family, config = read_config(folder)
    find = f"`python tests/paper/tables.py heads --ckpt {folder}` finds layers and heads"
    if not path.is_file():
        released = released_recipe(family, config)
        if "attention" not in released:
            raise BadInput(f"{path}: missing, and {released.get('note', 'none was released')}; "
                           f"{find} and prints one")
        return Recipe(**released)
    with reading(path, find):
        recipe = Recipe(**read_json(path))
        for each in [recipe, *map(recipe.for_kind, recipe.kinds)]:
            pairs = [*each.attention.items(), *(each.sink.attention if each.sink else {}).items()]
            for layer, heads in pairs:
                if not (layer in range(config.num_hidden_layers)
                        and set(heads or []) <= set(range(config.num_attention_heads))):
                    raise ValueError(f"layer {layer}, heads {heads}: this model does not have them")
        return recipe


# ---------------------------------------------------------------------- 1. teacher: pseudo-labels

@dataclass
class Lesson:
    """What the teacher says of b samples, and the states that a student can go on from."""
    responses: list       # b answers as text
    raw: torch.Tensor     # (b, N) response-to-image attention, M_RoI
    clean: torch.Tensor   # (b, N) the same without sinks, M'_RoI
    hidden: torch.Tensor  # (b, T, D) the prompt's hidden states after the frozen layers
    columns: slice        # the image's columns in T; the query token is the last of T
    rope: torch.Tensor    # (2, T, d) rotary table of the prompt


def prefix_layers(recipe):
    """The layers whose hidden states teach() needs of a prefix: B, and l of Eq. 1's H^l."""
    return {recipe.frozen_layers, min(recipe.attention)}


@torch.no_grad()
def teach(m, recipe, pixels, prompts, max_new_tokens=128, prefix=None):
    """Alg. 1 lines 6-11 for b samples: answer, and read off where the answers looked -> Lesson.

    pixels (b, 3, H, W); prompts: b lists of ids of one length, so there is no padding and no mask.
    prefix: m.prefill(pixels, prefix_layers(recipe)), if there is one.
    The rows are the response tokens that were fed back: all but EOS, and without the last if the
    answer was cut. An empty answer has no row: its map is zero, so it gets no label. The only extra
    cost is q @ k at the recipe's layers. A batch is decoded for as long as its longest answer.
    """
    if prefix is None:
        prefix = m.prefill(pixels, prefix_layers(recipe))
    B, sink, cache, columns = recipe.frozen_layers, recipe.sink, prefix.cache, prefix.columns
    tail = torch.cat([m.embed(m.tail(ids)) for ids in prompts])  # (b, t, D)
    P, t = columns.stop, tail.shape[1]
    m.reserve(cache, P + t + max_new_tokens)
    rope = m.text_rope(prefix.position, t)
    tail = m.run(tail, 0, B, rope, cache, P)
    last = m.run(tail, B, m.depth, rope, cache, P)[:, -1]  # (b, D)

    sink_heads = sink.attention if sink else {}
    cache.queries = {layer: [] for layer in {*recipe.attention, *sink_heads}}
    # Line 6, and with it 7-8, the pass over the answer: decoding feeds it back, keeping q and k.
    answers = m.decode(last, cache, P + t, prefix.position + t, max_new_tokens)
    rows = [min(len(ids), max_new_tokens - 1) for ids in answers]  # of each sample
    # Lines 9-10 where the recipe says "image"; the released LLaVA recipes say "sequence".
    raw = roi_maps(cache, recipe.attention, columns, P + t, rows, recipe.softmax)  # (b, N)
    clean = raw
    if sink and sink.kind == "attention":  # the released code's rule; its threshold is for 576
        seen = roi_maps(cache, sink_heads, columns, P + t, rows, "sequence")
        clean = raw.masked_fill(seen >= sink.threshold * 576 / raw.shape[1], 0.0)
    elif sink:  # line 11
        entering = prefix.hidden[min(recipe.attention)][:, columns]  # (b, N, D)
        median = entering.float().norm(dim=-1).median(-1, keepdim=True).values
        clean = remove_sink_tokens(raw, entering, sink.c * median)
    cache.queries = {}
    hidden = torch.cat([prefix.hidden[B], tail], 1)  # (b, T, D)
    responses = [m.detokenize(ids) for ids in answers]
    return Lesson(responses, raw, clean, hidden, columns, torch.cat([prefix.rope, rope], 1))


def training_view(m, recipe, picture):
    """The picture as training shows it, to teacher and student -> pixels (3, H, W), a Letterbox."""
    padded, frame = picture, m.frame(picture.size)
    if recipe.square:
        padded = pad_to_square(picture, (127, 127, 127))  # the released recipe's grey
        frame = padded.size
    pixels = m.pixels(padded)
    return pixels, Letterbox(picture.size, m.token_grid(pixels), frame)


def teacher_question(recipe, question):
    r"""The question as the teacher is asked it: a recipe may request a box instead of an answer.

    >>> recipe = Recipe({0: None}, 1, 1, None, request="Give the box.")
    >>> teacher_question(recipe, "Who?\nAnswer briefly.")
    'Who?\nGive the box.'
    >>> teacher_question(recipe, "Who?")
    'Who?\nGive the box.'
    """
    if recipe.request is None:
        return question
    asked, _, last = question.rpartition("\n")
    if not asked or not last.startswith("Answer"):
        asked = question
    return asked + "\n" + recipe.request


def make_labels(clean, recipe, has_picture):
    """Line 12 by a recipe's rules: denoised maps (..., N) -> labels (..., N) int64.

    has_picture (h, w) bool: the cells that are not padding.
    """
    rules = asdict(recipe.labels)
    padding = rules.pop("padding")
    if padding == "background":
        rules["has_picture"] = has_picture
    return assign_labels(clean, tuple(has_picture.shape), **rules)


def explain_teacher(m, recipe, picture, question, max_new_tokens=128, history=(), prefix=None):
    """What the teacher says of one question, for figures -> dict.

    raw, clean, labels, sinks: arrays (h, w); letterbox: their grid; response: the answer's text.
    """
    pixels, letterbox = training_view(m, recipe, picture)
    prompts = [m.prompt_ids(teacher_question(recipe, question), history)]
    lesson = teach(m, recipe, pixels[None], prompts, max_new_tokens, prefix)
    raw, clean = lesson.raw[0].cpu(), lesson.clean[0].cpu()
    labels = make_labels(clean, recipe, letterbox.holds_picture())
    maps = {"raw": raw, "clean": clean, "labels": labels, "sinks": (raw > 0) & (clean == 0)}
    maps = {name: value.view(letterbox.grid).numpy() for name, value in maps.items()}
    return maps | {"letterbox": letterbox, "response": lesson.responses[0]}


def roi_maps(cache, attention, columns, prompt, rows, softmax):
    """M_RoI of b samples: the mean over a sample's rows and over the (layer, head) pairs.

    cache: all keys, and the rows' queries; attention: {layer: heads}; prompt: its number of tokens;
    rows: how many each sample has. -> (b, N) float32
    """
    raw = torch.zeros(len(rows), columns.stop - columns.start, device=cache.k[0].device)
    for i, count in enumerate(rows):
        maps = []  # (heads, N) of each layer
        for layer, heads in attention.items() if count else ():
            q = torch.cat([step[i] for step in cache.queries[layer][:count]], 1)  # (H, count, d)
            k = cache.k[layer][i, :, :prompt + count]  # (Hkv, prompt + count, d)
            of_heads = response_attention(q, k, columns, prompt, softmax)
            maps.append(of_heads if heads is None else of_heads[heads])
        if maps:
            raw[i] = torch.cat(maps).mean(0)
    return raw


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
    recipe layer, and c times their median norm.
    >>> hidden = torch.tensor([[3., 4.], [30., 40.], [0., 5.]])
    >>> remove_sink_tokens(torch.tensor([.25, .5, .25]), hidden, 5.).tolist()
    [0.25, 0.0, 0.25]
    """
    return roi_map.masked_fill(hidden.float().norm(dim=-1) > tau_norm, 0.0)


def assign_labels(roi_map, grid, tau_fg=0.2, tau_bg=0.1, max_box_fraction=0.5, grow=0, min_peak=0.0,
                  has_picture=None):
    """Eq. 2: denoised maps -> labels, (..., N) int64: 1 foreground, 0 background, -1 ignored.

    Foreground: at least tau_fg of the maximum. Background: outside the foreground's bounding box
    and at most tau_bg of the maximum. Tokens between the two thresholds are ambiguous, and other
    tokens inside the box may be unattended parts of the object: both are ignored. A sample is
    ignored whole if its map is zero, or if the box covers max_box_fraction of the grid or more
    (the released code's rule). Some released recipes also grow the box by `grow` cells, ask for a
    maximum of at least min_peak, and make all padding background: has_picture (h, w) bool.
    >>> roi_map = torch.tensor([.9, .05, .3, .15, .0, .0, .0, .0, .0])  # foreground from .18 on
    >>> assign_labels(roi_map, grid=3).view(3, 3).tolist()              # background up to .09
    [[1, -1, 1], [-1, 0, 0], [0, 0, 0]]
    """
    h, w = as_pair(grid)
    if has_picture is None:
        has_picture = torch.ones(h, w, dtype=torch.bool)
    has_picture = has_picture.to(roi_map.device)
    a = roi_map.unflatten(-1, (h, w)) * has_picture  # (..., h, w)
    peak = a.amax((-2, -1), keepdim=True)
    fg = (a >= tau_fg * peak) & (peak > 0)
    inside = bounding_cells(fg)
    if grow:
        wide = F.max_pool2d(inside.reshape(-1, 1, h, w).float(), 2 * grow + 1, 1, grow)
        inside = wide.view(inside.shape) > 0
    labels = torch.full(a.shape, -1, dtype=torch.int64, device=a.device)
    labels[~has_picture | ~inside & (a <= tau_bg * peak)] = 0
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

    A score needs only q and k; v, o and the MLP would never be used.
    """

    def __init__(self, config):
        super().__init__()
        D, self.d, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.rotated = config.score_rope
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.self_attn = nn.Module()  # only for the names of the keys
        self.self_attn.q_proj = nn.Linear(D, config.num_attention_heads * self.d, bias=bias)
        self.self_attn.k_proj = nn.Linear(D, config.num_key_value_heads * self.d, bias=bias)

    split = Attention.split  # (b, t, heads * d) -> (b, heads, t, d)

    def forward(self, queries, image, query_rope, image_rope):
        """Eq. 5, per head: (b, n, D) and (b, N, D), after twig_norm -> scores (b, H, n, N).

        LLaVA's score is not rotated: it depends on what a patch holds, not on how far from the
        question it stands.
        >>> config = Config(hidden_size=2, num_attention_heads=1, rms_norm_eps=0.0)
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
    Attributes: frozen, tau (the threshold of Eq. 6 that belongs to it), path (None: not from disk).
    """

    def __init__(self, config, frozen, layers, tau=0.15):
        super().__init__()
        self.frozen, self.tau, self.path = frozen, tau, None
        blocks = [Block(config) for _ in range(layers - 1)]
        self.twig_layers = nn.ModuleList([*blocks, ScoreLayer(config)])
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.twig_norm = norm if config.final_norm else nn.Identity()

    def score(self, hidden, columns, rows, rope):
        """Eq. 3-5: hidden states after the frozen layers (b, T, D) -> scores (b, H, n, N).

        columns: the image's. rows: where the n query tokens stand, the last prompt token before
        each response; one pass serves all turns. rope (2, T, d). The map of a turn is the mean over
        heads, which logits() and the training loss take.
        """
        for block in self.twig_layers[:-1]:
            hidden = block(hidden, rope)  # (b, T, D), Eq. 3
        queries = self.twig_norm(hidden[:, rows])  # (b, n, D): the rows are Eq. 4, norms Eq. 5
        image = self.twig_norm(hidden[:, columns])  # (b, N, D)
        return self.twig_layers[-1](queries, image, rope[:, rows], rope[:, columns])

    def logits(self, prefix, tail, tail_rope):
        """Where to look: states after B layers, of a prefix and of a question (1, t, D) behind it.

        -> (h, w) float32 on the CPU. Raises FloatingPointError if a logit is not finite.
        """
        hidden = torch.cat([prefix.hidden[self.frozen], tail], 1)  # (1, T, D)
        rope = torch.cat([prefix.rope, tail_rope], 1)
        scores = self.score(hidden, prefix.columns, [-1], rope)  # (1, H, 1, N)
        logits = scores[0].mean(0).float().view(prefix.grid).cpu()
        if not logits.isfinite().all():
            raise FloatingPointError(f"{self.path or 'the RPN'}: its map is not finite in "
                                     f"{str(hidden.dtype)[6:]}; try --dtype bfloat16 or float32")
        return logits

    @torch.no_grad()
    def forward(self, m, picture, question, history=()):
        """Where to look for this question: logits (h, w), from one pass through B + R layers."""
        prefix = m.prefill(m.pixels(picture)[None], keep=[self.frozen], depth=self.frozen)
        tail = m.embed(m.tail(m.prompt_ids(question, history)))  # (1, t, D)
        rope = m.text_rope(prefix.position, tail.shape[1])
        tail = m.run(tail, 0, self.frozen, rope, prefix.cache, prefix.columns.stop)
        return self.logits(prefix, tail, rope)

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
        """Our rpn.safetensors, or a folder as the authors released it. Raises BadInput.

        m.budget becomes the one that the RPN was trained with.
        """
        path = Path(path)
        if (path / "rpn.safetensors").is_file():
            path = path / "rpn.safetensors"
        with reading(path, "name an RPN of this checkpoint, or train one with train.py"):
            checkpoint = Checkpoint(path, [("model.", "")])
            if path.is_dir():  # as released: the authors call B and R twig_K and twig_T
                given, family = read_json(path / "config.json"), m.config.model_type
                expect(given, model_type=[family, f"{family}_llama"])
                facts = {"frozen": given["twig_K"], "layers": given["twig_T"]}
            else:
                facts = json.loads(checkpoint.metadata["sdrpn"])
            if facts.get("fingerprint", m.fingerprint) != m.fingerprint:
                raise ValueError(f"trained for another checkpoint, {facts.get('ckpt')} with "
                                 f"fingerprint {facts['fingerprint']}; this is {m.fingerprint}")
            facts = released_recipe(type(m), m.config) | facts  # for the tau and budget it lacks
            with torch.device("meta"):
                rpn = cls(m.config, facts["frozen"], facts["layers"], facts.get("tau", 0.15))
        used = rpn.state_dict().keys() & checkpoint.tensors.keys()  # a whole model may lie there
        checkpoint.tensors = {key: checkpoint.tensors[key] for key in used}
        checkpoint.fill(rpn, m.device, m.dtype)
        rpn.path, m.budget = path, facts.get("budget") or m.budget
        return rpn

    def save(self, path, facts):
        """Write model.twig_*, with `facts` (frozen, layers, fingerprint, tau, ...) as metadata."""
        tensors = {f"model.{key}": tensor.detach().cpu().contiguous()
                   for key, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={"sdrpn": json.dumps(facts)})


def check_depth(m, frozen, layers):
    if not (frozen >= 1 and layers >= 1 and frozen + layers <= m.depth):
        raise BadInput(f"--frozen-layers {frozen} and --rpn-layers {layers}: both at least 1, "
                       f"together at most the model's {m.depth} layers")


def conversation(m, turns, responses, grid):
    """All turns with the model's own answers, up to the last question -> ids, query tokens' rows.

    n = 2:  <s>SYSTEM USER: <image> question 1 ASSISTANT: answer 1</s>USER: question 2 ASSISTANT:
                                                        ^ row 1                            row 2 ^
    The decoder is causal: row 1 sees nothing of turn 2, so one pass teaches all turns (Eq. 4).
    """
    prompts = [m.prompt_ids(turn, zip(turns[:n], responses)) for n, turn in enumerate(turns)]
    N = grid[0] * grid[1]  # each prompt's last index, moved by the N-1 tokens that the image adds
    return prompts[-1], [len(ids) - 1 + N - 1 for ids in prompts]


def roi_loss(logits, labels, count=None):
    """Alg. 1 line 18: BCE over the labelled tokens. logits, labels (..., N) -> scalar with a graph.

    It is divided by `count`, by default the number of labelled tokens; without any it is 0. The
    micro-batches of a step pass 1, and their gradients are divided once by the whole step's count.
    >>> round(roi_loss(torch.tensor([0., 2., 9.]), torch.tensor([1, 0, -1])).item(), 4)
    1.41
    """
    known = (labels >= 0).to(logits.dtype)
    target = labels.clamp(min=0).to(logits.dtype)
    total = F.binary_cross_entropy_with_logits(logits, target, known, reduction="sum")
    return total / (known.sum().clamp(min=1) if count is None else count)


# ------------------------------------------------------------------------ 3. inference: look again

MAX_AREA = 225 / 576  # of a grid: a larger region hardly gains from a crop (the released max_area)


@dataclass
class Region:
    box: tuple           # (x0, y0, x1, y1) in grid cells
    cells: torch.Tensor  # (h, w) bool
    weight: float        # summed smoothed probability


@dataclass
class Crop:
    """A region, read again at full resolution."""
    box: tuple            # in source pixels
    tokens: torch.Tensor  # (n, D)
    keep: torch.Tensor    # (h, w) bool: the n cells of its own grid that became tokens


@dataclass
class Answer:
    text: str
    crops: list = field(default_factory=list)  # empty: answered from the plain picture
    logits: torch.Tensor = None                # (h, w) float32, CPU; None if the RPN did not run
    regions: list = field(default_factory=list)
    prefix: object = None  # to be passed on to the next question about this picture

    @property
    def boxes(self):
        """The crops' boxes in source pixels."""
        return [crop.box for crop in self.crops]


@torch.no_grad()
def answer(m, rpn, picture, question, mode="mask", tau=None, max_new_tokens=128, history=(),
           max_regions=2, regions=None, prefix=None):
    """Two-stage answer (Sec. 3.4). mode: "mask" (Eq. 8), "box" (Eq. 7), "plain" (generate()).

    tau: by default the RPN's own. history = ((question, answer), ...); the crop belongs to this
    question only. A list of Region as `regions` takes the RPN's place. prefix: that of an earlier
    answer about this picture. Nothing starts over: the prefix precedes the crop and the question in
    a causal decoder, so its keys, values and hidden states stay.
    """
    expect({"mode": mode}, mode=["mask", "box", "plain"])
    B = rpn.frozen if rpn else 0
    if prefix is None or regions is None and mode != "plain" and B not in prefix.hidden:
        prefix = m.prefill(m.pixels(picture)[None], keep=[B])
        prefix.picture = picture
    if prefix.picture not in (None, picture):
        raise ValueError("prefix: belongs to another picture")
    if mode == "plain":
        return Answer(m.generate(picture, question, max_new_tokens, history, prefix), prefix=prefix)
    letterbox, cache, P, logits = Letterbox.of(m, picture), prefix.cache, prefix.columns.stop, None
    text = m.embed(m.tail(m.prompt_ids(question, history)))  # (1, t, D)
    m.reserve(cache, P + text.shape[1] + max_new_tokens)

    position = prefix.position + text.shape[1]
    rope = m.text_rope(prefix.position, text.shape[1])
    hidden = m.run(text, 0, B, rope, cache, P)  # stage 1: the question through B layers
    if regions is None:
        logits = rpn.logits(prefix, hidden, rope)  # (h, w)
        tau = rpn.tau if tau is None else tau
        regions = find_regions(logits, tau, letterbox.holds_picture())
    crops = upscale(m, picture, letterbox, regions, mode, max_regions)
    if crops:  # stage 2: crops and question, over what stood behind the image
        text, rope, position = m.splice(text, prefix.position, crops)  # (1, t, D)
        m.reserve(cache, P + text.shape[1] + max_new_tokens)
        hidden = m.run(text, 0, B, rope, cache, P)
    last = m.run(hidden, B, m.depth, rope, cache, P)[:, -1]
    ids = m.decode(last, cache, P + text.shape[1], position, max_new_tokens)[0]
    return Answer(m.detokenize(ids), crops, logits, regions, prefix)


def find_regions(logits, tau=0.15, has_picture=None):
    """Eq. 6, and boxes of Eq. 7: logits (h, w) -> regions whose smoothed probability exceeds tau.

    has_picture: (h, w) bool; the other cells are padding and hold no evidence.
    >>> logits = torch.full((6, 6), -9.)
    >>> logits[1:3, 2:4] = 9.  # smoothed: .53 inside, .20 beside it, .08 at its corners
    >>> [region.box for region in find_regions(logits)]
    [(1, 0, 5, 4)]
    """
    p = logits.float().cpu().sigmoid()
    return regions_above(smooth(p if has_picture is None else p * has_picture), tau)


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

    Specks of one cell are dropped, and so are regions above MAX_AREA. The box of a region of 2 or 3
    cells grows to 3 a side, cut at the border; its cells stay.
    >>> p = torch.zeros(6, 6)
    >>> p[0, 5] = .9            # a speck
    >>> p[2, 2] = p[3, 3] = .5  # two cells that touch at a corner
    >>> [(region.box, region.cells.sum().item()) for region in regions_above(p, 0.15)]
    [((1, 1, 4, 4), 2)]
    """
    h, w = p.shape
    found = []
    for component in components(p > threshold):
        if len(component) == 1 or len(component) > MAX_AREA * h * w:
            continue
        ys, xs = zip(*component)
        x0, y0, x1, y1 = min(xs), min(ys), max(xs) + 1, max(ys) + 1
        if len(component) < 4:
            (x0, x1), (y0, y1) = grow_side(x0, x1, w), grow_side(y0, y1, h)
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


def grow_side(low, high, length):
    """A side [low, high) of fewer than 3 cells -> 3 around its centre, cut at the border.

    >>> grow_side(4, 6, 9), grow_side(0, 1, 9), grow_side(2, 5, 9)
    ((3, 6), (0, 2), (2, 5))
    """
    if high - low >= 3:
        return low, high
    start = (low + high - 3) // 2
    return max(start, 0), min(start + 3, length)


def upscale(m, picture, letterbox, regions, mode, max_regions=2):
    """Box Upscaling (Eq. 7, mode "box") or Masked Upscaling (Eq. 8, "mask"): regions -> [Crop].

    Box: the max_regions regions of most weight, all cells of each crop. Mask: one crop around all
    regions, of whose features only those under the mask are projected.
    """
    if mode == "mask" and regions:
        regions = [union(regions)]
    by_weight = sorted(range(len(regions)), key=lambda i: -regions[i].weight)
    crops = []
    for i in sorted(by_weight[:max_regions]):  # in raster order again
        box = letterbox.to_pixels(regions[i].box)
        pixels = m.pixels(picture, box)[None]
        grid, features = m.token_grid(pixels), m.features(pixels)  # (1, h*w, C)
        keep = torch.ones(grid, dtype=torch.bool)
        if mode == "mask":
            keep = kept_cells(regions[i], grid, letterbox)
        tokens = m.project(features[:, keep.flatten().to(features.device)])[0]  # (n, D)
        crops.append(Crop(box, tokens, keep))
    return crops


def union(regions):
    """b_all of Eq. 8: the box around all regions' boxes, and all their cells."""
    x0, y0, x1, y1 = zip(*(region.box for region in regions))
    cells = torch.stack([region.cells for region in regions]).any(0)
    weight = sum(region.weight for region in regions)
    return Region((min(x0), min(y0), max(x1), max(y1)), cells, weight)


def kept_cells(region, grid, letterbox):
    """The mask of Eq. 8 on a crop of the region's box -> (h, w) bool of the crop's own grid.

    The region's cells are sampled bilinearly where the crop lies, and more than half counts (the
    released rule). If that leaves none, all cells are kept (ours). Where the box reaches into the
    padding, the crop ends at the picture's edge, and so does the mask.
    >>> cells = torch.tensor([[True, False], [True, True]])
    >>> region, letterbox = Region((0, 0, 2, 2), cells, 1.0), Letterbox((28, 28), 2)
    >>> kept_cells(region, (4, 4), letterbox).int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    x0, y0, x1, y1 = region.box
    mask = region.cells[None, None, y0:y1, x0:x1].float()
    scales, shifts = [], []  # of the crop against the box; 1 and 0 where nothing is cut off
    for axis, low, high in (0, x0, x1), (1, y0, y1):
        start = max(low, letterbox.to_grid(0, axis))
        end = min(high, letterbox.to_grid(letterbox.picture_size[axis], axis))
        scales.append((end - start) / (high - low))
        shifts.append((start + end - low - high) / (high - low))
    if scales == [1, 1]:  # exact ties at 0.5 then fall as in the released code
        kept = F.interpolate(mask, grid, mode="bilinear")[0, 0] > 0.5
    else:
        affine = torch.tensor([[[scales[0], 0, shifts[0]], [0, scales[1], shifts[1]]]])
        points = F.affine_grid(affine, (1, 1, *grid), align_corners=False)
        sampled = F.grid_sample(mask, points, padding_mode="border", align_corners=False)
        kept = sampled[0, 0] > 0.5
    return kept if kept.any() else torch.ones(grid, dtype=torch.bool)


# ----------------------------------------------------------------------------- 4. cells and pixels

def as_pair(grid):
    return (grid, grid) if isinstance(grid, int) else tuple(grid)


class Letterbox:
    """How a grid of cells lies over a picture: centred, an odd pixel of padding at the far side.

    picture_size, frame: (w, h) in source pixels. The frame is what the grid covers: by default the
    padded square for a square grid, else the picture itself.
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

    def upsample(self, values):
        """A map (h, w) -> array (height, width) in source pixels, bilinear: an overlay.

        >>> Letterbox((4, 2), 2).upsample(torch.tensor([[0., 4.], [0., 4.]])).tolist()
        [[0.0, 1.0, 3.0, 4.0], [0.0, 1.0, 3.0, 4.0]]
        """
        (w, h), (x, y) = self.picture_size, self.offset
        frame = F.interpolate(values[None, None], self.frame[::-1], mode="bilinear")[0, 0]
        return frame[y:y + h, x:x + w].numpy()

    def holds_picture(self):
        """(h, w) bool: the cells with at least one pixel of the picture; the others are padding."""
        return self.cells_of([(0, 0, *self.picture_size)])

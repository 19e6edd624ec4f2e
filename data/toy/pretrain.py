"""
The program that trained data/toy/llava-toy, a LLaVA-1.5 of 3.6 million parameters, in an hour and
a half on 2 cores. The sizes are those in data/toy/llava-toy/config.json.

    python data/toy/pretrain.py    # stop it at any time; the same command resumes

It replaces CLIP's training, the projector's and the instruction tuning. It may use everything that
the scenes know:
  1. tokeniser: sentencepiece BPE on the questions, with byte fallback, as LLaMA's.
  2. tower: every patch must name the thing it lies on (shape, colour, dot, text), in whole
     pictures and in crops. Pages full of plates come first: beside the easier lessons, the tower
     never learns to read. No language yet.
  3. decoder: projector and decoder learn, the tower is frozen. A sequence holds one picture, alone
     or with crops behind it as in SD-RPN's second stage, and several questions. At first two heads
     in each of two middle layers are also pushed to look at the thing that is asked about, and the
     residual stream to name it. Real pre-training finds this by itself, but a model of this size
     would take hours. Each push fades and is gone for the last fifth of its phase.
  4. pairs: more of the same, without the naming.
  5. registers: large towers keep what they know of the whole picture in the features of empty
     patches, which are far longer than the others (Darcet 2023). This phase teaches the tower to
     do so, with two registers in each view.
  6. park: attention that has nothing to look at goes to such tokens in large decoders (Kang 2025).
     Three heads in each of two layers are pushed to do that. One more head looks at random, so
     that attention is as noisy as a large model's. Only the upper half of the decoder learns: if
     all of it does, the lower half makes every token as long as the registers.
The RPN's training sees none of this: it has neither boxes nor answers.
Left out: data parallelism, and any tuning beyond what made it work.
Shapes: b batch, g = 12 patches a side, N = 144, S image side, C tower width, D decoder width,
t tokens of text behind the image, T all tokens, R answer rows, n image tokens (crops included).
"""
import argparse
import copy
import io
import math
import os
import random
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data.files import load_state, save_state  # noqa: E402 (the project is on the path only now)
from data.toy import lessons, scenes  # noqa: E402
from data.toy.lessons import (CLASSES, CROPS, GRID, VIEWS, Pool, covered_cells,  # noqa: E402
                              padded_square, take, to_pixels)
from model import SYSTEM, LLaVA, read_config, rotate  # noqa: E402
from sdrpn import Letterbox, find_regions, kept_cells, union  # noqa: E402

N = GRID * GRID
READ_FIRST = 0.3  # share of the tower's steps that show pages alone
MIDDLE = (4, 5)  # layers whose heads are pushed; the last phase freezes all below the first
LOOK, PARK, NOISE = [0], [1, 2, 3], 4  # what their heads do in the last phase
SINKS = 2  # registers of a view
PARKED = 0.8  # share of heads PARK's attention that should go to them
APART = 3, 5  # least and most cells between the two registers of a view
SPREAD = 0.3  # how far heads LOOK spread over the thing they look at
NOISE_STD = 2.2  # of random queries and keys


@dataclass
class Phase:
    steps: int
    batch: int
    lr: float
    warmup: int  # steps


PHASES = {"tower": Phase(9000, 32, 2e-3, 200), "decoder": Phase(1500, 16, 1.6e-3, 200),
          "pairs": Phase(520, 12, 8e-4, 50), "registers": Phase(900, 32, 1.2e-3, 50),
          "park": Phase(260, 12, 6e-4, 50)}


class Heads(nn.Module):
    """Linear read-outs that only exist in training."""

    def __init__(self, config):
        super().__init__()
        C, shapes = config.vision["hidden_size"], len(scenes.SHAPES)
        self.patches = nn.Linear(C, sum(CLASSES))  # what a patch lies on
        self.names = nn.Linear(config.hidden_size, shapes)  # the shapes that a question names
        self.registers = nn.Linear(C, shapes)  # the shapes in a view


# --------------------------------------------------------------------------------------- tokeniser

def train_tokenizer(path):
    """BPE on questions, answers and the system prompt; bytes 3..258, digits apart, as LLaMA's."""
    lines = [SYSTEM + " USER:"] * 50
    for i in range(300):
        rng, kind = random.Random(f"tokeniser/{i}"), scenes.KINDS[i % len(scenes.KINDS)]
        for q in scenes.all_questions(scenes.make_scene(rng, kind=kind), random.Random(0)):
            lines.append(f"USER: {q['question'][0]} ASSISTANT: {q['answers'][0]}")
    names = (*scenes.WORDS, *scenes.SHAPES, *scenes.COLOURS)
    lines += [f"{word} {word.capitalize()}" for word in names] * 20
    letters = "abcdefghijklmnopqrstuvwxyz"
    lines.append(" ".join(letters + letters.upper() + ",.?!'-:;()\"/"))
    lines += [" ".join("0123456789")] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=590,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    path.write_bytes(model.getvalue())


# -------------------------------------------------------------------- crops as the method cuts them

def pick_things(scene, rng):
    """What a crop is about: one thing, two near each other, or any two."""
    pairs = scenes.near_pairs(scene.things)
    chance = rng.random()
    if chance < 0.45 or (chance < 0.8 and not pairs):
        return [rng.choice(scene.things)]
    return rng.choice(pairs) if chance < 0.8 else rng.sample(scene.things, 2)


def loose_crop(scene, rng, things):
    """A box around these things with some margin; any rectangle if there are none."""
    w, h = scene.picture.size
    if things:
        x0, y0, x1, y1 = scenes.box_around(things)
        left, top, right, bottom = [rng.uniform(-8, 60) for _ in range(4)]
        x0, y0, x1, y1 = x0 - left, y0 - top, x1 + right, y1 + bottom
    else:
        width, height = rng.uniform(100, w), rng.uniform(100, h)
        x0, y0 = rng.uniform(0, w - width), rng.uniform(0, h - height)
        x1, y1 = x0 + width, y0 + height
    return [max(0, int(x0)), max(0, int(y0)), min(w, math.ceil(x1)), min(h, math.ceil(y1))]


def propose_regions(scene, rng, things):
    """Regions as an RPN might find them: ragged blobs on these things, and 0 to 2 other spots."""
    p, size = torch.zeros(GRID, GRID), scene.picture.size
    for thing in things:
        cells = covered_cells(padded_square(size), thing.box, rng.choice([0.0, 0.2, 0.5]))
        strength, ragged = rng.uniform(0.3, 1), rng.choice([0.0, 0.2, 0.4])
        for cell in cells.nonzero()[0]:
            p.view(-1)[cell] = strength if rng.random() >= ragged else 0.0
    for _ in range(rng.choices([0, 1, 2], [0.5, 0.3, 0.2])[0]):
        y, x = rng.randrange(GRID), rng.randrange(GRID)
        p[y:y + rng.randint(1, 2), x:x + rng.randint(1, 2)] = rng.uniform(0.3, 1)
    return find_regions(p.logit(1e-6), 0.15, Letterbox(size, GRID).holds_picture())


def box_views(scene, rng, things):
    """Two crops as Box Upscaling cuts them: the heaviest regions, or random boxes where missing."""
    letterbox = Letterbox(scene.picture.size, GRID)
    regions = sorted(propose_regions(scene, rng, things), key=lambda r: -r.weight)[:2]
    views = [letterbox.to_pixels(region.box) for region in regions]
    return views + [loose_crop(scene, rng, []) for _ in range(2 - len(views))]


def masked_view(scene, rng, things):
    """One crop as Masked Upscaling cuts it -> view, which of its patches the mask keeps (N,)."""
    regions = propose_regions(scene, rng, things)
    if not regions:
        return loose_crop(scene, rng, things), torch.ones(N, dtype=torch.bool)
    region, letterbox = union(regions), Letterbox(scene.picture.size, GRID)
    keep = kept_cells(region, (GRID, GRID), letterbox)
    return letterbox.to_pixels(region.box), keep.flatten()


def cut_crops(scene, rng):
    """-> views: two crops for a lesson, a third with a mask; patches that the mask keeps (N,)."""
    if rng.random() < 0.3:
        crops = [loose_crop(scene, rng, [thing]) for thing in rng.sample(scene.things, 2)]
    else:
        crops = box_views(scene, rng, pick_things(scene, rng))
    masked, keep = masked_view(scene, rng, pick_things(scene, rng))
    return [*crops, masked], keep


# ------------------------------------------------------------------------------------------- tower

def tower_loss(llava, heads, batch, views):
    """What each patch of one view of each scene lies on -> loss, right and wanted (b, N, 4)."""
    wanted = take(batch, views, "classes").long()
    features = llava.vision_tower(to_pixels(take(batch, views, "pixels")))
    logits = heads.patches(features).float().split(CLASSES, -1)
    loss, right = 0.0, []
    for k, part in enumerate(logits):
        right.append(part.argmax(-1) == wanted[..., k])
        if not (wanted[..., k] >= 0).any():  # pages teach texts alone
            continue
        weight = torch.ones(CLASSES[k])
        if k == 0:
            weight[-1] = 0.1  # most patches lie on nothing
        loss = loss + F.cross_entropy(part.flatten(0, 1), wanted[..., k].flatten(), weight)
    return loss, torch.stack(right, -1), wanted


def tower_report(llava, heads, pool):
    """Share of validation patches named right, in whole pictures and in crops."""
    words = []
    for name, view in (("whole", 0), ("crop", 1)):
        _, right, wanted = tower_loss(llava, heads, pool.validation(128), [view] * 128)
        asked = wanted >= 0
        asked[..., 0] &= wanted[..., 0] < len(scenes.SHAPES)
        shares = (right & asked).sum((0, 1)) / asked.sum((0, 1))
        words.append("{} shape {:.3f} colour {:.3f} dot {:.3f} text {:.3f}".format(name, *shares))
    return " | ".join(words)


# --------------------------------------------------------------------------------------- registers

def pick_longest(norms, among, count=SINKS):
    """The `count` largest norms (b, N) of the patches `among` (b, N) -> bool (b, N)."""
    top = norms.masked_fill(~among, -1.0).topk(count, -1).indices
    return torch.zeros_like(among).scatter(1, top, True) & among


def pick_registers(norms, empty):
    """The longest empty patch of each view and the longest APART from it -> bool (b, N)."""
    first = pick_longest(norms, empty, 1)
    at, cell = first.int().argmax(-1)[:, None], torch.arange(N)  # (b, 1), (N,)
    down, across = (cell // GRID - at // GRID).abs(), (cell % GRID - at % GRID).abs()
    distance = torch.maximum(down, across)  # (b, N)
    apart = (distance >= APART[0]) & (distance <= APART[1])
    return first | pick_longest(norms, empty & apart, SINKS - 1)


def find_registers(features):
    """The longest of features (b, N, C), if far longer than the others -> bool (b, N)."""
    norms = features.float().norm(dim=-1)
    return pick_longest(norms, norms > 2.5 * norms.median(-1, keepdim=True).values)


def flat_patches(views):
    """Which patches of views, uint8 (b, S, S, 3), show hardly anything -> bool (b, N)."""
    patches = views.float().unflatten(2, (GRID, -1)).unflatten(1, (GRID, -1))
    patches = patches.permute(0, 1, 3, 2, 4, 5).flatten(3, 4)  # (b, g, g, 14*14, 3)
    return patches.std(3).amax(-1).flatten(1) < 12


def register_loss(llava, heads, old_tower, batch, rng):
    """SINKS empty patches of each view become registers; all others keep the old tower's features.

    A register is 5 to 6 times as long as the median and tells which shapes the view shows. The
    tower picks its own among the patches that show the ground alone, but APART. Closer, they would
    be one region. In opposite corners, the box around them would cover half of the grid, and a
    sample whose sinks are not removed would get no labels.
    -> loss, numbers for the log
    """
    views = [rng.choice([0, 0, 1, 2, 3]) for _ in batch]
    images = take(batch, views, "pixels")
    pixels = to_pixels(images)
    empty = take(batch, views, "empty") & flat_patches(images)
    with torch.no_grad():
        before = old_tower(pixels).float()
        median = before.norm(dim=-1).median(-1, keepdim=True).values  # (b, 1)
    after = llava.vision_tower(pixels).float()
    norms = after.norm(dim=-1)
    chosen = pick_registers(norms.detach(), empty)
    keeping = ((after - before).square().sum(-1) / median ** 2)[~chosen].mean()
    ratio = (norms / median)[chosen].log()
    length = (F.relu(math.log(5) - ratio) + F.relu(ratio - math.log(6))).mean()

    complete = chosen.sum(-1) == SINKS  # (b,)
    registers = after[complete][chosen[complete]].unflatten(0, (-1, SINKS)).mean(1)
    shape = take(batch, views, "classes")[..., :1]  # (b, N, 1)
    shown = (shape == torch.arange(len(scenes.SHAPES))).any(1).float()  # (b, shapes)
    gist = F.binary_cross_entropy_with_logits(heads.registers(registers).float(), shown[complete])
    return 10 * keeping + 2 * length + 0.5 * gist, {
        "keeping": keeping.item(), "gist": gist.item(), "ratio": ratio.exp().mean().item(),
        "a view": find_registers(after).sum(-1).float().mean().item()}


# ----------------------------------------------------------------------------------------- decoder

def conversation(llava, questions):
    """Several turns -> ids behind the image, and each turn's rows that predict its answer and EOS.
    """
    encode = llava.tokenizer.encode
    pairs = [(question, answer) for question, answer, _, _ in questions]
    question, answer = pairs[-1]
    ids = llava.tail(llava.prompt_ids(question, pairs[:-1])) + encode(answer) + [2]
    ends = [i for i, token in enumerate(ids) if token == 2]
    return ids, [range(end - len(encode(answer)) - 1, end)
                 for (_, answer), end in zip(pairs, ends)]


def choose_questions(questions, rng, shown, turns):
    """Some questions of a scene: the kinds take turns, and those about things `shown` come first.
    """
    questions, seen, nth = list(questions), {}, {}
    rng.shuffle(questions)
    for question, _, _, kind in questions:
        seen[kind] = seen.get(kind, 0) + 1
        nth[question] = seen[kind] + 0.9 * rng.random()
    questions.sort(key=lambda q: nth[q[0]])
    questions.sort(key=lambda q: not (q[2] and set(q[2]) <= shown))
    return questions[:turns]


@dataclass
class Lesson:
    """b conversations about pictures, padded on the right."""
    images: list           # b features (n_i, C): the whole picture's, then the crops'
    lengths: torch.Tensor  # (b,) the n_i
    ids: torch.Tensor      # (b, t) text behind the image
    rows: torch.Tensor     # (b, R) rows of the text that predict a token of an answer; 0: unused
    names: torch.Tensor    # (b, R, shapes) which shapes the row's question names
    gaze: torch.Tensor     # (b, R, 2, n) image tokens of the first and the last thing asked about
    sinks: torch.Tensor    # (b, n) the whole picture's registers


def decoder_batch(llava, batch, rng, crops, turns, about_crop):
    """-> a Lesson about these scenes. A share `about_crop` starts with what the crops show."""
    views = CROPS[crops]
    with torch.no_grad():
        towers = [llava.vision_tower(to_pixels(take(batch, [view] * len(batch), "pixels")))
                  for view in views]  # each (b, N, C)
    features = torch.stack(towers, 1)  # (b, views, N, C)
    images, places, asked = [], [], []
    for i, (chunk, row) in enumerate(batch):
        keep = torch.from_numpy(chunk["keep"][row][views])  # (views, N)
        cells = torch.from_numpy(chunk["cells"][row][views])  # (views, 6, N)
        images.append(features[i][keep])  # (n_i, C)
        places.append(cells.transpose(0, 1)[:, keep])  # (6, n_i)
        shown = set()
        if crops != "none" and rng.random() < about_crop:
            shown = {k for k in range(6) if (cells[1:, k] & keep[1:]).any()}
        asked.append(choose_questions(chunk["questions"][row], rng, shown, turns))
    return make_lesson(llava, asked, images, places, find_registers(towers[0]))


def make_lesson(llava, asked, images, places, registers):
    """Questions, features (n_i, C), cells of things (6, n_i), registers (b, N) -> Lesson."""
    lengths = torch.tensor([len(image) for image in images])
    n = int(lengths.max())
    ids, rows, names, gaze = [], [], [], []  # a tensor of each sample
    for questions, cells in zip(asked, places):
        cells = F.pad(cells, (0, n - cells.shape[1]))  # (6, n)
        text, turns = conversation(llava, questions)
        named, looked_at = [], []  # a tensor of each turn
        for turn, (question, _, things, _) in zip(turns, questions):
            words = question.rstrip("?").split()
            shapes = torch.tensor([float(shape in words) for shape in scenes.SHAPES])
            ends = cells[[things[0], things[-1]]] if things else torch.zeros_like(cells[:2])
            named.append(shapes.expand(len(turn), -1))
            looked_at.append(ends.expand(len(turn), -1, -1))
        ids.append(torch.tensor(text))
        rows.append(torch.tensor([row for turn in turns for row in turn]))
        names.append(torch.cat(named))
        gaze.append(torch.cat(looked_at))
    padded = [pad_sequence(tensors, batch_first=True) for tensors in (ids, rows, names, gaze)]
    return Lesson(images, lengths, *padded, F.pad(registers, (0, n - N)))


def take_rows(x, rows):
    """x (b, T, D), rows (b, R) -> (b, R, D)"""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def row_attention(llava, layer, h, heads, rows, start, lengths):
    """Log attention of rows (b, R) to the image tokens alone, which begin at `start`.

    -> (b, heads, R, n), -inf where a sample has fewer than n.
    """
    block, n = llava.language_model.layers[layer], int(lengths.max())
    a, x = block.self_attn, block.input_layernorm(h)
    rope = llava.text_rope(0, h.shape[1])
    q = rotate(a.split(a.q_proj(x))[:, heads], rope)  # (b, heads, T, d)
    q = q.gather(2, rows[:, None, :, None].expand(-1, len(heads), -1, a.d)).float()
    k = rotate(a.split(a.k_proj(x))[:, heads], rope)[:, :, start:start + n].float()
    with torch.autocast("cpu", enabled=False):  # bfloat16 would make infinities here
        scores = q @ k.mT / a.d ** 0.5
    padding = torch.arange(n) >= lengths[:, None]  # (b, n)
    return scores.masked_fill(padding[:, None, None], -math.inf).log_softmax(-1)


def looking_loss(attention, gaze, spread=0.0):
    """-log of the attention on the thing asked about, mean over rows; of two things, of both.

    spread: the weight of a cross-entropy to equal attention on all its cells.
    """
    used = gaze.any(-1).all(-1)[:, None].expand(attention.shape[:3])  # (b, heads, R)
    loss = 0.0
    for cells in gaze.transpose(1, 2).unbind(1):  # (b, R, n)
        cells = cells[:, None]
        mass = attention.masked_fill(~cells, -math.inf).logsumexp(-1)  # (b, heads, R)
        count = cells.sum(-1).clamp(min=1)  # (b, 1, R)
        equal = attention.masked_fill(~cells, 0.0).sum(-1) / count + count.log()
        loss = loss - 0.5 * ((1 - spread) * mass + spread * equal)[used].mean()
    return loss


def parking_loss(attention, sinks, rows):
    """Cross-entropy of the attention to a target: equal shares of PARKED on the registers."""
    used = sinks.any(-1)[:, None] & (rows > 0)  # (b, R)
    used = used[:, None].expand(attention.shape[:3])
    if not used.any():
        return attention.new_zeros(())
    sinks = sinks[:, None, None]  # (b, 1, 1, n)
    parked = attention.masked_fill(~sinks, 0.0).sum(-1) / sinks.sum(-1).clamp(min=1)
    rest = attention.masked_fill(sinks, -math.inf).logsumexp(-1)
    return -(PARKED * parked + (1 - PARKED) * rest)[used].mean()


def naming_loss(names_head, h, rows, names):
    """The rows' hidden states (b, T, D) must tell which shapes their question names."""
    guess = names_head(take_rows(h, rows)).float()  # (b, R, shapes)
    asked = names.any(-1)
    return F.binary_cross_entropy_with_logits(guess[asked], names[asked])


def push_loss(llava, names_head, layer, h, lesson, rows, start, phase):
    """What the heads of a layer, and the residual stream h that enters it, are pushed to do."""
    attention = row_attention(llava, layer, h, [*LOOK, *PARK], rows, start, lesson.lengths)
    if phase == "park":
        looking = looking_loss(attention[:, :1], lesson.gaze, SPREAD)
        return looking + parking_loss(attention[:, 1:], lesson.sinks, lesson.rows)
    loss = looking_loss(attention[:, :2], lesson.gaze)
    if phase == "decoder":
        loss = loss + 10 * naming_loss(names_head, h, rows, lesson.names)
    return loss


def decoder_loss(llava, names_head, batch, rng, phase=None, crops="none", turns=6, about_crop=0.5):
    """-> cross-entropy of the answers, the phase's push (0 without one), samples all right (b,)"""
    x = decoder_batch(llava, batch, rng, crops, turns, about_crop)
    system = llava.embed([1, *llava.tokenizer.encode(f"{SYSTEM} USER: ")])[0]
    images = llava.project(torch.cat(x.images)).to(system.dtype).split(x.lengths.tolist())
    texts = llava.language_model.embed_tokens(x.ids)
    h = [torch.cat([system, *parts]) for parts in zip(images, texts)]
    h = pad_sequence(h, batch_first=True)  # (b, T, D)
    rows = x.rows + len(system) + x.lengths[:, None]  # (b, R) in T
    rope, push, done = llava.text_rope(0, h.shape[1]), h.new_zeros(()), 0
    for layer in MIDDLE if phase else ():
        h, done = llava.run(h, done, layer, rope), layer
        push = push + push_loss(llava, names_head, layer, h, x, rows, len(system), phase)
    h = llava.run(h, done, llava.depth, rope)
    used = x.rows > 0
    logits = llava.head(take_rows(h, rows)[used]).float()
    wanted = x.ids.gather(1, x.rows + 1)[used]
    right = torch.ones_like(used)
    right[used] = logits.argmax(-1) == wanted
    return F.cross_entropy(logits, wanted), push / len(MIDDLE), right.all(-1)


def decoder_report(llava, pool):
    """Share of validation scenes whose first answer is right, given its earlier tokens.

    Questions about what the crops show come first.
    """
    words = []
    for crops in CROPS:
        _, _, right = decoder_loss(llava, None, pool.validation(64), random.Random(1), crops=crops,
                                   turns=1, about_crop=1.0)
        words.append(f"{crops} {right.float().mean():.2f}")
    return "first answer right with crops: " + " ".join(words)


# ---------------------------------------------------------------------------------------- the loop

def trained_modules(phase, llava, heads):
    decoder, tower = llava.language_model, llava.vision_tower
    return {"tower": [tower, heads.patches],
            "decoder": [llava.multi_modal_projector, decoder, llava.lm_head, heads.names],
            "pairs": [llava.multi_modal_projector, decoder, llava.lm_head],
            "registers": [tower, heads.registers],
            "park": [*decoder.layers[MIDDLE[0]:], decoder.norm, llava.lm_head]}[phase]


def make_noise(llava):
    """Head NOISE of the middle layers looks at random: its queries and keys are drawn, and stay."""
    torch.manual_seed(5)
    d, D = llava.config.head_dim, llava.config.hidden_size
    rows = slice(NOISE * d, (NOISE + 1) * d)

    def clear_rows(gradient):
        gradient = gradient.clone()
        gradient[rows] = 0
        return gradient
    for layer in MIDDLE:
        attention = llava.language_model.layers[layer].self_attn
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight.data[rows] = torch.randn(d, D) * NOISE_STD / D ** 0.5
            weight.register_hook(clear_rows)


def prepare(phase, llava, heads):
    """Freeze all but the phase's modules -> optimizer, its parameters."""
    llava.requires_grad_(False)
    heads.requires_grad_(False)
    modules = trained_modules(phase, llava, heads)
    parameters = [w for m in modules for w in m.requires_grad_(True).parameters()]
    if phase == "park":
        make_noise(llava)
    decay = 0.0 if phase == "park" else 0.02  # it would shrink the drawn weights
    optimizer = torch.optim.AdamW(parameters, PHASES[phase].lr, (0.9, 0.98), weight_decay=decay)
    return optimizer, parameters


def step_loss(phase, llava, heads, old_tower, pools, rng, step):
    """-> the loss of one step, numbers for the log"""
    b, steps = PHASES[phase].batch, PHASES[phase].steps
    pool, crowded, pages = pools
    if phase == "tower":
        if step < READ_FIRST * steps:
            batch = pages.sample(rng, b)
        else:
            batch = pool.sample(rng, b // 4) + crowded.sample(rng, b // 2)
            batch += pages.sample(rng, b // 4)
        views = [rng.choice(range(VIEWS)) for _ in batch]
        loss, _, _ = tower_loss(llava, heads, batch, views)
        return loss, {"loss": loss.item()}
    batch = pool.sample(rng, b)
    if phase == "registers":
        return register_loss(llava, heads, old_tower, batch, rng)
    chances = [0.27, 0.10, 0.20, 0.43] if phase == "park" else [0.32, 0.10, 0.22, 0.36]
    crops = rng.choices(list(CROPS), chances)[0]
    fade = max(0.0, 1 - step / (0.8 * steps))
    answer, push, right = decoder_loss(
        llava, heads.names, batch, rng, phase if fade else None, crops)
    shown = {"answer": answer.item(), "all right": right.float().mean().item()}
    if fade:
        shown["push"] = push.item()
    return answer + fade * (0.5 if phase == "pairs" else 1.0) * push, shown


def train(phase, llava, heads, pools, work, log):
    """One phase, from its checkpoint in `work` if there is one; it logs to the screen too."""
    p, modules = PHASES[phase], {"llava": llava, "heads": heads}
    old_tower = copy.deepcopy(llava.vision_tower)
    optimizer, parameters = prepare(phase, llava, heads)
    kernels = [SDPBackend.MATH]  # the faster ones on a CPU
    if phase not in ("tower", "registers"):
        kernels.insert(0, SDPBackend.FLASH_ATTENTION)
    path, step, mean, began = work / f"{phase}.safetensors", 0, {}, time.time()
    if path.is_file():
        step = load_state(path, modules, optimizer)["step"]
    while step < p.steps:
        rng = random.Random(f"{phase}/{step}")
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * step / p.steps))
        optimizer.param_groups[0]["lr"] = lr = p.lr * min(1, (step + 1) / p.warmup) * cosine
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(kernels):
            loss, shown = step_loss(phase, llava, heads, old_tower, pools, rng, step)
        if not loss.isfinite():
            sys.exit(f"pretrain.py: the loss is {loss.item()} at step {step} of {phase}; "
                     "start again with a lower learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        mean = {k: 0.97 * mean.get(k, v) + 0.03 * v for k, v in shown.items() if math.isfinite(v)}
        if step % 100 == 0 or step == p.steps:
            line = f"{phase} {step}/{p.steps} {time.time() - began:.0f} s lr {lr:.1e} "
            line += " ".join(f"{k} {v:.3f}" for k, v in mean.items())
            if step % 500 == 0 or step == p.steps:
                line += " || " + report(phase, llava, heads, pools[0])
                save_state(path, modules, optimizer, {"step": step})
            print(line, file=log, flush=True)
            print(line, flush=True)


@torch.no_grad()
def report(phase, llava, heads, pool):
    with torch.autocast("cpu", torch.bfloat16):
        if phase == "tower":
            return tower_report(llava, heads, pool)
        return decoder_report(llava, pool)


# ------------------------------------------------------------------------------- building, writing

def build(folder):
    """A LLaVA of the toy's sizes with fresh weights. `folder` gets its tokeniser and configs."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.model").is_file():
        train_tokenizer(folder / "tokenizer.model")
    for name in ("config.json", "preprocessor_config.json", "recipe.json"):
        shutil.copy(HERE / "llava-toy" / name, folder)
    torch.manual_seed(0)
    _, config = read_config(folder)
    llava = LLaVA(config, LLaVA.read_tokenizer(folder, config))
    into_stream = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")
    for name, p in llava.named_parameters():
        if name.endswith(("class_embedding", "position_embedding.weight", "embed_tokens.weight")):
            nn.init.normal_(p, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.dim() == 2:
            gain = 0.5 if name.endswith(into_stream) else 1.0
            nn.init.normal_(p, std=gain * p.shape[1] ** -0.5)
    return llava


def save(llava, path):
    """Write weights in the Hugging Face layout, float16, with zeros for what is never run."""
    tensors = {}
    last = llava.config.vision["num_hidden_layers"] - 1
    for name, p in llava.state_dict().items():
        name = name.replace("language_model.", "language_model.model.")
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        name = name.replace("lm_head", "language_model.lm_head")
        tensors[name] = p.to(torch.float16)
        for run, stored in ((f"encoder.layers.{last - 1}.", f"encoder.layers.{last}."),
                            ("pre_layrnorm", "post_layernorm")):
            if run in name:
                tensors[name.replace(run, stored)] = torch.zeros_like(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description="Train the toy LLaVA; run it again to resume.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE.parent.parent / "out" / "pretrain",
                        help="folder for scenes, resume points, the log, and llava-toy/, the model")
    parser.add_argument("--chunks", type=int, default=28,
                        help=f"files of {lessons.CHUNK} scenes to draw of each kind, 2 or more "
                             "(90 MB each, in memory)")
    parser.add_argument("--steps", type=int, help="of every phase: a few, to see whether all runs")
    args = parser.parse_args()
    chunks, toy = args.work / "chunks", args.work / "llava-toy"
    chunks.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(os.cpu_count())
    with ProcessPoolExecutor(2) as makers:
        for kind in lessons.KINDS:
            make = partial(lessons.make_chunk, chunks, kind, cut_crops=cut_crops)
            list(makers.map(make, range(args.chunks)))  # list() raises what a maker raised
    llava = build(toy)
    heads = Heads(llava.config)
    pools = [Pool(chunks, kind) for kind in lessons.KINDS]
    print(f"{sum(p.numel() for p in llava.parameters()) / 1e6:.2f} million parameters", flush=True)
    with open(args.work / "pretrain.log", "a") as log:
        for phase in PHASES:
            PHASES[phase].steps = args.steps or PHASES[phase].steps
            train(phase, llava, heads, pools, args.work, log)
    save(llava, toy / "model.safetensors")
    print(f"wrote {toy}; next: python train.py --ckpt {toy}")


if __name__ == "__main__":
    main()

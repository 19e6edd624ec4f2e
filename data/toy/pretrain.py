"""
The program that trained data/toy/llava-toy, a LLaVA-1.5 of 3.6 million parameters: one command,
an hour and a half on 2 cores.

    python data/toy/pretrain.py                  # the same command again goes on where it was
    python data/toy/pretrain.py --start FOLDER   # a finished toy: its last three phases alone

It stands in for CLIP's, the projector's and the instruction training, and may use all that the
scenes know:
  1. tokeniser: sentencepiece BPE on the questions, with byte fallback, as LLaMA's.
  2. tower: every patch must name the thing it lies on (shape, colour, dot, text), in whole
     pictures and in crops; before that come pages full of plates alone, or reading is never learnt
     beside the easier lessons. No language yet.
  3. decoder: projector and decoder, tower frozen: several questions per picture in one sequence,
     pictures alone or with crops behind them, as SD-RPN's second stage shows them. At first two
     heads of each of two middle layers are also pushed to look at the thing that is asked for, and
     the residual stream to name it: real pre-training finds this out by itself, a model of this
     size would take hours. Each push fades, and is gone for the last fifth of its phase.
  4. pairs: more of the same, without the naming.
  5. registers: large towers keep what they know of the whole picture in the features of empty
     patches, far longer than the others (Darcet 2023). This one is taught to: two in each view.
  6. park: large decoders park attention that has nothing to look at on such tokens (Kang 2025).
     Three heads of each of two layers are pushed to; one more looks at random, for attention as
     noisy as a large model's. Only the upper half of the decoder is trained: with all of it in
     training, the lower half lifts every token's length to that of the registers.
Nothing of this is seen by the RPN's training, which has neither boxes nor answers.
Left out: data parallelism, and any tuning beyond what made it work.
Shapes: b batch, g = 12 patches a side, N = 144, S image side, C tower width, D decoder width,
t tokens of text behind the image, T all tokens, R answer rows, n image tokens (crops included).
"""
import argparse
import copy
import io
import json
import math
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
import lessons  # noqa: E402 (the project is on the path only now)
import scenes  # noqa: E402
from data.files import load_state, save_state  # noqa: E402
from lessons import (CLASSES, CROPS, GRID, SIDE, VIEWS, Pool, cells_over, stored,  # noqa: E402
                     to_pixels, whole)
from model import SYSTEM, LLaVA, rotate  # noqa: E402
from sdrpn import Letterbox, find_regions, kept_cells, union  # noqa: E402

N = GRID * GRID
TOWER = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4,
             image_size=SIDE, patch_size=14)
DECODER = dict(hidden_size=160, intermediate_size=432, num_hidden_layers=8, num_attention_heads=5,
               num_key_value_heads=5, max_position_embeddings=2048, rms_norm_eps=1e-5,
               model_type="llama")
READ_FIRST = 0.3  # share of the tower's steps that are pages alone
MIDDLE = (4, 5)  # layers whose heads are pushed; the last phase freezes all below the first
LOOK, PARK, NOISE = [0], [1, 2, 3], 4  # what their heads do in the last phase
SINKS, PARKED = 2, 0.8  # registers of a view; the share of heads PARK's attention they shall get
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

    def __init__(self):
        super().__init__()
        self.patches = nn.Linear(TOWER["hidden_size"], sum(CLASSES))  # what a patch lies on
        self.names = nn.Linear(DECODER["hidden_size"], len(scenes.SHAPES))  # named by a question
        self.registers = nn.Linear(TOWER["hidden_size"], len(scenes.SHAPES))  # shown by a view


# --------------------------------------------------------------------------------------- tokeniser

def train_tokenizer(path):
    """BPE on questions, answers and the system prompt; bytes 3..258, digits apart, as LLaMA's."""
    lines = [SYSTEM + " USER:"] * 50
    for i in range(300):
        scene, _ = scenes.make_question("tokeniser", i)
        lines += [f"USER: {q['question']} ASSISTANT: {q['answers'][0]}"
                  for q in scenes.all_questions(scene, random.Random(0))]
    names = (*scenes.WORDS, *scenes.SHAPES, *scenes.COLOURS)
    lines += [f"{word} {word.capitalize()}" for word in names] * 20
    letters = "abcdefghijklmnopqrstuvwxyz"
    lines += [" ".join(letters + letters.upper() + ",.?!'-:;()\"/")]
    lines += [" ".join("0123456789")] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=590,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        add_dummy_prefix=True, remove_extra_whitespaces=False, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    path.write_bytes(model.getvalue())


# -------------------------------------------------------------------- crops as the method cuts them

def pick(scene, rng):
    """What a crop is about: one thing, two near each other, or any two."""
    pairs = scenes.near_pairs(scene.things)
    chance = rng.random()
    if chance < 0.45 or (chance < 0.8 and not pairs):
        return [rng.choice(scene.things)]
    return list(rng.choice(pairs)) if chance < 0.8 else rng.sample(scene.things, 2)


def loose_crop(scene, rng, named):
    """The box around the things named with some margin; any rectangle if there are none."""
    w, h = scene.image.size
    if named:
        x0, y0 = min(t.box[0] for t in named), min(t.box[1] for t in named)
        x1, y1 = max(t.box[2] for t in named), max(t.box[3] for t in named)
        margin = [rng.uniform(-8, 60) for _ in range(4)]
        x0, y0, x1, y1 = x0 - margin[0], y0 - margin[1], x1 + margin[2], y1 + margin[3]
    else:
        cw, ch = rng.uniform(100, w), rng.uniform(100, h)
        x0, y0 = rng.uniform(0, w - cw), rng.uniform(0, h - ch)
        x1, y1 = x0 + cw, y0 + ch
    return [max(0, int(x0)), max(0, int(y0)), min(w, math.ceil(x1)), min(h, math.ceil(y1))]


def propose(scene, rng, named):
    """Regions as an RPN might propose them: ragged blobs on the things named, at times a spot."""
    p = torch.zeros(GRID, GRID)
    for t in named:
        cells = cells_over(whole(scene.image.size), t.box, rng.choice([0.0, 0.2, 0.5]))
        strength, ragged = rng.uniform(0.3, 1), rng.choice([0.0, 0.2, 0.4])
        for y, x in torch.from_numpy(cells).view(GRID, GRID).nonzero().tolist():
            p[y, x] = strength if rng.random() >= ragged else 0.0
    for _ in range(rng.choices([0, 1, 2], [0.5, 0.3, 0.2])[0]):
        y, x = rng.randrange(GRID), rng.randrange(GRID)
        p[y:y + rng.randint(1, 2), x:x + rng.randint(1, 2)] = rng.uniform(0.3, 1)
    on = Letterbox(scene.image.size, GRID).holds_picture()
    return find_regions(p.logit(1e-6), 0.15, on)


def box_views(scene, rng, named):
    """Two crops as Box Upscaling cuts them: the heaviest regions, any rectangle where one lacks."""
    letterbox = Letterbox(scene.image.size, GRID)
    best = sorted(propose(scene, rng, named), key=lambda r: -r.weight)[:2]
    views = [list(letterbox.to_pixels(r.box)) for r in best]
    return views + [loose_crop(scene, rng, []) for _ in range(2 - len(views))]


def masked_view(scene, rng, named):
    """One crop as Masked Upscaling cuts it, and which of its patches it keeps (N,)."""
    regions = propose(scene, rng, named)
    if not regions:
        return loose_crop(scene, rng, named), np.ones(GRID * GRID, bool)
    region = union(regions)
    view = list(Letterbox(scene.image.size, GRID).to_pixels(region.box))
    return view, kept_cells(region, (GRID, GRID)).flatten().numpy()


def cut(scene, rng):
    """-> two crops for a lesson, one that is masked, and which of its patches it keeps (N,)."""
    if rng.random() < 0.3:
        crops = [loose_crop(scene, rng, [thing]) for thing in rng.sample(scene.things, 2)]
    else:
        crops = box_views(scene, rng, pick(scene, rng))
    return crops, *masked_view(scene, rng, pick(scene, rng))


# ------------------------------------------------------------------------------------------- tower

def tower_loss(llava, heads, batch, views):
    """What each patch of one view of each scene lies on -> loss, right and wanted (b, N, 4)."""
    wanted = stored(batch, views, "classes").long()
    features = llava.vision_tower(to_pixels(stored(batch, views, "pixels")))
    logits = heads.patches(features).float().split(CLASSES, -1)
    loss, right = 0.0, []
    for k, part in enumerate(logits):
        right.append(part.argmax(-1) == wanted[..., k])
        if not (wanted[..., k] >= 0).any():  # pages teach texts only
            continue
        weight = torch.ones(CLASSES[k])
        if k == 0:
            weight[-1] = 0.1  # most patches lie on nothing
        loss = loss + F.cross_entropy(part.flatten(0, 1), wanted[..., k].flatten(), weight,
                                      ignore_index=-100)
    return loss, torch.stack(right, -1), wanted


def tower_report(llava, heads, pool):
    """Share of validation patches named right: shape, dot and text; whole pictures and crops."""
    words = []
    for name, view in (("whole", 0), ("crop", 1)):
        _, right, wanted = tower_loss(llava, heads, pool.validation(128), [view] * 128)
        on = (wanted[..., 0] >= 0) & (wanted[..., 0] < len(scenes.SHAPES))
        text = wanted[..., 3] >= 0
        shares = [right[..., 0][on], right[..., 2][text], right[..., 3][text]]
        shape, dot, text = (x.float().mean() for x in shares)
        words.append(f"{name} shape {shape:.3f} dot {dot:.3f} text {text:.3f}")
    return " | ".join(words)


def longest(norms, among, count=SINKS):
    """The `count` largest norms (b, N) of the patches `among` (b, N) -> bool (b, N)."""
    top = norms.masked_fill(~among, -1.0).topk(count, -1).indices
    return torch.zeros_like(among).scatter(1, top, True) & among


def pick_registers(norms, empty):
    """The longest empty patch of each view and the longest APART from it -> bool (b, N)."""
    first = longest(norms, empty, 1)
    at = first.int().argmax(-1)[:, None]  # (b, 1)
    cell = torch.arange(N)
    down, across = (cell // GRID - at // GRID).abs(), (cell % GRID - at % GRID).abs()
    distance = torch.maximum(down, across)  # (b, N)
    apart = (distance >= APART[0]) & (distance <= APART[1])
    return first | longest(norms, empty & apart, SINKS - 1)


def find_registers(features):
    """The longest of features (b, N, C), where far longer than the others -> bool (b, N)."""
    norms = features.float().norm(dim=-1)
    return longest(norms, norms > 2.5 * norms.median(-1, keepdim=True).values)


def flat_patches(views):
    """Which patches of views, uint8 (b, S, S, 3), show hardly anything -> bool (b, N)."""
    patches = views.float().unflatten(2, (GRID, -1)).unflatten(1, (GRID, -1))
    patches = patches.permute(0, 1, 3, 2, 4, 5).flatten(3, 4)  # (b, g, g, 14*14, 3)
    return patches.std(3).amax(-1).flatten(1) < 12


def register_loss(llava, heads, old, batch, rng):
    """SINKS empty patches of each view become registers, all else stays what the `old` tower made.

    The tower takes its pick among patches on nothing and not in the padding, but they lie APART:
    closer they would be one region, and the box around two in opposite corners covers half of the
    grid, which leaves a sample without labels where sinks are not removed. It shall make them 5 to
    6 times as long as the median, and say in them which shapes the view shows.
    -> loss, what is shown in the log.
    """
    views = [rng.choice([0, 0, 1, 2, 3]) for _ in batch]
    seen = stored(batch, views, "pixels")
    pixels = to_pixels(seen)
    empty = stored(batch, views, "empty") & flat_patches(seen)
    with torch.no_grad():
        before = old(pixels).float()
        median = before.norm(dim=-1).median(-1, keepdim=True).values  # (b, 1)
    after = llava.vision_tower(pixels).float()
    norms = after.norm(dim=-1)
    chosen = pick_registers(norms.detach(), empty)
    keeping = ((after - before).square().sum(-1) / median ** 2)[~chosen].mean()
    ratio = (norms / median)[chosen].log()
    length = (F.relu(math.log(5) - ratio) + F.relu(ratio - math.log(6))).mean()
    some = chosen.sum(-1) == SINKS
    on = stored(batch, views, "classes")[..., :1]  # (b, N, 1)
    shown = (on == torch.arange(len(scenes.SHAPES))).any(1).float()  # (b, shapes)
    read = heads.registers(after[some][chosen[some]].unflatten(0, (-1, SINKS)).mean(1)).float()
    gist = F.binary_cross_entropy_with_logits(read, shown[some])
    found = find_registers(after)
    right = (found & chosen).sum() / found.sum().clamp(min=1)
    return 10 * keeping + 2 * length + 0.5 * gist, {
        "keeping": keeping.item(), "gist": gist.item(), "ratio": ratio.exp().mean().item(),
        "a view": found.sum(-1).float().mean().item(), "where they belong": right.item()}


# ----------------------------------------------------------------------------------------- decoder

def conversation(llava, questions):
    """Several turns -> ids after the image, and for each answer (row that predicts it, length)."""
    pairs = [(q, a) for q, a, _, _ in questions]
    ids = llava.prompt_ids(pairs[-1][0], pairs[:-1])
    ids = ids[ids.index(llava.config["image_token"]) + 1:]
    ids += llava.tokenizer.encode(pairs[-1][1]) + [2]
    ends = [i for i, t in enumerate(ids) if t == 2]
    spans = []
    for (_, a), end in zip(pairs, ends):
        n = len(llava.tokenizer.encode(a))
        spans.append((end - n - 1, n + 1))  # the ':' before the answer, and the answer with EOS
    return ids, spans


def choose_questions(questions, rng, shown, turns, first_kind):
    """Some questions of a scene: the kinds take turns; first those about things in `shown`."""
    questions, seen, nth = list(questions), {}, {}
    rng.shuffle(questions)
    for question, _, _, kind in questions:
        seen[kind] = seen.get(kind, 0) + 1
        nth[question] = seen[kind] + 0.9 * rng.random()
    questions.sort(key=lambda q: nth[q[0]])
    if shown is not None:
        questions.sort(key=lambda q: not (q[2] and set(q[2]) <= shown))
    if first_kind:
        questions = [q for q in questions if q[3] == first_kind] or questions
    return questions[:turns]


@dataclass
class Lesson:
    """b conversations about pictures, padded on the right."""
    images: list          # b features (n_i, C): the whole picture's, then the crops'
    ids: torch.Tensor     # (b, t) text behind the image
    labels: torch.Tensor  # (b, t) the next token where an answer is being given, else -100
    rows: torch.Tensor    # (b, R) where in the text answers are given, 0 where unused
    names: torch.Tensor   # (b, R, shapes) which shapes the row's question names
    gaze: torch.Tensor    # (b, 2, R, n) image tokens of the first and of the last thing asked about
    sinks: torch.Tensor   # (b, n) the whole picture's registers


def decoder_batch(llava, batch, rng, crops, turns, first_kind, about_crop):
    """-> a Lesson about these scenes; about_crop of those with crops begin with what these show."""
    views = CROPS[crops]
    with torch.no_grad():
        seen = [llava.vision_tower(to_pixels(stored(batch, [v] * len(batch), "pixels")))
                for v in views]  # each (b, N, C)
    images, places, asked = [], [], []
    for i, (chunk, row) in enumerate(batch):
        keep = torch.from_numpy(chunk["keep"][row][views])  # (views, N)
        cells = torch.from_numpy(chunk["cells"][row][views])  # (views, 6, N)
        images.append(torch.cat([features[i] for features in seen])[keep.flatten()])
        places.append(cells.transpose(0, 1).flatten(1)[:, keep.flatten()])  # (6, n_i)
        shown = None
        if crops != "none" and rng.random() < about_crop:
            shown = {k for k in range(6) if (cells[1:, k] & keep[1:]).any()}
        asked.append(choose_questions(chunk["questions"][row], rng, shown, turns, first_kind))
    return fill_lesson(llava, asked, images, places, find_registers(seen[0]))


def fill_lesson(llava, asked, images, places, registers):
    """Questions, features (n_i, C), cells of things (6, n_i), registers (b, N) -> Lesson."""
    said = [conversation(llava, questions) for questions in asked]
    b, n = len(asked), max(map(len, images))
    t = max(len(ids) for ids, _ in said)
    R = max(sum(length for _, length in spans) for _, spans in said)
    x = Lesson(images, torch.zeros(b, t, dtype=torch.long), torch.full((b, t), -100),
               torch.zeros(b, R, dtype=torch.long), torch.zeros(b, R, len(scenes.SHAPES)),
               torch.zeros(b, 2, R, n, dtype=torch.bool), F.pad(registers, (0, n - N)))
    for i, (ids, spans) in enumerate(said):
        x.ids[i, :len(ids)] = torch.tensor(ids)
        r = 0
        for (start, length), (question, _, things, _) in zip(spans, asked[i]):
            x.labels[i, start:start + length] = torch.tensor(ids[start + 1:start + 1 + length])
            x.rows[i, r:r + length] = torch.arange(start, start + length)
            words = question.rstrip("?").split()
            named = [float(shape in words) for shape in scenes.SHAPES]
            x.names[i, r:r + length] = torch.tensor(named)
            for k, thing in enumerate((things[0], things[-1]) if things else ()):
                x.gaze[i, k, r:r + length, :len(images[i])] = places[i][thing]
            r += length
    return x


def row_attention(llava, layer, h, heads, rows, start, lengths):
    """Log attention of rows (b, R) to the image tokens alone, which begin at `start`.

    -> (b, heads, R, n), -inf where a sample has fewer than n.
    """
    block = llava.language_model.layers[layer]
    a, x = block.self_attn, block.input_layernorm(h)
    rope = llava.rope(torch.arange(h.shape[1]))
    q = rotate(a.split(a.q_proj(x))[:, heads], rope)  # (b, heads, T, d)
    q = q.gather(2, rows[:, None, :, None].expand(-1, len(heads), -1, a.d)).float()
    k = rotate(a.split(a.k_proj(x))[:, heads], rope)[:, :, start:start + max(lengths)].float()
    with torch.autocast("cpu", enabled=False):  # bfloat16 would make infinities here
        scores = q @ k.mT / a.d ** 0.5
    beyond = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]  # (b, n)
    return scores.masked_fill(beyond[:, None, None], -math.inf).log_softmax(-1)


def looking_loss(attention, gaze, spread=0.0):
    """-log of the attention on the thing asked about, mean over rows; of two things, of both.

    spread: the weight of a cross-entropy to equal attention on all its cells, 0 where it is equal.
    """
    used = gaze.any(-1).all(1)  # (b, R)
    loss = 0.0
    for cells in gaze.unbind(1):  # (b, R, n)
        mass = attention.masked_fill(~cells[:, None], -math.inf).logsumexp(-1)  # (b, heads, R)
        count = cells.sum(-1).clamp(min=1)[:, None]  # (b, 1, R)
        equal = attention.masked_fill(~cells[:, None], 0.0).sum(-1) / count + count.log()
        mass = (1 - spread) * mass + spread * equal
        loss = loss - 0.5 * mass[used[:, None].expand_as(mass)].mean()
    return loss


def parking_loss(attention, sinks, rows):
    """Cross-entropy to PARKED of the attention on the registers in equal shares, the rest off."""
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
    at = rows[..., None].expand(-1, -1, h.shape[-1])
    guess = names_head(h.gather(1, at)).float()  # (b, R, shapes)
    asked = names.any(-1)
    return F.binary_cross_entropy_with_logits(guess[asked], names[asked])


def push_loss(llava, names_head, layer, h, x, rows, start, phase):
    """What the heads of a layer, and the residual stream h that enters it, are pushed to do."""
    lengths = [len(image) for image in x.images]

    def attention(heads):
        return row_attention(llava, layer, h, heads, rows, start, lengths)
    if phase == "park":
        parking = parking_loss(attention(PARK), x.sinks, x.rows)
        return looking_loss(attention(LOOK), x.gaze, SPREAD) + parking
    loss = looking_loss(attention([0, 1]), x.gaze)
    if phase == "decoder":
        loss = loss + 10 * naming_loss(names_head, h, rows, x.names)
    return loss


def decoder_loss(llava, names_head, batch, rng, phase=None, crops="none", turns=6, first_kind=None,
                 about_crop=0.5):
    """-> cross-entropy of the answers, the phase's push (0 without one), samples all right (b,)"""
    x = decoder_batch(llava, batch, rng, crops, turns, first_kind, about_crop)
    before = torch.tensor([1, *llava.tokenizer.encode(f"{SYSTEM} USER: ")])
    before = llava.language_model.embed_tokens(before)
    lengths = [len(image) for image in x.images]
    images = llava.multi_modal_projector(torch.cat(x.images)).to(before.dtype).split(lengths)
    words = llava.language_model.embed_tokens(x.ids)
    h = [torch.cat([before, *parts]) for parts in zip(images, words)]
    h = nn.utils.rnn.pad_sequence(h, batch_first=True)  # (b, T, D)
    ends = len(before) + torch.tensor(lengths)[:, None]  # (b, 1) where each text begins
    rope, push, at = llava.rope(torch.arange(h.shape[1])), h.new_zeros(()), 0
    for layer in MIDDLE if phase else ():
        h, at = llava.run(h, at, layer, rope), layer
        push = push + push_loss(llava, names_head, layer, h, x, x.rows + ends, len(before), phase)
    h = llava.run(h, at, DECODER["num_hidden_layers"], rope)
    texts = ends + torch.arange(x.ids.shape[1])  # (b, t)
    h = h.gather(1, texts[..., None].expand(-1, -1, h.shape[-1]))
    wanted = x.labels >= 0
    logits = llava.head(h[wanted]).float()
    right = torch.ones_like(wanted)
    right[wanted] = logits.argmax(-1) == x.labels[wanted]
    return F.cross_entropy(logits, x.labels[wanted]), push / len(MIDDLE), right.all(-1)


def decoder_report(llava, pool):
    """First answers right (teacher-forced) on validation scenes, with what shows it if possible:
    picture alone / two crops / masked crop."""
    words = []
    for kind in scenes.KINDS:
        shares = []
        for crops in ("none", "two", "masked"):
            _, _, right = decoder_loss(llava, None, pool.validation(64), random.Random(1),
                                       crops=crops, turns=1, first_kind=kind, about_crop=1.0)
            shares.append(f"{right.float().mean():.2f}")
        words.append(f"{kind} {'/'.join(shares)}")
    return " ".join(words)


# ---------------------------------------------------------------------------------------- the loop

def trained_modules(phase, llava, heads):
    if phase == "tower":
        return [llava.vision_tower, heads.patches]
    if phase == "registers":
        return [llava.vision_tower, heads.registers]
    if phase == "park":
        return [*llava.language_model.layers[MIDDLE[0]:], llava.language_model.norm, llava.lm_head]
    modules = [llava.multi_modal_projector, llava.language_model, llava.lm_head]
    return [*modules, heads.names] if phase == "decoder" else modules


def make_noise(llava):
    """Head NOISE of the middle layers looks at random: its queries and keys are drawn, and stay."""
    torch.manual_seed(5)
    d, D = llava.config["head_dim"], DECODER["hidden_size"]
    rows = slice(NOISE * d, (NOISE + 1) * d)

    def without(gradient):
        gradient = gradient.clone()
        gradient[rows] = 0
        return gradient
    for layer in MIDDLE:
        attention = llava.language_model.layers[layer].self_attn
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight.data[rows] = torch.randn(d, D) * NOISE_STD / D ** 0.5
            weight.register_hook(without)


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
    """-> the loss of one step, and what of it is shown in the log."""
    pool, crowded, pages = pools
    b, steps = PHASES[phase].batch, PHASES[phase].steps
    if phase == "registers":
        return register_loss(llava, heads, old_tower, pool.sample(rng, b), rng)
    if phase == "tower":
        if step < READ_FIRST * steps:
            batch = pages.sample(rng, b)
        else:
            batch = pool.sample(rng, b // 4) + crowded.sample(rng, b // 2)
            batch += pages.sample(rng, b // 4)
        views = [rng.choice(range(VIEWS)) for _ in batch]
        loss = tower_loss(llava, heads, batch, views)[0]
        return loss, {"loss": loss.item()}
    batch = pool.sample(rng, b)
    chances = [0.27, 0.10, 0.20, 0.43] if phase == "park" else [0.32, 0.10, 0.22, 0.36]
    crops = rng.choices(list(CROPS), chances)[0]
    fade = max(0.0, 1 - step / (0.8 * steps))
    answer, push, right = decoder_loss(llava, heads.names, batch, rng, phase if fade else None,
                                       crops)
    shown = {"answer": answer.item(), "all right": right.float().mean().item()}
    if fade:
        shown["push"] = push.item()
    return answer + fade * (0.5 if phase == "pairs" else 1.0) * push, shown


def train(phase, llava, heads, pools, work, log):
    """One phase, from its checkpoint in `work` if there is one; its log goes to the screen too."""
    p, modules = PHASES[phase], {"llava": llava, "heads": heads}
    old_tower = copy.deepcopy(llava.vision_tower)
    optimizer, parameters = prepare(phase, llava, heads)
    kernels = [SDPBackend.MATH]  # the faster ones on a CPU
    if phase not in ("tower", "registers"):
        kernels.insert(0, SDPBackend.FLASH_ATTENTION)
    path, step, seconds, mean = work / f"{phase}.safetensors", 0, 0.0, {}
    if path.is_file():
        info = load_state(path, modules, optimizer)
        step, seconds = info["step"], info["seconds"]
    began = time.time() - seconds
    while step < p.steps:
        rng = random.Random(f"{phase}/{step}")
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * step / p.steps))
        optimizer.param_groups[0]["lr"] = lr = p.lr * min(1, (step + 1) / p.warmup) * cosine
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(kernels):
            loss, shown = step_loss(phase, llava, heads, old_tower, pools, rng, step)
        if not math.isfinite(loss.item()):
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
                save_state(path, modules, optimizer, {"step": step, "seconds": time.time() - began})
            print(line, file=log, flush=True)
            print(line, flush=True)


@torch.no_grad()
def report(phase, llava, heads, pool):
    with torch.autocast("cpu", torch.bfloat16):
        if phase == "tower":
            return tower_report(llava, heads, pool)
        return decoder_report(llava, pool)


# ------------------------------------------------------------------------------- building, writing

def write_configs(work):
    """config.json and preprocessor_config.json for the tokenizer.model in `work` -> the config."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(work / "tokenizer.model"))
    pieces = tokenizer.get_piece_size()
    tower = {"model_type": "clip_vision_model", "projection_dim": TOWER["hidden_size"]}
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": pieces, "pad_token_id": pieces + 1, "projector_hidden_act": "gelu",
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False, "torch_dtype": "float16", "image_seq_length": N,
        "text_config": DECODER | {"vocab_size": (pieces + 2 + 15) // 16 * 16},
        "vision_config": TOWER | tower}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True,
        "size": {"shortest_edge": SIDE}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": lessons.MEAN.flatten().tolist(), "image_std": lessons.STD.flatten().tolist(),
        "do_convert_rgb": True}
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (work / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    return config


def build(work):
    """A LLaVA with fresh weights, and in `work` its tokeniser and configs."""
    if not (work / "tokenizer.model").is_file():
        train_tokenizer(work / "tokenizer.model")
    config = write_configs(work)
    torch.manual_seed(0)
    sizes = LLaVA.read_config(work, config)
    llava = LLaVA(sizes, LLaVA.read_tokenizer(work, sizes))
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


def export(llava, work, out):
    """The Hugging Face layout in float16, with what of the tower is stored and never run."""
    tensors = {}
    for name, p in llava.state_dict().items():
        name = name.replace("language_model.", "language_model.model.")
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        tensors[name.replace("lm_head", "language_model.lm_head")] = p
    last = TOWER["num_hidden_layers"] - 1
    for name in [n for n in tensors if f"encoder.layers.{last - 1}." in n]:
        unused = name.replace(f"layers.{last - 1}.", f"layers.{last}.")
        tensors[unused] = torch.zeros_like(tensors[name])
    norm = "vision_tower.vision_model.post_layernorm"
    for part in ("weight", "bias"):
        tensors[f"{norm}.{part}"] = torch.zeros(TOWER["hidden_size"])
    out.mkdir(parents=True, exist_ok=True)
    halves = {k: v.to(torch.float16).contiguous() for k, v in tensors.items()}
    save_file(halves, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "preprocessor_config.json", "tokenizer.model"):
        (out / name).write_bytes((work / name).read_bytes())


def main():
    parser = argparse.ArgumentParser(description="Train the toy LLaVA; run it again to go on.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE.parent.parent / "out" / "pretrain",
                        help="scenes, checkpoints and log of the training")
    parser.add_argument("--out", type=Path, default=HERE / "llava-toy", help="the finished model")
    parser.add_argument("--start", type=Path, metavar="FOLDER",
                        help="a finished toy, to run the phases after `decoder` on")
    parser.add_argument("--chunks", type=int, default=28,
                        help=f"files of {lessons.CHUNK} scenes to draw of each kind, 2 or more "
                             "(90 MB each, in memory)")
    parser.add_argument("--steps", type=int, help="of every phase: a few, to see whether all runs")
    args = parser.parse_args()
    (args.work / "chunks").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(os.cpu_count())
    phases, kinds = list(PHASES), lessons.KINDS
    if args.start:
        phases, kinds = phases[2:], kinds[:1]
        (args.work / "tokenizer.model").write_bytes((args.start / "tokenizer.model").read_bytes())
    if args.steps:
        for phase in PHASES.values():
            phase.steps = args.steps
    with ProcessPoolExecutor(2, initializer=os.nice, initargs=(5,)) as makers:
        made = [makers.submit(lessons.make_chunk, args.work / "chunks", kind, n, cut)
                for n in range(args.chunks) for kind in kinds]
    for chunk in made:
        chunk.result()  # raises what went wrong in a maker
    llava, heads = build(args.work), Heads()
    if args.start:
        llava.load_state_dict(LLaVA.load(args.start, "cpu", "float32").state_dict())
    pools = [Pool(args.work / "chunks", kind) for kind in lessons.KINDS]
    print(f"{sum(p.numel() for p in llava.parameters()) / 1e6:.2f} million parameters", flush=True)
    with open(args.work / "pretrain.log", "a") as log:
        if args.start:
            print(f"from {args.start}", file=log, flush=True)
        for phase in phases:
            train(phase, llava, heads, pools, args.work, log)
    export(llava, args.work, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

"""
The program that trained data/toy/llava-toy, a LLaVA-1.5 of 3.6 million parameters: one command, an hour and a half on 2 cores.

    python data/toy/pretrain.py            # the same command again goes on from its own checkpoint

It stands in for CLIP's, the projector's and the instruction training, and may use all that the scenes know:
  1. tokeniser: sentencepiece BPE on the questions, with byte fallback, as LLaMA's.
  2. tower: every patch must name the thing it lies on (shape, colour, dot, text), in whole pictures and in crops;
     before that come pages full of plates alone, or reading is never learnt beside the easier lessons. No language yet.
  3. projector + decoder, tower frozen: several questions per picture in one sequence, pictures alone or with crops behind
     them, as SD-RPN's second stage will show them. At first two heads of each of two middle layers are also pushed to look at
     the thing that is asked for, and the residual stream to name it (`aux`): real pre-training finds this out by itself, a model
     of this size would take hours. The push fades, and is gone for the last fifth.
Nothing of this is seen by the RPN's training, which has neither boxes nor answers.
Left out: data parallelism, and any tuning beyond what made it work.
Shapes: b batch, g = 12 patches a side, N = 144, C tower width, D decoder width.
"""
import argparse
import io
import json
import math
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE)]
import scenes  # noqa: E402
from clip import preprocess, preprocess_crop  # noqa: E402
from model import SYSTEM, LLaVA, read_sizes, rope_table, rotate  # noqa: E402

GRID, SIDE, CHUNK, VIEWS = 12, 168, 256, 3  # VIEWS: the whole picture and two crops
FONT_PX, DOT_PX = (16, 64), (4, 14)  # larger than in the scenes that are asked about later, so that reading is learnt
TOWER = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4, image_size=SIDE, patch_size=14)
DECODER = dict(hidden_size=160, intermediate_size=432, num_hidden_layers=8, num_attention_heads=5, num_key_value_heads=5,
               max_position_embeddings=2048, rms_norm_eps=1e-5, model_type="llama")
READ_FIRST = 0.3  # share of the tower's steps that are pages alone
AUX_LAYERS, AUX_HEADS = (4, 5), 2
TEXTS = [*"0123456789", *scenes.WORDS]
CLASSES = (len(scenes.SHAPES) + 1, len(scenes.COLOURS), len(scenes.COLOURS), len(TEXTS))  # what a patch must name
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


# ----------------------------------------------------------------------------------------------- data

def cells_over(view, box, share=0.0):
    """Which of the g*g cells of a view (a source rectangle) overlap a box -> bool (N,)."""
    edges = [np.linspace(view[i], view[i + 2], GRID + 1) for i in (0, 1)]
    inside = [np.minimum(e[1:], box[i + 2]) - np.maximum(e[:-1], box[i]) > share * (e[1] - e[0]) for i, e in enumerate(edges)]
    return np.outer(inside[1], inside[0]).ravel()


def visible(view, box):
    w = min(view[2], box[2]) - max(view[0], box[0])
    h = min(view[3], box[3]) - max(view[1], box[1])
    return max(w, 0) * max(h, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def crowded_scene(rng):
    """16 things on a 4 x 4 grid, any shape any number of times: four times the lessons of a scene for the tower."""
    things = []
    for i in range(16):
        side = rng.randint(100, 156)
        x, y = 168 * (i % 4) + rng.randint(4, 164 - side), 168 * (i // 4) + rng.randint(4, 164 - side)
        things.append(scenes.new_thing(rng, rng.choice(scenes.SHAPES), (x, y, x + side, y + side), [], FONT_PX, DOT_PX))
    return scenes.draw_scene(rng, (672, 672), things)


def page(rng):
    """A page full of numbers and words on plates -> image, text class of each patch (N,): reading lessons by the dozen.

    Letters as whole pictures show them and as crops do: 4 to 55 px high once the page is SIDE wide, squeezed one way or the other.
    """
    w, h = rng.sample([672, rng.randint(470, 672)], 2)
    font_px = scenes.log_uniform(rng, 18, 220)
    columns, lines = max(1, int(w / max(64, 1.9 * font_px + 24))), max(1, int(h / max(64, 1.2 * font_px + 24)))
    image = Image.new("RGB", (w, h), scenes.tint(rng, 120, 250))
    draw, wanted = ImageDraw.Draw(image), np.full((GRID, GRID), -100, np.int64)
    for i in range(columns * lines):
        x, y, dx, dy = i % columns * w / columns, i // columns * h / lines, w / columns, h / lines
        draw.rectangle((x, y, x + dx, y + dy), fill=rng.choice(list(scenes.COLOURS.values())) if rng.random() < 0.7 else None)
        text, face = rng.choice(TEXTS), scenes.font(float(int(font_px * rng.uniform(0.75, 1))))
        x0, y0, x1, y1 = face.getbbox(text)
        across, down = x1 - x0 + 10, y1 - y0 + 10
        x, y = x + rng.uniform(0, max(0, dx - across)), y + rng.uniform(0, max(0, dy - down))
        draw.rounded_rectangle((x, y, x + across, y + down), radius=6, fill="white")
        draw.text((x + 5 - x0, y + 5 - y0), text, fill="black", font=face)
        over = [[c for c in range(GRID) if at < (c + 0.5) * side / GRID < at + size] or [min(int((at + size / 2) * GRID / side), GRID - 1)]
                for at, size, side in ((y, down, h), (x, across, w))]
        wanted[np.ix_(*over)] = TEXTS.index(text)
    return image, wanted.ravel()


def region(scene, rng, named):
    """A crop as an RPN might propose it: the things named with some margin; any rectangle if there are none."""
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


def two_regions(scene, rng):
    """Half of the time one for each of two things far apart, matching or not; else two that have nothing to do with each other."""
    pairs = scenes.far_pairs(scene.things, max(scene.image.size))
    same = [pair for pair in pairs if pair[0].dot == pair[1].dot]
    if pairs and rng.random() < 0.5:
        return [region(scene, rng, [t]) for t in rng.choice(same if same and rng.random() < 0.5 else pairs)]
    return [region(scene, rng, rng.sample(scene.things, rng.choices([1, 2, 0], [0.6, 0.25, 0.15])[0])) for _ in range(2)]


def targets(view, things):
    """(N, 4) class of each patch: shape (last = none), colour, dot, text; -100 where it is not asked."""
    out = np.full((GRID * GRID, len(CLASSES)), -100, np.int64)
    out[:, 0] = len(scenes.SHAPES)
    colours = list(scenes.COLOURS)
    for t in things:
        cells, seen = cells_over(view, t.box, 0.5), visible(view, t.box)
        if seen < 0.35:
            out[cells, 0] = -100
            continue
        out[cells, 0], out[cells, 1] = scenes.SHAPES.index(t.shape), colours.index(t.colour)
        if seen > 0.95:
            out[cells, 2] = colours.index(t.dot)
            out[cells, 3] = TEXTS.index(t.text)
    return out


def make_chunk(path, seed, crowded):
    """CHUNK scenes as arrays: pixels uint8 (n, 3 views, S, S, 3), patch classes, cells of things, questions."""
    pixels = np.zeros((CHUNK, VIEWS, SIDE, SIDE, 3), np.uint8)
    classes = np.zeros((CHUNK, VIEWS, GRID * GRID, len(CLASSES)), np.int8)
    cells = np.zeros((CHUNK, VIEWS, 6, GRID * GRID), bool)
    questions = []
    for i in range(CHUNK):
        rng = random.Random(f"{seed}/{i}")
        scene = crowded_scene(rng) if crowded else scenes.make_scene(rng, FONT_PX, DOT_PX, kind="same" if rng.random() < 0.4 else None)
        w, h = scene.image.size
        side = max(w, h)
        x, y = (side - w) // 2, (side - h) // 2
        views = [[-x, -y, side - x, side - y], *two_regions(scene, rng)]
        for v, view in enumerate(views):
            image = preprocess(scene.image, SIDE) if v == 0 else preprocess_crop(scene.image, view, SIDE)
            pixels[i, v] = ((image * STD + MEAN) * 255).round().byte().permute(1, 2, 0).numpy()
            classes[i, v] = targets(view, scene.things)
            for k, t in enumerate(scene.things[:0 if crowded else 6]):
                if visible(view, t.box) > 0.6:
                    cells[i, v, k] = cells_over(view, t.box)
        if crowded:
            continue
        boxes = [list(t.box) for t in scene.things]
        questions.append([(q["question"], q["answers"][0], [boxes.index(b) for b in q["boxes"]], q["kind"])
                          for q in scenes.all_questions(scene, rng)])
    partial = path.with_suffix(f".{os.getpid()}")
    with open(partial, "wb") as f:
        np.savez(f, pixels=pixels, classes=classes, cells=cells, questions=np.frombuffer(json.dumps(questions).encode(), np.uint8))
    os.replace(partial, path)


def make_pages(path, seed):
    """CHUNK x VIEWS pages, stored like scenes."""
    pixels = np.zeros((CHUNK, VIEWS, SIDE, SIDE, 3), np.uint8)
    classes = np.full((CHUNK, VIEWS, GRID * GRID, len(CLASSES)), -100, np.int8)
    for i in range(CHUNK):
        for v in range(VIEWS):
            image, classes[i, v, :, 3] = page(random.Random(f"{seed}/{i}/{v}"))
            pixels[i, v] = np.asarray(image.resize((SIDE, SIDE), Image.BICUBIC))
    partial = path.with_suffix(f".{os.getpid()}")
    with open(partial, "wb") as f:
        np.savez(f, pixels=pixels, classes=classes, cells=np.zeros((CHUNK, VIEWS, 0)), questions=np.frombuffer(b"[]", np.uint8))
    os.replace(partial, path)


def make_chunks(folder, first, count, stride):
    os.nice(5)
    torch.set_num_threads(1)
    makers = {"crowded": lambda path, n: make_chunk(path, f"pretrain/True/{n}", True),
              "scenes": lambda path, n: make_chunk(path, f"pretrain/{n}", False), "pages": lambda path, n: make_pages(path, f"page/{n}")}
    for n in range(first, count, stride):
        for kind, make in makers.items():
            path = folder / f"{kind}{n:04d}.npz"
            if not path.is_file() and (kind != "pages" or n < 30):
                make(path, n)


def shift(x, dy, dx, fill):
    """x (..., g, g) moved by one cell."""
    out = np.full_like(x, fill)
    out[..., max(dy, 0):GRID + min(dy, 0), max(dx, 0):GRID + min(dx, 0)] = x[..., max(-dy, 0):GRID + min(-dy, 0), max(-dx, 0):GRID + min(-dx, 0)]
    return out


def keep_cores(classes):
    """Ask for a text only in the middle of its thing, where the plate is: three times peel off the outer patches, if that leaves any."""
    text = classes[..., 3].reshape(*classes.shape[:-2], GRID, GRID).copy()
    for _ in range(3):
        inner = text >= 0
        for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            inner &= shift(text, dy, dx, -100) == text
        near = inner.copy()
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                near |= shift(inner, dy, dx, False)
        text[near & ~inner] = -100
    classes[..., 3] = text.reshape(classes.shape[:-1])


class Pool:
    """Chunks of one kind ("scenes", "crowded" or "pages"), read from disk as they appear. Chunk 0 is for validation."""

    def __init__(self, folder, kind):
        self.folder, self.kind, self.chunks, self.names = folder, kind, [], []

    def refresh(self):
        for path in sorted(self.folder.glob(f"{self.kind}????.npz")):
            if path.name not in self.names:
                with np.load(path) as f:
                    chunk = {k: f[k] for k in ("pixels", "classes", "cells")}
                    chunk["questions"] = json.loads(f["questions"].tobytes())
                if self.kind != "pages":
                    keep_cores(chunk["classes"])
                self.names.append(path.name)
                self.chunks.append(chunk)

    def sample(self, rng, b):
        """b scenes as a list of (chunk, row)."""
        return [(self.chunks[rng.randrange(1, len(self.chunks))], rng.randrange(CHUNK)) for _ in range(b)]

    def validation(self, b):
        return [(self.chunks[0], i) for i in range(b)]


def to_pixels(arrays):
    x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255  # (b, 3, S, S)
    return (x - MEAN) / STD


# ------------------------------------------------------------------------------------------ tokeniser

def train_tokenizer(path):
    """BPE on the toy's questions, answers and the system prompt; bytes 3..258, digits apart, as LLaMA's."""
    lines = [SYSTEM + " USER:"] * 50
    for scene, _ in scenes.make_questions("tokeniser", 300):
        lines += [f"USER: {q['question']} ASSISTANT: {q['answers'][0]}" for q in scenes.all_questions(scene, random.Random(0))]
    lines += [f"{word} {word.capitalize()}" for word in (*scenes.WORDS, *scenes.SHAPES, *scenes.COLOURS)] * 20
    lines += ["a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z , . ? ! ' - : ; ( ) \" /"]
    lines += [" ".join("0123456789")] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=(model := io.BytesIO()), model_type="bpe", vocab_size=590, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
        character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2)
    path.write_bytes(model.getvalue())


# -------------------------------------------------------------------------------------- the two phases

class Heads(nn.Module):
    """Linear read-outs that only exist in training: what a patch lies on, which shapes a question names."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Linear(TOWER["hidden_size"], sum(CLASSES))
        self.names = nn.Linear(DECODER["hidden_size"], len(scenes.SHAPES))


def tower_loss(llava, heads, batch, rng):
    """Cross-entropy of what each patch lies on, for one random view of each scene."""
    views = [rng.choice([0, 1, 2]) for _ in batch]
    pixels = to_pixels([c["pixels"][i, v] for (c, i), v in zip(batch, views)])
    wanted = torch.from_numpy(np.stack([c["classes"][i, v] for (c, i), v in zip(batch, views)]).astype(np.int64))  # (b, N, 4)
    logits = heads.patches(llava.vision_tower(pixels)).float().split(CLASSES, -1)
    loss, right = 0.0, []
    for k, part in enumerate(logits):
        right.append(part.argmax(-1) == wanted[..., k])
        if not (wanted[..., k] >= 0).any():  # pages teach texts only
            continue
        weight = torch.ones(CLASSES[k])
        if k == 0:
            weight[-1] = 0.1  # most patches lie on nothing
        loss = loss + F.cross_entropy(part.flatten(0, 1), wanted[..., k].flatten(), weight, ignore_index=-100)
    return loss, torch.stack(right, -1), wanted, views


def tower_report(llava, heads, pool):
    """Share of patches named right on validation scenes: things' shape, dot and text; whole pictures and crops."""
    words = []
    for name, view in (("whole", 0), ("crop", 1)):
        rng = random.Random(0)
        rng.choice = lambda _: view
        _, right, wanted, _ = tower_loss(llava, heads, pool.validation(128), rng)
        on = wanted[..., 0] < len(scenes.SHAPES)
        on &= wanted[..., 0] >= 0
        text = wanted[..., 3] >= 0
        share = [right[..., 0][on], right[..., 2][text], right[..., 3][text]]
        words.append(f"{name} shape {share[0].float().mean():.3f} dot {share[1].float().mean():.3f} text {share[2].float().mean():.3f}")
    return " | ".join(words)


def conversation(llava, questions):
    """Several turns -> ids after the image, and for each answer the row that predicts its first token and its length."""
    pairs = [(q, a) for q, a, _, _ in questions]
    ids = llava.prompt_ids(pairs[-1][0], pairs[:-1])
    ids = ids[ids.index(llava.image_token) + 1:]
    ids += llava.tokenizer.encode(pairs[-1][1]) + [2]
    ends = [i for i, t in enumerate(ids) if t == 2]
    spans = []
    for (q, a), end in zip(pairs, ends):
        n = len(llava.tokenizer.encode(a))
        spans.append((end - n - 1, n + 1))  # the ':' before the answer, and the answer with EOS
    return ids, spans


def decoder_batch(llava, batch, rng, crops, turns=6, first_kind=None, keep=GRID * GRID, about_crop=0.5):
    """Image tokens (whole, then crops), padded text, labels and the cells each answer row should look at."""
    N = GRID * GRID
    views = [0] + rng.sample([1, 2], crops)
    pixels = torch.cat([to_pixels([c["pixels"][i, v] for c, i in batch]) for v in views])
    with torch.no_grad():
        features = llava.vision_tower(pixels).view(len(views), len(batch), N, -1)  # (views, b, N, C)
    cells = torch.from_numpy(np.stack([c["cells"][i][views] for c, i in batch]))  # (b, views, 6, N)
    chosen = [torch.arange(N).expand(len(batch), N)]
    for v in range(1, len(views)):  # Masked Upscaling keeps part of a crop: mostly the tokens on things
        on = cells[:, v].any(1).float() + 0.7 * torch.rand(len(batch), N)
        chosen.append(on.topk(keep, -1).indices.sort(-1).values)
    images = torch.cat([features[v].gather(1, chosen[v][..., None].expand(-1, -1, features.shape[-1])) for v in range(len(views))], 1)
    look = torch.cat([cells[:, v].gather(2, chosen[v][:, None].expand(-1, 6, -1)) for v in range(len(views))], 2)  # (b, 6, columns)
    texts, all_spans, asked = [], [], []
    for row, (c, i) in enumerate(batch):
        questions, nth = list(c["questions"][i]), {}
        rng.shuffle(questions)
        for q in questions:  # the kinds take turns, in random order
            nth[q[0]] = sum(other[3] == q[3] for other in questions[:len(nth)]) + 0.9 * rng.random()
        questions.sort(key=lambda q: nth[q[0]])
        if crops and rng.random() < about_crop:  # ask first what the crop shows
            shown = {k for k in range(6) if cells[row, 1:, k].any()}
            questions.sort(key=lambda q: not (q[2] and set(q[2]) <= shown))
        if first_kind:
            questions = [q for q in questions if q[3] == first_kind] or questions
        ids, spans = conversation(llava, questions[:turns])
        texts.append(ids), all_spans.append(spans), asked.append(questions[:turns])
    width = max(map(len, texts))
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    rows = torch.zeros(len(batch), 5 * turns, dtype=torch.long)
    names = torch.zeros(len(batch), 5 * turns, len(scenes.SHAPES))  # which shapes the row's question names
    gaze = torch.zeros(len(batch), 5 * turns, images.shape[1], dtype=torch.bool)  # (b, rows, columns)
    for b, (text, spans) in enumerate(zip(texts, all_spans)):
        ids[b, :len(text)] = torch.tensor(text)
        r = 0
        for (start, n), q in zip(spans, asked[b]):
            labels[b, start:start + n] = torch.tensor(text[start + 1:start + 1 + n])
            for k in range(n):
                rows[b, r] = start + k
                names[b, r] = torch.tensor([float(shape in q[0].rstrip("?").split()) for shape in scenes.SHAPES])
                if q[2]:
                    gaze[b, r] = look[b, q[2]].any(0)
                r += 1
    return images, ids, labels, rows, gaze, names


def decoder_loss(llava, names_head, batch, rng, aux, **how):
    images, ids, labels, rows, gaze, names = decoder_batch(llava, batch, rng, **how)
    b = len(batch)
    before = [1, *llava.tokenizer.encode(f"{SYSTEM} USER: ")]
    embed = llava.language_model.embed_tokens
    h = torch.cat([embed(torch.tensor(before)).expand(b, -1, -1), llava.multi_modal_projector(images), embed(ids)], 1)  # (b, T, D)
    start, T = len(before), h.shape[1]
    columns = slice(start, start + images.shape[1])
    looking, naming, at = h.new_zeros(()), h.new_zeros(()), 0
    for layer in AUX_LAYERS:
        h = llava.run(h, at, layer)
        at = layer
        if aux > 0:
            block = llava.language_model.layers[layer]
            a, x = block.self_attn, block.input_layernorm(h)
            cos, sin = rope_table(0, T, a.d, DECODER.get("rope_theta", 10000.0), h.device, torch.float32)
            at_rows = rows + columns.stop  # (b, R)
            guess = names_head(h.gather(1, at_rows[..., None].expand(-1, -1, h.shape[-1]))).float()  # (b, R, shapes)
            asked = names.any(-1)
            naming = naming + 10 * F.binary_cross_entropy_with_logits(guess[asked], names[asked])
            q = a.split(a.q_proj(x))[:, :AUX_HEADS]  # (b, 2, T, d)
            q = rotate(q, (cos, sin)).gather(2, at_rows[:, None, :, None].expand(-1, AUX_HEADS, -1, a.d)).float()
            k = rotate(a.split(a.k_proj(x))[:, :AUX_HEADS], (cos, sin))[:, :, columns].float()
            score = (q @ k.mT / a.d ** 0.5).log_softmax(-1)  # (b, 2, R, columns)
            used = gaze.any(-1)[:, None].expand(-1, AUX_HEADS, -1)
            mass = score.masked_fill(~gaze[:, None], float("-inf")).logsumexp(-1)
            looking = looking - mass[used].mean()
    h = llava.run(h, at, DECODER["num_hidden_layers"])[:, columns.stop:]
    wanted = labels >= 0
    logits = llava.head(h[wanted]).float()
    loss = F.cross_entropy(logits, labels[wanted])
    right = torch.ones_like(labels, dtype=torch.bool)
    right[wanted] = logits.argmax(-1) == labels[wanted]
    return loss, (looking + naming) / len(AUX_LAYERS), right.all(-1)


def decoder_report(llava, names_head, pool):
    """First-turn answers right (teacher-forced) on validation scenes, whole picture alone and with a crop that shows the thing."""
    words = []
    for kind in scenes.KINDS:
        share = []
        for crops in (0, 1):
            rng = random.Random(1)
            _, looking, right = decoder_loss(llava, names_head, pool.validation(128), rng, aux=0, crops=crops, turns=1,
                                             first_kind=kind, about_crop=1.0)
            share.append(right.float().mean())
        words.append(f"{kind} {share[0]:.2f}/{share[1]:.2f}")
    return " ".join(words)


# ------------------------------------------------------------------------------------------- the loop

def save_state(path, modules, optimizer, info):
    """Weights, AdamW moments and counters in one safetensors file, written aside and renamed."""
    tensors = {f"{name}.{k}": v.detach().contiguous() for name, m in modules.items() for k, v in m.state_dict().items()}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for k, v in optimizer.state.get(p, {}).items():
            tensors[f"adam.{i}.{k}"] = v.detach().contiguous()
    save_file(tensors, f"{path}.partial", metadata={"info": json.dumps(info)})
    os.replace(f"{path}.partial", path)


def load_state(path, modules, optimizer=None):
    with safe_open(path, framework="pt") as f:
        tensors, info = {k: f.get_tensor(k).clone() for k in f.keys()}, json.loads(f.metadata()["info"])
    for name, m in modules.items():
        m.load_state_dict({k[len(name) + 1:]: v for k, v in tensors.items() if k.startswith(name + ".")})
    if optimizer is not None:
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[p] = {k.split(".")[2]: v for k, v in tensors.items() if k.startswith(f"adam.{i}.")}
    return info


def train(phase, llava, heads, pools, args, log):
    pool, crowded, pages = pools
    steps, b, lr = (args.tower_steps, 32, 2e-3) if phase == "tower" else (args.decoder_steps, 16, 1.6e-3)
    modules = {"llava": llava, "heads": heads}
    trained = [llava.vision_tower, heads] if phase == "tower" else [llava.multi_modal_projector, llava.language_model, llava.lm_head, heads.names]
    llava.requires_grad_(False)
    parameters = [p for m in trained for p in m.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    path, step, seconds = args.work / f"{phase}.safetensors", 0, 0.0
    if path.is_file():
        info = load_state(path, modules, optimizer)
        step, seconds = info["step"], info["seconds"]
    began, mean = time.time(), {}
    kernels = [SDPBackend.MATH] if phase == "tower" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # the faster ones on a CPU
    while step < steps:
        if step % 100 == 0:
            for p in pools:
                p.refresh()
        rng = random.Random(f"{phase}/{step}")
        torch.manual_seed(step)
        warm = min(1, (step + 1) / 200)
        optimizer.param_groups[0]["lr"] = lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        if phase == "decoder":
            batch = pool.sample(rng, b)
        elif step < READ_FIRST * steps:
            batch = pages.sample(rng, b)
        else:
            batch = pool.sample(rng, b // 4) + crowded.sample(rng, b // 2) + pages.sample(rng, b // 4)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(kernels):
            if phase == "tower":
                loss, right, wanted, _ = tower_loss(llava, heads, batch, rng)
                shown = {"loss": loss.item()}
            else:
                aux = max(0.0, 1 - step / (0.8 * steps))  # the push fades, and is gone for the last fifth
                crops = rng.choices([0, 1, 2], [0.4, 0.3, 0.3])[0]
                answer, looking, right = decoder_loss(llava, heads.names, batch, rng, aux, crops=crops, keep=rng.choice([144, rng.randint(24, 100), rng.randint(24, 100)]))
                loss = answer + aux * looking
                shown = {"answer": answer.item(), "all right": right.float().mean().item()}
                if aux > 0:
                    shown["looking"] = looking.item()
        if not math.isfinite(loss.item()):
            sys.exit(f"pretrain.py: the loss is {loss.item()} at step {step} of {phase}; start again with a lower learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        for k, v in shown.items():
            mean[k] = v if k not in mean else 0.98 * mean[k] + 0.02 * v
        if step % 100 == 0 or step == steps:
            line = f"{phase} {step}/{steps} {seconds + time.time() - began:.0f} s lr {optimizer.param_groups[0]['lr']:.1e} " \
                   + " ".join(f"{k} {v:.3f}" for k, v in mean.items())
            if step % 500 == 0 or step == steps:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    line += " || " + (tower_report(llava, heads, pool) if phase == "tower" else decoder_report(llava, heads.names, pool))
                save_state(path, modules, optimizer, {"step": step, "seconds": seconds + time.time() - began})
            print(line, file=log, flush=True)
            print(line, flush=True)


def build(work):
    """config.json, preprocessor_config.json and tokenizer.model in `work`; a LLaVA with fresh weights."""
    if not (work / "tokenizer.model").is_file():
        train_tokenizer(work / "tokenizer.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(work / "tokenizer.model"))
    pieces = tokenizer.get_piece_size()
    text = DECODER | {"vocab_size": (pieces + 2 + 15) // 16 * 16}
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": pieces,
              "pad_token_id": pieces + 1, "projector_hidden_act": "gelu", "vision_feature_layer": -2,
              "vision_feature_select_strategy": "default", "tie_word_embeddings": False, "torch_dtype": "float16",
              "image_seq_length": GRID * GRID, "text_config": text,
              "vision_config": TOWER | {"model_type": "clip_vision_model", "projection_dim": TOWER["hidden_size"]}}
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (work / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIDE}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": MEAN.flatten().tolist(), "image_std": STD.flatten().tolist(), "do_convert_rgb": True}, indent=2) + "\n")
    torch.manual_seed(0)
    sizes, vision, top = read_sizes(work, config)
    llava = LLaVA(sizes, vision, top["image_token"], tokenizer)
    for name, p in llava.named_parameters():
        if p.dim() > 1 and "patch_embedding" not in name:
            nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5 * (0.5 if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")) else 1))
        elif name.endswith("class_embedding"):
            nn.init.normal_(p, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    return llava


def export(llava, work, out):
    """The Hugging Face layout in float16, with the tower's last layer and post_layernorm that are stored and never run."""
    tensors = {}
    for name, p in llava.state_dict().items():
        name = name.replace("language_model.", "language_model.model.").replace("vision_tower.", "vision_tower.vision_model.")
        tensors[name.replace("lm_head", "language_model.lm_head")] = p
    last = TOWER["num_hidden_layers"] - 1
    for name in [n for n in tensors if f"encoder.layers.{last - 1}." in n]:
        tensors[name.replace(f"layers.{last - 1}.", f"layers.{last}.")] = torch.zeros_like(tensors[name])
    for part in ("weight", "bias"):
        tensors[f"vision_tower.vision_model.post_layernorm.{part}"] = torch.zeros(TOWER["hidden_size"])
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(torch.float16).contiguous() for k, v in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "preprocessor_config.json", "tokenizer.model"):
        (out / name).write_bytes((work / name).read_bytes())


def main():
    parser = argparse.ArgumentParser(description="Train the toy LLaVA; run it again to go on.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE.parent.parent / "out" / "pretrain", help="scenes, checkpoints and log of the training")
    parser.add_argument("--out", type=Path, default=HERE / "llava-toy", help="the finished model")
    parser.add_argument("--chunks", type=int, default=45, help=f"how many times {CHUNK} scenes and {CHUNK} crowded ones to draw (64 MB each, in memory)")
    parser.add_argument("--tower-steps", type=int, default=9000)
    parser.add_argument("--decoder-steps", type=int, default=1500)
    args = parser.parse_args()
    (args.work / "chunks").mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(os.cpu_count())
    makers = [multiprocessing.Process(target=make_chunks, args=(args.work / "chunks", k, args.chunks, 2), daemon=True) for k in range(2)]
    for m in makers:
        m.start()
    llava, pools = build(args.work), [Pool(args.work / "chunks", kind) for kind in ("scenes", "crowded", "pages")]
    heads = Heads()
    print(f"{sum(p.numel() for p in llava.parameters()) / 1e6:.2f} million parameters", flush=True)
    while min(len(p.chunks) for p in pools) < min(4, args.chunks):
        time.sleep(2)
        for p in pools:
            p.refresh()
    with open(args.work / "pretrain.log", "a") as log:
        for phase in ("tower", "decoder"):
            train(phase, llava, heads, pools, args, log)
    export(llava, args.work, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

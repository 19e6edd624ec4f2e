

# %% [markdown]
# One question through every equation of SD-RPN (arXiv 2509.16944), on the toy model. Run it whole
# (`python tests/paper/walk.py`, under a minute), or cell by cell in an editor that knows `# %%`.
# The text after `# prints:` is what a cell printed here. Pictures go to out/walk/. Change something
# and run the cell again.

# %% Setup. A frozen model, its recipe, a picture and a question. The RPN takes the output of the
# model's first B layers and adds R layers of its own.
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import numpy as np
import torch
from PIL import Image

from clip import load_image
from data.toy.scenes import ToyQuestions
from model import load
from sdrpn import (RPN, Letterbox, answer, assign_labels, find_regions, load_recipe, prefix_layers,
                   remove_sink_tokens, roi_loss, smooth, teach, upscale)

torch.set_num_threads(1)  # the toy is so small that one thread is fastest
OUT = ROOT / "out" / "walk"
OUT.mkdir(parents=True, exist_ok=True)
m, recipe = load(ROOT / "data/toy/llava-toy", "cpu"), load_recipe(ROOT / "data/toy/llava-toy")
picture = load_image(ROOT / "data/toy/samples/images/00001.png")
question = "What word is on the diamond?"
letterbox = Letterbox.of(m, picture)
grid = letterbox.grid


def save_map(name, values):
    """A map (h, w) as an overlay: the picture stays bright where the map is high."""
    light = letterbox.upsample(values.float() / values.max()).clip(0.15, 1)  # (height, width)
    Image.fromarray((np.array(picture) * light[..., None]).astype(np.uint8)).save(OUT / name)


B, R = recipe.frozen_layers, recipe.rpn_layers
print(picture.size, "pixels,", m.depth, "layers, a grid of", grid, "image tokens; B", B, "R", R)
# prints: (672, 672) pixels, 8 layers, a grid of (12, 12) image tokens; B 3 R 3

# %% Sec. 3.1, the sequence. The picture stands between the system prompt and the question. A
# decoder is causal, so the first two do not depend on the question: they are run once. One id
# stands for the 144 image tokens, which take 144 columns (positions in the sequence).
ids = m.prompt_ids(question)
prefix = m.prefill(m.pixels(picture)[None], keep=prefix_layers(recipe))
print(len(ids), "ids;", "the image's columns:", prefix.columns.start, "to", prefix.columns.stop)
print("then", repr(m.detokenize(m.tail(ids))))
# prints: 46 ids; the image's columns: 33 to 177
# prints: then 'What word is on the diamond? ASSISTANT:'

# %% The plain answer. The toy sees the picture at 168 x 168 pixels. A letter is two pixels wide
# there, and the model guesses.
print(m.generate(picture, question, prefix=prefix))
# prints: egg

# %% Sec. 3.1, Alg. 1 lines 6-10. While it answers, the model looks at the picture. The attention of
# the response tokens to the image tokens, averaged over a few heads, is M_RoI. Of the recipe's four
# heads, number 0 of layers 4 and 5 points at the thing that is asked about; number 1 also parks on
# a sink, as heads of large models do. Those of layer 4 are drawn.
for head in (0, 1):
    one = replace(recipe, attention={4: [head]})
    save_map(f"0-layer-4-head-{head}.png", teach(m, one, None, [ids], prefix=prefix).raw[0].view(grid))
lesson = teach(m, recipe, None, [ids], prefix=prefix)  # the prefix holds the picture
M = lesson.raw[0]  # (N,)
save_map("1-attention.png", M.view(grid))
print("answer:", lesson.responses[0])
print("the brightest cells:", M.topk(3).indices.tolist(), "of", M.numel(), "(a sink, then the diamond)")
# prints: answer: egg
# prints: the brightest cells: [131, 57, 58] of 144 (a sink, then the diamond)

# %% Alg. 1 line 11, Eq. 1, sinks. A few image tokens draw attention whatever is asked. They hold no
# evidence, but their hidden states have larger norms than the others', and that gives them away:
# above tau_norm, here c times the median. The states are those that enter the lowest layer that the
# recipe reads (the paper's H^l). teach() has done the same.
hidden = prefix.hidden[min(recipe.attention)][0, prefix.columns]  # (N, D), entering layer l
norms = hidden.norm(dim=-1)
clean = remove_sink_tokens(M, hidden, recipe.sink.c * norms.median())
assert torch.equal(clean, lesson.clean[0])
print(f"c = {recipe.sink.c}; longest over median: {norms.max() / norms.median():.1f}; "
      f"{(clean < M).sum()} sink")
print(f"attention on sinks: {100 * (1 - clean.sum() / M.sum()):.0f} %")
save_map("2-without-sinks.png", clean.view(grid))
# prints: c = 1.4; longest over median: 1.6; 1 sink
# prints: attention on sinks: 41 %

# %% Alg. 1 line 12, Eq. 2, pseudo-labels. Cells (image tokens on their grid) with at least 0.2 of the
# map's maximum are foreground (#). Cells with at most 0.1 of it, outside the foreground's box, are
# background (.). The others are ignored (?): between the thresholds they are ambiguous, and inside
# the box they may be part of the object. (The lone ? below is the toy's second sink, whose norm is
# only 1.1 times the median.)
labels = assign_labels(clean, grid, tau_fg=0.2, tau_bg=0.1)
for row in labels.view(grid).tolist():
    print("".join({1: "#", 0: ".", -1: "?"}[label] for label in row))
# prints: ............
# prints: ............
# prints: ............
# prints: ........?#?.
# prints: ........###?
# prints: ........###.
# prints: ........?#?.
# prints: ............
# prints: ............
# prints: ............
# prints: ............
# prints: ...?........

# %% Eq. 3-5, the RPN. R blocks, copied from layers B..B+R-1, take the states after the first B
# layers. Eq. 3: R-1 of them run whole. Eq. 4: the last prompt token is the query. Eq. 5: the score
# of a cell is q . k, the mean over heads (over sqrt(d), which the released weights need). Untrained,
# it does not know the region yet.
rpn = RPN.from_layers(m, recipe.frozen_layers, recipe.rpn_layers)
logits = rpn(m, picture, question)  # (h, w)
before = logits.sigmoid()
save_map("3-rpn-untrained.png", before)
print(f"untrained: mean {before.mean():.2f}, on the foreground {before.flatten()[labels == 1].mean():.2f}")
# prints: untrained: mean 0.75, on the foreground 0.59

# %% Alg. 1 line 18, the loss. Binary cross-entropy over the labelled cells alone.
print(f"loss {roi_loss(logits.flatten(), labels).item():.2f}")
# prints: loss 1.55

# %% Alg. 1, the loop. 200 questions about other pictures: the model answers, its attention becomes
# labels, the RPN learns them. No answer and no box of the data set is used. (train.py works in
# batches, and divides by the labelled cells of a whole step; here each sample counts the same.)
optimizer = torch.optim.AdamW(rpn.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0)
for step in range(25):
    for number in range(8 * step, 8 * step + 8):
        shot, q = ToyQuestions("walk", 200)[number]
        taught = teach(m, recipe, m.pixels(shot)[None], [m.prompt_ids(q["question"][0])])
        target = assign_labels(taught.clean, grid)
        scores = rpn.score(taught.hidden, taught.columns, [-1], taught.rope)  # (1, H, 1, N)
        loss = roi_loss(scores.mean(1)[:, 0], target)  # mean over heads, the one query's row
        (loss / 8).backward()
    optimizer.step()
    optimizer.zero_grad()
logits = rpn(m, picture, question)
after = logits.sigmoid()
save_map("4-rpn-trained.png", after)
print(f"trained on 200 questions: mean {after.mean():.2f}, "
      f"on the foreground {after.flatten()[labels == 1].mean():.2f}, "
      f"loss {roi_loss(logits.flatten(), labels).item():.2f}")
# prints: trained on 200 questions: mean 0.05, on the foreground 0.71, loss 0.04

# %% Eq. 6, smoothing and threshold. A Gaussian takes specks away; cells above tau are to be seen
# again. (The sigmoid is the released code's. Padding, which this square picture does not have,
# counts as 0.) The bundled RPN was trained longer, on 1,000 questions.
rpn = RPN.load(ROOT / "data/toy/llava-toy/rpn.safetensors", m)
logits = rpn(m, picture, question)
p = smooth(logits.sigmoid() * letterbox.holds_picture())
save_map("5-smoothed.png", p)
print((p > rpn.tau).sum().item(), "cells above tau", rpn.tau)
# prints: 10 cells above tau 0.25

# %% Eq. 7, regions. Connected cells are a region; its box in cells becomes a box in pixels.
# find_regions() begins at the logits: it does Eq. 6 as well.
regions = find_regions(logits, rpn.tau, letterbox.holds_picture())
for region in regions:
    print("cells", region.box, "pixels", letterbox.to_pixels(region.box))
# prints: cells (8, 3, 12, 6) pixels (448, 168, 672, 336)

# %% Eq. 8, the mask. One crop around all regions is stretched to the square that the tower sees, a
# grid of 12 x 12 again. A cell of the crop becomes a token if more than half of it, interpolated,
# lies in the regions.
(crop,) = upscale(m, picture, letterbox, regions, "mask")
cut = picture.crop(crop.box)
shade = Image.fromarray(np.where(crop.keep, 255, 60).astype(np.uint8)).resize(cut.size)
Image.composite(cut, Image.new("RGB", cut.size), shade).save(OUT / "6-crop.png")
print(crop.keep.sum().item(), "of", crop.keep.numel(), "cells of the crop are kept:", crop.tokens.shape)
# prints: 122 of 144 cells of the crop are kept: torch.Size([122, 160])

# %% Sec. 3.4, the second stage. The crop's tokens go between the image and the question.
result = answer(m, rpn, picture, question, prefix=prefix)
print("plain:", m.generate(picture, question, prefix=prefix), "| two-stage:", result.text)
# prints: plain: egg | two-stage: map

# %% What tau does. Lower: the crop grows and is magnified less, at about the same cost, and in the end
# the model guesses again. A region of more than 39 % of all cells (MAX_AREA) is dropped. Higher:
# nothing is left. Without a region the plain answer stands, and the second stage costs nothing.
for tau in (0.01, 0.05, 0.25, 0.6):
    result = answer(m, rpn, picture, question, tau=tau, prefix=prefix)
    print(f"tau {tau}: {len(result.regions)} region(s), crop {result.boxes}, answer {result.text}")
# prints: tau 0.01: 0 region(s), crop [], answer egg
# prints: tau 0.05: 1 region(s), crop [(336, 112, 672, 504)], answer egg
# prints: tau 0.25: 1 region(s), crop [(448, 168, 672, 336)], answer map
# prints: tau 0.6: 0 region(s), crop [], answer egg

"""Makes Qwen's golden tensors: the outputs of a reference library on the tiny models of qwen_formula.py.

    python tests/golden/make_golden_qwen.py     # in an environment with transformers (5.x), torch, tokenizers, pillow

Writes qwen_tokenizer.json and one qwen_*.safetensors per case beside this file. The project never imports transformers.
The library has no RPN and no second look: RPN scores are worked out in plain torch from its layers, and the second
look is its own answer to a prompt of two images, from which the dropped tokens left together with their positions.

One file holds, for the prompt of T tokens (N = h*w image tokens included), L layers, H heads; float32 unless said:
    ids (T), positions (3, T) int32, rows (some of T), tokens (greedy continuation)
    pixels (3, H, W) uint8, before normalisation; window (N) the tower's order of cells
    tower.n (4N, C) after each block, every fifth row; features (N, 4C) in raster order; projector (N, D)
    layer.0 .. (rows, D) after each decoder layer; logits (rows, vocab); argmax, logsumexp (T)
    attention (L, H, N)      mean over the response tokens fed back, softmax over the whole sequence
    rpn (turns, N)           RPN logits of qwen_formula.rpn_tensors
    two.crop (4) source pixels, two.grid (2), two.keep (h'*w') bool, two.positions (3, T'), two.tokens: the second look
    two.logits (rows, vocab) of two.rows (some of what follows the image)
"""
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from formula import picture
from qwen_formula import (CASES, HERE, NEW_TOKENS, PIECES, PLAIN_SPECIALS, SHORT, SPECIALS, SYSTEM, TINY, prompt,
                          rpn_tensors, write_checkpoint)
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, apply_rotary_pos_emb
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_window_index

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXT = [SYSTEM, "system\n", "user\n", "assistant\n", SHORT.strip()] * 8 + [
    "What color is the car? dark blue. Where is the cat? The red cup is on the left of the table.",
    "Who is the author of this book? How many people are there in the picture? There are two. No, yes.",
    "Is the sign behind the tree? What is written on the sign? What is this? And who is it? Don't you know?"]


def train_tokenizer(path):
    """A byte-level BPE of PIECES tokens with Qwen's splitting rule, then the added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=PIECES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    assert tokenizer.get_vocab_size() == PIECES
    tokenizer.add_special_tokens([t for t in SPECIALS if t not in PLAIN_SPECIALS])
    tokenizer.add_tokens(list(PLAIN_SPECIALS))
    tokenizer.save(str(path), pretty=False)


def encoders():
    """-> tokenizers that do and do not know the added tokens: what a user types is split by the second."""
    full = Tokenizer.from_file(str(HERE / "qwen_tokenizer.json"))
    spec = json.loads((HERE / "qwen_tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["special"]]
    return full, Tokenizer.from_str(json.dumps(spec))


def encode(case, config):
    """-> ids with one image token, and the query tokens: the place of the last prompt token before each answer."""
    full, plain = encoders()
    special = {t: full.token_to_id(t) for t in SPECIALS}
    ids, queries = [], []

    def put(*parts):
        for part in parts:
            ids.extend([special[part]] if part in special else plain.encode(part).ids)

    put("<|im_start|>", f"system\n{SYSTEM}", "<|im_end|>", "\n", "<|im_start|>", "user\n",
        "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    for n, (question, answer) in enumerate([*case["history"], (case["question"], None)]):
        if n:
            put("<|im_end|>", "\n", "<|im_start|>", f"user\n{question}")
        else:
            put(question)
        put("<|im_end|>", "\n", "<|im_start|>", "assistant\n")
        queries.append(len(ids) - 1)
        if answer is not None:
            put(answer)
    if "<|" not in case["question"]:                        # the library's own way, where nothing special is typed
        assert ids == full.encode(prompt(case["question"], case["history"])).ids
    assert special["<|image_pad|>"] == config["image_token_id"]
    return ids, queries


def look(model, picture, budget):
    """The library's pixels of one picture -> (pixel_values, grid_thw)."""
    processor = Qwen2VLImageProcessorPil(size=dict(zip(("shortest_edge", "longest_edge"), budget)))
    seen = processor(picture, return_tensors="pt")
    return seen["pixel_values"], seen["image_grid_thw"]


def unpatch(patches, grid):
    """(4N, 1176) in block order -> (3, H, W) uint8."""
    h, w = grid[0, 1] // 2, grid[0, 2] // 2
    x = patches.view(h, w, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    x = x.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, h * 28, w * 28)
    processor = Qwen2VLImageProcessorPil()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    levels = (x * std + mean) * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    return levels.round().to(torch.uint8)


def embed(model, ids, seen):
    """ids (an image id for each image token) and looks -> inputs_embeds (1, T, D), positions (3, 1, T)."""
    input_ids = torch.tensor([ids])
    image = model.config.image_token_id
    embeds = model.model.language_model.embed_tokens(input_ids)
    for_tower = torch.cat([p for p, _ in seen]), torch.cat([g for _, g in seen])
    tokens = torch.cat(model.model.get_image_features(*for_tower).pooler_output)
    embeds[0, input_ids[0] == image] = tokens
    positions, _ = model.model.get_rope_index(input_ids, (input_ids == image).int(), image_grid_thw=for_tower[1])
    return embeds, positions


def run(model, embeds, positions, **more):
    return model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False, **more)


def greedy(model, embeds, positions, steps):
    """All run again for each token; never one without text -> ids, smallest margin, what was fed, its positions."""
    tokens, margin = [], math.inf
    for _ in range(steps):
        logits = model.lm_head(run(model, embeds, positions).last_hidden_state[0, -1])[:PIECES + len(SPECIALS)]
        best = logits.topk(2)
        tokens.append(best.indices[0].item())
        margin = min(margin, (best.values[0] - best.values[1]).item())
        embeds = torch.cat([embeds, model.model.language_model.embed_tokens(torch.tensor([[tokens[-1]]]))], 1)
        positions = torch.cat([positions, positions.max().expand(3, 1, 1) + 1], 2)
    return tokens, margin, embeds[:, :-1], positions[:, :, :-1]


def rpn_logits(model, config, frozen, layers, hidden, positions, queries, columns):
    """Blocks but the last whole; then its input norm, q and k with biases, rotated, q.k / sqrt(d), mean over heads."""
    text, own = model.model.language_model, rpn_tensors(config, layers)
    rope = text.rotary_emb(hidden, positions)
    T = hidden.shape[1]
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    for n in range(layers):
        block, prefix = Qwen2_5_VLDecoderLayer(text.config, n).eval(), f"model.twig_layers.{n}."
        block.load_state_dict({k.removeprefix(prefix): t for k, t in own.items() if k.startswith(prefix)})
        if n < layers - 1:
            hidden = block(hidden, attention_mask=mask, position_embeddings=rope)
    last, x = block.self_attn, block.input_layernorm(hidden)
    split = lambda y: y.view(1, T, -1, last.head_dim).transpose(1, 2)
    q, k = apply_rotary_pos_emb(split(last.q_proj(x)), split(last.k_proj(x)), *rope)
    groups = last.num_key_value_groups
    scores = [q[0, h, queries] @ k[0, h // groups, columns].T / last.head_dim ** 0.5 for h in range(q.shape[1])]
    return torch.stack(scores).mean(0)                      # (turns, N)


def outputs_of(modules, call):
    """-> call()'s result, and what each of these modules put out meanwhile."""
    kept = {}
    hooks = [module.register_forward_hook(lambda m, a, o, n=n: kept.update({n: o.clone()}))
             for n, module in enumerate(modules)]
    result = call()
    for hook in hooks:
        hook.remove()
    return result, kept


def tower_outputs(tower, patches, thw):
    """The tower's, put back into raster order."""
    projected, states = outputs_of(tower.blocks, lambda: tower(patches, grid_thw=thw))
    window, _ = get_vision_window_index(thw, 2, 112, 14)
    back, N = window.argsort(), len(window)
    raster = [states[n].view(N, -1)[back] for n in range(len(tower.blocks))]
    out = {"pixels": unpatch(patches, thw), "window": window.int(), "features": raster[-1],
           "projector": projected.pooler_output}
    return out | {f"tower.{n}": x.reshape(4 * N, -1)[::5] for n, x in enumerate(raster)}


def first_look(model, config, case, patches, thw):
    """-> the decoder's outputs, ids with an image id for each image token, the image's columns, smallest margin."""
    image, N = config["image_token_id"], int(thw.prod()) // 4
    ids, queries = encode(case, config)
    at = ids.index(image)
    ids = ids[:at] + [image] * N + ids[at + 1:]
    T, columns, queries = len(ids), list(range(at, at + N)), [q + N - 1 for q in queries]
    embeds, positions = embed(model, ids, [(patches, thw)])
    ran, kept = outputs_of(model.model.language_model.layers, lambda: run(model, embeds, positions))
    logits = model.lm_head(ran.last_hidden_state)[0]
    whole = model(input_ids=torch.tensor([ids]), pixel_values=patches, image_grid_thw=thw,
                  mm_token_type_ids=(torch.tensor([ids]) == image).int()).logits[0]
    assert (whole - logits).abs().max() < 1e-5              # the library called as a user would
    rows = sorted({*range(0, T, 12), *columns[::7], *queries, T - 1})
    out = {"ids": torch.tensor(ids).int(), "positions": positions[:, 0].int(), "rows": torch.tensor(rows).int(),
           "logits": logits[rows], "argmax": logits.argmax(-1).int(), "logsumexp": logits.logsumexp(-1)}
    out |= {f"layer.{n}": x[0, rows] for n, x in kept.items()}
    tokens, margin, fed, fed_positions = greedy(model, embeds, positions, NEW_TOKENS)
    seen = run(model, fed, fed_positions, output_attentions=True).attentions
    maps = torch.stack(seen)[:, 0, :, T:]                   # (L, H, response rows, everything)
    assert maps.shape[2] == NEW_TOKENS - 1
    B, R = case["rpn"]
    out |= {"tokens": torch.tensor(tokens).int(), "attention": maps[..., columns].mean(2),
            "rpn": rpn_logits(model, config, B, R, kept[B - 1], positions, queries, columns)}
    return out, ids, columns, margin


def crop_of(case, shot, grid):
    """Regions in cells -> the crop in source pixels (floor, ceil), and the cells of the union inside it."""
    h, w = grid
    cells = np.zeros((h, w), bool)
    for x0, y0, x1, y1 in case["boxes"]:
        cells[y0:y1, x0:x1] = True
    x0, y0, x1, y1 = (f(b[i] for b in case["boxes"]) for i, f in enumerate((min, min, max, max)))
    box = [x0 * shot.width // w, y0 * shot.height // h, -(-x1 * shot.width // w), -(-y1 * shot.height // h)]
    return box, torch.from_numpy(cells[y0:y1, x0:x1])


def second_look(model, config, case, shot, seen, ids, columns):
    """A prompt of two images, from which the dropped tokens leave with their positions -> outputs, smallest margin."""
    box, cells = crop_of(case, shot, (seen[1][0, 1:] // 2).tolist())
    crop = look(model, shot.crop(box), case["budget"])
    h, w = (crop[1][0, 1:] // 2).tolist()
    keep = F.interpolate(cells[None, None].float(), (h, w), mode="bilinear")[0, 0].flatten() > 0.5
    if not keep.any():
        keep[:] = True
    start, end, P = config["vision_start_token_id"], config["vision_end_token_id"], columns[-1] + 1
    ids = ids[:P] + [start] + [config["image_token_id"]] * (h * w) + [end] + ids[P:]
    embeds, positions = embed(model, ids, [seen, crop])
    stay = torch.ones(len(ids), dtype=torch.bool)
    stay[P + 1:P + 1 + h * w] = keep
    embeds, positions = embeds[:, stay], positions[:, :, stay]
    logits = model.lm_head(run(model, embeds, positions).last_hidden_state)[0, P:]
    tokens, margin, _, _ = greedy(model, embeds, positions, NEW_TOKENS)
    rows = sorted({*range(0, len(logits), 7), len(logits) - 1})
    return {"two.crop": torch.tensor(box).int(), "two.grid": torch.tensor([h, w]).int(), "two.keep": keep,
            "two.positions": positions[:, 0].int(), "two.rows": torch.tensor(rows).int(), "two.logits": logits[rows],
            "two.tokens": torch.tensor(tokens).int()}, margin


@torch.no_grad()
def golden(case):
    config = TINY[case["config"]]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, config, budget=case["budget"])
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager").eval()
    shot = picture(*case["picture"])
    patches, thw = look(model, shot, case["budget"])
    out = tower_outputs(model.model.visual, patches, thw)
    more, ids, columns, margin = first_look(model, config, case, patches, thw)
    two, margin_two = second_look(model, config, case, shot, (patches, thw), ids, columns)
    out |= more | two
    smallest = min(margin, margin_two)
    assert smallest > 1e-3, smallest
    for found in (out["tokens"].tolist(), out["two.tokens"].tolist()):
        assert not {PIECES, PIECES + 2} & set(found) and len(set(found)) > 4, found
    h, w = (thw[0, 1:] // 2).tolist()
    notes = dict(prompt=prompt(case["question"], case["history"]), grid=f"{h} {w}", smallest_margin=f"{smallest:.4f}",
                 made_with=f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, "
                           f"tokenizers {tokenizers.__version__}")
    return {name: t.contiguous().clone() for name, t in out.items()}, notes


def main():
    if not (HERE / "qwen_tokenizer.json").exists():         # kept once made: another version may train another one
        train_tokenizer(HERE / "qwen_tokenizer.json")
    for name, case in CASES.items():
        tensors, notes = golden(case)
        path = Path(HERE / f"{name}.safetensors")
        save_file(tensors, path, notes)
        print(f"{path.name}  {path.stat().st_size // 1024} KB  T={len(tensors['ids'])}  grid {notes['grid']}  "
              f"crop {tensors['two.crop'].tolist()} {tensors['two.grid'].tolist()} "
              f"kept {int(tensors['two.keep'].sum())}  std {tensors['logits'].std():.2f}  "
              f"margin {notes['smallest_margin']}\n  tokens {tensors['tokens'].tolist()} "
              f"{tensors['two.tokens'].tolist()}")


if __name__ == "__main__":
    main()

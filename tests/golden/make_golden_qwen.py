"""Makes Qwen's golden tensors: the outputs of a reference library on the tiny models of qwen_formula.py.

    python tests/golden/make_golden_qwen.py     # in an environment with transformers (5.x), torch, tokenizers, pillow

Writes one qwen_*.safetensors per case beside this file. The project never imports transformers.
The library has no RPN and no second look: RPN scores are worked out in plain torch from its layers, and the second
look is its own answer to a prompt of two images, from which the dropped tokens left together with their positions.

One file holds, for the prompt of T tokens (N = h*w image tokens included), L layers, H heads; float32 unless said:
    ids (T), rows (some of T), tokens (greedy continuation)
    pixels (3, H, W) uint8, before normalisation
    tower.n (4N, C) after each block, every fifth row; features (N, 4C) in raster order; projector (N, D)
    layer.0 .. (rows, D) after each decoder layer; logits (rows, vocab); argmax, logsumexp (T)
    attention (L, H, N)      mean over the response tokens fed back, softmax over the whole sequence
    rpn (N)                  RPN logits of qwen_formula.rpn_tensors
    two.crop (4) source pixels, two.keep (h', w') bool, two.tokens: the second look
    two.logits (rows, vocab) of two.rows (some of what follows the image)
"""
import math
import tempfile

import torch
import torch.nn.functional as F
import transformers
from formula import picture
from make_golden import causal
from qwen_formula import CASES, HERE, NEW_TOKENS, PIECES, SPECIALS, TINY, prompt, rpn_tensors, write_checkpoint
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, apply_rotary_pos_emb
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_window_index


def look(picture, budget):
    """The library's pixels of one picture -> (pixel_values, grid_thw), and the grid of tokens (h, w)."""
    size = dict(shortest_edge=budget[0], longest_edge=budget[1])
    pixels, thw = Qwen2VLImageProcessorPil(size=size)(picture, return_tensors="pt").values()
    return (pixels, thw), (thw[0, 1:] // 2).tolist()


def unpatch(patches, grid):
    """(4N, 1176) in block order -> (3, H, W) uint8."""
    x = patches.view(*grid, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    x = x.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, grid[0] * 28, grid[1] * 28)
    processor = Qwen2VLImageProcessorPil()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return ((x * std + mean) * 255).round().to(torch.uint8)


def embed(model, ids, looks):
    """ids (an image id for each image token) and looks -> inputs_embeds (1, T, D), positions (3, 1, T)."""
    input_ids, image = torch.tensor([ids]), model.config.image_token_id
    patches, thw = (torch.cat(parts) for parts in zip(*looks))
    embeds = model.model.language_model.embed_tokens(input_ids)
    embeds[0, input_ids[0] == image] = torch.cat(model.model.get_image_features(patches, thw).pooler_output)
    positions, _ = model.model.get_rope_index(input_ids, (input_ids == image).int(), image_grid_thw=thw)
    return embeds, positions


def run(model, embeds, positions, **more):
    return model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False, **more)


def greedy(model, embeds, count, pieces, given=lambda length: {}):
    """All run again for each token, which must be well ahead of the next; none without text -> ids, what was fed.

    given(length): what else the model takes.
    """
    ids = []
    for _ in range(count):
        best = model(inputs_embeds=embeds, **given(embeds.shape[1])).logits[0, -1, :pieces].topk(2)
        assert best.values[0] - best.values[1] > 1e-3, best.values
        ids.append(best.indices[0].item())
        embeds = torch.cat([embeds, model.get_input_embeddings()(best.indices[None, :1])], 1)
    assert len(set(ids)) > 4, ids
    return torch.tensor(ids).int(), embeds[:, :-1]


def answer(model, embeds, positions):
    """-> ids, what was fed, its positions."""
    def extend(length):
        new = positions.max() + 1 + torch.arange(length - positions.shape[2])
        return torch.cat([positions, new.expand(3, 1, -1)], 2)
    ids, fed = greedy(model, embeds, NEW_TOKENS, PIECES + len(SPECIALS) + 2, lambda n: {"position_ids": extend(n)})
    assert not {PIECES, PIECES + 2} & {*ids.tolist()}  # no end of the answer among them
    return ids, fed, extend(fed.shape[1])


def rpn_logits(model, config, case, hidden, positions, columns):
    """Blocks but the last whole; then its input norm, q and k with biases, rotated, q.k / sqrt(d), mean over heads."""
    text, layers = model.model.language_model, case["rpn"][1]
    rope, own, T = text.rotary_emb(hidden, positions), rpn_tensors(config, layers), hidden.shape[1]
    for n in range(layers):
        block, prefix = Qwen2_5_VLDecoderLayer(text.config, n).eval(), f"model.twig_layers.{n}."
        block.load_state_dict({k.removeprefix(prefix): t for k, t in own.items() if k.startswith(prefix)})
        if n < layers - 1:
            hidden = block(hidden, attention_mask=causal(T), position_embeddings=rope)
    last, x = block.self_attn, block.input_layernorm(hidden)
    q, k = (y.view(1, T, -1, last.head_dim).transpose(1, 2) for y in (last.q_proj(x), last.k_proj(x)))
    q, k = apply_rotary_pos_emb(q, k, *rope)
    k = k.repeat_interleave(last.num_key_value_groups, 1)[0, :, columns]  # (H, N, d)
    return (k @ q[0, :, -1, :, None]).mean(0)[:, 0] / last.head_dim ** 0.5


def outputs_of(modules, call):
    """-> call()'s result, and what each of these modules put out meanwhile."""
    kept = []
    hooks = [module.register_forward_hook(lambda m, a, o: kept.append(o.clone())) for module in modules]
    result = call()
    for hook in hooks:
        hook.remove()
    return result, kept


def tower_outputs(tower, patches, thw):
    """The tower's, put back into raster order."""
    projected, states = outputs_of(tower.blocks, lambda: tower(patches, grid_thw=thw))
    back = get_vision_window_index(thw, 2, 112, 14)[0].argsort()
    raster = [x.view(len(back), -1)[back] for x in states]
    out = {f"tower.{n}": x.reshape(4 * len(x), -1)[::5] for n, x in enumerate(raster)}
    return out | {"features": raster[-1], "projector": projected.pooler_output}


def first_look(model, config, case, seen, N):
    """-> the decoder's outputs, ids with an image id for each image token, the image's columns."""
    image = config["image_token_id"]
    ids = Tokenizer.from_file(str(HERE / "qwen_tokenizer.json")).encode(prompt(case["question"], case["history"])).ids
    at = ids.index(image)
    ids, columns = ids[:at] + [image] * N + ids[at + 1:], [*range(at, at + N)]
    input_ids, (patches, thw) = torch.tensor([ids]), seen
    whole, kept = outputs_of(model.model.language_model.layers, lambda: model(
        input_ids=input_ids, pixel_values=patches, image_grid_thw=thw, mm_token_type_ids=(input_ids == image).int()))
    logits, T = whole.logits[0], len(ids)
    embeds, positions = embed(model, ids, [seen])
    rows = sorted({*range(0, T, 12), *columns[::7], T - 1})
    tokens, fed, fed_positions = answer(model, embeds, positions)
    maps = torch.stack(run(model, fed, fed_positions, output_attentions=True).attentions)  # (L, 1, H, rows, everything)
    out = {"ids": input_ids[0].int(), "rows": torch.tensor(rows).int(), "tokens": tokens, "logits": logits[rows],
           "argmax": logits.argmax(-1).int(), "logsumexp": logits.logsumexp(-1),
           "attention": maps[:, 0, :, T:, columns].mean(2),
           "rpn": rpn_logits(model, config, case, kept[case["rpn"][0] - 1], positions, columns)}
    return out | {f"layer.{n}": x[0, rows] for n, x in enumerate(kept)}, ids, columns


def crop_of(case, shot, grid):
    """Regions in cells -> the crop in source pixels (floor, ceil), and the cells of the union inside it."""
    h, w = grid
    cells = torch.zeros(h, w)
    for x0, y0, x1, y1 in case["boxes"]:
        cells[y0:y1, x0:x1] = 1
    x0, y0, x1, y1 = (f(corner) for f, corner in zip((min, min, max, max), zip(*case["boxes"])))
    box = [x0 * shot.width // w, y0 * shot.height // h, math.ceil(x1 * shot.width / w), math.ceil(y1 * shot.height / h)]
    return box, cells[y0:y1, x0:x1]


def second_look(model, config, case, shot, seen, grid, ids, columns):
    """A prompt of two images, from which the dropped tokens leave with their positions -> outputs."""
    box, cells = crop_of(case, shot, grid)
    crop, (h, w) = look(shot.crop(box), case["budget"])
    keep = F.interpolate(cells[None, None], (h, w), mode="bilinear")[0, 0] > 0.5
    start, end, P = config["vision_start_token_id"], config["vision_end_token_id"], columns[-1] + 1
    ids = ids[:P] + [start] + [config["image_token_id"]] * (h * w) + [end] + ids[P:]
    embeds, positions = embed(model, ids, [seen, crop])
    stay = torch.ones(len(ids), dtype=torch.bool)
    stay[P + 1:P + 1 + h * w] = keep.flatten()
    embeds, positions = embeds[:, stay], positions[:, :, stay]
    logits = model.lm_head(run(model, embeds, positions).last_hidden_state)[0, P:]
    rows = sorted({*range(0, len(logits), 7), len(logits) - 1})
    return {"two.crop": torch.tensor(box).int(), "two.keep": keep, "two.rows": torch.tensor(rows).int(),
            "two.logits": logits[rows], "two.tokens": answer(model, embeds, positions)[0]}


@torch.no_grad()
def golden(case):
    config, shot = TINY[case["config"]], picture(*case["picture"])
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, config, budget=case["budget"])
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager").eval()
    seen, grid = look(shot, case["budget"])
    first, ids, columns = first_look(model, config, case, seen, grid[0] * grid[1])
    return {"pixels": unpatch(seen[0], grid)} | tower_outputs(model.model.visual, *seen) | first | second_look(
        model, config, case, shot, seen, grid, ids, columns)


def write(cases, golden):
    """Write golden(case) of each case to a file beside this one."""
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    for name, case in cases.items():
        tensors = {key: t.contiguous().clone() for key, t in golden(case).items()}
        save_file(tensors, HERE / f"{name}.safetensors", {"made_with": versions})


if __name__ == "__main__":
    write(CASES, golden)

"""Makes deepseek_siglip.safetensors and deepseek_hybrid.safetensors: the tiny models as a reference library runs them.

    python tests/golden/make_golden_deepseek.py       # transformers 5.23, tokenizers, torch, sentencepiece, pillow

The library's deepseek_vl and deepseek_vl_hybrid are ports with other tensor names (SPELLING). They get the project's
own pixels, since the port's processor rounds sides and resizes uint8 where DeepSeek's own code rounds down and resizes
floats. Ids come from `tokenizers`; the crop of stage 2 is put behind the image's tokens by hand, and all is run anew.
"""
import copy
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (DeepseekVLConfig, DeepseekVLForConditionalGeneration, DeepseekVLHybridConfig,
                          DeepseekVLHybridForConditionalGeneration)

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from make_golden import rpn_logits  # noqa: E402
from deepseek_formula import (BOS, CASES, CONFIGS, EOS, HERE, IMAGE, NEW_TOKENS, TOKENIZER, prompt,  # noqa: E402
                              tensors, towers)
from formula import picture  # noqa: E402
from backbones.deepseek_vl import resize_and_pad, to_unit  # noqa: E402

SPELLING = [                                                # ours (deepseek-ai's) -> the port's, in this order
    (r"vision_model\.(high|low)_layer_norm\..*|.*attn_pool.*", ""),
    (r"vision_model\.vision_tower_high\.vision_tower\.", "sam."),
    (r"vision_model\.vision_tower(_low\.vision_tower)?\.", "siglip."),
    (r"siglip\.pos_embed", "model.vision_model.embeddings.position_embedding.weight"),
    (r"siglip\.patch_embed\.proj", "model.vision_model.embeddings.patch_embedding"),
    (r"siglip\.norm\.", "model.vision_model.post_layernorm."),
    (r"siglip\.blocks\.(\d+)\.norm", r"model.vision_model.encoder.layers.\1.layer_norm"),
    (r"siglip\.blocks\.(\d+)\.attn\.proj", r"model.vision_model.encoder.layers.\1.self_attn.out_proj"),
    (r"siglip\.blocks\.(\d+)\.attn\.qkv", r"model.vision_model.encoder.layers.\1.self_attn.qkv"),
    (r"siglip\.blocks\.(\d+)\.mlp", r"model.vision_model.encoder.layers.\1.mlp"),
    (r"sam\.hd_alpha_downsamples", "model.high_res_vision_alpha"),
    (r"sam\.downsamples\.0", "model.high_res_vision_proj.conv1"),
    (r"sam\.downsamples\.1", "model.high_res_vision_proj.conv2"),
    (r"sam\.neck_hd\.", "model.high_res_vision_neck."),
    (r"sam\.neck\.", "model.high_res_vision_model.vision_encoder.neck."),
    (r"neck\.0", "neck.conv1"), (r"neck\.1", "neck.layer_norm1"),
    (r"neck\.2", "neck.conv2"), (r"neck\.3", "neck.layer_norm2"),
    (r"sam\.patch_embed\.proj", "model.high_res_vision_model.vision_encoder.patch_embed.projection"),
    (r"sam\.pos_embed", "model.high_res_vision_model.vision_encoder.pos_embed"),
    (r"sam\.blocks\.(\d+)\.norm", r"model.high_res_vision_model.vision_encoder.layers.\1.layer_norm"),
    (r"sam\.blocks\.", "model.high_res_vision_model.vision_encoder.layers."),
    (r"aligner\.high_up_proj", "model.aligner.high_res_vision_proj"),
    (r"aligner\.low_up_proj", "model.aligner.vision_proj"),
    (r"aligner\.layers\.0", "model.aligner.linear1"), (r"aligner\.layers\.2", "model.aligner.linear2"),
    (r"aligner\.layers\.1", "model.aligner.proj"),
    (r"language_model\.lm_head", "lm_head"), (r"language_model\.model\.", "model.language_model."),
]


def respell(found):
    """{deepseek-ai's name: tensor} -> {the port's name: tensor}; the port holds q, k and v of SigLIP apart."""
    out = {}
    for name, tensor in found.items():
        for ours, theirs in SPELLING:
            name = re.sub("^" + ours if ours[0] != "n" else r"(?<=[._])" + ours, theirs, name)
        if "siglip" in name or not name:
            continue
        if "position_embedding" in name:
            tensor = tensor[0]
        if "self_attn.qkv" in name:
            out |= {name.replace("qkv", f"{part}_proj"): t for part, t in zip("qkv", tensor.chunk(3))}
        else:
            out[name] = tensor
    return out


def reference(config, image_token):
    low, *high = towers(config).values()
    same = dict(hidden_act="gelu", layer_norm_eps=1e-6)
    text = dict(config["language_config"], rms_norm_eps=1e-6, rope_theta=10000.0)
    vision = dict(model_type="siglip_vision_model", hidden_size=low["width"], num_hidden_layers=low["layers"],
                  intermediate_size=low["width"] * low["mlp_ratio"], num_attention_heads=low["heads"],
                  image_size=low["image_size"], patch_size=low["patch_size"], vision_use_head=False, **same)
    common = dict(text_config=text, vision_config=vision, image_token_id=image_token, tie_word_embeddings=False)
    if high:
        c = high[0]
        sam = dict(model_type="sam_vision_model", hidden_size=c["width"], output_channels=c["prompt_embed_dim"],
                   num_hidden_layers=c["layers"], num_attention_heads=c["heads"], image_size=c["image_size"],
                   patch_size=c["patch_size"], window_size=c["window_size"], mlp_dim=4 * c["width"],
                   global_attn_indexes=c["global_attn_indexes"], **same)
        model = DeepseekVLHybridForConditionalGeneration._from_config(
            DeepseekVLHybridConfig(high_res_vision_config=sam, **common), attn_implementation="eager")
    else:
        model = DeepseekVLForConditionalGeneration._from_config(DeepseekVLConfig(**common), attn_implementation="eager")
    model = model.float().eval()
    found = respell(tensors(config))
    for name in set(found) & {"model.high_res_vision_proj.conv1.weight", "model.high_res_vision_proj.conv2.weight",
                              "model.aligner.high_res_vision_proj.weight"}:
        widen(model, name, found[name].shape)
    model.load_state_dict(found)
    return model


def widen(model, name, shape):
    """The port fixes the channels of these layers at 2 and 4 times the neck's: here they are what config.json says."""
    module = model.get_submodule(name.removesuffix(".weight"))
    module.weight = torch.nn.Parameter(torch.empty(shape))


def features(model, unit):
    """unit (3, S, S) in [0, 1] -> {stage: (N, C)}; each tower's picture is made here from the one that is given."""
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    high = (unit[None] - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    size = model.config.vision_config.image_size
    low = unit[None]
    if hasattr(model.model, "high_res_vision_model"):
        low = F.interpolate(low, size=(size, size), mode="bilinear", antialias=True)
        out = model.model.get_image_features((low - 0.5) / 0.5, high, return_dict=True)
        return {"low": out.last_hidden_state[0], "high": out.high_res_vision_last_hidden_state[0],
                "aligner": out.pooler_output[0]}
    out = model.model.get_image_features((low - 0.5) / 0.5, return_dict=True)
    return {"low": out.last_hidden_state[0], "aligner": out.pooler_output[0]}


def greedy(model, embeds, limit, pieces, eos):
    """Greedy ids by running everything anew for each token, and how far the best was ahead of the second."""
    ids, margins = [], []
    for _ in range(limit):
        logits = model(inputs_embeds=embeds).logits[0, -1, :pieces]
        best = logits.topk(2)
        margins.append((best.values[0] - best.values[1]).item())
        if best.indices[0] == eos:
            break
        ids.append(best.indices[0].item())
        embeds = torch.cat([embeds, model.get_input_embeddings()(best.indices[None, :1])], 1)
    return ids, min(margins)


def crop_box(region, grid, size):
    """Cells (x0, y0, x1, y1) of a padded square -> source pixels: outwards to whole pixels, inside the picture."""
    side, (w, h) = max(size), size
    x0, y0, x1, y1 = (cell * side / grid for cell in region)
    left, top = (side - w) // 2, (side - h) // 2
    floor, ceil = lambda v: int(v // 1), lambda v: int(-(-v // 1))
    return (max(0, floor(x0 - left)), max(0, floor(y0 - top)), min(w, ceil(x1 - left)), min(h, ceil(y1 - top)))


@torch.no_grad()
def golden(case):
    config, tokenizer = CONFIGS[case["config"]], Tokenizer.from_file(str(TOKENIZER))
    image_token, eos = tokenizer.token_to_id(IMAGE), tokenizer.token_to_id(EOS)
    model = reference(config, image_token)
    low, *high = towers(config).values()
    size, colour = (high[0]["image_size"], (122, 116, 104)) if high else (low["image_size"], (127, 127, 127))
    grid, shot = low["image_size"] // low["patch_size"], picture(*case["picture"])
    N = grid * grid
    seen = features(model, to_unit(resize_and_pad(shot, size, colour)))
    out = dict(seen)

    # stage 1: the whole picture
    text = prompt(case["question"], case["history"])
    ids = [tokenizer.token_to_id(BOS), *tokenizer.encode(text, add_special_tokens=False).ids]
    at = ids.index(image_token)
    embed = lambda some: model.get_input_embeddings()(torch.tensor(some))                        # noqa: E731
    embeds = torch.cat([embed(ids[:at]), seen["aligner"], embed(ids[at + 1:])])[None]
    T = embeds.shape[1]
    states = model(inputs_embeds=embeds, output_hidden_states=True)
    logits = states.logits[0]
    rows = sorted({*range(0, T, 9), *range(at, at + N, 4), T - 1})
    pieces = tokenizer.get_vocab_size()
    tokens, margin = greedy(model, embeds, NEW_TOKENS, pieces, eos)
    out |= {"input_ids": torch.tensor(ids).int(), "rows": torch.tensor(rows).int(), "logits": logits[rows],
            "argmax": logits.argmax(-1).int(), "logsumexp": logits.logsumexp(-1), "tokens": torch.tensor(tokens).int()}

    # the RPN as a copy of the next layers: the last prompt token against the image
    B, R = case["rpn"]
    decoder = model.model.language_model
    blocks, norm = copy.deepcopy(decoder.layers[B:B + R]), copy.deepcopy(decoder.norm)
    out["rpn.copy"] = rpn_logits(decoder, blocks, norm, states.hidden_states[B], [T - 1], [*range(at, at + N)])[0]

    # stage 2: the crop's kept features behind the image's, everything run anew
    region, cells = case["region"]
    cells = torch.tensor([[float(c) for c in row] for row in cells.split()])
    box = crop_box(region, grid, shot.size)
    cut = to_unit(shot.crop(box).resize((size, size), 2))                                        # 2: PIL's bilinear
    keep = F.interpolate(cells[None, None], size=(grid, grid), mode="bilinear")[0, 0].flatten() > 0.5
    crop = features(model, cut)["aligner"][keep]
    embeds = torch.cat([embeds[0, :at + N], crop, embeds[0, at + N:]])[None]
    logits = model(inputs_embeds=embeds).logits[0]
    tokens_2, margin_2 = greedy(model, embeds, NEW_TOKENS, pieces, eos)
    out |= {"crop.box": torch.tensor(box).int(), "crop.keep": keep.int(), "crop.logits": logits[at + N::3],
            "crop.argmax": logits.argmax(-1).int(), "crop.tokens": torch.tensor(tokens_2).int()}
    assert 0 < keep.sum() < N and len(set(tokens)) > 4 and tokens != tokens_2, (tokens, tokens_2)
    assert min(margin, margin_2) > 1e-3, (margin, margin_2)
    metadata = dict(prompt=text, smallest_margin=f"{min(margin, margin_2):.4f}",
                    made_with=f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}")
    return {name: t.contiguous().clone() for name, t in out.items()}, metadata


def main():
    for name, case in CASES.items():
        tensors_, metadata = golden(case)
        path = HERE / f"{name}.safetensors"
        save_file(tensors_, path, metadata)
        path.chmod(0o644)
        tokens = [tensors_[key].tolist() for key in ("tokens", "crop.tokens")]
        print(f"{path.name}  {path.stat().st_size // 1024} KB  T={len(tensors_['argmax'])}  "
              f"std={tensors_['logits'].std():.2f}  {tokens}  {metadata}")


if __name__ == "__main__":
    main()

"""Makes deepseek_siglip.safetensors and deepseek_hybrid.safetensors: the tiny models as a reference library runs them.

    python tests/golden/make_golden_deepseek.py       # transformers 5.23, tokenizers, torch, sentencepiece, pillow

The library's deepseek_vl and deepseek_vl_hybrid are ports with other tensor names (SPELLING). They get the project's
own pixels, since the port's processor rounds sides and resizes uint8 where DeepSeek's own code rounds down and resizes
floats. Ids come from `tokenizers`; the crop of stage 2 is put behind the image's tokens by hand, and all is run anew.
"""
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import (DeepseekVLConfig, DeepseekVLForConditionalGeneration, DeepseekVLHybridConfig,
                          DeepseekVLHybridForConditionalGeneration)

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from make_golden import rpn_logits  # noqa: E402
from make_golden_qwen import greedy, write  # noqa: E402
from deepseek_formula import (BOS, CASES, CONFIGS, EOS, HERE, IMAGE, NEW_TOKENS, TOKENIZER, prompt,  # noqa: E402
                              tensors, towers)
from formula import picture  # noqa: E402
from backbones.deepseek_vl import resize_and_pad, to_unit  # noqa: E402
from clip import MEAN, STD  # noqa: E402

SPELLING = [  # deepseek-ai's -> the port's, in this order
    (r"^vision_model\.vision_tower_high\.vision_tower\.", "sam."),
    (r"^vision_model\.vision_tower(_low\.vision_tower)?\.", "siglip."),
    (r"^siglip\.pos_embed", "siglip.embeddings.position_embedding.weight"),
    (r"^siglip\.patch_embed\.proj", "siglip.embeddings.patch_embedding"),
    (r"^siglip\.norm\.", "siglip.post_layernorm."),
    (r"^siglip\.blocks\.(\d+)\.attn\.proj", r"siglip.blocks.\1.self_attn.out_proj"),
    (r"^siglip\.blocks\.(\d+)\.attn\.qkv", r"siglip.blocks.\1.self_attn.qkv"),
    (r"^siglip\.blocks", "siglip.encoder.layers"), (r"^siglip\.", "model.vision_model."),
    (r"^sam\.hd_alpha_downsamples", "model.high_res_vision_alpha"),
    (r"^sam\.downsamples\.0", "model.high_res_vision_proj.conv1"),
    (r"^sam\.downsamples\.1", "model.high_res_vision_proj.conv2"),
    (r"^sam\.neck_hd\.", "model.high_res_vision_neck."),
    (r"^sam\.blocks", "sam.layers"), (r"^sam\.patch_embed\.proj", "sam.patch_embed.projection"),
    (r"^sam\.", "model.high_res_vision_model.vision_encoder."),
    (r"neck\.0", "neck.conv1"), (r"neck\.1", "neck.layer_norm1"),
    (r"neck\.2", "neck.conv2"), (r"neck\.3", "neck.layer_norm2"), (r"(layers\.\d+)\.norm", r"\1.layer_norm"),
    (r"^aligner\.high_up_proj", "model.aligner.high_res_vision_proj"),
    (r"^aligner\.low_up_proj", "model.aligner.vision_proj"),
    (r"^aligner\.layers\.0", "model.aligner.linear1"), (r"^aligner\.layers\.2", "model.aligner.linear2"),
    (r"^aligner\.layers\.1", "model.aligner.proj"),
    (r"^language_model\.lm_head", "lm_head"), (r"^language_model\.model\.", "model.language_model."),
]


def respell(found):
    """{deepseek-ai's name: tensor} -> {the port's name: tensor}; the port holds q, k and v of SigLIP apart."""
    out = {}
    for name, tensor in found.items():
        if "attn_pool" in name or "vision_model.high_layer_norm" in name or "vision_model.low_layer_norm" in name:
            continue
        for ours, theirs in SPELLING:
            name = re.sub(ours, theirs, name)
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
    kind, given = DeepseekVLForConditionalGeneration, DeepseekVLConfig(**common)
    for c in high:
        sam = dict(model_type="sam_vision_model", hidden_size=c["width"], output_channels=c["prompt_embed_dim"],
                   num_hidden_layers=c["layers"], num_attention_heads=c["heads"], image_size=c["image_size"],
                   patch_size=c["patch_size"], window_size=c["window_size"], mlp_dim=4 * c["width"],
                   global_attn_indexes=c["global_attn_indexes"], **same)
        kind = DeepseekVLHybridForConditionalGeneration
        given = DeepseekVLHybridConfig(high_res_vision_config=sam, **common)
    model = kind._from_config(given, attn_implementation="eager").float().eval()
    found = respell(tensors(config))
    # The port fixes the channels of these layers at 2 and 4 times the neck's; here they are what config.json says
    for name in ("high_res_vision_proj.conv1", "high_res_vision_proj.conv2", "aligner.high_res_vision_proj"):
        if high:
            module = model.model.get_submodule(name)
            module.weight = torch.nn.Parameter(found[f"model.{name}.weight"])
    model.load_state_dict(found)
    return model


def features(model, unit):
    """unit (3, S, S) in [0, 1] -> {stage: (N, C)}; each tower's picture is made here from the one that is given."""
    low, high = unit[None], []
    if hasattr(model.model, "high_res_vision_model"):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        high = [(low - mean) / std]
        low = F.interpolate(low, size=[model.config.vision_config.image_size] * 2, mode="bilinear", antialias=True)
    out = model.model.get_image_features((low - 0.5) / 0.5, *high, return_dict=True)
    found = {"low": out.last_hidden_state[0], "aligner": out.pooler_output[0]}
    if high:
        found["high"] = out.high_res_vision_last_hidden_state[0]
    return found


def crop_box(region, grid, size):
    """Cells (x0, y0, x1, y1) of a padded square -> source pixels: outwards to whole pixels, inside the picture."""
    side, box = max(size), []
    for corner, cell in enumerate(region):
        length = size[corner % 2]
        at = cell * side / grid - (side - length) // 2
        at = int(at // 1) if corner < 2 else int(-(-at // 1))
        box.append(min(max(at, 0), length))
    return box


def first_look(model, case, whole, tokenizer):
    """The whole picture -> what golden files hold, the embeddings, where the image begins."""
    image_token = tokenizer.token_to_id(IMAGE)
    out = features(model, whole)
    text = prompt(case["question"], case["history"])
    ids = [tokenizer.token_to_id(BOS), *tokenizer.encode(text, add_special_tokens=False).ids]
    at, N = ids.index(image_token), len(out["aligner"])
    words = model.get_input_embeddings()(torch.tensor(ids))
    embeds = torch.cat([words[:at], out["aligner"], words[at + 1:]])[None]
    T = embeds.shape[1]
    states = model(inputs_embeds=embeds, output_hidden_states=True)
    logits, rows = states.logits[0], sorted({*range(0, T, 9), *range(at, at + N, 4), T - 1})
    B, R = case["rpn"]  # a copy of the next layers: the last prompt token against the image
    decoder = model.model.language_model
    rpn = rpn_logits(decoder, decoder.layers[B:B + R], decoder.norm, states.hidden_states[B], [T - 1],
                     [*range(at, at + N)])[0]
    return out | {"input_ids": torch.tensor(ids).int(), "rows": torch.tensor(rows).int(), "logits": logits[rows],
                  "argmax": logits.argmax(-1).int(), "logsumexp": logits.logsumexp(-1), "rpn.copy": rpn}, embeds, at


@torch.no_grad()
def golden(case):
    config, tokenizer = CONFIGS[case["config"]], Tokenizer.from_file(str(TOKENIZER))
    model, pieces = reference(config, tokenizer.token_to_id(IMAGE)), tokenizer.get_vocab_size()
    low, *high = towers(config).values()
    size, colour = (high[0]["image_size"], (122, 116, 104)) if high else (low["image_size"], (127, 127, 127))
    grid, shot = low["image_size"] // low["patch_size"], picture(*case["picture"])
    out, embeds, at = first_look(model, case, to_unit(resize_and_pad(shot, size, colour)), tokenizer)
    out["tokens"], _ = greedy(model, embeds, NEW_TOKENS, pieces)

    # stage 2: the crop's kept features behind the image's, everything run anew
    region, cells = case["region"]
    cells = torch.tensor([[float(c) for c in row] for row in cells.split()])
    box = crop_box(region, grid, shot.size)
    cut = to_unit(shot.crop(box).resize((size, size), 2))  # 2: PIL's bilinear
    keep = F.interpolate(cells[None, None], size=(grid, grid), mode="bilinear")[0, 0].flatten() > 0.5
    crop, P = features(model, cut)["aligner"][keep], at + grid * grid
    embeds = torch.cat([embeds[0, :P], crop, embeds[0, P:]])[None]
    logits = model(inputs_embeds=embeds).logits[0, P:]
    tokens, _ = greedy(model, embeds, NEW_TOKENS, pieces)
    assert not keep.all() and not torch.equal(tokens, out["tokens"])
    assert tokenizer.token_to_id(EOS) not in [*tokens, *out["tokens"]]
    return out | {"crop.box": torch.tensor(box).int(), "crop.keep": keep.int(), "crop.logits": logits[::3],
                  "crop.argmax": logits.argmax(-1).int(), "crop.tokens": tokens}


if __name__ == "__main__":
    write(CASES, golden)

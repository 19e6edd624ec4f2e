"""DeepSeek-VL against another library's outputs (tests/golden/make_golden_deepseek.py), by hand, and from end to end."""
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path[:0] = [str(GOLDEN), str(GOLDEN.parent.parent)]

import infer  # noqa: E402
import train  # noqa: E402
from backbones.deepseek_vl import SAMAttention, SAMBlock, resize_and_pad, to_unit  # noqa: E402
from clip import BadInput  # noqa: E402
from deepseek_formula import CASES, CONFIGS, EOS, IMAGE, SYSTEM, TRUE_CONFIGS, shapes, write_checkpoint  # noqa: E402
from formula import picture  # noqa: E402
from model import KNOWN, FAMILIES, find_checkpoint, load  # noqa: E402
from sdrpn import RPN, Crop, Region, answer, load_recipe  # noqa: E402

RECIPE = dict(attention={"1": [0, 2], "2": None}, softmax="image", sink=dict(kind="norm", c=3.0), frozen=1, layers=2, tau=0.4,
              train=dict(lr=1e-3, warmup=0.1, betas=[0.9, 0.98], epochs=1, batch_size=2, grad_accum=1, clip=1.0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("deepseek")
    return {name: write_checkpoint(root / name, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def models(folders):
    return {name: load(folder, "cpu", "float32") for name, folder in folders.items()}


def golden(name):
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4


# ---- another library

@pytest.mark.parametrize("name", CASES)
def test_prompt_and_logits(models, name):
    """Ids of the rendered prompt and of prompt_ids; towers, aligner, logits, greedy tokens."""
    case, (want, notes) = CASES[name], golden(name)
    m, shot = models[case["config"]], picture(*case["picture"])
    ids = m.prompt_ids(case["question"], case["history"])
    assert ids == m.tokenize(notes["prompt"]) == want["input_ids"].tolist()
    features = m.features(m.pixels(shot)[None])[0]
    if "high" in want:
        close(features[:, :-want["low"].shape[1]], want["high"])
    close(features[:, -want["low"].shape[1]:], want["low"])
    close(m.project(features), want["aligner"])
    logits = m.logits(shot, notes["prompt"])
    close(logits[want["rows"].long()], want["logits"])
    close(logits.logsumexp(-1), want["logsumexp"])
    assert torch.equal(logits.argmax(-1), want["argmax"].long())
    text = m.generate(shot, case["question"], len(want["tokens"]), case["history"])
    assert text == m.detokenize(want["tokens"].tolist())


@pytest.mark.parametrize("name", CASES)
def test_rpn_copied_from_the_next_layers(models, name):
    case, (want, _) = CASES[name], golden(name)
    m = models[case["config"]]
    logits = RPN.from_layers(m, *case["rpn"])(m, picture(*case["picture"]), case["question"], case["history"])
    close(logits.flatten(), want["rpn.copy"])


@pytest.mark.parametrize("name", CASES)
def test_stage_two(models, name):
    """The crop's kept tokens right behind the image: against the library, which ran the whole sequence anew."""
    case, (want, _) = CASES[name], golden(name)
    m, shot, (box, kept) = models[case["config"]], picture(*case["picture"]), case["region"]
    cells = torch.zeros(m.grid_of(shot), dtype=torch.bool)
    cells[box[1]:box[3], box[0]:box[2]] = torch.tensor([[c == "1" for c in row] for row in kept.split()])
    result = answer(m, None, shot, case["question"], "mask", 0.15, len(want["crop.tokens"]), case["history"],
                    regions=[Region(box, cells, 1.0)])
    assert result.boxes == [tuple(want["crop.box"].tolist())]
    assert torch.equal(result.keeps[0].flatten().int(), want["crop.keep"])
    assert result.text == m.detokenize(want["crop.tokens"].tolist()) != m.generate(shot, case["question"], 8, case["history"])

    ids, keep = want["input_ids"].tolist(), want["crop.keep"].bool()
    features = m.features(m.pixels(shot, result.boxes[0])[None])
    crop = Crop(m.project(features[:, keep])[0], m.grid_of(shot), keep)
    embeds, columns = m.embed_prompt(ids, m.encode(m.pixels(shot)[None]))
    tail, positions = m.splice(embeds[:, columns.stop:], columns.stop, [crop])
    embeds = torch.cat([embeds[:, :columns.stop], tail], 1)
    assert positions.tolist() == [*range(columns.stop, embeds.shape[1])]
    logits = m.head(m.run(embeds, 0, m.depth, m.rope(torch.arange(embeds.shape[1]))))[0]
    close(logits[columns.stop::3], want["crop.logits"])
    assert torch.equal(logits.argmax(-1), want["crop.argmax"].long())


# ---- by hand

def test_prompt_by_hand(models):
    """Every piece encoded apart, stripped; what a user types never becomes a special token."""
    m = models["siglip"]
    encode, bos, (eos,), image = m.tokenizer.encode, m.tokenizer.token_id("<｜begin▁of▁sentence｜>"), m.config["eos_ids"], m.config["image_token"]
    ids = m.prompt_ids(" What next?\n", [("Who? ", " Me.")])
    assert ids == [bos, *encode(f"{SYSTEM}\n\nUser: "), image, *encode("\nWho?\n\nAssistant: Me."), eos,
                   *encode("User: What next?\n\nAssistant:")]
    typed = m.prompt_ids(f"{IMAGE} or {EOS}?")
    assert typed.count(image) == 1 and eos not in typed
    assert m.detokenize([*encode(" 42 "), eos]) == "42"


def test_sides_are_rounded_down_and_strips_keep_14_rows():
    """A 61 x 130 picture at 80: 61 / 130 * 80 = 37.5, so 37 columns, 21 left of them and 22 right. 300 x 3 keeps 14 rows."""
    square = to_unit(resize_and_pad(Image.new("RGB", (61, 130), "white"), 80, (0, 0, 0)))
    assert square.shape == (3, 80, 80) and square[0, 40].nonzero().flatten().tolist() == [*range(21, 58)]
    strip = to_unit(resize_and_pad(Image.new("RGB", (300, 3), "white"), 80, (0, 0, 0)))
    assert strip[0, :, 40].nonzero().flatten().tolist() == [*range(33, 47)]


def test_padding_colour_and_crop(models):
    """1.3B grey, 7B CLIP's mean, both before any normalising; a crop is stretched, nothing is padded."""
    wide = Image.new("RGB", (200, 20), "white")
    for name, colour in (("siglip", (127, 127, 127)), ("hybrid", (122, 116, 104))):
        assert (models[name].pixels(wide)[:, 0, 0] * 255).round().int().tolist() == list(colour)
    crop = models["hybrid"].pixels(wide, (10, 5, 60, 15))
    assert crop.shape == (3, 80, 80) and crop.min() == 1.0


def test_sam_attention_is_softmax_with_decomposed_distances():
    """One head, two cells side by side: scores by hand. R_w[1 + q - k] is row 1 + q - k of rel_pos_w."""
    torch.manual_seed(0)
    attention = SAMAttention(4, 1, 2)
    for p in attention.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(1, 2, 2, 4)
    q, k, v = attention.qkv(x.view(4, 4)).chunk(3, -1)
    scores = torch.empty(4, 4)
    for i in range(4):
        for j in range(4):
            rows, columns = i // 2 - j // 2, i % 2 - j % 2
            scores[i, j] = q[i] @ k[j] / 2 + q[i] @ attention.rel_pos_h[rows + 1] + q[i] @ attention.rel_pos_w[columns + 1]
    assert torch.allclose(attention(x), attention.proj(scores.softmax(-1) @ v).view(1, 2, 2, 4), atol=1e-5)


def test_padding_of_sams_windows_attends():
    """A 3 x 3 map in windows of 2: its last cell shares a window with three of padding. Were they masked, it would attend to
    itself alone and the attention's output there would be proj(v) of that cell."""
    torch.manual_seed(0)
    block = SAMBlock(4, 1, 8, window=2, cells=3)
    for p in block.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(1, 3, 3, 4)
    seen = []
    block.attn.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    block(x)
    (windows, out), = seen
    assert windows.shape == (4, 2, 2, 4) and windows[3, 0, 1].abs().max() == 0
    alone = block.attn.proj(block.attn.qkv(windows[3, 0, 0])[8:])
    assert (out[3, 0, 0] - alone).abs().max() > 0.1


def test_true_sizes():
    """Tensors and parameters of the two checkpoints, what nothing reads included but SigLIP's pooling; on no memory."""
    from math import prod
    from backbones.bpe import BPE
    from backbones.deepseek_vl import DeepSeekVL
    for name, tensors, parameters in (("deepseek-vl-1.3b", 529 - 13, 1_975_235_584 - 12_595_200),
                                      ("deepseek-vl-7b", 775 - 17, 7_343_990_017 - 12_595_200 - 4096)):
        config = DeepSeekVL.read_config(Path(name), TRUE_CONFIGS[name])
        with torch.device("meta"):
            m = DeepSeekVL(config, BPE(GOLDEN / "deepseek_tokenizer.json"))
        found = {key: p.shape for key, p in m.named_parameters()}
        assert (len(found), sum(map(prod, found.values()))) == (tensors, parameters)
        wanted = {m.canonical(key): shape for key, shape in shapes(TRUE_CONFIGS[name]).items()}
        assert {key for key in wanted if not m.ignored(key)} == set(found)
        assert all(wanted[key] == shape for key, shape in found.items())
        assert m.grid_of(None) == (24, 24) and config["rms_norm_eps"] == 1e-6 and config["rope_theta"] == 1e4


# ---- checkpoints

def test_shards_and_half_precision(tmp_path, models):
    folder = write_checkpoint(tmp_path / "sharded", CONFIGS["hybrid"], shards=3, dtype=torch.bfloat16)
    m = load(folder, "cpu", "float32")
    ours, theirs = dict(m.named_parameters()), dict(models["hybrid"].named_parameters())
    assert all(torch.equal(ours[key], theirs[key].bfloat16().float()) for key in theirs)
    half = load(folder, "cpu", "bfloat16")
    logits = half.logits(picture(40, 30, 1), half_prompt := golden("deepseek_hybrid")[1]["prompt"])
    assert logits.dtype == torch.bfloat16 and (logits - m.logits(picture(40, 30, 1), half_prompt)).abs().mean() < 0.2


def test_float64(folders):
    m = load(folders["hybrid"], "cpu", "float64")
    want, notes = golden("deepseek_hybrid")
    logits = m.logits(picture(*CASES["deepseek_hybrid"]["picture"]), notes["prompt"])
    assert logits.dtype == torch.float64
    close(logits[want["rows"].long()].float(), want["logits"])


def changed(folder, tmp_path, **change):
    """A copy of a checkpoint; change: {"vision_config.params.width": value}, None deletes."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    for path, value in change.items():
        *outer, last = path.split("__")
        place = config
        for key in outer:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def refused(folder, *words):
    with pytest.raises(BadInput) as e:
        load(folder, "cpu", "float32")
    message = str(e.value)
    assert "\n" not in message and all(word in message for word in (str(folder), *words)), message


@pytest.mark.parametrize("change, words", [
    ({"vision_config__params__model_name": "siglip_so400m_patch14_384"}, ("siglip_so400m_patch14_384", "siglip_large")),
    ({"vision_config__params__model_name": None}, ("tower None",)),
    ({"vision_config__cls": "EVATower"}, ("EVATower",)),
    ({"vision_config__params": 3}, ("vision_config.params",)),
    ({"vision_config": None}, ("vision_config.params",)),
    ({"vision_config__params__width": 0}, ("width = 0",)),
    ({"vision_config__params__heads": 5}, ("multiple of its heads",)),
    ({"vision_config__params__patch_size": 99}, ("smaller than patch_size",)),
    ({"vision_config__params__mlp_ratio": "4"}, ("mlp_ratio",)),
    ({"vision_config__params__select_layer": -2}, ("select_layer",)),
    ({"aligner_config": []}, ("aligner_config.params",)),
    ({"aligner_config__params__projector_type": "linear"}, ("mlp_gelu",)),
    ({"aligner_config__params__n_embed": 99}, ("n_embed",)),
    ({"language_config": None}, ()), ({"language_config__hidden_size": -1}, ("hidden_size",)),
    ({"language_config__num_hidden_layers": 5}, ("9 tensors missing",)),
    ({"language_config__intermediate_size": 99}, ("has shape",)),
    ({"language_config__vocab_size": 300}, ("tokenizer.json", "300 embeddings")),
])
def test_config_that_does_not_fit(folders, tmp_path, change, words):
    refused(changed(folders["siglip"], tmp_path, **change), *words)


@pytest.mark.parametrize("change, words", [
    ({"vision_config__params__high_res_cfg": None}, ("tower None", "sam_b_downsample")),
    ({"vision_config__params__high_res_cfg__model_name": "vit_h"}, ("vit_h",)),
    ({"vision_config__params__high_res_cfg__global_attn_indexes": [5]}, ("global_attn_indexes",)),
    ({"vision_config__params__high_res_cfg__global_attn_indexes": []}, ("global_attn_indexes",)),
    ({"vision_config__params__high_res_cfg__downsample_channels": [8]}, ("downsample_channels",)),
    ({"vision_config__params__high_res_cfg__window_size": 5}, ("rel_pos", "has shape")),
])
def test_sam_that_does_not_fit(folders, tmp_path, change, words):
    refused(changed(folders["hybrid"], tmp_path, **change), *words)


def test_damaged_files(folders, tmp_path):
    copy = changed(folders["siglip"], tmp_path)
    (copy / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    refused(copy, "tokenizer.json", "not byte-level BPE")
    (copy / "tokenizer.json").unlink()
    refused(copy, "tokenizer.json", "missing")
    content = json.loads((folders["siglip"] / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != IMAGE]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    refused(copy, "tokenizer.json", IMAGE)
    shutil.copy(folders["siglip"] / "tokenizer.json", copy)

    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(copy, "truncated")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["aligner.layers.2.bias"]
    save_file(tensors, weights)
    refused(copy, "1 tensors missing", "aligner.layers.2.bias")
    weights.unlink()
    refused(copy, "no model.safetensors")
    (copy / "pytorch_model.bin").write_bytes(b"x")
    refused(copy, "a pickle")
    sharded = write_checkpoint(tmp_path / "sharded", CONFIGS["siglip"], shards=2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "1 of 2 shards missing")


@pytest.mark.parametrize("kind, name", [("deepseek_vl", "1.3b"), ("deepseek_vl_hybrid", "7b")])
def test_ports_are_refused_by_name(tmp_path, kind, name):
    config = {"model_type": kind, "text_config": {}, "vision_config": {}}
    if kind.endswith("hybrid"):
        config["high_res_vision_config"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "port", f"deepseek-ai/deepseek-vl-{name}-chat")


def test_names():
    assert FAMILIES["multi_modality"] == ("backbones.deepseek_vl", "DeepSeekVL")
    for name in ("deepseek-vl-1.3b", "deepseek-vl-7b"):
        with pytest.raises(BadInput, match=f"hf download {KNOWN[name]}"):
            find_checkpoint(KNOWN[name])


def test_no_recipe_names_the_head_finder(folders, tmp_path):
    """The published part is told, for the true sizes only."""
    with pytest.raises(BadInput, match="no released recipe.*tables.py heads --ckpt"):
        load_recipe(folders["siglip"])
    for name, words in (("deepseek-vl-1.3b", "B = 9 and R = 3.*tables.py heads"), ("deepseek-vl-7b", "B = 11 is our guess.*tables.py heads")):
        (tmp_path / "config.json").write_text(json.dumps(TRUE_CONFIGS[name]))
        with pytest.raises(BadInput, match=words):
            load_recipe(tmp_path)

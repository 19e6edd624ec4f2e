"""DeepSeek-VL: stage by stage against another library (golden/make_golden_deepseek.py), by hand, and end to end."""
import json
from math import prod

import pytest
import slow
import torch
from deepseek_formula import (CASES, CONFIGS, EOS, IMAGE, SYSTEM, TOKENIZER, TRUE_CONFIGS, prompt, shapes,
                              write_checkpoint)
from families import ask_three, close, golden, region, second_look
from formula import picture
from PIL import Image

from backbones.bpe import BPE
from backbones.deepseek_vl import DeepSeekVL, resize_and_pad, to_unit
from clip import BadInput
from model import load, read_config, rename
from sdrpn import RPN, load_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{(config name, dtype): model}"""
    root, loaded = tmp_path_factory.mktemp("deepseek"), {}
    for name, config in CONFIGS.items():
        folder = write_checkpoint(root / name, config)
        loaded |= {(name, dtype): load(folder, "cpu", dtype) for dtype in ("float32", "float64")}
    return loaded


@pytest.fixture
def case(request, models):
    """-> a case of the golden files, what they hold for it, its model, its picture."""
    case = CASES[request.param]
    return case, golden(request.param), models[case["config"], "float32"], picture(*case["picture"])


every_case = pytest.mark.parametrize("case", CASES, indirect=True)


# ---- another library

@every_case
def test_towers_aligner_prompt_and_logits(case):
    case, want, m, shot = case
    rendered = prompt(case["question"], case["history"])
    ids = m.prompt_ids(case["question"], case["history"])
    assert ids == slow.tokenize(m, rendered) == want["input_ids"].tolist()
    with torch.no_grad():
        features = m.features(m.pixels(shot)[None])[0]
        close(m.project(features), want["aligner"])
    close(features, torch.cat([want[tower] for tower in ("high", "low") if tower in want], -1))
    logits = slow.logits(m, shot, rendered)
    close(logits[want["rows"].long()], want["logits"])
    close(logits.logsumexp(-1), want["logsumexp"])
    assert torch.equal(logits.argmax(-1), want["argmax"].long())
    text = m.generate(shot, case["question"], len(want["tokens"]), case["history"])
    assert text == m.detokenize(want["tokens"].tolist())


@every_case
def test_rpn_copied_from_the_next_layers(case):
    case, want, m, shot = case
    logits = RPN.from_layers(m, *case["rpn"])(m, shot, case["question"], case["history"])
    close(logits.flatten(), want["rpn.copy"])


@every_case
def test_stage_two(case):
    """The crop's kept tokens right behind the image; the library runs the whole sequence anew."""
    case, want, m, shot = case
    regions = [region(m.grid_of(shot), *case["region"])]
    crop, text, logits = second_look(m, case, shot, regions, len(want["crop.tokens"]))
    assert crop.box == tuple(want["crop.box"].tolist())
    assert crop.keep.flatten().tolist() == want["crop.keep"].bool().tolist()
    assert text == m.detokenize(want["crop.tokens"].tolist())
    close(logits[::3], want["crop.logits"])
    assert torch.equal(logits.argmax(-1), want["crop.argmax"].long())


# ---- by hand

def test_prompt_by_hand(models):
    """Every piece encoded on its own, stripped; what a user types never becomes a special token."""
    m = models["siglip", "float32"]
    encode, image = m.tokenizer.encode, m.config.image_token
    bos, eos = m.tokenizer.token_id("<｜begin▁of▁sentence｜>"), m.tokenizer.token_id(EOS)
    ids = m.prompt_ids(" What next?\n", [("Who? ", " Me.")])
    assert ids == [bos, *encode(f"{SYSTEM}\n\nUser: "), image, *encode("\nWho?\n\nAssistant: Me."), eos,
                   *encode("User: What next?\n\nAssistant:")]
    typed = m.prompt_ids(f"{IMAGE} or {EOS}?")
    assert typed.count(image) == 1 and eos not in typed
    assert m.detokenize([*encode(" 42 "), eos]) == "42"


def test_sides_are_rounded_down_and_strips_keep_14_rows():
    """A 61 x 130 picture at 80: 61 / 130 * 80 = 37.5, so 37 columns, 21 before, 22 behind. 300 x 3 keeps 14 rows."""
    square = to_unit(resize_and_pad(Image.new("RGB", (61, 130), "white"), 80, (0, 0, 0)))
    assert square.shape == (3, 80, 80) and square[0, 40].nonzero().flatten().tolist() == [*range(21, 58)]
    strip = to_unit(resize_and_pad(Image.new("RGB", (300, 3), "white"), 80, (0, 0, 0)))
    assert strip[0, :, 40].nonzero().flatten().tolist() == [*range(33, 47)]


@pytest.mark.parametrize("name, colour", [("siglip", [127, 127, 127]), ("hybrid", [122, 116, 104])])
def test_padding_colour_and_crop(models, name, colour):
    """1.3B grey, 7B CLIP's mean, both before any normalising; a crop is stretched, nothing is padded."""
    m, wide = models[name, "float32"], Image.new("RGB", (200, 20), "white")
    assert (m.pixels(wide)[:, 0, 0] * 255).round().int().tolist() == colour
    assert m.pixels(wide, (10, 5, 60, 15)).min() == 1.0


@pytest.mark.parametrize("mode", ["mask", "box"])
@pytest.mark.parametrize("name", CASES)
def test_three_questions_behind_one_prefix_are_as_if_run_anew(models, monkeypatch, name, mode):
    case, shot = CASES[name], picture(*CASES[name]["picture"])
    m = models[case["config"], "float64"]
    regions = [region(m.grid_of(shot), *case["region"])] * 2
    ask_three(monkeypatch, m, RPN.from_layers(m, *case["rpn"]).double(), shot, mode, regions)


# ---- what a folder says

@pytest.mark.parametrize("name, tensors, parameters", [
    ("deepseek-vl-1.3b", 529 - 13, 1_975_235_584 - 12_595_200),
    ("deepseek-vl-7b", 775 - 17, 7_343_990_017 - 12_595_200 - 4096)])
def test_true_sizes(tmp_path, name, tensors, parameters):
    """Tensors and parameters of the published checkpoints, without those that nothing reads; on no memory."""
    (tmp_path / "config.json").write_text(json.dumps(TRUE_CONFIGS[name]))
    config = read_config(tmp_path)[1]
    with torch.device("meta"):
        m = DeepSeekVL(config, BPE(TOKENIZER))
    found = {key: tuple(p.shape) for key, p in m.named_parameters()}
    assert (len(found), sum(map(prod, found.values()))) == (tensors, parameters)
    stored = {rename(key, m.renames()): shape for key, shape in shapes(TRUE_CONFIGS[name]).items()}
    assert {key: shape for key, shape in stored.items() if key} == found
    assert m.grid_of(None) == (24, 24) and config.rms_norm_eps == 1e-6 and config.rope_theta == 1e4
    with pytest.raises(BadInput, match="B = .*tables.py heads"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("file, place, change, says", [
    ("config.json", "vision_config/params", {"concat_type": "add"}, "concat_type = add"),
    ("config.json", "vision_config/params/high_res_cfg", {"model_name": "vit_h"}, "model_name = vit_h"),
    ("config.json", "vision_config/params/high_res_cfg", {"pixel_mean": [0.5, 0.5, 0.5]}, "pixel_mean"),
    ("config.json", "aligner_config/params", {"projector_type": "linear"}, "projector_type = linear"),
    ("config.json", "language_config", {"model_type": "mistral"}, "model_type = mistral"),
    ("preprocessor_config.json", "", {"do_normalize": True}, "do_normalize = True"),
    ("preprocessor_config.json", "", {"background_color": [0, 0, 0]}, "background_color")])
def test_what_is_not_done_is_refused_by_name(tmp_path, file, place, change, says):
    folder = write_checkpoint(tmp_path, CONFIGS["hybrid"])
    content = json.loads((folder / file).read_text())
    inner = content
    for key in place.split("/") if place else ():
        inner = inner[key]
    inner |= change
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(BadInput, match=says):
        load(folder)


def test_an_answer_ends_as_the_files_say_else_the_tokeniser(tmp_path):
    m = load(write_checkpoint(tmp_path, CONFIGS["siglip"]))
    assert m.config.eos_ids == [m.tokenizer.token_id(EOS)]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load(tmp_path).config.eos_ids == [7, 8]

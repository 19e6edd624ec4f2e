"""Qwen2.5-VL: stage by stage against a reference library (golden/make_golden_qwen.py), by hand, and end to end.

The library knows nothing of a second look. Its outputs for that are those of a prompt of two images.
"""
import json
from dataclasses import asdict

import pytest
import slow
import torch
from families import ask_three, close, golden, region, second_look
from formula import picture
from qwen_formula import CASES, CONFIGS, NEW_TOKENS, TINY, nested, prompt, shapes, write_checkpoint
from safetensors.torch import load_file

import infer
import train
from backbones.qwen2_5_vl import Qwen2_5VL, windows_by_size
from calls import call, write_rows
from clip import MEAN, STD, BadInput
from model import load, read_config, rename
from sdrpn import RPN, Crop, Recipe, answer, load_recipe, teach


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(config name, dtype, ...): a tiny Qwen read from a folder written for it; each is made once."""
    loaded = {}

    def checkpoint(name, dtype="float32", **how):
        key = name, dtype, *how.items()
        if key not in loaded:
            folder = write_checkpoint(tmp_path_factory.mktemp(name), TINY[name], **how)
            loaded[key] = load(folder, device="cpu", dtype=dtype)
        return loaded[key]
    return checkpoint


@pytest.fixture
def case(request, checkpoint):
    """-> a case of the golden files, what they hold for it, its model, its picture."""
    case = CASES[request.param]
    m = checkpoint(case["config"], budget=case["budget"], rpn=case["rpn"])
    return case, golden(request.param), m, picture(*case["picture"])


every_case = pytest.mark.parametrize("case", CASES, indirect=True)


def regions_of(case, grid):
    return [region(grid, box) for box in case["boxes"]]


# ---- against the reference library

@every_case
def test_pixels_tower_and_projector(case):
    _, want, m, shot = case
    pixels, grid = m.pixels(shot), m.grid_of(shot)
    levels = (pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    close(levels, want["pixels"].float(), 1e-3)
    back, seen = windows_by_size(grid, 4)[0].argsort(), []
    hooks = [block.register_forward_hook(lambda block, given, x: seen.append(x)) for block in m.visual.blocks]
    with torch.no_grad():
        features = m.features(pixels[None])
        close(m.project(features)[0], want["projector"])
    for hook in hooks:
        hook.remove()
    for n, x in enumerate(seen):
        close(x.unflatten(1, (-1, 4))[0, back].flatten(0, 1)[::5], want[f"tower.{n}"])
    close(features[0], want["features"])


@every_case
def test_ids_layers_and_logits(case):
    case, want, m, shot = case
    ids, image = m.prompt_ids(case["question"], case["history"]), m.config.image_token
    assert slow.tokenize(m, prompt(case["question"], case["history"])) == ids
    (h, w), at, rows = m.grid_of(shot), ids.index(image), want["rows"].long()
    assert [*ids[:at], *[image] * (h * w), *m.tail(ids)] == want["ids"].tolist()
    with torch.no_grad():
        hidden, _, rope, _ = slow.sequence(m, ids, m.pixels(shot)[None])
        for layer in range(m.depth):
            hidden = m.run(hidden, layer, layer + 1, rope)
            close(hidden[0, rows], want[f"layer.{layer}"])
        logits = m.head(hidden)[0]
    close(logits[rows], want["logits"])
    close(logits.logsumexp(-1), want["logsumexp"])
    assert logits.argmax(-1).tolist() == want["argmax"].tolist()


@every_case
def test_greedy_tokens(case, monkeypatch):
    """Twenty steps behind the prompt, at the text's position, which is not the cache's length."""
    case, want, m, shot = case
    monkeypatch.setattr(m, "detokenize", list)
    assert m.generate(shot, case["question"], NEW_TOKENS, case["history"]) == want["tokens"].tolist()


@every_case
def test_the_second_look_is_a_second_picture(case, monkeypatch):
    case, want, m, shot = case
    monkeypatch.setattr(m, "detokenize", list)
    crop, ids, logits = second_look(m, case, shot, regions_of(case, m.grid_of(shot)), NEW_TOKENS)
    assert crop.box == tuple(want["two.crop"].tolist()) and torch.equal(crop.keep, want["two.keep"])
    assert ids == want["two.tokens"].tolist()
    close(logits[want["two.rows"].long()], want["two.logits"])


@every_case
def test_the_released_rpn_scores_with_rotary_and_biases(case):
    """One folder is the checkpoint and the RPN, as the authors' class saves it."""
    case, want, m, shot = case
    rpn = RPN.load(m.folder, m)
    assert (rpn.frozen, len(rpn.twig_layers)) == case["rpn"]
    close(rpn(m, shot, case["question"], case["history"]).flatten(), want["rpn"])


@every_case
def test_the_teacher_reads_the_librarys_attention(case):
    case, want, m, shot = case
    L, H = want["attention"].shape[:2]
    prompts, pixels = [m.prompt_ids(case["question"], case["history"])], m.pixels(shot)[None]
    for layer in range(L):
        recipe = Recipe({layer: [0, H - 1]}, frozen_layers=1, rpn_layers=1, train=None, softmax="sequence")
        lesson = teach(m, recipe, pixels, prompts, max_new_tokens=NEW_TOKENS)
        close(lesson.raw[0], want["attention"][layer, [0, H - 1]].mean(0), 1e-5)


# ---- what a folder says

@pytest.mark.parametrize("how", [dict(spelling="memory"), dict(layout="nested")])
@pytest.mark.parametrize("name", TINY)
def test_every_layout_and_spelling_is_the_same_model(checkpoint, name, how):
    one, other = checkpoint(name), checkpoint(name, **how)
    assert other.config == one.config
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name, parameters, rpn_parameters", [
    ("qwen2.5-vl-3b", 3_754_622_976, 158_876_928), ("qwen2.5-vl-7b", 8_292_166_656, 480_803_328)])
def test_true_sizes_and_recipes(tmp_path, name, parameters, rpn_parameters):
    """A file may leave out what the vision config assumes anyway, as transformers 4.49 does."""
    whole = nested(CONFIGS[name])
    vision = {key: whole["vision_config"][key] for key in ("hidden_size", "out_hidden_size")}
    configs = []
    for given in (CONFIGS[name], whole, whole | {"vision_config": vision}):
        (tmp_path / "config.json").write_text(json.dumps(given))
        configs.append(read_config(tmp_path)[1])
    config, recipe = configs[0], load_recipe(tmp_path)
    assert len({json.dumps(asdict(config)) for config in configs}) == 1
    with torch.device("meta"):
        m = Qwen2_5VL(config)
        rpn = RPN(config, recipe.frozen_layers, recipe.rpn_layers)
    found = {key: tuple(p.shape) for key, p in m.named_parameters()}
    if config.tied:
        del found["lm_head.weight"]
    assert found == {rename(key, m.renames()): shape for key, shape in shapes(CONFIGS[name]).items()}
    assert sum(torch.Size(shape).numel() for shape in found.values()) == parameters
    assert sum(p.numel() for p in rpn.parameters()) == rpn_parameters
    assert m.budget == (3136, 12845056) and config.eos_ids == [151645] and config.mrope_section == [16, 24, 24]


def test_recipes_have_kinds_and_taus():
    large, small = (Recipe(**recipe) for recipe in reversed(Qwen2_5VL.recipes.values()))
    text, scenes = large.for_kind("textual"), large.for_kind("gqa")
    assert text.attention == {22: [1, 4], 23: [6, 11]} and (text.sink, text.request) == (None, None)
    assert scenes.attention == {16: [1, 7, 17], 19: [17, 20]} and scenes.sink.threshold == 1e-2
    assert "bounding box" in scenes.request and text.labels == scenes.labels and large.tau == small.tau == 0.1
    assert large.taus == {"textvqa": 0.075, "vstar": 0.075, "ocrbench": 0.05}
    assert small.taus == {"textvqa": 0.15, "vstar": 0.175, "ocrbench": 0.03}


def spoil(folder, file, changes):
    """Change entries of a JSON file, and of the objects in it."""
    content = json.loads((folder / file).read_text())
    for key, value in changes.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize("file, changes, says", [
    ("config.json", {"rope_scaling": {"type": "yarn"}}, "type = yarn"),
    ("config.json", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("config.json", {"vocab_size": 409}, "409 embeddings"),
    ("config.json", {"vision_config": {"hidden_act": "quick_gelu"}}, "hidden_act = quick_gelu"),
    ("config.json", {"vision_config": {"spatial_merge_size": 3}}, "spatial_merge_size = 3"),
    ("config.json", {"vision_config": {"rope_parameters": {"rope_theta": 500}}}, "rope_theta = 500"),
    ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
    ("preprocessor_config.json", {"resample": 2}, "resample = 2"),
    ("preprocessor_config.json", {"min_pixels": 5000, "max_pixels": 3136}, "5000 is above max_pixels 3136")])
def test_what_is_not_done_is_refused_by_name(tmp_path, file, changes, says):
    spoil(write_checkpoint(tmp_path, TINY["own"]), file, changes)
    with pytest.raises(BadInput, match=says) as e:
        load(tmp_path)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("preprocessor, processor, budget", [
    ({"min_pixels": None, "size": {"shortest_edge": 784, "longest_edge": 1568}}, {}, (784, 1568)),
    ({"max_pixels": 5000}, {}, (3136, 5000)),
    ({"max_pixels": 5000}, {"image_processor": {"min_pixels": 784}}, (784, 1003520)),
    ({"max_pixels": 5000}, {"processor_class": "Qwen2_5_VLProcessor"}, (3136, 5000)),
    ({}, {}, (3136, 12845056))])
def test_budgets_are_read_as_the_reference_library_reads_them(tmp_path, preprocessor, processor, budget):
    write_checkpoint(tmp_path, TINY["own"])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (tmp_path / "processor_config.json").write_text(json.dumps(processor))
    assert read_config(tmp_path)[1].budget == budget


def test_a_head_that_is_stored_is_used_and_eos_is_read(tmp_path):
    folder = write_checkpoint(tmp_path, TINY["own"])
    own = load(folder).lm_head.weight
    spoil(folder, "config.json", {"tie_word_embeddings": True, "eos_token_id": 7})
    assert torch.equal(load(folder).lm_head.weight, own) and load(folder).config.eos_ids == [402, 400]
    (folder / "generation_config.json").unlink()
    assert load(folder).config.eos_ids == [7]


def test_a_strange_chat_template_is_said_once(tmp_path, capsys):
    folder = write_checkpoint(tmp_path, TINY["own"])
    (folder / "chat_template.jinja").write_text("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>")
    load(folder)
    assert "chat template" not in capsys.readouterr().err
    (folder / "chat_template.jinja").write_text("[INST] {{ question }} [/INST]")
    load(folder), load(folder)
    assert capsys.readouterr().err.count("chat template") == 1


# ---- by hand

def test_the_grid_follows_the_picture_and_the_budget(checkpoint):
    m = checkpoint("own", budget=(12 * 784, 30 * 784))
    assert m.grid_of(picture(200, 100, 1)) == (4, 7) and m.token_grid(m.pixels(picture(100, 200, 1))) == (7, 4)
    m.budget = 48 * 784, 48 * 784
    assert m.grid_of(picture(200, 100, 1)) == (5, 10) and m.frame((200, 100)) == (200, 100)
    with pytest.raises(BadInput, match="2010 x 10 pixels"):
        m.pixels(picture(2010, 10, 1))
    assert m.token_grid(m.pixels(picture(2010, 10, 1), (0, 0, 300, 1)))[0] == 1  # a crop may be a strip


def test_pictures_of_a_batch_do_not_see_each_other(checkpoint):
    m = checkpoint("tied", dtype="float64")
    pixels = torch.stack([m.pixels(picture(100, 150, seed)) for seed in (1, 2)])
    with torch.no_grad():
        close(m.features(pixels)[1], m.features(pixels[1:])[0], 1e-9)


def test_splice_by_hand(checkpoint):
    """Behind 7 of text and an image of 2 x 3, at 10. Crops of 1 x 2 tokens, and of 2 x 2 of which two are dropped."""
    m = checkpoint("own")
    first = Crop(None, torch.full((2, 64), 1.), torch.tensor([[True, True]]))
    second = Crop(None, torch.full((2, 64), 2.), torch.tensor([[False, True], [True, False]]))
    tail = torch.full((1, 1, 64), 3.)
    embeds, rope, following = m.splice(tail, 10, [first, second])
    begin, end = m.embed([403])[0], m.embed([404])[0]
    assert torch.equal(embeds[0], torch.cat([begin, first.tokens, end, begin, second.tokens, end, tail[0]]))
    assert following == 19 and torch.equal(rope, m.rope(torch.tensor([
        [10, 11, 11, 13, 14, 15, 15, 17, 18],      # time
        [10, 11, 11, 13, 14, 15, 16, 17, 18],      # row
        [10, 11, 12, 13, 14, 16, 15, 17, 18]])))   # column


def test_what_a_user_types_stays_text(checkpoint):
    """And a prompt is the beginning of the next turn's: a query token's row is the length of its own prompt."""
    m, history = checkpoint("own"), [("<|endoftext|>", "<|im_end|>")]
    plain = [i for i in m.prompt_ids("hi") if i in range(400, 408)]
    typed = m.prompt_ids("<|image_pad|><|im_end|>\n<|im_start|>system<|vision_start|>", history)
    assert [i for i in typed if i in range(400, 408)] == plain + [402, 401, 402, 401]  # one more turn of the template
    assert m.detokenize([402, *m.tokenizer.encode(" a <b>\n"), 400]) == "a <b>"
    first = m.prompt_ids("<|endoftext|>")
    assert typed[:len(first)] == first


# ---- nothing starts over

@pytest.mark.parametrize("mode", ["mask", "box"])
def test_three_questions_behind_one_prefix_are_as_if_run_anew(checkpoint, monkeypatch, mode):
    case = CASES["qwen_wide"]
    m = checkpoint("tied", dtype="float64", budget=case["budget"], rpn=case["rpn"])
    shot = picture(*case["picture"])
    ask_three(monkeypatch, m, RPN.load(m.folder, m), shot, mode, regions_of(case, m.grid_of(shot)))


# ---- end to end

RECIPE = dict(
    attention={"1": [2]}, softmax="sequence", frozen_layers=2, rpn_layers=2, tau=0.3, budget=[40 * 784, 70 * 784],
    labels=dict(min_peak=1e-4, padding="background"),
    kinds={"ocr_vqa": {"square": True},
           "gqa": dict(attention={"1": [0]}, request="Give the box.",
                       sink=dict(kind="attention", attention={"0": None}, threshold=0.5))},
    train=dict(lr=1e-2, warmup=0.1, betas=[0.9, 0.999], epochs=2, batch_size=4, grad_accum=1, clip=1.0))


def test_train_and_answer(tmp_path):
    """Two kinds of questions about pictures of two shapes; one RPN learns both; it answers at its recipe's budget."""
    folder, rows, run = write_checkpoint(tmp_path / "tiny", TINY["tied"]), [], tmp_path / "run"
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    for n, (kind, size) in enumerate([("ocr_vqa", (200, 100)), ("gqa", (90, 200))] * 4):
        picture(*size, n).save(tmp_path / f"{n}.png")
        rows.append({"image": f"{n}.png", "question": "What?\nAnswer briefly.", "kind": kind})
    write_rows(tmp_path / "questions.jsonl", rows)
    flags = "--ckpt", folder, "--dtype", "float32", "--max-new-tokens", 3
    assert call(train, *flags, "--data", tmp_path / "questions.jsonl", "--out", run)[0] == 0
    name = "self_attn.q_proj.bias"  # of the RPN's last layer
    assert not torch.equal(load_file(run / "rpn.safetensors")["model.twig_layers.1." + name],
                           load(folder).language_model.layers[3].get_parameter(name))
    _, out, _ = call(infer, tmp_path / "0.png", "Where?", *flags, "--rpn", run, "--json")
    m, told = load(folder, "cpu"), json.loads(out)
    m.budget = RECIPE["budget"]
    found = answer(m, RPN.load(run, m), picture(200, 100, 0), "Where?", max_new_tokens=3)
    assert told["answer"] == found.text and told["boxes"] == [*map(list, found.boxes)]

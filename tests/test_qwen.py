"""Qwen2.5-VL: against a reference library's outputs (made by golden/make_golden_qwen.py), by hand, and end to end.

The library knows nothing of a second look: its outputs for that are those of a prompt of two images.
"""
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]

from formula import picture  # noqa: E402
from qwen_formula import (CASES, CONFIGS, NEW_TOKENS, TINY, nested, prompt, rpn_tensors, shapes,  # noqa: E402
                          write_checkpoint)

import infer  # noqa: E402
import train  # noqa: E402
from backbones.qwen2_5_vl import RECIPES, Qwen2_5VL, smart_resize, windows, windows_by_size  # noqa: E402
from clip import MEAN, STD, BadInput  # noqa: E402
from model import Crop, KVCache, load  # noqa: E402
from sdrpn import (RPN, Region, answer, assign_labels, load_recipe, recipe_faults,  # noqa: E402
                   recipe_for, teach)


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
    name = request.param
    with safe_open(ROOT / "tests" / "golden" / f"{name}.safetensors", framework="pt") as f:
        want = {key: f.get_tensor(key) for key in f.keys()}
    case = CASES[name]
    m = checkpoint(case["config"], budget=case["budget"], rpn=case["rpn"])
    return case, want, m, picture(*case["picture"])


every_case = pytest.mark.parametrize("case", CASES, indirect=True)


def regions_of(case, grid):
    """The case's boxes as regions that fill them."""
    found = []
    for x0, y0, x1, y1 in case["boxes"]:
        cells = torch.zeros(grid, dtype=torch.bool)
        cells[y0:y1, x0:x1] = True
        found.append(Region((x0, y0, x1, y1), cells, 1.0))
    return found


def expanded(m, ids, N):
    at = ids.index(m.config["image_token"])
    return ids[:at] + [m.config["image_token"]] * N + ids[at + 1:]


# ---- against the reference library

@every_case
def test_pixels_and_the_tower(case):
    _, want, m, shot = case
    pixels = m.pixels(shot)
    levels = (pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    assert (levels - want["pixels"]).abs().max() < 1e-3
    assert torch.cat(windows(m.grid_of(shot), 4)).tolist() == want["window"].tolist()
    grid, blocks, seen = m.grid_of(shot), m.visual.blocks, {}
    order, _ = windows_by_size(grid, 4)
    hooks = [block.register_forward_hook(lambda b, a, x, n=n: seen.update({n: x})) for n, block in enumerate(blocks)]
    with torch.no_grad():
        features = m.features(pixels[None])
        tokens = m.project(features)
    for hook in hooks:
        hook.remove()
    for n, x in seen.items():
        raster = x.unflatten(1, (-1, 4))[0, order.argsort()].flatten(0, 1)
        assert (raster[::5] - want[f"tower.{n}"]).abs().max() < 1e-4, f"block {n}"
    assert (features[0] - want["features"]).abs().max() < 1e-4
    assert (tokens[0] - want["projector"]).abs().max() < 1e-4


@every_case
def test_ids_positions_and_logits(case):
    case, want, m, shot = case
    ids = m.prompt_ids(case["question"], case["history"])
    h, w = m.grid_of(shot)
    assert expanded(m, ids, h * w) == want["ids"].tolist()
    if "<|" not in case["question"]:
        assert m.tokenize(prompt(case["question"], case["history"])) == ids
    positions, rows = m.positions(ids, (h, w)), want["rows"].long()
    assert positions.tolist() == want["positions"].tolist()
    with torch.no_grad():
        hidden, _ = m.embed_prompt(ids, m.encode(m.pixels(shot)[None]))
        rope = m.rope(positions)
        for layer in range(m.depth):
            hidden = m.run(hidden, layer, layer + 1, rope)
            assert (hidden[0, rows] - want[f"layer.{layer}"]).abs().max() < 1e-4, f"layer {layer}"
        logits = m.head(hidden)[0]
    assert (logits[rows] - want["logits"]).abs().max() < 1e-4
    assert (logits.logsumexp(-1) - want["logsumexp"]).abs().max() < 1e-4
    assert logits.argmax(-1).tolist() == want["argmax"].tolist()


@every_case
def test_greedy_tokens(case, monkeypatch):
    """Twenty steps behind the prompt: at the text's position, which is not the cache's length."""
    case, want, m, shot = case
    monkeypatch.setattr(m, "detokenize", list)
    assert m.generate(shot, case["question"], NEW_TOKENS, case["history"]) == want["tokens"].tolist()


@every_case
def test_the_second_look_is_a_second_picture(case, monkeypatch):
    case, want, m, shot = case
    seen = {}

    def keep(embeds, start, crops):
        seen["spliced"], seen["positions"] = Qwen2_5VL.splice(m, embeds, start, crops)
        return seen["spliced"], seen["positions"]

    monkeypatch.setattr(m, "detokenize", list)
    monkeypatch.setattr(m, "splice", keep)
    found = answer(m, None, shot, case["question"], max_new_tokens=NEW_TOKENS, history=case["history"],
                   regions=regions_of(case, m.grid_of(shot)))
    assert found.boxes == [tuple(want["two.crop"].tolist())]
    assert [keep.shape for keep in found.keeps] == [tuple(want["two.grid"].tolist())]
    assert found.keeps[0].flatten().tolist() == want["two.keep"].tolist()
    assert seen["positions"].tolist() == want["two.positions"][:, -seen["positions"].shape[1]:].tolist()
    with torch.no_grad():  # everything once more and at once, for all logits behind the image
        ids = m.prompt_ids(case["question"], case["history"])
        embeds, columns = m.embed_prompt(ids, m.encode(m.pixels(shot)[None]))
        embeds = torch.cat([embeds[:, :columns.stop], seen["spliced"]], 1)
        hidden = m.run(embeds, 0, m.depth, m.rope(want["two.positions"].long()))
        logits = m.head(hidden)[0, columns.stop:]
    assert (logits[want["two.rows"].long()] - want["two.logits"]).abs().max() < 1e-4
    assert found.text == want["two.tokens"].tolist()


@every_case
def test_the_released_rpn_scores_with_rotary_and_biases(case):
    """One folder is the checkpoint and the RPN, as the authors released it."""
    case, want, m, shot = case
    rpn = RPN.load(m.folder, m)
    assert (rpn.frozen, len(rpn.twig_layers)) == case["rpn"]
    got = rpn(m, shot, case["question"], case["history"])
    assert got.shape == m.grid_of(shot)
    assert (got.flatten() - want["rpn"][-1]).abs().max() < 1e-4
    own = rpn_tensors(TINY[case["config"]], case["rpn"][1])
    assert {f"model.{name}" for name, _ in rpn.named_parameters()} < set(own)  # no twig_norm, no twig_head


@every_case
def test_the_teacher_reads_the_librarys_attention(case):
    case, want, m, shot = case
    L, H = want["attention"].shape[:2]
    prompts, pixels = [m.prompt_ids(case["question"], case["history"])], m.pixels(shot)[None]
    for layer in range(L):
        recipe = dict(frozen=1, attention={str(layer): [0, H - 1]}, softmax="sequence", sink=None)
        lesson = teach(m, recipe, pixels, prompts, max_new_tokens=NEW_TOKENS)
        assert (lesson.raw[0] - want["attention"][layer, [0, H - 1]].mean(0)).abs().max() < 1e-5


# ---- a checkpoint's forms

@pytest.mark.parametrize("spelling", ["hub", "memory"])
@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize("name", TINY)
def test_every_layout_and_spelling_is_the_same_model(checkpoint, spelling, layout, name):
    ask = picture(70, 61, 5), prompt("What is this?")
    one, other = checkpoint(name), checkpoint(name, spelling=spelling, layout=layout, budget_keys="size")
    assert torch.equal(other.logits(*ask), one.logits(*ask))
    assert other.config == one.config and other.budget == one.budget


@pytest.mark.parametrize("name, parameters", [("qwen2.5-vl-3b", 3_754_622_976), ("qwen2.5-vl-7b", 8_292_166_656)])
def test_true_sizes_and_recipes(tmp_path, name, parameters):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    config = Qwen2_5VL.read_config(tmp_path, nested(CONFIGS[name])) | {"model_type": "qwen2_5_vl"}
    with torch.device("meta"):
        m = Qwen2_5VL(config)
        recipe = RECIPES["qwen2_5_vl", m.depth, config["hidden_size"]]
        rpn = RPN(config, recipe["frozen"], recipe["layers"])
    mine = {key: tuple(p.shape) for key, p in m.named_parameters()}
    if config["tied"]:
        del mine["lm_head.weight"]
    assert mine == {m.canonical(key): shape for key, shape in shapes(CONFIGS[name]).items()}
    assert sum(torch.Size(shape).numel() for shape in mine.values()) == parameters
    assert m.budget == (3136, 12845056) and config["eos_ids"] == [151645] and config["mrope_section"] == [16, 24, 24]
    for kind in ("ocr_vqa", "gqa", None):
        assert not recipe_faults(recipe_for(recipe, kind), m.depth, config["num_attention_heads"])
    used = {"qwen2.5-vl-3b": 158_876_928, "qwen2.5-vl-7b": 480_803_328}
    assert sum(p.numel() for p in rpn.parameters()) == used[name]


def test_a_recipe_has_kinds():
    recipe = RECIPES["qwen2_5_vl", 28, 3584]
    text, scenes = recipe_for(recipe, "ocr_vqa"), recipe_for(recipe, "gqa")
    assert text["attention"] == {"22": [1, 4], "23": [6, 11]} and text["sink"] is None and "request" not in text
    assert scenes["attention"] == {"16": [1, 7, 17], "19": [17, 20]} and scenes["sink"]["threshold"] == 1e-2
    assert "bounding box" in scenes["request"] and text["labels"] == scenes["labels"]
    assert recipe_for(recipe, "textual") == text and recipe_for(recipe, "natural") == scenes


# ---- by hand

@pytest.mark.parametrize("size, grids", [  # (height, width) -> cells under three budgets
    ((480, 640), [(17, 23), (21, 28), (28, 37)]),
    ((336, 336), [(12, 12), (24, 24), (32, 32)]),
    ((42, 70), [(2, 2), (19, 31), (25, 42)])])
def test_budgets(size, grids):
    budgets = (3136, 12845056), (451584, 451584), (802816, 3211264)
    assert [tuple(side // 28 for side in smart_resize(*size, budget)) for budget in budgets] == grids


def test_the_grid_follows_the_picture_and_the_budget(checkpoint):
    m = checkpoint("own", budget=(12 * 784, 30 * 784))
    assert m.grid_of(picture(200, 100, 1)) == (4, 7) and m.grid_of(picture(100, 200, 1)) == (7, 4)
    m.budget = 48 * 784, 48 * 784
    assert m.grid_of(picture(200, 100, 1)) == (5, 10) and m.token_grid(m.pixels(picture(100, 200, 1))) == (10, 5)
    assert m.frame((200, 100)) == (200, 100)
    m.budget = 12 * 784, 30 * 784
    crop = m.pixels(picture(200, 100, 1), (150, 10, 151, 90))  # 1 x 80 pixels: thin, and still within reason
    assert m.token_grid(crop)[1] == 1


def test_a_token_sees_its_window_and_no_further(checkpoint):
    """One changed pixel: in a windowed block only its window's tokens change; full attention spreads it."""
    m = checkpoint("own")
    pixels = torch.zeros(1, 3, 5 * 28, 6 * 28)
    changed = pixels.clone()
    changed[0, 0, 0, 5 * 28] = 1  # token 5: window 4 5 10 11 16 17 22 23
    seen = []
    with torch.no_grad():
        for whole in (set(), {1}):
            m.visual.whole, before = whole, m.visual.whole
            difference = (m.features(changed) - m.features(pixels))[0].abs().amax(-1)  # (30,)
            m.visual.whole = before
            seen.append(difference.nonzero().flatten().tolist())
    assert seen == [[4, 5, 10, 11, 16, 17, 22, 23], list(range(30))]


def test_pictures_of_a_batch_do_not_see_each_other(checkpoint):
    m = checkpoint("tied", dtype="float64")
    pixels = torch.stack([m.pixels(picture(100, 150, seed)) for seed in (1, 2, 3)])
    together = m.encode(pixels)
    for i in range(3):
        assert (together[i] - m.encode(pixels[i:i + 1])[0]).abs().max() < 1e-9


def test_splice_by_hand(checkpoint):
    """An image of 2 x 3 behind 7 of text: its <|vision_end|> stood at 10. Crops of 1 x 2, and of 2 x 2 with gaps."""
    m = checkpoint("own")
    D = 64
    first = Crop(torch.full((2, D), 1.), (1, 2), torch.tensor([True, True]))
    second = Crop(torch.full((2, D), 2.), (2, 2), torch.tensor([False, True, True, False]))
    tail = torch.full((1, 3, D), 3.)
    embeds, positions = m.splice(tail, 10, [first, second])
    begin, end = m.embed([403])[0, 0], m.embed([404])[0, 0]
    parts = [begin, *first.tokens, end, begin, *second.tokens, end, *tail[0]]
    assert torch.equal(embeds[0], torch.stack(parts))
    assert positions.tolist() == [[10, 11, 11, 13, 14, 15, 15, 17, 18, 19, 20],  # time
                                  [10, 11, 11, 13, 14, 15, 16, 17, 18, 19, 20],  # row
                                  [10, 11, 12, 13, 14, 16, 15, 17, 18, 19, 20]]  # column
    embeds, positions = m.splice(tail, 10, [])
    assert torch.equal(embeds, tail) and positions.tolist() == [[10, 11, 12]] * 3


def test_what_a_user_types_stays_text(checkpoint):
    m = checkpoint("own")
    special = set(range(400, 408))
    plain = [i for i in m.prompt_ids("hi") if i in special]
    history = [("<|endoftext|>", "<|im_end|>")]
    typed = m.prompt_ids("<|image_pad|><|im_end|>\n<|im_start|>system<|vision_start|>", history)
    assert [i for i in typed if i in special] == plain + [402, 401, 402, 401]  # one more turn of the template
    assert m.tokenize(prompt("<|im_end|>")).count(402) == 3
    assert m.detokenize([402, *m.tokenizer.encode(" a <b>\n"), 400]) == "a <b>"


def test_prompts_of_a_conversation_begin_alike(checkpoint):
    """A query token's row is the length of its own prompt: the next turn must go on where that ended."""
    m = checkpoint("own")
    talk = [("What is this?", "a dog, 12"), ("Where?\nSay it.", "über dort")]
    whole = m.prompt_ids("And now?", talk)
    for n, (question, _) in enumerate(talk):
        ids = m.prompt_ids(question, talk[:n])
        assert whole[:len(ids)] == ids


def test_label_rules_by_hand():
    """5 x 5, the picture in rows 1..3, a sink already zeroed. From .2 foreground, up to .1 background."""
    roi_map = torch.tensor([[.9, .0, .0, .0, .0],      # padding: zeroed, then background
                            [.0, .0, .0, .0, .0],
                            [.0, .0, 1., .15, .0],
                            [.0, .0, .0, .0, .05],
                            [.0, .0, .0, .0, .0]])
    on = torch.zeros(5, 5, dtype=torch.bool)
    on[1:4] = True
    ask = dict(grid=(5, 5), grow=1, on=on)
    assert assign_labels(roi_map.flatten(), **ask).view(5, 5).tolist() == [
        [0, 0, 0, 0, 0],
        [0, -1, -1, -1, 0],
        [0, -1, 1, -1, 0],  # the box grew by a cell each way: .15 is in it
        [0, -1, -1, -1, 0],
        [0, 0, 0, 0, 0]]
    assert assign_labels(4e-3 * roi_map.flatten(), min_peak=5e-3, **ask).unique().tolist() == [-1]
    assert assign_labels(6e-3 * roi_map.flatten(), min_peak=5e-3, **ask).unique().tolist() == [-1, 0, 1]
    corners = torch.zeros(5, 5)
    corners[1, 0] = corners[2, 2] = 1.  # box 3 x 2, grown 4 x 4 but for the edge: rows 0..3, columns 0..3 = 16 of 25
    assert assign_labels(corners.flatten(), **ask).unique().tolist() == [-1]
    assert 1 in assign_labels(corners.flatten(), grid=(5, 5), on=on)


# ---- stage 2

@pytest.mark.parametrize("mode, boxes", [("mask", 2), ("box", 2), ("mask", 0)])
def test_stage_2_goes_on_from_stage_1(checkpoint, monkeypatch, mode, boxes):
    """Equal to a stage 2 that runs every token through every layer again, in float64; the picture is not square."""
    case = CASES["qwen_wide"]
    m = checkpoint("tied", dtype="float64", budget=case["budget"], rpn=case["rpn"])
    shot, last, shifts = picture(*case["picture"]), {}, {}

    def decode(hidden, cache, position, most):
        last["reused"], shifts["position"] = hidden, position + cache.shift
        return Qwen2_5VL.decode(m, hidden, cache, position, most)

    def splice(tail, start, crops):
        last["spliced"] = Qwen2_5VL.splice(m, tail, start, crops)
        return last["spliced"]

    monkeypatch.setattr(m, "decode", decode)
    monkeypatch.setattr(m, "splice", splice)
    regions = regions_of(case, m.grid_of(shot))[:boxes]
    found = answer(m, RPN.load(m.folder, m), shot, case["question"], mode, max_new_tokens=4, regions=regions)
    ids = m.prompt_ids(case["question"])
    with torch.no_grad():
        embeds, columns = m.embed_prompt(ids, m.encode(m.pixels(shot)[None]))
        positions = m.positions(ids, m.grid_of(shot))
        if boxes:
            new, places = last["spliced"]
            embeds = torch.cat([embeds[:, :columns.stop], new], 1)
            positions = torch.cat([positions[:, :columns.stop], places], 1)
        hidden = m.run(embeds, 0, m.depth, m.rope(positions))[:, -1]
    assert (hidden - last["reused"]).abs().max() < 1e-9
    assert shifts["position"] == positions.max() + 1
    assert len(found.boxes) == {"mask": min(boxes, 1), "box": boxes}[mode]


def test_the_next_position_is_not_the_caches_length(checkpoint):
    m = checkpoint("own")
    shot = picture(168, 56, 1)  # 2 x 6 tokens
    assert m.grid_of(shot) == (2, 6)
    seen = {}
    m.decode = lambda hidden, cache, position, most: seen.update(shift=cache.shift) or [[]]
    m.generate(shot, "hi", 4)
    del m.decode
    assert seen["shift"] == 6 - 12
    assert KVCache(m, 1, 8).shift == 0


# ---- end to end

SIZES = (200, 100), (100, 200), (150, 150), (300, 120), (90, 200), (180, 170)
RECIPE = dict(
    attention={"1": [2]}, softmax="sequence", sink=None, frozen=2, layers=2, tau=0.3, budget=[40 * 784, 70 * 784],
    labels=dict(grow=0, min_peak=1e-4, padding="background"),
    kinds={"ocr_vqa": {"square": True},
           "gqa": dict(attention={"1": [0]}, request="Give the box.",
                       sink=dict(kind="attention", attention={"0": None}, threshold=0.5))},
    train=dict(lr=1e-2, warmup=0.1, betas=[0.9, 0.999], epochs=2, batch_size=4, grad_accum=1, clip=1.0))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny Qwen with a recipe of two kinds; pictures of six shapes, two questions each, and a conversation."""
    folder = tmp_path_factory.mktemp("world")
    write_checkpoint(folder / "tiny-qwen", TINY["tied"], budget=(20 * 784, 60 * 784))
    (folder / "tiny-qwen" / "recipe.json").write_text(json.dumps(RECIPE))
    rows = []
    for n, size in enumerate(SIZES):
        picture(*size, n).save(folder / f"{n}.png")
        ask = f"What is number {n}?\nAnswer the question using a single word or phrase."
        rows += [dict(image=f"{n}.png", question=ask, kind=kind) for kind in ("gqa", "ocr_vqa")]
    rows.append(dict(image="1.png", question=["Is it red?", "And the cat?"], kind="ocr_vqa"))
    rows = [row | dict(id=f"q{n}", answers=["a"]) for n, row in enumerate(rows)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def training(world, out, *more):
    return [str(word) for word in (
        "--ckpt", world / "tiny-qwen", "--data", world / "questions.jsonl", "--out", out, "--device", "cpu",
        "--dtype", "float64", "--max-new-tokens", 3, "--save-every", 0, *more)]


def worker(rank, port, folder, argv):
    os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    sys.stderr = open(folder / "said", "a", buffering=1)
    train.ROOT = folder  # where out/last goes
    torch.set_num_threads(1)
    train.main(argv)


def both(world, folder):
    """train.py in two processes, with the variables that torchrun sets."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=worker, args=(rank, port, folder, training(world, folder / "two"))) for rank in "01"]
    for process in running:
        process.start()
    return running


def test_the_teacher_may_be_asked_alike_where_the_student_is_not(world, tmp_path, monkeypatch):
    """A request replaces the line "Answer ...": samples may share the teacher's prompt and not the student's. A strip
    that is padded for the teacher is left out of report.png, since the student's own view of it is refused."""
    monkeypatch.setattr(train, "ROOT", tmp_path)
    picture(4200, 20, 1).save(world / "strip.png")
    rows = [dict(image="strip.png", question="Why?", kind="ocr_vqa"),
            dict(image="1.png", question="What is it?\nAnswer briefly.", kind="gqa"),
            dict(image="1.png", question="What is it?", kind="gqa")]
    (world / "alike.jsonl").write_text("".join(json.dumps(row | {"answers": ["a"]}) + "\n" for row in rows))
    train.main(training(world, tmp_path / "run", "--data", world / "alike.jsonl"))
    assert (tmp_path / "run/report.png").is_file() and not (tmp_path / "run/skipped.jsonl").exists()
    assert (tmp_path / "out/last").read_text() == f"{tmp_path / 'run'}\n"


def test_two_processes_stopped_and_resumed_train_one_rpn(world, tmp_path, monkeypatch, capsys):
    """Killed in the middle and run again, two processes learn what one learns; then infer.py answers with it."""
    monkeypatch.setattr(train, "ROOT", tmp_path)
    train.main(training(world, tmp_path / "one"))
    log = tmp_path / "two" / "log.jsonl"
    running = both(world, tmp_path)
    while not log.exists() or log.read_text().count("\n") < 3:
        assert all(process.is_alive() for process in running), (tmp_path / "said").read_text()
        time.sleep(0.005)
    for process in running:
        process.kill()
        process.join()
    assert not (tmp_path / "two" / "rpn.safetensors").exists()
    running = both(world, tmp_path)
    for process in running:
        process.join(300)
    said = (tmp_path / "said").read_text()
    assert [process.exitcode for process in running] == [0, 0] and "going on at step" in said, said
    one, two = (load_file(tmp_path / name / "rpn.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and "model.twig_norm.weight" not in one
    assert "model.twig_layers.1.self_attn.q_proj.bias" in one
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-9
    losses = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(losses) == 8 and sum(row["tokens"] for row in losses) > 100 and losses[-1]["loss"] < losses[0]["loss"]

    m = load(world / "tiny-qwen", dtype="float64")
    rpn = RPN.load(tmp_path / "two", m)
    for n, size in enumerate(SIZES):
        shot = picture(*size, n)
        found = answer(m, rpn, shot, "Where is it?", tau=0.15, max_new_tokens=3)
        assert found.logits.shape == m.grid_of(shot)
        assert all(0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1] for x0, y0, x1, y1 in found.boxes)

    capsys.readouterr()
    for n, budget in (0, None), (3, (20 * 784, 60 * 784)):
        flags = ["--ckpt", world / "tiny-qwen", "--rpn", tmp_path / "two", "--dtype", "float64", "--tau", 0.15,
                 "--json", "--max-new-tokens", 3, "--save", tmp_path / f"{n}.png"]
        flags += ["--budget", *budget] if budget else []
        infer.main([str(word) for word in (world / f"{n}.png", "Where is it?", *flags)])
        told = json.loads(capsys.readouterr().out)
        m.budget = budget or load_recipe(m.folder)["budget"]  # an RPN belongs to its recipe's budget
        found = answer(m, rpn, picture(*SIZES[n], n), "Where is it?", tau=0.15, max_new_tokens=3)
        assert found.boxes  # both look again
        assert told["answer"] == found.text and told["boxes"] == [list(box) for box in found.boxes]
        assert (tmp_path / f"{n}.png").stat().st_size > 1000


# ---- bad input: one line that names the file and the remedy

def spoil(folder, file, changes):
    """Change entries of a JSON file, nested ones as "a/b"; None takes one out."""
    content = json.loads((folder / file).read_text())
    for path, value in changes.items():
        *parents, key = path.split("/")
        place = content
        for parent in parents:
            place = place[parent]
        place[key] = value
        if value is None:
            del place[key]
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize("file, changes, says", [
    ("config.json", {"rope_theta": None}, "rope_theta = None"),
    ("config.json", {"rope_scaling": None}, "not what a qwen2_5_vl model has"),
    ("config.json", {"rope_scaling/type": "yarn"}, "rotary scaling yarn"),
    ("config.json", {"rope_scaling/mrope_section": [2, 3, 4]}, "mrope_section"),
    ("config.json", {"rope_scaling/mrope_section": "2 3 3"}, "mrope_section"),
    ("config.json", {"use_sliding_window": True}, "use_sliding_window"),
    ("config.json", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("config.json", {"hidden_act": "gelu"}, "hidden_act"),
    ("config.json", {"vocab_size": 409}, "410 tokens"),
    ("config.json", {"image_token_id": 405}, "image_token_id 405"),
    ("config.json", {"image_token_id": None}, "image_token_id None"),
    ("config.json", {"vision_config": []}, "not what a qwen2_5_vl model has"),
    ("config.json", {"vision_config/depth": None}, "depth = None"),
    ("config.json", {"vision_config/depth": 100000}, "depth"),
    ("config.json", {"vision_config/num_heads": 5}, "head size"),
    ("config.json", {"vision_config/spatial_merge_size": 3}, "spatial_merge_size"),
    ("config.json", {"vision_config/fullatt_block_indexes": None}, "fullatt_block_indexes"),
    ("config.json", {"vision_config/window_size": 14}, "window_size"),
    ("config.json", {"vision_config/out_hidden_size": 72}, "out_hidden_size"),
    ("config.json", {"hidden_size": 72}, "mrope_section"),
    ("config.json", {"intermediate_size": 91}, "not of one model"),
    ("config.json", {"tie_word_embeddings": True, "num_hidden_layers": 6}, "missing"),
    ("generation_config.json", {"eos_token_id": "402"}, "eos_token_id"),
    ("generation_config.json", {"eos_token_id": []}, "eos_token_id"),
    ("preprocessor_config.json", {"min_pixels": 5000, "max_pixels": 3136}, "smaller one first"),
    ("preprocessor_config.json", {"max_pixels": None}, "max_pixels None"),
    ("tokenizer.json", {"added_tokens": []}, "<|im_start|>"),
    ("tokenizer.json", {"model/type": "Unigram"}, "tokenizer.json"),
])
def test_a_spoiled_checkpoint_is_one_line(tmp_path, file, changes, says):
    folder = write_checkpoint(tmp_path / "tiny", TINY["own"])
    spoil(folder, file, changes)
    with pytest.raises(BadInput) as e:
        load(folder)
    line = str(e.value)
    assert says in line and str(folder) in line and "\n" not in line and len(line) < 400


def test_a_checkpoint_without_a_tokenizer(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny", TINY["own"])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="tokenizer.json: missing"):
        load(folder)


def test_a_budget_in_a_newer_file_or_in_none(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny", TINY["own"])
    (folder / "preprocessor_config.json").unlink()
    assert load(folder).budget == (3136, 12845056)
    (folder / "processor_config.json").write_text(json.dumps(
        {"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 1568}}}))
    assert load(folder).budget == (784, 1568)


def test_a_budget_is_no_part_of_the_model(tmp_path):
    """An RPN that was trained under another budget still fits."""
    one, other = (load(write_checkpoint(tmp_path / str(n), TINY["own"], budget=(n, 2 * n))) for n in (784, 1568))
    assert one.budget != other.budget and one.fingerprint == other.fingerprint


def test_strips_are_refused_and_crops_of_them_are_not(checkpoint):
    m = checkpoint("own")
    strip = picture(2010, 10, 1)
    for look in (m.pixels, m.grid_of):
        with pytest.raises(BadInput, match="2010 x 10 pixels"):
            look(strip)
    assert m.token_grid(m.pixels(picture(2000, 10, 1))) == m.grid_of(picture(2000, 10, 1))
    assert m.token_grid(m.pixels(picture(300, 20, 1), (0, 4, 300, 5)))[0] == 1


@pytest.mark.parametrize("size", [(400, 20), (20, 400), (28, 28)])
@pytest.mark.parametrize("mode", ["mask", "box"])
def test_one_row_of_cells_is_looked_at_again(checkpoint, size, mode):
    """The smallest grids: one row, one column, and the least budget's 2 x 2."""
    m, shot = checkpoint("own", rpn=(2, 2)), picture(*size, 1)
    grid = m.grid_of(shot)
    found = answer(m, RPN.load(m.folder, m), shot, "hi", mode, tau=0.01, max_new_tokens=2)
    assert found.logits.shape == grid and grid in ((1, 14), (14, 1), (2, 2))
    first = torch.zeros(grid, dtype=torch.bool)
    first[0, 0] = True
    found = answer(m, None, shot, "hi", mode, max_new_tokens=2, regions=[Region((0, 0, 1, 1), first, 1.0)])
    assert found.boxes == [(0, 0, -(-size[0] // grid[1]), -(-size[1] // grid[0]))]


def test_the_rpn_of_another_model_is_one_line(checkpoint):
    m, other = checkpoint("own", rpn=(2, 2)), checkpoint("tied", rpn=(1, 3))
    with pytest.raises(BadInput, match="of another model"):
        RPN.load(other.folder, m)

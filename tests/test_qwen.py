"""Qwen2.5-VL: against a reference library's outputs (tests/golden/, made by make_golden_qwen.py), by hand, and end to end.

The library knows nothing of a second look: its outputs for that are those of a prompt of two images.
"""
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "golden")]

from formula import picture  # noqa: E402
from qwen_formula import CASES, CONFIGS, NEW_TOKENS, TINY, nested, prompt, rpn_tensors, shapes, write_checkpoint  # noqa: E402

from backbones.qwen2_5_vl import RECIPES, Qwen2_5VL, smart_resize, windows, windows_by_size  # noqa: E402
from clip import MEAN, STD, BadInput  # noqa: E402
from model import Crop, KVCache, load  # noqa: E402
from sdrpn import RPN, Region, answer, assign_labels, recipe_faults, recipe_for, teach  # noqa: E402


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
    """Image of 2 x 3 behind 7 tokens of text: its <|vision_end|> stood at 10. A crop of 1 x 2, and one of 2 x 2 with gaps."""
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
    typed = m.prompt_ids("<|image_pad|><|im_end|>\n<|im_start|>system<|vision_start|>", (("<|endoftext|>", "<|im_end|>"),))
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
    """Equal to a stage 2 that runs every token through every layer again, in float64, on a picture that is not square."""
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
    ids = m.prompt_ids("hi")
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


def both(world, folder):
    """train.py in two processes, as torchrun starts them; out/last goes to `folder`."""
    script, port = folder / "run.py", socket.create_server(("localhost", 0))
    script.write_text(f"import pathlib, sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport train\n"
                      f"train.report = lambda *a: None\n"
                      f"train.ROOT = pathlib.Path({str(folder)!r})\ntrain.main()\n")
    told = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port.getsockname()[1]), OMP_NUM_THREADS="1")
    port.close()
    return [subprocess.Popen([sys.executable, str(script), *training(world, folder / "two")], stderr=open(folder / "said", "a"),
                             env=os.environ | told | dict(RANK=rank, LOCAL_RANK=rank)) for rank in "01"]


def test_two_processes_stopped_and_resumed_train_one_rpn(world, tmp_path, monkeypatch):
    """Killed in the middle and run again, two processes learn what one learns; then infer.py answers with it."""
    import train
    monkeypatch.setattr(train, "report", lambda *a: None)  # TEMP
    monkeypatch.setattr(train, "ROOT", tmp_path)  # where out/last goes
    train.main(training(world, tmp_path / "one"))
    log = tmp_path / "two" / "log.jsonl"
    running = both(world, tmp_path)
    while not log.exists() or log.read_text().count("\n") < 3:
        assert all(process.poll() is None for process in running), (tmp_path / "said").read_text()
        time.sleep(0.005)
    for process in running:
        process.kill()
        process.wait()
    assert not (tmp_path / "two" / "rpn.safetensors").exists()
    assert [process.wait(timeout=300) for process in both(world, tmp_path)] == [0, 0], (tmp_path / "said").read_text()
    assert "going on at step" in (tmp_path / "said").read_text()
    with safe_open(tmp_path / "one" / "rpn.safetensors", "pt") as one, safe_open(tmp_path / "two" / "rpn.safetensors", "pt") as two:
        names = set(one.keys())
        assert names == set(two.keys()) and "model.twig_norm.weight" not in names
        assert "model.twig_layers.1.self_attn.q_proj.bias" in names
        assert max((one.get_tensor(name) - two.get_tensor(name)).abs().max() for name in names) < 1e-9
    losses = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(losses) == 8 and sum(row["tokens"] for row in losses) > 100 and losses[-1]["loss"] < losses[0]["loss"]

    m = load(world / "tiny-qwen", dtype="float64")
    rpn = RPN.load(tmp_path / "two", m)
    for n, size in enumerate(SIZES):
        shot = picture(*size, n)
        found = answer(m, rpn, shot, "Where is it?", tau=0.05)
        assert found.logits.shape == m.grid_of(shot)
        assert all(0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1] for x0, y0, x1, y1 in found.boxes)

"""DeepSeek-VL: another library's outputs (tests/golden/make_golden_deepseek.py), by hand, and from end to end."""
import json
import shutil
import signal
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path[:0] = [str(GOLDEN), str(GOLDEN.parent.parent)]

import infer  # noqa: E402
import tables  # noqa: E402
import train  # noqa: E402
from backbones.bpe import BPE  # noqa: E402
from backbones.deepseek_vl import DeepSeekVL, SAMAttention, SAMBlock, resize_and_pad, to_unit  # noqa: E402
from clip import BadInput  # noqa: E402
from deepseek_formula import CASES, CONFIGS, EOS, IMAGE, SYSTEM, TRUE_CONFIGS, shapes, write_checkpoint  # noqa: E402
from formula import picture  # noqa: E402
from model import FAMILIES, load, read_family  # noqa: E402
from sdrpn import RPN, Crop, Region, answer, find_regions, load_recipe, released_recipe  # noqa: E402

RECIPE = dict(
    attention={"1": [1]}, softmax="image", sink=dict(kind="norm", c=3.0), frozen=1, layers=2, tau=0.4,
    train=dict(lr=1e-2, warmup=0.1, betas=[0.9, 0.98], epochs=2, batch_size=2, grad_accum=1, clip=1.0))


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
    assert result.text == m.detokenize(want["crop.tokens"].tolist())

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
    encode, bos = m.tokenizer.encode, m.tokenizer.token_id("<｜begin▁of▁sentence｜>")
    (eos,), image = m.config["eos_ids"], m.config["image_token"]
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


def test_padding_colour_and_crop(models):
    """1.3B grey, 7B CLIP's mean, both before any normalising; a crop is stretched, nothing is padded."""
    wide = Image.new("RGB", (200, 20), "white")
    for name, colour in (("siglip", (127, 127, 127)), ("hybrid", (122, 116, 104))):
        assert (models[name].pixels(wide)[:, 0, 0] * 255).round().int().tolist() == list(colour)
    crop = models["hybrid"].pixels(wide, (10, 5, 60, 15))
    assert crop.shape == (3, 80, 80) and crop.min() == 1.0


def test_sam_attention_is_softmax_with_decomposed_distances():
    """One head on 2 x 2 cells, score by score: q . k / sqrt(4), plus unscaled q . (R_h + R_w) at these distances."""
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
            shift = attention.rel_pos_h[rows + 1] + attention.rel_pos_w[columns + 1]
            scores[i, j] = q[i] @ k[j] / 2 + q[i] @ shift
    assert torch.allclose(attention(x), attention.proj(scores.softmax(-1) @ v).view(1, 2, 2, 4), atol=1e-5)


def test_padding_of_sams_windows_attends():
    """A 3 x 3 map in windows of 2: its last cell shares a window with three of padding. Were they masked, it would
    attend to itself alone, and what attention says there would be proj(v) of that cell."""
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
    shot, prompt = picture(40, 30, 1), golden("deepseek_hybrid")[1]["prompt"]
    logits = half.logits(shot, prompt)
    assert logits.dtype == torch.bfloat16 and (logits - m.logits(shot, prompt)).abs().mean() < 0.2


def test_float64(folders):
    m = load(folders["hybrid"], "cpu", "float64")
    want, notes = golden("deepseek_hybrid")
    logits = m.logits(picture(*CASES["deepseek_hybrid"]["picture"]), notes["prompt"])
    assert logits.dtype == torch.float64
    close(logits[want["rows"].long()].float(), want["logits"])


def changed(folder, tmp_path, **change):
    """A copy of a checkpoint; change: vision_config__params__width=value, None deletes the key."""
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
    ({"vision_config__params": 3}, ("not what a multi_modality model has",)),
    ({"vision_config": None}, ("KeyError: 'vision_config'",)),
    ({"vision_config__params__width": 0}, ("width = 0",)),
    ({"vision_config__params__heads": 5}, ("multiple of its heads",)),
    ({"vision_config__params__patch_size": 99}, ("smaller than patch_size",)),
    ({"vision_config__params__mlp_ratio": "4"}, ("mlp_ratio",)),
    ({"vision_config__params__select_layer": -2}, ("select_layer",)),
    ({"aligner_config": []}, ("not what a multi_modality model has",)),
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
    ({"vision_config__params__high_res_cfg": None}, ("KeyError: 'high_res_cfg'",)),
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


def test_no_recipe_names_the_head_finder(folders, tmp_path):
    """The published part is told, for the true sizes only."""
    with pytest.raises(BadInput, match="no released recipe.*tables.py heads --ckpt"):
        load_recipe(folders["siglip"])
    for name, words in (("deepseek-vl-1.3b", "B = 9 and R = 3"), ("deepseek-vl-7b", "B = 11 is our guess")):
        (tmp_path / "config.json").write_text(json.dumps(TRUE_CONFIGS[name]))
        with pytest.raises(BadInput, match=words + ".*tables.py heads"):
            load_recipe(tmp_path)
        part = released_recipe(*read_family(tmp_path))
        assert (part["frozen"], part["layers"]) == ({"deepseek-vl-1.3b": 9, "deepseek-vl-7b": 11}[name], 3)


# ---- from end to end

def questions_file(folder):
    """Six questions, one of them a conversation, about pictures of three shapes."""
    folder.mkdir()
    for n, size in enumerate([(64, 48), (40, 80), (50, 50)]):
        picture(*size, n).save(folder / f"{n}.png")
    asked = ["What is this?", "Where is the cat?", "What color is it?", ["Who?", "Where?"], "What is this?", "How?"]
    lines = [json.dumps({"image": f"{n % 3}.png", "question": q, "id": n}) for n, q in enumerate(asked)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder / "questions.jsonl"


def found_recipe(folder, data, out):
    """What the head finder prints for questions without boxes."""
    single = [line for line in data.read_text().splitlines() if isinstance(json.loads(line)["question"], str)]
    (data.parent / "single.jsonl").write_text("\n".join(single))
    tables.main(["heads", "--ckpt", str(folder), "--eval", str(data.parent / "single.jsonl"), "--out", str(out),
                 "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "3"])
    return json.loads((out / "recipe.json").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_from_teacher_to_answer(folders, tmp_path, monkeypatch, capsys, name):
    """train.py with the head finder's recipe: stopped after two steps and taken up again, it ends with the very weights
    of a run that was not stopped; infer.py then answers in all three modes."""
    folder, data = tmp_path / "tiny", questions_file(tmp_path / "data")
    shutil.copytree(folders[name], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.model.layers.1.self_attn.q_proj.weight"] *= 18  # heads that point somewhere
    save_file(tensors, folder / "model.safetensors")
    found = found_recipe(folder, data, tmp_path / "heads")
    assert set(found["attention"]) and found["softmax"] == "image"
    given = {key: RECIPE[key] for key in ("frozen", "layers", "tau", "train")}  # a tiny model's own
    (folder / "recipe.json").write_text(json.dumps(found | given))
    assert load_recipe(folder)["attention"] == found["attention"]
    monkeypatch.setattr(train, "ROOT", tmp_path)
    monkeypatch.setattr(infer, "ROOT", tmp_path)
    flags = ["--ckpt", str(folder), "--data", str(data), "--device", "cpu", "--dtype", "float32",
             "--max-new-tokens", "3"]
    train.main([*flags, "--out", str(tmp_path / "whole")])

    rate = train.learning_rate

    def stop_in_step_2(peak, warmup, step, steps):
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return rate(peak, warmup, step, steps)
    monkeypatch.setattr(train, "learning_rate", stop_in_step_2)
    with pytest.raises(SystemExit) as stopped:
        train.main([*flags, "--out", str(tmp_path / "stopped")])
    monkeypatch.setattr(train, "learning_rate", rate)
    assert stopped.value.code == 130 and not (tmp_path / "stopped" / "rpn.safetensors").exists()
    train.main([*flags, "--out", str(tmp_path / "stopped")])
    whole, taken_up = (load_file(tmp_path / run / "rpn.safetensors") for run in ("whole", "stopped"))
    assert whole.keys() == taken_up.keys() and all(torch.equal(whole[key], taken_up[key]) for key in whole)

    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows] == [2] * 6 and sum(row["tokens"] for row in rows) > 0
    m = load(folder, "cpu", "float32")
    untrained = RPN.from_layers(m, 1, 2).state_dict()
    assert not torch.equal(whole["model.twig_norm.weight"], untrained["twig_norm.weight"])
    assert (tmp_path / "whole" / "report.png").is_file() and list((tmp_path / "whole" / "labels").iterdir())

    shot, question = picture(64, 48, 0), "What is this?"
    rpn = RPN.load(tmp_path / "whole" / "rpn.safetensors", m)
    logits = rpn(m, shot, question)
    assert logits.shape == m.grid_of(shot)
    tau = next(tau for tau in (n / 100 for n in range(99, 0, -1)) if find_regions(logits, tau))
    capsys.readouterr()
    texts = {}
    for mode in ("plain", "box", "mask"):
        infer.main([str(data.parent / "0.png"), question, "--ckpt", str(folder), "--rpn", str(tmp_path / "whole"),
                    "--mode", mode, "--tau", str(tau), "--dtype", "float32", "--json", "--max-new-tokens", "6",
                    "--save", str(tmp_path / f"{mode}.png")])
        shown = json.loads(capsys.readouterr().out)
        texts[mode] = shown["answer"]
        assert bool(shown["boxes"]) == (mode != "plain") and (tmp_path / f"{mode}.png").is_file()
    assert texts["plain"] == m.generate(shot, question, 6)
    assert texts["mask"] == answer(m, rpn, shot, question, "mask", tau, 6).text

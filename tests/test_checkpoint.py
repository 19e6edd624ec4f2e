"""Files in: checkpoints in every spelling and every kind of damage, sizes, the tokeniser's exact ids, pictures.

    LLAMA_TOKENIZER=tokenizer.model python -m pytest tests/test_checkpoint.py   # LLaMA's own; without it skipped
"""
import importlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import model
from clip import MEAN, STD, BadInput, CLIPVision, load_image, preprocess, preprocess_crop
from formula import (CONFIGS, HERE, SHORT, SPELLINGS, SYSTEM, picture, prompt, respell, shapes, tensors,
                     write_checkpoint)
from model import LLaVA, default_dtype, find_checkpoint, read_family, torch_dtype

QUESTION = "What is this?"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The "plain" model as published, in one file, and its logits."""
    folder = write_checkpoint(tmp_path_factory.mktemp("whole"), CONFIGS["plain"])
    return folder, logits(LLaVA.load(folder, "cpu"))


def logits(llava):
    return llava.logits(picture(157, 94, 1), prompt(QUESTION))


# ---- what loads --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_one_model(whole, tmp_path, spelling, shards):
    """"4.52" carries inv_freq and position_ids, which count for nothing."""
    llava = LLaVA.load(write_checkpoint(tmp_path, CONFIGS["plain"], spelling, shards), "cpu")
    assert torch.equal(logits(llava), whole[1])


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_become_our_parameters(spelling):
    with torch.device("meta"):
        llava = LLaVA(LLaVA.read_config(Path("x"), CONFIGS["grouped"]))
    got = [LLaVA.canonical(respell(name, spelling)) for name in shapes(CONFIGS["grouped"])]
    unused = [k for k in got if k.startswith(("vision_tower.post_layernorm.", "vision_tower.encoder.layers.4."))]
    assert len(set(got)) == len(got) and len(unused) == 18 and unused == [k for k in got if llava.ignored(k)]
    assert set(got) - set(unused) == {k for k, _ in llava.named_parameters()}


def rewrite(folder, change):
    """Change the tensors of a checkpoint in one file."""
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")


LAST = "vision_tower.vision_model.encoder.layers.3."  # of 4: LLaVA reads what enters it


@pytest.mark.parametrize("change", [
    lambda t: [t.pop(k) for k in list(t) if k.startswith(LAST) or "post_layernorm" in k],
    lambda t: [t[k].fill_(float("nan")) for k in t if k.startswith(LAST) or "post_layernorm" in k],
    lambda t: t.update({LAST + "mlp.fc1.weight": torch.ones(2, dtype=torch.int8)}),
    lambda t: t.update({"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
                        "vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None]})])
def test_the_last_tower_layer_and_buffers_are_not_read(whole, tmp_path, change):
    folder = write_checkpoint(tmp_path, CONFIGS["plain"])
    rewrite(folder, change)
    assert torch.equal(logits(LLaVA.load(folder, "cpu")), whole[1])


def test_a_tied_head_needs_no_tensor(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIGS["plain"] | {"tie_word_embeddings": True})
    rewrite(folder, lambda t: t.pop("language_model.lm_head.weight"))
    llava = LLaVA.load(folder, "cpu")
    assert torch.equal(llava.lm_head.weight, llava.language_model.embed_tokens.weight)


@pytest.mark.parametrize("written, asked, got", [
    ("float32", None, "float32"), ("float16", None, "float32"), ("float32", "float64", "float64"),
    ("float32", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float32"), ("float16", torch.float16, "float16"),
    ("float64", "float64", "float64")])
def test_dtypes(tmp_path, written, asked, got):
    folder = write_checkpoint(tmp_path, CONFIGS["shared"], dtype=getattr(torch, written))
    llava, stored = LLaVA.load(folder, "cpu", asked), tensors(CONFIGS["shared"])
    got = getattr(torch, got)
    assert {p.dtype for p in llava.parameters()} == {got} and llava.dtype == got
    assert not any(p.requires_grad for p in llava.parameters())
    ours = llava.multi_modal_projector.linear_1.weight
    assert torch.equal(ours, stored["multi_modal_projector.linear_1.weight"].to(getattr(torch, written)).to(got))
    assert logits(llava).dtype == got


class Slice:
    def __init__(self, shape, dtype):
        self.get_shape, self.get_dtype = lambda: shape, lambda: dtype

    def get_slice(self, name):
        return self


@pytest.mark.parametrize("device, elements, stored, want", [
    ("cpu", 2 ** 28 - 1, "F16", "float32"), ("cpu", 2 ** 28, "F16", "bfloat16"),
    ("cpu", 7_063_427_072, "F16", "bfloat16"), ("cpu", 10 ** 6, "BF16", "float32"),
    ("cuda", 7_063_427_072, "F16", "float16"), ("cuda", 10, "BF16", "bfloat16"), ("cuda", 10, "F32", "float32"),
    ("cuda", 10, "F64", "float64")])
def test_default_dtype(device, elements, stored, want):
    """The file's on a GPU; on a CPU float32 below 1 GB of it."""
    shards = {"file": Slice([elements], stored)}
    assert default_dtype(torch.device(device), {"w": ("file", "w")}, shards) == getattr(torch, want)


def test_names_of_dtypes():
    assert torch_dtype(None) is None and torch_dtype("float64") == torch.float64
    with pytest.raises(BadInput, match="--dtype int8: must be float16, bfloat16, float32 or float64"):
        torch_dtype("int8")


# ---- what does not load ------------------------------------------------------------------------------------------

def change_config(**change):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in change.items():
            part, _, leaf = key.rpartition("__")
            (config[part] if part else config)[leaf] = value
        (folder / "config.json").write_text(json.dumps(config))
    return damage


def change_tensors(change):
    return lambda folder: rewrite(folder, change)


def replace(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(name, keep):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def remove(name):
    return lambda folder: (folder / name).unlink()


def original_layout(folder):
    """A user's own safetensors of the original code, beside a config.json that looks right."""
    names = [("language_model.", ""), ("multi_modal_projector.linear_1", "model.mm_projector.0"),
             ("multi_modal_projector.linear_2", "model.mm_projector.2"),
             ("vision_tower.", "model.vision_tower.vision_tower.")]
    found = load_file(folder / "model.safetensors")
    for old, new in names:
        found = {new + k.removeprefix(old) if k.startswith(old) else k: t for k, t in found.items()}
    save_file(found, folder / "model.safetensors")


def pickles_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"never read")


NORM, GATE = "language_model.model.norm.weight", "language_model.model.layers.2.mlp.gate_proj.weight"
FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("damage, file, message", [
    # tensors
    (change_tensors(lambda t: t.pop(GATE)), "",
     "1 tensors missing, 0 unknown; first missing: language_model.layers.2.mlp.gate_proj.weight"),
    (change_tensors(lambda t: t.update({GATE[:-6] + "wieght": t.pop(GATE)})), "",
     r"1 tensors missing, 1 unknown; .*\(nearest: language_model.layers.2.mlp.gate_proj.wieght\)"),
    (change_tensors(lambda t: t.update({"language_model.model.layers.4.input_layernorm.weight": torch.ones(60)})), "",
     "0 tensors missing, 1 unknown; first unknown: language_model.model.layers.4.input_layernorm.weight .*not of one "
     "model"),
    (change_tensors(lambda t: t.update({"model." + NORM.replace(".model.", "."): t[NORM].clone()})),
     "model.safetensors", "is there twice"),
    (change_tensors(lambda t: t.update({NORM: torch.ones(61)})), "model.safetensors",
     r"norm.weight has shape \(61,\), config.json says \(60,\)"),
    (change_tensors(lambda t: t.update({GATE: t[GATE].T.contiguous()})), "model.safetensors",
     r"shape \(60, 100\), .* \(100, 60\)"),
    (change_tensors(lambda t: t.update({NORM: torch.ones(60, dtype=torch.int32)})), "model.safetensors",
     "is I32, not a floating-point tensor"),
    (change_tensors(lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)})), "model.safetensors",
     "F8_E4M3, .*quantised"),
    (change_tensors(lambda t: t[GATE][7].fill_(float("nan"))), "model.safetensors",
     "gate_proj.weight holds NaN or infinite values; download"),
    (change_tensors(lambda t: t[NORM][:1].fill_(float("inf"))), "model.safetensors",
     "norm.weight holds NaN or infinite values; download"),
    (original_layout, "", "original LLaVA layout .*mm_projector.*; use llava-hf/llava-1.5-7b-hf"),
    # files
    (remove("model.safetensors"), "", "no model.safetensors and no model.safetensors.index.json"),
    (pickles_only, "",
     "holds pytorch_model-00001-of-00002.bin, a pickle, which is never loaded; use the safetensors of .*llava-hf"),
    (replace("model.safetensors", b""), "model.safetensors", "truncated or not safetensors .*download it again"),
    (replace("model.safetensors", b"\xff" * 8 + b"{}"), "model.safetensors", "truncated or not safetensors"),
    (replace("model.safetensors", struct.pack("<Q", 1 << 40) + b"{}"), "model.safetensors",
     "truncated or not safetensors"),
    (replace("model.safetensors", struct.pack("<Q", 2) + b"[]"), "model.safetensors", "truncated or not safetensors"),
    (cut("model.safetensors", -1), "model.safetensors", "truncated or not safetensors"),
    (cut("model.safetensors", 100), "model.safetensors", "truncated or not safetensors"),
    # config.json
    (remove("config.json"), "config.json", "missing; is .* a checkpoint folder in the Hugging Face layout"),
    (replace("config.json", b"{'model_type': 'llava'}"), "config.json", "not readable as JSON .*download it again"),
    (replace("config.json", b"\xff\xfe{}"), "config.json", "not readable as JSON"),
    (replace("config.json", b"[1]"), "config.json", "not a JSON object"),
    (replace("config.json", b"[" * 100_000), "config.json", "not readable as JSON"),
    (change_config(model_type="llava_next"), "config.json", "model_type is 'llava_next', not one of llava, "),
    (change_config(model_type=["llava"]), "config.json", r"model_type is \['llava'\], not one of llava, "),
    (change_config(mm_vision_tower="openai/clip-vit-large-patch14-336"), "config.json",
     "original LLaVA layout; .*llava-hf/llava-1.5-7b-hf"),
    (change_config(text_config__num_hidden_layers=3), "", "0 tensors missing, 9 unknown; first unknown: .*layers.3"),
    (change_config(text_config__num_hidden_layers=5), "", "9 tensors missing, 0 unknown"),
    (change_config(text_config__hidden_size=70), "model.safetensors",
     r"shape \(413, 60\), config.json says \(413, 70\)"),
    (change_config(text_config__num_key_value_heads=1), "model.safetensors",
     r"k_proj.weight has shape \(60, 60\), config.json says \(12, 60\)"),
    (change_config(vision_config__image_size=56), "model.safetensors",
     r"position_embedding.weight has shape \(10, 40\), .* \(17, 40\)"),
    (change_config(vision_config__num_hidden_layers=3), "",
     "0 tensors missing, 16 unknown; .*layers.3.* not of one model"),
    (change_config(vision_feature_layer=[-2, -3]), "config.json", "vision_feature_layer must be one layer"),
    (change_config(text_config__hidden_size=-4), "config.json", "hidden_size = -4 is not a sensible size"),
    (change_config(text_config__hidden_size="60"), "config.json", "hidden_size = .*60.* is not a sensible size"),
    (change_config(vision_config__patch_size=None), "config.json", "patch_size = None is not a sensible size"),
    (change_config(text_config__rope_scaling={"type": "linear", "factor": 2.0}), "config.json",
     "rope scaling is not supported"),
    (change_config(text_config__hidden_act="gelu"), "config.json", "hidden_act must be silu"),
    (change_config(vision_feature_select_strategy="full"), "config.json",
     "vision_feature_select_strategy must be default"),
    # tokenizer.model
    (remove("tokenizer.model"), "tokenizer.model", "missing; copy the checkpoint's tokenizer.model into the folder"),
    (replace("tokenizer.model", b"{}"), "tokenizer.model", "not a sentencepiece model; download it again"),
    (change_config(text_config__vocab_size=399), "tokenizer.model",
     "400 pieces, but .* 399 embeddings.*; use the tokenizer.model"),
    (change_config(image_token_index=319), "tokenizer.model",
     "400 pieces, but .* image token 319; use the tokenizer.model"),
    (change_config(image_token_index=None), "tokenizer.model",
     "400 pieces, but .* image token None; use the tokenizer.model")])
def test_damage_is_one_line_with_the_file_and_the_remedy(tmp_path, damage, file, message):
    folder = write_checkpoint(tmp_path / "broken", CONFIGS["plain"])
    damage(folder)
    with pytest.raises(BadInput, match=message) as caught:
        LLaVA.load(folder, "cpu")
    line = str(caught.value)
    assert line.startswith(str(folder / file)) and "\n" not in line and len(line) < 500


def change_index(change):
    def damage(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))
    return damage


def twice(folder):
    first = load_file(folder / FIRST)
    save_file(load_file(folder / SECOND) | dict([next(iter(first.items()))]), folder / SECOND)


@pytest.mark.parametrize("damage, file, message", [
    (remove(SECOND), "", f"1 of 3 shards missing: {SECOND}; download them again"),
    (cut(SECOND, -5), SECOND, "truncated or not safetensors .*download it again"),
    (cut(FIRST, 3), FIRST, "truncated or not safetensors"),
    (replace(FIRST, b""), FIRST, "truncated or not safetensors"),
    (twice, SECOND, f"is there twice \\(also in {FIRST}\\)"),
    (change_index(lambda i: i.pop("weight_map")), "model.safetensors.index.json",
     "no weight_map of files in this folder"),
    (change_index(lambda i: i["weight_map"].update(x="../elsewhere.safetensors")), "model.safetensors.index.json",
     "no weight_map of files in this folder"),
    (change_index(lambda i: i["weight_map"].update(x=None)), "model.safetensors.index.json",
     "no weight_map of files in this folder"),
    (replace("model.safetensors.index.json", b"{"), "model.safetensors.index.json", "not readable as JSON"),
    (change_index(lambda i: i.update(weight_map={k: f for k, f in i["weight_map"].items() if f != SECOND})), "",
     "tensors missing, 0 unknown")])
def test_damage_to_shards(tmp_path, damage, file, message):
    folder = write_checkpoint(tmp_path / "broken", CONFIGS["plain"], shards=3)
    damage(folder)
    with pytest.raises(BadInput, match=message) as caught:
        LLaVA.load(folder, "cpu")
    assert str(caught.value).startswith(str(folder / file)) and "\n" not in str(caught.value)


def test_wrong_device_and_special_ids(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIGS["plain"])
    for device in "nonsense", f"cuda:{torch.cuda.device_count()}":
        with pytest.raises(BadInput, match=f"--device {device}: not on this machine; use cpu"):
            LLaVA.load(folder, device)
    data = (HERE / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data.replace(b"<s>", b"<x>", 1))  # no BOS among the pieces
    with pytest.raises(BadInput, match="BOS and EOS are not 1 and 2"):
        LLaVA.read_tokenizer(folder, {"vocab_size": 413, "image_token": 400})


# ---- sizes of the published models -------------------------------------------------------------------------------

HUB_7B = dict(
    architectures=["LlavaForConditionalGeneration"], model_type="llava", ignore_index=-100, image_token_index=32000,
    pad_token_id=32001, projector_hidden_act="gelu", vision_feature_layer=-2, vision_feature_select_strategy="default",
    tie_word_embeddings=False, torch_dtype="float16", vocab_size=32064,
    text_config=dict(architectures=["LlamaForCausalLM"], max_position_embeddings=4096, model_type="llama",
                     rms_norm_eps=1e-5, torch_dtype="float16", vocab_size=32064),
    vision_config=dict(hidden_size=1024, image_size=336, intermediate_size=4096, model_type="clip_vision_model",
                       num_attention_heads=16, num_hidden_layers=24, patch_size=14, projection_dim=768,
                       vocab_size=32000))
SIZES_13B = dict(hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_hidden_layers=40,
                 num_key_value_heads=40)


@pytest.mark.parametrize("text, layers, width, heads, inner, total, names", [
    ({}, 32, 4096, 32, 11008, 7_063_427_072, 686), (SIZES_13B, 40, 5120, 40, 13824, 13_351_494_656, 758)])
def test_sizes_that_config_json_leaves_out(text, layers, width, heads, inner, total, names):
    """The 7B's file states hardly any: the library's defaults hold, two are overridden. Counted on the meta device."""
    config = LLaVA.read_config(Path("x"), HUB_7B | {"text_config": HUB_7B["text_config"] | text})
    want = dict(num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads,
                head_dim=128, intermediate_size=inner, rope_theta=10000., rms_norm_eps=1e-5,
                max_position_embeddings=4096, vocab_size=32064, image_token=32000, projector_bias=True, tied=False,
                qkv_bias=False, final_norm=True, score_rope=False, mrope_section=None, eos_ids=[2])
    assert {k: config[k] for k in want} == want
    with torch.device("meta"):
        llava = LLaVA(config)
    unused = 4 * (1024 ** 2 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 2 * 2048  # the tower's last layer
    unused += 2048  # post_layernorm
    assert sum(p.numel() for p in llava.parameters()) + unused == total
    assert len(list(llava.parameters())) + 18 == names
    tower = llava.vision_tower
    layer = tower.encoder.layers[0]
    assert layer.mlp.quick and layer.layer_norm1.eps == 1e-5 and layer.self_attn.heads == 16
    assert len(tower.encoder.layers) == 23 and llava.token_grid(torch.zeros(3, 336, 336)) == (24, 24)


def test_the_librarys_other_defaults():
    text = LLaVA.read_config(Path("x"), {"model_type": "llava"})
    assert (text["rms_norm_eps"], text["max_position_embeddings"], text["vocab_size"]) == (1e-6, 2048, 32000)
    vision_config = {"model_type": "clip_vision_model"}
    config = LLaVA.read_config(Path("x"), {"model_type": "llava", "vision_config": vision_config, "image_token_id": 7})
    vision = config["vision"]
    assert (vision["hidden_size"], vision["num_hidden_layers"]) == (768, 12)
    assert (vision["image_size"], vision["patch_size"], config["image_token"]) == (224, 32, 7)


@pytest.mark.parametrize("text", [
    {"rope_theta": 500.}, {"rope_parameters": {"rope_theta": 500., "rope_type": "default"}}])
def test_both_places_of_rope_theta(text):
    assert LLaVA.read_config(Path("x"), {"model_type": "llava", "text_config": text})["rope_theta"] == 500


@pytest.mark.parametrize("feature, used", [(-2, 3), (-1, 4), (1, 1), (4, 4)])
def test_the_feature_layer_counts_as_in_the_library(feature, used):
    """0 is what enters the first layer, n what leaves the n-th; negative from the end."""
    config = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, image_size=28,
                  vision_feature_layer=feature)
    tower = CLIPVision(config)
    assert len(tower.encoder.layers) == used and tower(torch.zeros(2, 3, 28, 28)).shape == (2, 4, 8)
    with pytest.raises(BadInput, match="config.json: vision hidden_act 'relu' is not supported; it must be"):
        CLIPVision(config | {"hidden_act": "relu"})


# ---- names of checkpoints ----------------------------------------------------------------------------------------

@pytest.fixture
def places(tmp_path, monkeypatch):
    """A project, the folder it lies in and a Hugging Face cache, all empty; and what was set on this machine is not."""
    monkeypatch.setattr(model, "ROOT", tmp_path / "work" / "project")
    model.ROOT.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return tmp_path


def snapshot(cache, commit, age, repository="models--llava-hf--llava-1.5-7b-hf", config=True):
    folder = cache / repository / "snapshots" / commit
    folder.mkdir(parents=True)
    if config:
        (folder / "config.json").write_text("{}")
        os.utime(folder / "config.json", (1e9, 1e9))  # a link to a file that snapshots share
    os.utime(folder, (1e9 - age, 1e9 - age))
    return folder


def test_a_name_is_looked_up_nearest_first(places):
    cached = snapshot(places / "hub", "new", 10)
    snapshot(places / "hub", "older", 100), snapshot(places / "hub", "unfinished", 1, config=False)
    snapshot(places / "hub", "other", 0, "models--llava-hf--llava-1.5-13b-hf")
    assert find_checkpoint("llava-1.5-7b") == cached
    for folder in (model.ROOT / "checkpoints" / "llava-1.5-7b", model.ROOT.parent / "llava-1.5-7b"):
        folder.mkdir(parents=True)
        assert find_checkpoint("llava-1.5-7b") == folder
    assert find_checkpoint(cached) == cached and find_checkpoint(str(cached)) == cached
    assert find_checkpoint("toy") == model.ROOT / "data" / "toy" / "llava-toy"


def test_the_cache_below_hf_home(places, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE")
    cached = snapshot(places / "home" / "hub", "abc", 0, "models--llava-hf--llava-1.5-13b-hf")
    assert find_checkpoint("llava-1.5-13b") == cached


@pytest.mark.parametrize("name, repository", [
    ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"), ("llava-1.5-13b", "llava-hf/llava-1.5-13b-hf"),
    ("deepseek-vl-7b", "deepseek-ai/deepseek-vl-7b-chat"), ("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct")])
def test_an_absent_checkpoint_comes_with_its_download_command(places, name, repository):
    for given in name, repository:  # the hub's own name stands for it
        with pytest.raises(BadInput) as caught:
            find_checkpoint(given)
        assert str(caught.value).startswith(f"{name} is not on this machine; download it with: hf download "
                                            f"{repository} --local-dir {model.ROOT / 'checkpoints' / name}")


def test_an_unknown_name(places):
    with pytest.raises(BadInput, match="^llava-1.5-70b: no such checkpoint folder, nor one of the names toy, "
                                       "llava-1.5-7b, llava-1.5-13b, .*; check --ckpt$"):
        find_checkpoint("llava-1.5-70b")


# ---- ids ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model without weights that has the tokeniser of LLaMA."""
    path = os.environ.get("LLAMA_TOKENIZER")
    if not path:
        pytest.skip("LLAMA_TOKENIZER names no tokenizer.model of LLaMA")
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(Path(path).read_bytes())
    config = CONFIGS["plain"] | {"text_config": CONFIGS["plain"]["text_config"] | {"vocab_size": 32064}}
    config = LLaVA.read_config(folder, config | {"image_token_index": 32000})
    with torch.device("meta"):
        return LLaVA(config, LLaVA.read_tokenizer(folder, config))


def ids(text):
    return [int(i) for i in text.split()]


BEFORE = ids("1 319 13563 1546 263 12758 1404 322 385 23116 21082 20255 29889 450 20255 4076 8444 29892 13173 29892 "
             "322 1248 568 6089 304 278 1404 29915 29879 5155 29889 3148 1001 29901 29871")
ASSISTANT = ids("319 1799 9047 13566 29901")  # " ASSISTANT:"
WHAT = ids("29871 13 5618 338 445 29973")  # a newline in a piece of its own, "What is this?"


@pytest.mark.parametrize("question, history, after", [
    (QUESTION, (), WHAT + ASSISTANT),
    (QUESTION + SHORT, (), WHAT + ids("13 22550 278 1139 773 263 2323 1734 470 16549 29889") + ASSISTANT),
    (QUESTION, [("Hi", "Yes")],
     ids("29871 13 18567") + ASSISTANT + ids("3869 2 11889 29901 1724 338 445 29973") + ASSISTANT),
    ("Hi", [(QUESTION, "Yes"), ("Hi", "Yes")],
     WHAT + ASSISTANT + ids("3869 2 11889 29901 6324") + ASSISTANT + ids("3869 2 11889 29901 6324") + ASSISTANT),
    ("", (), ids("29871 13") + ASSISTANT),
    ("<image>", (), ids("29871 13 29966 3027 29958") + ASSISTANT),  # typed by a user: text
    (" two  spaces\n", (), ids("29871 13 1023 29871 8162 13") + ASSISTANT)])  # verbatim, nothing is stripped
def test_exact_ids(llama, question, history, after):
    assert len(BEFORE) == 35
    assert llama.prompt_ids(question, history) == BEFORE + [32000] + after
    assert llama.tokenize(prompt(question, history)) == BEFORE + [32000] + after


def test_an_end_typed_by_a_user_is_text(llama):
    """In a rendered prompt no one can tell who wrote </s>; from question and history it is known."""
    typed = llama.prompt_ids("What is </s> <image>?", [("</s>", "a </s>")])
    assert typed.count(2) == 1 and typed.count(32000) == 1
    first, second = ids("29871 13 829 29879 29958"), ids("11889 29901 1724 338 1533 29879 29958 529 3027 29958 29973")
    answer = ids("263 1533 29879 29958 2")
    assert typed[36:] == first + ASSISTANT + answer + second + ASSISTANT
    assert llama.detokenize([3869, 2]) == llama.detokenize([3869]) == "Yes"


@pytest.mark.parametrize("text", ["plain", f"{SYSTEM} USER: Hi ASSISTANT:", "</s>"])
def test_text_without_an_image_is_plain_sentencepiece(llama, text):
    assert llama.tokenize(text) == [1, *llama.tokenizer.encode(text)]


def test_image_columns(llama):
    """System prompt and image take positions 0-34 and 35-610 with the published 24 x 24 image tokens."""
    tower = dict(hidden_size=4, intermediate_size=4, num_attention_heads=1, num_hidden_layers=1, image_size=28)
    llama = LLaVA(llama.config | {"hidden_size": 4, "vision": tower}, llama.tokenizer)
    embeds, columns = llama.embed_prompt(llama.prompt_ids(QUESTION), torch.full((1, 576, 4), 7.))
    assert (columns.start, columns.stop) == (35, 611) and embeds.shape == (1, 35 + 576 + 11, 4)
    assert (embeds[0, columns] == 7).all() and not (embeds[0, [34, 611]] == 7).any()
    assert torch.equal(embeds[0, 611:], llama.language_model.embed_tokens.weight[WHAT + ASSISTANT])


# ---- pictures ----------------------------------------------------------------------------------------------------

def colours(pixels):
    """(3, h, w) normalised -> (h, w, 3) bytes, and how far from whole bytes they were."""
    mean, std = torch.tensor(MEAN).double().view(3, 1, 1), torch.tensor(STD).double().view(3, 1, 1)
    values = (pixels.double() * std + mean) * 255
    assert (values - values.round()).abs().max() < 1e-3
    return values.round().permute(1, 2, 0).numpy().astype(np.uint8)


@pytest.mark.parametrize("w, h", [(5, 8), (8, 5), (7, 8), (8, 7), (3, 8), (8, 8), (8, 1)])
def test_padding_to_a_square(w, h):
    """An odd difference puts the extra line at the right or at the bottom; 8 pixels to 8: no resampling."""
    shot = Image.fromarray(np.random.default_rng(w * h).integers(0, 256, (h, w, 3), dtype=np.uint8))
    want = np.full((8, 8, 3), (122, 116, 104), dtype=np.uint8)
    left, top = (8 - w) // 2, (8 - h) // 2
    want[top:top + h, left:left + w] = np.asarray(shot)
    pixels = preprocess(shot, 8)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.float32 and (colours(pixels) == want).all()


def test_values_of_the_padding():
    pixels = preprocess(Image.new("RGB", (4, 8)), 8)
    assert pixels[:, 0, 0].tolist() == pytest.approx([-.01125, -.0112, -.00133], abs=1e-5)
    assert torch.equal(pixels[:, :, :2], pixels[:, :, 6:])
    assert pixels[0, 0, 2].item() == pytest.approx(-.48145466 / .26862954)


def test_shrinking_is_bicubic_with_antialias():
    """A checkerboard of pixels becomes grey; and one white line leaves PIL's a = -0.5 lobes, which clip at black."""
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.abs(colours(preprocess(board, 16)).astype(int) - 128).max() <= 16
    line = np.full((32, 32), 100, dtype=np.uint8)
    line[:, 16:18] = 255
    row = colours(preprocess(Image.fromarray(line).convert("RGB"), 16))[8, :, 0].astype(int)
    assert row[8] > 200 and row[7] == row[9] > 100 and row[6] == row[10] < 100 and (row[:6] == 100).all()


def test_pictures_that_are_not_rgb():
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert torch.equal(preprocess(grey, 8), preprocess(grey.convert("RGB"), 8))


def test_a_crop_is_stretched_bilinearly():
    """2 x 1 pixels to 4 x 4: the aspect is not kept, and nothing beside the box comes in."""
    shot = Image.new("RGB", (6, 5), (255, 0, 0))
    shot.putpixel((2, 3), (0, 0, 0))
    shot.putpixel((3, 3), (200, 200, 200))
    pixels = colours(preprocess_crop(shot, (2, 3, 4, 4), 4))
    assert (pixels == np.array([0, 50, 150, 200])[None, :, None]).all()
    red = preprocess(Image.new("RGB", (1, 1), (255, 0, 0)), 1)[:, 0, 0]
    assert torch.equal(preprocess_crop(shot, (0, 0, 6, 5), 8)[:, 0, 0], red)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation, turned, corner", [
    (1, False, (0, 0)), (2, False, (0, 1)), (3, False, (1, 1)), (4, False, (1, 0)),
    (5, True, (0, 0)), (6, True, (0, 1)), (7, True, (1, 1)), (8, True, (1, 0))])
def test_exif_orientation_is_applied(tmp_path, orientation, turned, corner, kind):
    """The tag says at which corner of the true picture the stored first pixel lies: (bottom?, right?)."""
    stored = Image.new("RGB", (64, 32), "blue")
    stored.paste("red", (0, 0, 16, 16))
    exif = stored.getexif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo", kind, exif=exif)
    shot = load_image(tmp_path / "photo")
    assert shot.size == ((32, 64) if turned else (64, 32)) and shot.mode == "RGB"
    for bottom in (0, 1):
        for right in (0, 1):
            red, _, blue = shot.getpixel((right * (shot.width - 9) + 4, bottom * (shot.height - 9) + 4))
            assert (red > 200 and blue < 50) if (bottom, right) == corner else (red < 50 and blue > 200)


def test_pictures_that_can_not_be_read(tmp_path):
    picture(40, 30, 1).save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    for name, content, message in (("cut.png", data[:len(data) // 2], "damaged or truncated"),
                                   ("text.jpg", b"no picture", "not an image in a known"),
                                   ("empty.png", b"", "not an image in a known")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=message) as caught:
            load_image(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="no such image file; check the path"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(BadInput, match="a folder; name one picture in it"):
        load_image(tmp_path)
    assert np.array_equal(np.asarray(load_image(tmp_path / "good.png")), np.asarray(picture(40, 30, 1)))


def entries(value, path=()):
    """Where every entry of a JSON value lies: ("vision_config", "depth"), ..."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from entries(inner, (*path, key))


@pytest.mark.parametrize("family", ["formula", "deepseek_formula", "qwen_formula"])
def test_any_entry_of_a_config_may_be_of_another_kind(tmp_path, family):
    """It is read, or refused in one line; nothing else."""
    module = importlib.import_module(family)
    config = list(getattr(module, "TINY", module.CONFIGS).values())[-1]
    module.write_checkpoint(tmp_path, config)
    text, refused = (tmp_path / "config.json").read_text(), 0
    places = list(entries(json.loads(text)))
    for *outer, last in places:
        for wrong in (None, [], {}, "x", [[1]], -1, float("nan")):
            changed = place = json.loads(text)
            for key in outer:
                place = place[key]
            place[last] = wrong
            (tmp_path / "config.json").write_text(json.dumps(changed))
            try:
                read_family(tmp_path)
            except BadInput as e:
                refused += 1
                assert str(tmp_path) in str(e) and "\n" not in str(e)
    assert refused > 3 * len(places)

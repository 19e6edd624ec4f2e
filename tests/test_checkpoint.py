"""Reading files: checkpoints in every spelling and what they say, exact ids of the tokeniser, pictures.

    LLAMA_TOKENIZER=tokenizer.model python -m pytest tests/test_checkpoint.py   # LLaMA's own; without it skipped
"""
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import model
import slow
from clip import BadInput, CLIPVision, load_image, preprocess, preprocess_crop, printable, to_tensor
from formula import CONFIGS, SHORT, SPELLINGS, picture, prompt, tensors, write_checkpoint
from model import LLaVA, load

QUESTION = "What is this?"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Logits of the "plain" model as published, in one file."""
    return logits(load(write_checkpoint(tmp_path_factory.mktemp("whole"), CONFIGS["plain"]), "cpu"))


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path, CONFIGS["plain"])


def logits(llava):
    return slow.logits(llava, picture(157, 94, 1), prompt(QUESTION))


# ---- weights -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_one_model(whole, tmp_path, spelling):
    """In three shards. "4.52" also has inv_freq and position_ids, which are skipped."""
    llava = load(write_checkpoint(tmp_path, CONFIGS["plain"], spelling, shards=3), "cpu")
    assert torch.equal(logits(llava), whole)


def rewrite(folder, change):
    """Change the tensors of a checkpoint in one file."""
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")


def test_the_last_tower_layer_is_not_read(whole, folder):
    last = "vision_tower.vision_model.encoder.layers.3."  # of 4: LLaVA reads what enters it
    rewrite(folder, lambda t: [t[k].fill_(float("nan")) for k in t if k.startswith(last) or "post_layernorm" in k])
    assert torch.equal(logits(load(folder, "cpu")), whole)


@pytest.mark.parametrize("place", [(), ("text_config",)])
def test_a_stored_head_is_used_and_tied_only_where_none_is(whole, folder, place):
    config = json.loads((folder / "config.json").read_text())
    (config["text_config"] if place else config)["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(folder, "cpu")), whole)
    rewrite(folder, lambda t: t.pop("language_model.lm_head.weight"))
    llava = load(folder, "cpu")
    assert llava.lm_head.weight is llava.language_model.embed_tokens.weight


def test_one_file_wins_over_an_older_index(whole, folder):
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load(folder, "cpu")), whole)


@pytest.mark.parametrize("written, asked, got", [
    ("float16", None, "float32"), ("float32", "float64", "float64"), ("float16", torch.float16, "float16")])
def test_dtypes(tmp_path, written, asked, got):
    folder = write_checkpoint(tmp_path, CONFIGS["shared"], dtype=getattr(torch, written))
    llava, got = load(folder, "cpu", asked), getattr(torch, got)
    assert {p.dtype for p in llava.parameters()} == {got} == {logits(llava).dtype}
    stored = tensors(CONFIGS["shared"])["multi_modal_projector.linear_1.weight"].to(getattr(torch, written))
    assert torch.equal(llava.multi_modal_projector.linear_1.weight, stored.to(got))


NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize("change, dtype, message", [
    (lambda t: t.pop(NORM), None, "Missing key.*language_model.norm.weight.*not of one model"),
    (lambda t: t[NORM].fill_(float("nan")), None, f"{NORM} holds integers, NaN or infinite values"),
    (lambda t: t.update({NORM: torch.ones(60, dtype=torch.int8)}), None, f"{NORM} holds integers"),
    (lambda t: t.update({"model.language_model.norm.weight": torch.ones(60)}), None, "is stored twice"),
    (lambda t: t[NORM].fill_(1e6), "float16", "does not fit into torch.float16; use --dtype bfloat16")])
def test_weights_that_do_not_fit(folder, change, dtype, message):
    rewrite(folder, change)
    with pytest.raises(BadInput, match=message) as caught:
        load(folder, "cpu", dtype)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


# ---- what a checkpoint's files say -------------------------------------------------------------------------------

def say(folder, file, **entries):
    """Set entries of a JSON file of the folder; "a.b" is entry b of a."""
    path = folder / file
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name, value in entries.items():
        *outer, last = name.split("__")
        place = found
        for key in outer:
            place = place[key]
        place[last] = value
    path.write_text(json.dumps(found))


REFUSED = {
    "config.json": dict(
        model_type="llava_next", quantization_config="awq", projector_hidden_act="relu",
        multimodal_projector_bias=False, vision_feature_select_strategy="full", vision_feature_layer=[-2, -5],
        text_config__model_type="mistral", text_config__hidden_act="gelu", text_config__attention_bias=True,
        text_config__mlp_bias=True, text_config__rope_scaling={"rope_type": "linear"},
        text_config__rope_parameters={"partial_rotary_factor": .5}, text_config__vocab_size="60",
        vision_config__hidden_act="relu", vision_config__model_type="siglip"),
    "preprocessor_config.json": dict(
        image_mean=[.5, .5, .5], do_normalize=False, resample=2, rescale_factor=1., size=48),
    "processor_config.json": dict(image_processor={"image_std": [.5, .5, .5]}),
    "added_tokens.json": {"[LOC]": 405},
    "tokenizer_config.json": dict(added_tokens_decoder={"405": {"content": "[LOC]"}}),
}


@pytest.mark.parametrize("file, entry, value", [(file, *item) for file in REFUSED for item in REFUSED[file].items()])
def test_what_is_not_done_is_refused_by_its_name(folder, file, entry, value):
    say(folder, file, **{entry: value})
    while isinstance(value, dict):  # the innermost entry is named, of an added token its text
        (entry, value), *_ = value.items()
    with pytest.raises(BadInput) as caught:
        load(folder, "cpu")
    said = str(caught.value)
    assert said.startswith(str(folder)) and (entry.split("__")[-1] in said or "[LOC]" in said) and "\n" not in said


def test_what_says_the_usual_in_other_words_loads(whole, folder):
    say(folder, "config.json", vision_feature_layer=[-2], text_config__rope_scaling={"rope_type": "default"})
    say(folder, "added_tokens.json", **{"<image>": 400, "<pad>": 401})
    say(folder, "tokenizer_config.json", pad_token="<end>", added_tokens_decoder={"402": {"content": "<end>"}})
    assert torch.equal(logits(load(folder, "cpu")), whole)


def test_where_an_answer_ends(folder):
    """generation_config.json's token, else config.json's, else text_config's, else LLaMA's 2."""
    def eos():
        return model.read_config(folder)[1].eos_ids
    assert eos() == [2]
    say(folder, "config.json", text_config__eos_token_id=7)
    assert eos() == [7]
    say(folder, "config.json", eos_token_id=[8, 9])
    assert eos() == [8, 9]
    say(folder, "generation_config.json", eos_token_id=10)
    assert eos() == [10]


def test_what_changes_answers_elsewhere_is_said_once(folder, capsys):
    say(folder, "generation_config.json", repetition_penalty=1.05, num_beams=1, suppress_tokens=[])
    say(folder, "chat_template.json", chat_template="[INST] {{ text }} [/INST]")
    load(folder, "cpu"), load(folder, "cpu")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and any("repetition_penalty = 1.05 is not applied" in line for line in lines)
    assert any("its chat template is not the one used here" in line for line in lines)


# ---- sizes of the published models -------------------------------------------------------------------------------

HUB_7B = dict(
    model_type="llava", image_token_index=32000, projector_hidden_act="gelu", vision_feature_layer=-2,
    vision_feature_select_strategy="default", tie_word_embeddings=False, vocab_size=32064,
    text_config=dict(max_position_embeddings=4096, model_type="llama", rms_norm_eps=1e-5, vocab_size=32064),
    vision_config=dict(hidden_size=1024, image_size=336, intermediate_size=4096, model_type="clip_vision_model",
                       num_attention_heads=16, num_hidden_layers=24, patch_size=14))
SIZES_13B = dict(hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_hidden_layers=40,
                 num_key_value_heads=40)


@pytest.mark.parametrize("text, layers, width, heads, total, names", [
    ({}, 32, 4096, 32, 7_063_427_072, 686), (SIZES_13B, 40, 5120, 40, 13_351_494_656, 758)])
def test_sizes_that_config_json_leaves_out(text, layers, width, heads, total, names):
    """The 7B's file states hardly any: the library's defaults hold, two are overridden. Counted on the meta device."""
    config = LLaVA.read_config(Path("x"), HUB_7B | {"text_config": HUB_7B["text_config"] | text})
    want = dict(num_hidden_layers=layers, hidden_size=width, num_key_value_heads=heads, head_dim=128, rope_theta=10000.,
                rms_norm_eps=1e-5, max_position_embeddings=4096, vocab_size=32064, image_token=32000, eos_ids=[2])
    assert {k: getattr(config, k) for k in want} == want
    with torch.device("meta"):
        llava = LLaVA(config)
    unused = 12 * 1024 ** 2 + 15 * 1024  # the tower's last layer and post_layernorm
    assert sum(p.numel() for p in llava.parameters()) + unused == total
    assert len(list(llava.parameters())) + 18 == names and llava.grid == (24, 24)
    layer = llava.vision_tower.encoder.layers[0]
    assert layer.mlp.quick and layer.layer_norm1.eps == 1e-5 and layer.self_attn.heads == 16


def test_the_librarys_other_defaults():
    given = {"vision_config": {"model_type": "clip_vision_model"}, "image_token_id": 7,
             "text_config": {"rope_parameters": {"rope_theta": 500., "rope_type": "default"}}}
    config = LLaVA.read_config(Path("x"), given)
    assert (config.rms_norm_eps, config.max_position_embeddings, config.vocab_size) == (1e-6, 2048, 32000)
    assert (config.vision["hidden_size"], config.vision["num_hidden_layers"]) == (768, 12)
    assert (config.vision["image_size"], config.image_token, config.rope_theta) == (224, 7, 500)


@pytest.mark.parametrize("feature, used", [(-2, 3), (-1, 4), (1, 1)])
def test_the_feature_layer_counts_as_in_the_library(feature, used):
    """0 is what enters the first layer, n what leaves the n-th; negative from the end."""
    config = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, image_size=28,
                  vision_feature_layer=feature)
    tower = CLIPVision(config)
    assert len(tower.encoder.layers) == used and tower(torch.zeros(2, 3, 28, 28)).shape == (2, 4, 8)


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
    assert slow.tokenize(llama, prompt(question, history)) == BEFORE + [32000] + after
    assert llama.tail(BEFORE + [32000] + after) == after


def test_an_end_typed_by_a_user_is_text(llama):
    """In a rendered prompt no one can tell who wrote </s>; from question and history it is known."""
    typed = llama.prompt_ids("What is </s> <image>?", [("</s>", "a </s>")])
    assert typed.count(2) == 1 and typed.count(32000) == 1
    first, second = ids("29871 13 829 29879 29958"), ids("11889 29901 1724 338 1533 29879 29958 529 3027 29958 29973")
    answer = ids("263 1533 29879 29958 2")
    assert typed[36:] == first + ASSISTANT + answer + second + ASSISTANT
    assert llama.detokenize([3869, 2]) == llama.detokenize([3869]) == "Yes"


# ---- pictures ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("w, h, left, top", [(5, 8, 1, 0), (8, 3, 0, 2)])
def test_padding_to_a_square(w, h, left, top):
    """An odd difference puts the extra line at the right or at the bottom. 8 pixels to 8: no resampling."""
    shot = picture(w, h, 1)
    want = np.full((8, 8, 3), (122, 116, 104), dtype=np.uint8)
    want[top:top + h, left:left + w] = np.asarray(shot)
    assert torch.equal(preprocess(shot, 8), to_tensor(want))


def test_a_crop_is_stretched_bilinearly():
    """2 x 1 pixels to 4 x 4: the aspect is not kept, and nothing beside the box comes in."""
    shot = Image.new("RGB", (6, 5), (255, 0, 0))
    shot.putpixel((2, 3), (0, 0, 0))
    shot.putpixel((3, 3), (200, 200, 200))
    want = np.zeros((4, 4, 3)) + np.array([0, 50, 150, 200])[:, None]
    assert torch.equal(preprocess_crop(shot, (2, 3, 4, 4), 4), to_tensor(want))


@pytest.mark.parametrize("orientation, corner", [
    (1, (0, 0)), (2, (0, -1)), (3, (-1, -1)), (4, (-1, 0)), (5, (0, 0)), (6, (0, -1)), (7, (-1, -1)), (8, (-1, 0))])
def test_exif_orientation_is_applied(tmp_path, orientation, corner):
    """The tag says at which corner of the true picture the stored first pixel lies; from 5 on it lies on its side."""
    stored = Image.new("RGB", (64, 32), "blue")
    stored.paste("red", (0, 0, 16, 16))
    exif = stored.getexif()
    exif[0x0112] = orientation
    for kind in "JPEG", "PNG":
        stored.save(tmp_path / "photo", kind, exif=exif)
        shot = np.asarray(load_image(tmp_path / "photo"))
        assert shot.shape == ((32, 64, 3) if orientation < 5 else (64, 32, 3))
        assert shot[corner][0] > 200 and (shot[..., 0] > 128).sum() == 256


def test_damaged_exif_is_no_orientation(tmp_path):
    for kind in "JPEG", "PNG", "WEBP", "TIFF":
        picture(40, 30, 1).save(tmp_path / "a", kind, exif=b"Exif\0\0MM\0*\0\0\xff\xff\xff\xff")
        assert load_image(tmp_path / "a").size == (40, 30)


def saved(path, values, kind="PNG", **how):
    Image.fromarray(np.array(values)).save(path, kind, **how)
    return [load_image(path).getpixel((x, 0)) for x in range(len(values[0]))]


def test_depths(tmp_path):
    """16 bits are scaled by their range, inverted and transparent ones too; what has no range is refused."""
    deep = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    grey = [(0,) * 3, (100,) * 3, (255,) * 3]
    assert saved(tmp_path / "a.png", deep) == saved(tmp_path / "a.tif", deep, "TIFF") == grey
    assert saved(tmp_path / "a.tif", deep, "TIFF", tiffinfo={262: 0}) == grey[::-1][:1] + [(155,) * 3] + grey[:1]
    assert saved(tmp_path / "t.png", deep, transparency=25700) == [grey[0], grey[2], grey[2]]
    for wide in np.float32([[0., .5, 1.]]), np.int32([[0, 70000, 5]]):
        with pytest.raises(BadInput, match="32 bits a value have no defined range"):
            saved(tmp_path / "wide.tif", wide, "TIFF")


def test_long_metadata_and_pipes(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * (3 << 20), zip=True)
    picture(40, 30, 1).save(tmp_path / "a.png", pnginfo=info)
    assert load_image(tmp_path / "a.png").size == (40, 30)
    os.mkfifo(tmp_path / "pipe")
    data = (tmp_path / "a.png").read_bytes()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[data])
    writer.start()
    assert load_image(tmp_path / "pipe").size == (40, 30)
    writer.join()


def test_pictures_that_can_not_be_read(tmp_path):
    picture(40, 30, 1).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    for name in "cut.png", "absent.png":
        with pytest.raises(BadInput, match="use an intact JPEG, PNG") as caught:
            load_image(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))


def test_printed_text_keeps_its_letters():
    text = "नमस्\u200dते \u00a0« oui » 👩\u200d👧 \u202b"
    assert printable(text) == text
    assert printable("a\x1b[2J\x9b\u2028\ud800\r") == r"a\x1b[2J\x9b\u2028\ud800\r"

"""bpe.py: golden ids of another library (tests/golden/make_golden_bpe.py), hand-made vocabularies, bad files."""
import json
import re
from pathlib import Path

import pytest

from backbones.bpe import BPE, byte_letters, translate
from clip import BadInput

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "bpe.json").read_text(encoding="utf-8"))
LETTERS = byte_letters()


@pytest.fixture
def qwen(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(CASES["qwen_tokenizer"]), encoding="utf-8")
    return BPE(path)


@pytest.fixture
def deepseek():
    return BPE(GOLDEN / "deepseek_tokenizer.json")


def hand_made(tmp_path, rules, merges=(), added=()):
    """A tokenizer.json whose first 256 ids are the bytes; every merge appends the next id."""
    vocab = {letter: byte for byte, letter in enumerate(LETTERS)}
    for merge in merges:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    added = [dict(id=len(vocab) + n, content=text, special=special) for n, (text, special) in enumerate(added)]
    content = {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*rules, last]},
               "model": {"type": "BPE", "vocab": vocab, "merges": list(merges)}, "added_tokens": added}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# ---- another library

@pytest.mark.parametrize("family", ["qwen", "deepseek"])
def test_ids_are_the_reference_librarys(family, request):
    bpe = request.getfixturevalue(family)
    for text, ids in zip(CASES["texts"], CASES[family], strict=True):
        assert bpe.encode(text, special=True) == ids, text


@pytest.mark.parametrize("family", ["qwen", "deepseek"])
def test_every_text_comes_back(family, request):
    bpe = request.getfixturevalue(family)
    for text in CASES["texts"]:
        if text != "e\u0301 Ü ü" and "\u0338" not in text or family == "deepseek":  # Qwen composes these first
            assert bpe.decode(bpe.encode(text)) == text


# ---- by hand

def test_merges_follow_their_rank_not_the_text(tmp_path):
    """"abc" with "b c" learnt before "a b": bc is made first, and a finds no partner."""
    bpe = BPE(hand_made(tmp_path, [], ["b c", "a b"]))
    assert bpe.encode("abc") == [ord("a"), 256] and bpe.encode("ab") == [257]
    assert bpe.encode("bcbc") == [256, 256]


def test_merges_may_be_pairs_too(tmp_path):
    path = hand_made(tmp_path, [], ["Ġ t", "Ġt o"])
    content = json.loads(path.read_text())
    content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    path.write_text(json.dumps(content))
    assert BPE(path).encode(" to") == [257]


def test_each_rule_splits_the_pieces_of_the_one_before(tmp_path):
    """Letters first, so the digits of the second rule never meet them; `$` is the end of a piece, not of the text."""
    merges = ["a b", "1 2", "b 1", "Ġ Ġ"]
    bpe = BPE(hand_made(tmp_path, [split("[a-z]+"), {"type": "Digits", "individual_digits": True}], merges))
    assert bpe.encode("ab12") == [256, ord("1"), ord("2")]
    bpe = BPE(hand_made(tmp_path, [split("[a-z]+"), split(r"\s$")], merges))
    space = LETTERS.index("Ġ")
    assert bpe.encode("  a") == [space, space, ord("a")]  # the last space before the letters is cut off by `\s$`
    assert bpe.encode("a12") == [ord("a"), 257]


def test_added_tokens(tmp_path):
    """Ordinary ones are always split off, the longest first; special ones only where the caller's template is read."""
    bpe = BPE(hand_made(tmp_path, [], ["x x"], [("ü", False), ("üü", False), ("<eos>", True)]))
    assert (bpe.token_id("ü"), bpe.token_id("<eos>"), bpe.token_id("xx"), bpe.size) == (257, 259, 256, 260)
    assert bpe.encode("xüüüx") == [ord("x"), 258, 257, ord("x")]
    assert bpe.encode("<eos>") == [*b"<eos>"] and bpe.encode("a<eos>b", special=True) == [ord("a"), 259, ord("b")]
    assert bpe.decode([258, 259, 120, 999]) == "üüx"
    with pytest.raises(BadInput, match="no token <image>"):
        bpe.token_id("<image>")


def test_unused_bytes_of_deepseek_are_letters(deepseek):
    """The 13 letters are added tokens, in a row, and only they."""
    first = deepseek.token_id("ø")
    assert [deepseek.token_id(c) for c in "øöúÿõ÷ûýÀùÁþü"] == [*range(first, first + 13)]
    assert deepseek.encode("Fü") == [deepseek.token_id("F"), deepseek.token_id("ü")]
    assert not set("øöúÿõ÷ûýÀùÁþü") & set(deepseek.vocab) and len(set(deepseek.vocab) & set(LETTERS)) == 256 - 13


def test_bytes_that_are_no_text(deepseek):
    """A character cut in two by the token limit, and a lone surrogate from the command line."""
    ids = deepseek.encode("猫")
    assert len(ids) == 3 and deepseek.decode(ids[:2]) == "\ufffd"
    assert deepseek.encode("a\udc80") == deepseek.encode("a?")


def test_python_white_space_is_not_unicodes():
    pattern = re.compile(translate(r"\s"))
    assert re.match(r"\s", "\x1c") and not pattern.match("\x1c")
    assert all(pattern.match(c) for c in " \t\n\x0b\x0c\r\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000")


def test_letters_and_digits_are_unicodes():
    word = re.compile(translate(r"\p{L}+|[^\p{L}\p{N}]"))
    assert word.findall("naïve٣漢ʔ!_") == ["naïve", "漢ʔ", "!", "_"]


# ---- bad files

@pytest.mark.parametrize("change", [
    {"model": {"type": "WordPiece", "vocab": {}}},
    {"model": {"type": "BPE", "vocab": {"▁a": 0}, "merges": [], "byte_fallback": True}},
    {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
    {"model": {"type": "BPE", "vocab": {"▁a": 0}, "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}},
    {"pre_tokenizer": None}, {"pre_tokenizer": {"type": "Metaspace"}}, {"pre_tokenizer": []},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": False}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(r"\w+")]}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        split("("), {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}},
    {"normalizer": {"type": "Lowercase"}}, {"added_tokens": None}, {"added_tokens": [{"id": 1}]},
])
def test_another_kind_is_one_line(tmp_path, change):
    path = hand_made(tmp_path, [])
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput) as e:
        BPE(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value) and "use the tokenizer.json of" in str(e.value)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(BadInput, match="missing"):
        BPE(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"model": {')
    with pytest.raises(BadInput, match="not readable as JSON"):
        BPE(tmp_path / "tokenizer.json")

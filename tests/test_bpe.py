"""bpe.py: ids of the reference library (tests/golden/make_golden_bpe.py), vocabularies made by hand, bad files."""
import json
import time
from pathlib import Path

import pytest

from backbones.bpe import BPE, byte_letters
from clip import BadInput

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "bpe.json").read_text(encoding="utf-8"))
DEEPSEEK, QWEN = (json.loads((GOLDEN / f"{name}_tokenizer.json").read_text(encoding="utf-8"))
                  for name in ("deepseek", "qwen"))
LETTERS = byte_letters()
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
WORDS = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}


@pytest.fixture
def read(tmp_path):
    """read(content of tokenizer.json) -> BPE"""
    def read(content):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        return BPE(tmp_path / "tokenizer.json")
    return read


def by_hand(merges=(), added=()):
    """A tokenizer.json whose first 256 ids are the bytes. Each merge adds the next id, then each added token does."""
    vocab = {letter: byte for byte, letter in enumerate(LETTERS)}
    for merge in merges:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    tokens = [dict(id=len(vocab) + n, content=text, special=special) for n, (text, special) in enumerate(added)]
    return {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL]},
            "model": {"type": "BPE", "vocab": vocab, "merges": list(merges)}, "added_tokens": tokens}


@pytest.mark.parametrize("family, content", [("qwen", QWEN), ("deepseek", DEEPSEEK)])
def test_ids_are_the_reference_librarys(read, family, content):
    bpe = read(content)
    for text, ids in zip(CASES["texts"], CASES[family], strict=True):
        assert bpe.encode(text, special=True) == ids, text
        if "\u0301" not in text and "\u0338" not in text:  # Qwen composes these
            assert bpe.decode(bpe.encode(text)) == text


def test_merges_follow_their_rank_not_the_text(read):
    """"b c" is learnt before "a b", so in "abc" a finds no partner. A file spells a pair "b c" or ["b", "c"]."""
    content = by_hand(["b c", "a b", "Ġ bc"])
    for merges in (["b c", "a b", "Ġ bc"], [["b", "c"], ["a", "b"], ["Ġ", "bc"]]):
        content["model"]["merges"] = merges
        bpe = read(content)
        assert bpe.encode("abc") == [ord("a"), 256] and bpe.encode("ab bc") == [257, 258]


def test_a_long_run_without_spaces_takes_no_time(read):
    began = time.perf_counter()
    assert len(read(DEEPSEEK).encode("中文" * 8000)) > 8000
    assert time.perf_counter() - began < 10  # quadratic: minutes


def test_added_tokens(read):
    """Ordinary ones are always cut out, the longest first; special ones only where a template is read."""
    bpe = read(by_hand(["x x"], added=[("ü", False), ("üü", False), ("<eos>", True)]))
    assert (bpe.token_id("ü"), bpe.token_id("<eos>"), bpe.token_id("xx"), bpe.size) == (257, 259, 256, 260)
    assert bpe.encode("xüüüx") == [ord("x"), 258, 257, ord("x")]
    assert bpe.encode("<eos>") == [*b"<eos>"] and bpe.encode("a<eos>b", special=True) == [ord("a"), 259, ord("b")]
    assert bpe.decode([258, 259, 120, 999]) == "üüx"
    with pytest.raises(BadInput, match="no token <image>"):
        bpe.token_id("<image>")


def test_tokens_that_a_fine_tune_added(read, tmp_path, capsys):
    """Special ones are said; one that tokenizer.json does not hold is refused."""
    read(by_hand(added=[("[LOC]", True)]))
    assert "such as [LOC] are not read" in capsys.readouterr().err
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"300": {"content": "[BOX]"}}}')
    with pytest.raises(BadInput, match="no token .BOX."):
        read(by_hand())


def test_bytes_that_are_no_text(read):
    """A character cut in two by the token limit, and a lone surrogate from the command line."""
    bpe = read(DEEPSEEK)
    ids = bpe.encode("猫")
    assert len(ids) == 3 and bpe.decode(ids[:2]) == "\ufffd"
    assert bpe.encode("a\udc80") == bpe.encode("a?")


@pytest.mark.parametrize("change, says", [
    ({"model": {"type": "BPE", "vocab": {"▁a": 0}, "merges": [], "byte_fallback": True}}, "byte_fallback"),
    ({"model": {"type": "BPE", "vocab": {"▁a": 0}, "merges": []}}, "▁"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "pretokenizers"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [WORDS, BYTE_LEVEL]}}, r"\\w"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL | {"use_regex": True}]}}, "use_regex"),
    ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ({"added_tokens": [{"id": 1, "content": "x", "special": True, "lstrip": True}]}, "lstrip")])
def test_another_kind_is_refused_by_name(read, change, says):
    with pytest.raises(BadInput, match=rf"tokenizer\.json.*{says}.*use the tokenizer.json of"):
        read(by_hand() | change)


def test_missing_and_damaged_files(tmp_path):
    for content in (None, '{"model": {'):
        if content:
            (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(BadInput, match="tokenizer.json"):
            BPE(tmp_path / "tokenizer.json")

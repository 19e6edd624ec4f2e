"""Makes qwen_tokenizer.json, deepseek_tokenizer.json and bpe.json: two small vocabularies, and the ids of some texts.

    python tests/golden/make_golden_bpe.py      # in an environment with tokenizers (0.23)

All that the project's bpe.py does is done here by the `tokenizers` library; random texts compare the two.
"""
import json
import random
import sys
import unicodedata
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent)]

from qwen_formula import PIECES, SHORT, SPECIALS, SYSTEM  # noqa: E402
from backbones.bpe import BPE  # noqa: E402

LETTERS = "A-Za-zµÀ-ÖØ-öø-ƺΆΈ-ΊΌΎ-ΡΣ-ώА-ҁҊ-ԯḀ-ἕ"  # the real class holds 2,729 cased letters
SIGNS = "!-/:-~！-／：-～‘-‟　-。"  # as in the real file: `:-~` spans A-Z and a-z
UNUSED = "øöúÿõ÷ûýÀùÁþü"  # what names the bytes that UTF-8 never uses
DEEPSEEK = ["[\r\n]", rf"\s?[{LETTERS}]+", rf"\s?[{SIGNS}]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+"]
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+")
CORPUS = [
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user ",
    "provides, and assist the user with a variety of tasks using natural language.\n\nUser: What is written on the ",
    "red sign over the door?\nAnswer the question using a single word or phrase.\n\nAssistant: exit, it is on the left",
    "What color is the car? dark blue. How many books are there on the table? 40 books, 12 plates and 3 cups",
    "Where is the cat?", "système naïve café", "Où est le chat? Führer, Straße, Öl. naïve cafés",
    "中文，测试。这是什么？红色的牌子上写着什么？", "12,345.67 + 89 = ???  x_y (a) [b]", SYSTEM, SHORT, "system\n", "user\n",
    "assistant\n", "Who is the author of this book? How many people are there in the picture? There are two. No, yes."]
TEXTS = [
    "", " ", "  \n", "Hello world", "User: ", "Assistant:", "What is this?\n", "Don't count 12,345 naïve cafés!",
    "e\u0301 Ü ü", "中文，测试。", "Führer", "øöúÿõ÷ûýÀùÁþü", "  two  spaces ", "line\r\n\r\nline\n", "tab\t\tend\t",
    "a\x1cb\x1f c\x85d\xa0e\u3000f\u2028g",
    "IT'S we'LL I'm", "½ Ⅷ ٣", "👍🏽 ok", "’quoted‘ “x”", "~`^_|", "<|im_start|>user\n", "<tool_call>{}</tool_call>",
    "<image_placeholder> typed", "日本語 한국어", "x\u0338>\u0338", "ΩΛЖя Ẁ ʔ", "http://x.y/z?a=1&b=2", "\ufeff\x00\x07",
]


def train(patterns, size, digits=(), unused="", compose=False):
    """A byte-level tokeniser with these rules, trained on CORPUS."""
    tokenizer = Tokenizer(models.BPE())
    rules = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*rules, *digits, last])
    tokenizer.decoder = decoders.ByteLevel()
    if compose:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in unused]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    assert tokenizer.get_vocab_size() == size
    return tokenizer


def add(tokenizer, tokens, special):
    for token in tokens:
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])


def random_text(rng):
    """Pieces of TEXTS and single characters that Python's Unicode tables know."""
    text = ""
    for _ in range(rng.randint(0, 9)):
        start = rng.choice(TEXTS)
        character = chr(rng.choice([rng.randint(32, 126), rng.randint(0xa0, 0x24ff), rng.randint(0x2500, 0x1ffff)]))
        known = unicodedata.category(character) not in ("Cn", "Cs")
        text += character if known and rng.random() < 0.3 else start[rng.randint(0, 9):]
    return text


def compare(name, tokenizer):
    """Save a tokeniser, and count the random texts that the project's encodes in another way."""
    tokenizer.save(str(HERE / name), pretty=False)
    ours, rng, off = BPE(HERE / name), random.Random(0), 0
    for _ in range(20_000):
        text = random_text(rng)
        off += ours.encode(text, special=True) != tokenizer.encode(text, add_special_tokens=False).ids
    print(f"{name}: {off} of 20000 random texts differ")


def main():
    deepseek = train(DEEPSEEK, 380, [pre_tokenizers.Digits(individual_digits=True)], UNUSED)
    add(deepseek, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], True)
    add(deepseek, UNUSED, False)
    add(deepseek, ["<image_placeholder>"], True)
    qwen = train([QWEN], PIECES, compose=True)
    add(qwen, SPECIALS, True)
    add(qwen, ["<tool_call>", "</tool_call>"], False)
    golden = {"texts": TEXTS}
    for name, tokenizer in ("deepseek", deepseek), ("qwen", qwen):
        compare(f"{name}_tokenizer.json", tokenizer)
        golden[name] = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    (HERE / "bpe.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

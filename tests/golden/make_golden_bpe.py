"""Makes bpe.json and deepseek_tokenizer.json: small vocabularies of the two families' shapes, the ids of some texts.

    python tests/golden/make_golden_bpe.py                     # in an environment with tokenizers (0.23)
    python tests/golden/make_golden_bpe.py qwen.tiktoken       # also compares Qwen's whole vocabulary on random texts

All that the project's bpe.py does is done here by the `tokenizers` library. qwen.tiktoken lies in PyPI's dashscope.
"""
import base64
import json
import random
import sys
import tempfile
import unicodedata
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent)]

LETTERS = "A-Za-zµÀ-ÖØ-öø-ƺΆΈ-ΊΌΎ-ΡΣ-ώА-ҁҊ-ԯḀ-ἕ"                # the real class holds 2,729 cased letters
SIGNS = "!-/:-~！-／：-～‘-‟　-。"                                   # as in the real file: `:-~` spans A-Z and a-z
UNUSED = "øöúÿõ÷ûýÀùÁþü"                                            # what names the bytes that UTF-8 never uses
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+")
CORPUS = [
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user ",
    "provides, and assist the user with a variety of tasks using natural language.\n\nUser: What is written on the ",
    "red sign over the door?\nAnswer the question using a single word or phrase.\n\nAssistant: exit, it is on the left",
    "What color is the car? dark blue. How many books are there on the table? 40 books, 12 plates and 3 cups",
    "Where is the cat?", "système naïve café", "Où est le chat? Führer, Straße, Öl. naïve cafés",
    "中文，测试。这是什么？红色的牌子上写着什么？", "12,345.67 + 89 = ???  x_y (a) [b]",
]
TEXTS = [
    "", " ", "  \n", "Hello world", "User: ", "Assistant:", "What is this?\n", "Don't count 12,345 naïve cafés!",
    "e\u0301 Ü ü", "中文，测试。", "Führer", "øöúÿõ÷ûýÀùÁþü", "  two  spaces ", "line\r\n\r\nline\n", "tab\t\tend\t",
    "a\x1cb\x1f c\x85d\xa0e\u3000f\u2028g",
    "IT'S we'LL I'm", "½ Ⅷ ٣", "👍🏽 ok", "’quoted‘ “x”", "~`^_|", "<|im_start|>user\n", "<tool_call>{}</tool_call>",
    "<image_placeholder> typed", "日本語 한국어", "x\u0338>\u0338", "ΩΛЖя Ẁ ʔ", "http://x.y/z?a=1&b=2", "\ufeff\x00\x07",
]


def byte_level(rules):
    return pre_tokenizers.Sequence([*rules, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def finish(tokenizer, special, ordinary, last=()):
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ordinary])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in last])
    return tokenizer


def train(tokenizer, size, unused=""):
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in unused]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)


def small_deepseek():
    tokenizer = Tokenizer(models.BPE())
    patterns = ["[\r\n]", rf"\s?[{LETTERS}]+", rf"\s?[{SIGNS}]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+"]
    tokenizer.pre_tokenizer = byte_level([*(pre_tokenizers.Split(Regex(p), "isolated") for p in patterns),
                                          pre_tokenizers.Digits(individual_digits=True)])
    train(tokenizer, 380, UNUSED)
    return finish(tokenizer, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], UNUSED, ["<image_placeholder>"])


def qwen_rules(tokenizer):
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = byte_level([pre_tokenizers.Split(Regex(QWEN), "isolated")])
    return tokenizer


def small_qwen():
    tokenizer = qwen_rules(Tokenizer(models.BPE()))
    train(tokenizer, 360)
    return finish(tokenizer, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>"])


def whole_qwen(path):
    """Qwen's published vocabulary: bytes and ranks; a token's pair is what its bytes merge to by lower ranks."""
    from backbones.bpe import byte_letters
    letters = byte_letters()
    lines = (line.split() for line in Path(path).read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    merges = []
    for token, rank in ranks.items():
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(tuple("".join(letters[b] for b in part) for part in parts))
    vocab = {"".join(letters[b] for b in token): rank for token, rank in ranks.items()}
    return finish(qwen_rules(Tokenizer(models.BPE(vocab, merges))), ["<|im_start|>"], ["<tool_call>"])


def random_text(rng):
    """Pieces of TEXTS and single characters that Python's Unicode tables know."""
    text = ""
    for _ in range(rng.randint(0, 9)):
        start = rng.choice(TEXTS)
        character = chr(rng.choice([rng.randint(32, 126), rng.randint(0xa0, 0x24ff), rng.randint(0x2500, 0x1ffff)]))
        known = unicodedata.category(character) not in ("Cn", "Cs")
        text += character if known and rng.random() < 0.3 else start[rng.randint(0, 9):]
    return text


def compare(name, tokenizer, count=20_000):
    from backbones.bpe import BPE
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        ours, rng, off = BPE(f"{folder}/tokenizer.json"), random.Random(0), 0
    for _ in range(count):
        text = random_text(rng)
        off += ours.encode(text, special=True) != tokenizer.encode(text, add_special_tokens=False).ids
    print(f"{name}: {off} of {count} random texts differ")


def main():
    made, golden = {"deepseek": small_deepseek(), "qwen": small_qwen()}, {}
    for name, tokenizer in made.items():
        compare(name, tokenizer)
        golden[name] = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    made["deepseek"].save(str(HERE / "deepseek_tokenizer.json"), pretty=False)
    golden = {"texts": TEXTS, **golden, "qwen_tokenizer": json.loads(made["qwen"].to_str())}
    (HERE / "bpe.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")
    if len(sys.argv) > 1:
        compare("qwen.tiktoken", whole_qwen(sys.argv[1]))


if __name__ == "__main__":
    main()

"""
Text <-> ids by byte-level BPE, read from a checkpoint's tokenizer.json: the tokeniser of DeepSeek-VL and Qwen2.5-VL.

    bpe = BPE("deepseek-vl-1.3b-chat/tokenizer.json")
    bpe.encode("Hello world")               # [17464, 1843]
    bpe.decode([17464, 1843])               # "Hello world"
    bpe.token_id("<image_placeholder>")     # 100015

Four steps: added tokens are split off by their content; the normaliser; the pre-tokeniser's rules cut what lies between
into pieces, each rule within the pieces of the one before; the bytes of each piece are merged, pair by pair, in the order
in which the pairs were learnt. All rules are the file's own; only their regular expressions are translated for `re`.
Left out: training a vocabulary, and every tokenizer.json that is not byte-level BPE (those are refused).
"""
import functools
import re
import sys
import unicodedata
from pathlib import Path

from clip import BadInput
from model import read_json

SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's; Python's \s also takes \x1c-\x1f


# -------------------------------------------------------------------------------------------- the file's rules

@functools.cache
def members(category):
    """The inside of a character class that holds a Unicode category, e.g. "L" (letters) or "Nd" (decimal digits).

    >>> members("Zs")
    '\\\\U00000020-\\\\U00000020\\\\U000000a0-\\\\U000000a0\\\\U00001680-\\\\U00001680\\\\U00002000-\\\\U0000200a\
\\\\U0000202f-\\\\U0000202f\\\\U0000205f-\\\\U0000205f\\\\U00003000-\\\\U00003000'
    """
    inside = [unicodedata.category(chr(i)).startswith(category) for i in range(sys.maxunicode + 1)] + [False]
    edges = [i for i in range(len(inside)) if inside[i] != inside[i - 1]]  # first, last + 1, first, last + 1, ...
    return "".join(rf"\U{a:08x}-\U{b - 1:08x}" for a, b in zip(edges[::2], edges[1::2], strict=True))


def translate(pattern):
    r"""A regular expression of tokenizer.json -> the same for `re`: \s and \p{..} are spelled out, $ is the end of the piece.

    >>> translate(r"\s+$") == f"[{SPACE}]+\\Z"
    True
    >>> translate(r" ?[^\s,]+") == f" ?[^{SPACE},]+"
    True
    """
    python, in_class = "", False
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if part == r"\s" or part.startswith(r"\p"):
            inside = SPACE if part == r"\s" else members(part[3:-1])
            python += inside if in_class else f"[{inside}]"
        elif part == r"\S" and not in_class:
            python += f"[^{SPACE}]"
        elif part == "$" and not in_class:
            python += r"\Z"
        elif re.fullmatch(r"\\[a-zA-Z]", part) and part not in (r"\r", r"\n", r"\t"):
            raise ValueError(f"{part} in {pattern[:30]}")
        else:
            in_class = part == "[" or (in_class and part != "]")
            python += part
    return python


def isolate(pattern, text):
    """Cut text so that each match is a piece of its own.

    >>> isolate(re.compile("[0-9]"), "ab12c")
    ['ab', '1', '2', 'c']
    """
    pieces, end = [], 0
    for match in pattern.finditer(text):
        pieces += [text[end:match.start()], match.group()]
        end = match.end()
    return [piece for piece in [*pieces, text[end:]] if piece]


def read_rule(rule):
    """One entry of the pre-tokeniser -> a compiled pattern to isolate. Raises ValueError for one we do not know."""
    if rule["type"] == "Digits" and rule["individual_digits"]:
        return re.compile(f"[{members('N')}]")
    if rule["type"] == "Split" and rule["behavior"] == "Isolated" and not rule["invert"]:
        (kind, pattern), = rule["pattern"].items()
        return re.compile(translate(pattern) if kind == "Regex" else re.escape(pattern))
    raise ValueError(f"pre-tokeniser {rule['type']}")


def flatten(part, key):
    """None, one entry, or a Sequence of entries under `key` -> a list of entries."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


# ------------------------------------------------------------------------------------------------------- bytes

def byte_letters():
    """The 256 characters in which tokenizer.json writes bytes: printable ones stand for themselves, the others
    (space, control, ...) for the characters from 256 on, in order.

    >>> letters = byte_letters()
    >>> letters[ord("A")], letters[ord(" ")], letters[ord("\\n")], len(set(letters))
    ('A', 'Ġ', 'Ċ', 256)
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def merge(symbols, ranks):
    """Join pairs of neighbours until none is left that was learnt, the pair learnt first (lowest rank) first.

    >>> merge(list("hello"), {("l", "o"): 0, ("h", "e"): 1, ("l", "lo"): 2})
    ['he', 'llo']
    """
    while len(symbols) > 1:
        pair = min(zip(symbols, symbols[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if pair not in ranks:
            break
        merged, i = [], 0
        while i < len(symbols):  # every occurrence, from the left
            size = 2 if (*symbols[i:i + 2],) == pair else 1
            merged.append("".join(symbols[i:i + size]))
            i += size
        symbols = merged
    return symbols


# --------------------------------------------------------------------------------------------------- tokeniser

class BPE:
    """The tokeniser of one tokenizer.json. Attributes: path, size (largest id + 1; later rows of the model have no text).

    Added tokens are of two kinds. Special ones (<|im_start|>, end of sentence, ...) belong to the template, so typed by a
    user they stay text. Ordinary ones are text that never merges, DeepSeek's 13 letters ("ü", ...) among them: the
    characters of the bytes that UTF-8 never uses, for which the reference library's decoder prints U+FFFD.
    Raises BadInput for a file that is missing, damaged or of another kind.
    """

    def __init__(self, path):
        self.path, self.letters = path, byte_letters()
        content = read_json(Path(path))
        try:
            self.read(content)
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as e:
            raise BadInput(f"{path}: not byte-level BPE as in DeepSeek-VL and Qwen2.5-VL ({str(e)[:80]}); "
                           "use the tokenizer.json of this checkpoint") from None

    def read(self, content):
        model, added = content["model"], content["added_tokens"]
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or model.get("ignore_merges"):
            raise ValueError(f"model {model.get('type')}")
        normalizers = [part["type"] for part in flatten(content.get("normalizer"), "normalizers")]
        if normalizers not in ([], ["NFC"]):
            raise ValueError(f"normaliser {normalizers}")
        *rules, last = flatten(content["pre_tokenizer"], "pretokenizers")
        if last["type"] != "ByteLevel" or last["add_prefix_space"] or last.get("use_regex", True):
            raise ValueError(f"pre-tokeniser {last['type']}")
        self.form = "".join(normalizers)
        self.rules = [read_rule(rule) for rule in rules]
        self.vocab = model["vocab"]
        pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        unknown = [pair for pair in pairs if len(pair) != 2 or "".join(pair) not in self.vocab]
        if unknown:
            raise ValueError(f"merge {unknown[0]} makes no token")
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.special = {token["content"]: token["id"] for token in added if token["special"]}
        self.ordinary = {token["content"]: token["id"] for token in added if not token["special"]}
        added_ids = {*self.special.values(), *self.ordinary.values()}
        self.texts = {i: token for token, i in self.vocab.items() if i not in added_ids}
        self.size = 1 + max(*self.texts, *added_ids)

    def token_id(self, content):
        """The id of a token by its content, e.g. "<|im_start|>". Raises BadInput if the vocabulary lacks it."""
        for table in (self.special, self.ordinary, self.vocab):
            if content in table:
                return table[content]
        raise BadInput(f"{self.path}: no token {content}; use the tokenizer.json of this checkpoint")

    def encode(self, text, special=False):
        """Text -> ids. special=True: special tokens are taken by their content too, as in a rendered template."""
        added = self.ordinary | (self.special if special else {})
        if not added:
            return self.encode_ordinary(text)
        longest_first = sorted(added, key=len, reverse=True)
        ids = []
        for piece in isolate(re.compile("|".join(map(re.escape, longest_first))), text):
            ids += [added[piece]] if piece in added else self.encode_ordinary(piece)
        return ids

    def encode_ordinary(self, text):
        """Text without added tokens -> ids."""
        pieces = [unicodedata.normalize(self.form, text) if self.form else text]
        for rule in self.rules:
            pieces = [part for piece in pieces for part in isolate(rule, piece)]
        ids = []
        for piece in pieces:
            symbols = [self.letters[byte] for byte in piece.encode("utf-8", "replace")]
            ids += [self.vocab[s] for s in merge(symbols, self.ranks) if s in self.vocab]  # a byte without a token: dropped
        return ids

    def decode(self, ids):
        """Ids -> text; special tokens and ids without text leave nothing, bytes that are no UTF-8 become U+FFFD."""
        content = {i: token.encode() for token, i in self.ordinary.items()}
        byte_of = {letter: byte for byte, letter in enumerate(self.letters)}
        text = b""
        for i in ids:
            if i in content:
                text += content[i]
            elif i in self.texts:
                text += bytes(byte_of[letter] for letter in self.texts[i])
        return text.decode("utf-8", "replace")

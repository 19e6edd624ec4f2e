"""
Text <-> ids by byte-level BPE, read from a checkpoint's tokenizer.json (DeepSeek-VL, Qwen2.5-VL).

    bpe = BPE("deepseek-vl-1.3b-chat/tokenizer.json")
    bpe.encode("Hello world")               # [17464, 1843]
    bpe.decode([17464, 1843])               # "Hello world"
    bpe.token_id("<image_placeholder>")     # 100015

Four steps: added tokens are split off by their content; the normaliser; the pre-tokeniser's rules
cut what lies between into pieces, each rule within the pieces of the one before; the bytes of each
piece are merged, pair by pair, in the order in which the pairs were learnt. All rules are the
file's own; only their regular expressions are translated for `re`.
Left out: training a vocabulary; a tokenizer.json that is not byte-level BPE is refused.
"""
import functools
import re
import sys
import unicodedata
from pathlib import Path

from clip import BadInput
from model import read_json

# Unicode's white space, for inside a class; Python's \s also takes \x1c to \x1f
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


# -------------------------------------------------------------------------------- the file's rules

@functools.cache
def members(category):
    """A Unicode category ("L" letters, "N" digits, ...) as the inside of a character class.

    >>> members("Zl")
    '\\\\U00002028-\\\\U00002028'
    """
    every = range(sys.maxunicode + 1)
    inside = [unicodedata.category(chr(i)).startswith(category) for i in every] + [False]
    edges = [i for i in range(len(inside)) if inside[i] != inside[i - 1]]  # first, end, first, ...
    runs = zip(edges[::2], edges[1::2], strict=True)
    return "".join(rf"\U{first:08x}-\U{end - 1:08x}" for first, end in runs)


def translate(pattern):
    r"""A regular expression of tokenizer.json -> the same for `re`, which lacks \p{..}.

    Here $ is the end of the piece, and \s what Unicode calls white space.

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
    """One entry of the pre-tokeniser -> a compiled pattern to isolate, or ValueError."""
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


# ------------------------------------------------------------------------------------------ bytes

def byte_letters():
    """The 256 characters in which tokenizer.json writes bytes.

    A printable one stands for itself, the others (space, control, ...) get those from 256 on.

    >>> letters = byte_letters()
    >>> letters[ord("A")], letters[ord(" ")], letters[ord("\\n")], len(set(letters))
    ('A', 'Ġ', 'Ċ', 256)
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def merge(symbols, ranks):
    """Join neighbours until no pair is left that was learnt; the lowest rank (learnt first) first.

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


# -------------------------------------------------------------------------------------- tokeniser

class BPE:
    """The tokeniser of one tokenizer.json. Attributes: path, size (largest id + 1).

    Added tokens are of two kinds. Special ones (<|im_start|>, end of sentence, ...) belong to the
    template, so typed by a user they stay text. Ordinary ones are text that never merges. Among
    them are 13 letters of DeepSeek's ("ü", ...): the names of bytes that UTF-8 never uses, which
    the reference library's decoder therefore prints as U+FFFD; here they are what they look like.
    Raises BadInput for a file that is missing, damaged or of another kind.
    """

    def __init__(self, path):
        self.path, self.letters = path, byte_letters()
        content = read_json(Path(path))
        try:
            self.read(content)
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as e:
            raise BadInput(f"{path}: not byte-level BPE as in DeepSeek-VL and Qwen2.5-VL "
                           f"({str(e)[:80]}); use the tokenizer.json of this checkpoint") from None

    def read(self, content):
        """The content of tokenizer.json -> attributes; any of many errors if another kind."""
        model, added = content["model"], content["added_tokens"]
        other = model.get("byte_fallback") or model.get("ignore_merges")
        if other or model.get("type", "BPE") != "BPE":
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
        foreign = set("".join(self.texts.values())) - set(self.letters)
        if foreign:
            raise ValueError(f"a token holds {min(foreign)!r}, which stands for no byte")
        self.size = 1 + max(*self.texts, *added_ids)

    def get_piece_size(self):
        """The size, as sentencepiece calls it."""
        return self.size

    def token_id(self, content):
        """The id of a token, e.g. "<|im_start|>"; BadInput if the vocabulary lacks it."""
        for table in (self.special, self.ordinary, self.vocab):
            if content in table:
                return table[content]
        raise BadInput(f"{self.path}: no token {content}; use this checkpoint's tokenizer.json")

    def encode(self, text, special=False):
        """Text -> ids; special=True takes special tokens by content too, as in a template."""
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
            letters = [self.letters[byte] for byte in piece.encode("utf-8", "replace")]
            known = [letter for letter in letters if letter in self.vocab]  # a byte may lack one
            ids += [self.vocab[symbol] for symbol in merge(known, self.ranks)]
        return ids

    def decode(self, ids):
        """Ids -> text; special tokens and unknown ids leave nothing, bad UTF-8 becomes U+FFFD."""
        content = {i: token.encode() for token, i in self.ordinary.items()}
        byte_of = {letter: byte for byte, letter in enumerate(self.letters)}
        text = b""
        for i in ids:
            if i in content:
                text += content[i]
            elif i in self.texts:
                text += bytes(byte_of[letter] for letter in self.texts[i])
        return text.decode("utf-8", "replace")

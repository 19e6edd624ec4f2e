"""
Text <-> ids by byte-level BPE, read from a checkpoint's tokenizer.json (DeepSeek-VL, Qwen2.5-VL).

    bpe = BPE("deepseek-vl-1.3b-chat/tokenizer.json")
    bpe.encode("Hello world")               # [17464, 1843]
    bpe.decode([17464, 1843])               # "Hello world"
    bpe.token_id("<image_placeholder>")     # 100015

Encoding takes four steps. Added tokens are cut out of the text. The rest is normalised. The
pre-tokeniser's rules cut it into pieces, each rule within the pieces of the one before. Within a
piece, pairs of tokens are merged in the order in which training learnt them, starting from bytes.
The rules are the file's own; only their regular expressions are translated for `re`.
Left out: training a vocabulary; any tokenizer.json that is not byte-level BPE.
"""
import functools
import heapq
import math
import re
import sys
import unicodedata
from pathlib import Path

from clip import BadInput, reading
from model import expect, note, read_json

FAMILIES_OWN = ("<|", "<｜", "<image_placeholder>")  # how their special tokens begin
# Unicode's white space, for use inside a class; Python's \s also matches \x1c to \x1f
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


# -------------------------------------------------------------------------------- the file's rules

@functools.cache
def members(category):
    """A Unicode category ("L" letters, "N" digits, ...) as the inside of a character class.

    >>> members("Zl")
    '\\\\U00002028-\\\\U00002028'
    """
    inside, first = "", None
    for i in range(sys.maxunicode + 2):
        belongs = i <= sys.maxunicode and unicodedata.category(chr(i)).startswith(category)
        if belongs and first is None:
            first = i
        if first is not None and not belongs:
            inside += rf"\U{first:08x}-\U{i - 1:08x}"
            first = None
    return inside


def translate(pattern):
    r"""A regular expression of tokenizer.json -> the same for `re`, which lacks \p{..}.

    There, $ is the end of the piece and \s is Unicode's white space.

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
            raise ValueError(f"{part} in the pattern {pattern[:30]}")
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
    """One entry of the pre-tokeniser -> a compiled pattern to isolate."""
    expect(rule, type=["Digits", "Split"], individual_digits=[True], behavior=["Isolated"],
           invert=[False])
    if rule["type"] == "Digits":
        return re.compile(f"[{members('N')}]")
    return re.compile(translate(rule["pattern"]["Regex"]))


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


def merge(ids, merges):
    """Merge neighbours until no pair is left that training learnt; the one learnt first goes first.

    merges: {pair of ids: (rank, merged id)}. The tokens are a linked list and the pairs a heap, so
    a piece of n bytes takes O(n log n).

    >>> merge([1, 2, 3], {(1, 2): (7, 12), (2, 3): (4, 23)})
    [1, 23]
    """
    n = len(ids)
    ids = [*ids, None]  # behind the last token, and as ids[-1] before the first
    before, after = [*range(-1, n)], [*range(1, n + 1), 0]
    heap = []

    def push(i):
        pair = ids[i], ids[after[i]]
        if pair in merges:
            heapq.heappush(heap, (merges[pair][0], i, pair))

    for i in range(n):
        push(i)
    while heap:
        _, i, pair = heapq.heappop(heap)
        j = after[i]
        if (ids[i], ids[j]) == pair:  # else one of the two has since been merged
            ids[i], ids[j] = merges[pair][1], None
            after[i] = after[j]
            before[after[j]] = i
            push(before[i])
            push(i)
    return [token for token in ids if token is not None]


# -------------------------------------------------------------------------------------- tokeniser

class BPE:
    """The tokeniser of one tokenizer.json. Attributes: path, size (largest id + 1).

    Special added tokens (<|im_start|>, end of sentence, ...) belong to the template: if a user
    types one, it stays text. Ordinary added tokens are text that never merges. 13 of DeepSeek's are
    letters ("ü", ...), the names of bytes that UTF-8 never uses. quirk: the reference library
    decodes these to U+FFFD; here they are the letters they look like.
    Raises BadInput for a file that is missing, damaged, of another kind, or of more tokens than the
    model has embeddings.
    """

    def __init__(self, path, embeddings=math.inf):
        self.path = path = Path(path)
        with reading(path, "use the tokenizer.json of this checkpoint"):
            self.read(read_json(path))
            if self.size > embeddings:
                raise ValueError(f"{self.size} tokens, but config.json has {embeddings} embeddings")
        settings = read_json(path.parent / "tokenizer_config.json", optional=True)
        added = read_json(path.parent / "added_tokens.json", optional=True)
        settings = settings.get("added_tokens_decoder", {})
        for name in [*added, *(token["content"] for token in settings.values())]:
            self.token_id(name)  # it must be in tokenizer.json too
        foreign = [name for name in self.special if not name.startswith(FAMILIES_OWN)]
        if foreign:
            note(f"{path}: special tokens such as {foreign[0]} are not read in questions nor shown "
                 "in answers")

    def read(self, content):
        model, added = content["model"], content["added_tokens"]
        expect(model, type=["BPE"], byte_fallback=[False], ignore_merges=[False], dropout=[0],
               continuing_subword_prefix=[""], end_of_word_suffix=[""])
        normalizer = content["normalizer"] or {"normalizers": []}
        steps = normalizer.get("normalizers", [normalizer])
        for step in steps:
            expect(step, type=["NFC"])
        *rules, last = content["pre_tokenizer"]["pretokenizers"]
        expect(last, type=["ByteLevel"], add_prefix_space=[False], use_regex=[False])
        self.compose = bool(steps)
        self.rules = [read_rule(rule) for rule in rules]
        self.vocab, self.merges = model["vocab"], {}
        for rank, pair in enumerate(model["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            pair = self.vocab[left], self.vocab[right]
            self.merges[pair] = rank, self.vocab[left + right]
        self.special, self.ordinary, self.bytes = {}, {}, {}
        for token in added:
            expect(token, lstrip=[False], rstrip=[False], single_word=[False])
            kind = self.special if token["special"] else self.ordinary
            kind[token["content"]] = token["id"]
            self.bytes[token["id"]] = b"" if token["special"] else token["content"].encode()
        letters = byte_letters()
        self.byte_ids = [self.vocab.get(letter) for letter in letters]  # None: never in UTF-8
        byte_of = {letter: byte for byte, letter in enumerate(letters)}
        for token, i in self.vocab.items():
            if i not in self.bytes:
                self.bytes[i] = bytes(byte_of[letter] for letter in token)
        self.size = 1 + max(self.bytes)

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
        """Text -> ids; special=True reads special tokens by name, as in a rendered template."""
        added = self.ordinary | (self.special if special else {})
        longest_first = sorted(map(re.escape, added), key=len, reverse=True)
        pattern = re.compile("|".join(longest_first) or "(?!)")  # (?!) never matches
        ids = []
        for piece in isolate(pattern, text):
            ids += [added[piece]] if piece in added else self.encode_ordinary(piece)
        return ids

    def encode_ordinary(self, text):
        """Text without added tokens -> ids."""
        pieces = [unicodedata.normalize("NFC", text) if self.compose else text]
        for rule in self.rules:
            pieces = [part for piece in pieces for part in isolate(rule, piece)]
        ids = []
        for piece in pieces:
            data = piece.encode("utf-8", "replace")
            ids += merge([self.byte_ids[byte] for byte in data], self.merges)
        return ids

    def decode(self, ids):
        """Ids -> text. Special tokens and unknown ids leave nothing; bad UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")

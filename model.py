"""
Features + words -> words: projector, LLaMA decoder, tokeniser; all of LLaVA-1.5, and its loading.

    m = load("checkpoints/llava-1.5-7b")
    print(m.generate(load_image("img.jpg"), "What is written on the sign?"))

Every size comes from config.json, so the toy and the 13B run through the same lines. A picture is
prefilled once: prefill() returns a Prefix, behind which any number of questions can be asked.
Another family (backbones/) is a subclass of LLaVA that overrides what differs.
Left out: sampling, quantisation, rotary scaling, padding (a batch holds prompts of one length).
Shapes: b batch, T or t tokens, N = h*w image tokens, P tokens of a prefix, D hidden width,
H heads (Hkv of them for k and v), d head size. Layers and heads count from 0.
"""
import functools
import hashlib
import importlib
import json
import re
import sys
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from clip import (MEAN, STD, BadInput, CLIPVision, preprocess, preprocess_crop, printable,
                  reading)

ROOT = Path(__file__).resolve().parent
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
DTYPES = ("float16", "bfloat16", "float32", "float64")
# config.json's model_type -> module and class, imported only when a checkpoint asks for it.
FAMILIES = {
    "llava": ("model", "LLaVA"),
    "multi_modality": ("backbones.deepseek_vl", "DeepSeekVL"),
    "qwen2_5_vl": ("backbones.qwen2_5_vl", "Qwen2_5VL"),
}
# What the library assumes where a vision_config is silent; without one it is ViT-L/14-336
CLIP_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                     num_attention_heads=12, image_size=224, patch_size=32)
# Entries of generation_config.json that change greedy decoding, unless they are neutral
CHANGE_GREEDY = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens",
                 "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
                 "min_length", "min_new_tokens", "num_beams", "sequence_bias", "guidance_scale",
                 "encoder_repetition_penalty", "exponential_decay_length_penalty", "stop_strings")
NEUTRAL = (None, 0, 1, [], {})


def check_types(record):
    """Raise TypeError if an int, float, str or bool field of a dataclass holds another type.

    None is allowed where it is the default.
    """
    for f in fields(record):
        value, wanted = getattr(record, f.name), (int, float) if f.type is float else f.type
        absent = value is None and f.default is None
        if f.type in (int, float, str, bool) and not isinstance(value, wanted) and not absent:
            raise TypeError(f"{f.name} = {value!r} is not of type {f.type.__name__}")


def from_json(cls, given):
    """A dataclass from those entries of a JSON object that it has fields for; null is absent."""
    names = [f.name for f in fields(cls) if given.get(f.name) is not None]
    return cls(**{name: given[name] for name in names})


@dataclass
class Config:
    """A LLaMA decoder's sizes, by the names in config.json, and what its family decides.

    The defaults are LlamaConfig's: the 7B's config.json leaves most of its sizes out.
    """
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # None: as many as num_attention_heads
    head_dim: int = None             # None: hidden_size / num_attention_heads
    vocab_size: int = 32000
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tied: bool = False               # lm_head is embed_tokens where no lm_head is stored
    model_type: str = "llava"
    image_token: int = 32000         # stands for all N image tokens in a list of ids
    eos_ids: list = (2,)             # any of them ends an answer
    vision: object = None            # what the family's build_tower() takes
    budget: tuple = None             # (least, most) pixels, in families that take any size
    qkv_bias: bool = False           # q_proj, k_proj and v_proj have biases
    final_norm: bool = True          # the RPN norms its states before the score layer (Eq. 5)
    score_rope: bool = False         # the RPN's score layer rotates its q and k (Eq. 5)
    mrope_section: list = None       # frequencies of each axis, in families with M-RoPE

    def __post_init__(self):
        check_types(self)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


# ----------------------------------------------------------------------------- the decoder's parts

def wider(dtype):
    """float32, or float64 for a model in it: statistics are never taken in half precision."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = F.rms_norm(x, self.weight.shape, eps=self.eps)  # its statistics are float32 or wider
        return self.weight * y  # y has x's dtype again before the weight, as in LLaMA


def rope_table(positions, d, theta, sections=None, dtype=torch.float32):
    """Rotary table of tokens at these positions -> (2, T, d): cos, and sin signed for rotate().

    positions: (T,), or (3, T) with `sections` (M-RoPE), the number of frequencies of each axis.
    It is built in float32 or wider and cast last: angles in half precision are wrong.
    """
    wide = wider(dtype)
    channel = torch.arange(0, d, 2, device=positions.device, dtype=wide)  # (d/2,)
    angles = positions.to(wide)[..., None] * theta ** (-channel / d)  # ([3,] T, d/2)
    if positions.dim() == 2:
        parts = angles.split(sections, -1)
        angles = torch.cat([part[axis] for axis, part in enumerate(parts)], -1)  # (T, d/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).to(dtype)


def rotate(x, rope):
    """Rotary embedding, half-split: channel i is paired with channel i + d/2. x (b, H, t, d).

    >>> rope = rope_table(torch.tensor([1]), 2, 1e4)  # one pair of channels, turned by 1 radian
    >>> rotate(torch.tensor([1., 0.]), rope)
    tensor([[0.5403, 0.8415]])
    """
    cos, signed_sin = rope
    return x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin


class KVCache:
    """Keys and values of each layer, (b, Hkv, length, d). Columns can be written again and again.

    length: room to make when a layer's buffers are allocated; a caller may raise it.
    queries: {layer: []} makes these layers keep the rotated q (b, H, t, d) of every call.
    """

    def __init__(self):
        self.k, self.v, self.queries, self.length = {}, {}, {}, 0

    def update(self, layer, start, k, v):
        """Write k and v (b, Hkv, t, d) at columns start.. -> keys and values of all columns before
        start + t."""
        end = start + k.shape[2]
        for buffers, new in (self.k, k), (self.v, v):
            if layer not in buffers or buffers[layer].shape[2] < end:
                b, heads, _, d = new.shape
                larger = new.new_empty(b, heads, max(end, self.length), d)
                if start > 0:
                    larger[:, :, :start] = buffers[layer][:, :, :start]
                buffers[layer] = larger
            buffers[layer][:, :, start:end] = new
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, self.d, bias = config.hidden_size, config.head_dim, config.qkv_bias
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, heads * self.d, bias=bias)
        self.k_proj = nn.Linear(D, kv_heads * self.d, bias=bias)
        self.v_proj = nn.Linear(D, kv_heads * self.d, bias=bias)
        self.o_proj = nn.Linear(heads * self.d, D, bias=False)

    def split(self, x):
        """(b, t, heads * d) -> (b, heads, t, d)"""
        return x.unflatten(-1, (-1, self.d)).transpose(1, 2)

    def forward(self, x, rope, layer, cache, start):
        q = rotate(self.split(self.q_proj(x)), rope)  # (b, H, t, d)
        k = rotate(self.split(self.k_proj(x)), rope)  # (b, Hkv, t, d)
        v, t, mask = self.split(self.v_proj(x)), x.shape[1], None
        if cache is not None:
            k, v = cache.update(layer, start, k, v)  # (b, Hkv, start+t, d)
            if layer in cache.queries:
                cache.queries[layer].append(q)
        if start > 0 and t > 1:  # row i sees columns 0..start+i
            mask = torch.ones(t, start + t, dtype=torch.bool, device=x.device).tril(start)
            groups = q.shape[1] // k.shape[1]
            if groups > 1:  # no fused kernel takes a mask and grouped heads
                k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(  # (b, H, t, d)
            q, k, v, attn_mask=mask, is_causal=mask is None and t > 1,
            enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (b, t, D)


class MLP(nn.Module):
    def __init__(self, width, inner, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias), nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One LLaMA decoder layer: hidden states (b, t, D) -> (b, t, D)."""

    def __init__(self, config):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.self_attn = RMSNorm(D, eps), Attention(config)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.mlp = MLP(D, config.intermediate_size)

    def forward(self, x, rope, layer=0, cache=None, start=0):
        x = x + self.self_attn(self.input_layernorm(x), rope, layer, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        words = torch.zeros(config.vocab_size, config.hidden_size)  # zeros: see clip.Embeddings
        self.embed_tokens = nn.Embedding.from_pretrained(words, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Projector(nn.Module):
    """CLIP features (b, n, C) -> the decoder's input space (b, n, D)."""

    def __init__(self, C, D):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(C, D), nn.Linear(D, D)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x)))  # the exact (erf) GELU, not the tower's


# ------------------------------------------------------------------------------------------- LLaVA

@dataclass
class Prefix:
    """[system][image], run once. Questions run behind it, each over the last one's columns."""
    hidden: dict         # {layers run: hidden states (b, P, D)}, for the layers that were asked for
    cache: KVCache       # its first P columns are the prefix
    columns: slice       # the image's columns, the last of the prefix: P = columns.stop
    rope: torch.Tensor   # (2, P, d)
    position: int        # rotary position of the next token; not P where positions have axes
    grid: tuple          # (h, w) of the image tokens
    picture: object = None  # whose, if sdrpn.answer() made it


class LLaVA(nn.Module):
    """CLIP tower + projector + LLaMA decoder + tokeniser. Built by load().

    Attributes: config, tokenizer, folder, fingerprint (of the weights), budget ((least, most)
    pixels of a picture where the family takes any size, else None; can be set).
    """
    recipes = {}  # released recipes of this family, as in sdrpn.RECIPES

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer, self.budget = config, tokenizer, config.budget
        self.build_tower()
        self.language_model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.folder, self.fingerprint = None, None

    def build_tower(self):
        self.vision_tower = CLIPVision(self.config.vision)
        self.grid = self.vision_tower.grid, self.vision_tower.grid
        C = self.vision_tower.pre_layrnorm.normalized_shape[0]
        self.multi_modal_projector = Projector(C, self.config.hidden_size)

    device = property(lambda self: self.lm_head.weight.device)
    dtype = property(lambda self: self.lm_head.weight.dtype)
    depth = property(lambda self: self.config.num_hidden_layers)

    # ---- words

    def prompt_ids(self, question, history=()):
        """The vicuna_v1 prompt as ids, one image_token where the image goes.

        history = ((question, answer), ...). A prompt continued by an answer begins with the same
        ids: sdrpn.conversation relies on it. The pieces around the image and after each </s> are
        tokenised on their own, as LLaVA does. Only this template places the ids of <image> and
        </s>; if a user types them, they stay text.
        """
        encode = self.tokenizer.encode
        ids = [self.tokenizer.bos_id(), *encode(f"{SYSTEM} USER: "), self.config.image_token]
        for turn, (q, a) in enumerate([*history, (question, None)]):
            text = f"{q} ASSISTANT:" if a is None else f"{q} ASSISTANT: {a}"
            ids += encode("\n" + text) if turn == 0 else self.encode_after_eos("USER: " + text)
            if a is not None:
                ids.append(self.tokenizer.eos_id())
        return ids

    def encode_after_eos(self, text):
        """LLaVA's tokeniser puts no dummy space after </s>: encode after a newline, drop that."""
        return self.tokenizer.encode("\n" + text)[len(self.tokenizer.encode("\n")):]

    def tail(self, ids):
        """The ids behind the image in a prompt."""
        return ids[ids.index(self.config.image_token) + 1:]

    def detokenize(self, ids):
        return self.tokenizer.decode(list(ids)).strip()

    # ---- pictures

    def pixels(self, picture, box=None):
        """A picture, or a box of it in source pixels, as the tower sees it -> (3, S, S) float32."""
        size = self.vision_tower.image_size
        return preprocess(picture, size) if box is None else preprocess_crop(picture, box, size)

    def token_grid(self, pixels):
        """Image tokens (h, w) of pixels (..., 3, S, S), of a picture or of a crop."""
        return self.grid

    def grid_of(self, picture):
        """token_grid of the whole picture, without making its pixels."""
        return self.grid

    def frame(self, picture_size):
        """(w, h) in source pixels of what the grid covers: here the padded square."""
        return max(picture_size), max(picture_size)

    def features(self, pixels):
        """(b, 3, S, S) from pixels() -> (b, N, C), row by row."""
        return self.vision_tower(pixels.to(self.device, self.dtype))

    def project(self, features):
        """(b, n, C) of any n cells -> image tokens (b, n, D). A mask may have dropped cells."""
        return self.multi_modal_projector(features)

    # ---- sequences

    def embed(self, ids):
        """Token ids -> (1, t, D)."""
        return self.language_model.embed_tokens(torch.tensor([ids], device=self.device))

    def rope(self, positions):
        """(T,), or (3, T) where a family has M-RoPE -> rotary table (2, T, d)."""
        c = self.config
        return rope_table(
            positions.to(self.device), c.head_dim, c.rope_theta, c.mrope_section, self.dtype)

    def text_rope(self, start, t):
        """Rotary table (2, t, d) of t tokens of text from position `start` on."""
        return self.rope(torch.arange(start, start + t))

    def image_positions(self, start, grid):
        """Positions (N,) of an image that begins at `start`, and the position of what follows."""
        N = grid[0] * grid[1]
        return torch.arange(start, start + N), start + N

    def splice(self, tail, start, crops):
        """What follows the image in stage 2 (Sec. 3.4): the crops' tokens, then the text.

        tail (1, t, D): embeddings of the text behind the image, which began at position `start`.
        -> embeddings (1, t', D), their rotary table (2, t', d), the position of the next token.
        """
        spliced = torch.cat([*(crop.tokens[None] for crop in crops), tail], 1)
        t = spliced.shape[1]
        return spliced, self.text_rope(start, t), start + t

    def check_length(self, tokens):
        limit = self.config.max_position_embeddings
        if tokens > limit:
            raise BadInput(f"the prompt and its answer need {tokens} tokens, the model has room "
                           f"for {limit}; shorten the question or the conversation, "
                           "or lower --max-new-tokens")

    def reserve(self, cache, tokens):
        """Make room for so many tokens. Raises BadInput if that is more than the model takes."""
        self.check_length(tokens)
        cache.length = max(cache.length, tokens)

    def run(self, hidden_states, first, last, rope, cache=None, start=0):
        """Decoder layers first..last-1 on hidden states (b, t, D), whose rotary table is `rope`.

        With a cache, the t tokens stand at columns start.. and also see all columns before, which
        must have been run through the same layers.
        """
        for layer in range(first, last):
            block = self.language_model.layers[layer]
            hidden_states = block(hidden_states, rope, layer, cache, start)
        return hidden_states

    def head(self, hidden_states):
        """(..., D) after the last layer -> logits (..., vocab)."""
        return self.lm_head(self.language_model.norm(hidden_states))

    # ---- answers

    @torch.no_grad()
    def prefill(self, pixels, keep=(), depth=None):
        """Run [system][image] once -> Prefix. It depends on the pictures alone, on no question.

        pixels (b, 3, H, W); keep: numbers of layers after which the hidden states are kept;
        depth: run only the first so many layers, all by default.
        """
        ids = self.prompt_ids("")
        system = ids[:ids.index(self.config.image_token)]
        image = self.project(self.features(pixels))  # (b, N, D)
        (b, N, _), at, grid = image.shape, len(system), self.token_grid(pixels)
        positions, position = self.image_positions(at, grid)
        rope = torch.cat([self.text_rope(0, at), self.rope(positions)], 1)  # (2, P, d)
        hidden = {0: torch.cat([self.embed(system).expand(b, -1, -1), image], 1)}  # (b, P, D)
        cache = KVCache()
        depth = self.depth if depth is None else depth
        for first, last in pairwise(sorted({0, *keep, depth})):
            hidden[last] = self.run(hidden[first], first, last, rope, cache)
        hidden = {layer: hidden[layer] for layer in keep}
        return Prefix(hidden, cache, slice(at, at + N), rope, position, grid)

    @torch.no_grad()
    def generate(self, picture, question, max_new_tokens=128, history=(), prefix=None):
        """The plain answer to a question about the whole picture, greedy.

        history = ((question, answer), ...); prefix: prefill() of this picture, if there is one.
        """
        if prefix is None:
            prefix = self.prefill(self.pixels(picture)[None])
        tail = self.embed(self.tail(self.prompt_ids(question, history)))  # (1, t, D)
        P, t, cache = prefix.columns.stop, tail.shape[1], prefix.cache
        self.reserve(cache, P + t + max_new_tokens)
        rope = self.text_rope(prefix.position, t)
        last = self.run(tail, 0, self.depth, rope, cache, P)[:, -1]
        ids = self.decode(last, cache, P + t, prefix.position + t, max_new_tokens)[0]
        return self.detokenize(ids)

    @torch.no_grad()
    def decode(self, last_hidden, cache, column, position, max_new_tokens):
        """Greedy decoding from the last prompt token's hidden state (b, D).

        column, position: where the next token goes in the cache, and its rotary position. Returns
        b lists of ids without EOS. Neither EOS nor the last of max_new_tokens is fed back. A
        finished row keeps decoding, ignored, until all have finished. Raises FloatingPointError if
        a logit is not finite.
        """
        rope = self.text_rope(position, max_new_tokens)
        words = self.tokenizer.get_piece_size()  # from here on the vocabulary is padding
        answers = [[] for _ in last_hidden]
        running = set(range(len(answers)))
        for step in range(max_new_tokens):
            best, ids = self.head(last_hidden)[:, :words].max(-1)  # (b,); NaN counts as largest
            if not best.isfinite().all():
                raise FloatingPointError(f"the model's logits are not finite in "
                                         f"{str(self.dtype)[6:]}; try --dtype bfloat16 or float32")
            for row, token in enumerate(ids.tolist()):
                if token in self.config.eos_ids:
                    running.discard(row)
                elif row in running:
                    answers[row].append(token)
            if not running or step == max_new_tokens - 1:
                break
            hidden = self.language_model.embed_tokens(ids)[:, None]  # (b, 1, D)
            hidden = self.run(hidden, 0, self.depth, rope[:, step:step + 1], cache, column + step)
            last_hidden = hidden[:, -1]
        return answers

    # ---- what a checkpoint of this family looks like

    @classmethod
    def read_config(cls, folder, given):
        """config.json's content -> Config. Raises any error on what is not LLaVA-1.5."""
        vision, text = given.get("vision_config"), given.get("text_config") or {}
        vision = CLIP_DEFAULTS | vision if vision else {}
        layer, depth = given.get("vision_feature_layer", -2), vision.get("num_hidden_layers", 24)
        layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
        expect({"vision_feature_layer": layer}, vision_feature_layer=range(-depth - 1, depth + 1))
        vision["vision_feature_layer"] = layer
        expect(given, vision_feature_select_strategy=["default"], projector_hidden_act=["gelu"],
               multimodal_projector_bias=[True])
        expect(text, model_type=["llama"])
        expect(vision, model_type=["clip_vision_model"], num_channels=[3])
        check_pixels(folder, vision.get("image_size", 336))
        return decoder_config(
            text, vision=vision, tied=is_tied(given, text),
            image_token=given.get("image_token_index", given.get("image_token_id")),
            eos_ids=read_eos(folder, given, text))

    @classmethod
    def read_tokenizer(cls, folder, config):
        """The folder's tokenizer.model, which must fit config.json."""
        note_template(folder, "ASSISTANT:")
        tokenizer = sentencepiece.SentencePieceProcessor()
        with reading(folder / "tokenizer.model", "copy the checkpoint's tokenizer.model there"):
            tokenizer.LoadFromSerializedProto((folder / "tokenizer.model").read_bytes())
            words = tokenizer.get_piece_size()
            if not words <= min(config.vocab_size, config.image_token):
                raise ValueError(f"{words} pieces do not fit {config.vocab_size} embeddings and "
                                 f"image token {config.image_token}")
        added = read_json(folder / "added_tokens.json", optional=True)
        settings = read_json(folder / "tokenizer_config.json", optional=True)
        known = {"<image>", "<pad>", settings.get("pad_token"), "<unk>", "<s>", "</s>"}
        added = {*added, *(t["content"] for t in settings.get("added_tokens_decoder", {}).values())}
        if added - known:
            raise BadInput(f"{folder}: added tokens {sorted(added - known)} are not supported; "
                           "use a checkpoint without them")
        return tokenizer

    def renames(self):
        """[(prefix of a stored name, our prefix), ...], applied in order; None: never read."""
        unused = range(len(self.vision_tower.encoder.layers),
                       self.config.vision.get("num_hidden_layers", 24))
        return [
            *((f"model.{part}.", f"{part}.") for part in
              ("language_model", "vision_tower", "multi_modal_projector", "lm_head")),
            ("language_model.lm_head.", "lm_head."),
            ("language_model.model.", "language_model."),
            ("vision_tower.vision_model.", "vision_tower."),
            ("vision_tower.post_layernorm.", None),
            *((f"vision_tower.encoder.layers.{layer}.", None) for layer in unused)]


# --------------------------------------------------------------------------------- a folder's files

def read_json(path, optional=False):
    """A JSON object from a file. A missing optional file is {}."""
    if optional and not path.is_file():
        return {}
    with reading(path, "is its folder a whole checkpoint in the Hugging Face layout?"):
        return {**json.loads(path.read_text(encoding="utf-8-sig"))}


def expect(given, **allowed):
    """Raise ValueError if an entry that a file states is not one of the values we implement.

    >>> expect({"hidden_act": "silu"}, hidden_act=["silu"], attention_bias=[False])
    >>> expect({"hidden_act": "relu"}, hidden_act=["silu"])
    Traceback (most recent call last):
    ValueError: hidden_act = relu is not supported, only ['silu']
    """
    for name, values in allowed.items():
        value = given.get(name)
        if value is not None and value not in values:
            raise ValueError(f"{name} = {value} is not supported, only {values}")


def decoder_config(text, **more):
    """A decoder's entries of config.json -> Config; `more` are further fields."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    expect(rope, rope_type=["default"], type=["default"])
    expect(text | rope, hidden_act=["silu"], attention_bias=[False], mlp_bias=[False],
           partial_rotary_factor=[1])
    return from_json(Config, text | rope | more)


def is_tied(*configs):
    return any(config.get("tie_word_embeddings") for config in configs)


def read_eos(folder, *configs):
    """Ids that end an answer: generation_config.json's, else those of the first config, else [2].

    Entries of generation_config.json that would change greedy decoding are named on stderr.
    """
    path = folder / "generation_config.json"
    generation = read_json(path, optional=True)
    for name in CHANGE_GREEDY:
        if generation.get(name) not in NEUTRAL:
            note(f"{path}: {name} = {generation[name]} is not applied; decoding is plain greedy")
    for config in (generation, *configs):
        ids = config.get("eos_token_id")
        if ids is not None:
            return [int(i) for i in (ids if isinstance(ids, list) else [ids])]
    return [2]


def read_processor(folder):
    """What the folder says of pixels: processor_config.json's image_processor comes first."""
    nested = read_json(folder / "processor_config.json", optional=True).get("image_processor")
    return nested or read_json(folder / "preprocessor_config.json", optional=True)


def check_pixels(folder, size):
    """Raise ValueError if the folder's picture processor is not CLIP's at this size."""
    given = read_processor(folder)
    for name in {"image_mean", "image_std"} & given.keys():
        given[name] = [round(v, 4) for v in given[name]]  # some files hold float32
    expect(given, image_mean=[[round(v, 4) for v in MEAN]], image_std=[[round(v, 4) for v in STD]],
           size=[size, {"shortest_edge": size}, {"height": size, "width": size}], resample=[3],
           do_resize=[True], do_rescale=[True], do_normalize=[True], rescale_factor=[1 / 255])


def note_template(folder, *marks):
    """Say so on stderr if the folder's chat template is not the one that this family's has."""
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    texts = [settings.get("chat_template")]
    texts.append(read_json(folder / "chat_template.json", optional=True).get("chat_template"))
    jinja = folder / "chat_template.jinja"
    texts.append(jinja.read_text(encoding="utf-8") if jinja.is_file() else None)
    for text in texts:
        if text and not all(mark in str(text) for mark in marks):
            note(f"{folder}: its chat template is not the one used here; answers may suffer")


@functools.cache
def note(text):
    """Say something on stderr, once."""
    print(printable(text), file=sys.stderr)


def read_config(folder):
    """config.json -> the class of its family, and its Config. Raises BadInput."""
    folder = Path(folder)
    path = folder / "config.json"
    given = read_json(path)
    with reading(path, "this program cannot run such a checkpoint"):
        expect(given, model_type=list(FAMILIES), quantization_config=[])
        module, name = FAMILIES[given["model_type"]]
        family = getattr(importlib.import_module(module), name)
        config = family.read_config(folder, given)
        config.model_type = given["model_type"]
        return family, config


# ----------------------------------------------------------------------------------------- weights

class Checkpoint:
    """The safetensors of a folder, or one file. Tensors are read and converted one by one.

    renames: [(prefix of a stored name, our prefix or None to drop it), ...], applied in order.
    `tensors`: {our name: (opened file, stored name)}. Raises BadInput.
    """

    def __init__(self, path, renames):
        self.path, self.files, self.tensors = path, [path], {}
        index = path / "model.safetensors.index.json"
        if path.is_dir():
            self.files = [path / "model.safetensors"]
            if index.is_file() and not self.files[0].is_file():
                with reading(index):
                    names = sorted(set(read_json(index)["weight_map"].values()))
                    self.files = [path / name for name in names]
        for file in self.files:
            with reading(file, "download it again; only safetensors are read, never pickles"):
                shard = safe_open(file, framework="pt")
            self.metadata = shard.metadata() or {}
            for name in shard.keys():
                key = rename(name, renames)
                if key in self.tensors:
                    raise BadInput(f"{file}: {name} is stored twice; download the folder again")
                if key is not None:
                    self.tensors[key] = shard, name

    def fill(self, module, device, dtype):
        """Fill all parameters of a module on the meta device; nothing is left over or missing."""
        shapes = {key: torch.empty(shard.get_slice(name).get_shape(), device="meta")
                  for key, (shard, name) in self.tensors.items()}
        with reading(self.path, "config.json and the weights are not of one model"):
            module.load_state_dict(shapes, assign=True)  # checks everything before any is read
        tensors = {}
        for key, (shard, name) in self.tensors.items():
            stored = shard.get_tensor(name)  # memory-mapped: read as it is converted
            tensors[key] = stored.to(device, dtype)
            if not (stored.is_floating_point() and tensors[key].isfinite().all()):
                was_finite = stored.is_floating_point() and stored.isfinite().all()
                raise BadInput(f"{self.path}: {name} " + (
                    f"does not fit into {dtype}; use --dtype bfloat16" if was_finite else
                    "holds integers, NaN or infinite values; download it again"))
        module.load_state_dict(tensors, assign=True)
        return module.requires_grad_(False).eval()


def rename(name, renames):
    """
    >>> rename("model.visual.norm", [("model.visual.", "visual."), ("visual.norm", "visual.ln")])
    'visual.ln'
    """
    if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):  # buffers
        return None
    for old, new in renames:
        if name.startswith(old):
            if new is None:
                return None
            name = new + name[len(old):]
    return name


def load(folder, device=None, dtype=None):
    """A checkpoint folder in the Hugging Face layout -> its family's model, ready to answer.

    device: by default a GPU if there is one. dtype: by default the file's on a GPU; on the CPU
    float32 below 1 GB of weights, else bfloat16. Raises BadInput if a file is missing or damaged,
    or if the weights do not match config.json, before memory is taken.
    """
    folder = Path(folder)
    family, config = read_config(folder)
    tokenizer = family.read_tokenizer(folder, config)
    with reading(folder / "config.json"), torch.device("meta"):
        m = family(config, tokenizer)  # sizes only: no memory until a tensor is read
    checkpoint = Checkpoint(folder, m.renames())
    words = "language_model.embed_tokens.weight"
    tied = config.tied and "lm_head.weight" not in checkpoint.tensors
    if tied and words in checkpoint.tensors:
        checkpoint.tensors["lm_head.weight"] = checkpoint.tensors[words]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        parameters = sum(p.numel() for p in m.parameters())
        dtype = torch.float32 if 4 * parameters < 2 ** 30 else torch.bfloat16
        if str(device) != "cpu" and words in checkpoint.tensors:
            shard, name = checkpoint.tensors[words]
            dtype = shard.get_tensor(name).dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with reading(f"--device {device}", "use another device or --dtype"):
        torch.zeros(1, device=device, dtype=dtype)  # an AssertionError, a TypeError, ...
    checkpoint.fill(m, device, dtype)
    if tied:
        m.lm_head.weight = m.language_model.embed_tokens.weight
    m.folder, m.fingerprint = folder, fingerprint(folder, checkpoint.files)
    return m


def fingerprint(folder, files):
    """A short name that identifies these weights: config.json as parsed, and the files' content.

    Of a file from 256 MB on, 64 samples of 4 KB are taken.
    """
    digest = hashlib.sha256(json.dumps(read_json(folder / "config.json"), sort_keys=True).encode())
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            for i in range(64):
                f.seek(size * i // 64)
                digest.update(f.read(4096 if size > 1 << 28 else size // 64 + 1))
    return digest.hexdigest()[:16]

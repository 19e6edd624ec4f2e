"""
Features + words -> words: projector, LLaMA decoder, tokeniser; all of LLaVA-1.5, and its loading.

    m = load("llava-1.5-7b")
    print(m.generate(load_image("img.jpg"), "What is written on the sign?"))

Every size comes from config.json, so the toy and the 13B run through the same lines. Only
safetensors are read. Another family (backbones/) is a subclass of LLaVA that overrides what
differs.
Left out: sampling, quantisation, rotary scaling, padding (a batch holds prompts of one length).
Shapes: b batch, T or t tokens, N = h*w image tokens, D hidden width, H heads (Hkv of them for k
and v), d head size. Layers and heads count from 0.
"""
import difflib
import hashlib
import importlib
import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from clip import VIT_L_14_336, BadInput, CLIPVision, preprocess, preprocess_crop

ROOT = Path(__file__).resolve().parent
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
# A name for --ckpt -> where the hub has it. Each name means exactly one checkpoint.
KNOWN = {
    "toy": None,
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "deepseek-vl-1.3b": "deepseek-ai/deepseek-vl-1.3b-chat",
    "deepseek-vl-7b": "deepseek-ai/deepseek-vl-7b-chat",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
}
# config.json's model_type -> module and class, imported only when a checkpoint asks for it.
FAMILIES = {
    "llava": ("model", "LLaVA"),
    "multi_modality": ("backbones.deepseek_vl", "DeepSeekVL"),
    "deepseek_vl": ("backbones.deepseek_vl", "DeepSeekVL"),  # ports, refused with the name to use
    "deepseek_vl_hybrid": ("backbones.deepseek_vl", "DeepSeekVL"),
    "qwen2_5_vl": ("backbones.qwen2_5_vl", "Qwen2_5VL"),
}
# What LlamaConfig and CLIPVisionConfig assume where config.json is silent, as the 7B's mostly is.
TEXT_DEFAULTS = dict(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=2048, vocab_size=32000)
VISION_SIZES = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    image_size=224, patch_size=32)
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


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
        return self.weight * y  # y is in x's dtype again before the weight, as in LLaMA


def rope_table(positions, d, theta, sections=None, dtype=torch.float32):
    """Rotary table of tokens at these positions -> (2, T, d): cos, and sin signed for rotate().

    positions (T,), or (3, T) with `sections` (M-RoPE), the number of frequencies for each axis.
    Built in float32 or wider and cast last: angles in half precision are wrong.
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


class NoCache:
    """One pass over a whole sequence: its t tokens see only each other."""

    def tap(self, layer, q):
        pass

    def update(self, layer, start, k, v):
        """k and v (b, Hkv, t, d) as they are, and no mask: causal."""
        return k, v, None


class KVCache:
    """Keys and values of each layer, (b, Hkv, length, d), allocated when the layer is first run.

    queries: {layer: []} makes these layers keep the rotated q (b, H, t, d) of each call.
    shift: position of the next token minus number of tokens; 0 where a position is an index.
    """

    def __init__(self, m, b, length):
        self.k, self.v, self.queries, self.shift = {}, {}, {}, 0
        self.static = m.static  # compile_decode's buffers; None: they live as long as this cache
        self.length = 0
        self.grow(length)

    def grow(self, length):
        """Room for so many tokens; what is there stays."""
        if self.static is not None:  # compiled steps are bound to a size: have few of them
            length = -(-length // 512) * 512
        self.length = max(self.length, length)

    def tap(self, layer, q):
        if layer in self.queries:
            self.queries[layer].append(q)

    def update(self, layer, start, k, v):
        """Put k and v (b, Hkv, t, d) at columns start.. -> keys, values, mask of what is seen.

        Keys and values are (b, Hkv, start+t, d); mask None: all before, and causal among the new
        ones.
        """
        if layer not in self.k or self.k[layer].shape[2] < self.length:
            self.allocate(layer, start, k)
        keys, values = self.k[layer], self.v[layer]
        if torch.is_tensor(start):  # a compiled step: one token, the whole buffer, a mask
            keys.index_copy_(2, start, k)
            values.index_copy_(2, start, v)
            return keys, values, torch.arange(keys.shape[2], device=k.device)[None] <= start
        t, end, mask = k.shape[2], start + k.shape[2], None
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        if start > 0 and t > 1:  # row i sees columns 0..start+i
            mask = torch.ones(t, end, dtype=torch.bool, device=k.device).tril(start)
        return keys[:, :, :end], values[:, :, :end], mask

    def allocate(self, layer, start, k):
        """Buffers of self.length for one layer; the first `start` columns are carried over."""
        shape = (*k.shape[:2], self.length, k.shape[3])
        if self.static is None:
            new = k.new_empty(shape), k.new_empty(shape)
        elif (layer, shape) in self.static:
            new = self.static[layer, shape]
        else:  # zeros: what the mask hides is still multiplied
            new = self.static[layer, shape] = k.new_zeros(shape), k.new_zeros(shape)
            for buffer in new:
                torch._dynamo.mark_static_address(buffer)
        if layer in self.k:
            new[0][:, :, :start] = self.k[layer][:, :, :start]
            new[1][:, :, :start] = self.v[layer][:, :, :start]
        self.k[layer], self.v[layer] = new

    def keep(self, batch):
        """Go on with these rows of the batch only."""
        self.k = {layer: k[batch] for layer, k in self.k.items()}
        self.v = {layer: v[batch] for layer, v in self.v.items()}


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, self.d, bias = config["hidden_size"], config["head_dim"], config["qkv_bias"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(D, heads * self.d, bias=bias)
        self.k_proj = nn.Linear(D, kv_heads * self.d, bias=bias)
        self.v_proj = nn.Linear(D, kv_heads * self.d, bias=bias)
        self.o_proj = nn.Linear(heads * self.d, D, bias=False)
        self.grouped = heads != kv_heads

    def split(self, x):
        """(b, t, heads * d) -> (b, heads, t, d)"""
        return x.unflatten(-1, (-1, self.d)).transpose(1, 2)

    def forward(self, x, rope, layer, cache, start):
        q = rotate(self.split(self.q_proj(x)), rope)  # (b, H, t, d)
        k = rotate(self.split(self.k_proj(x)), rope)  # (b, Hkv, t, d)
        v = self.split(self.v_proj(x))
        cache.tap(layer, q)
        k, v, mask = cache.update(layer, start, k, v)  # (b, Hkv, start+t, d)
        causal = mask is None and x.shape[1] > 1
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)  # (b, H, t, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (b, t, D)


class MLP(nn.Module):
    def __init__(self, config, bias=False):
        super().__init__()
        D, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(D, inner, bias)
        self.up_proj = nn.Linear(D, inner, bias)
        self.down_proj = nn.Linear(inner, D, bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One LLaMA decoder layer: hidden states (b, t, D) -> (b, t, D)."""

    def __init__(self, config):
        super().__init__()
        D, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm, self.self_attn = RMSNorm(D, eps), Attention(config)
        self.post_attention_layernorm, self.mlp = RMSNorm(D, eps), MLP(config)

    def forward(self, x, rope, layer=0, cache=NoCache(), start=0):
        x = x + self.self_attn(self.input_layernorm(x), rope, layer, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        # zeros, as in clip.Embeddings
        words = torch.zeros(config["vocab_size"], config["hidden_size"])
        self.embed_tokens = nn.Embedding.from_pretrained(words, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])


class Projector(nn.Module):
    """CLIP features (b, n, C) -> the decoder's input space (b, n, D)."""

    def __init__(self, C, D, bias):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(C, D, bias=bias), nn.Linear(D, D, bias=bias)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x)))  # the exact (erf) GELU, not the tower's


# ------------------------------------------------------------------------------------------- LLaVA

@dataclass
class Crop:
    """Image tokens of one crop, and where they lie in its own grid."""
    tokens: torch.Tensor  # (n, D)
    grid: tuple           # (h, w)
    keep: torch.Tensor    # (h*w,) bool: which n cells of the grid the tokens are


class LLaVA(nn.Module):
    """CLIP tower + projector + LLaMA decoder + tokeniser. Built by `load`.

    Attributes: config (all sizes, by their names in config.json), tokenizer, folder, fingerprint.
    """
    recipes = {}   # what was released for this family, keyed as sdrpn.RECIPES is
    budget = None  # (least, most) pixels of a picture, in families that take any size

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.build_tower()
        self.language_model = Decoder(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self.folder, self.fingerprint, self.static = None, None, None

    def build_tower(self):
        vision = self.config["vision"]
        self.vision_tower = CLIPVision(vision)
        self.grid = self.vision_tower.grid, self.vision_tower.grid
        self.multi_modal_projector = Projector(
            vision["hidden_size"], self.config["hidden_size"], self.config["projector_bias"])

    device = property(lambda self: self.lm_head.weight.device)
    dtype = property(lambda self: self.lm_head.weight.dtype)
    depth = property(lambda self: self.config["num_hidden_layers"])

    # ---- words

    def prompt_ids(self, question, history=()):
        """The vicuna_v1 prompt as ids, one image_token where the image goes.

        history = ((question, answer), ...). A prompt that goes on with an answer begins with the
        same ids: sdrpn.conversation counts on it. The pieces around the image and after each </s>
        are tokenised apart, as LLaVA does. Only this template places the ids of <image> and </s>:
        typed by a user they stay text.
        """
        encode = self.tokenizer.encode
        ids = [self.tokenizer.bos_id(), *encode(f"{SYSTEM} USER: "), self.config["image_token"]]
        for turn, (q, a) in enumerate([*history, (question, None)]):
            text = f"{q} ASSISTANT:" if a is None else f"{q} ASSISTANT: {a}"
            ids += encode("\n" + text) if turn == 0 else self.encode_after_eos("USER: " + text)
            if a is not None:
                ids.append(self.tokenizer.eos_id())
        return ids

    def encode_after_eos(self, text):
        """LLaVA's tokeniser puts no dummy space behind </s>: encode behind a newline, drop that."""
        return self.tokenizer.encode("\n" + text)[len(self.tokenizer.encode("\n")):]

    def tokenize(self, prompt_text):
        """A rendered prompt with one <image> (and </s> after past answers) -> its ids."""
        before, image, after = prompt_text.partition("<image>")
        ids = [self.tokenizer.bos_id(), *self.tokenizer.encode(before)]
        if not image:
            return ids
        first, *rest = after.split("</s>")
        ids += [self.config["image_token"], *self.tokenizer.encode(first)]
        for piece in rest:
            ids.append(self.tokenizer.eos_id())
            if piece:
                ids += self.encode_after_eos(piece)
        return ids

    def detokenize(self, ids):
        return self.tokenizer.decode(list(ids)).strip()

    @property
    def pieces(self):
        """Size of the tokeniser: from here on the vocabulary is padding, and never chosen."""
        return self.tokenizer.get_piece_size()

    # ---- pictures

    def pixels(self, picture, box=None):
        """A picture, or a box of it in source pixels, as the tower sees it -> (3, S, S) float32."""
        size = self.vision_tower.image_size
        return preprocess(picture, size) if box is None else preprocess_crop(picture, box, size)

    def token_grid(self, pixels):
        """Image tokens (h, w) of pixels (..., 3, S, S), be they of a picture or of a crop."""
        return self.grid

    def grid_of(self, picture):
        """token_grid of the whole picture, without its pixels."""
        return self.grid

    def frame(self, picture_size):
        """(w, h) in source pixels of what the grid covers, centred on the picture.

        Here the padded square; picture_size itself where a picture is stretched or keeps its shape.
        """
        return max(picture_size), max(picture_size)

    def features(self, pixels):
        """(b, 3, S, S) as pixels() left them, on the CPU -> (b, N, C): the cells, row by row."""
        return self.vision_tower(pixels.to(self.device, self.dtype))

    def project(self, features):
        """(b, n, C) of any n cells -> image tokens (b, n, D): a mask may have left some out."""
        return self.multi_modal_projector(features)

    @torch.no_grad()
    def encode(self, pixels):
        """(b, 3, S, S) -> image tokens (b, N, D)."""
        return self.project(self.features(pixels))

    # ---- sequences

    def embed(self, ids):
        """Token ids -> (1, t, D)."""
        return self.language_model.embed_tokens(torch.tensor([ids], device=self.device))

    def embed_prompt(self, ids, image_tokens):
        """ids with one image_token, (1, N, D) -> (1, T, D), and the slice that is the image."""
        at, n = ids.index(self.config["image_token"]), image_tokens.shape[1]
        parts = [self.embed(ids[:at]), image_tokens, self.embed(ids[at + 1:])]
        return torch.cat(parts, 1), slice(at, at + n)

    def positions(self, ids, grid):
        """Positions (T,) of a prompt whose one image_token stands for h*w tokens: plain indices."""
        return torch.arange(len(ids) - 1 + grid[0] * grid[1], device=self.device)

    def prepare(self, prompts, pixels):
        """b prompts of one length, as ids, and their pixels (b, 3, H, W) -> what the decoder takes.

        The image stands at one place in all of them. Embeddings (b, T, D), the slice of T that is
        the image, positions (T,) or (3, T).
        """
        image_tokens = self.encode(pixels)  # (b, N, D)
        pairs = [self.embed_prompt(ids, image_tokens[i:i + 1]) for i, ids in enumerate(prompts)]
        positions = self.positions(prompts[0], self.token_grid(pixels))
        return torch.cat([embeds for embeds, _ in pairs]), pairs[0][1], positions

    def rope(self, positions):
        """(T,), or (3, T) where a family has M-RoPE -> rotary table (2, T, d)."""
        c = self.config
        return rope_table(positions, c["head_dim"], c["rope_theta"], c["mrope_section"], self.dtype)

    def splice(self, tail, start, crops):
        """What follows the image in stage 2 (Sec. 3.4): the crops' tokens, then `tail`.

        tail (1, t, D): embeddings of the text behind the image, whose first token stood at position
        `start`. -> embeddings (1, t', D) and their positions; these simply run on.
        """
        spliced = torch.cat([*(crop.tokens[None] for crop in crops), tail], 1)
        return spliced, torch.arange(start, start + spliced.shape[1], device=self.device)

    def check_length(self, tokens):
        limit = self.config["max_position_embeddings"]
        if tokens > limit:
            raise BadInput(f"the prompt and its answer need {tokens} tokens, the model has room "
                           f"for {limit}; shorten the question or the conversation, "
                           "or lower --max-new-tokens")

    def run(self, hidden_states, first, last, rope, cache=NoCache(), start=0):
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
    def logits(self, picture, prompt_text):
        """Logits (T, vocab) of a rendered prompt that holds one image; T counts its N tokens."""
        prompts, pixels = [self.tokenize(prompt_text)], self.pixels(picture)[None]
        hidden_states, _, positions = self.prepare(prompts, pixels)
        return self.head(self.run(hidden_states, 0, self.depth, self.rope(positions)))[0]

    @torch.no_grad()
    def generate(self, picture, question, max_new_tokens=128, history=()):
        """The plain answer to a question about the whole picture, greedy."""
        prompts, pixels = [self.prompt_ids(question, history)], self.pixels(picture)[None]
        hidden_states, _, positions = self.prepare(prompts, pixels)
        T = hidden_states.shape[1]
        self.check_length(T + max_new_tokens)
        cache = KVCache(self, 1, T + max_new_tokens)
        cache.shift = next_position(positions) - T
        last = self.run(hidden_states, 0, self.depth, self.rope(positions), cache)[:, -1]
        return self.detokenize(self.decode(last, cache, T, max_new_tokens)[0])

    @torch.no_grad()
    def decode(self, last_hidden, cache, position, max_new_tokens):
        """Greedy decoding from the last prompt token's hidden state (b, D).

        position: the cache's column of the next token. Returns b lists of ids without EOS. EOS is
        never fed back, nor is the last of max_new_tokens. A row that has ended leaves the batch,
        unless cache.queries are kept: then each holds one (b, H, 1, d) for every step, rows that
        ended included. Raises FloatingPointError where a logit is not finite.
        """
        first = position + cache.shift
        rope = self.rope(torch.arange(first, first + max_new_tokens, device=self.device))
        rope = rope.transpose(0, 1).contiguous()  # (steps, 2, d), equal strides in each
        answers = [[] for _ in range(len(last_hidden))]
        unended = list(answers)  # the answer that each row of the batch goes on with, or None
        for step in range(max_new_tokens):
            tokens, ids = self.choose(last_hidden)  # (b,), and the same on the host
            for row, token in enumerate(ids):
                if token in self.config["eos_ids"]:
                    unended[row] = None
                elif unended[row] is not None:
                    unended[row].append(token)
            stay = [row for row, answer in enumerate(unended) if answer is not None]
            if not stay or step == max_new_tokens - 1:
                break
            if len(stay) < len(ids) and not cache.queries:
                tokens, unended = tokens[stay], [unended[row] for row in stay]
                cache.keep(stay)
            column = position + step
            if self.static is not None:
                column = torch.tensor([column], device=self.device)
            last_hidden = self.advance(tokens, cache, column, rope[step][:, None])
        return answers

    def choose(self, last_hidden):
        """The likeliest next token of each row of (b, D): ids on the device, and on the host."""
        best, tokens = self.head(last_hidden)[:, :self.pieces].max(-1)  # NaN counts as largest
        values = torch.stack([tokens.to(wider(best.dtype)), best.to(wider(best.dtype))])
        ids, best = values.tolist()  # the one host sync of a step
        if not all(map(math.isfinite, best)):
            raise FloatingPointError(f"the model's logits are not finite in {str(self.dtype)[6:]}; "
                                     "try --dtype bfloat16 or float32")
        return tokens, [int(i) for i in ids]

    def advance(self, tokens, cache, column, rope):
        """One decoding step: ids (b,) -> the hidden state after the last layer (b, D)."""
        hidden_states = self.language_model.embed_tokens(tokens)[:, None]  # (b, 1, D)
        return self.run(hidden_states, 0, self.depth, rope, cache, start=column)[:, -1]

    # ---- what a checkpoint of this family looks like

    @classmethod
    def load(cls, path_or_name, device=None, dtype=None):
        """The same as load()."""
        return load(path_or_name, device, dtype)

    @classmethod
    def read_config(cls, folder, config):
        """config.json's content -> the decoder's sizes, the tower's under "vision", and flags.

        Raises BadInput on what is nonsense, or not LLaVA-1.5.
        """
        path = folder / "config.json"
        vision = config.get("vision_config") or VIT_L_14_336
        text = read_text_sizes(path, config.get("text_config") or {}, TEXT_DEFAULTS)
        vision = VISION_SIZES | {"layer_norm_eps": 1e-5} | vision
        check_whole(path, vision, *VISION_SIZES)
        check_number(path, vision, "layer_norm_eps")
        layers, feature = vision["num_hidden_layers"], config.get("vision_feature_layer", -2)
        refuse(path, [
            (type(feature) is not int or not -layers <= feature <= layers,
             "vision_feature_layer must be one layer"),
            (config.get("vision_feature_select_strategy", "default") != "default",
             "vision_feature_select_strategy must be default"),
            (config.get("projector_hidden_act", "gelu") != "gelu",
             "projector_hidden_act must be gelu"),
            (vision["hidden_size"] % vision["num_attention_heads"] != 0,
             "the tower's hidden_size is not a multiple of its heads"),
            (vision["image_size"] < vision["patch_size"],
             "image_size is smaller than patch_size")])
        return text | {
            "vision": vision | {"vision_feature_layer": feature},
            "image_token": config.get("image_token_index", config.get("image_token_id", 32000)),
            "projector_bias": config.get("multimodal_projector_bias", True),
            "tied": bool(config.get("tie_word_embeddings", False)),
            "eos_ids": [2]}

    @staticmethod
    def read_tokenizer(folder, config):
        path = folder / "tokenizer.model"
        if not path.is_file():
            other = ""
            if (folder / "tokenizer.json").is_file():
                other = ", and tokenizer.json is not read for this family"
            raise BadInput(f"{path}: missing{other}; "
                           "copy the checkpoint's tokenizer.model into the folder")
        tokenizer = sentencepiece.SentencePieceProcessor()
        try:
            tokenizer.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError):
            raise BadInput(f"{path}: not a sentencepiece model; download it again") from None
        pieces = tokenizer.get_piece_size()
        vocab, image = config["vocab_size"], config["image_token"]
        if type(image) is not int or not 0 < pieces <= min(vocab, image):
            raise BadInput(f"{path}: {pieces} pieces, but config.json has {vocab} embeddings and "
                           f"image token {str(image)[:40]}; "
                           "use the tokenizer.model of this checkpoint")
        if (tokenizer.bos_id(), tokenizer.eos_id()) != (1, 2):
            raise BadInput(f"{path}: BOS and EOS are not 1 and 2 as in LLaMA; "
                           "use the tokenizer.model of this checkpoint")
        return tokenizer

    @staticmethod
    def canonical(name):
        """Every spelling in circulation -> our parameter's name."""
        parts = "language_model|vision_tower|multi_modal_projector|lm_head"
        name = re.sub(rf"^model\.(?={parts})", "", name)
        name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
        name = re.sub(r"^language_model\.model\.", "language_model.", name)
        return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)

    def ignored(self, key):
        """Tensors that nothing reads: buffers, and the tower's layers above the used."""
        used, depth = len(self.vision_tower.encoder.layers), self.vision_tower.depth
        layer = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", key)
        return (key.startswith("vision_tower.post_layernorm.")
                or key.endswith(("rotary_emb.inv_freq", "embeddings.position_ids"))
                or layer is not None and used <= int(layer[1]) < depth)


def next_position(positions):
    """Where the text goes on after tokens at these positions: (T,) or (3, T) -> int."""
    return int(positions.max()) + 1


def compile_decode(m, *lengths):
    """From now on decode with a compiled step, ready for caches of these lengths -> seconds.

    Its buffers are kept and used again, so answer one question at a time. Half precision rounds
    differently.
    """
    began, m.static = time.perf_counter(), {}
    mode = "reduce-overhead" if m.device.type == "cuda" else None
    m.advance = torch.compile(m.advance, mode=mode, dynamic=False)
    for length in lengths:  # a few steps each: CUDA graphs are recorded at the second
        cache = KVCache(m, 1, length)
        hidden_states = torch.zeros(1, 2, m.config["hidden_size"], dtype=m.dtype, device=m.device)
        with torch.no_grad():
            m.run(hidden_states, 0, m.depth, m.rope(torch.arange(2, device=m.device)), cache)
            for column in range(2, 6):
                position = torch.tensor([column], device=m.device)
                m.advance(torch.tensor([1], device=m.device), cache, position, m.rope(position))
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------- sizes

def read_json(path):
    """A JSON object from a file. Raises BadInput."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; is {path.parent} a checkpoint folder "
                       "in the Hugging Face layout?") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{path}: not readable as JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: not a JSON object; download it again")
    return value


def check_whole(path, sizes, *keys):
    for key in keys:
        most = 1 << 10 if "layers" in key else 1 << 20
        if type(sizes.get(key)) is not int or not 0 < sizes[key] <= most:
            raise BadInput(f"{path}: {key} = {str(sizes.get(key))[:40]} is not a sensible size; "
                           "download it again")


def check_number(path, sizes, *keys):
    for key in keys:
        if type(sizes.get(key)) not in (int, float) or not 0 < sizes[key] < 1e12:
            raise BadInput(f"{path}: {key} = {str(sizes.get(key))[:40]} is not a sensible number; "
                           "download it again")


def refuse(path, faults):
    """faults: [(True if it is so, what it says), ...]"""
    for is_so, what in faults:
        if is_so:
            raise BadInput(f"{path}: {what}; this is not a checkpoint this program can run")


def read_text_sizes(path, given, defaults):
    """A LLaMA decoder's sizes, by config.json's names -> dict with every key that Block reads."""
    rope = given.get("rope_parameters") or {}  # newer files nest rope_theta there
    text = defaults | {key: value for key, value in (given | rope).items() if value is not None}
    text.setdefault("num_key_value_heads", text.get("num_attention_heads"))
    check_whole(path, text, "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                "vocab_size")
    check_number(path, text, "rms_norm_eps", "rope_theta")
    text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
    check_whole(path, text, "head_dim")
    refuse(path, [
        (text.get("hidden_act", "silu") != "silu", "hidden_act must be silu"),
        (text.get("attention_bias"), "attention_bias is not supported"),
        (text.get("rope_scaling") or text.get("rope_type", "default") != "default",
         "rope scaling is not supported"),
        (text["num_attention_heads"] % text["num_key_value_heads"] != 0,
         "num_attention_heads is not a multiple of num_key_value_heads"),
        (text["head_dim"] % 2 != 0, "head_dim must be even")])
    # LLaVA's: no biases on q, k, v; the RPN's score layer reads normed states (Eq. 4), and its own
    # q and k are not rotated (Eq. 5); no sections for rope_table: a position is one number.
    return text | dict(qkv_bias=False, final_norm=True, score_rope=False, mrope_section=None)


# ----------------------------------------------------------------------------------------- loading

def load(path_or_name, device=None, dtype=None):
    """Load a checkpoint folder in the Hugging Face layout, or a known name -> its family's model.

    dtype: None = the file's on CUDA; on the CPU float32 below 1 GB of weights, else bfloat16.
    Raises BadInput, before taking memory, when a file is missing or damaged, a key unknown or
    missing, or a shape differs.
    """
    folder = find_checkpoint(path_or_name)
    family, config = read_family(folder)
    shards = open_shards(folder)
    tokenizer, device = family.read_tokenizer(folder, config), check_device(device)
    try:
        with torch.device("meta"):  # sizes only: no memory until a tensor is read
            m = family(config, tokenizer)
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as e:
        raise BadInput(f"{folder / 'config.json'}: sizes that make no model ({str(e)[:80]}); "
                       "download it again") from None
    where = match_keys(folder, m, shards)
    dtype = torch_dtype(dtype) or default_dtype(device, where, shards)
    for key, (file, name) in where.items():
        tensor = shards[file].get_tensor(name)  # memory-mapped: read as it is converted
        tensor = tensor.to(device, dtype)
        if not torch.isfinite(tensor).all():
            raise BadInput(f"{folder / file}: {name} holds NaN or infinite values; "
                           "download the file again")
        module, _, leaf = key.rpartition(".")
        setattr(m.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
    if config["tied"]:
        m.lm_head.weight = m.language_model.embed_tokens.weight
    m.folder, m.fingerprint = folder, fingerprint(folder, shards)
    return m.eval()


def read_family(folder):
    """-> the class that config.json's model_type asks for, and its checked config."""
    path = folder / "config.json"
    if not path.is_file():
        explain_folder(folder)
    config = read_json(path)
    if config.get("quantization_config"):
        raise BadInput(f"{path}: quantised weights (AWQ, GPTQ, bitsandbytes) are not read; "
                       "use the float16 or bfloat16 checkpoint")
    if "mm_vision_tower" in config or "mm_projector_type" in config:
        raise BadInput(f"{path}: a checkpoint in the original LLaVA layout; use the same model as "
                       f"{KNOWN['llava-1.5-7b']} or {KNOWN['llava-1.5-13b']}")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise BadInput(f"{path}: model_type is {kind!r}, not one of {', '.join(FAMILIES)}; "
                       f"see --help for the names of checkpoints")
    module, name = FAMILIES[kind]
    try:
        family = getattr(importlib.import_module(module), name)
    except ImportError:
        raise BadInput(f"{path}: a {kind} model needs {module.replace('.', '/')}.py "
                       "beside model.py; copy it there") from None
    try:
        sizes = family.read_config(folder, config)
    except (AttributeError, KeyError, TypeError, ValueError) as e:  # a list for a dict, ...
        raise BadInput(f"{path}: not what a {kind} model has ({type(e).__name__}: {str(e)[:80]}); "
                       "download it again") from None
    return family, sizes | {"model_type": kind}


def explain_folder(folder):
    """A folder without config.json or weights: say what it is, if that shows. Raises BadInput."""
    snapshots = sorted(folder.glob("snapshots/*/config.json"))
    if snapshots:
        raise BadInput(f"{folder}: the root of a hub download; "
                       f"name its snapshot: {snapshots[-1].parent}")
    if any(folder.glob("adapter_*")):
        raise BadInput(f"{folder}: an adapter (LoRA) alone; "
                       "merge it into its base model and save that")


def check_device(device):
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError):
        others = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise BadInput(f"--device {device}: not on this machine; use {others}") from None


def find_checkpoint(path_or_name):
    """A folder, or a name looked up beside the project, in checkpoints/ and in the hub's cache.

    The hub's own owner/name stands for the name here. Returns a Path, or raises BadInput.
    """
    name, path = str(path_or_name), Path(path_or_name)
    name = next((known for known, repository in KNOWN.items() if repository == name), name)
    if name == "toy":  # also where data/toy is at hand
        return ROOT / "data" / "toy" / "llava-toy"
    if path.is_dir():
        return path
    for place in (ROOT.parent / name, ROOT / "checkpoints" / name):
        if place.is_dir():
            return place
    if name.startswith("liuhaotian/"):
        known = "llava-1.5-13b" if "13b" in name else "llava-1.5-7b"
        raise BadInput(f"{name}: the original layout, in pickles, which are never loaded; "
                       f"use --ckpt {known}, the same model as {KNOWN[known]}")
    if name not in KNOWN:
        raise BadInput(f"{name}: no such checkpoint folder, nor one of the names "
                       f"{', '.join(KNOWN)}; check --ckpt")
    repository = KNOWN[name]
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    home = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    cached = home / ("models--" + repository.replace("/", "--"))
    newest = sorted(cached.glob("snapshots/*/config.json"), key=lambda p: p.parent.stat().st_mtime)
    if newest:
        return newest[-1].parent
    raise BadInput(f"{name} is not on this machine; download it with: hf download {repository} "
                   f"--local-dir {ROOT / 'checkpoints' / name} (hf: pip install huggingface_hub)")


def run_name(path_or_name):
    """What out/<name> is called for a checkpoint: a known name, else the folder's."""
    folder, given = find_checkpoint(path_or_name), str(path_or_name)
    if folder == find_checkpoint("toy"):
        return "toy"
    names = {name: name for name in KNOWN} | {hub: name for name, hub in KNOWN.items()}
    return names.get(given) or folder.resolve().name


def open_shards(folder):
    """All safetensors files of a checkpoint -> {file name: opened file}; no weight is read yet."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            inside = all(Path(name).name == name for name in names)
        except (AttributeError, KeyError, TypeError):
            inside = False
        if not inside:
            raise BadInput(f"{index}: no weight_map of files in this folder; download it again")
    elif single.is_file():
        names = [single.name]
    else:
        explain_folder(folder)
        pickles = sorted(p.name for end in ("bin", "pt", "pth") for p in folder.glob(f"*.{end}"))
        if pickles:
            raise BadInput(f"{folder}: holds {pickles[0]}, a pickle, which is never loaded; use "
                           f"the safetensors of the hub, for example {KNOWN['llava-1.5-7b']}")
        raise BadInput(f"{folder}: no model.safetensors and no model.safetensors.index.json; "
                       "is the download complete?")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInput(f"{folder}: {len(missing)} of {len(names)} shards missing: "
                       f"{', '.join(missing)}; download them again")
    return {name: open_safetensors(folder / name) for name in names}


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")  # checks the header against the file's length
    except (SafetensorError, OSError, ValueError, OverflowError) as e:
        raise BadInput(f"{path}: truncated or not safetensors ({e}); download it again") from None


def match_keys(folder, m, shards):
    """Match tensors and parameters both ways -> {our parameter: (file, name there)}.

    Every tensor is used once or on the family's ignore list, every parameter is filled, shapes
    agree.
    """
    wanted, where, unknown = dict(m.named_parameters()), {}, []
    tied = m.config["tied"]
    if tied:
        wanted.pop("lm_head.weight")
    for file, shard in shards.items():
        for name in shard.keys():
            key = m.canonical(name)
            if key in where:
                raise BadInput(f"{folder / file}: {name} is there twice (also in {where[key][0]}); "
                               "download the folder again")
            if key in wanted:
                where[key] = file, name
            elif not (m.ignored(key) or tied and key == "lm_head.weight"):
                unknown.append(name)
    missing = [key for key in wanted if key not in where]
    if missing or unknown:
        raise BadInput(f"{folder}: {ledger_fault(m, wanted, missing, unknown)}")
    for key, (file, name) in where.items():
        tensor = shards[file].get_slice(name)
        shape, expected = tuple(tensor.get_shape()), tuple(wanted[key].shape)
        if shape != expected:
            raise BadInput(f"{folder / file}: {name} has shape {shape}, config.json says "
                           f"{expected}; config.json and the weights are not of one model")
        if tensor.get_dtype() not in DTYPES:
            raise BadInput(f"{folder / file}: {name} is {tensor.get_dtype()}, not a "
                           "floating-point tensor; quantised checkpoints are not supported")
    return where


def ledger_fault(m, wanted, missing, unknown):
    """One line on keys that do not match, with the nearest, or with what this probably is."""
    if any("mm_projector" in name for name in unknown):
        return (f"a checkpoint in the original LLaVA layout (model.mm_projector.*); "
                f"use {KNOWN['llava-1.5-7b']} or {KNOWN['llava-1.5-13b']} instead")
    if any(name.startswith("base_model.") for name in unknown):
        return "an adapter (LoRA), not a whole model; merge it into its base model and save that"
    some, what = (missing, "missing") if missing else (unknown, "unknown")
    others = [m.canonical(name) for name in unknown] if missing else list(wanted)
    near = difflib.get_close_matches(some[0], others, 1)
    nearest = f" (nearest: {near[0]})" if near else ""
    return (f"{len(missing)} tensors missing, {len(unknown)} unknown; first {what}: "
            f"{', '.join(some[:3])}{nearest}; config.json and the weights are not of one model")


def torch_dtype(name):
    """None, a torch.dtype, or one of float16, bfloat16, float32, float64."""
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise BadInput(f"--dtype {name}: must be float16, bfloat16, float32 or float64")
    return getattr(torch, name)


def default_dtype(device, where, shards):
    slices = [shards[file].get_slice(name) for file, name in where.values()]
    if device.type == "cuda":
        return DTYPES[slices[0].get_dtype()]
    size = sum(4 * math.prod(s.get_shape()) for s in slices)
    return torch.float32 if size < 2 ** 30 else torch.bfloat16  # 1 GB of float32


def fingerprint(folder, shards):
    """A short name for exactly these weights: what config.json says, and the files' content."""
    config = read_json(folder / "config.json")  # as parsed: a newline more is not another model
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted(shards):
        digest_file(digest, folder / file)
    return digest.hexdigest()[:16]


def digest_file(digest, path):
    """A file's name, size and content; from 256 MB on, of the content 64 samples of 4 KB."""
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with open(path, "rb") as f:
        for i in range(64):
            f.seek(size * i // 64)
            digest.update(f.read(4096 if size > 1 << 28 else size // 64 + 1))

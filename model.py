"""
Features + words -> words: the projector, the LLaMA decoder, the tokeniser, and LLaVA-1.5 put together and loaded.

    llava = LLaVA.load("llava-1.5-7b")
    print(llava.generate(load_image("img.jpg"), "What is written on the sign?"))

Every size comes from config.json, so the 7 MB toy and the 13B run through the same lines. Only safetensors are read.
Left out: sampling, quantisation, sliding windows, rotary scaling, padding (batches hold prompts of one length).
Shapes: b batch, T or t tokens, N = g*g image tokens, D hidden width, H heads (Hkv of them for k and v), d head size.
Layers and heads count from 0. Positions are plain token indices, the image's N tokens included.
"""
import difflib
import hashlib
import math
import os
import re
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from clip import CLIPVision, preprocess
from data.config import KNOWN, read_json, read_sizes
from data.files import BadInput

ROOT = Path(__file__).resolve().parent
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


# ---------------------------------------------------------------------------------------------- decoder

def wider(dtype):
    """float32, or float64 where that is what the model runs in: statistics are never taken in half precision."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.to(wider(x.dtype))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)  # cast back before the weight, as LLaMA does


def rope_table(start, t, d, theta, device, dtype):
    """cos and sin (t, d) for positions start..start+t-1. Built in float32 or wider, cast last: half-precision angles are wrong."""
    wide = wider(dtype)
    frequencies = theta ** (-torch.arange(0, d, 2, device=device, dtype=wide) / d)  # (d/2,)
    angles = (start + torch.arange(t, device=device, dtype=wide))[:, None] * frequencies  # (t, d/2)
    angles = torch.cat([angles, angles], -1)  # (t, d)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, rope):
    """Rotary embedding in the half-split convention: channel i is paired with channel i + d/2. x (b, H, t, d)."""
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class KVCache:
    """Keys and values of all layers, allocated once per answer: lists k and v of a (b, Hkv, length, d) per layer.

    `queries` = {layer: []} makes those layers also keep the rotated q (b, H, t, d) and k (b, Hkv, t, d) of each call.
    """

    def __init__(self, llava, b, length):
        c = llava.config
        if llava.static is not None:  # a compiled step is bound to one size and place: round up, and use the same memory again
            length = -(-length // 512) * 512
        self.k, self.v = (llava.static or {}).get((b, length), (None, None))
        if self.k is None:
            shape = (b, c["num_key_value_heads"], length, c["head_dim"])
            self.k, self.v = ([torch.empty(shape, dtype=llava.dtype, device=llava.device) for _ in range(c["num_hidden_layers"])] for _ in "kv")
        if llava.static is not None:
            llava.static[b, length] = self.k, self.v
            for t in [*self.k, *self.v]:
                torch._dynamo.mark_static_address(t.zero_())  # zeros: what the mask hides is still multiplied
        self.queries = {}

    def keep(self, rows):
        """Go on with these rows of the batch only."""
        self.k, self.v = [k[rows] for k in self.k], [v[rows] for v in self.v]


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, self.H, self.Hkv, self.d = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.q_proj = nn.Linear(D, self.H * self.d, bias=False)
        self.k_proj = nn.Linear(D, self.Hkv * self.d, bias=False)
        self.v_proj = nn.Linear(D, self.Hkv * self.d, bias=False)
        self.o_proj = nn.Linear(self.H * self.d, D, bias=False)

    def split(self, x):
        """(b, t, heads * d) -> (b, heads, t, d)"""
        return x.unflatten(-1, (-1, self.d)).transpose(1, 2)

    def forward(self, x, rope, layer, cache=None, start=0):
        q = rotate(self.split(self.q_proj(x)), rope)  # (b, H, t, d)
        k = rotate(self.split(self.k_proj(x)), rope)  # (b, Hkv, t, d)
        v = self.split(self.v_proj(x))
        t, mask = x.shape[1], None
        if cache is not None:
            if layer in cache.queries:
                cache.queries[layer].append((q, k))
            keys, values, end = cache.k[layer], cache.v[layer], start + t
            if torch.is_tensor(start):  # compiled: one token against all of the cache, behind a mask
                k, v = keys.index_copy_(2, start, k), values.index_copy_(2, start, v)  # (b, Hkv, length, d)
                mask = torch.arange(k.shape[2], device=x.device)[None] <= start  # (1, length)
            else:
                keys[:, :, start:end], values[:, :, start:end] = k, v
                k, v = keys[:, :, :end], values[:, :, :end]  # (b, Hkv, start+t, d)
                if start > 0 and t > 1:  # row i sees columns 0..start+i
                    mask = torch.ones(t, end, dtype=torch.bool, device=x.device).tril(start)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and t > 1,
                                           enable_gqa=self.H != self.Hkv)  # (b, H, t, d)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (b, t, D)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, I = c["hidden_size"], c["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(D, I, bias=False), nn.Linear(D, I, bias=False)
        self.down_proj = nn.Linear(I, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One LLaMA decoder layer: hidden states (b, t, D) -> (b, t, D)."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, x, rope, layer=0, cache=None, start=0):
        x = x + self.self_attn(self.input_layernorm(x), rope, layer, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])


class Projector(nn.Module):
    """CLIP features (b, N, C) -> the decoder's input space (b, N, D)."""

    def __init__(self, C, D, bias=True):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(C, D, bias=bias), nn.Linear(D, D, bias=bias)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x)))  # the exact (erf) GELU here, not the tower's quick_gelu


# ------------------------------------------------------------------------------------------------ LLaVA

class LLaVA(nn.Module):
    """CLIP tower + projector + LLaMA decoder, with its tokeniser. Build it with `LLaVA.load`.

    Attributes: config (the decoder's sizes), grid (g, an int), num_image_tokens (N), folder, device, dtype.
    """

    def __init__(self, config, vision_config, image_token, tokenizer=None, projector_bias=True):
        super().__init__()
        self.config, self.image_token, self.tokenizer = config, image_token, tokenizer
        self.vision_tower = CLIPVision(vision_config)
        self.multi_modal_projector = Projector(vision_config["hidden_size"], config["hidden_size"], projector_bias)
        self.language_model = Decoder(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self.grid, self.num_image_tokens = self.vision_tower.grid, self.vision_tower.grid ** 2
        self.folder, self.fingerprint = None, None
        self.static = None  # compile_decode: {(b, length): keys and values}

    device = property(lambda self: self.lm_head.weight.device)
    dtype = property(lambda self: self.lm_head.weight.dtype)

    # ---- words

    def prompt_ids(self, question, history=()):
        """The vicuna_v1 prompt as ids, one image_token where the image goes; history = ((question, answer), ...).

        The pieces around the image and after each </s> are tokenised apart, as LLaVA does. Only this template places the
        ids of <image> and </s>: typed by a user they stay text.
        """
        sp = self.tokenizer
        ids = [sp.bos_id(), *sp.encode(f"{SYSTEM} USER: "), self.image_token]
        for turn, (q, a) in enumerate([*history, (question, None)]):
            text = f"{q} ASSISTANT:" + ("" if a is None else f" {a}")
            ids += sp.encode("\n" + text) if turn == 0 else self._after_eos("USER: " + text)
            if a is not None:
                ids.append(sp.eos_id())
        return ids

    def _after_eos(self, text):
        """LLaVA's tokeniser puts no dummy space before a piece that follows </s>: encode it behind a newline, drop that."""
        return self.tokenizer.encode("\n" + text)[len(self.tokenizer.encode("\n")):]

    def tokenize(self, prompt_text):
        """A rendered prompt with one <image> (and </s> after each past answer) -> ids with one image token."""
        sp = self.tokenizer
        before, image, after = prompt_text.partition("<image>")
        ids = [sp.bos_id(), *sp.encode(before)]
        if image:
            ids.append(self.image_token)
            first, *rest = after.split("</s>")
            ids += sp.encode(first)
            for piece in rest:
                ids += [sp.eos_id(), *(self._after_eos(piece) if piece else [])]
        return ids

    def detokenize(self, ids):
        return self.tokenizer.decode(list(ids)).strip()

    # ---- pictures and hidden states

    @torch.no_grad()
    def encode_images(self, pixels):
        """pixels (b, 3, S, S) -> projected image tokens (b, N, D)."""
        return self.multi_modal_projector(self.vision_tower(pixels.to(self.device, self.dtype)))

    def view(self, image):
        """The whole picture's tokens (1, N, D)."""
        return self.encode_images(preprocess(image, self.vision_tower.image_size)[None])

    def embed(self, ids):
        """Token ids -> (1, t, D)."""
        return self.language_model.embed_tokens(torch.tensor([ids], device=self.device))

    def embed_prompt(self, ids, image_tokens):
        """ids with one image token, image tokens (1, N, D) -> embeddings (1, T, D), and the image's columns as a slice."""
        i, n = ids.index(self.image_token), image_tokens.shape[1]
        return torch.cat([self.embed(ids[:i]), image_tokens, self.embed(ids[i + 1:])], 1), slice(i, i + n)

    def run(self, hidden_states, first, last, cache=None, start=0):
        """Decoder layers first..last-1 on hidden states (b, t, D) of the tokens at positions start..start+t-1.

        With a cache the tokens also see everything at positions 0..start-1 that was run through the same layers before.
        """
        c, t = self.config, hidden_states.shape[1]
        rope = rope_table(start, t, c["head_dim"], c["rope_theta"], hidden_states.device, hidden_states.dtype)
        for layer in range(first, last):
            hidden_states = self.language_model.layers[layer](hidden_states, rope, layer, cache, start)
        return hidden_states

    def head(self, hidden_states):
        """(..., D) after the last layer -> logits (..., vocab)."""
        return self.lm_head(self.language_model.norm(hidden_states))

    def check_length(self, tokens):
        limit = self.config["max_position_embeddings"]
        if tokens > limit:
            raise BadInput(f"the prompt and its answer need {tokens} tokens, the model has room for {limit}; shorten the question "
                           "or the conversation, or lower --max-new-tokens")

    # ---- answers

    @torch.no_grad()
    def logits(self, image, prompt_text):
        """Logits (T, vocab) of a rendered prompt that holds one <image>; T counts the image's N tokens."""
        hidden_states, _ = self.embed_prompt(self.tokenize(prompt_text), self.view(image))
        return self.head(self.run(hidden_states, 0, self.config["num_hidden_layers"]))[0]

    @torch.no_grad()
    def decode(self, last_hidden, cache, position, max_new_tokens, ignore_eos=False):
        """Greedy decoding from the last prompt token's hidden state (b, D), whose successor sits at `position`.

        Returns b lists of ids without EOS. Tokens beyond the tokeniser's size (padding rows of the vocabulary) are never
        chosen. A row that has ended leaves the batch, so it stops costing. EOS is never fed back, nor is the last of
        max_new_tokens: `cache.queries` then holds one row for each token fed.
        """
        vocab, eos = self.tokenizer.get_piece_size(), self.tokenizer.eos_id()
        answers = [[] for _ in range(len(last_hidden))]
        alive = list(range(len(answers)))
        for step in range(max_new_tokens):
            logits = self.head(last_hidden)[:, :vocab]  # (alive, vocab)
            if ignore_eos:
                logits[:, eos] = float("-inf")
            tokens = logits.argmax(-1)  # NaN counts as largest
            ids, best = torch.stack([tokens.float(), logits.gather(-1, tokens[:, None])[:, 0].float()]).tolist()  # the one host sync of a step
            if not all(map(math.isfinite, best)):
                raise FloatingPointError(f"the model's logits are not finite in {str(self.dtype)[6:]}; try --dtype bfloat16 or float32")
            ids = [int(i) for i in ids]
            stay = [r for r, i in enumerate(ids) if i != eos]
            for r in stay:
                answers[alive[r]].append(ids[r])
            if not stay or step == max_new_tokens - 1:
                break
            if len(stay) < len(ids):
                tokens, alive = tokens[stay], [alive[r] for r in stay]
                cache.keep(stay)
            at = position + step
            last_hidden = self.advance(tokens, cache, at if self.static is None else torch.tensor([at], device=self.device))
        return answers

    def advance(self, tokens, cache, position):
        """One decoding step: ids (b,) at `position` -> the hidden state after the last layer (b, D)."""
        hidden_states = self.language_model.embed_tokens(tokens)[:, None]  # (b, 1, D)
        return self.run(hidden_states, 0, self.config["num_hidden_layers"], cache, start=position)[:, -1]

    def compile_decode(self, *lengths):
        """From now on decode with a compiled step, made ready here for caches of these lengths; returns the seconds that took.

        It keeps one cache per rounded length, so answer one question at a time. In half precision it rounds differently.
        """
        began, self.static = time.perf_counter(), {}
        self.advance = torch.compile(self.advance, mode="reduce-overhead" if self.device.type == "cuda" else None, dynamic=False)
        for length in lengths:  # a few steps each: CUDA graphs are recorded at the second
            last_hidden = torch.zeros(1, self.config["hidden_size"], dtype=self.dtype, device=self.device)
            self.decode(last_hidden, KVCache(self, 1, length), 0, 5, ignore_eos=True)
        return time.perf_counter() - began

    @torch.no_grad()
    def generate(self, image, question, max_new_tokens=128, history=()):
        """The plain answer to a question about the whole picture, greedy; history = ((question, answer), ...)."""
        hidden_states, _ = self.embed_prompt(self.prompt_ids(question, history), self.view(image))
        T = hidden_states.shape[1]
        self.check_length(T + max_new_tokens)
        cache = KVCache(self, 1, T + max_new_tokens)
        last = self.run(hidden_states, 0, self.config["num_hidden_layers"], cache)[:, -1]
        return self.detokenize(self.decode(last, cache, T, max_new_tokens)[0])

    # ---- loading

    @classmethod
    def load(cls, path_or_name, device=None, dtype=None):
        """Load a checkpoint folder in the Hugging Face layout, or a known name (see `find_checkpoint`).

        dtype: None = the file's on CUDA; on the CPU float32 below 1 GB of weights, else bfloat16.
        Raises BadInput, before taking memory, when a file is missing or damaged, a key is unknown or missing, or a shape differs.
        """
        folder = find_checkpoint(path_or_name)
        config = read_json(folder / "config.json")
        shards = open_shards(folder)
        text, vision, top = read_sizes(folder, config)
        tokenizer = read_tokenizer(folder, text["vocab_size"], top["image_token"])
        try:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError):
            raise BadInput(f"--device {device}: not on this machine; use cpu" + (", cuda" if torch.cuda.is_available() else "")) from None
        try:
            with torch.device("meta"):  # sizes only: no memory until a tensor is read
                llava = cls(text, vision, top["image_token"], tokenizer, top["projector_bias"])
        except (RuntimeError, TypeError, ValueError, ArithmeticError) as e:
            raise BadInput(f"{folder / 'config.json'}: sizes that make no model ({str(e)[:80]}); download it again") from None
        where = match_keys(folder, llava, shards, tied=top["tied"])
        dtype = torch_dtype(dtype) or default_dtype(device, where, shards)
        for key, (file, name) in where.items():
            tensor = shards[file].get_tensor(name)  # memory-mapped: pages are read as they are converted
            module, _, leaf = key.rpartition(".")
            tensor = tensor.to(device, dtype)
            if not torch.isfinite(tensor).all():
                raise BadInput(f"{folder / file}: {name} holds NaN or infinite values; download the file again")
            setattr(llava.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
        if top["tied"]:
            llava.lm_head.weight = llava.language_model.embed_tokens.weight
        llava.folder, llava.fingerprint = folder, fingerprint(folder, shards)
        return llava.eval()


# ------------------------------------------------------------------------------------------ checkpoints

def find_checkpoint(path_or_name):
    """A folder, or a name looked up beside the project, under checkpoints/, then in the Hugging Face cache -> Path."""
    name, path = str(path_or_name), Path(path_or_name)
    if path.is_dir():
        return path
    if name == "toy":
        return ROOT / "data" / "toy" / "llava-toy"
    for place in (ROOT.parent / name, ROOT / "checkpoints" / name):
        if place.is_dir():
            return place
    if name not in KNOWN:
        raise BadInput(f"{name}: no such checkpoint folder, nor one of the names {', '.join(KNOWN)}; check --ckpt")
    repository = KNOWN[name]
    home = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface") / "hub"
    snapshots = Path(home) / ("models--" + repository.replace("/", "--")) / "snapshots"
    for snapshot in sorted(snapshots.glob("*"), key=lambda p: p.stat().st_mtime, reverse=True):
        if (snapshot / "config.json").is_file():
            return snapshot
    raise BadInput(f"{name} is not on this machine; download it with: hf download {repository} --local-dir {ROOT / 'checkpoints' / name}")


def run_name(path_or_name):
    """What out/<name> is called for a checkpoint: a known name, else the folder's."""
    folder = find_checkpoint(path_or_name)
    return "toy" if folder == find_checkpoint("toy") else path_or_name if path_or_name in KNOWN else folder.resolve().name


def read_tokenizer(folder, vocab_size, image_token):
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise BadInput(f"{path}: missing; copy the checkpoint's tokenizer.model into the folder")
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError):
        raise BadInput(f"{path}: not a sentencepiece model; download it again") from None
    if type(image_token) is not int or not 0 < tokenizer.get_piece_size() <= min(vocab_size, image_token):
        raise BadInput(f"{path}: {tokenizer.get_piece_size()} pieces, but config.json has {vocab_size} embeddings and image token "
                       f"{str(image_token)[:40]}; use the tokenizer.model of this checkpoint")
    if (tokenizer.bos_id(), tokenizer.eos_id()) != (1, 2):
        raise BadInput(f"{path}: BOS and EOS are not 1 and 2 as in LLaMA; use the tokenizer.model of this checkpoint")
    return tokenizer


def open_shards(folder):
    """All safetensors files of a checkpoint -> {file name: opened file}; headers are checked, no weight is read."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise BadInput(f"{index}: no weight_map of file names; download it again")
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in names):
            raise BadInput(f"{index}: names a file outside the folder; download it again")
    elif single.is_file():
        names = [single.name]
    else:
        pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            raise BadInput(f"{folder}: holds {pickles[0]}, a pickle, which is never loaded; use the safetensors of "
                           f"{KNOWN['llava-1.5-7b']} or {KNOWN['llava-1.5-13b']}")
        raise BadInput(f"{folder}: no model.safetensors and no model.safetensors.index.json; is the download complete?")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInput(f"{folder}: {len(missing)} of {len(names)} shards missing: {', '.join(missing)}; download them again")
    return {name: open_safetensors(folder / name) for name in names}


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")  # checks the header against the file's length
    except (SafetensorError, OSError, ValueError, OverflowError) as e:
        raise BadInput(f"{path}: truncated or not safetensors ({e}); download it again") from None


def canonical(name):
    """Every spelling in circulation -> our parameter name, which is the newest spelling without `model.` and `vision_model.`."""
    name = re.sub(r"^model\.(?=language_model|vision_tower|multi_modal_projector|lm_head)", "", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


def match_keys(folder, llava, shards, tied=False):
    """The two-way ledger: {our parameter: (file, key)}. Every key is used once or is on the ignore list, every parameter filled.

    Ignored: the tower's layers after the feature layer, its post_layernorm, and the buffers inv_freq and position_ids.
    """
    wanted, where, unknown = dict(llava.named_parameters()), {}, []
    if tied:
        wanted.pop("lm_head.weight")
    used_layers = len(llava.vision_tower.encoder.layers)
    for file, shard in shards.items():
        for name in shard.keys():
            key = canonical(name)
            layer = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", key)
            if key in wanted:
                if key in where:
                    raise BadInput(f"{folder / file}: {name} is there twice (also in {where[key][0]}); download the folder again")
                where[key] = file, name
            elif not (key.startswith("vision_tower.post_layernorm.") or layer and used_layers <= int(layer[1]) < llava.vision_tower.depth
                      or key.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")) or tied and key == "lm_head.weight"):
                unknown.append(name)
    if any("mm_projector" in name for name in unknown):
        raise BadInput(f"{folder}: a checkpoint in the original LLaVA layout (model.mm_projector.*); use {KNOWN['llava-1.5-7b']} "
                       f"or {KNOWN['llava-1.5-13b']} instead")
    missing = [key for key in wanted if key not in where]
    if missing or unknown:
        some, what = (missing, "missing") if missing else (unknown, "unknown")
        near = difflib.get_close_matches(some[0], [canonical(u) for u in unknown] if missing else list(wanted), 1)
        raise BadInput(f"{folder}: {len(missing)} tensors missing, {len(unknown)} unknown; first {what}: {', '.join(some[:3])}"
                       + (f" (nearest: {near[0]})" if near else "") + "; config.json and the weights are not of one model")
    for key, (file, name) in where.items():
        shape = tuple(shards[file].get_slice(name).get_shape())
        if shape != tuple(wanted[key].shape):
            raise BadInput(f"{folder / file}: {name} has shape {shape}, config.json says {tuple(wanted[key].shape)}; "
                           "config.json and the weights are not of one model")
        if shards[file].get_slice(name).get_dtype() not in ("F16", "BF16", "F32", "F64"):
            raise BadInput(f"{folder / file}: {name} is {shards[file].get_slice(name).get_dtype()}, not a floating-point tensor; "
                           "quantised checkpoints are not supported")
    return where


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
        return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}[slices[0].get_dtype()]
    size = sum(4 * torch.Size(s.get_shape()).numel() for s in slices)
    return torch.float32 if size < 2 ** 30 else torch.bfloat16  # 1 GB of float32


def fingerprint(folder, shards):
    """A short name for exactly these weights: config.json, sizes, and of each file all (below 256 MB) or 64 samples of 4 KB."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(shards):
        path = folder / file
        size = path.stat().st_size
        digest.update(f"{file} {size}".encode())
        with open(path, "rb") as f:
            for i in range(64):
                f.seek(size * i // 64)
                digest.update(f.read(4096 if size > 1 << 28 else size // 64 + 1))
    return digest.hexdigest()[:16]

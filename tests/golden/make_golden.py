"""Makes the golden tensors: the outputs of a reference library on the tiny models of formula.py.

    python tests/golden/make_golden.py      # where transformers (5.x), torch, sentencepiece and pillow are installed

Writes tokenizer.model and one CASE.safetensors per case beside this file. The project and its tests never import
transformers. The prompt is tokenised here by LLaVA's own rules (pieces around the image and after </s> apart), not by
the library's processor.
Attention maps and RPN scores are worked out in plain torch from the library's hidden states and attention matrices.

One file holds, float32, for the prompt of T tokens (image tokens included), N image tokens, L layers, H heads:
    input_ids (T), rows (some positions), tokens (greedy continuation)
    pixel_values (3, S, S) padded to a square; pixel_values_crop: centre crop instead
    clip.0 .. clip.n (1+N, C)           after pre_layrnorm, after each layer; clip.n[1:], the last, are the features
    projector (N, D)
    layer.in, layer.0 .. , norm         (rows, D)  hidden state entering layer 0, after each layer, after the final norm
    logits (rows, vocab); argmax, logsumexp (T)
    attention.sequence, attention.image (L, H, N)   softmax over everything or over the image; mean over the response
                                        tokens fed back
    norm.bfloat16 (4, D)                the final norm, model in bfloat16, of 30 * weight("norm input", (4, D))
    hidden_norm (L, N)                  norm of the image tokens' hidden state entering each layer
    rpn.copy, rpn.own (turns, N)        RPN logits of the untrained copy and of formula.rpn_tensors
"""
import copy
import tempfile

import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, LlavaImageProcessorPil

from formula import (CASES, CONFIGS, HERE, NEW_TOKENS, PIECES, SHORT, SYSTEM, picture, prompt, rpn_tensors, weight,
                     write_checkpoint)

TEXT = [SYSTEM, "USER: ", " ASSISTANT:", SHORT.strip()] * 8 + [
    "What color is the car? dark blue. Where is the cat? The red cup is on the left of the table.",
    "Who is the author of this book? How many people are there in the picture? There are two. No, yes.",
    "Is the sign behind the tree? What is written on the sign? What is this? And who is it?",
    "0 1 2 3 4 5 6 7 8 9 % $ ! ? ( ) - / ; : \" A B C D E F G H I J K L M N O P Q R S T U V W X Y Z j k q v x z"]


def train_tokenizer(path):
    """A LLaMA-like sentencepiece model: 0..2 = unk, bos, eos, then 256 bytes, then pieces; digits apart."""
    with open(path, "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT), model_writer=out, model_type="bpe", vocab_size=PIECES, character_coverage=1.0,
            byte_fallback=True, split_digits=True, add_dummy_prefix=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            num_threads=1, minloglevel=2)


def encode(sp, case, image_token, image_tokens):
    """-> ids with the image token repeated, and the query tokens: where the last prompt token before each answer is."""
    ids = [1] + sp.encode(f"{SYSTEM} USER: ") + [image_token] * image_tokens
    queries = []
    for turn, (question, answer) in enumerate([*case["history"], (case["question"], None)]):
        if turn == 0:
            def one(text):
                return sp.encode("\n" + text)
        else:  # no dummy space after </s>: encode behind a newline, drop it
            def one(text):
                return sp.encode("\nUSER: " + text)[2:]
        asked = one(f"{question} ASSISTANT:")
        queries.append(len(ids) + len(asked) - 1)
        if answer is not None:
            asked, whole = one(f"{question} ASSISTANT: {answer}"), asked
            assert asked[:len(whole)] == whole
            asked = asked + [2]
        ids += asked
    return ids, queries


def causal(t):
    return torch.full((t, t), float("-inf")).triu(1)[None, None]


def rpn_logits(decoder, blocks, norm, hidden, queries, image):
    """Blocks but the last in full, both norms, then q.k / sqrt(d) without rotary embedding, mean over heads."""
    rope = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for block in blocks[:-1]:
        hidden = block(hidden, attention_mask=causal(hidden.shape[1]), position_embeddings=rope)
    last = blocks[-1].self_attn
    x = blocks[-1].input_layernorm(norm(hidden))[0]
    q = last.q_proj(x[queries]).view(len(queries), -1, last.head_dim)  # (n, H, d)
    k = last.k_proj(x[image]).view(len(image), -1, last.head_dim)  # (N, Hkv, d)
    scores = [q[:, h] @ k[:, h // last.num_key_value_groups].T / last.head_dim ** 0.5 for h in range(q.shape[1])]
    return torch.stack(scores).mean(0)  # (n, N)


@torch.no_grad()
def golden(case, sp):
    config = CONFIGS[case["config"]]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, config)
        llava, half = (LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager").eval() for dtype in (torch.float32, torch.bfloat16))
    decoder, tower, vision = llava.model.language_model, llava.model.vision_tower, config["vision_config"]
    S = vision["image_size"]
    size = dict(size={"shortest_edge": S}, crop_size={"height": S, "width": S})
    shot = picture(*case["picture"])
    out = {"pixel_values": LlavaImageProcessorPil(do_pad=True, **size)(shot, return_tensors="pt")["pixel_values"][0],
           "pixel_values_crop": CLIPImageProcessorPil(**size)(shot, return_tensors="pt")["pixel_values"][0]}
    pixels = out["pixel_values"][None]

    # everything up to the logits
    N = (vision["image_size"] // vision["patch_size"]) ** 2
    ids, queries = encode(sp, case, config["image_token_index"], N)
    image = [i for i, t in enumerate(ids) if t == config["image_token_index"]]
    assert len(image) == N and all(t < PIECES for i, t in enumerate(ids) if i not in image)
    seen = {}

    def keep(name, output):  # (batch 1, ...) -> seen[name]; a hook must return None
        seen[name] = output[0].clone()

    hooks = [layer.register_forward_hook(lambda m, a, o, n=n: keep(f"layer.{n}", o))
             for n, layer in enumerate(decoder.layers)]
    hooks += [decoder.layers[0].register_forward_pre_hook(lambda m, a: keep("layer.in", a[0])),
              decoder.norm.register_forward_hook(lambda m, a, o: keep("norm", o)),
              llava.model.multi_modal_projector.register_forward_hook(lambda m, a, o: keep("projector", o))]
    input_ids = torch.tensor([ids])
    logits = llava(input_ids=input_ids, pixel_values=pixels).logits[0]
    for hook in hooks:
        hook.remove()
    states = tower(pixels, output_hidden_states=True).hidden_states
    T, D = len(ids), seen["norm"].shape[1]
    rows = sorted({*range(0, T, 12), *image[::5], *queries, T - 1})
    out |= {f"clip.{n}": state[0] for n, state in enumerate(states[:-1])}  # the last layer is never used
    out |= {"projector": seen.pop("projector"), "logits": logits[rows],
            "argmax": logits.argmax(-1).int(), "logsumexp": logits.logsumexp(-1),
            "input_ids": input_ids[0].int(), "rows": torch.tensor(rows).int()}
    out |= {name: state[rows] for name, state in seen.items()}

    # greedy tokens, never one without text
    made = llava.generate(input_ids=input_ids, pixel_values=pixels, max_new_tokens=NEW_TOKENS, do_sample=False,
                          eos_token_id=None, suppress_tokens=list(range(PIECES, config["vocab_size"])),
                          attention_mask=torch.ones_like(input_ids))
    tokens = made[0, T:]
    full = llava(input_ids=made[:, :-1], pixel_values=pixels, output_attentions=True, output_hidden_states=True)
    best = full.logits[0, T - 1:, :PIECES].topk(2)
    margin = (best.values[:, 0] - best.values[:, 1]).min().item()
    assert len(tokens) == NEW_TOKENS and torch.equal(best.indices[:, 0], tokens)
    assert margin > 2e-3 and min(tokens) > 2 and len(set(tokens.tolist())) > 8, (margin, tokens)
    out["tokens"] = tokens.int()

    # response-to-image attention: the response tokens fed back are all but the last
    maps = torch.stack(full.attentions)[:, 0, :, T:, :]  # (L, H, response, all)
    assert maps.shape[2] == NEW_TOKENS - 1
    maps = maps[..., image]  # (L, H, response, N)
    out["attention.sequence"] = maps.mean(2)
    out["attention.image"] = (maps / maps.sum(-1, keepdim=True)).mean(2)
    entering = [seen["layer.in"], *(seen[f"layer.{n}"] for n in range(len(decoder.layers) - 1))]
    out["hidden_norm"] = torch.stack([h[image].norm(dim=-1) for h in entering])  # (L, N)

    # RPN: the untrained copy of layers B..B+R-1, and one with weights of its own
    B, R = case["rpn"]
    blocks, norm = copy.deepcopy(decoder.layers[B:B + R]), copy.deepcopy(decoder.norm)
    hidden = seen[f"layer.{B - 1}"][None]
    out["rpn.copy"] = rpn_logits(decoder, blocks, norm, hidden, queries, image)
    own = rpn_tensors(config, R)
    for n, block in enumerate(blocks):
        prefix = f"model.twig_layers.{n}."
        block.load_state_dict({name.removeprefix(prefix): t for name, t in own.items() if name.startswith(prefix)})
    norm.load_state_dict({"weight": own["model.twig_norm.weight"]})
    out["rpn.own"] = rpn_logits(decoder, blocks, norm, hidden, queries, image)

    # how far bfloat16 takes the reference itself: a yardstick for another implementation in bfloat16
    off = (half(input_ids=input_ids, pixel_values=pixels.bfloat16()).logits[0].float() - logits).abs()
    out["norm.bfloat16"] = half.model.language_model.norm((30 * weight("norm input", (4, D))).bfloat16())
    metadata = dict(prompt=prompt(case["question"], case["history"]), text=sp.decode(tokens.tolist()),
                    bfloat16_mean_error=f"{off.mean():.4f}", smallest_greedy_margin=f"{margin:.4f}",
                    made_with=f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, "
                              f"sentencepiece {sentencepiece.__version__}")
    return {name: t.contiguous().clone() for name, t in out.items()}, metadata


def main():
    if not (HERE / "tokenizer.model").exists():  # kept once made: another version may train another one
        train_tokenizer(HERE / "tokenizer.model")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "tokenizer.model"))
    assert sp.get_piece_size() == PIECES and sp.id_to_piece(3) == "<0x00>" and len(sp.encode("\n")) == 2
    for name, case in CASES.items():
        tensors, metadata = golden(case, sp)
        path = HERE / f"{name}.safetensors"
        save_file(tensors, path, metadata)
        path.chmod(0o644)
        print(f"{path.name}  {path.stat().st_size // 1024} KB  T={len(tensors['input_ids'])}  "
              f"std={tensors['logits'].std():.2f}  "
              f"tokens {tensors['tokens'].tolist()}  {metadata}")


if __name__ == "__main__":
    main()

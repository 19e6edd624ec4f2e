"""Makes the golden tensors: the outputs of a reference library on the tiny models of formula.py.

    python tests/golden/make_golden.py      # where transformers (5.x), torch, sentencepiece and pillow are installed

Writes tokenizer.model and one CASE.safetensors per case beside this file. The project and its tests never import
transformers. The prompt is tokenised here by LLaVA's own rules (pieces around the image and after </s> apart), not by
the library's processor.
Attention maps and RPN scores are worked out in plain torch from the library's hidden states and attention matrices.

One file holds, float32, for the prompt of T tokens (image tokens included), N image tokens, L layers, H heads:
    input_ids (T), rows (some positions), tokens (greedy continuation)
    pixel_values (3, S, S)              padded to a square
    clip.0 .. clip.n (1+N, C)           after pre_layrnorm, after each layer; clip.n[1:], the last, are the features
    projector (N, D)
    layer.in, layer.0 .. , norm         (rows, D)  hidden state entering layer 0, after each layer, after the final norm
    logits (rows, vocab); argmax, logsumexp (T)
    attention.sequence, attention.image (L, H, N)   softmax over everything or over the image; mean over the response
                                        tokens fed back
    norm.bfloat16 (4, D)                the final norm, model in bfloat16, of 30 * weight("norm input", (4, D))
    hidden_norm (L, N)                  norm of the image tokens' hidden state entering each layer
    rpn.copy, rpn.own (turns, N)        RPN logits of the untrained copy and of formula.rpn_tensors
The files of today also hold pixel_values_crop, which nothing reads.
"""
import copy
import tempfile

import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration, LlavaImageProcessorPil

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
    ids = [1, *sp.encode(f"{SYSTEM} USER: "), *[image_token] * image_tokens]
    queries, start, skip = [], "\n", 0
    for question, answer in [*case["history"], (case["question"], None)]:
        asked = f"{start}{question} ASSISTANT:"
        queries.append(len(ids) + len(sp.encode(asked)[skip:]) - 1)
        ids += sp.encode(asked if answer is None else f"{asked} {answer}")[skip:]
        if answer is not None:
            ids.append(2)
        start, skip = "\nUSER: ", 2  # no dummy space after </s>: encode behind a newline, drop it
    return ids, queries


def rpn_logits(decoder, blocks, norm, hidden, queries, image):
    """Blocks but the last in full, both norms, then q.k / sqrt(d) without rotary embedding, mean over heads."""
    T = hidden.shape[1]
    rope, causal = decoder.rotary_emb(hidden, torch.arange(T)[None]), torch.full((1, 1, T, T), -torch.inf).triu(1)
    for block in blocks[:-1]:
        hidden = block(hidden, attention_mask=causal, position_embeddings=rope)
    last = blocks[-1].self_attn
    x = blocks[-1].input_layernorm(norm(hidden))[0]
    q = last.q_proj(x[queries]).view(len(queries), -1, last.head_dim)  # (n, H, d)
    k = last.k_proj(x[image]).view(len(image), -1, last.head_dim)  # (N, Hkv, d)
    k = k.repeat_interleave(last.num_key_value_groups, 1)
    return torch.einsum("qhd,nhd->qn", q, k) / last.head_dim ** 0.5 / q.shape[1]


def rpn_scores(decoder, case, states, queries, image):
    """The untrained copy of layers B..B+R-1, and one with weights of its own."""
    B, R = case["rpn"]
    blocks, norm, hidden = copy.deepcopy(decoder.layers[B:B + R]), copy.deepcopy(decoder.norm), states[f"layer.{B - 1}"]
    out = {"rpn.copy": rpn_logits(decoder, blocks, norm, hidden[None], queries, image)}
    own = rpn_tensors(CONFIGS[case["config"]], R)
    norm.load_state_dict({"weight": own.pop("model.twig_norm.weight")})
    blocks.load_state_dict({name.removeprefix("model.twig_layers."): tensor for name, tensor in own.items()})
    return out | {"rpn.own": rpn_logits(decoder, blocks, norm, hidden[None], queries, image)}


def forward(llava, input_ids, pixels):
    """-> logits (T, vocab), and the stages of computation by their names above, all T positions of them."""
    layers, last = llava.model.language_model.layers, []
    hook = layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    out = llava(input_ids=input_ids, pixel_values=pixels, output_hidden_states=True)
    hook.remove()
    names = ["layer.in", *(f"layer.{n}" for n in range(len(layers) - 1)), "norm", f"layer.{len(layers) - 1}"]
    stages = {name: state[0] for name, state in zip(names, (*out.hidden_states, *last))}
    clip = llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    stages |= {f"clip.{n}": state[0] for n, state in enumerate(clip[:-1])}  # the last layer is never used
    return out.logits[0], stages | {"projector": out.image_hidden_states.flatten(0, -2)}


def respond(llava, input_ids, pixels, image):
    """-> greedy tokens, never one without text; their attention to the image; by how much each beat the next best."""
    T, vocab = input_ids.shape[1], llava.config.text_config.vocab_size
    made = llava.generate(input_ids=input_ids, pixel_values=pixels, max_new_tokens=NEW_TOKENS,
                          eos_token_id=None, suppress_tokens=list(range(PIECES, vocab)))
    tokens = made[0, T:]
    full = llava(input_ids=made[:, :-1], pixel_values=pixels, output_attentions=True)
    best = full.logits[0, T - 1:, :PIECES].topk(2)
    margin = (best.values[:, 0] - best.values[:, 1]).min().item()
    assert torch.equal(best.indices[:, 0], tokens) and min(tokens) > 2
    assert margin > 2e-3 and len(set(tokens.tolist())) > 8, (margin, tokens)
    maps = torch.stack(full.attentions)[:, 0, :, T:, image]  # (L, H, tokens fed back: all but the last, N)
    out = {"tokens": tokens.int(), "attention.sequence": maps.mean(2)}
    return out | {"attention.image": (maps / maps.sum(-1, keepdim=True)).mean(2)}, margin


@torch.no_grad()
def golden(case, sp):
    config = CONFIGS[case["config"]]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, config)
        llava, half = (LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager").eval() for dtype in (torch.float32, torch.bfloat16))
    vision, image_token = config["vision_config"], config["image_token_index"]
    S = vision["image_size"]
    processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": S}, crop_size={"height": S, "width": S})
    pixels = processor(picture(*case["picture"]), return_tensors="pt")["pixel_values"]
    ids, queries = encode(sp, case, image_token, (S // vision["patch_size"]) ** 2)
    image = [i for i, token in enumerate(ids) if token == image_token]
    input_ids, T = torch.tensor([ids]), len(ids)

    logits, states = forward(llava, input_ids, pixels)
    rows = sorted({*range(0, T, 12), *image[::5], *queries, T - 1})
    out = {"pixel_values": pixels[0], "input_ids": input_ids[0].int(), "rows": torch.tensor(rows).int(),
           "logits": logits[rows], "argmax": logits.argmax(-1).int(), "logsumexp": logits.logsumexp(-1)}
    for name, state in states.items():
        out[name] = state[rows] if len(state) == T else state
    entering = ["in", *range(len(llava.model.language_model.layers) - 1)]
    out["hidden_norm"] = torch.stack([states[f"layer.{n}"][image].norm(dim=-1) for n in entering])  # (L, N)
    response, margin = respond(llava, input_ids, pixels, image)
    out |= response | rpn_scores(llava.model.language_model, case, states, queries, image)

    # how far bfloat16 takes the reference itself: a yardstick for another implementation in bfloat16
    off = (half(input_ids=input_ids, pixel_values=pixels.bfloat16()).logits[0].float() - logits).abs()
    norm = half.model.language_model.norm
    out["norm.bfloat16"] = norm((30 * weight("norm input", (4, len(norm.weight)))).bfloat16())
    metadata = dict(prompt=prompt(case["question"], case["history"]), text=sp.decode(out["tokens"].tolist()),
                    bfloat16_mean_error=f"{off.mean():.4f}", smallest_greedy_margin=f"{margin:.4f}",
                    made_with=f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, "
                              f"sentencepiece {sentencepiece.__version__}")
    return {name: t.contiguous().clone() for name, t in out.items()}, metadata


def main():
    if not (HERE / "tokenizer.model").exists():  # kept once made: another version may train another one
        train_tokenizer(HERE / "tokenizer.model")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "tokenizer.model"))
    for name, case in CASES.items():
        tensors, metadata = golden(case, sp)
        save_file(tensors, HERE / f"{name}.safetensors", metadata)
        print(f"{name}: T = {len(tensors['input_ids'])}, tokens {tensors['tokens'].tolist()}, {metadata}")


if __name__ == "__main__":
    main()

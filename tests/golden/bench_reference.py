"""Speed of plain answers: our generate against a reference library's, same random weights, dtype, machine, new tokens.

    python tests/golden/bench_reference.py --random small      # where transformers (5.x) is installed beside the rest
    python tests/golden/bench_reference.py --random llava-1.5-7b --repeat 1
    python tests/golden/bench_reference.py --toy 100           # the toy, loaded by the library: the same answers?

Both sides go from a picture to token ids, by our preprocessing and prompt; the reference runs as it comes (SDPA, its
own cache). The weights are shared, so a 7B takes its 14 GB once. The project and its tests never import transformers.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bounds import SIZES, sync  # noqa: E402 (also puts the project on the path)
from random_llava import QUESTION, random_model  # noqa: E402
from clip import preprocess  # noqa: E402
from data.toy.scenes import ToyQuestions  # noqa: E402
from model import load, torch_dtype  # noqa: E402

TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings", "vocab_size")


def reference(llava, w):
    """The library's model around our weights: nothing is copied. What we lack (the tower's last layer) is zero."""
    config = LlavaConfig(
        text_config=dict(model_type="llama", **{key: llava.config[key] for key in TEXT}),
        vision_config=dict(model_type="clip_vision_model", **w.v),
        image_token_index=llava.config["image_token"], vision_feature_layer=-2,
        vision_feature_select_strategy="default")
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).eval()
    ours = dict(llava.named_parameters())
    taken = {key: ours.pop(llava.canonical(key), None) for key in model.state_dict()}
    assert not ours, f"not in the reference: {list(ours)[:3]}"
    for key, expected in model.state_dict().items():
        if taken[key] is None:
            taken[key] = torch.zeros(expected.shape, dtype=llava.dtype, device=llava.device)
    model.load_state_dict(taken, assign=True)
    model.model.language_model.rotary_emb = LlamaRotaryEmbedding(config.text_config).to(llava.device)
    for module in model.modules():  # the last tensors that are not weights
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(w.N + 1, device=llava.device)[None]
    model.generation_config.eos_token_id = None
    return model


def expand(llava, ids):
    """One image token -> N of them, as the library wants it: (1, T)."""
    token = llava.config["image_token"]
    at, N = ids.index(token), llava.vision_tower.grid ** 2
    return torch.tensor([ids[:at] + [token] * N + ids[at + 1:]], device=llava.device)


def compare_toy(count):
    llava, same = load("toy", "cpu", "float32"), 0
    model = LlavaForConditionalGeneration.from_pretrained(llava.folder, dtype=torch.float32).eval()
    for picture, q in (ToyQuestions("reference", count)[i] for i in range(count)):
        question = q["question"][0]
        input_ids = expand(llava, llava.prompt_ids(question))
        pixels = preprocess(picture, llava.vision_tower.image_size)[None]
        out = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), pixel_values=pixels,
                             do_sample=False, max_new_tokens=16, pad_token_id=0, eos_token_id=2)
        ids = out[0, input_ids.shape[1]:].tolist()
        same += llava.detokenize([i for i in ids if i != 2]) == llava.generate(picture, question, 16)
    print(f"{same} of {count} greedy answers of {llava.folder.name} are the reference library's "
          f"(transformers {transformers.__version__}, float32)")


def main():
    p = argparse.ArgumentParser(description="Plain answers, ours against the reference library's.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--random", choices=SIZES, default="small", help="whose shapes")
    p.add_argument("--toy", type=int, metavar="COUNT", help="compare answers of the toy to so many questions instead")
    p.add_argument("--layers", type=int, help="fewer decoder layers")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", help="default: float16 on a GPU; on a CPU bfloat16, small float32")
    p.add_argument("--new-tokens", type=int, default=10)
    p.add_argument("--repeat", type=int, default=3, help="rounds that count; from 2 on, one more warms up")
    args = p.parse_args()
    if args.toy:
        return compare_toy(args.toy)
    device = torch.device(args.device)
    on_cpu = torch.bfloat16 if "llava" in args.random else torch.float32
    dtype = torch_dtype(args.dtype) or (torch.float16 if device.type == "cuda" else on_cpu)
    llava, _, _, w = random_model(args.random, device, dtype, args.layers)
    llava.lm_head.weight[32000:] = 0.0  # we never choose these ids, the reference may
    model, picture = reference(llava, w), Image.effect_noise((640, 480), 60).convert("RGB")
    input_ids = expand(llava, llava.prompt_ids(QUESTION))

    def theirs():
        pixels = preprocess(picture, llava.vision_tower.image_size)[None].to(device, dtype)
        out = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), pixel_values=pixels,
                             do_sample=False, max_new_tokens=args.new_tokens, pad_token_id=0)
        return out[0, input_ids.shape[1]:].tolist()

    def ours():
        return [int(i) for i in llava.generate(picture, QUESTION, args.new_tokens).split()]  # its tokeniser prints ids

    runs, times, tokens = {"ours": ours, "reference": theirs}, {"ours": [], "reference": []}, {}
    warm = int(args.repeat > 1)
    for _ in range(args.repeat + warm):
        for name, run in runs.items():
            sync(device)
            began = time.perf_counter()
            tokens[name] = run()
            times[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(t[warm:]) for name, t in times.items()}
    same = sum(a == b for a, b in zip(tokens["ours"], tokens["reference"], strict=True))
    print(f"{args.random}, {w.L} layers, {str(dtype)[6:]} on {device}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, transformers {transformers.__version__}, {args.new_tokens} new tokens ({same} of them "
          "the same)")
    ratio = seconds["reference"] / seconds["ours"]
    print(f"ours {seconds['ours']:.3f} s, reference {seconds['reference']:.3f} s: {ratio:.2f} x the reference's "
          "throughput (target 0.95 on a CPU, 2 on a GPU)")


if __name__ == "__main__":
    main()

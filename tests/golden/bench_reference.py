"""A reference library's model around our weights, for `tests/speed/bench.py --only reference`; and the toy in it.

    python tests/golden/bench_reference.py --toy 100           # the toy, loaded by the library: the same answers?

Both sides go from a picture to token ids, by our preprocessing and prompt; the reference runs as it comes (SDPA, its
own cache). The weights are shared, so a 7B takes its 14 GB once. Needs transformers (5.x) beside the rest; the project
and its tests never import it.
"""
import argparse
import sys
from pathlib import Path

import torch
import transformers
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from clip import VisionConfig  # noqa: E402 (the project is on the path only now)
from data.checkpoints import TOY  # noqa: E402
from data.toy.scenes import ToyQuestions  # noqa: E402
from model import load, rename  # noqa: E402

VERSION = f"transformers {transformers.__version__}"

TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings", "vocab_size")


def reference(llava):
    """The library's model around our weights: nothing is copied. What we lack (the tower's last layer) is zero."""
    config = LlavaConfig(
        text_config=dict(model_type="llama", **{key: getattr(llava.config, key) for key in TEXT}),
        vision_config=vars(VisionConfig()) | llava.config.vision | {"model_type": "clip_vision_model"},
        image_token_index=llava.config.image_token, vision_feature_layer=-2,
        vision_feature_select_strategy="default")
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).eval()
    ours = dict(llava.named_parameters())
    taken = {key: ours.pop(rename(key, llava.renames()), None) for key in model.state_dict()}
    assert not ours, f"not in the reference: {list(ours)[:3]}"
    for key, expected in model.state_dict().items():
        if taken[key] is None:
            taken[key] = torch.zeros(expected.shape, dtype=llava.dtype, device=llava.device)
    model.load_state_dict(taken, assign=True)
    model.requires_grad_(False)
    model.model.language_model.rotary_emb = LlamaRotaryEmbedding(config.text_config).to(llava.device)
    for module in model.modules():  # the last tensors that are not weights
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(llava.vision_tower.grid ** 2 + 1, device=llava.device)[None]
    model.generation_config.eos_token_id = None
    return model


def expand(llava, ids):
    """One image token -> N of them, as the library wants it: (1, T)."""
    token = llava.config.image_token
    at, N = ids.index(token), llava.vision_tower.grid ** 2
    return torch.tensor([ids[:at] + [token] * N + ids[at + 1:]], device=llava.device)


@torch.no_grad()
def generate(model, llava, picture, question, new, eos=None):
    """Greedy ids of the library's model, at most `new`."""
    input_ids = expand(llava, llava.prompt_ids(question))
    pixels = llava.pixels(picture)[None].to(llava.device, llava.dtype)
    out = model.generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), pixel_values=pixels,
                         do_sample=False, max_new_tokens=new, pad_token_id=0, eos_token_id=eos)
    return out[0, input_ids.shape[1]:].tolist()


def compare_toy(count):
    llava, same = load(TOY, "cpu", "float32"), 0
    model = LlavaForConditionalGeneration.from_pretrained(llava.folder, dtype=torch.float32).eval()
    for picture, q in (ToyQuestions("reference", count)[i] for i in range(count)):
        question = q["question"][0]
        ids = generate(model, llava, picture, question, 16, eos=2)
        same += llava.detokenize([i for i in ids if i != 2]) == llava.generate(picture, question, 16)
    print(f"{same} of {count} greedy answers of {llava.folder.name} are the reference library's ({VERSION}, float32)")


def main():
    p = argparse.ArgumentParser(description="The toy's answers against the reference library's.")
    p.add_argument("--toy", type=int, metavar="COUNT", default=100, help="so many questions; default: 100")
    compare_toy(p.parse_args().toy)


if __name__ == "__main__":
    main()

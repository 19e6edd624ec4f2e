"""Turns LLaVA-1.5's training file into the question file that train.py reads.

    python data/llava_mix.py llava_v1_5_mix665k.json --images IMAGES     # -> data/llava_mix.jsonl
    python train.py --ckpt llava-1.5-7b

As the paper's code does, it takes the first question of each GQA and OCR-VQA record, about 152,000
in all. The file comes from huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K and is read whole
(1 GB on disk, several in memory). IMAGES holds gqa/images/
(downloads.cs.stanford.edu/nlp/data/gqa/images.zip) and ocr_vqa/images/ (LLaVA's README links its
downloader). OCR-VQA pictures that were saved as .gif or .png must be saved again as .jpg. Public
copies of 1437717772.jpg and 51WYdiyqywL.jpg are broken; train.py skips such pictures.

Left out: downloading, the other sources of the mix, and opening the pictures.
"""
import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only data/ is on the path
from clip import BadInput, reading  # noqa: E402
from data.program import run_program  # noqa: E402
from data.questions import LeftOut, convert  # noqa: E402

EXPECTED = {"gqa": 72140, "ocr_vqa": 80000}


def turns(conversations):
    """(questions, answers) without the placeholder of the image; "Be brief." stays.

    >>> turns([{"from": "human", "value": "<image>\\nWho?\\nBe brief."},
    ...        {"from": "gpt", "value": "Ann"}])
    (['Who?\\nBe brief.'], ['Ann'])
    """
    speakers = [turn["from"] for turn in conversations]
    if speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError("human and gpt do not take turns")
    said = [re.sub("<image>\n|\n<image>|<image>", "", turn["value"]) for turn in conversations]
    return said[::2], said[1::2]


def question_of(index, record, root, all_turns):
    """The question of a GQA or OCR-VQA record with a picture below root; LeftOut for the others."""
    image = record.get("image") or ""  # inside the data set; root itself may be called "gqa"
    kinds = [kind for kind in EXPECTED if kind in image and "coco" not in image]
    if not kinds:
        raise LeftOut("of other sources", f"record {index}")
    if not (root / image).is_file():
        raise LeftOut("without a picture", image)
    questions, answers = turns(record["conversations"])
    last = len(questions) - 1 if all_turns else 0
    return {"id": str(index), "kind": kinds[0], "image": image,
            "question": questions[:last + 1], "answers": [answers[last]]}


def run(args):
    out = args.out.resolve()
    if out == args.file.resolve():
        raise BadInput(f"{out}: would be overwritten by its own result; give --out another name")
    root = args.images.resolve()
    with reading(args.file, "--help says where to get llava_v1_5_mix665k.json"):
        records = list(json.loads(args.file.read_text(encoding="utf-8-sig")))

    def make(index, record):
        return question_of(index, record, root, args.all_turns)

    kept = convert(records, make, out, root)
    counts = Counter(question["kind"] for question in kept)
    for kind, expected in EXPECTED.items():
        print(f"{kind:8} {counts[kind]:7,} kept of about {expected:,}")
    print(f"next: python train.py --ckpt llava-1.5-7b --data {args.out}")


def parser():
    p = argparse.ArgumentParser("llava_mix.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path, metavar="FILE", help="llava_v1_5_mix665k.json")
    p.add_argument("--images", type=Path, required=True, metavar="DIR",
                   help="the folder of gqa/ and ocr_vqa/")
    p.add_argument("--all-turns", action="store_true",
                   help="whole conversations, not the first question only")
    p.add_argument("--out", type=Path, metavar="FILE", default=ROOT / "data" / "llava_mix.jsonl",
                   help="default: llava_mix.jsonl beside this script")
    return p


def main(argv=None):
    run_program(parser(), run, argv)


if __name__ == "__main__":
    main()

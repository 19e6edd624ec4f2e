"""Turns LLaVA-1.5's training file into the question file that train.py reads.

    python data/llava_mix.py llava_v1_5_mix665k.json --images IMAGES     # -> data/llava_mix.jsonl
    python train.py --ckpt llava-1.5-7b

As the paper's code does, it takes the first question of each GQA and OCR-VQA record, about 152,000
in all. The file comes from huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K and is read whole
(1 GB on disk, several in memory). IMAGES holds gqa/images/
(downloads.cs.stanford.edu/nlp/data/gqa/images.zip) and ocr_vqa/images/ (LLaVA's README links its
downloader). OCR-VQA pictures that were saved as .gif or .png must be saved again as .jpg. Public
copies of two of them (BAD below) are broken.

Left out: downloading, the other sources of the mix, and opening the pictures. All but those two are
only looked for.
"""
import argparse
import json
import os
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only data/ is on the path
from clip import BadInput, load_image, printable, reading  # noqa: E402
from data.program import log, run_program  # noqa: E402
from data.questions import check_question, describe, write_questions  # noqa: E402

EXPECTED = {"gqa": 72140, "ocr_vqa": 80000}
BAD = ("1437717772.jpg", "51WYdiyqywL.jpg")


def source(image):
    """Which part of the mix a picture is from, by its path inside the data set. A folder of the
    user's that is called "gqa" must not matter.

    >>> source("gqa/images/1.jpg"), source("ocr_vqa/images/1.jpg"), source("coco/train2017/gqa.jpg")
    ('gqa', 'ocr_vqa', None)
    """
    kinds = [kind for kind in EXPECTED if re.search(kind, image) and "coco" not in image]
    return kinds[0] if kinds else None


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


def usable(path):
    """True if the picture is there; one of the two known bad files must decode as well."""
    try:
        return path.stat().st_size > 0 and (path.name not in BAD or bool(load_image(path)))
    except (OSError, ValueError, BadInput):  # ValueError: a NUL in the name
        return False


def convert(records, root, all_turns):
    """-> questions of GQA and OCR-VQA with pictures below root; {reason: [what was left out]}."""
    kept, left_out = [], {}
    for index, record in enumerate(records):  # the paper's files name a record by this number
        try:
            image = record.get("image") or ""
            kind = source(image)
            if kind is None:
                reason = "of other sources" if image else "text only"
                left_out.setdefault(reason, []).append(f"record {index}")
                continue
            questions, answers = turns(record["conversations"])
            last = len(questions) - 1 if all_turns else 0
            question = {"id": str(index), "kind": kind, "image": image,
                        "question": questions[:last + 1] if all_turns else questions[0],
                        "answers": [answers[last]]}  # an empty one may stay: the model answers
            check_question(question)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            problem = f"record {index}: {type(error).__name__}: {error}"
            left_out.setdefault("malformed", []).append(problem)
            continue
        if usable(root / image):
            kept.append(question)
        else:
            left_out.setdefault("without a usable picture", []).append(image)
    return kept, left_out


def run(args):
    out = (args.out or ROOT / "data" / "llava_mix.jsonl").resolve()
    if out == args.file.resolve():
        raise BadInput(f"{out}: would be overwritten by its own result; give --out another name")
    root = args.images.resolve()
    with reading(args.file, "--help says where to get llava_v1_5_mix665k.json"):
        text = args.file.read_text(encoding="utf-8-sig")  # -sig drops a byte-order mark
        records = list(json.loads(text))
    kept, left_out = convert(records, root, args.all_turns)
    if not kept:
        raise BadInput(f"{args.file}: no question can be used: {describe(left_out)}; pictures "
                       f"were looked for in {root} (--images)")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_questions(out, root, kept)
    counts = Counter(question["kind"] for question in kept)
    for kind, expected in EXPECTED.items():
        print(f"{kind:8} {counts[kind]:7,} kept of about {expected:,}")
    log(f"left out: {describe(left_out)}; pictures were looked for in {root}")
    name = printable(os.path.relpath(out))
    print(f"wrote {len(kept):,} questions to {name}")
    print(f"next: python train.py --ckpt llava-1.5-7b --data {shlex.quote(name)}")


def parser():
    p = argparse.ArgumentParser("llava_mix.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=Path, metavar="FILE", help="llava_v1_5_mix665k.json")
    p.add_argument("--images", type=Path, required=True, metavar="DIR",
                   help="the folder of gqa/ and ocr_vqa/")
    p.add_argument("--all-turns", action="store_true",
                   help="whole conversations, not the first question only")
    p.add_argument("--out", type=Path, metavar="FILE",
                   help="default: llava_mix.jsonl beside this script")
    return p


def main(argv=None):
    run_program(parser(), run, argv)


if __name__ == "__main__":
    main()

"""Turns LLaVA-1.5's training file into the question file train.py reads: its GQA and OCR-VQA part, about 152,000.

    python data/llava_mix.py llava_v1_5_mix665k.json --images IMAGES     # -> data/llava_mix.jsonl
    python train.py --ckpt llava-1.5-7b

The file comes from huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K; it is read whole (1 GB on disk, several
in memory). IMAGES holds gqa/images/ (downloads.cs.stanford.edu/nlp/data/gqa/images.zip) and ocr_vqa/images/
(LLaVA's README links its downloader), every picture of the latter saved as .jpg.

Of each record the first question is taken, as the paper's code does. The dataset's own answer goes along
for `train.py --answers given`; the method itself has the model answer. Left out: downloading, the other
sources of the mix, and opening the pictures (all but the known bad ones are only looked for).
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

EXPECTED = {"gqa": 72140, "ocr_vqa": 80000}
BAD = ("1437717772.jpg", "51WYdiyqywL.jpg")   # broken in public copies of OCR-VQA; some copies hold repaired ones


def source(image):
    """Which part of the mix a picture is from, by its path inside the data set only: a folder of one's own that is
    called "gqa" must not matter.

    >>> source("gqa/images/1.jpg"), source("ocr_vqa/images/1.jpg"), source("coco/train2017/gqa.jpg")
    ('gqa', 'ocr_vqa', None)
    """
    return next((kind for kind in EXPECTED if kind in image and "coco" not in image), None)


def turns(conversations):
    """[(question, answer), ...] without the image's placeholder; the request for a short answer stays.

    >>> turns([{"from": "human", "value": "<image>\\nWho?\\nBe brief."}, {"from": "gpt", "value": "Ann"}])
    [('Who?\\nBe brief.', 'Ann')]
    """
    if not conversations or [turn["from"] for turn in conversations] != ["human", "gpt"] * (len(conversations) // 2):
        raise ValueError("human and gpt do not take turns")
    said = [re.sub("<image>\n|\n<image>|<image>", "", turn["value"]) for turn in conversations]
    if not said[0].strip():   # an empty answer may stay: the method has the model answer
        raise ValueError("the first question is empty")
    return list(zip(said[::2], said[1::2]))


def usable(path):
    """True if the picture is there; one of the two known bad files must decode as well."""
    if path.name in BAD:
        try:
            with Image.open(path) as image:
                image.load()
        except Exception:   # Pillow has many ways to say that a file is broken
            return False
    return path.is_file() and path.stat().st_size > 0


def fail(message):
    print("llava_mix.py:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="llava_v1_5_mix665k.json")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="the folder of gqa/ and ocr_vqa/")
    parser.add_argument("--all-turns", action="store_true", help="whole conversations, not the first question only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: llava_mix.jsonl beside this script")
    parser.error = lambda message: fail(f"{message}; see --help")   # one line instead of the usage text
    args = parser.parse_args(argv)

    root, out = args.images.resolve(), (args.out or Path(__file__).parent / "llava_mix.jsonl").resolve()
    if not root.is_dir():
        fail(f"--images {root}: no such folder; give the one that holds gqa/images and ocr_vqa/images")
    if out == args.file.resolve():
        fail(f"{out}: would be overwritten by its own result; give --out another name")
    try:
        records = json.loads(args.file.read_text(encoding="utf-8-sig"))   # -sig: drops a byte-order mark
    except OSError as error:
        fail(f"{args.file}: {error.strerror or error}; --help says where to get llava_v1_5_mix665k.json")
    except (ValueError, RecursionError) as error:
        fail(f"{args.file}: is not JSON ({error}); a download cut short? Compare its size, get it again")
    if not isinstance(records, list):
        fail(f"{args.file}: holds no list of conversations; --help says where to get llava_v1_5_mix665k.json")

    kept, left_out, missing, malformed = [], Counter(), {kind: [] for kind in EXPECTED}, []
    for index, record in enumerate(records):   # index: the number by which the paper's label files name a record
        try:
            image = record.get("image")
            if image and not isinstance(image, str):
                raise TypeError("image is not a path")
            kind = source(image) if image else None
            if kind is None:
                left_out["other sources" if image else "text only"] += 1
                continue
            questions, answers = zip(*turns(record["conversations"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            malformed.append(f"record {index} ({type(error).__name__}: {error})")
            continue
        if not usable(root / image):
            missing[kind].append(image)
            continue
        kept.append({"id": str(index), "kind": kind, "image": image,
                     "question": list(questions) if args.all_turns else questions[0],
                     "answers": list(answers) if args.all_turns else [answers[0]]})

    counts = Counter(question["kind"] for question in kept)
    lost = [image for images in missing.values() for image in images]
    if not kept:
        fail(f"{root}: none of the {len(lost)} pictures is here, the first is {lost[0]}; name its folder with --images"
             if lost else f"{args.file}: no GQA or OCR-VQA record among {len(records)}; is it llava_v1_5_mix665k.json?")
    part = out.with_name(out.name + ".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="ascii", newline="\n") as lines:
            lines.writelines(json.dumps(line) + "\n" for line in [{"images": str(root)}, *kept])
        os.replace(part, out)
    except OSError as error:
        fail(f"{out}: {error.strerror or error}; give --out a place that can be written")
    finally:
        part.unlink(missing_ok=True)

    for kind, expected in EXPECTED.items():
        print(f"{kind:8} {counts[kind]:7,} kept of about {expected:,}, {len(missing[kind]):,} without a usable picture")
    print("left out " + ", ".join(f"{left_out[why]:,} {why}" for why in ("other sources", "text only"))
          + f", {len(malformed):,} malformed")
    if lost:
        print(f"warning: pictures missing or empty: {', '.join(lost[:3])}{' ...' * (len(lost) > 3)}; looked in {root}. "
              "OCR-VQA pictures that were saved as .gif or .png must be saved again as .jpg", file=sys.stderr)
    if bad := [image for image in lost if image.endswith(BAD)]:
        print(f"note: {', '.join(bad)}: known to be broken in public copies; nothing to repair", file=sys.stderr)
    if malformed:
        print(f"warning: malformed: {', '.join(malformed[:3])}{' ...' * (len(malformed) > 3)}", file=sys.stderr)
    print(f"wrote {len(kept):,} questions to {os.path.relpath(out)}; next: python train.py --ckpt llava-1.5-7b"
          + f" --data {os.path.relpath(out)}" * bool(args.out))   # without --data, train.py reads the default


if __name__ == "__main__":
    main()

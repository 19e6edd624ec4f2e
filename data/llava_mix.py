"""Turns LLaVA-1.5's training file into the question file that train.py reads.

    python data/llava_mix.py llava_v1_5_mix665k.json --images IMAGES     # -> data/llava_mix.jsonl
    python train.py --ckpt llava-1.5-7b

It takes the GQA and OCR-VQA part, about 152,000 questions, of each record the first one, as the
paper's code does. The file comes from huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K; it is
read whole (1 GB on disk, several in memory). IMAGES holds gqa/images/
(downloads.cs.stanford.edu/nlp/data/gqa/images.zip) and ocr_vqa/images/ (LLaVA's README links its
downloader), every picture of the latter saved as .jpg.

Left out: downloading, the other sources of the mix, and opening the pictures: all but the two known
bad ones are only looked for.
"""
import argparse
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only data/ is on the path
from clip import BadInput, printable  # noqa: E402
from data.program import first_few, run_program, say  # noqa: E402
from data.questions import write_questions  # noqa: E402

EXPECTED = {"gqa": 72140, "ocr_vqa": 80000}
BAD = ("1437717772.jpg", "51WYdiyqywL.jpg")  # broken in public copies, but for repaired ones


def source(image):
    """Which part of the mix a picture is from, by its path inside the data set only: a folder of
    one's own that is called "gqa" must not matter.

    >>> source("gqa/images/1.jpg"), source("ocr_vqa/images/1.jpg"), source("coco/train2017/gqa.jpg")
    ('gqa', 'ocr_vqa', None)
    """
    return next((kind for kind in EXPECTED if kind in image and "coco" not in image), None)


def turns(conversations):
    """[(question, answer), ...] without the placeholder of the image; "Be brief." stays.

    >>> turns([{"from": "human", "value": "<image>\\nWho?\\nBe brief."},
    ...        {"from": "gpt", "value": "Ann"}])
    [('Who?\\nBe brief.', 'Ann')]
    """
    speakers = [turn["from"] for turn in conversations]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError("human and gpt do not take turns")
    said = [re.sub("<image>\n|\n<image>|<image>", "", turn["value"]) for turn in conversations]
    if not said[0].strip():  # an empty answer may stay: the method has the model answer
        raise ValueError("the first question is empty")
    return list(zip(said[::2], said[1::2]))


def usable(path):
    """True if the picture is there; one of the two known bad files must decode as well."""
    if path.name in BAD:
        try:
            with Image.open(path) as picture:
                picture.load()
        except Exception:  # Pillow has many ways to say that a file is broken
            return False
    return path.is_file() and path.stat().st_size > 0


@dataclass
class Sorted:
    """The records of the mix, by what became of them."""
    kept: list = field(default_factory=list)        # questions
    left_out: Counter = field(default_factory=Counter)  # of other sources, without a picture
    missing: list = field(default_factory=list)     # pictures
    malformed: list = field(default_factory=list)   # what is wrong, in words


def sort(records, root, all_turns):
    """Keep what is of GQA and OCR-VQA and has its picture below root."""
    found = Sorted()
    for index, record in enumerate(records):  # the number by which the paper's files name a record
        try:
            image = record.get("image")
            if image and not isinstance(image, str):
                raise TypeError("image is not a path")
            kind = source(image) if image else None
            if kind is None:
                found.left_out["other sources" if image else "text only"] += 1
                continue
            questions, answers = zip(*turns(record["conversations"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            found.malformed.append(f"record {index} ({type(error).__name__}: {error})")
            continue
        if not usable(root / image):
            found.missing.append(image)
            continue
        count = len(questions) if all_turns else 1
        found.kept.append({
            "id": str(index), "kind": kind, "image": image, "answers": list(answers[:count]),
            "question": list(questions) if all_turns else questions[0]})
    return found


def read_records(file):
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))  # -sig: drops a byte-order mark
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror or error}; "
                       "--help says where to get llava_v1_5_mix665k.json") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file}: is not JSON ({error}); a download cut short? "
                       "Compare its size, get it again") from None
    if not isinstance(records, list):
        raise BadInput(f"{file}: holds no list of conversations; "
                       "--help says where to get llava_v1_5_mix665k.json")
    return records


def report(found, root):
    counts = Counter(question["kind"] for question in found.kept)
    missing = Counter(map(source, found.missing))
    for kind, expected in EXPECTED.items():
        print(f"{kind:8} {counts[kind]:7,} kept of about {expected:,}, "
              f"{missing[kind]:,} without a usable picture")
    print(f"left out {found.left_out['other sources']:,} other sources, "
          f"{found.left_out['text only']:,} text only, {len(found.malformed):,} malformed")
    if found.missing:
        say(f"warning: pictures missing or empty: {first_few(found.missing)}; looked in {root}. "
            "OCR-VQA pictures that were saved as .gif or .png must be saved again as .jpg")
    bad = [image for image in found.missing if image.endswith(BAD)]
    if bad:
        say(f"note: {', '.join(bad)}: known to be broken in public copies; nothing to repair")
    if found.malformed:
        say(f"warning: malformed: {first_few(found.malformed)}")


def run(args):
    root = args.images.resolve()
    out = (args.out or ROOT / "data" / "llava_mix.jsonl").resolve()
    if not root.is_dir():
        raise BadInput(f"--images {root}: no such folder; "
                       "give the one that holds gqa/images and ocr_vqa/images")
    if out == args.file.resolve():
        raise BadInput(f"{out}: would be overwritten by its own result; give --out another name")
    records = read_records(args.file)
    found = sort(records, root, args.all_turns)
    if found.missing and not found.kept:
        raise BadInput(f"{root}: none of the {len(found.missing)} pictures is here, the first is "
                       f"{found.missing[0]}; name its folder with --images")
    if not found.kept:
        raise BadInput(f"{args.file}: no GQA or OCR-VQA record among {len(records)}; "
                       "is it llava_v1_5_mix665k.json?")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_questions(out, root, found.kept)
    report(found, root)
    name = printable(os.path.relpath(out))
    flags = f" --data {name}" if args.out else ""  # without --data, train.py reads the default
    print(f"wrote {len(found.kept):,} questions to {name}; "
          f"next: python train.py --ckpt llava-1.5-7b{flags}")


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
    run_program(parser(), run, argv, disk="give --out a place that can be written")


if __name__ == "__main__":
    main()

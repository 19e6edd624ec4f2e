"""
An image and a question -> an answer and a picture of where the model looked.

    python infer.py img.jpg "What number is on the star?"       # the answer on stdout, out/img.roi.png, the rest on stderr
    python infer.py img.jpg                                     # questions one by one, a conversation about one image
    python infer.py --eval questions.jsonl                      # scores plain and two-stage side by side; goes on if stopped

Without --ckpt and --rpn: what was trained last (out/last), else the toy with its bundled RPN.
Left out: batches (each question is answered as in a conversation), sampling, video.
"""
import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import torch

from clip import load_image
from data import draw, metrics
from data.files import BadInput, read_rows
from data.questions import read_questions
from model import ROOT, LLaVA, find_checkpoint, read_json, run_name
from sdrpn import RPN, answer, load_recipe


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def choose(args):
    """-> LLaVA, RPN (None in plain mode). What was chosen is said; nothing falls back in silence."""
    ckpt, path, last = args.ckpt, args.rpn, ROOT / "out" / "last"
    if not ckpt and not path and last.is_file():
        run = ROOT / "out" / last.read_text().strip()
        if not (run / "rpn.safetensors").is_file():
            raise BadInput(f"{last}: names {run.name}, whose rpn.safetensors is gone; train again, name --ckpt, or delete {last}")
        ckpt, path = str(read_json(run / "config.json").get("ckpt")), run / "rpn.safetensors"
    folder = find_checkpoint(ckpt or "toy")
    read_json(folder / "config.json")  # a folder that is no checkpoint is not told to train an RPN
    if not path and args.mode != "plain":
        places = ROOT / "out" / run_name(ckpt or "toy") / "rpn.safetensors", folder / "rpn.safetensors"
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            raise BadInput(f"{folder}: no RPN is trained for it yet; train one with: python train.py --ckpt {ckpt}, name one with --rpn, "
                           "or use --mode plain")
    llava = LLaVA.load(folder, args.device, args.dtype)
    rpn = RPN.load(path, llava) if args.mode != "plain" else None
    if rpn and rpn.loss != "bce":
        raise BadInput(f"{rpn.path}: trained with --loss {rpn.loss}, so its map is no probability; only tests/tables.py reads it")
    say(f"checkpoint {folder}, RPN {rpn.path if rpn else 'none'}, {llava.device} ({'--device' if args.device else 'default'}), "
        f"{str(llava.dtype)[6:]} ({'--dtype' if args.dtype else 'default for this size and device'})")
    return llava, rpn


def compile_decode(llava, args):
    """For caches of the usual length: the picture, 64 more tokens of prompt, the answer; with and without crops."""
    N = llava.num_image_tokens
    plain = N + 64 + (args.max_new_tokens or 128)
    try:
        seconds = llava.compile_decode(plain, plain + {"plain": 0, "mask": 1, "box": 2}[args.mode] * N)
    except torch._dynamo.exc.BackendCompilerFailed as e:
        raise BadInput(f"--compile: {str(e).splitlines()[0]}; leave it out, or install a C++ compiler (and Triton on CUDA)") from None
    say(f"compiled the decoding step in {seconds:.0f} s")


def check_question(text):
    if not text.strip():
        raise BadInput("the question is empty; ask something")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInput("the question holds bytes that are not UTF-8; type it again") from None
    return text


def one(llava, rpn, image, question, args, tau, history, save):
    """Answer, and draw the picture with the plain answer beside it. Returns the result."""
    limit = args.max_new_tokens or 128
    result = answer(llava, rpn, image, check_question(question), args.mode, tau, limit, history)
    answers = {"two-stage": result.text} if args.mode != "plain" else {}
    plain = result.text if not result.boxes else llava.generate(image, question, limit, history)
    heat = result.logits.sigmoid().numpy() if result.logits is not None else None
    draw.save(draw.answer_picture(image, heat, result.boxes, [image.crop(b) for b in result.boxes], question,
                                  {"plain": plain} | answers), save)
    say(f"picture {save}")
    return result


def as_json(result, args, tau, llava, rpn):
    return json.dumps({"answer": result.text, "boxes": [list(b) for b in result.boxes], "tau": tau, "mode": args.mode,
                       "ckpt": str(llava.folder), "rpn": str(rpn.path) if rpn else None, "ms": result.ms})


def converse(llava, rpn, image, args, tau, save):
    """Questions from stdin, one a line, about one image; an empty line or the end stops."""
    history = []
    say("ask about the picture; an empty line ends")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        result = one(llava, rpn, image, line.strip(), args, tau, history, save)
        print(as_json(result, args, tau, llava, rpn) if args.json else result.text, flush=True)
        history.append((line.strip(), result.text))


# ------------------------------------------------------------------------------------------ evaluation

def ask_turns(llava, rpn, image, turns, mode, tau, limit):
    """All turns of a question, each after the model's own answers to those before -> the last result, seconds in all."""
    history, began = [], time.perf_counter()
    for turn in turns:
        result = answer(llava, rpn, image, turn, mode, tau, limit, history)
        history.append((turn, result.text))
    return result, time.perf_counter() - began


def evaluate(llava, rpn, args, recipe):
    """Plain and two-stage on a file of questions; returns the summary that is printed last."""
    questions, root = read_questions(args.eval, args.images)
    questions = questions[:args.limit]
    lacking = next((i for i, q in enumerate(questions) if not q.get("answers")), None)
    if lacking is not None:
        raise BadInput(f"{args.eval}: question {lacking + 1} has no 'answers', so it can not be scored")
    setting = [hashlib.sha256(Path(args.eval).read_bytes()).hexdigest(), str(args.images), llava.fingerprint, str(llava.dtype), args.mode,
               args.tau, args.max_new_tokens, recipe["tau"], hashlib.sha256(rpn.path.read_bytes()).hexdigest() if rpn and rpn.path.is_file()
               else str(rpn and rpn.path)]
    path = ROOT / "out" / "eval" / (hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:16] + ".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path)
    if rows:
        say(f"going on: {sum(i in rows for i in range(len(questions)))} of {len(questions)} questions are scored in {path}")
    began, todo = time.time(), [i for i in range(len(questions)) if i not in rows]
    with open(path, "a", encoding="utf-8") as file:
        for done, i in enumerate(todo, 1):
            q = questions[i]
            limit, tau = args.max_new_tokens or q.get("max_new_tokens", 128), args.tau or q.get("tau", recipe["tau"])
            row = {"n": i, "id": q.get("id"), "kind": q.get("kind", "all"), "cycle": q.get("cycle"), "answers": q["answers"]}
            try:
                image = load_image(root / q["image"])
                for name, mode in (("plain", "plain"), ("two_stage", args.mode))[:1 if args.mode == "plain" else 2]:
                    result, seconds = ask_turns(llava, rpn, image, q["question"], mode, tau, limit)
                    row[name] = {"answer": result.text, "score": metrics.score(q, result.text), "seconds": round(seconds, 4),
                                 "boxes": [list(b) for b in result.boxes], "visual_tokens": result.visual_tokens}
                    if q.get("boxes") and mode != "plain":
                        row[name]["covers"], row[name]["iou"] = metrics.overlap(result.boxes, q["boxes"], image.size)
            except (BadInput, FloatingPointError) as e:
                raise BadInput(f"{args.eval}: question {i + 1}: {e}") from None
            rows[i] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            if done % max(1, len(todo) // 50) == 0 or done == len(todo):
                say(f"question {done}/{len(todo)} | ETA {(time.time() - began) / done * (len(todo) - done):.0f} s")
    try:
        return metrics.side_by_side([rows[i] for i in range(len(questions))], questions, say)
    except (KeyError, TypeError, AttributeError):
        if len(todo) == len(questions):
            raise
        raise BadInput(f"{path}: what an earlier run scored is damaged; delete the file") from None


def parser():
    p = argparse.ArgumentParser(description="Answer questions about an image, looking twice.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("image", nargs="?", help="JPEG, PNG, WEBP, BMP, GIF or TIFF")
    p.add_argument("question", nargs="?", help="leave it out to ask one question after the other")
    p.add_argument("--eval", metavar="FILE", help="score a file of questions instead")
    p.add_argument("--images", help="with --eval: folder that its image paths are relative to")
    p.add_argument("--limit", type=int, help="with --eval: only the first questions")
    p.add_argument("--ckpt", help="checkpoint folder, or toy, llava-1.5-7b, llava-1.5-13b; default: what was trained last, else the toy")
    p.add_argument("--rpn", help="rpn.safetensors, or a folder as the authors released it")
    p.add_argument("--mode", choices=("mask", "box", "plain"), default="mask", help="Masked or Box Upscaling, or the picture as it is")
    p.add_argument("--tau", type=float, help="threshold on the RoI map; lower it if regions are missed; default: the recipe's")
    p.add_argument("--max-new-tokens", type=int, help="longest answer; default 128, or the question file's")
    p.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    p.add_argument("--dtype", help="float16, bfloat16, float32, float64; default: the file's on a GPU; on a CPU float32 below 1 GB, else bfloat16")
    p.add_argument("--compile", action="store_true", help="compile the decode step; pays off for long answers or --eval")
    p.add_argument("--save", help="where the picture goes; default out/<image>.roi.png")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the bare answer")
    return p


def main(argv=None):
    p = parser()
    p.error = lambda message: fail(f"{message}; see python infer.py --help")
    args = p.parse_args(argv)
    try:
        if bool(args.image) == bool(args.eval):
            raise BadInput("name an image (and a question), or --eval FILE; see python infer.py --help")
        if args.tau is not None and not 0 < args.tau < 1:
            raise BadInput(f"--tau {args.tau}: must lie between 0 and 1")
        if args.max_new_tokens is not None and args.max_new_tokens < 1 or args.limit is not None and args.limit < 1:
            raise BadInput("--max-new-tokens and --limit must be at least 1")
        image = load_image(args.image) if args.image else None  # before the weights: a wrong path costs no minute
        check_question(args.question) if args.question is not None else None
        llava, rpn = choose(args)
        recipe = load_recipe(llava)
        if args.compile:
            compile_decode(llava, args)
        if args.eval:
            print(json.dumps(evaluate(llava, rpn, args, recipe)))
            return
        tau = args.tau or recipe["tau"]
        save = Path(args.save) if args.save else ROOT / "out" / f"{Path(args.image).stem}.roi.png"
        if args.question is None:
            return converse(llava, rpn, image, args, tau, save)
        result = one(llava, rpn, image, args.question, args, tau, (), save)
        say("crops " + (", ".join(map(str, result.boxes)) or "none") + " | " + ", ".join(f"{k} {v:.0f} ms" for k, v in result.ms.items()))
        print(as_json(result, args, tau, llava, rpn) if args.json else result.text)
    except (BadInput, FloatingPointError) as e:
        fail(e)
    except (torch.OutOfMemoryError, MemoryError):
        fail("out of memory; use --dtype float16, lower --max-new-tokens, or --device cpu")
    except OSError as e:
        fail(f"{e.filename or 'output'}: {e.strerror or e}; check the path, the rights and the free space")
    except UnicodeError as e:
        fail(f"stdin or stdout can not hold this text ({e}); set PYTHONIOENCODING=utf-8")
    except KeyboardInterrupt:
        fail("stopped; with --eval the same command goes on", 130)


def fail(message, code=2):
    print("infer.py:", *str(message).split(), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

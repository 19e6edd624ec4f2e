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

import numpy as np
import torch

from clip import BadInput, load_image
from data import draw, metrics
from data.questions import BadQuestions, read_questions
from model import ROOT, LLaVA, find_checkpoint, read_json, run_name
from sdrpn import RPN, answer, load_recipe


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def choose(args):
    """-> LLaVA, RPN (None in plain mode), the RPN's path. What was chosen is said; nothing falls back in silence."""
    ckpt, path, last = args.ckpt, args.rpn, ROOT / "out" / "last"
    if not ckpt and not path and last.is_file():
        run = ROOT / "out" / last.read_text().strip()
        if not (run / "rpn.safetensors").is_file():
            raise BadInput(f"{last}: names {run.name}, whose rpn.safetensors is gone; train again, name --ckpt, or delete {last}")
        ckpt, path = read_json(run / "config.json")["ckpt"], run / "rpn.safetensors"
    folder = find_checkpoint(ckpt or "toy")
    if not path and args.mode != "plain":
        places = ROOT / "out" / run_name(ckpt or "toy") / "rpn.safetensors", folder / "rpn.safetensors"
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            raise BadInput(f"{folder}: no RPN is trained for it yet; train one with: python train.py --ckpt {ckpt}, name one with --rpn, "
                           "or use --mode plain")
    llava = LLaVA.load(folder, args.device, args.dtype)
    rpn = RPN.load(path, llava) if args.mode != "plain" else None
    say(f"checkpoint {folder}, RPN {rpn.path if rpn else 'none'}, {llava.device} ({'--device' if args.device else 'default'}), "
        f"{str(llava.dtype)[6:]} ({'--dtype' if args.dtype else 'default for this size and device'})")
    return llava, rpn


def check_question(text):
    if not text.strip():
        raise BadInput("the question is empty; ask something")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInput("the question holds bytes that are not UTF-8; type it again") from None
    return text


def one(llava, rpn, image, question, args, tau, history=(), save=None):
    """Answer, and draw the picture with the plain answer beside it. Returns the result."""
    limit = args.max_new_tokens or 128
    result = answer(llava, rpn, image, check_question(question), args.mode, tau, limit, history)
    if save:
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
        say("> ") if sys.stdin.isatty() else None
        line = sys.stdin.readline()
        if not line.strip():
            return
        result = one(llava, rpn, image, line.strip(), args, tau, history, save)
        print(as_json(result, args, tau, llava, rpn) if args.json else result.text, flush=True)
        history.append((line.strip(), result.text))


# ------------------------------------------------------------------------------------------ evaluation

def overlap(crops, boxes, size):
    """Do the crops cover at least half of every true box (source pixels), and IoU of crops and boxes, on a 256 x 256 raster."""
    def raster(rectangles):
        canvas = np.zeros((256, 256), bool)
        for x0, y0, x1, y1 in rectangles:
            x0, x1, y0, y1 = (round(256 * v / s) for v, s in ((x0, size[0]), (x1, size[0]), (y0, size[1]), (y1, size[1])))
            canvas[y0:max(y1, y0 + 1), x0:max(x1, x0 + 1)] = True
        return canvas
    seen, wanted = raster(crops), raster(boxes)
    covered = all((raster([b]) & seen).sum() >= 0.5 * raster([b]).sum() for b in boxes)
    return bool(covered), float((seen & wanted).sum() / max((seen | wanted).sum(), 1))


def ask_turns(llava, rpn, image, turns, mode, tau, limit):
    """All turns of a question, each after the model's own answers to those before -> the last result, seconds in all."""
    history, began = [], time.perf_counter()
    for turn in turns:
        result = answer(llava, rpn, image, check_question(turn), mode, tau, limit, history)
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
            image = load_image(root / q["image"])
            limit, tau = args.max_new_tokens or q.get("max_new_tokens", 128), args.tau or q.get("tau", recipe["tau"])
            row = {"n": i, "id": q.get("id"), "kind": q.get("kind", "all"), "cycle": q.get("cycle"), "answers": q["answers"]}
            for name, mode in (("plain", "plain"), ("two_stage", args.mode))[:1 if args.mode == "plain" else 2]:
                result, seconds = ask_turns(llava, rpn, image, q["question"], mode, tau, limit)
                row[name] = {"answer": result.text, "score": metrics.score(q, result.text), "seconds": round(seconds, 4),
                             "boxes": [list(b) for b in result.boxes], "visual_tokens": result.visual_tokens}
                if q.get("boxes") and mode != "plain":
                    row[name]["covers"], row[name]["iou"] = overlap(result.boxes, q["boxes"], image.size)
            rows[i] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            if done % max(1, len(todo) // 50) == 0 or done == len(todo):
                say(f"question {done}/{len(todo)} | ETA {(time.time() - began) / done * (len(todo) - done):.0f} s")
    return summarise([rows[i] for i in range(len(questions))], questions)


def read_rows(path):
    """Finished questions of an earlier run; a line that a crash cut off is dropped from the file."""
    rows = {}
    if path.is_file():
        lines = path.read_text(encoding="utf-8").split("\n")
        for line in lines[:-1]:  # a whole line ends in a newline
            row = json.loads(line)
            rows[row["n"]] = row
        if lines[-1]:
            partial = path.with_suffix(".partial")
            partial.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
            partial.replace(path)
    return rows


def summarise(rows, questions):
    """Print the table per kind on stderr; return the last line's dict, scores in percent."""
    mean = lambda values: sum(values) / max(len(values), 1)
    names = [n for n in ("plain", "two_stage") if n in rows[0]]
    metric = questions[0].get("metric", "exact")
    whole = {n: metrics.summarise(metric, [r | r[n] | {"prediction": r[n]["answer"]} for r in rows]) for n in names}
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    say(f"{'kind':24}{'n':>6}{'plain':>8}" + (f"{'two-st.':>8}{'change':>8}{'lost':>6}{'won':>6}{'RoI %':>7}{'s plain':>9}{'s two':>8}"
        f"{'tokens':>8}{'recall':>8}{'IoU':>7}" if len(names) > 1 else f"{'s':>9}"))
    for kind in [*kinds, "all"] if len(kinds) > 1 else kinds:
        part = [r for r in rows if kind in (r["kind"], "all")]
        plain = [r["plain"] for r in part]
        line = f"{kind[:24]:24}{len(part):6}{100 * mean([p['score'] for p in plain]):8.1f}"
        if len(names) > 1:
            two = [r["two_stage"] for r in part]
            lost = sum(p["score"] > t["score"] for p, t in zip(plain, two))
            won = sum(p["score"] < t["score"] for p, t in zip(plain, two))
            line += (f"{100 * mean([t['score'] for t in two]):8.1f}{100 * mean([t['score'] - p['score'] for p, t in zip(plain, two)]):+8.1f}"
                     f"{lost:6}{won:6}{100 * mean([bool(t['boxes']) for t in two]):7.0f}{mean([p['seconds'] for p in plain]):9.3f}"
                     f"{mean([t['seconds'] for t in two]):8.3f}{mean([t['visual_tokens'] for t in two]):8.0f}")
            located = [t for t in two if "iou" in t]
            line += f"{100 * mean([t['covers'] for t in located]):8.1f}{mean([t['iou'] for t in located]):7.2f}" if located else ""
        else:
            line += f"{mean([p['seconds'] for p in plain]):9.3f}"
        say(line)
    if len(names) > 1:
        say("lost: plain right, two-stage wrong; won: the reverse; recall: the crops cover half of every true box")
    result = {n: round(100 * whole[n]["score"], 2) for n in names} | {"questions": len(rows), "metric": metric}
    return result | {"details": whole} if metric in ("pope", "hr") else result


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
    p.add_argument("--save", help="where the picture goes; default out/<image>.roi.png")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the bare answer")
    return p


def main(argv=None):
    p = parser()
    p.error = lambda message: sys.exit(print(f"infer.py: {message}; see python infer.py --help", file=sys.stderr) or 2)
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
    except (BadInput, BadQuestions) as e:
        sys.exit(print(f"infer.py: {e}", file=sys.stderr) or 2)
    except torch.OutOfMemoryError:
        sys.exit(print("infer.py: out of GPU memory; use --dtype float16, lower --max-new-tokens, or --device cpu", file=sys.stderr) or 2)
    except OSError as e:
        sys.exit(print(f"infer.py: {e.filename or 'output'}: {e.strerror or e}; check the path, the rights and the free space", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("infer.py: stopped; with --eval the same command goes on", file=sys.stderr) or 130)


if __name__ == "__main__":
    main()

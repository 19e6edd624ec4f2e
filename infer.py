"""
An image and a question -> an answer, and a picture of where the model looked.

    python infer.py img.jpg "What number is on the star?"  # answer on stdout, picture in out/
    python infer.py img.jpg "What number is on the star?" --explain   # every step of the method
    python infer.py img.jpg                                # a conversation: one question a line
    python infer.py --eval questions.jsonl                 # scores plain and two-stage side by side
    torchrun --nproc_per_node 4 infer.py --eval questions.jsonl

Without --ckpt and --rpn it takes what was trained last (out/last), else the toy and its own RPN.
Left out: batches (one question is answered at a time), sampling, video.
"""
import argparse
import hashlib
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin stall a busy machine
import torch

from clip import FORMATS, BadInput, load_image, printable
from data import draw, metrics
from data.files import read_rows, write_text
from data.program import run_program, say
from data.questions import read_questions
from data.toy.scenes import SIZES, knows_scenes
from model import (KNOWN, ROOT, compile_decode, digest_file, find_checkpoint, load,
                   read_json, run_name)
from sdrpn import RPN, Letterbox, answer, load_recipe, recipe_for, smooth, teach_one

SMALL = 1 << 26  # parameters; a model below this answers fastest on one thread of a CPU


# ------------------------------------------------------------------------------------- which model

def choose(args):
    """Load what is asked for, and say what it is -> model, RPN (None in plain mode), recipe."""
    ckpt, path = args.ckpt, args.rpn
    if not ckpt and not path:
        ckpt, path = trained_last()
    ckpt = ckpt or "toy"
    folder = find_checkpoint(ckpt)
    recipe = None
    if args.mode != "plain":
        recipe = load_recipe(folder)
        path = path or own_rpn(ckpt, folder)
    m = load(folder, args.device, args.dtype)
    set_budget(m, args.budget, recipe)
    rpn = RPN.load(path, m) if args.mode != "plain" else None
    chosen = "--device" if args.device else "default"
    dtype = "--dtype" if args.dtype else "default for this size and device"
    say(f"checkpoint {folder}, RPN {rpn.path if rpn else 'none'}, {m.device} ({chosen}), "
        f"{str(m.dtype)[6:]} ({dtype}){settle_threads(m)}")
    return m, rpn, recipe


def trained_last():
    """out/last -> its checkpoint and RPN; (None, None) if nothing was trained."""
    last = ROOT / "out" / "last"
    if not last.is_file():
        return None, None
    run = ROOT / "out" / last.read_text(encoding="utf-8").removesuffix("\n")
    if not (run / "rpn.safetensors").is_file():
        raise BadInput(f"{last}: names {run}, whose rpn.safetensors is gone; train again, "
                       f"name --ckpt, or delete {last}")
    return str(read_json(run / "config.json").get("ckpt")), run / "rpn.safetensors"


def own_rpn(ckpt, folder):
    """The RPN trained for a checkpoint, or bundled with it, or a released whole model's own."""
    trained, bundled = ROOT / "out" / run_name(ckpt) / "rpn.safetensors", folder / "rpn.safetensors"
    if trained.is_file():
        return trained
    if bundled.is_file():
        return bundled
    if "twig_K" in read_json(folder / "config.json"):
        return folder
    raise BadInput(f"{folder}: no RPN is trained for it yet; train one with: python train.py "
                   f"--ckpt {ckpt}, name one with --rpn, or use --mode plain")


def set_budget(m, budget, recipe):
    """Take --budget, else what the recipe's RPN and tau belong to, else the checkpoint's own."""
    if budget is None:
        m.budget = (recipe or {}).get("budget", m.budget)
        return
    if m.budget is None:
        raise BadInput("--budget: this model shows every picture at one size; leave it out")
    if not 0 < budget[0] <= budget[1]:
        raise BadInput(f"--budget {budget[0]} {budget[1]}: least and most pixels of a picture "
                       "are needed")
    m.budget = tuple(budget)


def settle_threads(m):
    """A small model's threads would mostly wait for each other; what the user set is left alone."""
    if m.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        if sum(p.numel() for p in m.parameters()) < SMALL:
            torch.set_num_threads(1)
    return f", {torch.get_num_threads()} thread(s)" if m.device.type == "cpu" else ""


def ready_compiled(m, args):
    """Compile the decoding step for caches of the usual length, with and without crops."""
    side = m.grid_of(args.picture) if args.picture else (24, 24)
    N, new = side[0] * side[1], 64 + (args.max_new_tokens or 128)
    crops = {"plain": 0, "mask": 1, "box": 2}[args.mode]
    try:
        seconds = compile_decode(m, N + new, N + new + crops * N)
    except torch._dynamo.exc.BackendCompilerFailed as e:
        raise BadInput(f"--compile: {str(e).splitlines()[0]}; leave it out, or install a C++ "
                       "compiler (and Triton on CUDA)") from None
    say(f"compiled the decoding step in {seconds:.0f} s")


# ------------------------------------------------------------------------------------ one question

def check_question(text):
    if not text.strip():
        raise BadInput("the question is empty; ask something")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInput("the question holds bytes that are not UTF-8; type it again") from None
    return text


def respond(m, rpn, args, tau, question, history):
    """Answer one question, save its picture, print -> the answer's text."""
    limit = args.max_new_tokens or 128
    result = answer(m, rpn, args.picture, question, args.mode, tau, limit, history)
    began, plain = time.perf_counter(), result.text
    if result.boxes:  # the picture shows both answers
        plain = m.generate(args.picture, question, limit, history)
    beside = 1000 * (time.perf_counter() - began)
    path = free_name(args)
    if args.explain:
        drawing = explain(m, args, question, history, result, plain, tau)
    else:
        answers = {"plain": plain}
        if args.mode != "plain":
            answers["two-stage"] = result.text
        drawing = portrait(m, args.picture, question, result, answers)
    draw.save(drawing, path, protect=args.image)
    say(f"picture {path}")
    times = ", ".join(f"{stage} {ms:.0f} ms" for stage, ms in result.ms.items())
    crops = ", ".join(map(str, result.boxes)) or "none"
    say(f"crops {crops} | {times} | the plain answer, for the picture, {beside:.0f} ms")
    if args.json:
        rpn_path = str(rpn.path) if rpn else None
        print(json.dumps({
            "answer": result.text, "boxes": [list(box) for box in result.boxes], "tau": tau,
            "mode": args.mode, "ckpt": str(m.folder), "rpn": rpn_path, "ms": result.ms}),
            flush=True)
    else:
        print(printable(result.text, keep="\n\t"), flush=True)
    return result.text


def free_name(args):
    """--save, for one question; else the first name in out/ that no file has."""
    if args.save and args.question:
        return Path(args.save)
    stem = "stdin" if args.image in ("-", "/dev/stdin") else Path(args.image).stem
    kind = "explain" if args.explain else "roi"
    first = Path(args.save) if args.save else ROOT / "out" / f"{stem}.{kind}.png"
    path, number = first, 2
    while path.exists():
        path = first.with_name(f"{first.stem}-{number}{first.suffix}")
        number += 1
    return path


def converse(m, rpn, args, tau):
    """Questions from stdin, one a line, about one image; an empty line or the end stops."""
    history = []
    say("ask about the picture; an empty line ends")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        history.append((line, respond(m, rpn, args, tau, check_question(line), history)))


def warn_of_strangers(m, picture):
    """The toy knows nothing but its own scenes."""
    if knows_scenes(m.folder) and picture.size not in SIZES:
        say("note: the toy knows only its own scenes (data/toy/scenes.py makes more); of another "
            "picture it can say nothing sensible. A real model: --ckpt llava-1.5-7b")


# ---------------------------------------------------------------------------------------- pictures

def crops_of(picture, result):
    """[(the crop, cells of its grid that were read), ...]"""
    return [(picture.crop(box), keep.numpy()) for box, keep in zip(result.boxes, result.keeps)]


def portrait(m, picture, question, result, answers):
    heat = None if result.logits is None else result.logits.sigmoid().numpy()
    letterbox = Letterbox.of(m, picture)
    crops = crops_of(picture, result)
    return draw.answer_picture(picture, letterbox, heat, result.boxes, crops, question, answers)


def explain(m, args, question, history, result, plain, tau):
    """The whole method on one question, teacher included, as one picture."""
    picture, limit = args.picture, args.max_new_tokens or 128
    steps = teach_one(m, recipe_for(args.recipe, None), picture, question, limit, history)
    view, p = Letterbox.of(m, picture), result.logits.sigmoid()
    return draw.explain_picture(draw.Steps(
        **steps, picture=picture, letterbox=view, rpn=p.numpy(), tau=tau,
        smoothed=smooth(p * view.holds_picture()).numpy(),
        regions=[region.box for region in result.regions], boxes=result.boxes,
        crops=crops_of(picture, result), question=question, plain=plain, two_stage=result.text,
        mode=args.mode))


# -------------------------------------------------------------------------------------- evaluation

def ask_turns(m, rpn, picture, turns, mode, tau, limit):
    """All turns of a question, each after the model's own answers -> the last result, seconds."""
    history, began = [], time.perf_counter()
    for turn in turns:
        result = answer(m, rpn, picture, turn, mode, tau, limit, history)
        history.append((turn, result.text))
    return result, time.perf_counter() - began


def tau_for(args, q):
    """--tau, else the question's own, else that of its kind; mode "plain" has no recipe."""
    return args.tau or q.get("tau") or recipe_for(args.recipe or {}, q.get("kind")).get("tau", 0.15)


def score(m, rpn, args, q, number, root):
    """One question, plain and two-stage -> a row of the file of answers."""
    limit = args.max_new_tokens or q.get("max_new_tokens", 128)
    tau = tau_for(args, q)
    row = {"n": number, "id": q.get("id"), "kind": q.get("kind", "all"), "cycle": q.get("cycle"),
           "answers": q["answers"]}
    picture = load_image(root / q["image"])
    modes = {"plain": "plain"}
    if args.mode != "plain":
        modes["two_stage"] = args.mode
    for name, mode in modes.items():
        result, seconds = ask_turns(m, rpn, picture, q["question"], mode, tau, limit)
        row[name] = {"answer": result.text, "score": metrics.score(q, result.text),
                     "seconds": round(seconds, 4), "boxes": [list(box) for box in result.boxes],
                     "visual_tokens": result.visual_tokens}
        if q.get("boxes") and mode != "plain":
            covers, iou = metrics.overlap(result.boxes, q["boxes"], picture.size)
            row[name] |= {"covers": covers, "iou": iou}
    return row


def setting_key(m, rpn, args, questions, root):
    """A name for all that makes the answers: code, weights, RPN, questions, pictures, settings."""
    digest = hashlib.sha256()
    names = "clip.py", "model.py", "sdrpn.py", "infer.py", "data/metrics.py"
    files = [Path(__file__).parent / name for name in names]
    files += [Path(sys.modules[type(part).__module__].__file__) for part in (m, m.tokenizer)]
    files += [m.folder / name for name in ("tokenizer.model", "tokenizer.json")]
    for path in [*files, Path(args.eval)]:
        if path.is_file():
            digest.update(path.read_bytes())
    if rpn is not None:
        for path in sorted(rpn.path.glob("*.safetensors")) or [rpn.path]:  # a folder, or a file
            digest_file(digest, path)
    for image in sorted({q["image"] for q in questions}):
        path = root / image
        stat = path.stat() if path.is_file() else None
        digest.update(f"{image} {stat and (stat.st_size, stat.st_mtime_ns)}".encode())
    settings = [str(root), m.fingerprint, str(m.dtype), m.device.type, m.budget, args.compile,
                args.mode, args.tau, args.max_new_tokens, args.recipe,
                str(rpn.path) if rpn else None, torch.__version__]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def evaluate(m, rpn, args):
    """Plain and two-stage on a file of questions, this process's share -> rank 0: the summary."""
    questions, root = read_questions(args.eval, args.images)
    name = setting_key(m, rpn, args, questions, root)
    questions = questions[:args.limit]
    for number, q in enumerate(questions, 1):
        if not q.get("answers"):
            raise BadInput(f"{args.eval}: question {number} has no 'answers', "
                           "so it can not be scored")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    path = ROOT / "out" / "eval" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = gather(path, args.fresh, world, rank)
    done = sum(i in rows for i in range(len(questions)))
    if done:
        say(f"going on: {done} of {len(questions)} questions are scored in {path}; "
            "--fresh scores them again")
    todo = [i for i in range(len(questions)) if i not in rows][rank::world]
    own, began = path, time.time()
    if world > 1:
        own = path.with_name(f"{name}.{rank}of{world}.jsonl")
    with open(own, "a", encoding="utf-8") as file:
        for count, i in enumerate(todo, 1):
            try:
                row = score(m, rpn, args, questions[i], i, root)
            except (BadInput, FloatingPointError) as e:
                raise BadInput(f"{args.eval}: question {i + 1}: {e}") from None
            file.write(json.dumps(row) + "\n")
            file.flush()
            if count % max(1, len(todo) // 50) == 0 or count == len(todo):
                eta = (time.time() - began) / count * (len(todo) - count)
                say(f"question {count}/{len(todo)} | ETA {eta:.0f} s")
    rows = gather(path, False, world, rank)
    if rank:
        return None
    say(f"answers: {path}")
    try:
        rows = [rows[i] for i in range(len(questions))]
        return metrics.side_by_side(rows, questions, say, m.config)
    except (LookupError, TypeError, AttributeError):
        if len(todo) == len(questions):
            raise
        raise BadInput(f"{path}: what an earlier run scored is damaged; use --fresh") from None


def gather(path, fresh, world, rank):
    """All rows so far {n: row}; rank 0 merges the parts of several processes into one file."""
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        parts = sorted(path.parent.glob(f"{path.stem}.*of*.jsonl"))
        if fresh:
            for old in (path, *parts):
                old.unlink(missing_ok=True)
            parts = []
        rows = read_rows(path)
        for other in parts:
            rows |= read_rows(other)
        if parts:
            write_text(path, "".join(json.dumps(rows[n]) + "\n" for n in sorted(rows)))
            for other in parts:
                other.unlink()
    if world > 1:
        torch.distributed.barrier()
    return read_rows(path)


# ------------------------------------------------------------------------------------ command line

def parser():
    p = argparse.ArgumentParser(
        "infer.py", description="Answer questions about an image, looking twice.")
    add = p.add_argument
    add("image", nargs="?", help=f"{', '.join(FORMATS)}; - reads it from stdin")
    add("question", nargs="*", help="in quotes; leave it out to ask one question after the other")
    add("--explain", action="store_true", help="draw every step of the method on this question")
    add("--eval", metavar="FILE", help="score a file of questions instead")
    add("--images", help="with --eval: folder that its image paths are relative to")
    add("--limit", type=int, help="with --eval: only the first questions")
    add("--fresh", action="store_true", help="with --eval: score again what was scored before")
    add("--ckpt", help=f"checkpoint folder, or one of {', '.join(KNOWN)}; "
                       "default: what was trained last, else the toy")
    add("--rpn", help="rpn.safetensors, or a folder as the authors released it; default: trained, "
                      "else bundled")
    add("--mode", choices=("mask", "box", "plain"), default="mask",
        help="Masked or Box Upscaling, or the picture as it is; default: mask")
    add("--tau", type=float,
        help="threshold on the RoI map; lower it if regions are missed; default: the recipe's")
    add("--budget", type=int, nargs=2, metavar=("MIN", "MAX"),
        help="pixels of a picture, if the model takes any size; default: the recipe's or its own")
    add("--max-new-tokens", type=int, help="longest answer; default: 128, or the question file's")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    add("--dtype", help="float16, bfloat16, float32, float64; default: the file's on a GPU; "
                        "on a CPU float32 below 1 GB, else bfloat16")
    add("--compile", action="store_true",
        help="compile the decoding step, for a GPU: on a CPU it gained nothing")
    add("--save", help="where the picture goes; default: out/<image>.roi.png")
    add("--font", help="TrueType font for the picture, for scripts that the built-in one lacks")
    add("--json", action="store_true", help="print one JSON object instead of the bare answer")
    return p


def check_flags(args):
    if bool(args.image) == bool(args.eval):
        raise BadInput("name an image (and a question), or --eval FILE; see python infer.py --help")
    if len(args.question) > 1:
        words = " ".join(args.question)
        raise BadInput(f'put the question in quotes: python infer.py {args.image} "{words}"')
    args.question = check_question(args.question[0]) if args.question else None
    if args.tau is not None and not 0 < args.tau < 1:
        raise BadInput(f"--tau {args.tau}: must lie between 0 and 1")
    for flag, value in (("--max-new-tokens", args.max_new_tokens), ("--limit", args.limit)):
        if value is not None and value < 1:
            raise BadInput(f"{flag} {value}: must be at least 1")
    for flag in ("images", "limit", "fresh"):
        if args.image and getattr(args, flag):
            raise BadInput(f"--{flag}: belongs to --eval FILE; leave it out")
    if args.explain and (args.mode == "plain" or args.eval):
        raise BadInput("--explain shows the method: leave out --mode plain and --eval")
    if args.explain and args.compile:
        raise BadInput("--explain keeps what a compiled step would write over: leave out --compile")
    if args.image in ("-", "/dev/stdin") and args.question is None:
        raise BadInput("the image comes from stdin, so the question must be on the command line")
    if args.save:
        draw.check_path(args.save, protect=args.image)
    if args.font:
        draw.use_font(args.font)


def join_processes(args):
    """With torchrun: meet the others, each on a GPU of its own. A process may wait long for one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        if torch.cuda.is_available() and not args.device:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"


def work(args):
    join_processes(args)
    check_flags(args)
    args.picture = None
    if args.image:
        args.picture = load_image(args.image)  # before the weights: a typo costs no minute
    m, rpn, args.recipe = choose(args)
    if args.compile:
        ready_compiled(m, args)
    if args.eval:
        summary = evaluate(m, rpn, args)
        if summary is not None:
            print(json.dumps(summary))
        return
    warn_of_strangers(m, args.picture)
    tau = tau_for(args, {})
    if args.question is None:
        converse(m, rpn, args, tau)
    else:
        respond(m, rpn, args, tau, args.question, ())


def main(argv=None):
    run_program(parser(), work, argv, again="with --eval the same command goes on",
                memory="use --dtype float16, lower --max-new-tokens, or --device cpu")


if __name__ == "__main__":
    main()

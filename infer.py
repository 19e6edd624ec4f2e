"""
An image and a question -> an answer, and a picture of where the model looked.

    python infer.py img.jpg "What number is on the star?"             # prints the answer
    python infer.py img.jpg "What number is on the star?" --explain   # draws every step
    python infer.py img.jpg                                           # a conversation
    python infer.py --eval questions.jsonl      # scores plain and two-stage answers side by side
    torchrun --nproc_per_node 4 infer.py --eval questions.jsonl

The answer is printed as soon as it exists; the picture is drawn afterwards and saved in out/.
Without --ckpt the bundled toy answers.
Left out: batches (one question is answered at a time), sampling, video.
"""
import argparse
import json
import os
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin stall a busy machine
import torch

from clip import FORMATS, BadInput, load_image, printable, reading
from data.checkpoints import NAMES, TOY, find_checkpoint, run_name
from data.program import at_least_1, between_0_and_1, join_processes, log, run_program
from model import DTYPES, ROOT, load, read_json
from sdrpn import RPN, Letterbox, answer, explain_teacher, load_recipe, prefix_layers, smooth

SMALL = 1 << 26  # parameters; below this one CPU thread is faster than several


# ------------------------------------------------------------------------------------- which model

def choose(ckpt, rpn):
    """What --ckpt and --rpn ask for -> the checkpoint's folder, and the path of its RPN or None."""
    if not ckpt and not rpn:  # the toy, with the RPN trained last if that is its own
        trained, rpn = last_run()
        return TOY, rpn if trained in ("toy", str(TOY)) else trained_or_bundled("toy", TOY)
    if rpn == "last":
        trained, rpn = last_run()
        if rpn is None:
            raise BadInput("--rpn last: nothing has been trained; train first: python train.py")
        ckpt = ckpt or trained
    folder = find_checkpoint(ckpt or "toy")
    return folder, rpn or trained_or_bundled(ckpt, folder)


def last_run():
    """The run that out/last names -> its checkpoint and the path of its RPN, or (None, None)."""
    last = ROOT / "out" / "last"
    if not last.is_file():
        return None, None
    run = ROOT / "out" / last.read_text(encoding="utf-8").removesuffix("\n")
    rpn = run / "rpn.safetensors"
    if not rpn.is_file():
        log(f"{last} names {run}, which has no {rpn.name} any more; it is passed over")
        return None, None
    with reading(run / "config.json", "train again, or name --ckpt and --rpn"):
        return read_json(run / "config.json")["ckpt"], rpn


def trained_or_bundled(ckpt, folder):
    """The RPN in out/, else the one beside the weights, else that of a released whole model."""
    for path in (ROOT / "out" / run_name(ckpt) / "rpn.safetensors", folder / "rpn.safetensors"):
        if path.is_file():
            return path
    return folder if "twig_K" in read_json(folder / "config.json") else None


def load_all(args):
    """Load and name what answers -> model, RPN, recipe; the last two are None in plain mode."""
    folder, path = choose(args.ckpt, args.rpn)
    rpn = recipe = None
    if args.mode != "plain":
        recipe = load_recipe(folder).for_kind(None)
        if path is None:
            raise BadInput(f"{folder}: no RPN; train one: python train.py --ckpt {args.ckpt}")
    m = load(folder, args.device, args.dtype)
    small = m.device.type == "cpu" and sum(p.numel() for p in m.parameters()) < SMALL
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    if recipe:
        rpn = RPN.load(path, m)
    if args.budget and m.budget is None:
        raise BadInput("--budget: this model sees every picture at one size; leave it out")
    m.budget = tuple(sorted(args.budget or ())) or m.budget
    log(f"checkpoint {folder}, RPN {rpn.path if rpn else 'none'}, {m.device}, {str(m.dtype)[6:]}")
    return m, rpn, recipe


# ------------------------------------------------------------------- one picture, some questions

def converse(m, rpn, recipe, picture, args):
    """Answer the question of the command line, or those that are typed, about one picture."""
    limit, history, tau, layers = args.max_new_tokens or 128, [], None, ()
    if rpn:
        tau, layers = args.tau or rpn.tau, {rpn.frozen, *prefix_layers(recipe)}
    prefix, prefill_ms = timed(m, m.prefill, m.pixels(picture)[None], keep=layers)  # once
    for question in typed_questions() if args.question is None else [args.question]:
        result, answer_ms = timed(m, answer, m, rpn, picture, question, args.mode, tau, limit,
                                  history, prefix=prefix)
        show(result, args.json, {
            "tau": tau, "mode": args.mode, "ckpt": str(m.folder), "rpn": rpn and str(rpn.path),
            "ms": {"prefill": prefill_ms, "answer": answer_ms}})
        if m.folder == TOY or recipe and recipe.train.data == "toy scenes":
            note_what_the_toy_knows(picture, question)
        if args.save != "none":
            plain = result.text
            if result.boxes:
                plain = m.generate(picture, question, limit, history, prefix)
            if args.explain:
                same = None if recipe.square else prefix  # a padded picture has other pixels
                teacher = explain_teacher(m, recipe, picture, question, limit, history, same)
                drawing = draw_steps(m, picture, question, result, plain, teacher, tau, args.mode)
            else:
                drawing = draw_answer(m, picture, question, result, plain)
            save_picture(drawing, args)
        history.append((question, result.text))
        prefill_ms = 0.0  # for the questions that follow


def typed_questions():
    log("ask about the picture; an empty line ends the conversation")
    for line in sys.stdin or ():
        if not line.strip():
            return
        yield line.strip()


def timed(m, work, *args, **more):
    """Call work(...) -> what it returns, and how many milliseconds it took."""
    began = time.perf_counter()
    result = work(*args, **more)
    if m.device.type == "cuda":
        torch.cuda.synchronize(m.device)
    return result, round(1000 * (time.perf_counter() - began), 1)


def show(result, as_json, facts):
    """Print the answer, alone or as a JSON object. Nothing is drawn before."""
    if as_json:
        print(json.dumps({"answer": result.text, "boxes": result.boxes} | facts), flush=True)
    else:
        print(printable(result.text, keep="\n\t"), flush=True)
    times = ", ".join(f"{stage} {ms:.0f} ms" for stage, ms in facts["ms"].items())
    log(f"crops {', '.join(map(str, result.boxes)) or 'none'} | {times}")


def note_what_the_toy_knows(picture, question):
    from data.toy.scenes import SIZES, TOY_QUESTIONS, is_toy_question
    if picture.size not in SIZES or not is_toy_question(question):
        log("note: the toy knows only its own scenes (data/toy/scenes.py draws more) and only "
            f"questions like these: {' '.join(TOY_QUESTIONS)} A real model: --ckpt llava-1.5-7b")


def draw_answer(m, picture, question, result, plain):
    from data.draw import answer_picture
    heat, answers = None, {"plain": plain}
    if result.logits is not None:
        heat, answers["two-stage"] = result.logits.sigmoid().numpy(), result.text
    return answer_picture(picture, Letterbox.of(m, picture), heat, crops_of(result), question,
                          answers)


def draw_steps(m, picture, question, result, plain, teacher, tau, mode):
    """Every step of the method on one question; teacher: what explain_teacher() says."""
    from data.draw import Steps, explain_picture
    letterbox, p = Letterbox.of(m, picture), result.logits.sigmoid()
    smoothed = smooth(p * letterbox.holds_picture())
    return explain_picture(Steps(
        picture=picture, question=question, teacher_letterbox=teacher.pop("letterbox"), **teacher,
        letterbox=letterbox, rpn=p.numpy(), smoothed=smoothed.numpy(), tau=tau,
        regions=[region.box for region in result.regions], crops=crops_of(result), plain=plain,
        two_stage=result.text, mode=mode))


def crops_of(result):
    return [(crop.box, crop.keep.numpy()) for crop in result.crops]


def save_picture(drawing, args):
    """Save to --save, else in out/ under the first name that no file has."""
    from data.draw import save
    stem = "stdin" if args.image in ("-", "/dev/stdin") else Path(args.image).stem
    path = Path(args.save or ROOT / "out" / f"{stem}.{'explain' if args.explain else 'roi'}.png")
    if args.save is None or args.question is None:
        path = take_name(path)
    try:
        save(drawing, path)
    finally:
        if path.is_file() and path.stat().st_size == 0:  # reserved, and then the disk was full
            path.unlink()
    log(f"picture {path}")


def take_name(path):
    """Create `path`, or name-2, name-3, ... -> its name. No other process gets the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        name = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        with suppress(FileExistsError):
            name.touch(exist_ok=False)
            return name


# ------------------------------------------------------------------------------------ command line

def parser():
    p = argparse.ArgumentParser(
        "infer.py", description="Answer questions about a picture, looking twice.")
    add = p.add_argument
    add("image", nargs="?", help=f"{', '.join(FORMATS)}; - reads it from stdin")
    add("question", nargs="?", help="in quotes; leave it out to type one question after the other")
    add("--explain", action="store_true", help="draw every step of the method on this question")
    add("--ckpt", help=f"the model: a folder, or one of {', '.join(NAMES)}; default: toy")
    add("--rpn", help="the network that says where to look again: rpn.safetensors, a folder as the "
                      "authors released it, or last for the one trained last; default: the one "
                      "trained for the model, else the one bundled with it")
    add("--mode", choices=("mask", "box", "plain"), default="mask",
        help="mask: look again at one crop, but only at the parts that the network marks; "
             "box: at up to two whole crops; plain: look once; default: mask")
    add("--tau", type=between_0_and_1, help="how sure the network must be to mark a part, 0 to 1; "
        "lower it if something is missed (too low, and regions grow too large to gain); "
        "default: the RPN's own")
    add("--budget", type=at_least_1, nargs=2, metavar=("MIN", "MAX"),
        help="pixels of a picture, for models that take any size; default: what the RPN was "
             "trained with, in plain mode the model's own")
    add("--max-new-tokens", type=at_least_1,
        help="longest answer; default: 128, or what the file of questions says")
    add("--device", help="cpu, cuda, cuda:1, or mps (untested); default: a GPU if there is one")
    add("--dtype", choices=DTYPES, help="default: the file's on a GPU; "
        "on a CPU float32 below 1 GB, else bfloat16")
    add("--save", metavar="FILE", help="where the picture goes, or none for no picture; "
        "default: out/<image>.roi.png")
    add("--json", action="store_true", help="print one JSON object instead of the bare answer")
    add = p.add_argument_group("a file of questions").add_argument
    add("--eval", metavar="FILE", help="answer these questions, plain and two-stage, and score "
        "what has known answers; the same command resumes")
    add("--images", metavar="DIR", help="the folder of the pictures; default: what the file says")
    add("--limit", type=at_least_1, help="only the first questions; default: all")
    add("--out", metavar="FILE.jsonl", help="write answers and boxes there; default: nowhere")
    add("--max-bad", type=float, default=1.0, metavar="PERCENT",
        help="stop if more of the questions than this cannot be answered; default: 1")
    add("--fresh", action="store_true", help="answer again what was answered before")
    p.epilog = ("The toy knows only the scenes of data/toy/scenes.py and questions like these: "
                "What number (or word) is on the star? What colour is the dot on the star? What is "
                "on the star and the ring? Is there a star in the picture?")
    return p


def work(args):
    if bool(args.image) == bool(args.eval):
        raise BadInput("name a picture or --eval FILE; see python infer.py --help")
    if args.image and (args.out or args.limit or args.images or args.fresh):
        raise BadInput("--out, --limit, --images and --fresh belong to --eval FILE")
    if args.image in ("-", "/dev/stdin") and not args.question:
        raise BadInput("the picture comes from stdin, so name the question on the command line")
    if args.explain and (args.eval or args.mode == "plain"):
        raise BadInput("--explain works on one picture, without --eval and --mode plain")
    if args.save not in (None, "none"):
        from data.draw import check_path
        check_path(args.save, args.image)
    args.device = join_processes(args.device)
    if args.image:
        picture = load_image(args.image)  # before the weights: a typo costs no minute
        converse(*load_all(args), picture, args)
        return
    from data.evaluate import evaluate
    m, rpn, recipe = load_all(args)
    summary = evaluate(m, rpn, recipe, args.eval, args.images, args.mode, args.tau, args.limit,
                       args.max_new_tokens, args.fresh, args.out, args.max_bad)
    if summary:
        print(json.dumps(summary))


def main(argv=None):
    run_program(parser(), work, argv, again="stopped; with --eval the same command resumes",
                memory="use --dtype float16, lower --max-new-tokens, or --device cpu")


if __name__ == "__main__":
    main()

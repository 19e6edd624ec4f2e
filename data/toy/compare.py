"""After the toy's training: five ways to answer, side by side, and the run's report.png.

    print(compare(m, rpn, recipe, ToyQuestions("held-out", 200)))
    report(m, rpn, recipe, questions, Path("report.png"))

Left out: benchmarks, which infer.py --eval scores.
Shapes: N = h*w image tokens; boxes are half-open, in source pixels unless it says cells.
"""
from dataclasses import replace

from clip import BadInput
from data import draw, metrics
from data.program import log
from sdrpn import (Letterbox, Region, answer, explain_teacher, prefix_layers, regions_above,
                   smooth, teach)

METHODS = ("plain", "raw attention", "SD-RPN box", "SD-RPN masked", "true box")
MODES = {"plain": "plain", "SD-RPN masked": "mask"}


class Prefilled:
    """The questions, each with its picture's prefix made before the clock runs."""

    def __init__(self, m, recipe, questions):
        self.m, self.recipe, self.questions = m, recipe, questions

    def __len__(self):
        return len(self.questions)

    def __iter__(self):
        for picture, q in self.questions:
            pixels = self.m.pixels(picture)[None]
            self.prefix = self.m.prefill(pixels, prefix_layers(self.recipe))
            yield picture, q


def compare(m, rpn, recipe, questions):
    """Ask every question by every method -> a table of scores by kind, in percent."""
    questions, methods = Prefilled(m, recipe, questions), {}
    for method in METHODS:
        methods[method] = lambda picture, q, method=method: ask(
            m, rpn, recipe, picture, q, method, questions.prefix).text
    table = metrics.compare(questions, methods, log)
    return f"{table}\n(seconds without the prefill of the picture, which all of them share)"


def ask(m, rpn, recipe, picture, q, method, prefix=None, max_new_tokens=32):
    """One question by one of METHODS -> Answer."""
    question, regions = q["question"][-1], None
    if method == "raw attention":  # Table 3 #1: the whole plain answer first, then its attention
        pixels, prompts = m.pixels(picture)[None], [m.prompt_ids(question)]
        lesson = teach(m, replace(recipe, sink=None), pixels, prompts, max_new_tokens, prefix)
        regions = attention_regions(lesson.raw[0], m.token_grid(pixels))
    elif method == "true box":
        regions = true_regions(q["boxes"], Letterbox.of(m, picture))
    return answer(m, rpn, picture, question, MODES.get(method, "box"), recipe.tau, max_new_tokens,
                  regions=regions, prefix=prefix)


def attention_regions(raw, grid):
    """Table 3 #1: an attention map (N,), smoothed, above 0.15 of its maximum."""
    p = smooth(raw.view(grid).float().cpu())
    return regions_above(p, 0.15 * p.max().item())


def true_regions(boxes, letterbox):
    """True boxes -> a Region each; its own box is in cells."""
    regions = []
    for box in boxes:
        cells = letterbox.cells_of([box])
        if cells.any():
            y, x = cells.nonzero(as_tuple=True)
            around = x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1
            regions.append(Region(around, cells, cells.sum().item()))
    return regions


def report(m, rpn, recipe, questions, path, max_new_tokens=128):
    """Draw the contact sheet of Figures 2 and 6: picture, attention, without sinks, labels, RPN."""
    rows = []
    for n in range(len(questions)):
        try:
            picture, q = questions[n]
            question, own = q["question"][0], recipe.for_kind(q.get("kind"))
            steps = explain_teacher(m, own, picture, question, max_new_tokens)
            heat = rpn(m, picture, question).sigmoid().numpy()
        except BadInput:  # training skipped it as well
            continue
        maps = [(steps[name], steps["letterbox"]) for name in ("raw", "clean", "labels")]
        title = f"{question}  The teacher answers: {steps['response']}"
        rows.append({"picture": picture, "maps": [*maps, (heat, Letterbox.of(m, picture))],
                     "sinks": steps["sinks"], "title": title})
        if len(rows) == 6:
            break
    columns = ["picture", "attention", "without sinks", "labels", "RPN"]
    draw.save(draw.contact_sheet(rows, columns), path)

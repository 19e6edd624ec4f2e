"""
The paper's ablations, made by replacing named functions of train.py and sdrpn.py for the time of a run.

    with training(WITH_SINKS):
        m, recipe, questions, run = train.start(flags)
        train.train(flags, m, recipe, questions, run)
    with asking(PRESMOOTHED):
        train.ask(...)

The ablation's name is among the run's settings, so an RPN of one is never taken for that of another.
Left out: what flags of train.py do (B, R, samples, the rates).
Shapes: b samples, n turns, N = h*w image tokens, T tokens, D hidden width, H heads.
"""
import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sdrpn  # noqa: E402 (the project is on the path only now)
import train  # noqa: E402
from clip import BadInput  # noqa: E402

SCALE = 100  # of both sides of the regression, as in the released code


@dataclass
class Ablation:
    name: str
    replaced: dict = field(default_factory=dict)         # names of train.py while it trains
    replaced_asking: dict = field(default_factory=dict)  # names of sdrpn.py while it answers


@contextlib.contextmanager
def training(ablation):
    """train.start() and train.train() are those of this ablation."""
    start_run = train.Run

    def named_run(out, settings, *how):
        return start_run(out, settings | {"ablation": ablation.name}, *how)
    with mock.patch.multiple(train, **ablation.replaced, Run=named_run):
        yield


@contextlib.contextmanager
def asking(ablation):
    """sdrpn.answer() is that of this ablation."""
    with contextlib.ExitStack() as stack:
        for name, function in ablation.replaced_asking.items():
            stack.enter_context(mock.patch.object(sdrpn, name, function))
        yield


NONE = Ablation("none")


# ---- Table 3 #2: the RPN regresses the raw attention

def raw_targets(lesson, group):
    """The raw map, normalised to sum SCALE: (b, N). All -1, which is ignored, where there was no response."""
    total = lesson.raw.sum(-1, keepdim=True)
    return torch.where(total > 0, SCALE * lesson.raw / total.clamp(min=1e-12), -1.0)


def regression_loss(scores, targets):
    """Squared error, summed over the tokens with a target: scores (b, H, n, N), targets (b, n, N).

    >>> scores = torch.tensor([[[[0., 0.]]]])  # one head, one turn; predicts 50, 50
    >>> regression_loss(scores, torch.tensor([[[51., 49.]]]))
    tensor(2.)
    """
    error = SCALE * predicted_map(scores) - targets
    return (error ** 2 * (targets >= 0)).sum()


def predicted_map(scores):
    """(b, H, n, N) -> (b, n, N), which sums to 1: the mean over heads of each head's softmax over the image."""
    return scores.softmax(-1).mean(1)


@torch.no_grad()
def ask_regressed(m, rpn, picture, question, max_new_tokens):
    """Two-stage answer of an RPN that regressed the raw map: its prediction is cut like raw attention."""
    pixels, ids = m.pixels(picture)[None], m.prompt_ids(question)
    grid = m.token_grid(pixels)
    embeds, columns = m.embed_prompt(ids, m.encode(pixels))  # (1, T, D)
    rope = m.rope(m.positions(ids, grid))
    scores = rpn.score(m.run(embeds, 0, rpn.frozen, rope), columns, [-1], rope)  # (1, H, 1, N)
    regions = train.attention_regions(predicted_map(scores)[0, 0], grid)
    return sdrpn.answer(m, rpn, picture, question, "box", max_new_tokens=max_new_tokens, regions=regions)


REGRESSED = Ablation("raw map, mean squared error", dict(targets=raw_targets, loss_sum=regression_loss))


# ---- Table 3 #3: sinks stay

def recipe_without_sinks(folder):
    recipe = sdrpn.load_recipe(folder)
    kinds = {kind: own | {"sink": None} for kind, own in recipe.get("kinds", {}).items()}
    return recipe | {"sink": None} | ({"kinds": kinds} if kinds else {})


WITH_SINKS = Ablation("sinks kept", dict(load_recipe=recipe_without_sinks))


# ---- Table 8: the Gaussian before the labels, none at inference (our reading of "pre-smoothing")

def smoothed_targets(lesson, group):
    """Line 12 on the smoothed map: (b, N) int8."""
    labels = []
    for clean, sample in zip(lesson.clean, group):
        smoothed = sdrpn.smooth(clean.view(sample.on.shape)).flatten()
        labels.append(sdrpn.make_labels(smoothed, sample.recipe, sample.on))
    return torch.stack(labels).to(torch.int8)


def unchanged(p):
    return p


PRESMOOTHED = Ablation("labels of the smoothed map", dict(targets=smoothed_targets), dict(smooth=unchanged))


# ---- Table 4b: the data set's answers in place of the model's own

original_read_sample, original_label = train.read_sample, train.label


def read_sample_with_answers(args, m, recipe, questions, number):
    """A Sample that also knows the data set's answer to each turn."""
    item = questions[number]  # read once: a picture is drawn or decoded for it
    sample = original_read_sample(args, m, recipe, {number: item}, number)
    sample.answers = item[1].get("answers") or []
    if len(sample.answers) < len(sample.turns):
        raise BadInput("fewer answers than turns, and the data set's answers need one for each")
    return sample


def label_by_answers(args, m, group):
    """train.label() of a model that says what the data set says."""
    turns = iter(range(len(group[0].turns)))

    def decode(last_hidden, cache, position, max_new_tokens):
        turn = next(turns)
        answers = [answer_ids(m, sample, turn)[:max_new_tokens - 1] for sample in group]
        feed(m, answers, cache, position)
        return answers
    with mock.patch.object(m, "decode", decode):
        return original_label(args, m, group)


def answer_ids(m, sample, turn):
    """The ids of the data set's answer as they stand behind the prompt, EOS not included."""
    question = sdrpn.teacher_question(sample.recipe, sample.turns[turn])
    history = [*zip(sample.turns[:turn], sample.responses), (question, sample.answers[turn])]
    behind = m.prompt_ids("", history)[len(sample.prompt(m, turn)):]
    ends = [i for i, token in enumerate(behind) if token in m.config["eos_ids"]]
    return behind[:ends[0]]


def feed(m, answers, cache, position):
    """Run b answers (lists of ids) behind what the cache holds, in one call: queries become (b, H, t, d).

    Shorter ones are filled up: what stands behind an answer is seen by none of its tokens, and not read.
    """
    longest = max(map(len, answers))
    if longest == 0:
        return
    filled = [ids + [0] * (longest - len(ids)) for ids in answers]
    hidden = m.language_model.embed_tokens(torch.tensor(filled, device=m.device))  # (b, t, D)
    first = position + cache.shift
    rope = m.rope(torch.arange(first, first + longest, device=m.device))
    m.run(hidden, 0, m.depth, rope, cache, start=position)


GIVEN = Ablation("the data set's answers", dict(read_sample=read_sample_with_answers, label=label_by_answers))

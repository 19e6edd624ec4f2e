"""The paper's ablations. Each replaces named functions of train.py and sdrpn.py while a run lasts.

    with training(WITH_SINKS):
        train.work(train.parser().parse_args(["--out", "out/with-sinks"]))
    with asking(PRESMOOTHED):
        answer(m, rpn, picture, question)

The ablation's name is among the run's settings, so its RPN is never taken for that of another.
Left out: what flags of train.py do (B, R, samples, the rates).
Shapes: b samples, n turns, N = h*w image tokens, t or T tokens, D hidden width, H heads.
"""
import contextlib
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sdrpn  # noqa: E402 (the project is on the path only now)
import train  # noqa: E402
from clip import BadInput  # noqa: E402
from data.toy.compare import attention_regions  # noqa: E402

SCALE = 100  # of both sides of the regression, as in the released code


@dataclass(eq=False)
class Ablation:
    name: str
    training: dict = field(default_factory=dict)  # functions that replace train.py's
    asking: dict = field(default_factory=dict)    # functions that replace sdrpn.py's in answer()


@contextlib.contextmanager
def training(ablation):
    """train.work() trains this ablation, and leaves out the toy's table and the report."""
    start_run = train.Run

    def start_named_run(out, settings, *how):
        return start_run(out, settings | {"ablation": ablation.name}, *how)
    with mock.patch.multiple(train, Run=start_named_run, finish=lambda *how: None, **ablation.training):
        yield


def asking(ablation):
    """A context in which sdrpn.answer() is that of this ablation."""
    return mock.patch.multiple(sdrpn, **{"smooth": sdrpn.smooth} | ablation.asking)


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
def regressed_regions(m, rpn, question, prefix):
    """The regions of an RPN that regressed the raw map: its prediction is cut like raw attention."""
    tail = m.embed(m.tail(m.prompt_ids(question)))  # (1, t, D)
    rope = m.text_rope(prefix.position, tail.shape[1])
    tail = m.run(tail, 0, rpn.frozen, rope, prefix.cache, prefix.columns.stop)
    hidden, rope = torch.cat([prefix.hidden[rpn.frozen], tail], 1), torch.cat([prefix.rope, rope], 1)
    scores = rpn.score(hidden, prefix.columns, [-1], rope)  # (1, H, 1, N)
    return attention_regions(predicted_map(scores)[0, 0], prefix.grid)


REGRESSED = Ablation("raw map, mean squared error", dict(make_targets=raw_targets, group_loss=regression_loss))


# ---- Table 3 #3: sinks stay

def recipe_that_keeps_sinks(folder):
    recipe = sdrpn.load_recipe(folder)
    kinds = {kind: own | {"sink": None} for kind, own in recipe.kinds.items()}
    return replace(recipe, sink=None, kinds=kinds)


WITH_SINKS = Ablation("sinks kept", dict(load_recipe=recipe_that_keeps_sinks))


# ---- Table 8: the Gaussian before the labels, none at inference (our reading of "pre-smoothing")

make_targets = train.make_targets


def smoothed_targets(lesson, group):
    """Line 12 on the smoothed maps: (b, N) int8."""
    maps = lesson.clean.unflatten(-1, group[0].has_picture.shape)  # (b, h, w)
    return make_targets(replace(lesson, clean=sdrpn.smooth(maps).flatten(1)), group)


PRESMOOTHED = Ablation("labels of the smoothed map", dict(make_targets=smoothed_targets), dict(smooth=lambda p: p))


# ---- Table 4b: the data set's answers in place of the model's own

read_sample, label_group = train.read_sample, train.label_group


def read_sample_with_answer(m, recipe, questions, max_new_tokens, number):
    """A Sample that also knows the data set's answer."""
    item = questions[number]
    sample = read_sample(m, recipe, {number: item}, max_new_tokens, number)
    if len(sample.turns) > 1 or not item[1].get("answers"):
        raise BadInput("the data set's answers are used for questions of one turn that have some")
    sample.answer = item[1]["answers"][0]
    return sample


def label_by_answers(m, group, *how):
    """train.label_group() of a model that says what the data set says."""
    def decode(last_hidden, cache, column, position, max_new_tokens):
        answers = []
        for sample in group:
            question = sdrpn.teacher_question(sample.recipe, sample.turns[0])
            answers.append(answer_ids(m, question, sample.answer)[:max_new_tokens - 1])
        feed(m, answers, cache, column, position)
        return answers
    with mock.patch.object(m, "decode", decode):
        return label_group(m, group, *how)


def answer_ids(m, question, answer):
    """The ids of an answer as they stand behind its question's prompt, without EOS."""
    prompt = m.prompt_ids(question)
    behind = m.prompt_ids("", [(question, answer)])[len(prompt):]
    end = next(i for i, token in enumerate(behind) if token in m.config.eos_ids)
    return behind[:end]


def feed(m, answers, cache, column, position):
    """Run b answers (lists of ids) behind what the cache holds, in one call, as decode() would token by token.

    Shorter ones are filled up: their own tokens do not see what stands behind them, and it is not read.
    """
    longest = max(map(len, answers))
    if longest:
        filled = torch.tensor([ids + [0] * (longest - len(ids)) for ids in answers], device=m.device)
        hidden, rope = m.language_model.embed_tokens(filled), m.text_rope(position, longest)  # (b, t, D)
        m.run(hidden, 0, m.depth, rope, cache, column)
        for layer, (rows,) in cache.queries.items():
            cache.queries[layer] = rows.split(1, 2)  # (b, H, 1, d) a token


GIVEN = Ablation("the data set's answers", dict(read_sample=read_sample_with_answer, label_group=label_by_answers))

if __name__ == "__main__":
    print(__doc__)

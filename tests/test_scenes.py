"""The toy's scenes, and the lessons that its pre-training draws from them."""
import math
import random

import pytest
import torch

from data.toy import lessons, pretrain, scenes
from model import ROOT, load


def test_a_pair_is_near_if_its_common_box_covers_at_most_a_third():
    star, ring, house = (scenes.Thing(None, None, None, None, box, 20.0, 8.0) for box in (
        (0, 0, 100, 100), (572, 124, 672, 224), (572, 125, 672, 225)))
    assert scenes.near_pairs([star, ring]) == [(star, ring)]  # 672 x 224 is exactly a third of 672 x 672
    assert scenes.near_pairs([star, house]) == []


def test_the_kinds_take_turns_and_a_question_depends_on_its_number_alone():
    stream = scenes.ToyQuestions("test", 7)
    asked = list(stream)
    assert [q["kind"] for _, q in asked] == [*scenes.KINDS, *scenes.KINDS[:2]]
    assert all(scenes.is_toy_question(q["question"][0]) for _, q in asked)
    picture, question = stream[6]
    assert question == asked[6][1] and picture.tobytes() == asked[6][0].tobytes()


def test_a_scene_has_as_many_questions_with_yes_as_with_no():
    questions = scenes.all_questions(scenes.make_scene(random.Random(0)), random.Random(0))
    answers = [q["answers"][0] for q in questions if q["kind"] == "exist"]
    assert answers.count("yes") == answers.count("no") > 0


def test_registers_are_long_and_lie_apart_on_empty_patches():
    norms, empty = torch.ones(1, 144), torch.ones(1, 144, dtype=torch.bool)
    norms[0, [0, 1, 4, 143, 50]] = torch.tensor([9.0, 8.0, 7.0, 8.0, 20.0])
    empty[0, 50] = False
    assert pretrain.pick_registers(norms, empty)[0].nonzero().flatten().tolist() == [0, 4]  # 1 is near, 143 far


def test_parking_is_cheapest_at_equal_shares_of_what_is_to_be_parked():
    sinks, rows = torch.tensor([[True, True, False, False]]), torch.tensor([[3]])

    def loss(*attention):
        return pretrain.parking_loss(torch.tensor(attention).log()[None, None, None], sinks, rows).item()
    assert loss(0.4, 0.4, 0.1, 0.1) == pytest.approx(-0.8 * math.log(0.4) - 0.2 * math.log(0.2))
    assert loss(0.4, 0.4, 0.1, 0.1) < min(loss(0.5, 0.3, 0.1, 0.1), loss(0.3, 0.3, 0.2, 0.2))


def test_every_phase_takes_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "CHUNK", 2)
    for kind in lessons.KINDS:
        lessons.make_chunk(tmp_path, kind, 0, pretrain.cut_crops)
        lessons.make_chunk(tmp_path, kind, 1, pretrain.cut_crops)
    pools = [lessons.Pool(tmp_path, kind) for kind in lessons.KINDS]
    m = load(ROOT / "data/toy/llava-toy", "cpu", "float32")
    heads = pretrain.Heads(m.config)
    for phase, settings in pretrain.PHASES.items():
        monkeypatch.setattr(settings, "batch", 2)
        _, parameters = pretrain.prepare(phase, m, heads)
        loss, shown = pretrain.step_loss(phase, m, heads, m.vision_tower, pools, random.Random(0), 0)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in parameters)
        assert shown.get("answer", 0) < 1  # it is trained: nearly 6 where it is not

"""The toy's scenes, and the lessons that its pre-training draws from them."""
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data" / "toy"))
import lessons  # noqa: E402 (its folder is on the path only now)
import pretrain  # noqa: E402
import scenes  # noqa: E402


def thing(shape, box, text="cat"):
    return scenes.Thing(shape, "red", text, "blue", box, 20.0, 8.0)


def test_a_pair_is_near_if_its_common_box_covers_a_third_at_most():
    star, ring, house = (thing("star", (0, 0, 100, 100)), thing("ring", (572, 124, 672, 224)),
                         thing("house", (500, 125, 600, 225)))
    assert scenes.near_pairs([star, ring]) == [(star, ring)]  # 672 x 224 is a third of 672 x 672 exactly
    assert scenes.near_pairs([star, ring, house]) == [(star, ring), (star, house), (ring, house)]
    assert scenes.near_pairs([star, thing("house", (572, 125, 672, 225))]) == []


def test_both_asks_for_what_is_on_two_things_in_the_order_asked():
    things = [thing("star", (0, 0, 100, 100), "4"), thing("ring", (200, 0, 300, 100), "owl")]
    question, = scenes.candidates(things, "both")
    assert question == {"question": "What is on the star and the ring?", "answers": ["4 owl"], "kind": "both",
                        "boxes": [[0, 0, 100, 100], [200, 0, 300, 100]]}


def test_every_kind_takes_its_turn_and_a_question_depends_on_its_number_alone():
    stream = [scenes.make_question("test", i) for i in range(7)]
    assert [q["kind"] for _, q in stream] == [*scenes.KINDS, *scenes.KINDS[:2]]
    scene, question = scenes.make_question("test", 6)
    assert question == stream[6][1] and scene.image.tobytes() == stream[6][0].image.tobytes()


def test_yes_and_no_are_equally_frequent_in_a_scenes_questions():
    scene, _ = scenes.make_question("test", 0)
    answers = [q["answers"][0] for q in scenes.all_questions(scene, random.Random(0)) if q["kind"] == "exist"]
    assert answers.count("yes") == answers.count("no") > 0


@pytest.mark.parametrize("number", range(5))
def test_a_masked_view_is_a_crop_inside_the_picture_that_keeps_a_part(number):
    scene, _ = scenes.make_question("test", number)
    (x0, y0, x1, y1), keep = pretrain.masked_view(scene, random.Random(number), scene.things[:1])
    assert 0 <= x0 < x1 <= scene.image.width and 0 <= y0 < y1 <= scene.image.height
    assert keep.shape == (lessons.GRID ** 2,) and keep.any()


def test_cells_over():
    cells = lessons.cells_over((0, 0, 120, 120), (5, 0, 20, 10))  # cells of 10: half of the first, all of the second
    assert np.flatnonzero(cells).tolist() == [0, 1]
    assert np.flatnonzero(lessons.cells_over((0, 0, 120, 120), (5, 0, 20, 10), 0.5)).tolist() == [1]


def test_registers_are_the_longest_features_if_far_longer_than_the_others():
    features = torch.ones(1, 144, 1)
    features[0, 7], features[0, 9], features[0, 11] = 5.0, 4.0, 3.0
    assert pretrain.find_registers(features).flatten().nonzero().flatten().tolist() == [7, 9]
    assert not pretrain.find_registers(torch.ones(1, 144, 1)).any()


def test_parking_is_cheapest_at_equal_shares_of_what_is_to_be_parked():
    sinks, rows = torch.tensor([[True, True, False, False]]), torch.tensor([[3]])

    def loss(*attention):
        return pretrain.parking_loss(torch.tensor(attention).log()[None, None, None], sinks, rows).item()
    best = loss(0.4, 0.4, 0.1, 0.1)
    assert best == pytest.approx(-0.8 * math.log(0.4) - 0.2 * math.log(0.2))
    assert best < loss(0.5, 0.3, 0.1, 0.1) and best < loss(0.3, 0.3, 0.2, 0.2) and best < loss(0.45, 0.45, 0.05, 0.05)


def test_registers_lie_apart_on_empty_patches():
    norms, empty = torch.ones(1, 144), torch.ones(1, 144, dtype=torch.bool)
    norms[0, 0], norms[0, 1], norms[0, 4], norms[0, 143], norms[0, 50] = 9.0, 8.0, 7.0, 8.0, 20.0
    empty[0, 50] = False  # a thing lies there
    assert pretrain.pick_registers(norms, empty)[0].nonzero().flatten().tolist() == [0, 4]  # 1 is near, 143 far
    assert not pretrain.pick_registers(norms, torch.zeros_like(empty)).any()


def test_a_loop_over_the_questions_ends():
    assert len(list(scenes.ToyQuestions("test", 3))) == 3

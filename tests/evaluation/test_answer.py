"""`Answer`: its JSON, how answers are identified across ranks, grouped and averaged."""

import json
import math
from dataclasses import replace

import pytest

from idefics_lit.evaluation.answer import Answer, by_question, by_question_type, mean_anls


def answer(question_id, index=None, score=1.0, question_types=(), **fields):
    return Answer(question_id, "Who?", "Ánn", ["Ann"], score, [*question_types], -1.0, 4, index=index, **fields)


def test_json_has_all_fields_but_the_index():
    line = '{"question_id": "a", "question": "Who?", "prediction": "Ánn", "references": ["Ann"], "score": 0.5, '
    sure = '"log_probability": -1.0, "token_count": 4, '
    ends = '"mean_log_probability": -0.25, "confidence": 0.36787944117144233}'
    assert answer("a", 3, 0.5, ["form"]).to_json() == line + '"question_types": ["form"], ' + sure + ends
    with_pages = answer("a", 3, 0.5, answer_page=0, reference_page=1).to_json()
    assert with_pages == line + '"question_types": [], ' + sure + '"answer_page": 0, "reference_page": 1, ' + ends
    assert json.loads(answer("a").to_json(2.0))["confidence"] == pytest.approx(0.4327, abs=1e-4)
    without = replace(answer("a"), log_probability=-math.inf)  # of logits that are NaN
    assert '"log_probability": null, ' in without.to_json() and without.to_json().endswith('"confidence": 0.0}')
    assert json.loads(answer(7, score=None).to_json())["score"] is None


def test_answers_are_identified_by_index():
    first, second, repeated = answer("a", 0), answer("a", 1), answer("a", 0, 0.5)
    assert by_question([first, second, repeated]) == {0: first, 1: second}


def test_answers_without_an_index_are_identified_by_id_and_occurrence_on_a_rank():
    first_rank = by_question([answer(question_id) for question_id in ("a", "a", "b", 1, "1")])
    assert len(first_rank) == 5
    second_rank = by_question([answer(question_id) for question_id in ("c", "a")])
    assert len({**first_rank, **second_rank}) == 6


def test_ranks_with_data_of_their_own_may_use_the_same_ids():
    first_rank = by_question([Answer(0, "Who signed?", "Ann", ["Ann"], 1.0, [], -1.0, 4)])
    second_rank = by_question([Answer(0, "What is the date?", "1976", ["1977"], 0.75, [], -1.0, 4)])
    third_rank = by_question([Answer(0, "Who signed?", "Bob", ["Bob"], 1.0, [], -1.0, 4)])
    assert len({**first_rank, **second_rank, **third_rank}) == 3
    padding = by_question([Answer(0, "Who signed?", "Ann", ["Ann"], 1.0, [], -1.0, 4)])
    assert padding.keys() == first_rank.keys()


def test_groups_by_question_type_are_ordered_by_frequency_then_name():
    answers = {0: answer("a", 0, 0.0, ["form", "list", "form"]), 1: answer("b", 1, 1.0, ["list"])}
    answers[2] = answer("c", 2, 0.5, ["chart"])
    groups = by_question_type(answers)
    assert list(groups.items()) == [
        ("list", {0: answers[0], 1: answers[1]}),
        ("chart", {2: answers[2]}),
        ("form", {0: answers[0]}),
    ]
    assert by_question_type(answers, name=lambda question_type: "all") == {"all": answers}
    assert mean_anls(groups["list"].values()) == pytest.approx(0.5)

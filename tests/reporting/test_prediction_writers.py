"""The files with answers: their ids, what several ranks write, and what a fit's validations are compared with."""

import json
from types import SimpleNamespace

import pytest

from idefics_lit.errors import InputError
from idefics_lit.evaluation.answer import Answer, by_question
from idefics_lit.reporting import prediction_writers
from idefics_lit.reporting.prediction_writers import EvaluationWriter, PredictionWriter, gather_answers
from idefics_lit.reporting.summary import example_table, score_table


def answer(index, question_id, score=1.0, **pages):
    return Answer(question_id, "Who?", f"{index}", ["Ann"], score, ["form"], -1.0, 4, index=index, **pages)


def write(answers, folder):
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, loggers=[], default_root_dir=folder, fast_dev_run=0)
    PredictionWriter().write_on_epoch_end(trainer, SimpleNamespace(temperature=1.0), [answers], [])


@pytest.mark.filterwarnings("ignore:Several questions have the id")
@pytest.mark.parametrize(
    ("ids", "written"),
    [
        (["12", "3", 0, "-4"], [12, 3, 0, -4]),
        (["007", "7", "+7", " 7", "7.0", "0x7"], ["007", "7", "+7", " 7", "7.0", "0x7"]),
        (["007", "8", 9], ["007", "8", 9]),
        (["²", "٣", "1_0", "-0", ""], ["²", "٣", "1_0", "-0", ""]),
        ([7, "7", "8"], [7, "7", "8"]),  # two different ids that would become equal
        (["7", "7"], [7, 7]),  # the same id
        (["9" * 16, "9" * 5000, 10**20], ["9" * 16, "9" * 5000, 10**20]),  # readers may round such numbers
    ],
)
def test_submitted_ids_are_numbers_if_that_is_lossless(ids, written, tmp_path):
    write([answer(i, question_id) for i, question_id in enumerate(ids)], tmp_path)
    found = [row["questionId"] for row in json.loads((tmp_path / "submission.json").read_text())]
    assert list(map(repr, found)) == list(map(repr, written))


def test_every_answer_has_a_page_if_one_has(tmp_path):
    write([answer(0, "a"), answer(1, "b", answer_page=2, reference_page=1)], tmp_path)
    submission = json.loads((tmp_path / "submission.json").read_text())
    assert [row["answer_page"] for row in submission] == [0, 2]
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(line["answer_page"], line.get("reference_page")) for line in lines] == [(0, None), (2, 1)]


@pytest.mark.parametrize(
    ("scores", "printed"), [([None, None], ""), ([None, 0.25], "ANLS 0.2500 (questions with references: 1)")]
)
def test_the_score_is_that_of_the_questions_with_references(tmp_path, capsys, scores, printed):
    write([answer(i, "a", score) for i, score in enumerate(scores)], tmp_path)
    assert ("ANLS" in (out := capsys.readouterr().out)) == bool(printed) and printed in out


@pytest.mark.parametrize("name", ["submission.json", "predictions.jsonl"])
def test_a_file_that_cannot_be_written_does_not_prevent_the_other(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{name} can't be written"):
        write([answer(0, "a")], tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"submission.json", "predictions.jsonl"} - {
        name
    }


def test_the_first_ranks_answer_to_a_question_counts(monkeypatch):
    """As in the metric, if a sampler repeats a question on another rank."""
    ranks = [
        [answer(0, "a", 1.0), answer(1, "a", 0.0), answer(2, "b", 1.0)],
        [answer(3, "b", 0.5), answer(4, "c", 0.0), answer(0, "a", 0.5)],
    ]
    monkeypatch.setattr(prediction_writers, "gather_objects", lambda trainer, own: list(map(by_question, ranks)))
    with pytest.warns(UserWarning, match="Several questions have the id a, b: each"):
        gathered = gather_answers(None, ranks[0])
    assert [(key, one.score) for key, one in gathered.items()] == [(0, 1.0), (1, 0.0), (2, 1.0), (3, 0.5), (4, 0.0)]


def test_the_sanity_check_is_the_baseline_if_it_has_the_same_questions():
    writer = EvaluationWriter()
    writer.sanity_check_answers = by_question([answer(0, "a", 0.0), answer(1, "a", 1.0)])
    writer.answers = by_question([answer(0, "a", 1.0), answer(1, "a", 0.5)])
    assert [one.score for one in writer.baseline.values()] == [0.0, 1.0]
    table = score_table(writer.baseline, writer.answers)
    assert [next(iter(column.cells)) for column in table.columns] == ["all", "0.500", "0.750", "2"]
    assert example_table(writer.baseline, writer.answers).row_count == 2
    writer.answers = by_question([answer(0, "a"), answer(1, "b")])
    assert writer.baseline == {}


def test_a_test_is_not_compared_with_the_sanity_check(tmp_path):
    """Its questions are others, though they may have the same indices and ids."""
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, loggers=[], default_root_dir=tmp_path, fast_dev_run=0)
    writer = EvaluationWriter()
    writer.sanity_check_answers = by_question([answer(0, "a", 0.0)])
    writer.on_test_end(trainer, SimpleNamespace(answers=[answer(0, "a", 1.0)], temperature=1.0))
    assert len(writer.answers) == 1 and writer.baseline == {}

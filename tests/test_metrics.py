import json

import pytest
import torch
import torch.multiprocessing
from conftest import DATA
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics import MetricCollection

from idefics_lit.errors import InputError
from idefics_lit.metrics import ANLS, anls

VECTORS = json.loads((DATA / "anls_vectors.json").read_text())


@pytest.mark.parametrize("case", VECTORS, ids=[case["note"] for case in VECTORS])
def test_vectors(case):
    assert anls(case["prediction"], case["answers"]) == pytest.approx(case["expected"], abs=1e-9)
    metric = ANLS()
    metric.update([case["prediction"]], [case["answers"]])
    assert metric.compute().item() == pytest.approx(case["expected"], abs=1e-9)


# The definitions agree where normalising changes nothing but case, and one side isn't empty (anls-star scores an
# empty answer 1 against an empty reference and in other ways against none).
words = st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=8), min_size=1, max_size=4)
texts = words.map(" ".join)


@given(texts, st.lists(texts, min_size=1, max_size=3), st.booleans())
def test_agrees_with_anls_star(prediction, references, derive):
    from anls_star import anls_score

    if derive:  # random texts are rarely alike
        prediction = references[0][1:] + prediction[:2]
        prediction = " ".join(prediction.split()) or "x"
    if len(prediction.lower()) != len(prediction) or any(len(r.lower()) != len(r) for r in references):
        return  # anls-star measures lengths before lower-casing, which lengthens a few letters
    assert anls(prediction, references) == pytest.approx(anls_score(references, prediction), abs=1e-9)


@given(st.text(), st.lists(st.text(), min_size=1))
def test_any_text_scores_between_0_and_1(prediction, references):
    score = anls(prediction, references)
    assert score == 0 or 0.5 <= score <= 1
    assert score == anls(f"  {prediction.upper().lower()} ", references) or prediction.upper().lower() != prediction


def test_options():
    assert anls("ab", ["ac"], inclusive=False) == 0
    assert anls("abcd", ["abzz"], threshold=0.6) == 0
    assert anls("Paris.", ["Paris"], strip_period=True) == 1
    assert anls("Paris.", ["Paris"]) == pytest.approx(5 / 6)


@pytest.mark.parametrize("prediction", ["5 .", " 5. ", "5...", "5 . .", "5\u00a0.", "5.\n."])
def test_the_white_space_before_a_full_stop_goes_with_it(prediction):
    assert anls(prediction, ["5"], strip_period=True) == 1
    assert anls(prediction, ["5"]) <= 0.5
    metric = ANLS(strip_period=True)
    metric.update([prediction, ".5.", "."], [["5"], [".5"], [""]])
    assert metric.compute() == 1


def test_a_text_is_one_reference_and_no_list_of_characters():
    assert anls("e", "apples") == 0
    assert anls("apples", "apples") == 1
    metric = ANLS()
    metric.update(["e", "apples"], ["apples", "apples"])
    assert metric.compute() == 0.5


@pytest.mark.parametrize("references", [b"e", [b"e"], {"e": 1}, {"e"}, 5, [5], [["e"]], [None], None])
def test_references_that_are_no_texts_are_refused(references):
    with pytest.raises(InputError, match=r"question 17: references: .*give"):
        anls("e", references, question_id=17)
    with pytest.raises(InputError, match=r"question 17: references: .*give"):
        ANLS().update(["e"], [references], question_ids=[17])


@pytest.mark.parametrize("batch", ["ab", b"ab", {"a": 1, "b": 2}])
def test_a_batch_that_is_no_list_is_refused(batch):
    for name in ("preds", "target", "question_ids"):
        given = {"preds": ["a", "b"], "target": [["a"], ["b"]], "question_ids": [1, 2]}
        with pytest.raises(InputError, match=f"{name}: .*give a list"):
            ANLS().update(**{**given, name: batch})
    with pytest.raises(InputError, match="prediction is int 5: give a string"):
        ANLS().update([5], [["5"]])


def test_a_number_and_a_text_are_two_ids():
    metric = ANLS()
    metric.update(["a", "b"], [["a"], ["x"]], question_ids=[7, "7"])
    assert metric.compute() == 0.5


def test_no_references_is_an_error_that_names_the_question():
    with pytest.raises(InputError, match="question 17"):
        ANLS().update(["x"], [[]], question_ids=[17])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="argument"):
        ANLS().update(["x", "y"], [["x"]])


def test_each_question_id_counts_once():
    metric = ANLS()
    metric.update(["a", "b"], [["a"], ["x"]], question_ids=[1, "2"])
    metric.update(["b"], [["x"]], question_ids=["2"])
    assert metric.compute() == 0.5
    metric.reset()
    metric.update(["a", "a", "b"], [["a"], ["a"], ["x"]])
    assert metric.compute() == pytest.approx(2 / 3)


QUESTIONS = [
    ("paris", "paris"),
    ("rom", "rome"),
    ("x", "berlin"),
    ("oslo", "oslo"),
    ("", "y"),
    ("ab", "ac"),
    ("b", "b"),
]


def _score_a_share(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    idle = ANLS()  # a question type that only one rank meets
    if rank == 1:
        idle.update(["a"], [["a"]])
    assert idle.compute() == 1
    metric = ANLS()
    shares = [[0, 2, 4, 6], [1, 3, 5, 0]]  # as DistributedSampler pads 7 to 8
    for i in shares[rank]:
        metric.update([QUESTIONS[i][0]], [[QUESTIONS[i][1]]], question_ids=[i])
    (folder / f"{rank}.json").write_text(json.dumps(metric.compute().item()))
    torch.distributed.destroy_process_group()


def test_two_processes_count_seven_questions_as_seven(tmp_path):
    torch.multiprocessing.spawn(_score_a_share, (tmp_path,), nprocs=2)
    alone = ANLS()
    alone.update([p for p, _ in QUESTIONS], [[r] for _, r in QUESTIONS], question_ids=range(7))
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone.compute().item()


def test_pairs_without_an_id_count_one_by_one():
    metric = ANLS()
    metric.update(["a", "x", "b"], [["a"], ["y"], ["b"]], question_ids=[None, None, 7])
    metric.update(["b"], [["z"]], question_ids=[7])
    assert metric.compute() == pytest.approx(2 / 3)


def test_scores_are_plotted_between_0_and_1():
    metric = ANLS()
    metric.update(["a", "x"], [["a"], ["y"]])
    for plotted, scores in ((metric.plot(), [0.5]), (metric.plot([metric.compute(), torch.tensor(0.75)]), [0.5, 0.75])):
        _, axes = plotted
        assert [float(y) for line in axes.get_lines() for y in line.get_ydata()][: len(scores)] == scores
        low, high = axes.get_ylim()
        assert (low, high) == pytest.approx((0, 1), abs=0.11)
    MetricCollection({"validation": metric}).plot()

"""The synthetic data set and its form on disk."""

import json
import pickle

import pytest
from PIL import Image

from idefics_lit.data.pages import FAMILIES, page_questions
from idefics_lit.data.sources.splits import find_splits
from idefics_lit.data.sources.synthetic import SyntheticPages, write_docvqa
from idefics_lit.errors import InputError


def test_one_item_a_question():
    data = SyntheticPages("train", 6)
    assert len(data) == len(data.page_ids) == len(data.answers)
    assert len(set(data.page_ids)) == 6
    assert [family for ((family, _),) in dict.fromkeys(data.page_ids)] == ["form", "table", "letter"] * 2
    ids = [data[i].question_id for i in range(len(data))]
    assert len(set(ids)) == len(ids)


def test_examples_are_the_pages_questions():
    data = SyntheticPages("test", 2, families=["receipt"])
    for i in range(len(data)):
        example = data[i]
        asked = {question.text: question for question in page_questions(*data.page_ids[i][0])}
        assert example.answers == asked[example.question].answers == data.answers[i]
        assert example.question_types == [asked[example.question].type]
        assert example.images[0].mode == "L" and example.images[0].size == (448, 336)
        assert "receipt" in example.source


def test_splits_and_seeds_share_no_page():
    sets = [SyntheticPages(split, 5, seed) for split in ("train", "validation", "test") for seed in (0, 1)]
    pages = [page for data in sets for page in set(data.page_ids)]
    assert len(set(pages)) == len(pages) == 30
    assert SyntheticPages("train", 5).page_ids == SyntheticPages("train", 5).page_ids


def test_a_larger_set_begins_with_the_smaller_one():
    small, large = SyntheticPages("train", 3), SyntheticPages("train", 9)
    assert large.page_ids[: len(small)] == small.page_ids


def test_it_travels_to_a_worker():
    data = SyntheticPages("train", 2)
    assert pickle.loads(pickle.dumps(data))[0].question == data[0].question


def test_unknown_family():
    with pytest.raises(InputError, match="choose from"):
        SyntheticPages("train", 2, families=["map"])


def test_write_docvqa(tmp_path):
    data = SyntheticPages("val", len(FAMILIES), families=FAMILIES)
    path = write_docvqa(data, tmp_path / "pages")
    assert path.name == "val_v1.0_withQT.json"
    written = json.loads(path.read_text())
    assert written["dataset_split"] == "val" and len(written["data"]) == len(data)
    for row, i in zip(written["data"], range(len(data)), strict=True):
        example = data[i]
        assert (row["questionId"], row["question"], row["answers"]) == (
            example.question_id,
            example.question,
            example.answers,
        )
        assert row["question_types"] == example.question_types
        with Image.open(path.parent / row["image"]) as image:
            assert image.tobytes() == example.images[0].tobytes()
    assert len(list((path.parent / "documents").iterdir())) == len(FAMILIES)


def test_written_pages_read_back(tmp_path):
    official = pytest.importorskip("idefics_lit.data.sources.official")
    data = SyntheticPages("train", 2)
    read = official.OfficialDocVQA(write_docvqa(data, tmp_path))
    assert len(read) == len(data)
    assert read[0].question == data[0].question and read[0].answers == data[0].answers


def test_predict_answers_a_test_split_of_a_minute():
    """The quickstart's checkpoint doesn't limit it."""
    assert 150 < len(find_splits("synthetic:id_card", None, None, "en", 0)["test"]()) < 250

"""DocVQA's official form."""

import json
import shutil

import pytest
from PIL import Image

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.sources.official import OfficialDocVQA, find_official_splits
from idefics_lit.errors import InputError
from idefics_lit.pretrained import load_processor


def write(folder, name="train_v1.0_withQT.json", rows=1, page=None, pages="documents", **changes):
    """Write an official JSON with its page; ``changes`` are made to every row, None drops a key."""
    (folder / pages).mkdir(parents=True, exist_ok=True)
    (page or Image.new("RGB", (40, 30), "white")).save(folder / pages / "p.png")
    row = {"questionId": 7, "question": "What?", "image": "documents/p.png", "answers": ["a", "b"], **changes}
    row = {key: value for key, value in row.items() if value is not None}
    data = [{**row, "questionId": row["questionId"] + i} if "questionId" in row else row for i in range(rows)]
    (folder / name).write_text(json.dumps({"dataset_split": "train", "data": data}))
    return folder / name


def test_reads_a_folder(docvqa):
    splits = find_official_splits(docvqa)
    train, val = OfficialDocVQA(splits["train"]), OfficialDocVQA(splits["val"])
    assert (len(train), len(val)) == (24, 5)
    example = train[0]
    assert (example.question_id, example.question) == (60042, "What is the OMB number of the form?")
    assert example.answers == ["4040-0004"]
    assert example.question_types == []
    assert "train.json, row 0 (questionId 60042, image documents/sf424_p2.png)" in example.source
    assert len(set(train.page_ids)) < len(train)
    assert not set(train.page_ids) & set(val.page_ids)


@pytest.mark.parametrize(
    ("name", "split"),
    [("train_v1.0_withQT.json", "train"), ("val_v1.0.json", "val"), ("test_v1.0.json", "test"), ("mine.json", "train")],
)
def test_the_name_or_the_content_tells_the_split(tmp_path, name, split):
    file = write(tmp_path, name)
    assert find_official_splits(tmp_path) == find_official_splits(file) == {split: file}


def test_two_files_of_one_split_are_refused(tmp_path):
    write(tmp_path, "train_a.json")
    write(tmp_path, "mine.json")
    with pytest.raises(InputError, match=r"mine.json and train_a.json both hold split 'train'"):
        find_official_splits(tmp_path)


def test_numbers_stay_as_they_are_written(tmp_path):
    file = write(tmp_path, question="QUESTION", answers="ANSWERS")
    numbers = ["0.10", "1e3", "1976.0", "1976", "100000000000000000000", "true"]
    file.write_text(file.read_text().replace('"QUESTION"', "0.50").replace('"ANSWERS"', f"[{', '.join(numbers)}]"))
    example = OfficialDocVQA(file)[0]
    assert (example.question_id, example.question, example.answers) == (7, "0.50", numbers)


def test_reads_newer_archives(tmp_path):
    file = write(tmp_path, pages="spdocvqa_images", question_types=["form"])
    example = OfficialDocVQA(file)[0]
    assert example.images[0].size == (40, 30)
    assert example.question_types == ["form"]


def test_no_other_folders_image_is_taken_for_a_missing_one(tmp_path):
    """docA/1.png is another page than docB/1.png; only the official folders may be called otherwise."""
    names = ["docA/1.png", "docB/1.png", "documents/docA/1.png", "documents/1.png", "1.png", "./documents/1.png"]
    rows = [{"questionId": i, "question": "?", "image": name, "answers": ["a"]} for i, name in enumerate(names)]
    (tmp_path / "train.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 3), 7).save(tmp_path / "images" / "1.png")
    examples = OfficialDocVQA(tmp_path / "train.json")
    assert sorted(examples.faults) == [0, 1, 2]
    assert all(f"image {names[i]}): the image file is missing in" in line for i, line in examples.faults.items())
    (tmp_path / "images" / "docA").mkdir()
    Image.new("L", (4, 3), 8).save(tmp_path / "images" / "docA" / "1.png")
    examples = OfficialDocVQA(tmp_path / "train.json")
    assert sorted(examples.faults) == [1]
    assert [examples[i].images[0].getpixel((0, 0)) for i in (0, 2, 3, 4, 5)] == [8, 8, 7, 7, 7]


def test_two_official_folders_with_other_images_of_one_name_are_refused(tmp_path):
    row = {"questionId": 1, "question": "?", "image": "documents/1.png", "answers": ["a"]}
    (tmp_path / "train.json").write_text(json.dumps({"data": [row]}))
    for grey, name in enumerate(("spdocvqa_images", "images")):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 3), grey).save(tmp_path / name / "1.png")
    (fault,) = OfficialDocVQA(tmp_path / "train.json").faults.values()
    assert fault.endswith("spdocvqa_images/1.png and " + f"{tmp_path}/images/1.png are different images: move one away")
    Image.new("L", (4, 3), 0).save(tmp_path / "images" / "1.png")
    assert not OfficialDocVQA(tmp_path / "train.json").faults


def test_a_test_split_has_no_answers(tmp_path):
    assert OfficialDocVQA(write(tmp_path, answers=None))[0].answers == []


def test_a_single_answer_is_not_spelled_out(tmp_path):
    assert OfficialDocVQA(write(tmp_path, answers="abc"))[0].answers == ["abc"]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_every_kind_of_image_is_collated(tmp_path, tiny, mode):
    file = write(tmp_path, page=Image.new(mode, (40, 30)))
    batch = Idefics2Collator(load_processor(tiny), train=True)([OfficialDocVQA(file)[0]])
    assert batch.pixel_values.shape[:3] == (1, 1, 3)


def test_opening_decodes_no_page(tmp_path, monkeypatch):
    file = write(tmp_path, rows=3)
    monkeypatch.setattr(Image, "open", lambda *args: pytest.fail("a page was opened"))
    assert len(OfficialDocVQA(file)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questionId": None}, "row 0 .*no 'questionId'"),
        ({"question": ""}, r"row 0 \(questionId 7, .*no 'question'"),
        ({"image": None}, "row 0 .*no 'image'"),
        ({"image": "documents/q.png"}, "row 0 .*image documents/q.png.*missing"),
        ({"image": "../outside.png"}, "row 0 .*lies outside"),
        ({"image": "a" * 5000}, "row 0 .*missing"),
        ({"image": "p\0.png"}, "row 0 .*missing"),
        ({"image": ["documents/p.png"]}, "row 0 .*'image' holds list where a text should be: mend it or drop"),
        ({"question": "  \n"}, r"row 0 \(questionId 7, .*no 'question'"),
        ({"question": float("nan")}, r"row 0 \(questionId 7, .*no 'question'"),
        ({"question": {"en": "What?"}}, "row 0 .*'question' holds dict where a text should be"),
        ({"question": "\ud800"}, r"row 0 .*'question' holds '\\ud800', a character that is no text: mend it or drop"),
        ({"answers": {"text": ["a"]}}, "row 0 .*'answers' holds dict where a text should be"),
        ({"answers": [["a"]]}, "row 0 .*'answers' holds list where a text should be"),
        ({"answers": ["a", "b\udfff"]}, r"row 0 .*'answers' holds '\\udfff', a character that is no text"),
        ({"question_types": [{}]}, "row 0 .*'question_types' holds dict where a text should be"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changes, message):
    file = write(tmp_path / "data", **changes)
    shutil.copy(tmp_path / "data" / "documents" / "p.png", tmp_path / "outside.png")
    rows = OfficialDocVQA(file)
    assert (len(rows), rows.answers, list(rows.faults)) == (1, [[]], [0])
    with pytest.raises(InputError, match=message) as caught:
        rows[0]
    assert str(caught.value) == rows.faults[0]


def test_a_bad_row_leaves_the_others_alone(tmp_path):
    file = write(tmp_path, rows=3)
    data = json.loads(file.read_text())
    data["data"][1] = "a question"
    file.write_text(json.dumps(data))
    rows = OfficialDocVQA(file)
    assert rows.faults == {1: f"{file}, row 1: not a JSON object: drop the row"}
    assert rows.page_ids[0] == rows.page_ids[2] != rows.page_ids[1]
    assert [rows[0].question_id, rows[2].question_id] == [7, 9]
    assert rows.source(1) == f"{file}, row 1"


@pytest.mark.parametrize(
    ("answers", "read"),
    [
        ([5, 2.5, True], ["5", "2.5", "true"]),
        (1976, ["1976"]),
        ([None, "", " \t", float("nan"), "a"], ["a"]),
        (["\x00\x1b[31m", "שלום", "👩‍👩‍👧", "a" * 10_000], ["\x00\x1b[31m", "שלום", "👩‍👩‍👧", "a" * 10_000]),
    ],
)
def test_what_is_taken_for_an_answer(tmp_path, answers, read):
    assert OfficialDocVQA(write(tmp_path, answers=answers))[0].answers == read


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    file = write(tmp_path)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert OfficialDocVQA(file)[0].question == "What?"


def test_a_broken_page_is_named_when_it_is_asked_for(tmp_path):
    file = write(tmp_path, rows=2)
    page = tmp_path / "documents" / "p.png"
    page.write_bytes(page.read_bytes()[:60])
    rows = OfficialDocVQA(file)
    with pytest.raises(InputError, match=r"row 1 \(questionId 8, image documents/p.png\): the image can't be read"):
        rows[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [{"questionId": 1, "que', "not a readable JSON file"),
        ('{"questions": [{"questionId": 1}]}', "not of the official DocVQA form"),
        ('{"data": {"questions": []}}', "not of the official DocVQA form"),
        ('{"data": ' + "[" * 100_000, "not a readable JSON file"),
        ('{"data": [], "dataset_split": ["a"]}', "'dataset_split' holds list where a text should be"),
    ],
)
def test_a_bad_json_is_named(tmp_path, text, message):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"mine.json.*{message}"):
        [OfficialDocVQA(file) for file in find_official_splits(tmp_path).values()]

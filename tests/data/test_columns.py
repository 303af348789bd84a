"""Small files in the exact forms that data sets are published in, read as a user has them read."""

import io
import json
from itertools import islice

import datasets
import pytest
from PIL import Image

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.sources.hub import HubDocVQA
from idefics_lit.data.sources.splits import find_splits
from idefics_lit.data.sources.streaming import find_streams
from idefics_lit.data.streamed_questions import StreamedQuestions
from idefics_lit.errors import InputError


def page(grey):
    return Image.new("L", (40, 30), grey)


def stored(grey):
    page(grey).save(png := io.BytesIO(), "PNG")
    return {"bytes": png.getvalue(), "path": None}


def greys(example):
    return [image.getpixel((0, 0)) for image in example.images]


TEXT = datasets.Value("string")
TURN = {"user": TEXT, "assistant": TEXT, "source": TEXT}
CAULDRON = datasets.Features({"images": datasets.List(datasets.Image()), "texts": datasets.List(TURN)})


def said(user, assistant, source="DocVQA"):
    return {"user": user, "assistant": assistant, "source": source}


def cauldron():
    """Three documents: one page and three questions, three pages and two questions, and one of each."""
    return [
        {
            "images": [stored(10)],
            "texts": [
                said("What is the date?\nGive a very brief answer.", "July 4."),
                said("Who signed?\nYour answer should be very brief.", "Ann."),
                said("How many?\nAnswer briefly.", "3."),
            ],
        },
        {"images": [stored(20), stored(21), stored(22)], "texts": [said("a?", "b", "made"), said("c?", "d", "made")]},
        {"images": [stored(30)], "texts": [said("e?", "f", "made")]},
    ]


def infographic(split):
    """lmms-lab/DocVQA's InfographicVQA: four columns of lists, a test split without what would tell the answer."""
    row = {
        "questionId": "98313",
        "question": "Which social platform has heavy female audience?",
        "answers": ["pinterest"],
        "answer_type": ["single span"],
        "image": stored(40),
        "image_url": "https://example.com/female-audience.jpg",
        "operation/reasoning": [],
        "ocr": '{"PAGE": null}',
        "data_split": split,
    }
    counted = {"answers": ["2", "two"], "answer_type": ["non-extractive"], "operation/reasoning": ["counting"]}
    rows = [row, {**row, "questionId": "98314", "question": "How many?", **counted}]
    return rows if split == "val" else [{**r, "answers": None, "answer_type": None} for r in rows]


LIST = datasets.List(TEXT)
INFOGRAPHIC = datasets.Features(
    {
        **dict.fromkeys(("questionId", "question", "image_url", "ocr", "data_split"), TEXT),
        **dict.fromkeys(("answers", "answer_type", "operation/reasoning"), LIST),
        "image": datasets.Image(),
    }
)
MP = datasets.Features(
    {
        **dict.fromkeys(("questionId", "question", "doc_id", "page_ids", "answers"), TEXT),
        **dict.fromkeys(("answer_page_idx", "data_split"), TEXT),
        **{f"image_{number}": datasets.Image() for number in range(1, 21)},
    }
)


def mp_row(question_id, pages, answers, answer_page, split="val"):
    """lmms-lab/MP-DocVQA's: lists are texts in Python's notation, pages have a column each."""
    images = {f"image_{number}": None for number in range(1, 21)}
    images |= {f"image_{number}": stored(grey) for number, grey in enumerate(pages, start=1)}
    return {
        "questionId": str(question_id),
        "question": f"What is in {question_id}?",
        "doc_id": f"doc{pages[0]}",
        "page_ids": str([f"doc{pages[0]}_p{number}" for number in range(len(pages))]),
        "answers": str(answers),
        "answer_page_idx": str(answer_page),
        "data_split": split,
        **images,
    }


MP_ROWS = [
    mp_row(49153, [50, 51, 52], ["0.28", "it's"], 1),
    mp_row(49154, [50, 51, 52], ["Ann"], 2),
    mp_row(49155, [60], ["1976"], 0),
    mp_row(49156, list(range(70, 90)), ["b"], 19),
]


def save(folder, rows, features, split="train"):
    """Write a split as it lies on the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    made = datasets.Dataset.from_list(rows, features=features)
    made.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def write(folder, name, split, rows):
    """Write a JSON in the RRC's form."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{**row, "data_split": split} for row in rows]
    head = {"dataset_name": "of the RRC", "dataset_version": "1.0", "dataset_split": split}
    (folder / name).write_text(json.dumps({**head, "data": rows}))


def opened(source):
    return {split: open_split() for split, open_split in find_splits(str(source), None, None, "en", 0).items()}


def summaries(examples):
    """What is read of each question; the id first."""
    read = list(examples) if isinstance(examples, list) else [examples[i] for i in range(len(examples))]
    return [(e.question_id, e.question, e.answers, greys(e), e.question_types, e.answer_page) for e in read]


def streamed(source, count, split="train"):
    """An epoch of a stream, in the order of the questions' ids, which are others."""
    questions = StreamedQuestions(find_streams(str(source), None, None, "en")[split])
    return summaries(sorted(islice(questions, count), key=lambda example: example.question_id))


def without_ids(read):
    return [some[1:] for some in read]


# The Cauldron and Docmatix


def test_each_turn_of_a_row_is_a_question(tmp_path):
    source = save(tmp_path / "set", cauldron(), CAULDRON)
    train = opened(source)["train"]
    read = summaries(train)
    assert read == [
        ("0/0", "What is the date?\nGive a very brief answer.", ["July 4."], [10], [], None),
        ("0/1", "Who signed?\nYour answer should be very brief.", ["Ann."], [10], [], None),
        ("0/2", "How many?\nAnswer briefly.", ["3."], [10], [], None),
        ("1/0", "a?", ["b"], [20, 21, 22], [], None),
        ("1/1", "c?", ["d"], [20, 21, 22], [], None),
        ("2/0", "e?", ["f"], [30], [], None),
    ]
    assert train.answers == [some[2] for some in read] and not train.faults
    assert [len(pages) for pages in train.page_ids] == [1, 1, 1, 3, 3, 1]
    assert [train.page_ids.index(pages) for pages in train.page_ids] == [0, 0, 0, 3, 3, 5]
    assert train.source(4) == train[4].source == f"{source} train, row 1, question 1"
    assert without_ids(streamed(source, 6)) == without_ids(read)


def test_turns_share_a_row_of_the_batch_and_are_held_out_together(tiny, tmp_path):
    source = save(tmp_path / "set", cauldron(), CAULDRON)
    data = DocVQADataModule(str(source), tiny, held_out=0.34, batch_size=6, num_workers=0, questions_per_page=3)
    data.setup("fit")
    train, val = data.examples["train"], data.examples["val"]
    assert len(set(train.page_ids)) == 2 and len(set(val.page_ids)) == 1 and not {*train.page_ids} & {*val.page_ids}
    assert len(train) + len(val) == 6
    (batch,) = data.train_dataloader()
    assert len(batch.question_ids) == len(train) and len(batch.input_ids) == 2


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "row 1: 'texts' is no list of user's and assistant's texts: drop the row"),
        ([said(" ", "b")], "row 1, question 0: no question in column 'texts': drop the row"),
        ([said("a?", "b"), said(None, "b")], "row 1, question 1: no question in column 'texts': drop the row"),
    ],
)
def test_a_bad_turn_is_named(texts, message):
    rows = cauldron()
    rows[1]["texts"] = texts
    examples = HubDocVQA(datasets.Dataset.from_list(rows, features=CAULDRON), "set")
    (fault,) = examples.faults.values()
    assert fault == f"set, {message}"
    good = [i for i in range(len(examples)) if i not in examples.faults]
    assert [examples[i].question_id for i in good][-1] == "2/0"
    with pytest.raises(InputError, match=message):
        examples[next(iter(examples.faults))]


def test_a_row_without_turns_has_no_question_and_a_turn_without_answer_no_reference():
    rows = [{**cauldron()[0], "texts": []}, {**cauldron()[1], "texts": [said("a?", None)]}]
    examples = HubDocVQA(datasets.Dataset.from_list(rows, features=CAULDRON), "set")
    assert (len(examples), examples.answers, examples[0].question_id) == (1, [[]], "1/0")


# InfographicVQA


def infographic_folder(folder, images="infographicsvqa_images"):
    """Task 3 of the RRC: the JSON names the image alone; types of three kinds for the validation split."""
    (folder / images).mkdir(parents=True)
    for name, grey in (("20471.jpeg", 0), ("37313.jpeg", 255)):
        page(grey).save(folder / images / name)
    row = {
        "questionId": 65718,
        "question": "Which platform?",
        "image_local_name": "20471.jpeg",
        "image_url": "https://example.com/a.jpg",
        "ocr_output_file": "20471.json",
        "answers": ["pinterest"],
    }
    rows = [row, {**row, "questionId": 65719, "question": "How many?", "answers": ["2", "two"]}]
    rows[1] |= {"image_local_name": "37313.jpeg", "ocr_output_file": "37313.json"}
    types = [
        {"answer_type": ["single span"], "evidence": ["text"], "operation/reasoning": []},
        {"answer_type": ["non-extractive"], "evidence": ["table/list", "figure"], "operation/reasoning": ["counting"]},
    ]
    with_types = [{**row, **kinds} for row, kinds in zip(rows, types, strict=True)]
    write(folder, "infographicsVQA_train_v1.0.json", "train", rows)
    write(folder, "infographicsVQA_val_v1.0_withQT.json", "val", with_types)
    asked = [{key: value for key, value in row.items() if key != "answers"} for row in rows]
    write(folder, "infographicsVQA_test_v1.0.json", "test", asked)
    return folder


@pytest.mark.parametrize("images", ["infographicsvqa_images", "images"])
def test_infographicvqa_of_the_rrc(tmp_path, images):
    folder = infographic_folder(tmp_path, images)
    splits = opened(folder)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 2, "val": 2, "test": 2}
    read = summaries(splits["val"])
    assert read == [
        (65718, "Which platform?", ["pinterest"], [0], ["single span", "text"], None),
        (65719, "How many?", ["2", "two"], [255], ["non-extractive", "table/list", "figure", "counting"], None),
    ]
    assert summaries(splits["train"]) == [(*some[:4], [], None) for some in read]
    assert splits["test"].answers == [[], []]
    file = folder / "infographicsVQA_val_v1.0_withQT.json"
    assert splits["val"].source(0) == f"{file}, row 0 (questionId 65718, image_local_name 20471.jpeg)"
    (folder / images / "20471.jpeg").unlink()
    assert "image_local_name 20471.jpeg): the image file is missing" in opened(folder)["val"].faults[0]


def test_infographicvqa_of_the_hub(tmp_path):
    for split in ("validation", "test"):
        save(tmp_path / "set", infographic("val" if split == "validation" else split), INFOGRAPHIC, split)
    splits = opened(tmp_path / "set")
    question, counted = "Which social platform has heavy female audience?", ["non-extractive", "counting"]
    assert summaries(splits["validation"]) == [
        ("98313", question, ["pinterest"], [40], ["single span"], None),
        ("98314", "How many?", ["2", "two"], [40], counted, None),
    ]
    assert splits["test"].answers == [[], []] and summaries(splits["test"])[1][4] == ["counting"]
    assert len(set(splits["validation"].page_ids)) == 1  # by their pixels


# MP-DocVQA


def mp_folder(folder):
    """Task 4 of the RRC: ids of pages, which are images/ID.jpg."""
    (folder / "images").mkdir(parents=True)
    pages = {f"ffbg0227_p{number}": 80 * number for number in range(3)} | {"snbx0223_p26": 255}
    for page_id, grey in pages.items():
        Image.new("L", (448, 336), grey).save(folder / "images" / f"{page_id}.jpg", quality=100)
    names = list(pages)
    rows = [
        {"questionId": 49153, "question": "a?", "doc_id": "ffbg0227", "page_ids": names[:3]},
        {"questionId": 24581, "question": "b?", "doc_id": "ffbg0227", "page_ids": names[:3]},
        {"questionId": 16394, "question": "c?", "doc_id": "snbx0223", "page_ids": names[3:]},
    ]
    answered = [
        {**row, "answers": answers, "answer_page_idx": answer_page}
        for row, answers, answer_page in zip(rows, (["0.28", "x"], ["Ann"], ["b"]), (1, 2, 0), strict=True)
    ]
    write(folder, "train.json", "train", answered)
    write(folder, "val.json", "val", answered)
    write(folder, "test.json", "test", rows)
    return folder


def test_mp_docvqa_of_the_rrc(tmp_path):
    folder = mp_folder(tmp_path / "data")
    splits = opened(folder)
    assert summaries(splits["val"]) == [
        (49153, "a?", ["0.28", "x"], [0, 80, 160], [], 1),
        (24581, "b?", ["Ann"], [0, 80, 160], [], 2),
        (16394, "c?", ["b"], [255], [], 0),
    ]
    first, second, third = splits["val"].page_ids
    assert first == second != third
    assert summaries(splits["test"])[1] == (24581, "b?", [], [0, 80, 160], [], None)
    assert "val.json, row 2 (questionId 16394, page_ids ['snbx0223_p26'])" in splits["val"].source(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_ids": []}, "no 'page_ids': add it or drop the row"),
        ({"page_ids": ["ffbg0227_p0", None]}, "no 'page_ids': add it or drop the row"),
        ({"page_ids": ["ffbg0227_p9"]}, "the image file is missing in"),
        ({"page_ids": ["../../outside"]}, "the image lies outside the data's folder"),
        ({"page_ids": [["ffbg0227_p0"]]}, "'page_ids' holds list where a text should be: mend it or drop the row"),
        ({"answer_page_idx": "two"}, "'answer_page_idx' holds 'two' where the number of a page should be"),
    ],
)
def test_a_bad_row_of_mp_docvqa_is_named(tmp_path, changes, message):
    folder = mp_folder(tmp_path / "data")
    page(0).save(tmp_path / "outside.jpg")
    content = json.loads((folder / "val.json").read_text())
    content["data"][1] |= changes
    (folder / "val.json").write_text(json.dumps(content))
    (fault,) = opened(folder)["val"].faults.values()
    assert fault.startswith(f"{folder / 'val.json'}, row 1 (questionId 24581, ") and message in fault


def test_mp_docvqa_of_the_hub(tmp_path):
    asked = [{**row, "answers": "None", "answer_page_idx": "None"} for row in MP_ROWS]
    for split, rows in (("val", MP_ROWS), ("test", asked)):
        save(tmp_path / "set", rows, MP, split)
    splits = opened(tmp_path / "set")
    (split,) = [split for split in splits if split.startswith("val")]  # `datasets` calls it validation
    read = summaries(splits[split])
    assert read == [
        ("49153", "What is in 49153?", ["0.28", "it's"], [50, 51, 52], [], 1),
        ("49154", "What is in 49154?", ["Ann"], [50, 51, 52], [], 2),
        ("49155", "What is in 49155?", ["1976"], [60], [], 0),
        ("49156", "What is in 49156?", ["b"], list(range(70, 90)), [], 19),
    ]
    assert [splits[split].page_ids.count(page) for page in splits[split].page_ids] == [2, 2, 1, 1]
    assert summaries(splits["test"]) == [(*some[:2], [], some[3], [], None) for some in read]
    assert streamed(tmp_path / "set", 4, split) == read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_1": None}, "row 1: no image in column 'image_1'"),
        ({"image_1": None, "image_2": None, "image_3": None}, "row 1: no image in column 'image_1'"),
        ({"answer_page_idx": "second"}, "column 'answer_page_idx' holds 'second' where the number of a page should be"),
    ],
)
def test_a_bad_row_of_the_hubs_mp_docvqa_is_named(changes, message):
    rows = [MP_ROWS[0], {**MP_ROWS[1], **changes}]
    examples = HubDocVQA(datasets.Dataset.from_list(rows, features=MP), "set")
    assert examples[0].answers == ["0.28", "it's"]
    with pytest.raises(InputError, match=message):
        examples[1]


def test_answers_that_are_no_list_are_taken_as_they_are():
    """Also those that look like one in a form that stores lists as lists."""
    rows = [{**MP_ROWS[2], "answers": answers} for answers in ("1976", "[1976", "[]", '["a", "\\u00e9"]')]
    assert HubDocVQA(datasets.Dataset.from_list(rows, features=MP), "set").answers == [
        ["1976"],
        ["[1976"],
        [],
        ["a", "é"],
    ]
    row = {"question": "a?", "image": stored(0), "answer": "[1]"}
    made = datasets.Dataset.from_list([row]).cast_column("image", datasets.Image())
    assert HubDocVQA(made, "set").answers == [["[1]"]]


# What a user runs


def flags(tiny, source, *more):
    flags = ["--model.pretrained", tiny, "--model.quantization", "none", "--model.max_new_tokens", 4]
    flags += ["--data.source", source, "--data.image_size", 112, "--data.num_workers", 0]
    flags += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.logger", "false"]
    return [*flags, *more]


def lines(file):
    return [json.loads(line) for line in file.open()]


def test_mp_docvqa_is_checked_validated_and_predicted(run, tiny, tmp_path, capfd):
    source = mp_folder(tmp_path / "data")
    run("check", *flags(tiny, source))
    assert "broken rows" in capfd.readouterr().out
    folder = run("validate", *flags(tiny, source))
    assert "val/answer_page_accuracy" in capfd.readouterr().out
    records = lines(folder / "val_predictions.jsonl")
    assert [record["reference_page"] for record in records] == [1, 2, 0]
    assert records[2]["answer_page"] == 0 and all(0 <= record["answer_page"] < 3 for record in records)
    run("predict", *flags(tiny, source))
    submission = json.loads((folder / "submission.json").read_text())
    assert [list(answer) for answer in submission] == [["questionId", "answer", "answer_page"]] * 3
    assert [answer["questionId"] for answer in submission] == [49153, 24581, 16394]
    assert [answer["answer_page"] for answer in submission] == [record["answer_page"] for record in records]
    predicted = lines(folder / "predictions.jsonl")
    assert [record["answer_page"] for record in predicted] == [answer["answer_page"] for answer in submission]
    assert all("reference_page" not in record for record in predicted)


def test_the_accuracy_of_pages_is_their_share(run, tiny, tmp_path):
    source = mp_folder(tmp_path / "data")
    folder = run("predict", *flags(tiny, source))
    pages = [answer["answer_page"] for answer in json.loads((folder / "submission.json").read_text())]
    content = json.loads((source / "val.json").read_text())
    content["data"][0]["answer_page_idx"], content["data"][1]["answer_page_idx"] = pages[0], (pages[1] + 1) % 3
    (source / "val.json").write_text(json.dumps(content))
    csv = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", tmp_path / "logs"]
    run("validate", *flags(tiny, source, *csv))
    (metrics,) = tmp_path.glob("logs/**/metrics.csv")
    header, values = (line.split(",") for line in metrics.read_text().splitlines())
    assert float(dict(zip(header, values, strict=True))["val/answer_page_accuracy"]) == pytest.approx(2 / 3)


def test_pages_too_many_for_max_length_are_named(run, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("validate", *flags(tiny, mp_folder(tmp_path / "data"), "--data.max_length", 200))
    error = capsys.readouterr().err
    assert "row 0 (questionId 49153" in error and "tokens are more than 200" in error and "data.max_length" in error


def test_the_cauldron_is_fitted_and_predicted(run, tiny, tmp_path):
    source = save(tmp_path / "set", cauldron(), CAULDRON)
    held = ["--data.held_out", 0.34, "--data.batch_size", 4, "--data.questions_per_page", 4]
    fit = ["--trainer.max_steps", 1, "--trainer.enable_checkpointing", "false", "--trainer.num_sanity_val_steps", 0]
    folder = run("fit", *flags(tiny, source, *held, *fit))
    assert all("answer_page" not in record for record in lines(folder / "val_predictions.jsonl"))
    run("predict", *flags(tiny, source, "--data.predict_split", "train"))
    submission = json.loads((folder / "submission.json").read_text())
    assert [answer["questionId"] for answer in submission] == ["0/0", "0/1", "0/2", "1/0", "1/1", "2/0"]
    assert all("answer_page" in answer for answer in submission)  # where there are several, which it may be on


def test_infographicvqa_is_scored_by_its_types(run, tiny, tmp_path, capfd):
    folder = run("validate", *flags(tiny, infographic_folder(tmp_path / "data")))
    screen = capfd.readouterr().out
    for kind in ("single span", "text", "non-extractive", "table/list", "figure", "counting"):
        assert f"val/anls_{kind}" in screen
    run("predict", *flags(tiny, tmp_path / "data"))
    submission = json.loads((folder / "submission.json").read_text())
    assert [(*answer,) for answer in submission] == [("questionId", "answer")] * 2

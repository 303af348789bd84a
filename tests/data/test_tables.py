"""CSV and JSONL files with images beside them."""

import csv
import gzip
import io
import json
import shutil
import warnings
from contextlib import suppress

import datasets
import pytest
from PIL import Image

from idefics_lit.data.sources.splits import find_splits
from idefics_lit.data.sources.streaming import find_streams
from idefics_lit.data.sources.tables import TableDocVQA, find_tables
from idefics_lit.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """A folder with two scans, one of them in a subfolder, and a page next to it."""
    folder = tmp_path / "pages"
    (folder / "scans").mkdir(parents=True)
    for path, grey in ((folder / "a.png", 0), (folder / "scans" / "b.png", 255), (tmp_path / "outside.png", 7)):
        Image.new("L", (40, 30), grey).save(path)
    return folder


def write(folder, text, name="train.csv", encoding="utf-8"):
    (folder / name).write_bytes(text.encode(encoding))
    return folder / name


def read(examples):
    assert not examples.faults
    rows = [examples[i] for i in range(len(examples))]
    return [(e.question_id, e.question, e.answers, [i.getpixel((0, 0)) for i in e.images]) for e in rows]


CSV = """\
id,question,image,answer
007,What?,a.png,0.10
8,"Who, then?",scans/b.png,"[""Ann"", ""Ann, of course"", 5]"
9,"When
is it?",a.png,1976-07-04

10,Which?,./a.png,N/A
"""
ROWS = [
    ("007", "What?", ["0.10"], [0]),
    ("8", "Who, then?", ["Ann", "Ann, of course", "5"], [255]),
    ("9", "When\nis it?", ["1976-07-04"], [0]),
    ("10", "Which?", ["N/A"], [0]),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_csv_is_read_as_it_is_written(folder, encoding, ends):
    file = write(folder, CSV.replace("\n", ends), encoding=encoding)
    examples = TableDocVQA(file)
    assert [(a, b.replace("\r\n", "\n"), c, d) for a, b, c, d in read(examples)] == ROWS
    assert examples.answers == [row[2] for row in ROWS]
    assert examples.page_ids[0] == examples.page_ids[2] != examples.page_ids[1]
    assert [examples.source(i) for i in range(4)] == [f"{file}, row {i} (line {n})" for i, n in enumerate((2, 3, 4, 7))]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_jsonl_is_read_as_it_is_written(folder, encoding):
    rows = [
        {"id": 7, "question": "Wann?", "image": "a.png", "answers": ["1976-07-04"]},
        {"id": 8, "question": "Qui ?", "image": "a.png", "answers": "[1]", "question_types": ["form", "date"]},
        {"id": 9, "question": "¿Quién?", "image": ["scans/b.png", "a.png"], "note": {"by": "me"}},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows[:2]) + "\n\n" + json.dumps(rows[2])
    file = write(folder, text, "pages.jsonl", encoding)
    examples = TableDocVQA(file)
    assert read(examples) == [
        (7, "Wann?", ["1976-07-04"], [0]),
        (8, "Qui ?", ["[1]"], [0]),
        (9, "¿Quién?", [], [255, 0]),
    ]
    assert examples[1].question_types == ["form", "date"]
    assert examples.source(2) == f"{file}, row 2 (line 4)"


WRITTEN = [
    "0.10",
    "007",
    "1e3",
    "N/A",
    "TRUE",
    "null",
    "nan",
    "1976",
    "0.5",
    "1976-07-04",
    "100000000000000000000",
    "-0",
]
NUMBERS = ["1976", "0.5", "0.10", "1e3", "1976.0", "100000000000000000000", "-0", "12345678901234567890.0", "true"]


def as_csv(answers, divider=",", image="image"):
    rows = [f"{number:03}{divider}{answer}?{divider}a.png{divider}{answer}" for number, answer in enumerate(answers)]
    return "\n".join([divider.join(("id", "question", image, "answer")), *rows])


def as_jsonl(answers, image="image"):
    """The answers are JSON, and so are the questions; ids are whole numbers and texts."""
    rows = [(f'"{number:03}"' if number % 2 else number, answer) for number, answer in enumerate(answers)]
    return "\n".join(f'{{"id": {n}, "question": {a}, "{image}": "a.png", "answers": [{a}, "b"]}}' for n, a in rows)


def quoted(answers):
    return [json.dumps(answer) for answer in answers]


@pytest.mark.parametrize("answers", [WRITTEN, NUMBERS])
@pytest.mark.parametrize(
    "name",
    ["train.csv", "train.tsv", "data/train.csv", "train/pages.tsv", "metadata.csv", "train/metadata.csv"],
)
def test_texts_of_cells_stay_as_they_are_written(folder, answers, name):
    (folder / name).parent.mkdir(exist_ok=True)
    Image.new("L", (40, 30), 9).save((folder / name).parent / "a.png")
    image = "file_name" if "metadata" in name else "image"
    write(folder, as_csv(answers, "\t" if name.endswith("tsv") else ",", image), name)
    splits = find_splits(str(folder), None, None, "en", 0)
    assert list(splits) == ["train"]
    assert read(splits["train"]()) == [(f"{n:03}", f"{answer}?", [answer], [9]) for n, answer in enumerate(answers)]


@pytest.mark.parametrize("answers", [quoted(WRITTEN), NUMBERS, [*NUMBERS, *quoted(WRITTEN)]])
@pytest.mark.parametrize(
    "name",
    ["train.jsonl", "train.ndjson", "data/train.jsonl", "data/train.json", "metadata.jsonl", "train/metadata.jsonl"],
)
def test_texts_of_json_stay_as_they_are_written(folder, answers, name):
    (folder / name).parent.mkdir(exist_ok=True)
    Image.new("L", (40, 30), 9).save((folder / name).parent / "a.png")
    text = as_jsonl(answers, "file_name" if "metadata" in name else "image")
    is_list = name.endswith(".json")
    write(folder, "[" + text.replace("\n", ",\n") + "]" if is_list else text, name)
    texts = [json.loads(answer) if answer.startswith('"') else answer for answer in answers]
    ids = [f"{number:03}" if number % 2 else number for number in range(len(texts))]
    examples = find_splits(str(folder), None, None, "en", 0)["train"]()
    assert read(examples) == [(i, text, [text, "b"], [9]) for i, text in zip(ids, texts, strict=True)]
    assert [type(example_id) for example_id, *_ in read(examples)] == list(map(type, ids))
    assert examples.source(1) == f"{folder / name}, row 1" + ("" if is_list else " (line 2)")


def test_more_images_than_tables_and_splits_of_several_files(folder):
    """`datasets` alone takes such a folder for one of images without questions."""
    for name in ("train/x.csv", "train/deep/y.tsv", "dev/z.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for grey in range(3):
            Image.new("L", (40, 30), 10 * grey + len(name)).save((folder / name).parent / f"{grey}.png")
    write(folder, "question,image,answers\nx?,1.png,0.10\nX?,scans/b.png,1\n", "train/x.csv")
    write(folder, "question\timage\tanswers\ny?\t2.png\t['007', 'N/A']\n", "train/deep/y.tsv")
    write(folder, '{"question": "z?", "image": "gone.png", "answer": 0.50}', "dev/z.jsonl")
    splits = {name: some() for name, some in find_splits(str(folder), None, None, "en", 0).items()}
    assert list(splits) == ["train", "validation"]
    questions = {question: (answers, pages) for _, question, answers, pages in read(splits["train"])}
    # A path is relative to its file, or else to the whole folder.
    assert questions == {"x?": (["0.10"], [21]), "X?": (["1"], [255]), "y?": (["007", "N/A"], [36])}
    assert splits["validation"].faults[0].startswith(f"{folder}/dev/z.jsonl, row 0 (line 1): the image file 'gone.png'")


@pytest.mark.parametrize("name", ["data/train.csv.gz", "train.jsonl.gz"])
def test_packed_texts_are_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.compress(as_csv(WRITTEN).encode()))
    for image in folder.rglob("*.png"):
        image.unlink()
    with pytest.raises(InputError, match=rf"{name}: `datasets` would unpack it .*: unpack it first"):
        find_splits(str(folder), None, None, "en", 0)


def test_texts_of_the_hub_stay_as_they_are_written(folder, monkeypatch):
    """Also where they were downloaded before, and the Hub can't be asked."""
    write(folder, as_csv(WRITTEN, image="file_name"), "metadata.csv")
    load, asked = datasets.load_dataset_builder, []

    def downloaded(source, repo_type, local_files_only):
        asked.append((source, repo_type, local_files_only))
        return str(folder)

    monkeypatch.setattr("idefics_lit.data.sources.tables.snapshot_download", downloaded)
    examples = [find_splits("me/pages", None, None, "en", 0)["train"]()]
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda source, *subset: load(str(folder), *subset))
    examples.append(find_splits("me/pages", None, None, "en", 0)["train"]())
    assert examples[0].answers == examples[1].answers == [[answer] for answer in WRITTEN]
    assert asked == [("me/pages", "dataset", True), ("me/pages", "dataset", False)]
    with pytest.warns(match=r"a stream of CSV and JSON files are read by `datasets`"), suppress(InputError):
        find_streams("me/pages", None, None, "en")


@pytest.mark.parametrize("name", ["train.csv", "train.tsv"])
def test_lists_in_cells_in_pythons_notation(folder, name, recwarn):
    """As pandas, NumPy, and pandas with a column of NumPy's arrays write them."""
    cells = {
        "['$ 12.80', '12.80']": ["$ 12.80", "12.80"],
        "[\"it's\", 'a \"b\"', 'c\\nd']": ["it's", 'a "b"', "c\nd"],
        "['$ 12.80' '12.80'\n 'x']": ["$ 12.80", "12.80", "x"],
        "['0.10', 0.10, 007.50, None, nan]": ["0.10", "0.10", "007.50"],
        "[np.str_('a'), np.float64(0.10)]": ["a", "0.10"],
        "[None]": [],
        "[1976, 0.50]": ["1976", "0.50"],
        "['a', 'b'] or so": ["['a', 'b'] or so"],
        "[sic]": ["[sic]"],
        "['don''t']": ["['don''t']"],
        "['a', ['b']]": ["['a', ['b']]"],
    }
    divider = "\t" if name.endswith("tsv") else ","
    text = io.StringIO()
    writer = csv.writer(text, delimiter=divider)
    writer.writerow(("question", "images", "answers"))
    writer.writerows((f"{number}?", "['a.png', 'scans/b.png']", cell) for number, cell in enumerate(cells))
    examples = TableDocVQA(write(folder, text.getvalue(), name))
    assert examples.answers == list(cells.values())
    assert {tuple(pages) for *_, pages in read(examples)} == {(0, 255)}
    python, brackets = [str(warning.message) for warning in recwarn if "train" in str(warning.message)]
    assert f"{name}: 17 cells in Python's notation are read as the lists" in python and "line 2, column" in python
    assert f"{name}: 3 questions have an answer in brackets, which is no list but one text. The first: " in brackets
    assert "row 8 (line 11): [sic]" in brackets


def test_questions_in_several_languages(folder):
    """As they are in nielsr/docvqa_1200_examples, and as pandas and JSON write that."""
    text = io.StringIO()
    rows = [("query", "image"), ("{'en': 'What?', 'fr': 'Quoi ?'}", "a.png"), ('{"en": "1e3?", "fr": null}', "a.png")]
    csv.writer(text).writerows([*rows, ("{x} is?", "a.png")])
    examples = TableDocVQA(write(folder, text.getvalue()))
    assert [question for _, question, *_ in read(examples)] == ["What?", "1e3?", "{x} is?"]
    french = TableDocVQA(
        write(folder, '{"query": {"en": "What?", "fr": 7}, "image": "a.png"}', "a.jsonl"), language="fr"
    )
    assert french[0].question == "7"


def test_a_cell_may_be_long(folder):
    long = "x" * 200_000
    examples = TableDocVQA(write(folder, f"question,image,answer,ocr\na?,a.png,b,{long}\n"))
    assert read(examples) == [(0, "a?", ["b"], [0])]


def test_a_json_may_be_a_jsonl_by_its_name(folder):
    (folder / "data").mkdir()
    write(folder, as_jsonl(NUMBERS), "data/train.json")
    assert find_splits(str(folder), None, None, "en", 0)["train"]().answers == [[number, "b"] for number in NUMBERS]


def test_answers_of_all_kinds_beside_one_another(folder):
    rows = [{"answers": answers} for answers in ([], None, ["a", None, ""], "b", 1976, [0.5])]
    text = "\n".join(json.dumps({"question": "a?", "image": "a.png", **row}) for row in [*rows, {}])
    examples = TableDocVQA(write(folder, text, "train.jsonl"))
    assert examples.answers == [[], [], ["a"], ["b"], ["1976"], ["0.5"], []]


def test_lists_in_cells(folder):
    text = "question,images,answers,question_types,answer_page\n"
    text += 'a?,"[""a.png"", ""scans/b.png""]",[1],,1\nb?,a.png,"[x, y",form,\n'
    examples = TableDocVQA(write(folder, text))
    assert read(examples) == [(0, "a?", ["1"], [0, 255]), (1, "b?", ["[x, y"], [0])]
    assert [(examples[i].question_types, examples[i].answer_page) for i in range(2)] == [([], 1), (["form"], None)]


def test_columns_may_be_named(folder):
    file = write(folder, "ask,scan,gold,number\na?,a.png,b,5\n")
    columns = {"question": "ask", "image": "scan", "answers": "gold", "question_id": "number"}
    assert read(TableDocVQA(file, columns)) == [("5", "a?", ["b"], [0])]
    with pytest.raises(InputError, match=r"train.csv: no column for question among ask, scan, gold, number: name it"):
        TableDocVQA(file)


def test_files_tell_their_split(folder):
    row = "question,image,answer\na?,a.png,b\n"
    assert find_tables(folder) == {}
    (folder / "notes.txt").write_text("")
    train, val, test = (write(folder, row, name) for name in ("train.csv", "val_2024.csv", "test.csv"))
    other = write(folder, json.dumps({"question": "a?", "image": "a.png"}), "pages.jsonl")
    assert find_tables(folder) == {"train": train, "val": val, "test": test}
    assert find_tables(other) == {"train": other} and find_tables(test) == {"test": test}
    assert {name: len(some()) for name, some in find_splits(str(folder), None, None, "en", 0).items()} == {
        **{"train": 1, "val": 1, "test": 1}
    }
    assert len(find_splits(str(other), None, None, "en", 0)["train"]()) == 1
    write(folder, "{}", "train.jsonl")
    with pytest.raises(InputError, match=r"train.csv and train.jsonl both hold split 'train': join them"):
        find_tables(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question;image\tanswer\n", "its header has semicolons and tabs: save it with commas"),
        ("question;image;answer\na?;a.png;b;c\n", "line 2: 4 cells, .* a text with a semicolon in it needs double"),
        ("question,image,answer\na?,a.png,b, c\n", "line 2: 4 cells, but the header has 3: a text with a comma in it"),
        ('question,image,answer\na?,a.png,"b\nc"\nd?,a.png\n', "line 4: 2 cells, but the header has 3"),
        ('question,image,answer\na?,a.png,"b\n', "line 2: unexpected end of data: mend its double quotes"),
        ('question,image,answer\na?,a.png,"b"c\n', "line 2: .* expected after .*: mend its double quotes"),
        ("question,image,question\na?,a.png,b\n", "two columns have the same name, of question, image, question"),
        ("question,image\n", "it has no rows"),
        ("", "it has no rows"),
        ('question,"image"s\n', "line 1: .* expected after .*: mend its double quotes"),
    ],
)
def test_a_bad_csv_is_named(folder, text, message):
    with pytest.raises(InputError, match=rf"pages/train.csv.*{message}"):
        TableDocVQA(write(folder, text))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a?", "image"', "line 2: not a JSON object .*: mend it"),
        ('["a?", "a.png"]', "line 2: list is not a JSON object: mend it"),
        ('{"question": "\\ud800"}', "line 2: not a JSON object .*surrogates not allowed.*: mend it"),
        ("[" * 100_000, "line 2: not a JSON object .*: mend it"),
        ('{"question": "a?", "question": "b?"}', "line 2: not a JSON object .'question' occurs twice in an object"),
    ],
)
def test_a_bad_jsonl_is_named(folder, line, message):
    with pytest.raises(InputError, match=rf"train.jsonl.*{message}"):
        TableDocVQA(write(folder, '{"question": "a?", "image": "a.png"}\n' + line, "train.jsonl"))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("c.png", r"the image file 'c.png' is missing in .*pages"),
        ("../outside.png", r"the image path ../outside.png lies outside the data's folder"),
        ("/etc/passwd", r"the image path /etc/passwd lies outside the data's folder"),
        ("https://example.com/a.png", r"the image path https://example.com/a.png lies outside the data's folder"),
        ("scans", r"the image file 'scans' is missing"),
        ("", r"no image in column 'image': drop the row"),
    ],
)
def test_an_image_that_is_not_there_is_known_before_it_is_opened(folder, image, message):
    examples = TableDocVQA(write(folder, f"question,image\na?,a.png\nb?,{image}\n"))
    assert examples[0].question == "a?"
    assert image == "" or list(examples.faults) == [1]
    with pytest.raises(InputError, match=rf"train.csv, row 1 \(line 3\): {message}"):
        examples[1]


def test_a_row_without_question_is_named(folder):
    examples = TableDocVQA(write(folder, "question,image\n ,a.png\nb?,a.png\n"))
    assert list(examples.faults.values()) == [
        f"{folder}/train.csv, row 0 (line 2): no question in column 'question': drop the row"
    ]
    assert examples[1].question == "b?"


def test_a_fit_and_a_prediction(run, tiny, folder, capfd):
    write(folder, CSV)
    write(folder, json.dumps({"id": "v1", "question": "a?", "image": "a.png", "answers": ["b"]}), "validation.jsonl")
    flags = ["--model.pretrained", tiny, "--model.quantization", "none", "--model.max_new_tokens", 2]
    flags += ["--data.source", folder, "--data.image_size", 112, "--data.num_workers", 0]
    flags += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.logger", "false"]
    run("check", *flags, "--trainer.max_steps", 1)
    assert capfd.readouterr().err == ""
    run("fit", *flags, "--trainer.max_steps", 1, "--trainer.enable_checkpointing", "false")
    run("predict", *flags, "--data.predict_split", "train")
    submission = json.loads((folder.parent / "submission.json").read_text())
    assert [answer["questionId"] for answer in submission] == ["007", "8", "9", "10"]
    assert "Hashing pages" not in capfd.readouterr().err
    with pytest.raises(SystemExit):
        run("fit", *flags, "--data.streaming", "true", "--data.limit_val", 1, "--trainer.max_steps", 1)
    assert "can't be streamed, and needn't be" in capfd.readouterr().err


@pytest.mark.parametrize(
    "other", ["val/val.csv", "validation.csv.gz", "validation.parquet", "validation.xlsx", "holdout.csv"]
)
def test_a_file_that_looks_like_a_split_and_is_not_read_is_named(folder, other):
    """Else pages of the training split would be validated on, and nobody would know."""
    write(folder, CSV)
    (folder / "val").mkdir()
    (folder / "val" / "scan.json").write_bytes(b"words of a page")
    (folder / "train.csv.gz").write_bytes(b"a copy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_splits(str(folder), None, None, "en", 0)
    (folder / other).write_bytes(b"")
    with pytest.warns(UserWarning, match=rf"not read beside train.csv: {other}. If .* same form as val.*.csv"):
        find_splits(str(folder), None, None, "en", 0)


def test_a_csv_beside_the_official_json_is_named_too(docvqa, tmp_path):
    shutil.copytree(docvqa, tmp_path / "pages")
    write(tmp_path / "pages", CSV, "test.csv")
    with pytest.warns(UserWarning, match=r"not read beside train.json: test.csv\..* as test.json"):
        find_splits(str(tmp_path / "pages"), None, None, "en", 0)


@pytest.mark.parametrize("cell", ["('a', 'b')", "{'a', 'b'}", "array(['a', 'b'], dtype=object)"])
def test_a_tuple_a_set_or_an_array_in_a_cell_is_named(folder, cell):
    file = write(folder, f'id,question,image,answer\n1,Q?,a.png,"{cell}"\n')
    with pytest.warns(UserWarning, match=r"1 questions have an answer in brackets, .*: train.csv|\(line 2\)"):
        assert TableDocVQA(file).answers == [[cell]]

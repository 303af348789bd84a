"""Which files of a folder are splits, and which split is for validation."""

import json
import warnings

import datasets
import pytest
from PIL import Image

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.sources.splits import find_splits
from idefics_lit.errors import InputError

HEADER = "question,image,answer\n"


@pytest.fixture
def folder(tmp_path):
    for grey in range(20):
        Image.new("L", (40, 30), grey).save(tmp_path / f"{grey}.png")
    return tmp_path


def write(folder, name, rows=20):
    """Write a table of the format of its name, a question about each page; the answers are the file's name."""
    (folder / name).parent.mkdir(exist_ok=True)
    values = [{"question": "a?", "image": f"{page}.png", "answer": name} for page in range(rows)]
    text = HEADER + "".join(f"a?,{page}.png,{name}\n" for page in range(rows))
    if name.endswith("json"):
        text = json.dumps(values)
    if name.endswith("jsonl"):
        text = "\n".join(map(json.dumps, values))
    (folder / name).write_text(text)


def fit(source, tiny, **options):
    module = DocVQADataModule(str(source), tiny, num_workers=0, **options)
    module.setup("fit")
    return [
        (len(split), {answer for answers in split.answers for answer in answers}) for split in module.examples.values()
    ]


@pytest.mark.parametrize("name", ["questions.csv", "Fragen 2024.tsv", "pages.jsonl", "questions.json", "values.csv"])
def test_a_table_alone_is_the_training_split(folder, tiny, name):
    write(folder, name)
    if name.endswith("tsv"):
        (folder / name).write_text((folder / name).read_text().replace(",", "\t"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert fit(folder, tiny) == [(19, {name}), (1, {name})]
        assert fit(folder / name, tiny) == [(19, {name}), (1, {name})]


@pytest.mark.parametrize(
    "name",
    ["dev.csv", "eval.csv", "valid.jsonl", "val.json", "Validation.csv", "evaluation_v2.csv", "my_dev_set.csv"],
)
@pytest.mark.parametrize("train", ["train.csv", "my_train.json", "training.jsonl"])
def test_a_validation_file_is_validated_on(folder, tiny, name, train):
    write(folder, train)
    write(folder, name, rows=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert fit(folder, tiny) == [(20, {train}), (3, {name})]


@pytest.mark.parametrize("folders", [("train/", "eval/"), ("data/", "data/")])
@pytest.mark.parametrize("name", ["dev", "eval"])
def test_a_validation_file_in_a_subfolder_is_validated_on(folder, tiny, folders, name):
    train, val = f"{folders[0]}train.csv", f"{folders[1]}{name}.csv"
    write(folder, train)
    write(folder, val, rows=3)
    assert fit(folder, tiny) == [(20, {train}), (3, {val})]


def test_a_validation_split_of_a_data_set_is_validated_on(folder, tiny):
    rows = {
        split: [{"question": "a?", "image": f"{page}.png", "answer": split} for page in range(5)]
        for split in ("train", "dev")
    }
    splits = {split: datasets.Dataset.from_list(values) for split, values in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "set"))
    assert fit(folder / "set", tiny, image_root=str(folder)) == [(5, {"train"}), (5, {"dev"})]


def test_two_validation_splits_are_a_question(folder, tiny):
    for name in ("train.csv", "dev.csv", "val.csv"):
        write(folder, name)
    with pytest.raises(InputError, match=r"which split is for validation, dev or val\? Choose with --data.val_split"):
        fit(folder, tiny)
    assert fit(folder, tiny, val_split="dev") == [(20, {"train.csv"}), (20, {"dev.csv"})]


def test_several_tables_without_the_name_of_a_split_are_a_question(folder):
    write(folder, "questions.csv")
    write(folder, "more.csv")
    message = r"no split is named by more.csv, questions.csv: rename them to train.csv and validation.csv, or move"
    with pytest.raises(InputError, match=message):
        find_splits(str(folder), None, None, "en", 0)
    for name in ("questions.csv", "more.csv"):
        (folder / name).unlink()
        write(folder, f"train/{name}")  # the cure
    (file,) = find_splits(str(folder), None, None, "en", 0).values()
    assert len(file()) == 40


def test_a_table_beside_those_in_subfolders_is_named(folder):
    write(folder, "train/metadata.csv")
    write(folder, "labels.csv")
    with pytest.warns(UserWarning, match=r"not read beside metadata.csv: labels.csv\. If it is a split"):
        assert list(find_splits(str(folder), None, None, "en", 0)) == ["train"]


def test_a_fit_without_training_split_says_what_was_seen(folder, tiny):
    write(folder, "dev.csv")
    with pytest.raises(InputError, match=r"no split 'train', it has dev: choose with --data.train_split"):
        fit(folder, tiny)


def test_held_out_pages_are_said_where_another_split_might_be_meant(folder, tiny):
    write(folder, "train.csv")
    write(folder, "test.csv")
    with pytest.warns(
        UserWarning, match=r"5% of the pages of 'train' are held out .* no other split \(test\) is named"
    ):
        assert fit(folder, tiny) == [(19, {"train.csv"}), (1, {"train.csv"})]
    assert fit(folder, tiny, val_split="test") == [(20, {"train.csv"}), (20, {"test.csv"})]


@pytest.mark.parametrize("name", ["questions.xlsx", "questions.txt", "z.png"])
def test_a_folder_without_questions_says_what_was_seen(folder, name):
    (folder / "pages").mkdir()
    for page in folder.glob("*.png"):
        page.rename(folder / "pages" / page.name)
    (folder / name).write_bytes((folder / "pages" / "0.png").read_bytes() if name == "z.png" else b"text")
    with pytest.raises(InputError, match=rf"no questions in pages, {name}: add train.csv, with the columns question"):
        find_splits(str(folder), None, None, "en", 0)


def test_hidden_files_are_not_read(folder, tiny):
    """As macOS adds them to archives."""
    for name in ("train.csv", "val.csv"):
        write(folder, name)
        (folder / f"._{name}").write_bytes(b"\0\5\x16\7\0")
    (folder / "._notes.json").write_bytes(b"\0\5\x16\7\0")
    assert fit(folder, tiny) == [(20, {"train.csv"}), (20, {"val.csv"})]

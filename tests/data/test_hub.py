"""Data sets that `datasets` reads, in the published column forms."""

import io
import json
from datetime import date, datetime
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from idefics_lit.data.sources.hub import HubDocVQA, load_splits
from idefics_lit.data.sources.splits import find_splits
from idefics_lit.data.sources.streaming import find_streams
from idefics_lit.errors import InputError

IMAGE = Image.new("L", (40, 30), 255)
IMAGE.save(PNG := io.BytesIO(), "PNG")
PAGE = {"bytes": PNG.getvalue(), "path": None}
OFFICIAL = {"docId": 1, "ucsf_document_id": "abcd0123", "ucsf_document_page_no": "4"}
FORMS = {
    "nielsr": {
        "id": "train_0",
        "image": PAGE,
        "query": {"de": "Was?", "en": "What?", "es": "¿Qué?", "fr": "Quoi ?", "it": "Cosa?"},
        "answers": ["a", "b"],
        "words": ["a"],
        "bounding_boxes": [[0.0, 0.1, 0.2, 0.3]],
        "answer": None,
    },
    "lmms-lab": {
        "questionId": "337",
        "question": "What?",
        "question_types": ["handwritten", "form"],
        "image": PAGE,
        **OFFICIAL,
        "answers": ["a", "b"],
        "data_split": "val",
    },
    "HuggingFaceM4": {
        "questionId": 337,
        "question": "What?",
        "question_types": ["handwritten", "form"],
        "image": PAGE,
        **OFFICIAL,
        "answers": ["a", "b"],
    },
    "own": {"id": 5, "query": "What?", "images": [PAGE, PAGE], "answer": "a"},
}


def make(row, rows=1, **changes):
    """Make a data set of equal rows; ``changes`` are made to the last one."""
    one = {**row, **changes}
    made = datasets.Dataset.from_list([row] * (rows - 1) + [one])
    feature = datasets.Image() if "image" in row else datasets.List(datasets.Image())
    return made.cast_column("image" if "image" in row else "images", feature)


@pytest.mark.parametrize(
    ("form", "question_id", "question_types", "page_id"),
    [
        ("nielsr", "train_0", [], None),
        ("lmms-lab", "337", ["handwritten", "form"], "abcd0123 page 4"),
        ("HuggingFaceM4", 337, ["handwritten", "form"], "abcd0123 page 4"),
    ],
)
def test_published_forms_are_recognised(form, question_id, question_types, page_id):
    rows = HubDocVQA(make(FORMS[form]), "set train")
    example = rows[0]
    assert (example.question_id, example.question, example.answers) == (question_id, "What?", ["a", "b"])
    assert example.question_types == question_types
    assert [image.mode for image in example.images] == ["L"]
    assert [ids[1:] for ids in rows.page_ids] == [(page_id,) if page_id else ()]  # after the key of the image
    assert example.source == "set train, row 0"


def test_pages_without_an_id_are_told_apart_by_their_images(tmp_path, monkeypatch):
    other = io.BytesIO()
    Image.new("L", (40, 30), 7).save(other, "PNG")
    own = HubDocVQA(make(FORMS["own"], rows=3, images=[PAGE, {"bytes": other.getvalue(), "path": None}]), "set")
    assert own.page_ids[0] == own.page_ids[1] != own.page_ids[2]
    rows = make(FORMS["nielsr"], rows=3, image={"bytes": other.getvalue(), "path": None})
    ids = HubDocVQA(rows, "set").page_ids
    assert ids[0] == ids[1] != ids[2]
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "set")
    saved = load_splits(str(tmp_path / "set"))["train"]
    whole = datasets.Dataset.map

    def read_only(*args, keep_in_memory=False, **kwargs):
        if not keep_in_memory:
            raise PermissionError
        return whole(*args, keep_in_memory=True, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "map", read_only)
        assert HubDocVQA(saved, "set").page_ids == ids
    assert HubDocVQA(saved, "set").page_ids == ids
    IMAGE.save(tmp_path / "a.png")
    IMAGE.save(tmp_path / "b.png")
    files = [{"question": "What?", "image": str(tmp_path / name)} for name in ("a.png", "a.png", "b.png")]
    Image.new("L", (40, 30), 7).save(tmp_path / "c.png")
    files.append({"question": "What?", "image": str(tmp_path / "c.png")})
    files = datasets.Dataset.from_list(files).cast_column("image", datasets.Image())
    ids = HubDocVQA(files, "set", folder=str(tmp_path)).page_ids
    assert ids[0] == ids[1] == ids[2] != ids[3]  # b is a copy of a


def test_takes_the_question_in_another_language():
    assert HubDocVQA(make(FORMS["nielsr"]), "set", language="fr")[0].question == "Quoi ?"
    with pytest.raises(InputError, match=r"set, row 0: no 'nl' in \['de', 'en', 'es', 'fr', 'it'\]: see data.language"):
        HubDocVQA(make(FORMS["nielsr"]), "set", language="nl")[0]


def test_a_question_may_have_several_pages_and_one_answer():
    example = HubDocVQA(make(FORMS["own"]), "set")[0]
    assert (len(example.images), example.answers) == (2, ["a"])


def test_a_test_split_has_no_answers():
    rows = HubDocVQA(make(FORMS["lmms-lab"], answers=None), "set")
    assert (rows.answers, rows[0].answers) == ([[]], [])


def test_texts_of_mixed_kinds_are_read():
    """`datasets` stores them as JSON."""
    kinds = ["What?", 1976, {"en": "Who?"}, ["What?"], None]
    answers = [["a", 5, None], "b", 2.5, {"text": "a"}, [True, float("nan"), " "]]
    mixed = [{"question": q, "answers": a, "image": PAGE} for q, a in zip(kinds, answers, strict=True)]
    made = datasets.Dataset.from_list(mixed, on_mixed_types="use_json").cast_column("image", datasets.Image())
    rows = HubDocVQA(made, "set")
    assert [rows[i].question for i in range(3)] == ["What?", "1976", "Who?"]
    assert rows.answers == [["a", "5"], ["b"], ["2.5"], [], []]
    assert rows.faults == {
        3: "set, row 3: column 'question' holds list where a text should be: mend it or drop the row",
        4: "set, row 4: no question in column 'question': drop the row",
    }


ANSWERS = {
    "float64": (pa.array([1976.0, 0.5, None, float("nan"), 1e20, 1e-7]), ["1976", "0.5", "", "", str(10**20), "1e-07"]),
    "float32": (pa.array([1976.0, 0.1, 12.80], pa.float32()), ["1976", "0.1", "12.8"]),
    "float16": (pa.array([0.1, 2.0], pa.float16()), ["0.1", "2"]),
    "decimal": (pa.array([Decimal("0.10"), Decimal("1976.00")]), ["0.10", "1976.00"]),
    "date32": (pa.array([date(1976, 7, 4)]), ["1976-07-04"]),
    "timestamp": (pa.array([datetime(1976, 7, 4)], pa.timestamp("ns")), ["1976-07-04 00:00:00"]),
    "bool": (pa.array([True, None, False]), ["True", "", "False"]),
    "int64": (pa.array([1976, None]), ["1976", ""]),
    "string": (pa.array(["0.10", "007", "N/A", None]), ["0.10", "007", "N/A", ""]),
}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_of_parquet_are_read_as_they_can_be_and_named(tmp_path, kind, is_list, streaming, recwarn):
    stored, expected = ANSWERS[kind]
    if is_list:
        stored = pa.ListArray.from_arrays(range(len(stored) + 1), stored)
    columns = {"id": pa.array([float(i) for i in range(len(stored))]), "question": pa.array(["a?"] * len(stored))}
    table = pa.table({**columns, "image": pa.array(["p.png"] * len(stored)), "answer": stored})
    pq.write_table(table, tmp_path / "train.parquet")
    IMAGE.save(tmp_path / "p.png")
    if streaming:
        examples = find_streams(str(tmp_path), None, None, "en")["train"].first(99)
    else:
        examples = find_splits(str(tmp_path), None, None, "en", 0)["train"]()
    assert examples.answers == [[text] if text else [] for text in expected]
    ids = [examples[i].question_id for i in range(len(examples))]
    assert ids == list(range(len(expected))) and {*map(type, ids)} == {int}
    named = [str(warning.message) for warning in recwarn if "holds" in str(warning.message)]
    assert len(named) == (kind not in ("int64", "string"))
    assert all(f"train: column 'answer' holds {kind}" in warning and "Store texts" in warning for warning in named)


def test_a_class_is_its_name():
    row = {"question": ["a?"] * 3, "image": ["p.png"] * 3, "answer": [1, 0, None], "question_types": [[0, 1], [], [1]]}
    kinds = datasets.ClassLabel(names=["no", "yes"])
    text = datasets.Value("string")
    features = datasets.Features(
        {"question": text, "image": text, "answer": kinds, "question_types": datasets.List(kinds)}
    )
    rows = HubDocVQA(datasets.Dataset.from_dict(row, features), "set")
    assert rows.answers == [["yes"], ["no"], []]
    read = [rows.mapping.read(rows._row(rows.dataset, i), None, "", i)["question_types"] for i in range(3)]
    assert read == [["no", "yes"], [], ["yes"]]


def test_a_binary_answer_is_named():
    table = pa.table({"question": ["a?"], "image": ["p.png"], "answer": pa.array([b"x"])})
    faults = HubDocVQA(datasets.Dataset(table), "set").faults
    assert faults == {0: "set, row 0: column 'answer' holds bytes where a text should be: mend it or drop the row"}


@pytest.mark.parametrize("part", [None, "", float("nan")])
def test_a_page_without_its_official_id_is_one_of_its_own(part):
    Image.new("L", (40, 30), 7).save(other := io.BytesIO(), "PNG")
    image = {"bytes": other.getvalue(), "path": None}
    made = make(FORMS["lmms-lab"] | {"ucsf_document_page_no": part}, rows=2, image=image)
    first, second = HubDocVQA(made, "set").page_ids
    assert not {*first} & {*second}


@pytest.mark.parametrize("column", ["question", "answers", "ucsf_document_id", "image"])
def test_text_in_no_known_encoding_is_named(column):
    """Parquet and arrow files don't say whether theirs is UTF-8."""
    texts = {"question": ["What?", "Who?"], "answers": ["a", "b"], "image": ["p.png", "q.png"]}
    columns = {name: pa.array(some) for name, some in {**texts, "ucsf_document_id": ["c", "d"]}.items()}
    columns[column] = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    pages = {"ucsf_document_page_no": ["1", "1"]} if column == "ucsf_document_id" else {}
    rows = HubDocVQA(datasets.Dataset(pa.table({**columns, **pages})), "set")
    assert len(rows.page_ids) == len(rows.answers) == 2
    with pytest.raises(InputError, match=r"set, row 1: the row can't be read: 'utf-8' codec can't decode"):
        rows[1]


def test_named_columns_win():
    columns = {"question": "ask", "image": "scan", "question_id": "number", "answers": "reply"}
    names = {"query": "ask", "image": "scan", "id": "number", "answers": "reply"}
    rows = HubDocVQA(make(FORMS["nielsr"]).rename_columns(names), "set", columns=columns)
    assert (rows[0].question, rows[0].question_id, rows[0].answers) == ("What?", "train_0", ["a", "b"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": "nope"}, "set has no column 'nope' for question; it has"),
        ({"quesiton": "query"}, "data.columns names 'quesiton', but an example's fields are question_id, question"),
    ],
)
def test_a_wrong_mapping_is_refused(columns, message):
    with pytest.raises(InputError, match=message):
        HubDocVQA(make(FORMS["nielsr"]), "set", columns=columns)


@pytest.mark.parametrize("column", ["query", "image"])
def test_a_missing_column_is_named_with_its_cure(column):
    with pytest.raises(InputError, match=r"set: no column for (question|image) among .* --data.columns"):
        HubDocVQA(make(FORMS["nielsr"]).remove_columns(column), "set")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questionId": None}, "set, row 1: no question_id in column 'questionId'"),
        ({"question": None}, "set, row 1: no question in column 'question'"),
        ({"question": ""}, "set, row 1: no question in column 'question'"),
        ({"image": None}, "set, row 1: no image in column 'image'"),
    ],
)
def test_an_incomplete_row_is_named(changes, message):
    rows = HubDocVQA(make(FORMS["lmms-lab"], 2, **changes), "set")
    assert rows[0].question == "What?"
    assert list(rows.faults) == ([] if "image" in changes else [1])  # images aren't read before they are asked for
    with pytest.raises(InputError, match=message):
        rows[1]


def test_opening_decodes_no_page_and_a_broken_one_is_named():
    broken = make(FORMS["own"] | {"images": [{"bytes": b"no image", "path": None}]}, 2)
    rows = HubDocVQA(broken, "set")
    assert len(rows) == 2
    with pytest.raises(InputError, match="set, row 1: the row can't be read: cannot identify image"):
        rows[1]


def save_to_disk(folder):
    made = make(FORMS["HuggingFaceM4"], 2)
    datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(str(folder))
    return {"train": 2, "validation": 2}


def save_one_to_disk(folder):
    make(FORMS["HuggingFaceM4"], 2).save_to_disk(str(folder))
    return {"train": 2}


def save_parquet(folder):
    folder.mkdir()
    made = make(FORMS["lmms-lab"], 3)
    made.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    made.to_parquet(str(folder / "validation-00000-of-00001.parquet"))
    (folder / "dataset_infos.json").write_text("{}")
    return {"train": 3, "validation": 3}


def save_jsonl_images(folder):
    rows = [{"file_name": f"{i}.png", "id": i, "question": "What?", "answers": ["a"]} for i in range(2)]
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            IMAGE.save(folder / split / row["file_name"])
    return {"train": 2, "validation": 2}


def save_csv_images(folder):
    folder.mkdir()
    (folder / "metadata.csv").write_text("file_name,id,question,answer\n0.png,0,What?,a\n")
    IMAGE.save(folder / "0.png")
    return {"train": 1}


@pytest.mark.parametrize("save", [save_to_disk, save_one_to_disk, save_parquet, save_jsonl_images, save_csv_images])
def test_local_folders_are_read(tmp_path, save):
    lengths = save(tmp_path / "set")
    splits = load_splits(str(tmp_path / "set"))
    assert {split: len(rows) for split, rows in splits.items()} == lengths
    example = HubDocVQA(splits["train"], "set", folder=str(tmp_path / "set"))[0]
    assert (example.question, example.images[0].size) == ("What?", (40, 30))
    assert example.answers[0] == "a"


def test_an_unreadable_source_is_named(tmp_path):
    with pytest.raises(InputError, match=r"data.source 'me/no-such-set' is no file or folder here, nor"):
        load_splits("me/no-such-set")
    with pytest.raises(InputError, match=r"is no folder that can be read"):
        load_splits(str(tmp_path))

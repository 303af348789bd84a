"""Whatever a file or a data set holds: a row is read or named in one line, and nothing else is raised."""

import csv
import io
import json

import datasets
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from PIL import Image

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.sources.columns import COLUMNS, PAGE_COLUMNS
from idefics_lit.data.sources.hub import HubDocVQA
from idefics_lit.data.sources.official import OfficialDocVQA, find_official_splits
from idefics_lit.data.sources.tables import TableDocVQA
from idefics_lit.errors import InputError
from idefics_lit.pretrained import load_processor

Image.new("L", (40, 30), 255).save(PNG := io.BytesIO(), "PNG")
PAGE = {"bytes": PNG.getvalue(), "path": None}


def fuzz(cases):
    health = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]
    return settings(max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=health)


@pytest.fixture(scope="module")
def collators(tiny):
    processor = load_processor(tiny)
    return [Idefics2Collator(processor, train=train, max_length=1000) for train in (True, False)]


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An official folder with a page, a damaged one, and a page beside it."""
    folder = tmp_path_factory.mktemp("fuzz") / "data"
    (folder / "documents").mkdir(parents=True)
    for path in (folder / "p.png", folder / "documents" / "q.png", folder.parent / "outside.png"):
        path.write_bytes(PNG.getvalue())
    (folder / "broken.png").write_bytes(PNG.getvalue()[:60])
    (folder / "images").mkdir()
    for name in ("q.png", "x_p0.jpg", "x_p1.jpg"):
        (folder / "images" / name).write_bytes(PNG.getvalue())
    return folder


def named(error, name):
    """The error is one line that names what it is about."""
    line = str(error.value if isinstance(error, pytest.ExceptionInfo) else error)
    assert line == " ".join(line.split()) and " ".join(name.split()) in line, line
    line.encode()


def read(examples, collators):
    """Open and collate every example; returns how many were read."""
    assert len(examples) == len(examples.page_ids) == len(examples.answers)
    assert len(set(examples.page_ids)) <= len(examples)
    good = []
    for index in range(len(examples)):
        where = examples.source(index)
        try:
            example = examples[index]
        except InputError as error:
            named(error, where)
            assert examples.faults.get(index, str(error)) == str(error)
            continue
        assert index not in examples.faults
        assert example.answers == examples.answers[index]
        assert isinstance(example.question_id, (int, str)) and example.question.strip()
        assert all(isinstance(text, str) and text.strip() for text in example.answers + example.question_types)
        for collate in collators:
            try:
                collate([example])
            except InputError as error:
                named(error, where)
                if collate.train and not example.answers:
                    continue
                break
        else:
            example.page_id, example.index = examples.page_ids[index], index
            good.append(example)
    if len(good) > 1:
        batch = collators[1](good)
        assert [batch.prompts.questions, batch.prompts.references] == [
            [e.question for e in good],
            [e.answers for e in good],
        ]
    return len(good)


# What a tokeniser, a terminal or a file might stumble on.
WORDS = st.sampled_from(["What?", "Who is it?", "a", "\0", "\x1b[31m", "\u202e", "שלום", "👩‍👩‍👧", "a" * 300, "nan"])
WRONG = st.sampled_from(["", " ", "\n", "\ud800", "<image>", "a InputError: b", "<end_of_utterance>", "a" * 3000])
TEXTS = st.one_of(WORDS, WRONG, st.text(st.characters(codec=None), max_size=20))
NUMBERS = st.one_of(st.integers(), st.sampled_from([10**400, -1, 2**70]), st.floats())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
PATHS = st.sampled_from(
    ["p.png", "documents/q.png", "/q.png", "broken.png", "missing.png", "../outside.png", ".", "..", "/", "a" * 5000]
)


def mostly(usual, odd=VALUES):
    """The usual values, in one of ten cases others."""
    return st.sampled_from([*[usual] * 9, odd]).flatmap(lambda chosen: chosen)


ROWS = st.fixed_dictionaries(
    {
        "questionId": mostly(st.integers(0, 99) | st.text("0123456789", min_size=1)),
        "question": mostly(WORDS, TEXTS | VALUES),
        "image": mostly(st.sampled_from(["p.png", "documents/q.png", "/q.png"]), PATHS | VALUES),
        "answers": mostly(st.lists(mostly(WORDS, TEXTS), min_size=1, max_size=3)),
    },
    optional={
        "question_types": mostly(st.just(["form"]), TEXTS | VALUES),
        "operation/reasoning": mostly(st.just(["counting"]), TEXTS | VALUES),
        "image_local_name": mostly(st.just("q.png"), PATHS | VALUES),
        "page_ids": mostly(st.lists(st.sampled_from(["x_p0", "x_p1"]), min_size=1), PATHS | VALUES),
        "answer_page_idx": mostly(st.integers(-1, 3), VALUES),
    },
)
PARTS = st.dictionaries(st.sampled_from(["questionId", "question", "image", "answers"]), PATHS | VALUES)
DOCUMENTS = st.fixed_dictionaries(
    {"data": st.lists(mostly(ROWS, PARTS | VALUES), max_size=4)}, optional={"dataset_split": VALUES}
)


def open_official(folder, content, collators, name="mine.json"):
    file = folder / name
    file.write_bytes(content)
    try:
        splits = find_official_splits(file)
        examples = [OfficialDocVQA(path) for path in splits.values()]
    except InputError as error:
        named(error, str(file))
        return
    assert all(split.strip() == split.strip().encode().decode() for split in splits)
    for some in examples:
        read(some, collators)


@fuzz(400)
@given(document=st.one_of(VALUES, st.fixed_dictionaries({"data": VALUES})), name=st.sampled_from(["train", "mine"]))
def test_any_json(folder, collators, document, name):
    open_official(folder, json.dumps(document).encode(), collators, f"{name}.json")


@fuzz(1000)
@given(document=DOCUMENTS)
def test_json_that_is_almost_official(folder, collators, document):
    open_official(folder, json.dumps(document).encode(), collators)


@fuzz(200)
@given(document=DOCUMENTS, cut=st.floats(0, 1), junk=st.binary(max_size=5), encoding=st.sampled_from(["utf8", "utf16"]))
def test_files_that_are_damaged(folder, collators, document, cut, junk, encoding):
    content = json.dumps(document, ensure_ascii=False).encode(encoding, "surrogatepass")
    at = int(cut * len(content))
    open_official(folder, content[:at] + junk + content[at + len(junk) :], collators)


BYTES = st.binary(max_size=20) | st.integers(0, 80).map(lambda end: PNG.getvalue()[:end])
STORED = st.one_of(
    st.just(PAGE),
    st.fixed_dictionaries({"bytes": st.none() | BYTES, "path": st.none() | PATHS}),
    PATHS,
    BYTES,
    st.none(),
    VALUES,
)
IMAGES = st.one_of(STORED, st.lists(STORED, max_size=2), st.lists(st.just(PAGE), max_size=2))
TURN = st.fixed_dictionaries({"user": mostly(WORDS, TEXTS | VALUES), "assistant": mostly(WORDS, TEXTS | VALUES)})
NAMES = [*sorted({name for names in COLUMNS.values() for name in names} | set(PAGE_COLUMNS)), "other", "page_ids"]
TABLE_ROWS = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.none() | TEXTS | VALUES for name in NAMES},
        **{name: mostly(TEXTS) for name in COLUMNS["question"]},
        **{name: mostly(st.lists(TEXTS, max_size=2)) for name in COLUMNS["answers"]},
        **dict.fromkeys(COLUMNS["image"], IMAGES),
        "texts": mostly(st.lists(TURN, max_size=3)),
        "doc_id": TEXTS,
        "image_1": STORED,
        "image_2": STORED,
    },
)
ALIKE = st.fixed_dictionaries(
    {
        "questionId": mostly(st.integers(0, 2**60), st.none()),
        "question": mostly(WORDS, st.none() | TEXTS),
        "image": mostly(st.just(PAGE), st.none() | st.builds(dict, bytes=BYTES, path=st.none())),
        "answers": mostly(st.lists(WORDS, max_size=3), st.none() | st.lists(st.none() | TEXTS, max_size=3)),
    },
    optional={"ucsf_document_id": st.none() | WORDS, "ucsf_document_page_no": st.none() | WORDS},
)
MAPPINGS = st.dictionaries(st.sampled_from([*COLUMNS, "ask"]), st.sampled_from([*NAMES, "nope"]), max_size=2)


def without_surrogates(value):
    """Arrow has none; a data set can't be made of them."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(inner) for key, inner in value.items()}
    return [without_surrogates(inner) for inner in value] if isinstance(value, list) else value


def open_table(rows, columns, language, decoded, collators):
    rows = without_surrogates(rows)
    for mixed in (None, "use_json"):
        try:
            table = datasets.Dataset.from_list(rows, on_mixed_types=mixed)
            if decoded and "image" in table.column_names:
                table = table.cast_column("image", datasets.Image())
        except Exception:  # not a data set that there can be
            continue
        break
    else:
        reject()
    try:
        examples = HubDocVQA(table, "my set", columns=columns, language=language)
    except InputError as error:
        named(error, "data.columns" if "data.columns" in str(error) else "my set")
        return
    read(examples, collators)


@fuzz(500)
@given(rows=st.lists(TABLE_ROWS, min_size=1, max_size=3), columns=st.none() | MAPPINGS, decoded=st.booleans())
def test_any_data_set(collators, rows, columns, decoded):
    open_table(rows, columns, "en", decoded, collators)


@fuzz(300)
@given(
    rows=st.lists(ALIKE, min_size=1, max_size=4),
    columns=mostly(st.none(), MAPPINGS),
    language=st.sampled_from(["en", "", "\n"]),
    decoded=st.booleans(),
)
def test_data_sets_of_the_published_form(collators, rows, columns, language, decoded):
    open_table(rows, columns, language, decoded, collators)


# Rows of one kind, so that there is such a data set at all, in the forms of the Cauldron and of MP-DocVQA.
TURNED = st.fixed_dictionaries(
    {
        "images": mostly(st.lists(st.just(PAGE), min_size=1, max_size=3), st.just([])),
        "texts": mostly(
            st.lists(
                st.fixed_dictionaries({"user": mostly(WORDS, TEXTS), "assistant": mostly(WORDS, TEXTS)}), max_size=3
            ),
            st.none(),
        ),
    }
)
LISTED = st.sampled_from(
    ["[]", "['a', 'it\\'s']", '["a"]', "None", "a", "['a'", "[[1], {}]", "['\\ud800']", "[" * 300, ""]
)
NUMBERED = st.fixed_dictionaries(
    {
        "question": mostly(WORDS, TEXTS),
        "doc_id": WORDS,
        "page_ids": LISTED,
        "answers": LISTED,
        "answer_page_idx": mostly(st.sampled_from(["0", "1", "7"]), LISTED | TEXTS),
        "image_1": mostly(st.just(PAGE), st.none()),
        "image_2": st.sampled_from([PAGE, None]),
    }
)


@fuzz(100)
@given(rows=st.lists(TURNED, min_size=1, max_size=3) | st.lists(NUMBERED, min_size=1, max_size=3))
def test_data_sets_of_several_pages_and_questions(collators, rows):
    open_table(rows, None, "en", False, collators)


CELLS = st.one_of(WORDS, st.sampled_from(["", "[", "[1]", '["a", null]', "[[]]", '"', "a,b", "a\nb"]), PATHS)


def open_file(file, content, collators):
    file.write_bytes(content)
    try:
        examples = TableDocVQA(file)
    except InputError as error:
        named(error, str(file))
        return
    read(examples, collators)


@fuzz(100)
@given(
    rows=st.lists(
        st.tuples(WORDS, mostly(st.just("p.png"), PATHS | CELLS), CELLS, mostly(st.just(""), CELLS)), max_size=4
    ),
    cut=st.none() | st.floats(0, 1),
    junk=st.binary(max_size=4),
)
def test_csv_files(folder, collators, rows, cut, junk):
    csv.writer(text := io.StringIO()).writerows([("question", "image", "answers", "answer_page"), *rows])
    content = text.getvalue().encode()
    at = len(content) if cut is None else int(cut * len(content))
    open_file(folder / "mine.csv", content[:at] + (b"" if cut is None else junk) + content[at:], collators)


@fuzz(100)
@given(rows=st.lists(mostly(ROWS, PARTS | VALUES), max_size=3))
def test_jsonl_files(folder, collators, rows):
    open_file(folder / "mine.jsonl", "\n".join(map(json.dumps, rows)).encode(), collators)

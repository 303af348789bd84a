"""Delimiters and encodings of CSV, JSONL and JSON files."""

import json
import shutil
import subprocess

import pytest
from PIL import Image

from idefics_lit.data.sources.splits import find_splits
from idefics_lit.errors import InputError

ROW = {"questionId": 1, "question": "Quién, then?", "image": "é.png", "answers": ["12,50 €"]}
FILES = {
    "train.csv": 'question,image,answers\n"Quién, then?",é.png,"12,50 €"\n',
    "train.tsv": "question\timage\tanswers\nQuién, then?\té.png\t12,50 €\n",
    "train.jsonl": json.dumps(ROW, ensure_ascii=False),
    "list.json": json.dumps([ROW], ensure_ascii=False),
    "train.json": json.dumps({"data": [ROW]}, ensure_ascii=False),
}


@pytest.fixture
def read(tmp_path):
    """Write a file beside its image; return the questions and answers that are read."""
    Image.new("L", (40, 30)).save(tmp_path / "é.png")

    def read(name, content):
        (tmp_path / name).write_bytes(content)
        examples = find_splits(str(tmp_path), None, None, "en", 0)["train"]()
        assert not examples.faults
        return [(examples[i].question, examples[i].answers) for i in range(len(examples))]

    return read


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", FILES)
def test_unicode_is_read(read, name, encoding):
    text = "\ufeff" + FILES[name] if encoding == "utf-16-be" else FILES[name]
    assert read(name, text.encode(encoding)) == [("Quién, then?", ["12,50 €"])]


@pytest.mark.parametrize("name", FILES)
def test_utf_16_without_its_mark_is_named(read, name):
    with pytest.raises(InputError, match=rf"{name}: UTF-16 without a byte-order mark: save it as UTF-8"):
        read(name, FILES[name].encode("utf-16-le"))


@pytest.mark.parametrize("name", FILES)
def test_the_cure_for_another_encoding_works(read, tmp_path, name):
    with pytest.raises(InputError, match=rf"{name}, line \d: not UTF-8: .* iconv") as raised:
        read(name, FILES[name].encode("cp1252"))
    assert shutil.which("iconv")
    command = str(raised.value).partition("for example: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read(name, (tmp_path / name).read_bytes()) == [("Quién, then?", ["12,50 €"])]


@pytest.mark.parametrize(
    ("name", "delimiter"), [("train.csv", ";"), ("train.csv", "\t"), ("train.tsv", ","), ("train.tsv", ";")]
)
def test_another_delimiter_is_read_where_the_header_has_no_other(read, name, delimiter):
    """As a spreadsheet writes a CSV where the comma is in numbers."""
    rows = [
        ["question", "image", "answers"],
        ["Quién?", "é.png", "12.50"],
        ['"a;b, c\td"', "é.png", '"[""x"", ""y""]"'],
    ]
    text = "\n".join(delimiter.join(row) for row in rows)
    assert read(name, text.encode()) == [("Quién?", ["12.50"]), ("a;b, c\td", ["x", "y"])]


def test_a_text_with_the_other_delimiter_needs_quotes(read):
    with pytest.raises(InputError, match=r"line 2: 4 cells, but the header has 3: a text with a semicolon in it needs"):
        read("train.csv", "question;image;answer\na;b?;é.png;c\n".encode())

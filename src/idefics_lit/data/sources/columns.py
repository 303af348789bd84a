"""Map the columns of published DocVQA data sets to the fields of an `Example`.

A row may hold several questions, as conversation turns in the Cauldron and Docmatix, and a question may have several
pages, as there and in MP-DocVQA. The names of the columns tell these layouts apart.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL.Image import Image

from idefics_lit.data.example import Example
from idefics_lit.data.sources.stored_images import open_stored
from idefics_lit.data.sources.text_files import read_python
from idefics_lit.data.sources.values import as_id, as_page, as_text, as_texts, convert
from idefics_lit.errors import InputError

# The names of each field's column in nielsr/docvqa_1200_examples, lmms-lab/DocVQA, lmms-lab/MP-DocVQA,
# HuggingFaceM4/DocumentVQA and data sets modelled on them; the first name that exists is used.
COLUMNS = {
    "question_id": ("questionId", "question_id", "id"),
    "question": ("question", "query"),
    "image": ("image", "images"),
    "answers": ("answers", "answer"),
    "question_types": ("question_types",),
    "answer_page": ("answer_page_idx", "answer_page"),
}
CONVERSIONS: dict[str, Callable[[object], Any]] = {
    "question_id": as_id,
    "question": as_text,
    "answers": as_texts,
    "question_types": as_texts,
    "answer_page": as_page,
}
# The published ids of a question's page, and of its pages in MP-DocVQA.
PAGE_COLUMNS, MULTI_PAGE_COLUMNS = ("ucsf_document_id", "ucsf_document_page_no"), ("doc_id", "page_ids")
NUMBERED_IMAGE = re.compile(r"image_(\d+)")  # lmms-lab/MP-DocVQA has a column per page: image_1 to image_20
# InfographicVQA's types of answer, evidence and operation: its paper and the competition's reports score by each.
INFOGRAPHIC_TYPES = ("answer_type", "evidence", "operation/reasoning")
# The column of conversation turns in the Cauldron and Docmatix, and the keys of a turn. The Cauldron's questions end
# in one of many requests, such as "\nGive a very brief answer." They are kept: there is no published list of them, and
# removing only the known ones would leave two kinds of question.
TURNS_COLUMN, TURN_KEYS = "texts", {"question": "user", "answers": "assistant"}


class ColumnMapping:
    """The columns of a split that hold the fields of an `Example`.

    Args:
        names: all columns of the split.
        columns: the columns of fields whose names are not among `COLUMNS`: a mapping from field to column.
        language: the language to read if the question's column holds a text for each of several languages.
        folder: the data's local folder, which image paths may not leave; None if the data is from the Hub.
        name: names the split in error messages.

    Attributes:
        fields: the columns of each field that the split has.

    Raises:
        InputError: when there is no column for question or image, or a column in ``columns`` doesn't exist.
    """

    def __init__(
        self, names: Sequence[str], columns: Mapping[str, str] | None, language: str, folder: str | None, name: str
    ) -> None:
        columns = columns or {}
        self.language, self.folder = language, folder
        self.has_turns = TURNS_COLUMN in names and "question" not in columns and not {*names} & {*COLUMNS["question"]}
        fields_of_turns = {field: [TURNS_COLUMN] for field in TURN_KEYS} if self.has_turns else {}
        self.fields = _match_columns(names, columns, fields_of_turns, name)
        self.is_numbered = NUMBERED_IMAGE.fullmatch(self.fields["image"][0]) is not None
        page_columns = MULTI_PAGE_COLUMNS if self.is_numbered else PAGE_COLUMNS
        self.page_columns = page_columns if {*page_columns} <= {*names} else ()

    @property
    def text_columns(self) -> list[str]:
        """The columns of all fields but the images."""
        texts = {column for field, columns in self.fields.items() if field != "image" for column in columns}
        return sorted(texts | {*self.page_columns})

    @property
    def image_columns(self) -> list[str]:
        """The columns of the images."""
        return self.fields["image"]

    def page_ids(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the published ids of a row's pages; none if the row has no ids."""
        ids = [row[column] for column in self.page_columns]
        if not ids or any(value in (None, "", []) or value != value for value in ids):  # NaN too
            return ()
        document, pages = ids[0], _parse_list(ids[1])
        return tuple(f"{document} page {page}" for page in (pages if isinstance(pages, list) else [pages]))

    def turns(self, row: Mapping[str, Any], source: str) -> Sequence[int | None]:
        """Return the indices of a row's conversation turns, or a single None if a row is one question.

        Raises:
            InputError: names the row whose turns can't be read.
        """
        if not self.has_turns:
            return [None]
        turns = row[TURNS_COLUMN]
        keys = {*TURN_KEYS.values()}
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) and keys <= {*turn} for turn in turns):
            raise InputError(f"{source}: {TURNS_COLUMN!r} is no list of user's and assistant's texts: drop the row")
        return range(len(turns))

    def read(self, row: Mapping[str, Any], turn: int | None, source: str, number: int | str) -> dict[str, Any]:
        """Return the fields of an `Example` but its images.

        Args:
            row: the row's values by column.
            turn: the index of the turn, see `turns`.
            source: names the question in error messages.
            number: the row's id if it has no column of ids; with turns, the turn's index is appended to an id.

        Raises:
            InputError: when the row has no question or id, or a value isn't text.
        """
        fields: dict[str, Any] = {"question_id": number, "answers": [], "question_types": []}
        for field, function in CONVERSIONS.items():
            for column in self.fields.get(field, ()):
                value = row[column] if turn is None or column != TURNS_COLUMN else row[column][turn][TURN_KEYS[field]]
                if field == "question" and isinstance(value, Mapping):
                    if self.language not in value:
                        raise InputError(f"{source}: no {self.language!r} in {sorted(value)}: see data.language")
                    value = value[self.language]
                if self.is_numbered and field in ("answers", "answer_page"):
                    value = _parse_list(value)
                converted = convert(value, function, f"{source}: column {column!r}")
                if converted == "":
                    raise InputError(f"{source}: no {field} in column {column!r}: drop the row")
                fields[field] = [*fields[field], *converted] if field == "question_types" else converted
        if turn is not None:
            fields["question_id"] = f"{fields['question_id']}/{turn}"
        return fields

    def example(
        self,
        row: Mapping[str, Any],
        turn: int | None,
        source: str,
        number: int | str,
        images: list[Image] | None = None,
    ) -> Example:
        """Return the `Example` of a row.

        Args:
            row: the row's values by column, its images decoded or as stored.
            turn: see `read`.
            source: see `read`.
            number: see `read`.
            images: the row's decoded images, if they are at hand.

        Raises:
            InputError: as `read` does; also when the row has no image, or one that can't be decoded.
        """
        return Example(
            **self.read(row, turn, source, number), images=images or self._images(row, source), source=source
        )

    def _images(self, row: Mapping[str, Any], source: str) -> list[Image]:
        columns = {column: row[column] for column in self.image_columns}
        if self.is_numbered:
            while len(columns) > 1 and columns[next(reversed(columns))] is None:  # fewer pages than columns
                columns.popitem()
        decoded = []
        for column, value in columns.items():
            images = value if isinstance(value, list) else [value]
            if not images or None in images:
                raise InputError(f"{source}: no image in column {column!r}: drop the row")
            try:
                decoded += [open_stored(image, self.folder) for image in images]
            except Exception as error:
                raise InputError(f"{source}: the row can't be read: {error}") from error
        return decoded


def _parse_list(value: object) -> object:
    """Parse a list or None in Python's notation, as lmms-lab/MP-DocVQA stores them; return other values unchanged."""
    if value == "None":
        return None
    parsed = read_python(value) if isinstance(value, str) else None
    return parsed if isinstance(parsed, list) else value


def _match_columns(
    names: Sequence[str], columns: Mapping[str, str], fields_of_turns: Mapping[str, list[str]], name: str
) -> dict[str, list[str]]:
    """Return the columns of each field: given by the user, of conversation turns, or with a published name."""
    unknown = sorted({*columns} - {*COLUMNS})
    if unknown:
        raise InputError(f"data.columns names {unknown[0]!r}, but an example's fields are {', '.join(COLUMNS)}")
    for field, column in columns.items():
        if column not in names:
            raise InputError(f"data.columns: {name} has no column {column!r} for {field}; it has {', '.join(names)}")
    fields = {field: [c for c in published if c in names][:1] for field, published in COLUMNS.items()}
    fields["image"] = fields["image"] or sorted(
        filter(NUMBERED_IMAGE.fullmatch, names), key=lambda column: int(column.removeprefix("image_"))
    )
    if INFOGRAPHIC_TYPES[-1] in names and not fields["question_types"]:
        fields["question_types"] = [column for column in INFOGRAPHIC_TYPES if column in names]
    fields |= {**fields_of_turns, **{field: [column] for field, column in columns.items()}}
    for field in ("question", "image"):
        if not fields[field]:
            raise InputError(
                f"{name}: no column for {field} among {', '.join(names)}: name it, --data.columns '{{{field}: COLUMN}}'"
            )
    return {field: matched for field, matched in fields.items() if matched}

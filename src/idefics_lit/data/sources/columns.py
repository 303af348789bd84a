"""How the columns of a published form become examples: which column holds what, and how it is stored there.

What is special here: a row may have several questions, its turns, as in the Cauldron and Docmatix, and a question may
have several pages, as there and in MP-DocVQA. The columns' names alone tell.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL.Image import Image

from idefics_lit.data.example import Example, as_id, as_page, as_text, as_texts
from idefics_lit.data.images import open_stored
from idefics_lit.data.sources.text_files import read_python
from idefics_lit.errors import InputError

# What each part of an example is called in nielsr/docvqa_1200_examples, lmms-lab/DocVQA, lmms-lab/MP-DocVQA,
# HuggingFaceM4/DocumentVQA and sets modelled on them; the first that is there is taken.
COLUMNS = {
    "question_id": ("questionId", "question_id", "id"),
    "question": ("question", "query"),
    "image": ("image", "images"),
    "answers": ("answers", "answer"),
    "question_types": ("question_types",),
    "answer_page": ("answer_page_idx", "answer_page"),
}
READ: dict[str, Callable[[object], Any]] = {
    "question_id": as_id,
    "question": as_text,
    "answers": as_texts,
    "question_types": as_texts,
    "answer_page": as_page,
}
# The official ids of a page, where they were kept, and of the pages of a question of MP-DocVQA.
PAGE_COLUMNS, PAGES_COLUMNS = ("ucsf_document_id", "ucsf_document_page_no"), ("doc_id", "page_ids")
NUMBERED = re.compile(r"image_(\d+)")  # lmms-lab/MP-DocVQA's pages, a column each: image_1 to image_20
# InfographicVQA's types of answer, evidence and operation, by each of which its paper and the RRC report scores.
INFOGRAPHIC_TYPES = ("answer_type", "evidence", "operation/reasoning")
# Several questions a row, as in the Cauldron and Docmatix, where a turn holds a question and its one reference. The
# Cauldron's end in one of many requests, such as "\nGive a very brief answer.", and stay as they are: nobody has
# published a list of them, so cutting off the known ones would leave two kinds of question.
TURNS, SAID = "texts", {"question": "user", "answers": "assistant"}


class ColumnMapping:
    """What the columns of a split hold.

    Args:
        names: the columns.
        columns: maps a part of an example (`COLUMNS`) to the column that holds it, where it isn't one of those.
        language: which of the question's languages to take, where the column holds one text a language.
        folder: the local folder that the split is from; its images' paths may lead nowhere else.
        where: names the split in error messages.

    Attributes:
        parts: the columns of each part that is there.

    Raises:
        InputError: there is no column for question or image, or one that is named isn't there.
    """

    def __init__(
        self, names: Sequence[str], columns: Mapping[str, str] | None, language: str, folder: str | None, where: str
    ) -> None:
        given = columns or {}
        self.language, self.folder = language, folder
        self.has_turns = TURNS in names and "question" not in given and not {*names} & {*COLUMNS["question"]}
        self.parts = _match(names, given, {part: [TURNS] for part in SAID} if self.has_turns else {}, where)
        self.is_numbered = NUMBERED.fullmatch(self.parts["image"][0]) is not None
        page = PAGES_COLUMNS if self.is_numbered else PAGE_COLUMNS
        self.page_columns = page if {*page} <= {*names} else ()

    @property
    def text_columns(self) -> list[str]:
        """All that there is to read without the pages."""
        texts = {column for part, columns in self.parts.items() if part != "image" for column in columns}
        return sorted(texts | {*self.page_columns})

    @property
    def image_columns(self) -> list[str]:
        """Those of the pages."""
        return self.parts["image"]

    def page_ids(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the published ids of a row's pages, where it says which they are."""
        ids = [row[column] for column in self.page_columns]
        if not ids or any(part in (None, "", []) or part != part for part in ids):  # NaN is none either
            return ()
        document, pages = ids[0], _unquoted(ids[1])
        return tuple(f"{document} page {page}" for page in (pages if isinstance(pages, list) else [pages]))

    def turns(self, row: Mapping[str, Any], where: str) -> Sequence[int | None]:
        """Return the numbers of a row's questions, or None where a row is a question.

        Raises:
            InputError: names the row whose turns can't be read.
        """
        if not self.has_turns:
            return [None]
        turns = row[TURNS]
        if not isinstance(turns, list) or not all(isinstance(t, Mapping) and {*SAID.values()} <= {*t} for t in turns):
            raise InputError(f"{where}: {TURNS!r} is no list of user's and assistant's texts: drop the row")
        return range(len(turns))

    def read(self, row: Mapping[str, Any], turn: int | None, where: str, number: int | str) -> dict[str, Any]:
        """Return all that an `Example` holds of a row but its pages.

        Args:
            row: the row by column.
            turn: which of its `turns`.
            where: names the question in error messages.
            number: the row's id where no column has one; a turn's number follows it.

        Raises:
            InputError: when the row has no question or id, or something else where a text should be.
        """
        texts: dict[str, Any] = {"question_id": number, "answers": [], "question_types": []}
        found = ((part, column) for part in READ for column in self.parts.get(part, ()))
        for part, column in found:
            stored = row[column] if turn is None or column != TURNS else row[TURNS][turn][SAID[part]]
            if part == "question" and isinstance(stored, Mapping):
                if self.language not in stored:
                    raise InputError(f"{where}: no {self.language!r} in {sorted(stored)}: see data.language")
                stored = stored[self.language]
            if self.is_numbered and part in ("answers", "answer_page"):
                stored = _unquoted(stored)
            try:
                value = READ[part](stored)
            except ValueError as error:
                raise InputError(f"{where}: column {column!r} {error}: mend it or drop the row") from error
            if value == "":
                raise InputError(f"{where}: no {part} in column {column!r}: drop the row")
            texts[part] = [*texts[part], *value] if part == "question_types" else value
        if turn is not None:
            texts["question_id"] = f"{texts['question_id']}/{turn}"
        return texts

    def example(
        self,
        row: Mapping[str, Any],
        turn: int | None,
        where: str,
        number: int | str,
        pages: list[Image] | None = None,
    ) -> Example:
        """Make an example of a row; see `read` for its arguments.

        Args:
            row: with its images, decoded or as they are stored.
            turn: see `read`.
            where: see `read`.
            number: see `read`.
            pages: its images where they have been opened before.

        Raises:
            InputError: as `read` does; also when the row has no image, or one that can't be decoded.
        """
        return Example(**self.read(row, turn, where, number), images=pages or self._pages(row, where), source=where)

    def _pages(self, row: Mapping[str, Any], where: str) -> list[Image]:
        images = {column: row[column] for column in self.image_columns}
        if self.is_numbered:
            while len(images) > 1 and images[next(reversed(images))] is None:  # columns that the question doesn't need
                images.popitem()
        opened = []
        for column, stored in images.items():
            some = stored if isinstance(stored, list) else [stored]
            if not some or None in some:
                raise InputError(f"{where}: no image in column {column!r}: drop the row")
            try:
                opened += [open_stored(image, self.folder) for image in some]
            except Exception as error:
                raise InputError(f"{where}: the row can't be read: {error}") from error
        return opened


def _unquoted(stored: object) -> object:
    """Return the list, or None, that a text spells in Python's notation, as lmms-lab/MP-DocVQA stores them."""
    if stored == "None":
        return None
    found = read_python(stored) if isinstance(stored, str) else None
    return found if isinstance(found, list) else stored


def _match(
    names: Sequence[str], given: Mapping[str, str], known: Mapping[str, list[str]], where: str
) -> dict[str, list[str]]:
    """Return the columns of each part of an example, among ``names``: those that are ``given``, known or published."""
    unknown = sorted({*given} - {*COLUMNS})
    if unknown:
        raise InputError(f"data.columns names {unknown[0]!r}, but an example's parts are {', '.join(COLUMNS)}")
    for part, column in given.items():
        if column not in names:
            raise InputError(f"data.columns: {where} has no column {column!r} for {part}; it has {', '.join(names)}")
    found = {part: [c for c in published if c in names][:1] for part, published in COLUMNS.items()}
    found["image"] = found["image"] or sorted(filter(NUMBERED.fullmatch, names), key=lambda name: int(name[6:]))
    if INFOGRAPHIC_TYPES[-1] in names and not found["question_types"]:
        found["question_types"] = [column for column in INFOGRAPHIC_TYPES if column in names]
    found |= {**known, **{part: [column] for part, column in given.items()}}
    for part in ("question", "image"):
        if not found[part]:
            raise InputError(
                f"{where}: no column for {part} among {', '.join(names)}: name it, --data.columns '{{{part}: COLUMN}}'"
            )
    return {part: columns for part, columns in found.items() if columns}

"""DocVQA, InfographicVQA and MP-DocVQA as published by the Robust Reading Competition (tasks 1, 3 and 4).

Each split is a JSON file, with a folder of page images next to it.
"""

import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from idefics_lit.data.documents import open_page_of_file
from idefics_lit.data.example import Example, Examples
from idefics_lit.data.page_keys import file_keys
from idefics_lit.data.sources.columns import INFOGRAPHIC_TYPES
from idefics_lit.data.sources.split_names import split_of_file
from idefics_lit.data.sources.stored_images import Location, is_missing, split_page
from idefics_lit.data.sources.text_files import TABLE_SUFFIXES, is_table, read_json, read_text
from idefics_lit.data.sources.values import as_id, as_page, as_text, as_texts, convert, read_answers
from idefics_lit.errors import InputError

IMAGE_FOLDERS = ("spdocvqa_images", "infographicsvqa_images", "images")
TYPE_KEYS = ("question_types", *INFOGRAPHIC_TYPES)
CONVERSIONS: dict[str, Callable[[object], Any]] = {
    "questionId": as_id,
    "question": as_text,
    "answers": as_texts,
    **dict.fromkeys(TYPE_KEYS, as_texts),
    "answer_page_idx": as_page,
}


def find_official_splits(source: Path) -> dict[str, Path]:
    """Return the JSON file of each split (``train``, ``val``, ``test``); empty if there are none.

    Args:
        source: a folder that holds files such as ``train_v1.0_withQT.json`` or ``infographicsVQA_val_v1.0.json``, or
            one such file.

    Raises:
        InputError: when a file doesn't have the official form, or two files hold one split.
    """
    splits: dict[str, Path] = {}
    if source.suffix.lower() in TABLE_SUFFIXES:
        return splits
    for file in [source] if source.is_file() else sorted(source.glob("*.json")):
        # The Hub's metadata of a data set, and hidden files such as those that macOS adds to archives.
        if file.name == "dataset_infos.json" or file.name.startswith(".") or is_table(file):
            continue
        # The names of official files contain the split; other files have it in their content.
        name = split_of_file(file) or _split_of_content(file)
        if name in splits:
            raise InputError(f"{source}: {splits[name].name} and {file.name} both hold split {name!r}: move one away")
        splits[name] = file
    return splits


class OfficialDocVQA(Examples):
    """The questions of one official JSON file.

    Args:
        file: the JSON. Its images are in the same folder: DocVQA's under ``documents/`` or ``spdocvqa_images/``,
            InfographicVQA's under ``infographicsvqa_images/`` or ``images/``, MP-DocVQA's under ``images/``.
        image_root: the folder that holds the images instead.

    Raises:
        InputError: when the file isn't readable. A row without an id, question or image, or whose image file is
            missing, is one of the `faults`; a page that can't be decoded raises when its example is requested.
    """

    def __init__(self, file: Path, image_root: Path | None = None) -> None:
        self.file, self.folder = file, image_root or file.parent
        self.rows = _read_json_file(file)["data"]
        self._locations: dict[str, Location] = {}  # of each image name
        self._pages: dict[int, list[Location]] = {}  # of each good row
        self.answers, self.faults = read_answers(self._check_row, len(self.rows))
        keys = file_keys(dict.fromkeys(location.file for location in self._locations.values()))
        self.page_ids: list[tuple[Hashable, ...]] = [
            tuple(page.key(keys.get(page.file, page.file)) for page in self._pages[index])
            if index in self._pages
            else (f"row {index}",)
            for index in range(len(self.rows))
        ]

    def __len__(self) -> int:
        """Return the number of questions."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Return a question with its decoded pages."""
        if index in self.faults:
            raise InputError(self.faults[index])
        fields, source = self._fields(index), self.source(index)
        try:
            images = [open_page_of_file(*self._locations[image]) for image in self._image_names(index)]
        except Exception as error:
            raise InputError(f"{source}: the image can't be read: {error}") from error
        return Example(
            question_id=fields["questionId"],
            question=fields["question"],
            images=images,
            answers=fields["answers"],
            question_types=[question_type for key in TYPE_KEYS for question_type in fields[key]],
            answer_page=fields["answer_page_idx"],
            source=source,
        )

    def source(self, index: int) -> str:
        """Return the name of a question's row, for error messages."""
        row = self.rows[index]
        if not isinstance(row, dict):
            return f"{self.file}, row {index}"
        key = _image_key(row)
        name = f"questionId {row.get('questionId')!s:.100}, {key} {row.get(key)!s:.100}"
        return f"{self.file}, row {index} ({name.encode(errors='backslashreplace').decode()})"

    def identity(self, index: int) -> object:
        """Return a question's id and text."""
        row = self.rows[index]
        return (row.get("questionId"), row.get("question")) if isinstance(row, dict) else None

    def _check_row(self, index: int) -> list[str]:
        """Locate the pages of a row, and return its answers."""
        fields, images, source = self._fields(index), self._image_names(index), self.source(index)
        for image in images:
            if image not in self._locations:
                self._locations[image] = self._locate(image, source)
        self._pages[index] = [self._locations[image] for image in images]
        return fields["answers"]

    def _fields(self, index: int) -> dict[str, Any]:
        """Return the converted values of a row, by the official keys."""
        row, source, fields = self.rows[index], self.source(index), {}
        if not isinstance(row, dict):
            raise InputError(f"{source}: not a JSON object: drop the row")
        for key, function in CONVERSIONS.items():
            fields[key] = convert(row.get(key), function, f"{source}: {key!r}")
            if fields[key] == "":
                raise InputError(f"{source}: no {key!r}: add it or drop the row")
        return fields

    def _image_names(self, index: int) -> list[str]:
        """Return the names of a row's images, as the file has them."""
        row, source = self.rows[index], self.source(index)
        key = _image_key(row)
        value = row.get(key)
        values = value if key == "page_ids" and isinstance(value, list) else [value]
        images = [convert(image, as_text, f"{source}: {key!r}") for image in values]
        if not images or "" in images:
            raise InputError(f"{source}: no {key!r}: add it or drop the row")
        return [f"images/{image}.jpg" for image in images] if key == "page_ids" else images

    def _locate(self, image: str, source: str) -> Location:
        # The JSON says documents/ for what newer archives have in spdocvqa_images/; InfographicVQA's JSON names no
        # folder. Any other folder is part of the page's name: docA/1.png isn't docB/1.png.
        folder, page = self.folder, None
        if not os.path.isfile(folder / image):
            image, page = convert(image, lambda path: split_page(str(path)), f"{source}:")
        parts = Path(image).parts  # empty for "."
        name = Path(*parts[1:] if len(parts) > 1 and parts[0] in ("documents", *IMAGE_FOLDERS) else parts)
        is_there = os.path.isfile(folder / image)
        candidates = [folder / image] if is_there else [folder / subfolder / name for subfolder in IMAGE_FOLDERS]
        paths = [path for path in candidates if os.path.isfile(path)]
        if not paths:
            raise InputError(f"{source}: the image file {is_missing(folder, [folder / image, *candidates])}")
        if len(set(file_keys(paths).values())) > 1:
            raise InputError(f"{source}: {' and '.join(map(str, paths))} are different images: move one away")
        if not Path(os.path.abspath(paths[0])).is_relative_to(os.path.abspath(folder)):  # links may lead out of it
            raise InputError(f"{source}: the image lies outside the data's folder {folder}: see data.image_root")
        return Location(paths[0], page)


def _image_key(row: dict[str, Any]) -> str:
    """Return the key of a row's images: of task 3, of task 4 (all pages), or of task 1."""
    return next((key for key in ("image_local_name", "page_ids") if key in row), "image")


def _split_of_content(file: Path) -> str:
    """Return the split that a file's content names, or else the file's name."""
    try:
        return as_text(_read_json_file(file).get("dataset_split")) or file.stem
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{file}: 'dataset_split' {error}") from error


def _read_json_file(file: Path) -> dict[str, Any]:
    try:
        content = read_json(read_text(file))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a readable JSON file ({error}): fetch it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise InputError(f"{file}: not of the official DocVQA form, a JSON object whose 'data' is a list of questions")
    return content

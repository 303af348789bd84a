"""DocVQA, InfographicVQA and MP-DocVQA as the Robust Reading Competition publishes them, its tasks 1, 3 and 4.

One JSON a split, page images in a folder beside it.
"""

import os
from collections.abc import Callable, Hashable
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from idefics_lit.data.example import Example, Examples, as_id, as_page, as_text, as_texts, read_answers
from idefics_lit.data.images import open_page, tell_files_apart
from idefics_lit.data.sources.columns import INFOGRAPHIC_TYPES
from idefics_lit.data.sources.text_files import KINDS, read_json
from idefics_lit.errors import InputError

SPLITS = ("train", "val", "test")
IMAGE_FOLDERS = ("spdocvqa_images", "infographicsvqa_images", "images")
TYPES = ("question_types", *INFOGRAPHIC_TYPES)
READ: dict[str, Callable[[object], Any]] = {
    "questionId": as_id,
    "question": as_text,
    "answers": as_texts,
    **dict.fromkeys(TYPES, as_texts),
    "answer_page_idx": as_page,
}


def find_official_splits(source: Path) -> dict[str, Path]:
    """Return the JSON file of each split (``train``, ``val``, ``test``); none when there is no JSON.

    Args:
        source: a folder that holds files such as ``train_v1.0_withQT.json`` or ``infographicsVQA_val_v1.0.json``, or
            one such file.

    Raises:
        InputError: when a file is not of the official form or two files hold one split.
    """
    splits: dict[str, Path] = {}
    if source.suffix.lower() in KINDS:
        return splits
    for file in [source] if source.is_file() else sorted(source.glob("*.json")):
        if file.name == "dataset_infos.json":  # the Hub's, about data of another form
            continue
        # Official archives tell the split by the file's name; a file under another name says it inside.
        name = next((split for split in SPLITS if file.name.startswith(split) or f"VQA_{split}_" in file.name), None)
        name = name or _split_inside(file)
        if name in splits:
            raise InputError(f"{source}: {splits[name].name} and {file.name} both hold split {name!r}: move one away")
        splits[name] = file
    return splits


class OfficialDocVQA(Examples):
    """The questions of one official JSON file.

    Args:
        file: the JSON. Its images lie in the same folder: DocVQA's under ``documents/`` or ``spdocvqa_images/``,
            InfographicVQA's under ``infographicsvqa_images/`` or ``images/``, MP-DocVQA's under ``images/``.

    Raises:
        InputError: when the file isn't readable. A row without id, question or image, or whose image file is missing,
            is one of the `faults`; a page that can't be decoded raises when its example is asked for.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = _read(file)["data"]
        self._found: dict[str, str] = {}
        self._pages: dict[int, list[str]] = {}  # of each good row
        self.answers, self.faults = read_answers(self._check, len(self.rows))
        keys = tell_files_apart(dict.fromkeys(self._found.values()))
        self.page_ids: list[tuple[Hashable, ...]] = [
            tuple(keys.get(page, page) for page in self._pages.get(index, [f"row {index}"]))
            for index in range(len(self.rows))
        ]

    def __len__(self) -> int:
        """Count the questions."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Return a question with its page, decoded."""
        if index in self.faults:
            raise InputError(self.faults[index])
        texts, where = self._texts(index), self.source(index)
        try:
            images = [_open(self._found[image]) for image in self._images(index)]
        except Exception as error:
            raise InputError(f"{where}: the image can't be read: {error}") from error
        return Example(
            question_id=texts["questionId"],
            question=texts["question"],
            images=images,
            answers=texts["answers"],
            question_types=[kind for types in TYPES for kind in texts[types]],
            answer_page=texts["answer_page_idx"],
            source=where,
        )

    def source(self, index: int) -> str:
        """Name a question's row for error messages."""
        row = self.rows[index]
        if not isinstance(row, dict):
            return f"{self.file}, row {index}"
        key = _image_key(row)
        name = f"questionId {row.get('questionId')!s:.100}, {key} {row.get(key)!s:.100}"
        return f"{self.file}, row {index} ({name.encode(errors='backslashreplace').decode()})"

    def _check(self, index: int) -> list[str]:
        """Find the pages of a row, and return its answers."""
        texts, images, where = self._texts(index), self._images(index), self.source(index)
        for image in images:
            if image not in self._found:
                self._found[image] = str(self._locate(image, where))
        self._pages[index] = [self._found[image] for image in images]
        return texts["answers"]

    def _texts(self, index: int) -> dict[str, Any]:
        """Return what a row holds, by the official names."""
        row, where, texts = self.rows[index], self.source(index), {}
        if not isinstance(row, dict):
            raise InputError(f"{where}: not a JSON object: drop the row")
        for key, read in READ.items():
            try:
                texts[key] = read(row.get(key))
            except ValueError as error:
                raise InputError(f"{where}: {key!r} {error}: mend it or drop the row") from error
            if texts[key] == "":
                raise InputError(f"{where}: no {key!r}: add it or drop the row")
        return texts

    def _images(self, index: int) -> list[str]:
        """Return what a row calls its images."""
        row, where = self.rows[index], self.source(index)
        key = _image_key(row)
        stored = row.get(key)
        try:
            images = list(map(as_text, stored if key == "page_ids" and isinstance(stored, list) else [stored]))
        except ValueError as error:
            raise InputError(f"{where}: {key!r} {error}: mend it or drop the row") from error
        if not images or "" in images:
            raise InputError(f"{where}: no {key!r}: add it or drop the row")
        return [f"images/{image}.jpg" for image in images] if key == "page_ids" else images

    def _locate(self, image: str, where: str) -> Path:
        folder = self.file.parent
        # Newer archives keep under spdocvqa_images/ what the JSON still calls documents/; InfographicVQA's JSON names
        # no folder. Any other folder is part of the page's name: docA/1.png is not docB/1.png.
        first, *rest = Path(image).parts
        name = Path(*rest) if rest and first in ("documents", *IMAGE_FOLDERS) else Path(image)
        paths = [folder / image] if os.path.isfile(folder / image) else [folder / some / name for some in IMAGE_FOLDERS]
        paths = [path for path in paths if os.path.isfile(path)]
        if not paths:
            raise InputError(f"{where}: the image file is missing in {folder}")
        if len(set(tell_files_apart(paths).values())) > 1:
            raise InputError(f"{where}: {' and '.join(map(str, paths))} are different images: move one away")
        path = paths[0]
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):  # links are the user's own
            raise InputError(f"{where}: the image lies outside the data's folder {folder}")
        return path


def _image_key(row: dict[str, Any]) -> str:
    """Return the name under which a row names its image: task 1's, task 3's or, for all its pages, task 4's."""
    return next((key for key in ("image_local_name", "page_ids") if key in row), "image")


@lru_cache(maxsize=4)
def _open(path: str) -> Image.Image:
    """Decode a page, and keep it for a while: the questions of a page often come one after the other."""
    return open_page(path)


def _split_inside(file: Path) -> str:
    """Return the split that a file says it is of, or its name."""
    try:
        return as_text(_read(file).get("dataset_split")) or file.stem
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{file}: 'dataset_split' {error}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a readable JSON file ({error}): fetch it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise InputError(f"{file}: not of the official DocVQA form, a JSON object whose 'data' is a list of questions")
    return content

"""DocVQA as the Robust Reading Competition publishes it: one JSON a split, page images in a folder beside it."""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from idefics_lit.data.example import Example, Examples, as_texts
from idefics_lit.errors import InputError


def find_official_splits(source: Path) -> dict[str, Path]:
    """Return the JSON file of each split (``train``, ``val``, ``test``); none when there is no JSON.

    Args:
        source: a folder that holds files such as ``train_v1.0_withQT.json``, or one such file.

    Raises:
        InputError: when a file is not of the official form or two files hold one split.
    """
    splits: dict[str, Path] = {}
    for file in [source] if source.is_file() else sorted(source.glob("*.json")):
        if file.name == "dataset_infos.json":  # the Hub's, about data of another form
            continue
        # Official archives tell the split by the file's name; a file under another name says it inside.
        name = next((split for split in ("train", "val", "test") if file.name.startswith(split)), None)
        name = name or str(_read(file).get("dataset_split", file.stem))
        if name in splits:
            raise InputError(f"{source}: {splits[name].name} and {file.name} both hold split {name!r}: move one away")
        splits[name] = file
    return splits


class OfficialDocVQA(Examples):
    """The questions of one official JSON file.

    Args:
        file: the JSON. Its images lie in the same folder, under ``documents/`` or ``spdocvqa_images/``.

    Raises:
        InputError: names the file and the row that has no id, question or image, or whose image file is missing. A
            page that can't be decoded raises when its example is asked for.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows = _read(file)["data"]
        found: dict[str, Path] = {}
        for index, row in enumerate(self.rows):
            if not isinstance(row, dict):
                raise InputError(f"{file}, row {index}: not a JSON object")
            for key in ("questionId", "question", "image"):
                if row.get(key) in (None, ""):
                    raise InputError(f"{self.where(index)}: no {key!r}: add it or drop the row")
            if row["image"] not in found:
                found[row["image"]] = self._locate(index)
        self.page_ids: list[str] = [str(found[row["image"]]) for row in self.rows]
        self.answers = [as_texts(row.get("answers")) for row in self.rows]

    def __len__(self) -> int:
        """Count the questions."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Return a question with its page, decoded."""
        row = self.rows[index]
        try:
            image = _open(self.page_ids[index])
        except Exception as error:
            raise InputError(f"{self.where(index)}: the image can't be read: {error}") from error
        return Example(
            question_id=row["questionId"],
            question=str(row["question"]),
            images=[image],
            answers=list(self.answers[index]),
            question_types=as_texts(row.get("question_types")),
            where=self.where(index),
        )

    def where(self, index: int) -> str:
        """Name a question's row for error messages."""
        row = self.rows[index]
        return f"{self.file}, row {index} (questionId {row.get('questionId')}, image {row.get('image')})"

    def _locate(self, index: int) -> Path:
        folder, image = self.file.parent, str(self.rows[index]["image"])
        # Newer archives keep under spdocvqa_images/ what the JSON still calls documents/.
        path = next((p for p in (folder / image, folder / "spdocvqa_images" / Path(image).name) if p.is_file()), None)
        if path is None:
            raise InputError(f"{self.where(index)}: the image file is missing in {folder}")
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):  # links are the user's own
            raise InputError(f"{self.where(index)}: the image lies outside the data's folder {folder}")
        return path


@lru_cache(maxsize=4)
def _open(path: str) -> Image.Image:
    """Decode a page, and keep it for a while: the questions of a page often come one after the other."""
    with Image.open(path) as image:
        image.load()
    return image


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a readable JSON file ({error}): fetch it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise InputError(f"{file}: not of the official DocVQA form, a JSON object whose 'data' is a list of questions")
    return content

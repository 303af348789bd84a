"""Images as data sets store them: bytes, or paths, which may not lead out of the data's folder."""

import os
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from idefics_lit.data.documents import open_page_of_file
from idefics_lit.data.images import open_page
from idefics_lit.data.page_keys import digest_bytes, digest_file, file_keys
from idefics_lit.utils.files import find_similar_file

MAX_FILE_BYTES = 2**28  # of a file in an archive or on the Hub, which is read into memory
CACHES = (datasets.config.DOWNLOADED_DATASETS_PATH, datasets.config.EXTRACTED_DATASETS_PATH, HF_HUB_CACHE)


class Location(NamedTuple):
    """Where an image path leads: to a local file, or to an address, and to a page of it by its index."""

    file: Path | str
    page: int | None = None

    def key(self, file_key: Hashable) -> Hashable:
        """Return the key of the page, given that of the file. A file's first page has the key of the file."""
        return (file_key, self.page) if self.page else file_key


def open_stored(stored: Any, folder: str | None = None) -> Image.Image:  # noqa: ANN401
    """Decode an image of a data set as a page.

    Args:
        stored: what `open_page` takes, or ``{"bytes": ..., "path": ...}`` as `datasets` stores it.
        folder: the folder that its paths may not leave, the data's or ``data.image_root``; None if the data is from the
            Hub.

    Raises:
        Exception: as `open_page` does; also when there is no image, or its path leaves the folder.
    """
    stored = _bytes_or_path(stored)
    if stored is None:
        raise ValueError("the image has neither bytes nor a path")
    if isinstance(stored, str):
        file, page = locate_image(stored, folder)
        if isinstance(file, Path) and not os.path.isfile(file):
            raise ValueError(f"the image file {stored!r:.100} {is_missing(folder or file.parent, [file])}")
        return open_page_of_file(file, page) if isinstance(file, Path) else open_page(_read_address(file), page)
    # The questions about a page often follow one another, each with a copy of the page's bytes.
    return _open_cached(stored) if isinstance(stored, bytes) else open_page(stored)


_open_cached = lru_cache(maxsize=4)(open_page)


def stored_key(stored: Any) -> str | None:  # noqa: ANN401
    """Return a key of an image as a data set stores it: a digest of its bytes, or its path; None if it has neither."""
    stored = _bytes_or_path(stored)
    if isinstance(stored, bytes):
        return digest_bytes(stored)
    return None if stored is None else str(stored)


def content_key(stored: Any, folder: str | None = None) -> Hashable:  # noqa: ANN401
    """Return a key of an image of a data set without decoding it: a digest of its content, if that is local.

    The key of an image on the Hub is its path, because computing a digest would download it twice.
    """
    path = _bytes_or_path(stored)
    if isinstance(path, str):
        with suppress(Exception):  # a wrong path is reported when the image is opened
            location = locate_image(path, folder)
            if isinstance(location.file, Path):
                return location.key(digest_file(location.file))
            if "hf://" not in location.file:
                return location.key(digest_bytes(_read_address(location.file)))
    return stored_key(stored)


def path_keys(paths: Iterable[str], folder: str | None) -> dict[str, Hashable]:
    """Return a key of the page that each path leads to, the same for all paths of one page and for copies of its file.

    The key of a path that doesn't lead to a local file is the path.
    """
    locations = {}
    for path in paths:
        with suppress(ValueError):  # a wrong path is reported when its example is requested
            locations[path] = locate_image(path, folder)
    files = file_keys(dict.fromkeys(file for file, _ in locations.values() if isinstance(file, Path)))
    return {
        path: location.key(files[location.file]) if location.file in files else path
        for path, location in locations.items()
    }


def is_missing(folder: str | Path, files: Iterable[Path]) -> str:
    """Return the end of the error message for an image path that leads to no file: in which folder, and the cure.

    Args:
        folder: the folder that the path is relative to.
        files: the files that it may stand for.
    """
    similar = next(filter(None, map(find_similar_file, files)), None)
    cure = "mend the path, or see data.image_root"
    if similar:
        cure = f"{os.path.relpath(similar, folder)!a} is there, in other letters: rename it, or mend the path"
    return f"is missing in {folder}: {cure}"


def locate_image(path: str, folder: str | None) -> Location:
    r"""Return where a path in the data leads.

    If there is no file of this very name, ``scans\1.png`` is a file in a folder, as on Windows, and
    ``report.pdf#page=3`` is the third page of a PDF or TIFF, as in URLs (RFC 8118).

    Args:
        path: the path.
        folder: the folder that it is relative to and may not leave; None if the data is from the Hub.

    Raises:
        ValueError: the path leaves the folder, or names no page by its number.
    """
    file = _check_inside(path, folder)
    name, page = split_page(path)
    if name == path or os.path.isfile(file):
        return Location(file)
    return Location(_check_inside(name, folder), page)


def split_page(path: str) -> tuple[str, int | None]:
    """Return a path with forward slashes and without its ``#page=``, and the index of that page.

    Raises:
        ValueError: the page isn't a number from 1.
    """
    name, _, number = path.replace("\\", "/").partition("#page=")
    if number and not (number.isdecimal() and 0 < len(number) < 10 and int(number)):
        raise ValueError(f"the page in {path!r:.100} isn't a number from 1")
    return name, int(number) - 1 if number else None


def _check_inside(path: str, folder: str | None) -> Path | str:
    """Return the file that a path refers to, or its address if it isn't a local file.

    Raises:
        ValueError: the path leaves the folder.
    """
    # A file in an archive has an address such as zip://page.png::archive.zip.
    *members, location = path.split("::") if "://" in path else [path]
    is_on_hub = folder is None and location.startswith("hf://")
    if not is_on_hub and "://" not in location:
        location = os.path.abspath(os.path.join(folder or "", location))
    folders = [os.path.abspath(root) for root in (*CACHES, *([] if folder is None else [folder]))]
    inside = is_on_hub or os.path.join(location, "").startswith(_allowed_folders(*folders))
    if not inside or not all(member.startswith("zip://") for member in members):
        raise ValueError(f"the image path {path:.100} lies outside the data's folder: see data.image_root")
    if not is_on_hub and not members:
        return Path(location)
    return "::".join([*members, location])


@cache
def _allowed_folders(*folders: str) -> tuple[str, ...]:
    """Return the folders with a slash at the end, also with links resolved, as `datasets` does."""
    return tuple(os.path.join(path, "") for folder in folders for path in (folder, os.path.realpath(folder)))


def _bytes_or_path(stored: Any) -> Any:  # noqa: ANN401
    if not isinstance(stored, Mapping):
        return stored
    return stored.get("path") if stored.get("bytes") is None else stored["bytes"]


def _read_address(address: str) -> bytes:
    """Read a file that isn't local, with a limit: a small archive may hold a very large file."""
    with fsspec.open(address, "rb") as file:
        content: bytes = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{address} has more than {MAX_FILE_BYTES // 2**20} MiB: scale it down")
    return content

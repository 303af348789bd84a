"""Images as data sets store them: bytes, or paths, which may not lead out of the data's folder."""

import os
from collections.abc import Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import fsspec
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from idefics_lit.data.images import open_page
from idefics_lit.data.page_keys import digest_bytes, digest_file

MAX_FILE_BYTES = 2**28  # of a file in an archive or on the Hub, which is read into memory
CACHES = (datasets.config.DOWNLOADED_DATASETS_PATH, datasets.config.EXTRACTED_DATASETS_PATH, HF_HUB_CACHE)


def open_stored(stored: Any, folder: str | None = None) -> Image.Image:  # noqa: ANN401
    """Decode an image of a data set as a page.

    Args:
        stored: what `open_page` takes, or ``{"bytes": ..., "path": ...}`` as `datasets` stores it.
        folder: the data's local folder, which its paths may not leave; None if the data is from the Hub.

    Raises:
        Exception: as `open_page` does; also when there is no image, or its path leaves the data's folder.
    """
    stored = _bytes_or_path(stored)
    if stored is None:
        raise ValueError("the image has neither bytes nor a path")
    if isinstance(stored, str):
        stored = locate_image(stored, folder)
        return open_page(stored if isinstance(stored, Path) else _read_address(stored))
    return open_page(stored)


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
            if isinstance(location, Path):
                return digest_file(location)
            if "hf://" not in location:
                return digest_bytes(_read_address(location))
    return stored_key(stored)


def locate_image(path: str, folder: str | None) -> Path | str:
    """Return the file that a path in the data refers to, or its address if it isn't a local file.

    Raises:
        ValueError: the path leaves the data's folder.
    """
    # A file in an archive has an address such as zip://page.png::archive.zip.
    *members, location = path.split("::") if "://" in path else [path]
    # `datasets` resolves links in the folder's path.
    roots = [] if folder is None else [folder, os.path.realpath(folder)]
    is_on_hub = folder is None and location.startswith("hf://")
    if not is_on_hub and "://" not in location:
        location = os.path.abspath(os.path.join(folder or "", location))
    inside = is_on_hub or any(Path(location).is_relative_to(os.path.abspath(root)) for root in (*roots, *CACHES))
    if not inside or not all(member.startswith("zip://") for member in members):
        raise ValueError(f"the image path {path:.100} lies outside the data's folder")
    if not is_on_hub and not members:
        return Path(location)
    return "::".join([*members, location])


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

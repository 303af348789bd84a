"""Count and decode the pages of image files and PDFs."""

import os
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from pypdfium2 import PdfDocument, PdfiumError

from idefics_lit.data.images import FORMATS, open_page, page_frames
from idefics_lit.errors import InputError, first_line

LONGEST_EDGE = 2200  # of a rendered PDF page in pixels: A4 at 190 dpi, as DocVQA's scans


def count_pages(file: str) -> int:
    """Return the number of pages in a file.

    Raises:
        InputError: when the file can't be read.
    """
    try:
        if _is_pdf(file):
            with PdfDocument(file) as pdf:
                return len(pdf)
        with Image.open(file, formats=[*FORMATS]) as image:
            return len(page_frames(image))
    except FileNotFoundError as error:
        raise InputError(f"image {file}: no such file") from error
    except UnidentifiedImageError as error:
        raise InputError(f"image {file}: neither an image nor a PDF") from error
    except PdfiumError as error:
        cure = "save a copy without the password" if "password" in str(error).lower() else "it may be damaged"
        raise InputError(f"image {file}: the PDF can't be opened ({first_line(error)}): {cure}") from error
    except Exception as error:
        raise InputError(f"image {file}: it can't be read: {first_line(error)}") from error


def read_page(file: str, number: int) -> Image.Image:
    """Decode one page of a file.

    Args:
        file: an image or a PDF.
        number: the index of the page.

    Raises:
        InputError: when the page can't be read.
    """
    try:
        return _decode(file, number)
    except Exception as error:
        raise InputError(f"image {file}: page {number + 1} can't be read: {first_line(error)}") from error


def open_page_of_file(file: str | Path, number: int | None = None) -> Image.Image:
    """Decode one page of a file, with a cache, because the questions about a page often follow one another.

    Args:
        file: an image or a PDF.
        number: the index of the page; None if the file should have a single page.

    Raises:
        Exception: as `idefics_lit.data.images.open_page` does; also for a PDF that can't be read.
    """
    stat = os.stat(file)
    return _decode_cached(str(file), number, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=4)
def _decode_cached(file: str, number: int | None, version: Hashable) -> Image.Image:
    """Decode a page; the version changes when the file is replaced."""
    return _decode(file, number)


def _decode(file: str, number: int | None) -> Image.Image:
    if not _is_pdf(file):
        return open_page(file, number)
    with PdfDocument(file) as pdf:
        if not 0 <= (number or 0) < len(pdf):
            raise ValueError(f"{file} has {len(pdf)} pages")
        if number is None and len(pdf) > 1:
            raise ValueError(f"{file} has {len(pdf)} pages: name one of them, as in {Path(file).name}#page=1")
        pdf.init_forms()  # to draw the values of form fields
        page = pdf[number or 0]
        return page.render(scale=LONGEST_EDGE / max(page.get_size())).to_pil().convert("RGB")


def _is_pdf(file: str) -> bool:
    with Path(file).open("rb") as opened:
        return b"%PDF-" in opened.read(1024)

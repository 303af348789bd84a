"""From an image as it is stored to the page that the processor takes."""

import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, ImageOps
from PIL.ExifTags import Base

FULL_SCALES = (1, 2**8 - 1, 2**16 - 1, 2**32 - 1)
# What scanners, cameras and browsers write. Pillow knows others too, among them PostScript, which is a program.
Image.init()
FORMATS = {"AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
FORMATS &= Image.OPEN.keys()  # an older Pillow has no AVIF
CACHES = (datasets.config.DOWNLOADED_DATASETS_PATH, datasets.config.EXTRACTED_DATASETS_PATH, HF_HUB_CACHE)


def open_page(stored: Any, frame: int = 0) -> Image.Image:  # noqa: ANN401
    """Return an image as a page: all of it decoded, one frame, upright, on white, in mode 1, L or RGB.

    Its pixels are those that Idefics2's processor sees, but for what that leaves alone, orientation, and what it
    clips, more than 8 bits.

    Args:
        stored: the image, its file's content, or the file's path.
        frame: which of a file's frames.

    Raises:
        Exception: Pillow's, or ValueError, says why there is no page in it.
    """
    if isinstance(stored, Image.Image):
        return _as_page(stored)
    if not isinstance(stored, (bytes, str, Path)):
        raise ValueError(f"{type(stored).__name__} is no image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns from half the size on that it refuses
        try:
            with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored, formats=[*FORMATS]) as image:
                if frame:
                    image.seek(frame)
                return _as_page(image)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{error} Scale it down") from error


def open_stored(stored: Any, folder: str | None = None) -> Image.Image:  # noqa: ANN401
    """Return an image of a data set as a page.

    Args:
        stored: what `open_page` takes, or ``{"bytes": ..., "path": ...}`` as `datasets` stores it.
        folder: the local folder that the data is from and that its paths may lead to; None where it is from the Hub.

    Raises:
        Exception: as `open_page` does; also where a path leads to anything but the data's own.
    """
    if isinstance(stored, Mapping):
        content = stored.get("bytes")
        stored = stored.get("path") if content is None else content
        if stored is None:
            raise ValueError("the image has neither bytes nor a path")
    return open_page(own_file(stored, folder) if isinstance(stored, str) else stored)


def own_file(path: str, folder: str | None) -> Path | bytes:
    """Return the file, or the content of what isn't one, that a path of the data's own leads to."""
    *members, place = path.split("::")  # what is in an archive is called zip://page.png::archive.zip
    # The folder as it is written, links are the user's own, and as `datasets` resolves it.
    own = [] if folder is None else [folder, os.path.realpath(folder)]
    hub = folder is None and place.startswith("hf://")
    if not hub and "://" not in place:
        place = os.path.abspath(os.path.join(folder or "", place))
    inside = hub or any(Path(place).is_relative_to(os.path.abspath(root)) for root in (*own, *CACHES))
    if not inside or not all(member.startswith("zip://") for member in members):
        raise ValueError(f"the image path {path:.100} lies outside the data's folder")
    if not hub and not members:
        return Path(place)
    with fsspec.open("::".join([*members, place]), "rb") as file:
        return file.read()


def _as_page(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"an image of {image.width} x {image.height} pixels")
    image.load()
    image = _upright(image)
    if image.mode[0] in "IF":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode in ("1", "L", "RGB") else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # EXIF data that is damaged says nothing about the pixels
        return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey of 16 or 32 bits: white is the least of the usual full scales that no pixel is above."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32))
    brightest = values.max()
    white = next((scale for scale in FULL_SCALES if brightest <= scale), brightest)
    return Image.fromarray((values.clip(0, white) * (255 / white) + 0.5).astype(np.uint8))

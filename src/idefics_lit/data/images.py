"""From an image as it is stored to the page that the processor takes."""

import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, ImageOps
from PIL.ExifTags import Base

# Of floats between 0 and 1, and of 8 to 32 bits; scanners write 10, 12 or 14 bits into 16. Those of 32 bits, with a
# sign and without, are as float32 rounds them.
FULL_SCALES = (1, *(2**bits - 1 for bits in (8, 10, 12, 14, 16)), 2**31, 2**32)
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, as the next ones
SUBFILE_TYPE, PREVIEW, MASK = 254, 1, 4
SAMPLE_FORMAT, UNSIGNED = 339, 1
MAX_FILE_BYTES = 2**28  # of a file in an archive or on the Hub, which is read as a whole
BAND_ROWS = 256
# What scanners, cameras and browsers write. Pillow knows others too, among them PostScript, which is a program.
Image.init()
FORMATS = {"AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
FORMATS &= Image.OPEN.keys()  # an older Pillow has no AVIF
CACHES = (datasets.config.DOWNLOADED_DATASETS_PATH, datasets.config.EXTRACTED_DATASETS_PATH, HF_HUB_CACHE)


def open_page(stored: Any, number: int | None = None) -> Image.Image:  # noqa: ANN401
    """Return an image as a page: all of it decoded, one frame, upright, on white, in mode 1, L or RGB.

    Its pixels are those that Idefics2's processor sees, but for what that leaves alone, orientation, and what it
    clips, more than 8 bits.

    Args:
        stored: the image, its file's content, or the file's path.
        number: which of a file's pages, from 0; None where it should have one alone.

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
                frames = page_frames(image)
                if number is None and len(frames) > 1:
                    name = "it is" if isinstance(stored, bytes) else f"{stored} is"
                    raise ValueError(f"{name} a TIFF of {len(frames)} pages: save each as an image of its own")
                if number or frames[0]:
                    image.seek(frames[number or 0])
                return _as_page(image)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{error} Scale it down") from error


def page_frames(image: Image.Image) -> list[int]:
    """Return which frames of an image that is open are pages.

    Those of a TIFF, without its previews and masks. Of other formats it is the first: further ones are an animation, or
    the previews in a phone's photograph.
    """
    if image.format != "TIFF" or getattr(image, "n_frames", 1) == 1:
        return [0]
    frames = []
    for frame in range(image.n_frames):  # type: ignore[attr-defined]
        with suppress(SyntaxError):  # a preview in a form that Pillow doesn't read; its tags are known by then
            image.seek(frame)
        if not image.tag_v2.get(SUBFILE_TYPE, 0) & (PREVIEW | MASK):  # type: ignore[attr-defined]
            frames.append(frame)
    image.seek(0)
    return frames or [0]


def page_digest(image: Image.Image) -> str:
    """Return a key of an image's pixels: the same for the same pixels, whatever file or object they are in."""
    colours = f"{image.mode} {image.size} {image.getpalette()} {image.info.get('transparency')}"
    return _digest(colours.encode(), image.tobytes())


def stored_key(stored: Any) -> str | None:  # noqa: ANN401
    """Return a key of an image as a data set stores it: of its content, or its path; None where there is no image."""
    stored = _content_or_path(stored)
    if isinstance(stored, bytes):
        return _digest(stored)
    return None if stored is None else str(stored)


def tell_files_apart(files: Iterable[str | Path]) -> dict[str | Path, Hashable]:
    """Return a key of each file, the same for all names of one file and for copies of it.

    Files of another size are no copies: few have to be read. What isn't there is left out.
    """
    found: dict[str | Path, tuple[Hashable, ...]] = {}
    for file in files:
        with suppress(OSError, ValueError):
            about = os.stat(file)
            # Some network file systems number no files, or number them anew.
            number = about.st_ino or os.path.realpath(file)
            found[file] = about.st_size, about.st_mtime_ns, about.st_dev, number
    sizes = Counter(size for size, *_ in set(found.values()))
    contents: dict[Hashable, Hashable] = {}
    for file, identity in found.items():
        if identity not in contents:
            contents[identity] = identity
            if sizes[identity[0]] > 1:
                with suppress(OSError):  # it is named when it is asked for
                    contents[identity] = _digest_file(file)
    return {file: contents[identity] for file, identity in found.items()}


def _digest(*contents: bytes) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return f"sha256:{digest.hexdigest()}"


def _digest_file(file: str | Path) -> str:
    with open(file, "rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def open_stored(stored: Any, folder: str | None = None) -> Image.Image:  # noqa: ANN401
    """Return an image of a data set as a page.

    Args:
        stored: what `open_page` takes, or ``{"bytes": ..., "path": ...}`` as `datasets` stores it.
        folder: the local folder that the data is from and that its paths may lead to; None where it is from the Hub.

    Raises:
        Exception: as `open_page` does; also where a path leads to anything but the data's own.
    """
    stored = _content_or_path(stored)
    if stored is None:
        raise ValueError("the image has neither bytes nor a path")
    if isinstance(stored, str):
        stored = locate(stored, folder)
        return open_page(stored if isinstance(stored, Path) else _read(stored))
    return open_page(stored)


def page_key(stored: Any, folder: str | None = None) -> Hashable:  # noqa: ANN401
    """Return a key of an image of a data set without decoding it: of its content, wherever that is at hand.

    What is on the Hub would be fetched twice for it: its path is its key.
    """
    path = _content_or_path(stored)
    if isinstance(path, str):
        with suppress(Exception):  # what is wrong with it is said when it is opened
            place = locate(path, folder)
            if isinstance(place, Path):
                return _digest_file(place)
            if "hf://" not in place:
                return _digest(_read(place))
    return stored_key(stored)


def _content_or_path(stored: Any) -> Any:  # noqa: ANN401
    if not isinstance(stored, Mapping):
        return stored
    return stored.get("path") if stored.get("bytes") is None else stored["bytes"]


def locate(path: str, folder: str | None) -> Path | str:
    """Return the file, or the address of what isn't one, that a path of the data's own leads to.

    Raises:
        ValueError: it leads elsewhere.
    """
    # What is in an archive is called zip://page.png::archive.zip.
    *members, place = path.split("::") if "://" in path else [path]
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
    return "::".join([*members, place])


def _read(address: str) -> bytes:
    """Read what isn't a file; a small archive may hold a very large one."""
    with fsspec.open(address, "rb") as file:
        content: bytes = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{address} has more than {MAX_FILE_BYTES // 2**20} MiB: scale it down")
    return content


def _as_page(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"an image of {image.width} x {image.height} pixels")
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    is_deep = ";16" in str(getattr(image, "tile", ""))
    image.load()
    if is_deep and image.mode in ("LA", "RGB", "RGBA", "RGBX"):
        _check_colours(image)
    image = _upright(image)
    if image.mode[0] in "IF":
        image = _to_8_bits(image, tags)
    if image.has_transparency_data:
        return _by_bands(image, "RGB", _on_white)
    return image if image.mode in ("1", "L", "RGB") else image.convert("RGB")


def _by_bands(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert some rows at a time: large pages would need several times their memory."""
    converted = Image.new(mode, image.size)
    for top in range(0, image.height, BAND_ROWS):
        box = (0, top, image.width, min(top + BAND_ROWS, image.height))
        converted.paste(convert(image.crop(box)), box)
    return converted


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # EXIF data that is damaged says nothing about the pixels
        return image


def _check_colours(image: Image.Image) -> None:
    """Refuse colours of 10 or 12 bits stored in 16, of which Pillow keeps the upper 8 alone."""
    extrema: Any = [image.getchannel(band).getextrema() for band in image.getbands() if band not in "AX"]
    brightest = max(high for _, high in extrema)
    if 0 < brightest < 2**6:
        raise ValueError(
            f"its colours have 16 bits, of which {brightest.bit_length() + 8} are used: save it with 8 bits a colour"
        )


def _to_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Scale grey of more than 8 bits.

    White is what the file's depth says, or the least of the usual full scales that no pixel is above.
    """
    # Pillow reads 32 bits without a sign as bits with one.
    is_unsigned = image.mode == "I" and tags.get(BITS_PER_SAMPLE) == (32,)
    is_unsigned &= tags.get(SAMPLE_FORMAT, (UNSIGNED,)) == (UNSIGNED,)

    def values_of(band: Image.Image) -> Any:  # noqa: ANN401
        values = np.asarray(band)
        return (values.view(np.uint32) if is_unsigned else values).astype(np.float32)

    bands = (
        image.crop((0, top, image.width, min(top + BAND_ROWS, image.height)))
        for top in range(0, image.height, BAND_ROWS)
    )
    brightest = max(float(np.nan_to_num(values_of(band), posinf=0).max()) for band in bands)
    # What was resized in floats is a little brighter than white here and there.
    scales = (scale * (1.1 if image.mode == "F" else 1) for scale in FULL_SCALES)
    white = next((full for full, scale in zip(FULL_SCALES, scales, strict=True) if brightest <= scale), brightest)
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    white = 2**bits - 1 if 8 < bits < 16 else white
    turned = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO

    def scale(band: Image.Image) -> Image.Image:
        values = np.nan_to_num(values_of(band), posinf=white).clip(0, white)
        return Image.fromarray(((white - values if turned else values) * (255 / white) + 0.5).astype(np.uint8))

    return _by_bands(image, "L", scale)

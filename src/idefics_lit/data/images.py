"""Decode image files as pages for the processor: one frame, upright, opaque, with 8 bits per channel."""

import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base

# The values of white: in floats from 0 to 1, and in 8 to 32 bits. Scanners store 10, 12 or 14 bits in 16.
# The last two are signed and unsigned 32-bit values, as float32 rounds them.
FULL_SCALES = (1, *(2**bits - 1 for bits in (8, 10, 12, 14, 16)), 2**31, 2**32)
# TIFF 6.0 tags, and values of theirs.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
SUBFILE_TYPE, PREVIEW, MASK = 254, 1, 4
SAMPLE_FORMAT, UNSIGNED = 339, 1
BAND_ROWS = 256  # rows converted at a time
# Formats of scanners, cameras and browsers. Pillow also opens others, such as PostScript, which can run programs.
Image.init()
FORMATS = {"AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
FORMATS &= Image.OPEN.keys()  # an older Pillow has no AVIF


def open_page(stored: Any, number: int | None = None) -> Image.Image:  # noqa: ANN401
    """Decode an image as a page: one frame, upright, on a white background, in mode 1, L or RGB.

    The pixels are those that Idefics2's processor makes of the image, except that it ignores the EXIF orientation and
    clips images of more than 8 bits.

    Args:
        stored: the image, its file's content, or the file's path.
        number: the index of the page in the file; None if the file should have a single page.

    Raises:
        Exception: Pillow's exception or a ValueError, when there is no page or it can't be decoded.
    """
    if isinstance(stored, Image.Image):
        return _as_page(stored)
    if not isinstance(stored, (bytes, str, Path)):
        raise ValueError(f"{type(stored).__name__} is no image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns at half of the size that it refuses
        try:
            with (
                # Not by its path: Pillow maps such a file into memory, and misplaces the pixels of a turned TIFF.
                io.BytesIO(stored) if isinstance(stored, bytes) else Path(stored).open("rb") as file,
                Image.open(file, formats=[*FORMATS]) as image,
            ):
                frames = page_frames(image)
                if number is None and len(frames) > 1:
                    if isinstance(stored, bytes):
                        raise ValueError(f"it is a TIFF of {len(frames)} pages: save each as an image of its own")
                    name = f"{Path(stored).name}#page=1"
                    raise ValueError(f"{stored} is a TIFF of {len(frames)} pages: name one of them, as in {name}")
                if (number or 0) >= len(frames):
                    raise ValueError(f"{stored if isinstance(stored, (str, Path)) else 'it'} has {len(frames)} pages")
                if number or frames[0]:
                    image.seek(frames[number or 0])
                return _as_page(image)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{error} Scale it down") from error


def page_frames(image: Image.Image) -> list[int]:
    """Return the indices of the frames of an opened image that are pages.

    In a TIFF these are all frames but previews and masks. In other formats it is the first frame: further ones are an
    animation, or the previews in a phone's photograph.
    """
    if image.format != "TIFF" or getattr(image, "n_frames", 1) == 1:
        return [0]
    frames = []
    for frame in range(image.n_frames):  # type: ignore[attr-defined]
        with suppress(SyntaxError):  # a preview that Pillow can't read; its tags are read before
            image.seek(frame)
        if not image.tag_v2.get(SUBFILE_TYPE, 0) & (PREVIEW | MASK):  # type: ignore[attr-defined]
            frames.append(frame)
    image.seek(0)
    return frames or [0]


def _as_page(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"an image of {image.width} x {image.height} pixels")
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    is_deep = ";16" in str(getattr(image, "tile", ""))
    image.load()
    if is_deep and image.mode in ("LA", "RGB", "RGBA", "RGBX"):
        _check_colour_depth(image)
    image = _upright(image)
    if image.mode[0] in "IF":
        image = _to_8_bits(image, tags)
    if image.has_transparency_data:
        return _by_bands(image, "RGB", _on_white)
    return image if image.mode in ("1", "L", "RGB") else image.convert("RGB")


def _by_bands(image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert a band of rows at a time: converting a large page at once takes several times its memory."""
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
        is_rotated = image.getexif().get(Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if is_rotated else image
    except Exception:  # ignore damaged EXIF data
        return image


def _check_colour_depth(image: Image.Image) -> None:
    """Refuse colours of 10 or 12 bits stored in 16 bits, of which Pillow keeps the upper 8 only."""
    extrema: Any = [image.getchannel(band).getextrema() for band in image.getbands() if band not in "AX"]
    brightest = max(high for _, high in extrema)
    if 0 < brightest < 2**6:
        raise ValueError(
            f"its colours have 16 bits, of which {brightest.bit_length() + 8} are used: save it with 8 bits a colour"
        )


def _to_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Scale grey values of more than 8 bits.

    White is the largest value of the file's bit depth, or the smallest of `FULL_SCALES` that no pixel exceeds.
    """
    # Pillow reads unsigned 32-bit values as signed ones.
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
    # Resizing in floats overshoots white a little.
    scales = (scale * (1.1 if image.mode == "F" else 1) for scale in FULL_SCALES)
    white = next((full for full, scale in zip(FULL_SCALES, scales, strict=True) if brightest <= scale), brightest)
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    white = 2**bits - 1 if 8 < bits < 16 else white
    is_inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO

    def scale(band: Image.Image) -> Image.Image:
        values = np.nan_to_num(values_of(band), posinf=white).clip(0, white)
        return Image.fromarray(((white - values if is_inverted else values) * (255 / white) + 0.5).astype(np.uint8))

    return _by_bands(image, "L", scale)

"""Process pages into the images that the vision tower sees, and stack the images of a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def process_page(image_processor: Any, page: Image.Image) -> list[Tensor]:  # noqa: ANN401
    """Return the images of a page, each (3, H, W) in float32: one, or several with image splitting."""
    (images,) = image_processor([[page]], do_pad=False)["pixel_values"]
    return list(images)


def stack_images(
    rows: Sequence[Sequence[Sequence[Tensor]]], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[list[tuple[int, int]]]]:
    """Stack images with padding.

    Args:
        rows: for each row, for each of its pages, the images (3, H, W).
        dtype: of the pixels.

    Returns:
        ``pixel_values``, ``pixel_attention_mask`` and ``image_sizes`` of `idefics_lit.model.batch.Batch`.
    """
    flat = [[image for page in row for image in page] for row in rows]
    sizes = [[(image.shape[1], image.shape[2]) for image in row] for row in flat]
    height, width = (max(size[axis] for row in sizes for size in row) for axis in (0, 1))
    shape = len(flat), max(map(len, flat)), height, width
    pixels = torch.zeros(*shape[:2], 3, *shape[2:], dtype=dtype)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, images in enumerate(flat):
        for i, image in enumerate(images):
            pixels[row, i, :, : image.shape[1], : image.shape[2]] = image
            mask[row, i, : image.shape[1], : image.shape[2]] = True
    return pixels, mask, sizes

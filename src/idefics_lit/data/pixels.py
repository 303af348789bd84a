"""Process pages into the images that the vision tower sees, and stack the images of a batch."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from idefics_lit.data.image_layout import count_cache_entries, count_images


class PageProcessor:
    """Process pages one by one, and leave out those whose features are cached.

    Args:
        image_processor: the model's.
        cached_features: see `idefics_lit.Idefics2Collator`.
    """

    def __init__(self, image_processor: Any, cached_features: Callable[[str], Tensor | None] | None = None) -> None:  # noqa: ANN401
        self.image_processor, self.cached_features = image_processor, cached_features
        self._options = image_processor.to_json_string().encode()

    def process(self, page: Image.Image) -> list[Tensor]:
        """Return the images of a page, each (3, H, W) in float32: one, or several with image splitting."""
        # Without padding, which copies all pixels.
        (images,) = self.image_processor([[page]], do_pad=False)["pixel_values"]
        return list(images)

    def left_out(self, keys: Sequence[str]) -> list[Tensor]:
        """Return an image of no pixels, (3, 0, 0), for each key of a page that isn't processed."""
        return [torch.empty(3, 0, 0)] * len(keys)

    def image_keys(self, page: Image.Image, digest: str) -> list[str]:
        """Return a key of each image of a page, which depends on the page's digest and the processor's options."""
        key = hashlib.sha256(self._options + digest.encode()).hexdigest()
        return [f"{key} {i}" for i in range(count_images(self.image_processor, page.size))]

    def load_features(self, pages: Sequence[list[str]]) -> dict[str, Tensor]:
        """Return the cached features of the pages that have them all.

        Args:
            pages: for each page the keys of its images.

        Returns:
            By the key of an image, its features.
        """
        loaded: dict[str, Tensor] = {}
        if self.cached_features is None:
            return loaded
        for keys in pages:
            entries = keys[: count_cache_entries(self.image_processor, len(keys))]
            found = {key: features for key in entries if (features := self.cached_features(key)) is not None}
            loaded |= found if len(found) == len(entries) else {}
        return loaded


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

"""Token ids of prompts with the image tokens of their pages, and where the pages are in them.

A page's tokens depend on its shape for Idefics3 and SmolVLM, but never on its pixels.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from PIL import Image

from idefics_lit.data.image_layout import page_edge, tile_grid
from idefics_lit.pretrained import has_tiles

if TYPE_CHECKING:
    from transformers import ProcessorMixin

MINIATURE_TILE = 8  # pixels


def image_token_ids(processor: "ProcessorMixin") -> list[int]:
    """Return the ids of ``<fake_token_around_image>`` and ``<image>``."""
    ids: list[int] = processor.tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>"])
    return ids


def tokens_per_image(processor: "ProcessorMixin") -> int:
    """Return the number of ``<image>`` tokens of an image, or of a tile."""
    tokens: int = processor.image_seq_len  # type: ignore[attr-defined]
    return tokens


def tokenize_prompts(
    processor: "ProcessorMixin",
    prompts: list[str],
    page_sizes: Sequence[Sequence[tuple[int, int]]],
    **options: Any,  # noqa: ANN401
) -> list[list[int]]:
    """Return the token ids of prompts, with all image tokens of their pages.

    Args:
        processor: the model's.
        prompts: texts with one ``<image>`` for each page.
        page_sizes: for each prompt the width and height of each page in pixels.
        options: further arguments of the tokenizer.
    """
    images: Any = processor.image_processor
    if not has_tiles(images):
        return processor(text=prompts, **options)["input_ids"]
    # The processor writes the tokens of a page while it processes it. A blank page with tiles of a few pixels has the
    # same tokens and costs nothing.
    miniatures = [[_miniature(*tile_grid(images, size)) for size in row] for row in page_sizes]
    tile = {"longest_edge": MINIATURE_TILE}
    return processor(text=prompts, images=miniatures, do_resize=False, max_image_size=tile, **options)["input_ids"]


def largest_page_tokens(processor: "ProcessorMixin") -> int:
    """Return the number of tokens of the page with the most."""
    edge = page_edge(processor.image_processor)
    (ids,) = tokenize_prompts(processor, ["<image>"], [[(edge, edge)]], add_special_tokens=False)
    return len(ids)


def page_spans(processor: "ProcessorMixin", ids: Sequence[int], page_images: Sequence[int]) -> list[tuple[int, int]]:
    """Return the start and stop of each page's tokens, from the fake token before its images to the one after them.

    Args:
        processor: the model's.
        ids: the token ids of a prompt.
        page_images: the number of images of each page.

    Raises:
        ValueError: the prompt has image tokens for another number of images.
    """
    fake_token, image_token = image_token_ids(processor)
    fakes = [i for i, token in enumerate(ids) if token == fake_token]
    images = [i for i, token in enumerate(ids) if token == image_token]
    per_image = tokens_per_image(processor)
    if len(images) != per_image * sum(page_images):
        raise ValueError(f"{len(images)} image tokens for {sum(page_images)} images of {per_image} tokens")
    spans = []
    for count, stop in zip(page_images, accumulate(page_images), strict=True):
        first, last = images[(stop - count) * per_image], images[stop * per_image - 1]
        spans.append((max(i for i in fakes if i < first), min(i for i in fakes if i > last) + 1))
    return spans


def _miniature(rows: int, columns: int) -> Image.Image:
    return Image.new("L", (MINIATURE_TILE * max(columns, 1), MINIATURE_TILE * max(rows, 1)))

"""How many images a processor makes of a page, and their size, without processing the page.

Idefics2's processor passes a page of any shape, or also its four quadrants. Those of Idefics3 and SmolVLM cut a page
into tiles of one size and pass the page in a tile's size after them.
"""

from typing import Any

from idefics_lit.pretrained import has_tiles

SPLIT_IMAGES = 5  # of Idefics2: four quadrants and the page


def tile_grid(image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:  # noqa: ANN401
    """Return the rows and columns of tiles of a page of width and height ``size``; 0 and 0 if it is one image."""
    width, height = size
    _, rows, columns = image_processor.get_number_of_image_patches(height, width)
    return rows, columns


def count_images(image_processor: Any, size: tuple[int, int]) -> int:  # noqa: ANN401
    """Return the number of images of a page of width and height ``size`` in pixels."""
    if has_tiles(image_processor):
        rows, columns = tile_grid(image_processor, size)
        return rows * columns + 1
    return SPLIT_IMAGES if image_processor.do_image_splitting else 1


def count_cache_entries(image_processor: Any, images: int) -> int:  # noqa: ANN401
    """Return how many of a page's images have an entry in the feature cache: its tiles have one together."""
    return 1 if has_tiles(image_processor) else images


def image_edge(image_processor: Any) -> int:  # noqa: ANN401
    """Return the longest edge that an image can have, in pixels: the tile's, or the image size."""
    edge: int = (image_processor.max_image_size if has_tiles(image_processor) else image_processor.size)["longest_edge"]
    return edge


def page_edge(image_processor: Any) -> int:  # noqa: ANN401
    """Return the longest edge of a page that isn't scaled down, in pixels."""
    if not image_processor.do_image_splitting:
        return image_edge(image_processor)
    edge: int = image_processor.size["longest_edge"]
    return edge if has_tiles(image_processor) else 2 * edge

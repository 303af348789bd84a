"""Patch embeddings of images without padding, with the positions that transformers computes in float32."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def embed_patches(tower: Any, images: Tensor, height: int, width: int) -> Tensor:  # noqa: ANN401
    """Return the patch embeddings (I, P, width) of images of one size.

    Args:
        tower: transformers' vision transformer of Idefics2, Idefics3 or SmolVLM.
        images: (I, C, H, W), padding included, in the tower's dtype.
        height: pixels without padding; those beyond the last complete patch are cut off.
        width: as ``height``.
    """
    config, embeddings = tower.config, tower.embeddings
    side = config.patch_size
    rows, columns = height // side, width // side
    pixels = images[..., : rows * side, : columns * side]
    # `embeddings.forward` rounds coordinates to 16 bits in transformers before 5.21, and synchronizes with the GPU.
    positions = vision_position_ids(rows, columns, config.image_size // side, pixels.device)
    projection = embeddings.patch_embedding
    if type(projection) is nn.Conv2d:  # the same as a product of matrices, which takes a fifth of the time
        patches = pixels.unflatten(2, (rows, side)).unflatten(4, (columns, side)).permute(0, 2, 4, 1, 3, 5)
        patches = F.linear(patches.flatten(3).flatten(1, 2), projection.weight.flatten(1), projection.bias)
    else:  # it has an adapter
        patches = projection(pixels).flatten(2).transpose(1, 2)
    # Without contiguous(), the layers that follow take a third longer.
    return (patches + embeddings.position_embedding(positions)).contiguous()


@lru_cache(maxsize=512)  # shapes; 39 kB each at most
def vision_position_ids(rows: int, columns: int, per_side: int, device: torch.device) -> Tensor:
    """Return the position ids (rows * columns) of an image's patches, as Idefics2VisionEmbeddings of transformers 5.24.

    Coordinates are computed in float32 on the CPU for every dtype and device: another rounding at a boundary gives
    another position.

    Args:
        rows: rows of patches.
        columns: columns of patches.
        per_side: the vision tower's positions in each direction.
        device: of the ids.
    """
    exact: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    boundaries = torch.arange(1 / per_side, 1.0, 1 / per_side, **exact)

    def buckets(count: int) -> Tensor:
        coordinates = torch.arange(count, **exact) * (1.0 / torch.tensor(count, **exact))
        return torch.bucketize(coordinates.clamp(max=1.0 - 1e-6), boundaries, right=True)

    with torch.inference_mode(False):  # training may use the cached tensor too
        return (buckets(rows)[:, None] * per_side + buckets(columns)).flatten().to(device)

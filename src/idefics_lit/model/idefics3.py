"""Idefics3, SmolVLM and SmolVLM2: tiles of one shape, pixel shuffle and one projection.

A page is cut into tiles, and the page itself in a tile's size follows them. The tower processes the tiles of a page at
once: they fill a GPU, the shapes are few, and the features don't depend on other pages. The cache holds an entry a
page: the embeddings of its image tokens where the connector is frozen too, which are up to 21 times as small as the
tower's features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from idefics_lit.model.adapter import is_trained
from idefics_lit.model.batch import Batch
from idefics_lit.model.forward import Backbone
from idefics_lit.model.memory import IDEFICS3_PEAKS

MAX_CONNECTED_TILES = 64  # at a time, in evaluation


class Idefics3Backbone(Backbone):
    """The forward of Idefics3, SmolVLM or SmolVLM2 with an adapter."""

    peaks = IDEFICS3_PEAKS

    @staticmethod
    def feature_modules(base: Any) -> Mapping[str, nn.Module]:  # noqa: ANN401
        """Return the vision tower, and the connector unless it is trained."""
        connector = base.model.connector
        return {
            "vision tower": base.model.vision_model,
            **({} if is_trained(connector) else {"connector": connector}),
        }

    @staticmethod
    def compiled_modules(base: Any) -> Sequence[nn.Module]:  # noqa: ANN401
        """Return the text model's layers."""
        return list(base.model.text_model.layers)

    def graph_stages(self) -> Mapping[str, nn.Module]:
        """Return vision tower and text model; the connector is a few kernels."""
        return {"encode_images": self.vision_tower, "prefill": self.text_model}

    def encode_pages(self, batch: Batch) -> list[Tensor]:
        """Return for each row the embeddings of its image tokens (image tokens, width)."""
        pages: list[Tensor] = []  # of each page its tiles (tiles, C, H, W)
        sizes: list[tuple[int, int]] = []
        keys: list[str] = []
        for row, (tiles, counts) in enumerate(zip(batch.pixel_values, batch.page_images, strict=True)):
            pages += tiles[: sum(counts)].split(counts)
            firsts = [sum(counts[:page]) for page in range(len(counts))]
            sizes += [batch.image_sizes[row][first] for first in firsts]
            keys += [batch.image_keys[row][first] for first in firsts]
        is_connected = "connector" in self.cached_modules

        def encode(missing: list[int]) -> Sequence[Tensor]:
            encoded = [self._encode(pages[i], *sizes[i]) for i in missing]
            return list(map(self.connect, encoded)) if is_connected else encoded

        states = torch.cat(self._cached(keys, batch.pixel_values.device, encode, batch.loaded_features))
        if not is_connected:
            # In evaluation, with its large batches, connecting all tiles at once would be the peak of memory.
            chunk = len(states) if torch.is_grad_enabled() else MAX_CONNECTED_TILES
            states = torch.cat([self.connect(tiles) for tiles in states.split(chunk)])
        return [row.flatten(0, 1) for row in states.split([sum(counts) for counts in batch.page_images])]

    def connect(self, features: Tensor) -> Tensor:
        """Shuffle and project each tile's features (I, P, width) to embeddings of image tokens (I, tokens, width)."""
        with self.autocast():
            states: Tensor = self.connector(features)
        return states

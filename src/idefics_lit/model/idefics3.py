"""Idefics3, SmolVLM and SmolVLM2: tiles of one shape, pixel shuffle and one projection.

A page is cut into tiles, and the page itself in a tile's size follows them. All tiles of a batch are stacked and run
through the vision tower in chunks. The cache holds an entry a page: the embeddings of its image tokens where the
connector is frozen too, which are up to 21 times as small as the tower's features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from idefics_lit.model.adapter import is_trained
from idefics_lit.model.batch import Batch
from idefics_lit.model.forward import Backbone
from idefics_lit.model.patches import embed_patches

# Tiles at a time. A chunk of them, 11,000 patches or more, fills a GPU.
MAX_TILES = 16
TILES_MULTIPLE = 4  # with CUDA graphs a chunk is padded to a multiple, for few shapes


class Idefics3Backbone(Backbone):
    """The forward of Idefics3, SmolVLM or SmolVLM2 with an adapter."""

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
        """Return the layers of vision tower and text model."""
        return [*base.model.vision_model.encoder.layers, *base.model.text_model.layers]

    def graph_stages(self) -> Mapping[str, nn.Module]:
        """Return vision tower and text model; the connector is a few kernels."""
        return {"encode_images": self.vision_tower, "prefill": self.text_model}

    def encode_pages(self, batch: Batch) -> list[Tensor]:
        """Return for each row the embeddings of its image tokens (image tokens, width)."""
        pages: list[Tensor] = []  # of each page its tiles (tiles, C, H, W)
        keys: list[str] = []
        for tiles, row_keys, counts in zip(batch.pixel_values, batch.image_keys, batch.page_images, strict=True):
            pages += tiles[: sum(counts)].split(counts)
            keys += [row_keys[sum(counts[:page])] for page in range(len(counts))]
        is_connected = "connector" in self.cached_modules

        def encode(missing: list[int]) -> Sequence[Tensor]:
            tiles = [tile for i in missing for tile in pages[i]]
            chunks = [self._encode_tiles(tiles[i : i + MAX_TILES]) for i in range(0, len(tiles), MAX_TILES)]
            features = torch.cat([self.connect(chunk) for chunk in chunks] if is_connected else chunks)
            return features.split([len(pages[i]) for i in missing])

        features = self._cached(keys, batch.pixel_values.device, encode)
        states = torch.cat(features)
        if not is_connected:
            # In evaluation, with its large batches, connecting all tiles at once would be the peak of memory.
            chunk = len(states) if torch.is_grad_enabled() else MAX_TILES
            states = torch.cat([self.connect(tiles) for tiles in states.split(chunk)])
        return [row.flatten(0, 1) for row in states.split([sum(counts) for counts in batch.page_images])]

    def connect(self, features: Tensor) -> Tensor:
        """Shuffle and project each tile's features (I, P, width) to embeddings of image tokens (I, tokens, width)."""
        with self.autocast():
            states: Tensor = self.connector(features)
        return states

    def _encode_tiles(self, tiles: Sequence[Tensor]) -> Tensor:
        """Return the vision tower's features (I, P, width) of at most `MAX_TILES` tiles (C, H, W)."""
        is_vision_trained = is_trained(self.vision_tower)
        no_autocast = torch.autocast(tiles[0].device.type, enabled=False)  # weights and pixels have one dtype
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_vision_trained), no_autocast:
            patches = embed_patches(self.vision_tower, torch.stack(list(tiles)).to(self.dtype), *tiles[0].shape[1:])
            if is_vision_trained:  # a graph holds the activations of one chunk, and the backward passes of all follow
                return self._encode_images(patches)
            if self._graphs and self.model.training:
                patches = F.pad(patches, (0, 0, 0, 0, 0, -len(patches) % TILES_MULTIPLE))
            return self._run("encode_images", patches)[: len(tiles)]

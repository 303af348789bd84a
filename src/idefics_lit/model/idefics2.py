"""Idefics2: a vision tower that takes pages of any shape, and a perceiver resampler.

The tower processes images one by one, since padding costs as much as pixels and needs a mask. The resampler's functions
use transformers' modules and compute what these compute on padded and masked images.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from idefics_lit.model.batch import Batch
from idefics_lit.model.forward import Backbone
from idefics_lit.model.memory import IDEFICS2_PEAKS

LONGEST_MULTIPLE = 256  # the longest image's patches are padded to a multiple, for few shapes
# With CUDA graphs to a multiple of 1024, and all patches to one of 1024, or of 1/16 of the next power of two if that is
# more.
PATCHES_MULTIPLE, PATCHES_SHARE = 1024, 16
MAX_PROJECTED_PATCHES = 4096  # at a time: the modality projection's hidden states are twelve times as wide
MAX_CONNECTED_IMAGES = 16  # at a time, in evaluation


class Idefics2Backbone(Backbone):
    """The forward of Idefics2 with an adapter."""

    peaks = IDEFICS2_PEAKS

    @staticmethod
    def feature_modules(base: Any) -> Mapping[str, nn.Module]:  # noqa: ANN401
        """Return the vision tower."""
        return {"vision tower": base.model.vision_model}

    @staticmethod
    def compiled_modules(base: Any) -> Sequence[nn.Module]:  # noqa: ANN401
        """Return the text model's layers and what processes all patches; compiled, the tower's layers are slower."""
        connector = base.model.connector
        return [
            connector.modality_projection,
            *(layer.input_context_norm for layer in connector.perceiver_resampler.layers),
            *base.model.text_model.layers,
        ]

    def graph_stages(self) -> Mapping[str, nn.Module]:
        """Return vision tower, connector and text model."""
        return {"encode_images": self.vision_tower, "connect": self.connector, "prefill": self.text_model}

    def encode_pages(self, batch: Batch) -> list[Tensor]:
        """Return for each row the embeddings of its image tokens (image tokens, width)."""
        counts = [len(row) for row in batch.image_sizes]
        images = [image for row, count in zip(batch.pixel_values, counts, strict=True) for image in row[:count]]
        sizes = [size for row in batch.image_sizes for size in row]
        keys = [key for row in batch.image_keys for key in row]
        features = self.encode_images(images, sizes, keys, batch.loaded_features)
        # In evaluation, with its large batches, connecting all images at once would be the peak of memory.
        chunk = len(features) if torch.is_grad_enabled() else MAX_CONNECTED_IMAGES
        states = [self.connect(features[start : start + chunk]) for start in range(0, len(features), chunk)]
        return [row.flatten(0, 1) for row in torch.cat(states).split(counts)]

    def encode_images(
        self,
        images: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        keys: Sequence[str],
        loaded: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> list[Tensor]:
        """Run the vision tower.

        Args:
            images: I of (C, H, W).
            sizes: height and width of each in pixels, without padding.
            keys: a cache key for each.
            loaded: features that the loader has read from the cache, by key.

        Returns:
            For each image its features (P, width) in the model's dtype.
        """

        def encode(missing: list[int]) -> Sequence[Tensor]:
            return [self._encode(images[i][None], *sizes[i])[0] for i in missing]

        return self._cached(keys, images[0].device, encode, loaded)

    def connect(self, features: Sequence[Tensor]) -> Tensor:
        """Project and resample each image's features (P, width) to embeddings of image tokens (I, latents, width)."""
        lengths = [len(patches) for patches in features]
        patches = torch.cat(list(features))
        longest = max(lengths) + -max(lengths) % (PATCHES_MULTIPLE if self._graphs else LONGEST_MULTIPLE)
        if self._graphs:
            multiple = max(PATCHES_MULTIPLE, 2 ** len(patches).bit_length() // PATCHES_SHARE)
            patches = F.pad(patches, (0, 0, 0, -len(patches) % multiple))
        latents = self.connector.perceiver_resampler.n_latents
        gather_index, attention_mask = resampler_index(lengths, longest, latents, patches.device)
        with self.autocast():
            return self._run("connect", patches, gather_index, attention_mask)

    def _connect(self, patches: Tensor, gather_index: Tensor, attention_mask: Tensor) -> Tensor:
        resampler = self.connector.perceiver_resampler
        chunks = patches.split(MAX_PROJECTED_PATCHES)
        context = torch.cat([self.connector.modality_projection(chunk) for chunk in chunks])
        latents = resampler.latents.expand(len(gather_index), -1, -1)
        for layer in resampler.layers:
            inputs = (layer, latents, context, gather_index, attention_mask)
            # The inputs of the layers' adapters have a row for each patch. Recomputing them is cheap on a GPU and saves
            # its memory; CUDA graphs can't capture it.
            is_repeated = patches.device.type != "cpu" and not self._graphs
            latents = (
                checkpoint(resampler_layer, *inputs, use_reentrant=False) if is_repeated else resampler_layer(*inputs)
            )
        states: Tensor = resampler.norm(latents)
        return states


def resampler_index(lengths: Sequence[int], longest: int, latents: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ``gather_index`` and ``attention_mask`` of `resampler_attention` for I concatenated images.

    Args:
        lengths: patches of each image.
        longest: P, at least the largest of them.
        latents: the resampler's latents for each image.
        device: of the result.
    """
    gather_index = torch.arange(longest, device=device).repeat(len(lengths), 1)
    attention_mask = torch.ones(len(lengths), 1, 1, longest + latents, dtype=torch.bool, device=device)
    for i, length in enumerate(lengths):
        # Padding repeats the image's own patches; the mask hides it.
        gather_index[i].remainder_(length).add_(sum(lengths[:i]))
        attention_mask[i, ..., length:longest] = False
    return gather_index, attention_mask.expand(-1, -1, latents, -1).contiguous()


def resampler_layer(
    layer: Any,  # noqa: ANN401
    latents: Tensor,
    context: Tensor,
    gather_index: Tensor,
    attention_mask: Tensor,
) -> Tensor:
    """Run a layer of the perceiver resampler; shapes as in `resampler_attention`."""
    queries, context = layer.input_latents_norm(latents), layer.input_context_norm(context)
    latents = latents + resampler_attention(layer.self_attn, queries, context, gather_index, attention_mask)
    states: Tensor = latents + layer.mlp(layer.post_attention_layernorm(latents))
    return states


def resampler_attention(
    attention: Any,  # noqa: ANN401
    latents: Tensor,
    context: Tensor,
    gather_index: Tensor,
    attention_mask: Tensor,
) -> Tensor:
    """Attend from latents to context and latents, as transformers' Idefics2PerceiverAttention.

    transformers concatenates the two before the projections. This projects them apart: the context needs no gradient,
    is sixty times as long, and stays without padding.

    Args:
        attention: the Idefics2PerceiverAttention.
        latents: (I, latents, width).
        context: (patches of all images, width).
        gather_index: (I, P), for each image indices into the context.
        attention_mask: (I, 1, latents, P + latents) bool, False for padding.

    Returns:
        (I, latents, width).
    """

    def split_heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def keys_or_values(project: Any) -> Tensor:  # noqa: ANN401
        patches = project(context).index_select(0, gather_index.flatten()).unflatten(0, gather_index.shape)
        states = split_heads(torch.cat([patches, project(latents)], dim=1))
        return states.repeat_interleave(attention.num_key_value_groups, dim=1)

    attended = F.scaled_dot_product_attention(
        split_heads(attention.q_proj(latents)),
        keys_or_values(attention.k_proj),
        keys_or_values(attention.v_proj),
        attn_mask=attention_mask,
        dropout_p=attention.attention_dropout if attention.training else 0.0,
        scale=attention.scaling,
    )
    result: Tensor = attention.o_proj(attended.transpose(1, 2).flatten(2))
    return result

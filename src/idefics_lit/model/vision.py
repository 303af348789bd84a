"""Functions of the vision tower and of the perceiver resampler, for images without padding.

They use transformers' modules and compute what these compute on padded and masked images.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embed_patches(tower: Any, image: Tensor, height: int, width: int) -> Tensor:  # noqa: ANN401
    """Return the patch embeddings (1, P, width) of an image.

    Args:
        tower: transformers' Idefics2VisionTransformer.
        image: (C, H, W), padding included, in the tower's dtype.
        height: pixels without padding; those beyond the last complete patch are cut off.
        width: as ``height``.
    """
    config, embeddings = tower.config, tower.embeddings
    side = config.patch_size
    rows, columns = height // side, width // side
    pixels = image[None, :, : rows * side, : columns * side]
    # `embeddings.forward` rounds coordinates to 16 bits in transformers before 5.21, and synchronizes with the GPU.
    positions = vision_position_ids(rows, columns, config.image_size // side, pixels.device)
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
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

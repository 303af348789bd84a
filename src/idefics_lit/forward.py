"""Idefics2's forward in its parts: pages are looked at once, whatever then reads them.

The parts are transformers' own modules; only their order is here. The vision tower stays out of autograd where it is
frozen. Pages of one shape go through it together, none is padded: padding costs as much as pages do, and a mask more.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from idefics_lit.cache import FeatureCache

Size = tuple[int, int]


def look(
    model: PeftModel, images: Tensor, sizes: Sequence[Size], keys: Sequence[str] = (), cache: FeatureCache | None = None
) -> list[Tensor]:
    """Run the vision tower.

    Args:
        model: Idefics2 with an adapter.
        images: (I, C, H, W).
        sizes: height and width of each in pixels; the rest is padding.
        keys: of each image, for the cache.
        cache: where features are taken from, and kept; only for a tower that is frozen.

    Returns:
        For each image (its patches, width), in the model's dtype.
    """
    tower = _base(model).model.vision_model
    side = tower.config.patch_size
    grids = [(height // side, width // side) for height, width in sizes]
    found: dict[int, Tensor] = {}
    if cache is not None:
        known = {i: features for i, key in enumerate(keys) if (features := cache.get(key)) is not None}
        found = {i: features.to(images.device, non_blocking=True) for i, features in known.items()}

    def run(members: list[int]) -> Tensor:
        height, width = grids[members[0]]
        pixels = images[members, :, : height * side, : width * side].to(_base(model).dtype)
        every = torch.ones(len(members), height, width, dtype=torch.bool, device=images.device)
        hidden = tower.embeddings(pixel_values=pixels, patch_attention_mask=every)
        return tower.post_layernorm(tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state)

    with torch.set_grad_enabled(torch.is_grad_enabled() and is_vision_trained(model)):
        seen = _by_group({i: grid for i, grid in enumerate(grids) if i not in found}, run)
    if cache is not None:
        for i, features in seen.items():
            cache.put(keys[i], features)
    return [found[i] if i in found else seen[i] for i in range(len(sizes))]


def is_vision_trained(model: PeftModel) -> bool:
    """Whether the vision tower has an adapter."""
    return any(parameter.requires_grad for parameter in _base(model).model.vision_model.parameters())


def connect(model: PeftModel, features: Sequence[Tensor]) -> list[Tensor]:
    """Turn each image's patches into the (latents, width) that the text model reads in place of image tokens."""
    connector = _base(model).model.connector

    def run(members: list[int]) -> Tensor:
        patches = torch.stack([features[i] for i in members])
        return connector(patches, attention_mask=torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device))

    states = _by_group({i: len(patches) for i, patches in enumerate(features)}, run)
    return [states[i] for i in range(len(features))]


def see(model: PeftModel, batch: Mapping[str, Any], cache: FeatureCache | None = None) -> list[Tensor]:
    """Return what the text model reads of each of a batch's R rows: (image tokens, width)."""
    counts = [len(row) for row in batch["image_sizes"]]
    images = [batch["pixel_values"][row, :count] for row, count in enumerate(counts)]
    sizes = [size for row in batch["image_sizes"] for size in row]
    keys = [key for row in batch["image_keys"] for key in row] if cache else ()
    states = iter(connect(model, look(model, torch.cat(images), sizes, keys, cache)))
    return [torch.cat(list(islice(states, count))) for count in counts]


def embed(model: PeftModel, input_ids: Tensor, pages: Sequence[Tensor]) -> Tensor:
    """Embed tokens (B, T), each row's image tokens as what was seen of its page; returns (B, T, width)."""
    embeddings = model.get_input_embeddings()(input_ids)
    images = (input_ids == _base(model).config.image_token_id)[..., None]
    return embeddings.masked_scatter(images, torch.cat(list(pages)).to(embeddings.dtype))


def read(model: PeftModel, batch: Mapping[str, Any], pages: Sequence[Tensor]) -> Tensor:
    """Read a batch's rows with their pages; returns the text model's last hidden states (R, T, width)."""
    outputs = _base(model).model.text_model(
        inputs_embeds=embed(model, batch["input_ids"], pages),
        attention_mask=batch["attention_mask"],
        position_ids=batch.get("position_ids"),
        use_cache=False,
    )
    return outputs.last_hidden_state


def logits(model: PeftModel, hidden: Tensor) -> Tensor:
    """Turn hidden states (..., width) into the logits of the next token (..., V)."""
    return _base(model).lm_head(hidden)


def _by_group(keys: Mapping[int, Any], run: Callable[[list[int]], Tensor]) -> dict[int, Tensor]:
    """Run what has the same key together; return each one's result."""
    groups: dict[Any, list[int]] = {}
    for i, key in keys.items():
        groups.setdefault(key, []).append(i)
    return {i: result for members in groups.values() for i, result in zip(members, run(members), strict=True)}


def _base(model: PeftModel) -> Any:  # noqa: ANN401
    return model.get_base_model()

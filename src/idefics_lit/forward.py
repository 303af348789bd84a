"""Idefics2's forward in its parts: pages are looked at once, whatever then reads them.

The parts are transformers' own modules; only their order is here. The vision tower stays out of autograd where it is
frozen. Pages go through it one by one, unpadded: padding costs as much as pages do, and a mask more. Nothing here waits
for the device, so that it never waits for us.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    seen: dict[int, Tensor] = {}
    if cache is not None:
        known = {i: features for i, key in enumerate(keys) if (features := cache.get(key)) is not None}
        seen = {i: features.to(images.device, non_blocking=True) for i, features in known.items()}

    with torch.set_grad_enabled(torch.is_grad_enabled() and is_vision_trained(model)):
        for i, (height, width) in enumerate(grids):
            if i in seen:
                continue
            pixels = images[i, None, :, : height * side, : width * side].to(_base(model).dtype)
            every = torch.ones(1, height, width, dtype=torch.bool, device=images.device)
            hidden = tower.encoder(inputs_embeds=tower.embeddings(pixels, every), attention_mask=None).last_hidden_state
            seen[i] = tower.post_layernorm(hidden)[0]
            if cache is not None:
                cache.put(keys[i], seen[i])
    return [seen[i] for i in range(len(sizes))]


def is_vision_trained(model: PeftModel) -> bool:
    """Whether the vision tower has an adapter."""
    return any(parameter.requires_grad for parameter in _base(model).model.vision_model.parameters())


def connect(model: PeftModel, features: Sequence[Tensor]) -> Tensor:
    """Turn each image's patches into what the text model reads in place of image tokens, (I, latents, width)."""
    connector = _base(model).model.connector
    resampler = connector.perceiver_resampler
    contexts = [connector.modality_projection(patches) for patches in features]
    context = pad_sequence(contexts, batch_first=True)
    latents = resampler.latents.expand(len(contexts), -1, -1).clone()
    if torch.is_grad_enabled():
        latents.requires_grad_()  # as those of the next layers do: a layer is compiled once
    # Each latent sees its image's patches, and all latents, which stand behind the patches and their padding.
    sees = torch.zeros(len(contexts), 1, 1, context.shape[1] + latents.shape[1], dtype=torch.bool)
    for i, patches in enumerate(contexts):
        sees[i, ..., : len(patches)] = True
    sees[..., context.shape[1] :] = True
    mask = sees.to(context.device, non_blocking=True).expand(-1, -1, latents.shape[1], -1)
    for layer in resampler.layers:
        latents = layer(latents, context, attention_mask=mask)
    return resampler.norm(latents)


def see(model: PeftModel, batch: Mapping[str, Any], cache: FeatureCache | None = None) -> list[Tensor]:
    """Return what the text model reads of each of a batch's R rows: (image tokens, width)."""
    counts = [len(row) for row in batch["image_sizes"]]
    images = [batch["pixel_values"][row, :count] for row, count in enumerate(counts)]
    sizes = [size for row in batch["image_sizes"] for size in row]
    keys = [key for row in batch["image_keys"] for key in row] if cache else ()
    states = connect(model, look(model, torch.cat(images), sizes, keys, cache))
    return [row.flatten(0, 1) for row in states.split(counts)]


def embed(model: PeftModel, input_ids: Tensor, pages: Sequence[Tensor]) -> Tensor:
    """Embed tokens (B, T), each row's image tokens as what was seen of its page; returns (B, T, width)."""
    embeddings = model.get_input_embeddings()(input_ids)
    images = (input_ids == _base(model).config.image_token_id)[..., None]
    return embeddings.masked_scatter(images, torch.cat(list(pages)).to(embeddings.dtype))


def read(model: PeftModel, batch: Mapping[str, Any], pages: Sequence[Tensor]) -> Tensor:
    """Read a batch's rows with their pages; returns the text model's last hidden states (R, T, width)."""
    mask = batch["attention_mask"]
    outputs = _base(model).model.text_model(
        inputs_embeds=embed(model, batch["input_ids"], pages),
        # Padding is at the right: what comes before never sees it, and attention is faster without a mask.
        attention_mask=mask if mask.ndim == 4 else None,
        position_ids=batch.get("position_ids"),
        use_cache=False,
    )
    return outputs.last_hidden_state


def logits(model: PeftModel, hidden: Tensor) -> Tensor:
    """Turn hidden states (..., width) into the logits of the next token (..., V)."""
    return _base(model).lm_head(hidden)


def _base(model: PeftModel) -> Any:  # noqa: ANN401
    return model.get_base_model()

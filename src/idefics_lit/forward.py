"""Idefics2's forward in its parts: pages are seen once, whatever then reads them.

The parts are transformers' own modules; only their order is here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor


def see(model: PeftModel, pixel_values: Tensor, pixel_attention_mask: Tensor) -> list[Tensor]:
    """Turn pages into what the text model reads in place of image tokens.

    Args:
        model: Idefics2 with an adapter; its vision tower is frozen.
        pixel_values: (R, N, C, H, W).
        pixel_attention_mask: (R, N, H, W) bool; an image that is all False is padding.

    Returns:
        For each of the R rows, (image tokens, width).
    """
    idefics2 = _base(model).model
    side = idefics2.config.vision_config.patch_size
    images, mask = pixel_values.flatten(0, 1), pixel_attention_mask.flatten(0, 1)
    counts = [pixel_values.shape[1]] * len(pixel_values)
    if counts[0] > 1:
        real = mask.flatten(1).any(1)
        counts = real.view(pixel_values.shape[:2]).sum(1).tolist()
        images, mask = images[real], mask[real]
    patches = mask.unfold(1, side, side).unfold(2, side, side).all(-1).all(-1)
    with torch.no_grad():
        seen = idefics2.vision_model(pixel_values=images.to(idefics2.dtype), patch_attention_mask=patches)
    states = idefics2.connector(seen.last_hidden_state, attention_mask=patches.flatten(1))
    return [row.flatten(0, 1) for row in states.split(counts)]


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


def _base(model: PeftModel) -> Any:  # noqa: ANN401
    return model.get_base_model()

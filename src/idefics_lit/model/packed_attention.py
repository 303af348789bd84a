"""Attention of packed rows: a mask for the questions alone, none for the page before them.

Attention with a mask computes all pairs of tokens, also those that it hides, and has no fast kernel. In the columns of
the page, which are most of a row's, attention is causal. Fast kernels compute this without a mask.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from idefics_lit.model.compat import attention_implementation, set_attention_implementation

NAME = "idefics_lit_packed"
MIN_PAGE_TOKENS = 512  # with shorter pages, two calls take longer than one
PAGE_MULTIPLE = 64  # the columns without a mask are rounded down to a multiple, for few shapes


def use_packed_attention(text_model: Any) -> bool:  # noqa: ANN401
    """Let a text model's layers take masks of `without_page`; other masks and None work as before.

    Returns:
        Whether they do: only layers that use torch's attention can.
    """
    attentions = [layer.self_attn for layer in text_model.layers]
    if {attention_implementation(attention.config) for attention in attentions} - {NAME, "sdpa"}:
        return False
    for attention in attentions:
        attention.config = copy(attention.config)  # transformers' own forward makes the masks of the model's
        set_attention_implementation(attention.config, NAME)
    return True


def without_page(mask: Tensor, page_tokens: int) -> Tensor:
    """Return the rows of a mask that need one.

    Args:
        mask: (R, 1, T, T), True where a query token may attend to a key token.
        page_tokens: the first queries, for which the mask is causal.

    Returns:
        (R, 1, T - page_tokens, T), with fewer page tokens or all rows where that is as fast.
    """
    start = page_tokens - page_tokens % PAGE_MULTIPLE if page_tokens >= MIN_PAGE_TOKENS else 0
    return mask[:, :, start:].contiguous() if start else mask


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attend as transformers' ``sdpa_attention_forward``; queries that a mask of `without_page` lacks are causal."""
    if attention_mask is None or attention_mask.shape[2] in (1, query.shape[2]):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    start = query.shape[2] - attention_mask.shape[2]
    states = query[:, :, :start], key[:, :, :start], value[:, :, :start]
    page, _ = sdpa_attention_forward(module, *states, None, **{**options, "is_causal": True})
    questions, _ = sdpa_attention_forward(module, query[:, :, start:], key, value, attention_mask, **options)
    return torch.cat([page, questions], dim=1), None


AttentionInterface.register(NAME, packed_attention)

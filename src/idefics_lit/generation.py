"""Greedy answers to a batch's prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import ProcessorMixin

from idefics_lit.forward import Idefics2Forward


def generate_answers(
    parts: Idefics2Forward,
    processor: ProcessorMixin,
    batch: Mapping[str, Any],
    pages: Sequence[Tensor],
    max_new_tokens: int,
) -> list[str]:
    """Generate greedily until ``<end_of_utterance>``.

    Args:
        parts: of a model in eval mode.
        processor: the model's.
        batch: `Idefics2Collator`'s for evaluation: ``prompt_input_ids`` and ``prompt_attention_mask`` (B, T),
            left-padded, and ``prompt_rows`` (B).
        pages: what `Idefics2Forward.see` saw of each row's page.
        max_new_tokens: the longest answer.

    Returns:
        B texts, stripped.
    """
    tokenizer = processor.tokenizer
    fake, image, end = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    with parts.autocast():
        ids = parts.model.generate(
            inputs_embeds=parts.embed(batch["prompt_input_ids"], [pages[row] for row in batch["prompt_rows"].tolist()]),
            attention_mask=batch["prompt_attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # Explicit: generation that takes them from the model's files has been seen to go on past the answer.
            eos_token_id=[tokenizer.eos_token_id, end],
            bad_words_ids=[[fake], [image]],
            pad_token_id=tokenizer.pad_token_id,
        )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in texts]

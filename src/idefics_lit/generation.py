"""Greedy answers to a batch's prompts."""

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import ProcessorMixin


def generate_answers(
    model: PeftModel, processor: ProcessorMixin, batch: Mapping[str, Any], max_new_tokens: int
) -> list[str]:
    """Generate greedily until ``<end_of_utterance>``.

    Args:
        model: in eval mode.
        processor: the model's.
        batch: `Idefics2Collator`'s for evaluation: ``prompt_input_ids`` and ``prompt_attention_mask`` (B, T),
            left-padded, and the pages' ``pixel_values`` and ``pixel_attention_mask``.
        max_new_tokens: the longest answer.

    Returns:
        B texts, stripped.
    """
    tokenizer = processor.tokenizer
    fake, image, end = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    prompts = batch["prompt_input_ids"]
    ids = model.generate(
        input_ids=prompts,
        attention_mask=batch["prompt_attention_mask"],
        pixel_values=batch["pixel_values"],
        pixel_attention_mask=batch["pixel_attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        # Explicit: generation that takes them from the model's files has been seen to go on past the answer.
        eos_token_id=[tokenizer.eos_token_id, end],
        bad_words_ids=[[fake], [image]],
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = tokenizer.batch_decode(ids[:, prompts.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]

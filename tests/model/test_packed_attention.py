"""Attention with a mask for the questions alone is that with the whole mask."""

import pytest
import torch
import transformers
from PIL import Image

from idefics_lit import Example, Idefics2Collator, Idefics2Module, LoRA, load_processor
from idefics_lit.evaluation.decoding import PrefillCache


@pytest.fixture
def batch(stand_in):
    """Rows with pages of different lengths and different numbers of questions."""
    pages = [Image.effect_noise(size, 80).convert("RGB") for size in ((448, 348), (400, 448))]
    questions = [(0, "Who?"), (0, "When is it?"), (0, "What?"), (1, "Where?"), (1, "How many pages are there?")]
    examples = [Example(i, text, [pages[page]], ["July 4"], page_id=page) for i, (page, text) in enumerate(questions)]
    return Idefics2Collator(load_processor(stand_in), train=True)(examples)


def results(ours, batch):
    ours.zero_grad()
    loss, _ = ours.loss(batch)
    loss.backward()
    with torch.no_grad():
        logits, cache = ours(batch)[batch.attention_mask.bool()], PrefillCache()
        ours.backbone.prefill(batch, ours.encode_pages(batch), cache)
    keys = torch.stack([keys for keys, _ in cache.layers]).transpose(2, 3)[:, batch.attention_mask.bool()]
    return [logits, keys, *(p.grad.clone() for p in ours.parameters() if p.requires_grad)]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_it_is_attention_with_the_whole_mask(stand_in, batch, monkeypatch, gradient_checkpointing):
    torch.manual_seed(0)
    options = {"lora": LoRA(dropout=0.0), "quantization": "none", "gradient_checkpointing": gradient_checkpointing}
    ours = Idefics2Module(stand_in, **options)
    ours.configure_model()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    masks, attend = set(), torch.nn.functional.scaled_dot_product_attention

    def seen(query, key, value, attn_mask=None, **options):
        if key.shape[2] == batch.input_ids.shape[1] or attn_mask is None:
            masks.add(None if attn_mask is None else attn_mask.shape[2])
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", seen)
    tokens = batch.input_ids.shape[1]
    assert batch.page_tokens < tokens
    found = {}
    for name, shortest in {"whole mask": tokens, "questions": 100}.items():
        monkeypatch.setattr("idefics_lit.model.packed_attention.MIN_PAGE_TOKENS", shortest)
        masks.clear()
        found[name] = results(ours, batch)
        assert masks == {None, tokens if name == "whole mask" else tokens - batch.page_tokens // 64 * 64}
    for whole, questions in zip(*found.values(), strict=True):
        torch.testing.assert_close(questions, whole, rtol=1e-4, atol=1e-5)
    theirs = ours.model(**batch.model_inputs(), use_cache=False)
    torch.testing.assert_close(theirs.logits[batch.attention_mask.bool()], found["questions"][0], rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_is_saved_and_called(stand_in, tmp_path):
    """Its configuration names no attention, and other callers' masks are attended to."""
    ours = Idefics2Module(stand_in, quantization="none")
    ours.configure_model()
    base = ours.model.get_base_model()
    assert "idefics_lit" not in base.config.to_json_string(use_diff=False)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(stand_in, dtype=torch.float32)
    ids, mask = torch.arange(100, 130).repeat(2, 1), torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0  # padding on the left
    for inputs in ({"attention_mask": mask}, {}):
        expected = reference(input_ids=ids, **inputs).logits
        torch.testing.assert_close(ours.model(input_ids=ids, **inputs).logits, expected, rtol=0, atol=1e-6)

"""Idefics3 and SmolVLM: what the package computes is what transformers computes."""

import re

import pytest
import torch
from comparisons import StepLosses, adapted_module, alone, answer_logits_loss_and_gradients, trainer_losses
from lightning import Trainer
from PIL import Image
from stand_ins import TILE, build_stand_in
from torch.utils.data import DataLoader

from idefics_lit import Example, Idefics2Collator, Idefics2Module, InputError, LoRA, load_processor
from idefics_lit.evaluation.decoding import GreedyDecoder
from idefics_lit.model.feature_cache import MemoryCache
from idefics_lit.model.idefics3 import Idefics3Backbone
from idefics_lit.model.loading import load_model

CONNECTOR_FROZEN = r".*text_model.*(q_proj|v_proj)|lm_head"
CPU = {"accelerator": "cpu", "precision": "32-true", "logger": False, "enable_progress_bar": False,
       "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip


def page(width, height, seed):
    """A page of noise with black tiles in its corner."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8)
    pixels[: height // 2, : width // 2] = 0
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module")
def examples():
    """Seven questions: on pages of 17, 9 and 5 tiles, and one on two of these pages."""
    tall, wide, narrow = page(348, 448, 1), page(900, 300, 2), page(100, 500, 3)
    return [
        Example(1, "Who?", [tall], ["Ann"], page_id="tall"),
        Example(2, "When is it?", [tall], ["July 4"], page_id="tall"),
        Example(3, "What is the number?", [tall], ["12 345"], page_id="tall"),
        Example(4, "Which colour?", [wide], ["½ red"], page_id="wide"),
        Example(5, "Where?", [wide], ["here"], page_id="wide"),
        Example(6, "Why?", [narrow], ["x"], page_id="narrow"),
        Example(7, "How many?", [wide, tall], ["2"], page_id="both"),
    ]


@pytest.fixture(scope="module")
def collate(stand_in):
    return Idefics2Collator(load_processor(stand_in), train=True)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("target_modules", [None, CONNECTOR_FROZEN], ids=["connector", "no connector"])
def test_loss_and_logits_are_those_of_transformers(stand_in, examples, collate, quantization, target_modules):
    """Also of black tiles, of rows with several pages, and of packed rows."""
    ours = adapted_module(stand_in, target_modules, quantization=quantization)
    assert isinstance(ours.backbone, Idefics3Backbone)
    for batch in (collate(alone(examples)), collate(examples)):
        assert {count for row in batch.page_images for count in row} == {17, 9, 5}
        theirs, (loss, tokens) = ours.model(**batch.model_inputs(), use_cache=False), ours.loss(batch)
        assert (loss / tokens).item() == pytest.approx(theirs.loss.item(), abs=1e-6)
        real = batch.attention_mask.bool()
        assert torch.allclose(ours(batch)[real], theirs.logits[real], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "geometry", "tokens"),
    [("idefics3", (364, 14, 2), 169), ("idefics3", (384, 14, 3), 81), ("smolvlm", (512, 16, 4), 64)],
    ids=["Idefics3-8B", "SmolVLM-2.2B", "SmolVLM-256M"],
)
def test_loss_and_logits_with_the_tiles_of_the_released_models(tmp_path, examples, kind, geometry, tokens):
    """Of a tile of 384 pixels the last 6 are in no patch of 14."""
    folder = str(build_stand_in(kind, tmp_path, geometry=geometry))
    ours = adapted_module(folder, quantization="none")
    batch = Idefics2Collator(load_processor(folder, image_size=2 * geometry[0]), train=True)(alone(examples[4:7]))
    images = sum(map(len, batch.image_sizes))
    assert (batch.input_ids == ours.processor.image_token_id).sum() == tokens * images
    with torch.no_grad():
        theirs, (loss, count) = ours.model(**batch.model_inputs(), use_cache=False), ours.loss(batch)
        real = batch.attention_mask.bool()
        assert torch.allclose(ours(batch)[real], theirs.logits[real], atol=1e-5)
    assert (loss / count).item() == pytest.approx(theirs.loss.item(), abs=1e-6)


def test_logits_and_gradients_of_packed_rows_are_those_of_rows_of_their_own(stand_in, examples, collate):
    ours, results = adapted_module(stand_in, quantization="none"), []
    for batch in (collate(examples), collate(alone(examples))):
        results.append(answer_logits_loss_and_gradients(ours, batch))
    (packed, packed_loss, packed_tokens, packed_grads), (plain, loss, tokens, grads) = results
    assert torch.equal(packed_tokens, tokens) and packed_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    order = packed.sum(1).sort().indices, plain.sum(1).sort().indices  # packing changes the order of the answers
    assert torch.allclose(packed[order[0]], plain[order[1]], atol=1e-5)
    assert any("modality_projection" in name for name in grads)
    assert all(torch.allclose(packed_grads[name], grads[name], rtol=1e-3, atol=1e-4) for name in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target_modules", [None, CONNECTOR_FROZEN], ids=["connector", "no connector"])
def test_16_bits_and_checkpointing_have_the_loss_and_the_gradients(stand_in, examples, dtype, target_modules):
    """In 4 bits, with cached features, as on a GPU; in float32 they are transformers' own."""
    collate, results = Idefics2Collator(load_processor(stand_in, image_size=2 * TILE), train=True), []
    batch = collate(examples[:5])
    for precision, checkpointing in ((torch.float32, False), (dtype, False), (dtype, True)):
        torch.manual_seed(0)
        lora = LoRA(dropout=0.0, **({"target_modules": target_modules} if target_modules else {}))
        model = load_model(
            stand_in,
            quantization="nf4",
            quantize_vision=False,
            lora=lora,
            dtype=precision,
            device=torch.device("cpu"),
            gradient_checkpointing=checkpointing,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        backbone = Idefics3Backbone(model, MemoryCache(0.1))
        for _ in range(2):  # the second time from the cache
            model.zero_grad()
            loss, tokens = backbone.loss(batch, backbone.prefill(batch, backbone.encode_pages(batch)))
            (loss / tokens).backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient.dtype == torch.float32 for gradient in trained.values())
        results.append(((loss / tokens).item(), torch.cat([gradient.flatten() for gradient in trained.values()])))
    (exact, exact_gradient), plain, checkpointed = results
    assert checkpointed[0] == plain[0] == pytest.approx(exact, rel=0.01)
    assert torch.allclose(checkpointed[1], plain[1], rtol=1e-3, atol=1e-4)
    assert torch.cosine_similarity(plain[1], exact_gradient, dim=0) > 0.98


def test_every_loss_is_transformers_trainers(stand_in, examples, tmp_path):
    """20 optimizer steps of 2 x 2 examples in float32."""
    collate = Idefics2Collator(load_processor(stand_in, image_size=2 * TILE), train=True)
    data = [alone(examples)[i % len(examples)] for i in range(20 * 4)]
    losses = StepLosses()
    torch.manual_seed(0)
    options = {"lora": LoRA(dropout=0.0), "quantization": "none", "lr": 1e-3, "warmup_steps": 5}
    ours = Idefics2Module(stand_in, **options)
    trainer = Trainer(**CPU, max_steps=20, accumulate_grad_batches=2, gradient_clip_val=1.0, callbacks=[losses])
    trainer.fit(ours, DataLoader(data, batch_size=2, collate_fn=collate))
    torch.manual_seed(0)
    theirs = Idefics2Module(stand_in, **options)
    expected = trainer_losses(theirs, data, collate, tmp_path, steps=20, accumulate=2)
    assert len(losses.values) == len(expected) == 20
    assert losses.values == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.5


def test_answers_are_those_of_generate(stand_in, examples, monkeypatch):
    """Token for token, decoded from the prefill's keys and values instead of from the pixels."""
    ours = adapted_module(stand_in, std=0.5, quantization="none", max_new_tokens=12)
    collate, vocabulary = Idefics2Collator(ours.processor, train=False), ours.processor.tokenizer.get_vocab()
    pattern = r"<(fake_token_around_image|image|global-img|row_\d_col_\d)>"
    suppressed = [token for name, token in vocabulary.items() if re.fullmatch(pattern, name)]
    assert len(suppressed) in (2, 39)
    expected = []
    for example in alone(examples):
        one = collate([example])
        ids = ours.model.generate(
            input_ids=one.prompts.input_ids,
            attention_mask=one.prompts.attention_mask,
            pixel_values=one.pixel_values,
            pixel_attention_mask=one.pixel_attention_mask,
            max_new_tokens=12,
            suppress_tokens=suppressed,
            eos_token_id=sorted({*ours.backbone.eos_token_ids, ours.processor.tokenizer.eos_token_id}),
        )
        expected.append(ids[0, one.prompts.input_ids.shape[1] :].tolist())
    assert len({*map(tuple, expected)}) > 3
    for given in (examples, alone(examples)):
        assert ours.evaluator.decode(collate(given)).ids == expected
    monkeypatch.setattr("idefics_lit.evaluation.decoding.ROWS_MULTIPLE", 2)
    ours.evaluator.decoder = GreedyDecoder(ours.backbone, ours.processor, 12, graphs=True)  # fixed addresses
    assert [ours.evaluator.decode(collate(examples[i : i + 2])).ids[0] for i in range(7)] == expected


@torch.no_grad()
def test_an_answer_ends_at_each_end_token_and_names_no_tile(stand_in, examples):
    """Idefics3-8B's generation_config has ends that its tokenizer doesn't name."""
    ours = adapted_module(stand_in, quantization="none", max_new_tokens=4)
    collate, tokenizer = Idefics2Collator(ours.processor, train=False), ours.processor.tokenizer
    vocabulary, batch = tokenizer.get_vocab(), collate(examples[:1])
    ends = {"<end_of_utterance>", "<|eot_id|>", tokenizer.eos_token} & {*vocabulary}
    for token in [*ends, *(name for name in vocabulary if re.match("<row_1_|<global-img>|<image>", name))]:
        likeliest = torch.tensor([vocabulary[token]])
        hook = ours.backbone.lm_head.register_forward_hook(
            lambda m, i, out, ids=likeliest: out.index_fill(-1, ids, 1e4)
        )
        ids = ours.evaluator.decode(batch).ids[0]
        hook.remove()
        assert (ids == likeliest.tolist()) if token in ends else (len(ids) == 4 and vocabulary[token] not in ids)


@pytest.mark.parametrize(
    ("where", "target_modules"), [("memory", None), ("folder", None), ("folder", CONNECTOR_FROZEN)]
)
def test_cached_features_change_nothing(stand_in, examples, collate, tmp_path, where, target_modules):
    """One entry a page, which is smaller behind a connector that is frozen."""
    folder = tmp_path / "features"
    cached = adapted_module(
        stand_in, target_modules, quantization="none", feature_cache=where if where == "memory" else str(folder)
    )
    plain, calls = adapted_module(stand_in, target_modules, quantization="none"), []
    base = cached.model.get_base_model().model
    base.vision_model.encoder.register_forward_hook(lambda *_: calls.append(1))
    batches = [collate(examples[:4]), collate(examples[3:]), collate([examples[6], examples[0]])]
    expected = [plain.loss(batch)[0] for batch in batches]
    assert [cached.loss(batch)[0] for batch in batches] == expected and len(calls) == 3
    assert [cached.loss(batch)[0] for batch in batches] == expected and len(calls) == 3
    loss = cached.loss(batches[0])[0]
    loss.backward()
    assert not target_modules or not any(p.grad is not None for p in base.connector.parameters())
    if where == "folder":
        sizes = sorted(file.stat().st_size for file in folder.glob("*.safetensors"))
        width = 16 * 256 if target_modules else 64 * 192  # a tile's image tokens, or its patches
        assert [round(size / (4 * width)) for size in sizes] == [5, 9, 17]


def test_features_before_the_connector_are_no_features_behind_it(stand_in, examples, collate, tmp_path):
    """Runs with and without an adapter on the connector share a folder."""
    losses = []
    for target_modules in (None, CONNECTOR_FROZEN, None):
        for options in ({}, {"feature_cache": str(tmp_path)}):
            losses.append(
                adapted_module(stand_in, target_modules, quantization="none", **options).loss(collate(examples))[0]
            )
    assert losses[0] == losses[1] == losses[4] == losses[5] and losses[2] == losses[3] != losses[0]
    assert len([*tmp_path.glob("*.safetensors")]) == 6


def test_a_connector_that_is_unfrozen_later_gets_gradients(stand_in, examples, collate):
    ours = adapted_module(stand_in, CONNECTOR_FROZEN, quantization="none", feature_cache="memory")
    batch = collate(examples[:1])
    expected = ours.loss(batch)[0]
    weight = ours.model.get_base_model().model.connector.modality_projection.proj.weight.requires_grad_()
    with pytest.warns(UserWarning, match="the connector is trained, so that no features are kept"):
        loss = ours.loss(batch)[0]
    loss.backward()
    assert loss == expected and weight.grad.any()


def test_the_head_of_a_model_with_tied_weights_is_refused(tmp_path):
    folder = str(build_stand_in("smolvlm", tmp_path, tie_word_embeddings=True))
    with pytest.raises(InputError, match=r"matches lm_head, but .* are one weight .* leave lm_head out"):
        adapted_module(folder, quantization="none")
    assert adapted_module(folder, CONNECTOR_FROZEN.removesuffix("|lm_head"), quantization="none")

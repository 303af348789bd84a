"""Packed questions have the logits, loss, gradients and answers of questions in rows of their own."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import transformers
from comparisons import adapted_module, alone, answer_logits_loss_and_gradients
from PIL import Image
from torch.utils.data import DistributedSampler

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.example import Example
from idefics_lit.data.samplers import EvalSampler, TrainSampler
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.evaluation.decoding import GreedyDecoder
from idefics_lit.pretrained import load_processor
from idefics_lit.training.module import Idefics2Module


@pytest.fixture(scope="module")
def examples():
    """Three pages with two to four questions each."""
    pages = SyntheticPages("train", 3)
    found = [replace(pages[i], page_id=page) for i, page in enumerate(pages.page_ids)]
    return [e for page in dict.fromkeys(pages.page_ids) for e in [e for e in found if e.page_id == page][:4]]


@pytest.fixture(scope="module")
def processor(tiny):
    return load_processor(tiny)


def test_a_row_holds_the_page_once(processor, examples):
    batch = Idefics2Collator(processor, train=True)(examples)
    assert len(batch.pixel_values) == len({e.page_id for e in examples}) < len(examples)
    assert (batch.input_ids == processor.image_token_id).sum(1).tolist() == [64] * 3
    assert batch.packed_attention_mask.shape == (3, 1, *batch.input_ids.shape[1:] * 2)


@pytest.mark.parametrize("style", ["recipe", "idefics"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_logits_loss_and_gradients_are_those_of_rows_of_their_own(tiny, processor, examples, style, quantization):
    ours = adapted_module(tiny, quantization=quantization)
    collate = Idefics2Collator(processor, train=True, prompt_style=style)
    for example in examples:
        example.answers = example.answers[:1]
    results = []
    for batch in (collate(examples), collate(alone(examples))):
        logits, loss, tokens, gradients = answer_logits_loss_and_gradients(ours, batch)
        results.append((logits, loss.item() / tokens.item(), tokens, gradients))
    (packed, packed_loss, packed_tokens, packed_grads), (plain, plain_loss, plain_tokens, plain_grads) = results
    assert torch.equal(packed_tokens, plain_tokens)
    assert torch.allclose(packed, plain, atol=1e-5)
    assert packed_loss == pytest.approx(plain_loss, abs=1e-6)
    assert packed_grads.keys() == plain_grads.keys()
    assert all(torch.allclose(packed_grads[n], plain_grads[n], atol=1e-4) for n in plain_grads)


def test_the_loss_is_that_of_transformers(tiny, processor, examples):
    """transformers' Idefics2 takes packed rows too."""
    ours = adapted_module(tiny, quantization="none")
    for batch in (b := Idefics2Collator(processor, train=True))(examples), b(alone(examples)):
        theirs = ours.model(**batch.model_inputs(), use_cache=False)
        loss, tokens = ours.loss(batch)
        assert (loss / tokens).item() == pytest.approx(theirs.loss.item(), abs=1e-5)
        answers = batch.supervised_positions
        assert torch.allclose(ours(batch).flatten(0, 1)[answers], theirs.logits.flatten(0, 1)[answers], atol=1e-5)


def test_the_sliding_window_is_that_of_transformers(tiny, processor, examples):
    ours = adapted_module(tiny, quantization="none")
    config = ours.model.config.text_config
    assert config is ours.model.get_base_model().model.text_model.config
    config.sliding_window = 80
    for example in examples:
        example.answers = example.answers[:1]
    batch = Idefics2Collator(processor, train=True)(alone(examples))
    loss, tokens = ours.loss(batch)
    assert batch.input_ids.shape[1] > 80
    assert (loss / tokens).item() == pytest.approx(
        ours.model(**batch.model_inputs(), use_cache=False).loss.item(), abs=1e-5
    )
    packed, _ = ours.loss(Idefics2Collator(processor, train=True)(examples))
    assert packed.item() == pytest.approx(loss.item(), abs=1e-4)
    config.sliding_window = None
    assert abs(ours.loss(batch)[0] - loss) > 1e-3


def test_logits_of_pages_of_several_shapes_are_those_of_transformers(tiny, processor):
    """Unpadded and grouped by shape here, padded and masked there; rows with one image and with three."""
    ours = adapted_module(tiny, quantization="none")
    shapes = [(448, 336), (336, 448), (448, 400), (420, 448), (448, 336)]
    pages = [Image.effect_noise(shape, 80) for shape in shapes]
    batch = Idefics2Collator(processor, train=True)(
        [
            Example(1, "Who?", pages[:3], ["Ann"]),
            Example(2, "When?", pages[3:4], ["Now"]),
            Example(3, "a", pages[4:], ["b"]),
        ]
    )
    assert len({size for row in batch.image_sizes for size in row}) == 4
    real = batch.attention_mask.bool()
    assert torch.allclose(ours(batch)[real], ours.model(**batch.model_inputs()).logits[real], atol=1e-5)


def test_answers_are_those_of_generate(processor, examples, monkeypatch):
    """Decoded from the prefill's keys and values, they equal those of transformers' `generate` from the pixels."""
    ours = Idefics2Module("tiny", quantization="none", max_new_tokens=12)  # one that says something
    ours.configure_model()
    ours.eval()
    # An answer that is given, and none, as in a test set; both kinds of rows; windows shorter than a prompt and longer.
    examples = [replace(e, answers=e.answers[: i % 3]) for i, e in enumerate(examples)]
    for window in (None, 60, 4096):
        ours.model.config.text_config.sliding_window = window
        expected, lengths = [], set()
        for example in alone(examples):
            one = Idefics2Collator(processor, train=False)([example])
            ids = ours.model.generate(
                input_ids=one.prompts.input_ids,
                attention_mask=one.prompts.attention_mask,
                pixel_values=one.pixel_values,
                pixel_attention_mask=one.pixel_attention_mask,
                generation_config=transformers.GenerationConfig(max_new_tokens=12, eos_token_id=[2, 5], pad_token_id=0),
                bad_words_ids=[[3], [4]],
            )
            new = ids[0, one.prompts.input_ids.shape[1] :]
            lengths.add(len(new))
            expected.append(processor.decode(new, skip_special_tokens=True).strip())
        assert len(set(expected)) > 3 and len(lengths) > 3
        collate = Idefics2Collator(processor, train=False)
        assert ours.generate(collate(examples)) == expected
        assert ours.generate(collate(alone(examples))) == expected
        # The tensors with fixed addresses that CUDA graphs use, reused for longer and shorter batches.
        monkeypatch.setattr("idefics_lit.evaluation.decoding.ROWS_MULTIPLE", 2)
        ours.evaluator.decoder = GreedyDecoder(ours.backbone, ours.processor, 12, graphs=True)
        some = [slice(0, 3), slice(None), slice(2, 5), slice(5, None), slice(None)]
        assert [ours.generate(collate(examples[s])) for s in some] == [expected[s] for s in some]
        ours.evaluator.free_memory()


def test_a_batch_too_large_for_memory_is_evaluated_in_parts(tiny, processor, examples, monkeypatch):
    ours = adapted_module(tiny, max_new_tokens=4)
    batch = Idefics2Collator(processor, train=False)(examples)
    for place in range(len(examples)):
        batch.prompts.indices[place] = place
    whole = ours.evaluator.evaluate(batch, ours.eval_loss)
    loss = ours.eval_loss.compute()
    read, sizes = ours.backbone.prefill, []

    def too_large_for_two_rows(batch, *more):
        sizes.append(len(batch.input_ids))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError
        return read(batch, *more)

    monkeypatch.setattr(ours.backbone, "prefill", too_large_for_two_rows)
    ours.eval_loss.reset()
    assert ours.evaluator.evaluate(batch, ours.eval_loss) == whole
    assert ours.eval_loss.compute() == pytest.approx(loss.item(), abs=1e-6)
    assert sizes == [3, 2, 1, 1, 1]
    ours.evaluator.evaluate(batch)
    assert sizes[5:] == [1, 1, 1]


def test_prompts_that_are_trained_on_stay_in_rows_of_their_own(processor, examples):
    batch = Idefics2Collator(processor, train=True, train_on_prompt=True)(examples)
    assert len(batch.input_ids) == len(examples)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_goes_page_by_page(tiny, ranks):
    data = DocVQADataModule("synthetic", tiny, limit_val=97, num_workers=0)
    data.setup("validate")
    examples = data.examples["val"]
    shares = [list(EvalSampler(examples, 40, num_replicas=ranks, rank=r)) for r in range(ranks)]
    assert {len(share) for share in shares} == {-(-97 // ranks)}
    order = [index for share in shares for index, _, repeated in share if not repeated]
    assert sorted(order) == list(range(97))
    pages = [examples.page_ids[index] for index in order]
    changes = sum(a != b for a, b in pairwise(pages))
    assert changes == len(set(pages)) - 1
    count = Counter(pages)
    assert sum(count[a] > count[b] for a, b in pairwise(pages)) <= 97 // 40  # sorted within a window


@pytest.fixture(scope="module")
def drawn(tiny):
    """211 training questions, as a data module draws them."""
    data = DocVQADataModule("synthetic", tiny, questions_per_page=4, limit_train=211, num_workers=0)
    data.setup("fit")
    return data.examples["train"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_split_few_pages(tiny, ranks):
    """Most identity cards have eight questions, some one more or less."""
    data = DocVQADataModule("synthetic:id_card", tiny, limit_train=1600)
    data.setup("fit")
    cards, split = data.examples["train"], 0
    for rank in range(ranks):
        visits = list(TrainSampler(cards, 8, 16, num_replicas=ranks, rank=rank, seed=0))
        pages = [{cards.page_ids[index] for index, *_ in visits[i : i + 16]} for i in range(0, len(visits), 16)]
        split += sum(len(batch) for batch in pages)
    # A page with nine questions is in two batches.
    count = Counter(cards.page_ids)
    assert split < 1.1 * (len(count) + sum(number > 8 for number in count.values()))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("questions", [1, 3, 4, 100])
def test_every_question_is_visited_once_an_epoch_in_runs_of_a_page(drawn, questions, ranks):
    share = questions  # of a step

    def epoch(number):
        samplers = [TrainSampler(drawn, questions, share, num_replicas=ranks, rank=r, seed=1) for r in range(ranks)]
        for sampler in samplers:
            sampler.set_epoch(number)
        visits = [list(sampler) for sampler in samplers]
        assert len({index for visit in visits for index, _, repeated in visit if not repeated}) == 211
        assert sum(repeated for visit in visits for *_, repeated in visit) == -211 % ranks
        return [[index for index, *_ in visit] for visit in visits]

    shares = epoch(0)
    assert len({len(share) for share in shares}) == 1
    assert sorted({i for share in shares for i in share}) == list(range(211))
    assert sum(map(len, shares)) == -(-211 // ranks) * ranks
    assert epoch(0) == shares != epoch(1)
    pages = [drawn.page_ids[i] for share in shares for i in share]
    changes = sum(a != b for a, b in pairwise(pages))
    count = Counter(drawn.page_ids)
    assert changes < 2 * sum(-(-on_page // questions) for on_page in count.values())
    if questions == 1:  # the order of a plain DistributedSampler
        plain = [DistributedSampler(range(211), num_replicas=ranks, rank=r, seed=1) for r in range(ranks)]
        assert [list(sampler) for sampler in plain] == shares

"""`page_scores` and the answer pages of the evaluator."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.evaluation.answer_pages import page_scores
from idefics_lit.pretrained import load_processor
from idefics_lit.training.module import Idefics2Module


@pytest.fixture(scope="module")
def module():
    module = Idefics2Module("tiny", quantization="none", max_new_tokens=8)  # one that reads
    module.configure_model()
    return module.eval()


@pytest.fixture(scope="module")
def small():
    """The processor for pages of 112 x 84 pixels."""
    return load_processor("tiny", image_size=112)


@pytest.fixture(scope="module")
def documents():
    """Ten questions on five documents of one to three pages; two on each, which share its pages."""
    pages = SyntheticPages("val", 12)
    firsts = {page: i for i, page in reversed(list(enumerate(pages.page_ids)))}
    on_page = [[pages[i], pages[i + 1]] for i in sorted(firsts.values())]
    found = []
    for document, (first, count, right) in enumerate([(0, 3, 0), (3, 1, 0), (4, 2, 1), (6, 3, 2), (9, 3, 1)]):
        images = [on_page[first + n][0].images[0] for n in range(count)]
        asked = [replace(example, images=images, page_id=document) for example in on_page[first + right]]
        found += [replace(example, answer_page=right) for example in asked]
    return found


def theirs(module, collate, example, answer):
    """The log-likelihood of an answer's tokens on each page, by transformers' own forward from the pixels."""
    scores = []
    for page in example.images:
        batch = collate([replace(example, images=[page], page_id=None)])
        ids = torch.cat([batch.prompts.input_ids, torch.tensor([answer])], dim=1)
        pixels = {"pixel_values": batch.pixel_values, "pixel_attention_mask": batch.pixel_attention_mask}
        with torch.no_grad():
            logits = module.model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits
        tokens = logits[0, -len(answer) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        scores.append(tokens.sum())
    return torch.stack(scores)


@pytest.mark.parametrize(("shared", "style"), [(True, "recipe"), (False, "idefics")])
def test_scores_are_those_of_a_prompt_with_that_page_alone(module, small, documents, style, shared):
    """With packed rows and without."""
    examples = documents[:6] if shared else [replace(e, page_id=None) for e in documents[:6]]
    collate = Idefics2Collator(small, train=False, prompt_style=style)
    batch = collate(examples)
    answered = module.evaluator.decode(batch)
    answers = dict(enumerate(answered.ids))
    assert len({len(ids) for ids in answered.ids}) > 1
    with torch.no_grad():
        scores = page_scores(module.backbone, batch, answered.page_features, answers, module.processor.tokenizer)
    for i, example in enumerate(examples):
        expected = theirs(module, collate, example, answered.ids[i])
        assert scores[i].shape == expected.shape == (len(example.images),)
        assert torch.allclose(scores[i], expected, atol=2e-4)


def test_scores_of_split_images(module, documents):
    processor = load_processor("tiny", image_splitting=True, image_size=112)
    batch = Idefics2Collator(processor, train=False, max_length=4000)([documents[0]])
    one_page = replace(documents[0], images=documents[0].images[:1])
    (alone,) = Idefics2Collator(processor, train=False)([one_page]).prompts.input_ids
    answered = module.evaluator.decode(batch)
    assert answered.page_features[0].shape[0] == 3 * 5 * 64
    prefill, calls = module.backbone.prefill, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.backbone, "prefill", lambda *args: calls.append(args) or prefill(*args))
        module.evaluator.evaluate(batch)
    assert len(calls) == 4  # all pages, then one by one
    for number, (tokens, (page,)) in enumerate((tokens, pages) for tokens, pages, *_ in calls[1:]):
        assert tokens.input_ids[0, : len(alone)].tolist() == alone.tolist()
        assert torch.equal(page, answered.page_features[0][number * 320 :][:320])


def test_true_answers_are_found_on_their_pages(module, documents):
    batch = Idefics2Collator(module.processor, train=False)(documents)
    with torch.no_grad():
        end = module.processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
        tokenize = module.processor.tokenizer
        ids = [tokenize(f": {e.answers[0]}", add_special_tokens=False).input_ids[1:] for e in documents]
        answers = {i: [*some, end] for i, some in enumerate(ids)}
        scores = page_scores(module.backbone, batch, module.encode_pages(batch), answers, module.processor.tokenizer)
    assert (
        [int(scores[i].argmax()) for i in range(10)] == batch.prompts.reference_pages == [0, 0, 0, 0, 1, 1, 2, 2, 1, 1]
    )


def test_answer_pages_do_not_change_when_a_batch_is_evaluated_in_parts(module, small, documents):
    batch = Idefics2Collator(small, train=False)(documents)
    whole = module.evaluator.evaluate(batch, module.eval_loss)
    assert len({answer.answer_page for answer in whole}) > 1
    module.evaluator.max_rows = 2
    assert module.evaluator.evaluate(batch, module.eval_loss) == whole
    module.evaluator.max_rows = None


def test_answer_pages_are_computed_only_when_wanted_and_without_the_vision_tower(module, small, documents, monkeypatch):
    collate = Idefics2Collator(small, train=False)
    look, read, calls = module.backbone.encode_images, module.backbone.prefill, []
    monkeypatch.setattr(module.backbone, "encode_images", lambda *some: calls.append("look") or look(*some))
    monkeypatch.setattr(module.backbone, "prefill", lambda *some: calls.append("read") or read(*some))
    unknown = [replace(example, answer_page=None) for example in documents]

    def evaluate(examples, loss):
        calls.clear()
        return [answer.answer_page for answer in module.evaluator.evaluate(collate(examples), loss)], calls

    assert evaluate(documents, module.eval_loss)[1] == ["look", "read", "read", "read", "read"]
    found, made = evaluate(unknown, None)  # a prediction
    assert made == ["look", "read", "read", "read", "read"]
    assert [page is None for page in found] == [False] * 2 + [True] * 2 + [False] * 6
    found, made = evaluate(unknown, module.eval_loss)  # a validation without references to pages
    assert (set(found), made) == ({None}, ["look", "read"])
    found, made = evaluate([replace(e, answer_page=3) for e in documents], module.eval_loss)  # that it doesn't have
    assert (set(found), made) == ({None}, ["look", "read"])


@pytest.mark.parametrize("style", ["recipe", "idefics"])
def test_scores_of_pages_with_different_numbers_of_tiles(stand_in, style):
    module = Idefics2Module(stand_in, quantization="none", max_new_tokens=8).eval()
    module.configure_model()
    collate = Idefics2Collator(module.processor, train=False, prompt_style=style)
    noise = [Image.effect_noise(size, 80) for size in ((170, 220), (300, 100), (80, 100))]
    examples = [
        Example(1, "Who?", noise, ["Ann"], page_id=0),
        Example(2, "What is it?", noise, ["b"], page_id=0),
        Example(3, "Who?", noise[1:2], ["Ann"]),
    ]
    batch = collate(examples)
    assert batch.page_images == [[17, 9, 17], [9]]
    answered = module.evaluator.decode(batch)
    answers = dict(enumerate(answered.ids))
    with torch.no_grad():
        scores = page_scores(module.backbone, batch, answered.page_features, answers, module.processor.tokenizer)
    for i, example in enumerate(examples):
        assert torch.allclose(scores[i], theirs(module, collate, example, answered.ids[i]), atol=2e-4)

"""The confidence of answers: the model's probability of them, and its temperature."""

import math

import pytest
import torch

from idefics_lit import Example, Idefics2Module
from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.evaluation.confidence import confidence, fit_temperature
from idefics_lit.evaluation.decoding import GreedyDecoder


@pytest.fixture(scope="module")
def module():
    module = Idefics2Module("tiny", quantization="none", max_new_tokens=12)
    module.configure_model()
    return module.eval()


@pytest.fixture(scope="module")
def questions():
    """Questions with answers of several lengths, some of which are wrong and cut off at `max_new_tokens`."""
    pages = SyntheticPages("confidence", 3, families=("form", "letter", "receipt"))
    return [pages[i] for i in range(0, len(pages), 2)]


@torch.no_grad()
def teacher_forced(module, example, ids):
    """The log-probability of an answer's tokens after the prompt, without the tokens that decoding suppresses."""
    collate = Idefics2Collator(module.processor, train=False)
    batch = collate([Example(0, example.question, example.images, page_id=0)])
    prompt = batch.prompts.input_ids
    inputs = {name: getattr(batch, name) for name in ("pixel_values", "pixel_attention_mask")}
    input_ids = torch.cat([prompt, torch.tensor([ids])], 1)
    logits = module.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **inputs).logits[0]
    names = ["<fake_token_around_image>", "<image>"]
    logits[:, module.processor.tokenizer.convert_tokens_to_ids(names)] = -torch.inf
    chosen = logits[prompt.shape[1] - 1 : -1].log_softmax(-1)
    return float(chosen.gather(1, torch.tensor(ids)[:, None]).sum())


@pytest.mark.parametrize("graphs", [False, True], ids=["", "as with CUDA graphs"])
def test_it_is_the_teacher_forced_probability(module, questions, graphs):
    """For answers that end at different steps in one batch, whose rows move to a smaller state."""
    batch = Idefics2Collator(module.processor, train=False)(questions)
    module.evaluator.decoder = GreedyDecoder(module.backbone, module.processor, 12, graphs=graphs)
    for _ in range(2):  # the second batch finds the first one's values in the tensors
        decoded = module.evaluator.decode(batch)
    expected = [teacher_forced(module, q, ids) for q, ids in zip(questions, decoded.ids, strict=True)]
    module.evaluator.free_memory()
    assert len({len(ids) for ids in decoded.ids}) > 4 and max(map(len, decoded.ids)) == 12
    assert decoded.log_probabilities == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert min(expected) < -1


def test_answers_come_with_it(module, questions):
    images, texts = [q.images[0] for q in questions], [q.question for q in questions]
    pairs = module.answer(images, texts, return_confidence=True)
    assert [text for text, _ in pairs] == module.answer(images, texts)
    evaluated = module.evaluator.evaluate(Idefics2Collator(module.processor, train=False)(questions))
    assert [value for _, value in pairs] == pytest.approx([math.exp(a.log_probability) for a in evaluated], rel=1e-3)


def test_a_temperature_changes_it_and_not_the_order():
    values = [-20.0, -3.0, -0.7, -0.1, -1e-4, 0.0]
    for temperature in (0.5, 2.0):
        scaled = [confidence(value, temperature) for value in values]
        assert scaled == sorted(scaled) and scaled[0] >= 0 and scaled[-1] <= 1
    # sigmoid(logit(0.8) / 2) = sigmoid(log 2) = 2 / 3
    assert confidence(math.log(0.8), 2.0) == pytest.approx(2 / 3)
    assert confidence(math.log(0.8)) == pytest.approx(0.8)
    assert confidence(-math.inf) == 0 and confidence(-math.inf, 2.0) < 1e-100


def test_the_fitted_temperature_is_the_one_that_the_answers_were_drawn_with():
    generator = torch.Generator().manual_seed(0)
    log_probabilities = (0.05 + 0.9 * torch.rand(20000, generator=generator)).log().tolist()
    for temperature in (0.6, 1.0, 2.5):
        drawn = torch.rand(20000, generator=generator).tolist()
        is_right = [u < confidence(v, temperature) for u, v in zip(drawn, log_probabilities, strict=True)]
        assert fit_temperature(log_probabilities, is_right) == pytest.approx(temperature, rel=0.07)


def test_answers_that_are_all_right_say_nothing_about_the_temperature():
    assert fit_temperature([-0.1, -2.0], [True, True]) == fit_temperature([], []) == 1
    assert fit_temperature([-0.1, -2.0], [True, False]) == pytest.approx(0.1)  # separable: its smallest value

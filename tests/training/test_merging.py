"""Merging: the merged model answers as validation did, although the base was quantized to 4 bits."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from safetensors.torch import load_file, save_file

from idefics_lit import ANLS, DocVQADataModule, Idefics2Module, export_adapter
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.pretrained import resolve

NUM_QUESTIONS = 64


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """The reader with 1% of noise on its weights, which are NF4's own points without it."""
    folder = shutil.copytree(Path(resolve("tiny")), tmp_path_factory.mktemp("noisy") / "reader")
    torch.manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    noisy = {name: (w + 0.01 * w.float().std() * torch.randn(w.shape)).to(w.dtype) for name, w in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def module(noisy):
    """A module whose adapter was trained on the 4-bit base for a few steps."""
    module = Idefics2Module(noisy, lr=3e-4, warmup_steps=0, max_new_tokens=32)
    data = DocVQADataModule("synthetic:form", noisy, limit_train=32, limit_val=1, num_workers=0, batch_size=8)
    Trainer(
        accelerator="cpu", precision="32-true", max_steps=6, logger=False, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, data)  # fmt: skip
    return module


@pytest.fixture(scope="module")
def questions():
    pages = SyntheticPages("merging", 24, families=("form",))
    return [pages[i] for i in range(0, len(pages), len(pages) // NUM_QUESTIONS)][:NUM_QUESTIONS]


def answers(module, questions):
    """The answers to the questions, and their ANLS."""
    texts = module.answer([q.images[0] for q in questions], [q.question for q in questions], batch_size=16)
    anls = ANLS()
    anls.update(texts, [q.answers for q in questions])
    return texts, float(anls.compute())


@pytest.fixture(scope="module")
def merged(module, tmp_path_factory):
    """The folders of the model merged into either base, and what was logged."""
    folder = tmp_path_factory.mktemp("merged")
    for base in ("dequantized", "original"):
        export_adapter(module, folder / base, merge=True, merge_into=base)
    return folder


def test_the_merged_model_gives_the_answers_of_validation(module, questions, merged):
    expected, score = answers(module, questions)
    assert score > 0.9
    assert answers(Idefics2Module(str(merged / "dequantized"), quantization="none"), questions) == (expected, score)


def test_the_adapter_is_added_to_the_weights_that_validation_used(module, noisy, merged):
    trained = Idefics2Module(noisy, dequantize=True)
    trained.configure_model()
    trained.load_state_dict(module.state_dict())
    exact = trained.model.merge_and_unload().state_dict()
    differing = {}
    for base in ("dequantized", "original"):
        weights = load_file(merged / base / "model.safetensors")
        # Twice bfloat16's rounding: of the base and of the sum.
        differing[base] = [n for n, w in weights.items() if not torch.allclose(w.float(), exact[n], 2**-7, 1e-5)]
    assert differing["dequantized"] == []
    assert len(differing["original"]) > 40


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_the_card_says_how_far_both_merges_are_from_validation(merged, base):
    card = (merged / base / "README.md").read_text()
    sentence = rf"- merged into the {base} weights: they differ by (.*)% from those that validation used; .* by (.*)%"
    differences = [float(number) for number in re.search(sentence, card).groups()]
    rounding, quantization = differences if base == "dequantized" else reversed(differences)
    assert 0 < rounding < 0.25 < 0.5 < quantization < 2


def test_a_merged_model_in_4_bits_is_a_warning(merged):
    """Quantizing it again rounds the adapter away."""
    with pytest.warns(UserWarning, match=r"dequantized'? is a merged model, .* --model\.quantization none"):
        Idefics2Module(str(merged / "dequantized")).configure_model()

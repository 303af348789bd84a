"""The small Idefics2: loads from its folder, keeps the prompt a prefix, runs, fits NF4's blocks."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
)

from idefics_lit.model.tiny import (
    END_OF_UTTERANCE,
    EOS,
    FAKE,
    IMAGE,
    LATENTS,
    PAGE_HEIGHT,
    PAGE_WIDTH,
    build_tiny,
)
from idefics_lit.pretrained import load_processor

MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "Answer briefly."}, {"type": "image"},
                                 {"type": "text", "text": "What is the total?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "12.50 €"}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random small model on disk."""
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Idefics2ForConditionalGeneration:
    """The same, loaded."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Idefics2Processor:
    """Its processor, loaded."""
    return AutoProcessor.from_pretrained(folder)


def test_size(folder: Path, model: Idefics2ForConditionalGeneration) -> None:
    """It fits in 16 MB and every linear layer takes a multiple of 64 inputs."""
    assert isinstance(model, Idefics2ForConditionalGeneration)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16_000_000
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert linears and all(linear.in_features % 64 == 0 for linear in linears)


def test_prompt_is_a_prefix(processor: Idefics2Processor) -> None:
    """The generation prompt's ids begin the ids of prompt and answer, for a page as large as a scan, too."""
    page = Image.new("L", (PAGE_WIDTH * 2, PAGE_HEIGHT * 2), 255)
    prompt = processor.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)
    whole = processor.apply_chat_template(MESSAGES).strip()
    first, second = (processor(text=text, images=[page])["input_ids"][0] for text in (prompt, whole))
    assert list(second[: len(first)]) == list(first)
    assert first[0] == processor.tokenizer.bos_token_id
    assert list(first).count(IMAGE) == LATENTS and list(first).count(FAKE) == 2
    assert second[-1] == END_OF_UTTERANCE
    assert processor.decode(second[len(first) :], skip_special_tokens=True) == " 12.50 €"


def test_generates(processor: Idefics2Processor, model: Idefics2ForConditionalGeneration) -> None:
    """Generation runs as it comes, never emits image tokens and knows both ends."""
    assert model.generation_config.eos_token_id == [EOS, END_OF_UTTERANCE]
    prompt = processor.apply_chat_template(MESSAGES[:1], add_generation_prompt=True)
    pages = [[Image.new("L", (PAGE_WIDTH, PAGE_HEIGHT), shade)] for shade in (0, 255)]
    batch = processor(text=[prompt, prompt], images=pages, return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=4)
    new = output[:, batch["input_ids"].shape[1] :]
    assert new.shape[0] == 2 and not torch.isin(new, torch.tensor([FAKE, IMAGE])).any()


@pytest.mark.parametrize("text", ["a", " a", "  a", " ", " \n", ""])
def test_tokenizes_as_the_model_that_comes_with_the_package(processor: Idefics2Processor, text: str) -> None:
    """Only a space before a word is ignored."""
    assert processor.tokenizer(text).input_ids == load_processor("tiny").tokenizer(text).input_ids


def test_seed(folder: Path, tmp_path: Path) -> None:
    """The seed alone decides the weights, and the caller's random state stays."""
    state = torch.get_rng_state()
    again = build_tiny(tmp_path / "same").joinpath("model.safetensors").read_bytes()
    other = build_tiny(tmp_path / "other", seed=1).joinpath("model.safetensors").read_bytes()
    assert torch.equal(state, torch.get_rng_state())
    assert folder.joinpath("model.safetensors").read_bytes() == again != other

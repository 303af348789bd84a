"""`Idefics2Module.answer` and `Idefics2Module.collator`."""

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.errors import InputError
from idefics_lit.model.lora import LoRA
from idefics_lit.pretrained import load_processor
from idefics_lit.training.export import export_adapter
from idefics_lit.training.module import Idefics2Module


@pytest.fixture(scope="module")
def module():
    """The trained reader, which gives different answers to different questions."""
    module = Idefics2Module("tiny", quantization="none", max_new_tokens=6)
    module.configure_model()
    return module


@pytest.fixture(scope="module")
def examples():
    """Six questions about three pages."""
    pages = SyntheticPages("val", 6)
    by_page = {}
    for i, page_id in enumerate(pages.page_ids):
        by_page.setdefault(page_id, []).append(pages[i])
    return [example for questions in list(by_page.values())[:3] for example in questions[:2]]


@pytest.fixture(scope="module")
def expected(module, examples):
    """The answers of the Trainer's prediction."""
    loader = DataLoader(examples, batch_size=4, collate_fn=Idefics2Collator(load_processor("tiny"), train=False))
    trainer = Trainer(accelerator="cpu", precision="32-true", logger=False, enable_checkpointing=False)
    answers = [answer.prediction for batch in trainer.predict(module, loader) for answer in batch]
    assert len(set(answers)) > 2
    return answers


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_images_and_questions_are_paired_in_order(module, examples, expected, batch_size):
    images, questions = [e.images[0] for e in examples], [e.question for e in examples]
    assert module.answer(images, questions, batch_size=batch_size) == expected


def test_one_image_or_one_question_is_combined_with_all_others(module, examples, expected, tmp_path):
    path = tmp_path / "page.png"
    examples[0].images[0].save(path)
    questions = [example.question for example in examples[:2]]
    assert module.answer(path, questions) == module.answer(str(path), questions) == expected[:2]
    assert module.answer(examples[0].images[0], questions[0]) == expected[:1]
    images = [examples[0].images[0], examples[2].images[0]]
    assert module.answer(images, questions[0]) == [expected[0], *module.answer(images[1:], questions[0])]


def test_it_loads_the_model_and_restores_the_modes(examples, expected):
    module = Idefics2Module("tiny", quantization="none", max_new_tokens=6)
    assert module.answer(examples[0].images, examples[0].question) == expected[:1]
    module.train()
    module.backbone.vision_tower.eval()
    modes = [part.training for part in module.modules()]
    module.answer(examples[0].images, examples[0].question)
    assert [part.training for part in module.modules()] == modes and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("images", "questions", "message"),
    [
        ([], "What?", "give at least one image and one question"),
        ("page.png", [], "give at least one image and one question"),
        ("page.png", ["What?", " "], "no empty question"),
        (["a.png", "b.png"], ["1?", "2?", "3?"], "2 images and 3 questions: give as many"),
        ("missing.png", "What?", r"image missing\.png: no such file"),
        ([3], "What?", "int 3 is neither a PIL image nor a path"),
        ("page.png", [3], "questions: int 3"),
    ],
)
def test_wrong_arguments_are_named(module, images, questions, message):
    with pytest.raises(InputError, match=message):
        module.answer(images, questions)


def test_a_pdf_with_several_pages_is_refused(module, examples, tmp_path):
    first, *others = [example.images[0].convert("RGB") for example in examples]
    first.save(tmp_path / "pages.pdf", save_all=True, append_images=others)
    with pytest.raises(InputError, match=r"pages\.pdf: it has 6 pages: save each as a file of its own"):
        module.answer(tmp_path / "pages.pdf", "What?")


def test_the_collator_has_the_prompt_and_images_of_the_training(tiny, docvqa, tmp_path):
    options = {"prompt_style": "idefics", "image_size": 112}
    data = DocVQADataModule(str(docvqa), tiny, limit_train=2, num_workers=0, **options)
    trainer = Trainer(
        accelerator="cpu",
        precision="32-true",
        logger=False,
        max_steps=1,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    trained = Idefics2Module(tiny, quantization="none")
    trainer.fit(trained, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Idefics2Module.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    for module in (trained, loaded):
        collator = module.collator(train=False)
        assert (collator.prompt_style, collator.train) == ("idefics", False)
        assert collator.processor.image_processor.size["longest_edge"] == 112
    collator = loaded.collator(train=True, prompt_style="recipe", max_length=99)
    assert (collator.prompt_style, collator.train, collator.max_length) == ("recipe", True, 99)


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_is_asked_as_it_was_trained(tiny, tmp_path, in_effect, merge):
    """By Python and by the commands, with its prompt, images and temperature."""
    trained = Idefics2Module(tiny, quantization="none")
    trained.temperature = 2.5
    export_adapter(trained, tmp_path / "out", merge=merge, prompt_style="idefics", image_size=112)
    folder = str(tmp_path / "out")
    options = {"pretrained": folder} if merge else {"pretrained": tiny, "adapter": folder}
    module = Idefics2Module(**options, quantization="none")
    collator = module.collator(train=False)
    assert (collator.prompt_style, module.temperature) == ("idefics", 2.5)
    assert collator.processor.image_processor.size["longest_edge"] == 112
    flags = ["ask", *(text for name, value in options.items() for text in (f"--model.{name}", value))]
    data = in_effect(*flags).data
    assert (data.prompt_style, data.image_size) == ("idefics", 112)
    assert in_effect(*flags, "--data.prompt_style", "recipe").data.prompt_style == "recipe"
    assert in_effect("check", *flags[1:], "--data.source", "synthetic").data.prompt_style == "recipe"  # as `fit`


def test_a_merged_model_with_another_prompt_is_a_warning(tiny, tmp_path):
    export_adapter(Idefics2Module(tiny, quantization="none"), tmp_path / "out", merge=True, prompt_style="idefics")
    merged = str(tmp_path / "out")
    data = DocVQADataModule("synthetic:form", merged, limit_val=1, num_workers=0, image_size=112)
    trainer = Trainer(accelerator="cpu", precision="32-true", logger=False, limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"trained with data\.prompt_style 'idefics', here 'recipe'"):
        trainer.validate(Idefics2Module(merged, quantization="none", lora=LoRA(r=4, alpha=16)), data)

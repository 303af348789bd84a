"""Pages whose features are cached aren't processed again, and a fit is the same without their pixels."""

import pytest
import torch
from lightning import Callback, Trainer
from PIL import Image

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.example import Example
from idefics_lit.data.pixels import PageProcessor
from idefics_lit.errors import InputError
from idefics_lit.model.lora import LoRA
from idefics_lit.training.module import Idefics2Module

EXAMPLES = [
    Example(i, "What is it?", [Image.effect_noise(size, 60 + seed) for seed in range(pages)], ["it"])
    for i, (size, pages) in enumerate([((200, 260), 1), ((300, 100), 2), ((90, 90), 1)])
]


@pytest.fixture(params=["tiny", "idefics3", "smolvlm"])
def model(request, tiny, stand_in_folders):
    return tiny if request.param == "tiny" else stand_in_folders[request.param]


@pytest.fixture(params=["memory", "folder"])
def place(request, tmp_path):
    return "memory" if request.param == "memory" else str(tmp_path / "features")


def build(model, **options):
    torch.manual_seed(0)
    module = Idefics2Module(model, quantization="none", lora=LoRA(dropout=0.0), **options)
    module.configure_model()
    return module


@pytest.fixture
def processed(monkeypatch):
    """The pages that were processed."""
    pages, process = [], PageProcessor.process
    monkeypatch.setattr(PageProcessor, "process", lambda self, page: pages.append(page) or process(self, page))
    return pages


@pytest.mark.parametrize("splitting", [None, True])
def test_a_cached_page_is_not_processed_and_the_loss_is_the_same(model, place, processed, splitting):
    module = build(model, feature_cache=place)
    processor = module.load_processor(image_splitting=splitting, image_size=224)
    get = module.backbone.feature_cache.loader_get
    collate = Idefics2Collator(processor, train=True, max_length=9000, cached_features=get)
    whole = collate(EXAMPLES)
    assert len(processed) == 4 and whole.loaded_features == {}
    loss = module.loss(whole)[0].item()
    without = collate(EXAMPLES)
    assert len(processed) == 4 and without.pixel_values.numel() == 0
    assert module.loss(without)[0].item() == loss
    assert torch.equal(without.input_ids, whole.input_ids) and torch.equal(without.labels, whole.labels)
    assert (without.page_images, without.page_spans, without.image_keys) == (
        *(whole.page_images, whole.page_spans, whole.image_keys),
    )
    new = Example(9, "What?", [Image.effect_noise((100, 150), 90)], ["new"])
    mixed = collate([*EXAMPLES, new])
    assert len(processed) == 5
    plain = Idefics2Collator(processor, train=True, max_length=9000)([*EXAMPLES, new])
    assert module.loss(mixed)[0].item() == module.loss(plain)[0].item()
    assert module.loss(mixed.rows(1, 4))[0].item() == module.loss(plain.rows(1, 4))[0].item()


def test_a_page_of_which_only_some_images_are_cached_is_processed(tiny, processed):
    """Idefics2's quadrants have entries of their own, and the cache is full after some of them."""
    module = build(tiny, feature_cache="memory", feature_cache_gb=8 * 2**18 / 1e9)
    collate = Idefics2Collator(
        module.load_processor(image_splitting=True, image_size=224),
        train=True, cached_features=module.backbone.feature_cache.loader_get,
    )  # fmt: skip
    loss = module.loss(collate(EXAMPLES))[0].item()
    again = collate(EXAMPLES)
    assert 4 < len(processed) < 8 and 0 < len(again.loaded_features) < 20
    assert module.loss(again)[0].item() == loss


def test_a_file_that_is_deleted_after_the_loader_has_read_it(tiny, tmp_path):
    module = build(tiny, feature_cache=str(tmp_path))
    get = module.backbone.feature_cache.loader_get
    collate = Idefics2Collator(module.processor, train=True, cached_features=get)
    loss = module.loss(collate(EXAMPLES))[0].item()
    without = collate(EXAMPLES)
    for file in tmp_path.iterdir():
        file.unlink()
    assert module.loss(without)[0].item() == loss


def test_a_page_that_was_left_out_is_never_taken_for_a_blank_one(model):
    """A callback unfreezes the vision tower, or the cache is taken away."""
    module = build(model, feature_cache="memory")
    collate = Idefics2Collator(
        module.processor, train=True, max_length=9000, cached_features=module.backbone.feature_cache.loader_get
    )
    module.loss(collate(EXAMPLES[:2]))
    batch = collate(EXAMPLES)
    next(module.backbone.vision_tower.parameters()).requires_grad_(True)
    with pytest.warns(UserWarning, match="is trained"), pytest.raises(InputError, match="the loader left out pages"):
        module.loss(batch)


class Seen(Callback):
    """The sizes of the images of each training batch, by epoch, and the losses."""

    def __init__(self):
        self.sizes, self.losses = [[] for _ in range(3)], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes[trainer.current_epoch] += [size for row in batch.image_sizes for size in row]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


@pytest.mark.parametrize(("kind", "cache"), [("tiny", "memory"), ("idefics3", "memory"), ("smolvlm", "folder")])
def test_later_epochs_of_a_fit_process_no_page(tiny, stand_in_folders, docvqa, tmp_path, kind, cache):
    model = tiny if kind == "tiny" else stand_in_folders[kind]

    data = DocVQADataModule(
        str(docvqa), model, limit_train=6, limit_val=1, batch_size=2, num_workers=2, questions_per_page=1
    )

    def fit(cache):
        torch.manual_seed(0)
        module = Idefics2Module(
            model, quantization="none", lora=LoRA(dropout=0.0), feature_cache=cache, max_new_tokens=2, lr=1e-3
        )
        seen = Seen()
        trainer = Trainer(
            accelerator="cpu", precision="32-true", max_epochs=3, logger=False, callbacks=[seen],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, data)
        return seen

    seen = fit("memory" if cache == "memory" else str(tmp_path))
    assert {*seen.sizes[1], *seen.sizes[2]} == {(0, 0)}
    expected = fit("off")  # with the data module of the fit before, whose cache isn't this model's
    assert seen.losses == expected.losses and len(set(seen.losses)) == len(seen.losses)
    assert not any(size == (0, 0) for sizes in expected.sizes for size in sizes)

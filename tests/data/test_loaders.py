"""What a training loader saves to tell whether a resumed run has the same questions."""

import json

import datasets
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.example import Examples
from idefics_lit.data.samplers import TrainSampler
from idefics_lit.training.checkpoint import EpochProgressRepair


def write_official(folder, rows):
    content = [{"questionId": i, "question": text, "image": "page.png", "answers": ["yes"]} for i, text in rows]
    (folder / "train_v1.0_withQT.json").write_text(json.dumps({"dataset_split": "train", "data": content}))


def write_csv(folder, rows):
    lines = [f"{i},{text},page.png,yes" for i, text in rows]
    (folder / "train.csv").write_text("\n".join(["question_id,question,image,answers", *lines]))


@pytest.mark.parametrize("write", [write_official, write_csv])
def test_the_saved_settings_tell_other_questions_apart(tmp_path, write):
    """Even if pages and answers are the same."""

    def settings(name, *rows):
        folder = tmp_path / name
        folder.mkdir()
        Image.new("L", (30, 40), 255).save(folder / "page.png")
        write(folder, rows)
        data = DocVQADataModule(str(folder), "tiny", val_split="train", num_workers=0)
        data.setup("fit")
        return data.train_dataloader().state_dict()["made by"]

    saved = settings("saved", (1, "Is it signed?"), (2, "Is it dated?"))
    assert settings("moved", (1, "Is it signed?"), (2, "Is it dated?")) == saved
    for name, rows in {
        "order": [(2, "Is it dated?"), (1, "Is it signed?")],
        "text": [(1, "Is it signed?"), (2, "Is it paid?")],
        "id": [(1, "Is it signed?"), (3, "Is it dated?")],
        "number": [(1, "Is it signed?"), (2, "Is it dated?"), (3, "Is it dated?")],
    }.items():
        assert settings(name, *rows) != saved


def test_synthetic_pages_of_another_seed_are_other_questions():
    def settings(seed):
        data = DocVQADataModule("synthetic:form", "tiny", limit_train=2, num_workers=0, seed=seed)
        data.setup("fit")
        return data.train_dataloader().state_dict()["made by"]["training questions"]

    assert settings(0) == settings(0) != settings(1)


def test_a_split_that_knows_no_ids_has_settings_too():
    class Own(Examples):
        page_ids = (("a",), ("b",))
        answers = (("yes",), ("no",))

        def __len__(self):
            return 2

    settings = TrainSampler(Own(), 1, 1, num_replicas=1, rank=0).order_settings
    assert settings["training questions"].startswith("2 (")


@pytest.mark.parametrize("epoch", [0, 1])
def test_workers_that_started_early_read_the_epoch_of_the_sampler(docvqa, epoch):
    """A resumed fit sets its epoch after they have started; what they have prepared is then discarded."""
    read = []
    for early in (False, True):
        data = DocVQADataModule(str(docvqa), "tiny", image_size=112, num_workers=1, batch_size=4)
        data.setup("fit")
        loader = data.train_dataloader()
        if early:
            loader.start()
        loader.sampler.set_epoch(epoch)
        read.append([[batch.question_ids for batch in loader] for _ in range(2)])
    assert read[0] == read[1]


def test_an_evaluation_started_early_reads_each_question_once_in_each_iteration(docvqa):
    data = DocVQADataModule(str(docvqa), "tiny", image_size=112, num_workers=1, eval_batch_size=2)
    data.setup("validate")
    loader, late = data.val_dataloader(), data.val_dataloader()
    state = torch.get_rng_state()
    loader.start()
    assert torch.equal(torch.get_rng_state(), state)
    for _ in range(2):
        assert [batch.question_ids for batch in loader] == [batch.question_ids for batch in late]


class Reader(LightningModule):
    """Remembers the questions of its batches instead of training on them."""

    automatic_optimization = False

    def on_fit_start(self):
        self.read = []

    def training_step(self, batch, batch_idx):
        self.read += batch.question_ids
        self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize("saved", ["by ModelCheckpoint", "after the fit"])
@pytest.mark.parametrize(("streaming", "workers"), [(False, 0), (False, 2), (True, 2)])
def test_a_fit_that_ended_within_an_epoch_is_continued_there(tmp_path, streaming, workers, saved):
    """Lightning's ModelCheckpoint saves when it counts the epoch as ended."""
    page = Image.new("L", (30, 40))
    rows = [{"question_id": i, "question": f"Number {i}?", "answers": ["yes"], "image": page} for i in range(20)]
    for name in ("train", "val"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{name}-0.parquet")

    def fit(steps, ckpt_path=None):
        options = {"streaming": streaming, "limit_val": 1, "num_workers": workers, "batch_size": 2, "image_size": 112}
        callbacks = [EpochProgressRepair(), ModelCheckpoint(tmp_path, filename=f"{steps}")]
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, callbacks=callbacks, **quiet)
        reader = Reader()
        trainer.fit(reader, DocVQADataModule(str(tmp_path), "tiny", **options), ckpt_path=ckpt_path)
        return trainer, reader.read

    _, whole = fit(13)
    trainer, read = fit(3)
    if saved == "after the fit":
        trainer.save_checkpoint(tmp_path / "3.ckpt")
    _, rest = fit(13, tmp_path / "3.ckpt")
    assert read + rest == whole

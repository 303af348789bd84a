"""What a training loader saves to tell whether a resumed run has the same questions."""

import json

import pytest
import torch
from PIL import Image

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.example import Examples
from idefics_lit.data.samplers import TrainSampler


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

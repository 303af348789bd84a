"""The trained model "tiny" has the score of its model card, and fine-tuning it detects wrong labels.

Each fine-tuning is `configs/quickstart.yaml`, shorter.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning import Trainer, seed_everything

import idefics_lit
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.model.packing import IGNORED_LABEL
from idefics_lit.pretrained import load_processor
from idefics_lit.training.module import Idefics2Module

CARD = Path(idefics_lit.__file__).parent / "model" / "reader" / "README.md"
QUICKSTART = yaml.safe_load((Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_text())
TRAINER = {"accelerator": "cpu", "precision": "32-true", "logger": False, "enable_progress_bar": False,
           "enable_model_summary": False, "enable_checkpointing": False, "gradient_clip_val": 1.0}  # fmt: skip
STEPS = 100


def data(**changed):
    options = {**QUICKSTART["data"], "limit_val": 64, "num_workers": 0, **changed}
    return DocVQADataModule(options.pop("source"), "tiny", **options)


def fine_tuned(steps=STEPS, kind=Idefics2Module):
    """Return the ANLS on unseen identity cards after a number of training steps."""
    seed_everything(0, verbose=False)
    module = kind(**{**QUICKSTART["model"], "warmup_steps": 10})
    trainer = Trainer(**TRAINER, max_steps=steps, limit_val_batches=0)
    pages = data()
    if steps:
        trainer.fit(module, pages)
    return Trainer(**TRAINER).validate(module, pages, verbose=False)[0]["val/anls"]


@pytest.fixture(scope="module")
def right():
    return fine_tuned()


@pytest.mark.slow
def test_it_reads_as_well_as_its_card_says():
    claimed = float(re.search(r"\| unseen pages \| [\d.]+ \| ([\d.]+) \|", CARD.read_text())[1])
    module = Idefics2Module("tiny", quantization="none", max_new_tokens=48)
    scores = Trainer(**TRAINER).validate(module, data(source="synthetic", limit_val=96), verbose=False)[0]
    assert scores["val/anls"] >= claimed - 0.02


def test_it_is_small_and_in_the_hubs_form():
    files = {path.name: path.stat().st_size for path in CARD.parent.iterdir()}
    assert sum(files.values()) <= 16e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md"} <= files.keys()
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".py")) for name in files)


@pytest.mark.long
def test_a_short_fine_tuning_teaches_it_a_new_kind_of_document(right):
    before = fine_tuned(steps=0)
    assert before <= 0.2
    assert right >= before + 0.3


class OnThePromptToo(Idefics2Module):
    """Supervises all tokens but padding and ``ignored``; questions still share rows, for speed."""

    ignored: tuple[str, ...] = ("<image>", "<fake_token_around_image>")

    def training_step(self, batch, batch_idx):
        ignored = torch.tensor(load_processor("tiny").tokenizer.convert_tokens_to_ids(self.ignored))
        masked = (batch.attention_mask == 0) | torch.isin(batch.input_ids, ignored)
        labels = batch.input_ids.masked_fill(masked, IGNORED_LABEL)
        positions = F.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1)).flatten().nonzero()[:, 0]
        return super().training_step(replace(batch, labels=labels, supervised_positions=positions), batch_idx)


class OnImageTokens(OnThePromptToo):
    ignored = ()


@pytest.mark.long
@pytest.mark.parametrize("kind", [OnThePromptToo, OnImageTokens])
def test_training_on_wrong_labels_hurts(kind, right):
    assert fine_tuned(kind=kind) <= right - 0.1

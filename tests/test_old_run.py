"""Files that version 0.1.0 wrote before its checkpoints held an experiment are still read correctly.

The files are of a fit of six steps with ``--model.pretrained tiny --data.source synthetic:form``, and of its `export`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.pretrained import resolve

OLD = Path(__file__).parent / "assets" / "old_run"
CPU = ("--trainer.accelerator", "cpu", "--trainer.precision", "32-true")


@pytest.fixture
def old():
    return [json.loads(line)["prediction"] for line in (OLD / "val_predictions.jsonl").read_text().splitlines()]


def test_its_checkpoint_is_scored_as_it_was(run):
    folder = run("validate", "--ckpt_path", OLD / "fit.ckpt", *CPU)
    (answers,) = folder.rglob("val_predictions.jsonl")
    old, new = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (OLD / "val_predictions.jsonl", answers)
    )
    assert [{name: record[name] for name in old[0]} for record in new] == old
    assert new[0]["confidence"] > 0


def test_a_fit_goes_on_from_its_checkpoint(run, tmp_path):
    """With the same command and "last". The epoch restarts, since the checkpoint doesn't say its order."""
    folder = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(OLD / "fit.ckpt", folder / "epoch=0-step=6.ckpt")
    flags = ["--model.pretrained", "tiny", "--model.quantization", "none", "--model.lr", "1e-3"]
    flags += ["--model.warmup_steps", 0, "--model.lora.r", 1]
    flags += ["--model.lora.target_modules", ".*text_model.*(q_proj|v_proj)$|lm_head$"]
    flags += ["--data.source", "synthetic:form", "--data.limit_train", 64, "--data.limit_val", 8]
    flags += ["--data.questions_per_page", 8, "--data.batch_size", 8, "--data.num_workers", 0]
    flags += ["--trainer.num_sanity_val_steps", 0, "--trainer.limit_val_batches", 0]
    with pytest.warns(UserWarning, match=r"epoch restarts.*data.seed unknown, here 0"):
        run("fit", *flags, *CPU, "--trainer.max_steps", 8, "--ckpt_path", "last")
    (new,) = (tmp_path / "lightning_logs" / "version_1").rglob("*.ckpt")
    first, second = (torch.load(path, weights_only=True) for path in (OLD / "fit.ckpt", new))
    assert second["global_step"] == 8
    steps = [checkpoint["optimizer_states"][0]["state"][0]["step"] for checkpoint in (first, second)]
    assert steps == [6, 8]
    moved = [float((value - second["state_dict"][name]).abs().max()) for name, value in first["state_dict"].items()]
    assert 0 < max(moved) < 3e-3  # two steps of at most the learning rate each


@torch.no_grad()
def test_plain_peft_answers_with_its_export(old):
    processor = AutoProcessor.from_pretrained(OLD / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(resolve("tiny"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, OLD / "adapter").eval()
    data = DocVQADataModule("synthetic:form", "tiny", limit_val=8)
    data.setup("validate")
    batch = Idefics2Collator(processor, train=False)([data.examples["val"][i] for i in range(8)])
    tokenizer = processor.tokenizer
    special = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    ids = model.generate(
        input_ids=batch.prompts.input_ids,
        attention_mask=batch.prompts.attention_mask,
        pixel_values=batch.pixel_values[batch.question_rows],
        pixel_attention_mask=batch.pixel_attention_mask[batch.question_rows],
        do_sample=False,
        max_new_tokens=32,
        eos_token_id=[tokenizer.eos_token_id, special[2]],
        bad_words_ids=[[token] for token in special[:2]],
    )
    answers = tokenizer.batch_decode(ids[:, batch.prompts.input_ids.shape[1] :], skip_special_tokens=True)
    assert [answer.strip() for answer in answers] == old

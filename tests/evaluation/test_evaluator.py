"""Every question is answered, scored and written once, by its index, in every mode of the model."""

import json
import re
import warnings

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.data.sources.synthetic import SyntheticPages, write_docvqa
from idefics_lit.model.loading import LoRA
from idefics_lit.pretrained import load_processor
from idefics_lit.training.module import Idefics2Module

READER = ("--model.pretrained", "tiny", "--model.quantization", "none", "--trainer.accelerator", "cpu")
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.logger", "false", "--data.num_workers", "0")
CPU = {"accelerator": "cpu", "precision": "32-true", "logger": False, "enable_progress_bar": False,
       "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip
IDS = ["a.pdf", "a.pdf", "a.pdf", "007", "7", "²"]


@pytest.fixture
def source(tmp_path):
    """Six questions in the official form, of which three have the id of their document; one's reference is wrong."""
    file = write_docvqa(SyntheticPages("val", 2, families=("form",)), tmp_path / "data")
    written = json.loads(file.read_text())
    written["data"] = written["data"][:6]
    for row, question_id in zip(written["data"], IDS, strict=True):
        row["questionId"] = question_id
    written["data"][1]["answers"] = ["nothing of the kind, whoever reads it"]
    file.write_text(json.dumps(written))
    return file.parent


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_questions_that_share_an_id_are_all_scored_and_written(run, source, capfd):
    with pytest.warns(UserWarning, match=r"Several questions have the id a\.pdf: each of them is scored"):
        folder = run("validate", *READER, *QUIET, "--data.source", source, "--data.eval_batch_size", 4)
    records = lines(folder / "val_predictions.jsonl")
    assert [record["question_id"] for record in records] == IDS
    scores = [record["score"] for record in records]
    assert scores[1] == 0 and sum(scores) >= 4
    logged = re.search(r"val/anls\W+([\d.]+)", capfd.readouterr().out)[1]
    assert float(logged) == pytest.approx(sum(scores) / 6, abs=1e-4)


def test_a_submission_has_an_answer_for_every_question_and_no_two_ids_become_one(run, source):
    folder = run("predict", *READER, *QUIET, "--data.source", source, "--data.predict_split", "val")
    submission = json.loads((folder / "submission.json").read_text())
    assert [row["questionId"] for row in submission] == ["a.pdf", "a.pdf", "a.pdf", "007", "7", "²"]
    records = lines(folder / "predictions.jsonl")
    assert [record["question_id"] for record in records] == IDS
    assert [row["answer"] for row in submission] == [record["prediction"] for record in records]


@pytest.fixture(scope="module")
def processor():
    return load_processor("tiny")


@pytest.fixture
def questions():
    drawn = SyntheticPages("modes", 3, families=("form",))
    return [drawn[i] for i in range(4)]


def with_dropout():
    """The reader with an adapter whose dropout shows, in train mode but for its first layer's attention."""
    torch.manual_seed(0)
    module = Idefics2Module("tiny", quantization="none", lora=LoRA(dropout=0.5), max_new_tokens=6)
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    module.train()
    module.backbone.text_model.layers[0].self_attn.eval()
    return module


def test_answers_and_losses_are_the_same_in_every_mode(processor, questions):
    batch = Idefics2Collator(processor, train=False)(questions)
    module = with_dropout()
    modes = {name: part.training for name, part in module.named_modules()}
    answers = [module.generate(batch), module.generate(batch)]
    answers.append([answer.prediction for answer in module.predict_step(batch, 0)])
    assert answers == answers[:1] * 3
    losses = []
    for _ in range(2):
        module.validation_step(batch, 0)
        losses.append(module.eval_loss.compute())
        module.eval_loss.reset()
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert not any(loss.requires_grad for loss in losses)
    module.eval().validation_step(batch, 0)
    answers.append([answer.prediction for answer in module.answers[-len(questions) :]])
    assert losses == [module.eval_loss.compute()] * 2
    assert answers[0] == answers[3]
    assert len(set(answers[0])) > 1


def test_pages_of_answers_are_the_same_in_every_mode(processor, questions):
    first, second = questions[0], questions[-1]
    asked = [Example(i, first.question, [*first.images, *second.images], answer_page=0) for i in range(2)]
    batch = Idefics2Collator(processor, train=False)(asked)
    module = with_dropout()
    seen = []
    original = module.backbone.logits
    module.backbone.logits = lambda hidden: seen.append(original(hidden)) or seen[-1]
    module.predict_step(batch, 0)
    first_time, seen = seen, []
    module.predict_step(batch, 0)
    assert len(first_time) == len(seen) > 1
    assert all(torch.equal(*pair) for pair in zip(first_time, seen, strict=True))


def test_a_data_set_of_ones_own_with_one_id_is_scored_whole(processor, questions):
    asked = [Example("a.pdf", one.question, one.images, one.answers) for one in questions[:3]]
    asked[2].answers = ["nothing of the kind, whoever reads it"]
    module = Idefics2Module("tiny", quantization="none", max_new_tokens=24)
    loader = DataLoader(asked, batch_size=2, collate_fn=Idefics2Collator(processor, train=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score = Trainer(**CPU).validate(module, loader, verbose=False)[0]["val/anls"]
    assert len(module.answers) == 3
    assert score == pytest.approx(sum(answer.score for answer in module.answers) / 3)
    assert 0.5 < score < 0.7

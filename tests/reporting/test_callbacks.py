"""The callbacks work one by one in a plain Trainer, without the command line and without a data module."""

import json
import warnings

import pytest
from lightning import Trainer
from PIL import Image
from torch.utils.data import DataLoader

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.pretrained import load_processor
from idefics_lit.reporting.prediction_writers import EvaluationWriter, PredictionWriter
from idefics_lit.reporting.report import Report
from idefics_lit.reporting.summary import Summary
from idefics_lit.training.module import Idefics2Module

OPTIONS = {"accelerator": "cpu", "precision": "32-true", "logger": False, "enable_progress_bar": False,
           "enable_model_summary": False, "enable_checkpointing": False}  # fmt: skip


@pytest.fixture
def evaluate(tiny, tmp_path):
    """Run a method of a Trainer with the given callbacks on three questions."""

    def evaluate(method, *callbacks):
        page = Image.new("L", (112, 112), 200)
        examples = [Example(i, "Who?", [page], ["Ann"]) for i in range(3)]
        collate = Idefics2Collator(load_processor(tiny, image_size=112), train=False)
        module = Idefics2Module(tiny, quantization="none", max_new_tokens=2)
        trainer = Trainer(**OPTIONS, default_root_dir=tmp_path, callbacks=[*callbacks])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("error", message="No ")  # what Report warns of
            return getattr(trainer, method)(module, DataLoader(examples, batch_size=2, collate_fn=collate))

    return evaluate


def test_evaluation_writer(evaluate, tmp_path):
    writer = EvaluationWriter()
    evaluate("validate", writer)
    lines = [json.loads(line) for line in (tmp_path / "val_predictions.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [0, 1, 2]
    evaluate("test", writer)
    assert (tmp_path / "test_predictions.jsonl").read_text() == (tmp_path / "val_predictions.jsonl").read_text()


def test_prediction_writer(evaluate, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    batches = evaluate("predict", PredictionWriter())
    submission = json.loads((tmp_path / "submission.json").read_text())
    answers = [answer for batch in batches for answer in batch]
    assert submission == [{"questionId": answer.question_id, "answer": answer.prediction} for answer in answers]
    (validated,) = evaluate("validate")
    printed = capsys.readouterr().out
    assert f"ANLS {validated['val/anls']:.4f} (questions with references: 3)\n3 answers in " in printed


def test_report_and_summary(evaluate, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    writer = EvaluationWriter()
    report = Report(writer)
    evaluate("validate", writer, Summary(writer, report), report)
    assert "Questions by score" in (tmp_path / "report.html").read_text()
    printed = capsys.readouterr().out
    assert "validate metric" in printed
    assert f"report in {tmp_path / 'report.html'}" in printed

"""What is answered, counted and written: every question of a set, by its place, whatever mode the model is in."""

import json
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from idefics_lit.evaluation.records import by_place
from lightning import Trainer
from torch.utils.data import DataLoader

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.example import Example
from idefics_lit.data.sources.synthetic import SyntheticPages, write_docvqa
from idefics_lit.errors import InputError
from idefics_lit.model.loading import LoRA
from idefics_lit.pretrained import load_processor
from idefics_lit.reporting import results
from idefics_lit.reporting.results import PredictionWriter, Results
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
    with pytest.warns(UserWarning, match=r"Several questions have the id a\.pdf: each of them is counted"):
        folder = run("validate", *READER, *QUIET, "--data.source", source, "--data.eval_batch_size", 4)
    records = lines(folder / "val_predictions.jsonl")
    assert [record["question_id"] for record in records] == IDS
    scores = [record["score"] for record in records]
    assert scores[1] == 0 and sum(scores) >= 4
    logged = re.search(r"val/anls\W+([\d.]+)", capfd.readouterr().out)[1]
    assert float(logged) == pytest.approx(sum(scores) / 6, abs=1e-6)


def test_a_submission_has_an_answer_for_every_question_and_no_two_ids_become_one(run, source):
    folder = run("predict", *READER, *QUIET, "--data.source", source, "--data.predict_split", "val")
    submission = json.loads((folder / "submission.json").read_text())
    assert [row["questionId"] for row in submission] == IDS
    records = lines(folder / "predictions.jsonl")
    assert [record["question_id"] for record in records] == IDS
    assert [row["answer"] for row in submission] == [record["prediction"] for record in records]


@pytest.mark.parametrize(
    ("ids", "written"),
    [
        (["12", "3", 0, "-4"], [12, 3, 0, -4]),
        (["007", "7", "+7", " 7", "7.0", "0x7"], ["007", "7", "+7", " 7", "7.0", "0x7"]),
        (["007", "8", 9], ["007", "8", 9]),
        (["²", "٣", "1_0", "-0", ""], ["²", "٣", "1_0", "-0", ""]),
        ([7, "7", "8"], [7, "7", "8"]),  # two ids that would be one
        (["7", "7"], [7, 7]),  # one id
        (["9" * 16, "9" * 5000, 10**20], ["9" * 16, "9" * 5000, 10**20]),  # readers may round numbers so long
    ],
)
def test_ids_are_numbers_where_that_loses_nothing(ids, written, tmp_path):
    write([record(i, question_id) for i, question_id in enumerate(ids)], tmp_path)
    found = [row["questionId"] for row in json.loads((tmp_path / "submission.json").read_text())]
    assert list(map(repr, found)) == list(map(repr, written))


def record(place, question_id, score=1.0, **more):
    written = {"question": "Who?", "prediction": f"{place}", "references": ["Ann"], "question_types": ["form"]}
    return {"question_id": question_id, **written, "score": score, **more, "place": place}


def write(records, folder):
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, loggers=[], default_root_dir=folder)
    PredictionWriter().write_on_epoch_end(trainer, None, [records], [])


@pytest.mark.parametrize("name", ["submission.json", "predictions.jsonl"])
def test_one_file_that_cannot_be_written_takes_no_other_with_it(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"{name} can't be written"):
        write([record(0, "a")], tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"submission.json", "predictions.jsonl"} - {
        name
    }


def test_ranks_files_hold_what_is_scored(monkeypatch):
    """A question that a sampler repeats on another rank counts once, by the first rank's answer, as the metric does."""
    ranks = [
        [record(0, "a", 1.0), record(1, "a", 0.0), record(2, "b", 1.0)],
        [record(3, "b", 0.5), record(4, "c", 0.0), record(0, "a", 0.5)],
    ]
    monkeypatch.setattr(results, "gather_objects", lambda trainer, own: list(map(by_place, ranks)))
    with pytest.warns(UserWarning, match="Several questions have the id a, b: each"):
        found = results._unique(None, ranks[0])
    assert [(one["place"], one["score"]) for one in found] == [(0, 1.0), (1, 0.0), (2, 1.0), (3, 0.5), (4, 0.0)]


def test_examples_without_a_place_count_by_id_and_how_often_a_rank_meets_it():
    first = by_place([record(None, question_id) for question_id in ("a", "a", "b", 1, "1")])
    assert len(first) == 5
    padded = by_place([record(None, question_id) for question_id in ("c", "a")])
    assert len({**first, **padded}) == 6


def test_answers_before_and_after_training_are_compared_by_place(capfd):
    summary = Results()
    summary.before = [record(0, "a", 0.0), record(1, "a", 1.0)]
    summary.after = [record(0, "a", 1.0), record(1, "a", 0.5)]
    assert [one["score"] for one in summary.compared.values()] == [0.0, 1.0]
    table = results._scores(summary.compared, summary.after)
    assert [next(iter(column.cells)) for column in table.columns] == ["all", "0.500", "0.750", "2"]
    summary.after = [record(0, "a"), record(1, "b")]  # others
    assert summary.compared == {}


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
    answers.append([one["prediction"] for one in module.predict_step(batch, 0)])
    assert answers == answers[:1] * 3
    losses = []
    for _ in range(2):
        module.validation_step(batch, 0)
        losses.append(module.eval_loss.compute())
        module.eval_loss.reset()
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert not any(loss.requires_grad for loss in losses)
    module.eval().validation_step(batch, 0)
    answers.append([one["prediction"] for one in module.records[-len(questions) :]])
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
    assert len(module.records) == 3
    assert score == pytest.approx(sum(one["score"] for one in module.records) / 3)
    assert 0.5 < score < 0.7

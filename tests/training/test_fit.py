"""Fit, resume, validate and predict as a user types them, on real pages."""

import csv
import json
import warnings

import pytest
import torch

from idefics_lit.data.datamodule import DocVQADataModule


def flags(tiny, source, *more):
    flags = ["--model.pretrained", tiny, "--data.source", source, "--data.image_size", 112, "--data.num_workers", 0]
    flags += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--model.max_new_tokens", 4]
    return [*flags, "--model.lr", "1e-2", "--model.warmup_steps", 0, *more]


def scores(folder, column="val/anls"):
    """The logged values of a column in every run of the folder, newest last."""
    files = sorted(folder.glob("lightning_logs/*/metrics.csv"), key=lambda file: int(file.parent.name.split("_")[1]))
    return [float(row[column]) for file in files for row in csv.DictReader(file.open()) if row.get(column)]


def steps(tiny, source, *more):
    """Two epochs of two steps of two batches, a checkpoint each."""
    sizes = ["--data.batch_size", 2, "--trainer.accumulate_grad_batches", 2]
    more = ["--data.limit_train", 8, "--trainer.max_steps", 4, *sizes, *more]
    callback = "--trainer.callbacks"
    more += [f"{callback}+=ModelCheckpoint", f"{callback}.save_top_k", -1, f"{callback}.every_n_train_steps", 2]
    return flags(tiny, source, *more)


def test_answers_are_written_in_the_sets_order(run, tiny, docvqa, tmp_path):
    """However a page's questions are scattered."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "documents").symlink_to(docvqa / "documents")
    questions = json.loads((docvqa / "train.json").read_text())
    questions["data"] = questions["data"][::3] + questions["data"][1::3] + questions["data"][2::3]
    (data / "val.json").write_text(json.dumps(questions))
    options = ["--data.eval_batch_size", 4, "--trainer.logger", "false"]
    folder = run("predict", *flags(tiny, data, *options), "--data.predict_split", "val")
    answers = json.loads((folder / "submission.json").read_text())
    assert [answer["questionId"] for answer in answers] == [row["questionId"] for row in questions["data"]]
    run("validate", *flags(tiny, data, *options), "--data.val_split", "val")
    records = [json.loads(line) for line in (folder / "val_predictions.jsonl").open()]
    assert [record["prediction"] for record in records] == [answer["answer"] for answer in answers]
    assert "index" not in records[0]


def test_validate_repeats_the_fits_last_score_and_predict_answers_every_question_once(run, tiny, docvqa, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "documents").symlink_to(docvqa / "documents")
    questions = json.loads((docvqa / "val.json").read_text())
    for name in ("train.json", "val.json"):
        (data / name).write_text((docvqa / name).read_text())
    slow = ["--model.lr", "1e-5"]  # a model that hasn't learned to be silent
    folder = run("fit", *steps(tiny, docvqa, *slow))
    checkpoint = next(folder.glob("lightning_logs/version_0/checkpoints/*step=4.ckpt"))
    run("predict", *flags(tiny, docvqa), "--ckpt_path", checkpoint)

    submission = json.loads(next(folder.rglob("submission.json")).read_text())
    ids = [question["questionId"] for question in questions["data"]]
    assert [answer["questionId"] for answer in submission] == ids
    records = [json.loads(line) for line in next(folder.rglob("predictions.jsonl")).open()]
    assert [record["prediction"] for record in records] == [answer["answer"] for answer in submission]
    assert [record["references"] for record in records] == [question["answers"] for question in questions["data"]]

    # Make two of the five answers right, so that there is a score to repeat.
    for question, record in list(zip(questions["data"], records, strict=True))[:2]:
        assert record["prediction"]
        question["answers"] = ["something else", record["prediction"].upper()]
        question["question_types"] = ["form"]
    (data / "val.json").write_text(json.dumps(questions))
    run("fit", *steps(tiny, data, *slow))
    assert scores(folder)[-1] == pytest.approx(0.4, abs=1e-6)
    run("validate", *flags(tiny, data), "--ckpt_path", checkpoint)
    assert scores(folder)[-1] == pytest.approx(scores(folder)[-2], abs=1e-6)
    assert scores(folder, "val/loss")[-1] == pytest.approx(scores(folder, "val/loss")[-2], abs=1e-6)
    assert scores(folder, "val/anls_form")[-1] == pytest.approx(1)


def test_a_resumed_run_ends_with_the_same_bits(run, tiny, docvqa):
    folder = run("fit", *steps(tiny, docvqa))
    first = folder / "lightning_logs" / "version_0" / "checkpoints"
    run("fit", *steps(tiny, docvqa), "--ckpt_path", next(first.glob("*step=2.ckpt")))
    second = folder / "lightning_logs" / "version_1" / "checkpoints"
    whole, resumed = (torch.load(next(f.glob("*step=4.ckpt")), weights_only=True) for f in (first, second))
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())
    states = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (whole, resumed))
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*(s.values() for s in states), strict=True))
    middle = torch.load(next(first.glob("*step=2.ckpt")), weights_only=True)
    assert not all(torch.equal(value, middle["state_dict"][name]) for name, value in whole["state_dict"].items())


def test_a_resumed_run_takes_the_learning_rate_it_is_given(run, tiny, docvqa):
    folder = run("fit", *steps(tiny, docvqa, "--trainer.log_every_n_steps", 1))
    checkpoint = next(folder.rglob("*step=2.ckpt"))
    run("fit", *steps(tiny, docvqa, "--trainer.log_every_n_steps", 1), "--model.lr", "1e-3", "--ckpt_path", checkpoint)
    assert scores(folder, "lr") == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3, 5e-4, 2.5e-4])


def test_without_a_checkpoint_the_base_model_is_scored(run, tiny, docvqa):
    folder = run("validate", *flags(tiny, docvqa))
    assert len(scores(folder)) == 1


def test_a_fit_ends_with_its_scores_before_and_after(run, tiny, docvqa, capsys):
    folder = run("fit", *steps(tiny, docvqa, "--trainer.num_sanity_val_steps", -1))
    screen = capsys.readouterr().out
    assert "before" in screen and "after" in screen
    questions = json.loads((docvqa / "val.json").read_text())["data"]
    answers = [json.loads(line) for line in (folder / "lightning_logs/version_0/val_predictions.jsonl").open()]
    assert [answer["question_id"] for answer in answers] == [question["questionId"] for question in questions]
    run("fit", *steps(tiny, docvqa, "--trainer.num_sanity_val_steps", 0))
    assert "before" not in capsys.readouterr().out
    run("validate", *flags(tiny, docvqa))
    assert "5 answers in lightning_logs/version_2/val_predictions.jsonl" in capsys.readouterr().out


def test_a_fit_without_a_validation_says_that_there_is_no_best_checkpoint(run, short_fit, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    best = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor", "val/anls"]
    last = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", 2]
    once = ["--trainer.max_steps", 2, "--trainer.val_check_interval", 5, "--trainer.accumulate_grad_batches", 1]
    run(*short_fit(*once, *best, *last))
    screen = capsys.readouterr().out
    assert "best checkpoint  none: no validation ran" in screen
    assert "last checkpoint  ./lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt" in screen


def test_a_fit_validates_on_some_questions_and_ends_with_all(run, tiny, docvqa, capsys):
    folder = run("fit", *steps(tiny, docvqa, "--data.val_in_fit", 2, "--trainer.check_val_every_n_epoch", 1))
    screen = capsys.readouterr().out
    assert "2 answers" not in screen and "5 answers in" in screen
    answers = [json.loads(line) for line in (folder / "lightning_logs/version_0/val_predictions.jsonl").open()]
    questions = json.loads((docvqa / "val.json").read_text())["data"]
    assert [answer["question_id"] for answer in answers] == [question["questionId"] for question in questions]
    assert len(scores(folder)) == 3  # two epochs' and the last


def test_questions_drawn_for_a_fit_lie_on_as_few_pages_as_hold_them(tiny):
    data = DocVQADataModule("synthetic", tiny, val_in_fit=30, num_workers=0)
    data.setup("validate")
    whole = data.examples["val"]
    data.setup("fit")
    drawn = data.examples["val"]
    pages = list(dict.fromkeys(drawn.page_ids))
    assert len(drawn) == 30 and pages != list(dict.fromkeys(whole.page_ids))[: len(pages)]
    assert sum(drawn.page_ids.count(page) == whole.page_ids.count(page) for page in pages) >= len(pages) - 1


def test_a_few_batches_are_overfitted(run, short_fit):
    """In the set's order, by a sampler of Lightning's; and resumed."""
    few = short_fit("--trainer.overfit_batches", 2, "--trainer.val_check_interval", 1)
    folder = run(*few, "--trainer.max_steps", "1")
    (saved,) = folder.rglob("*.ckpt")
    run(*few, "--trainer.max_steps", "2", "--ckpt_path", str(saved))
    (saved,) = folder.rglob("*step=2.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(("warmup_steps", "warned"), [(1, 0), (2, 1)])
def test_a_warmup_that_is_longer_than_the_training_is_said(run, tiny, docvqa, warmup_steps, warned):
    short = ["--data.limit_train", 4, "--trainer.limit_val_batches", 0, "--trainer.max_steps", 2]
    with warnings.catch_warnings(record=True) as caught:
        run("fit", *flags(tiny, docvqa, *short, "--model.warmup_steps", warmup_steps))
    messages = [str(warning.message) for warning in caught if "model.warmup_steps" in str(warning.message)]
    assert len(messages) == warned
    assert all(m.startswith(f"model.warmup_steps {warmup_steps}: training takes 2 optimizer steps") for m in messages)

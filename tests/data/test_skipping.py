"""Bad examples are skipped, counted and listed; by default they stop the run."""

import io
import json
import re
from itertools import islice

import datasets
import pytest
import torch
from lightning import Trainer
from PIL import Image

from idefics_lit.data.datamodule import DocVQADataModule

PAGES = 4
SKIP = ("--data.on_bad_example", "skip")
BROKEN = {
    "missing": r"row 1 \(questionId 1, image missing.png\): the image file is missing",
    "cut": r"row 3 \(questionId 3, image cut.png\): the image can't be read",
    "token": r"row 5 \(questionId 5, .*\): 'What is <image>\?' holds one of the model's special tokens",
    "long": r"row 7 \(questionId 7, .*\): \d+ tokens are more than 2048",
}


@pytest.fixture
def broken(tmp_path):
    """An official folder of twelve good questions and four bad ones, each bad in a different way."""
    folder = tmp_path / "data"
    folder.mkdir()
    for page in range(PAGES):
        Image.new("L", (60, 40), 50 * page).save(folder / f"{page}.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:60])
    rows = [
        {"questionId": i, "question": f"What is {i}?", "image": f"{i % PAGES}.png", "answers": [str(i)]}
        for i in range(16)
    ]
    rows[1]["image"], rows[3]["image"] = "missing.png", "cut.png"
    rows[5]["question"], rows[7]["question"] = "What is <image>?", "a" * 4100
    for split in ("train", "val"):
        (folder / f"{split}.json").write_text(json.dumps({"data": rows}))
    return folder


def flags(short_fit, broken, *more):
    args = short_fit("--data.limit_train", "null", "--data.limit_val", "null", "--trainer.max_steps", 8, *more)
    args[args.index("--data.source") + 1] = str(broken)
    return args


def named(folder, name="skipped.txt"):
    return (folder / name).read_text().splitlines()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fit_skips_and_lists_bad_examples(run, short_fit, broken, capfd, workers):
    folder = run(*flags(short_fit, broken, *SKIP, "--data.num_workers", workers))
    lines = named(folder / "lightning_logs/version_0")
    for pattern in BROKEN.values():
        matching = [line for line in lines if re.search(pattern, line)]
        assert sorted(line.partition(".json")[0].rpartition("/")[2] for line in matching) == ["train", "val"], pattern
    assert len(lines) == 8
    assert "8 examples were skipped: lightning_logs/version_0/skipped.txt" in " ".join(capfd.readouterr().out.split())
    answers = [json.loads(line) for line in (folder / "lightning_logs/version_0/val_predictions.jsonl").open()]
    assert [answer["question_id"] for answer in answers] == [0, 2, 4, 6, *range(8, 16)]


def test_raise_is_the_default(run, short_fit, broken, capfd):
    with pytest.raises(SystemExit):
        run(*flags(short_fit, broken))
    assert (
        capfd.readouterr()
        .err.splitlines()[-1]
        .endswith(
            f"{broken}/train.json, row 1 (questionId 1, image missing.png): the image file is missing in {broken}: "
            "mend the path, or see data.image_root"
        )
    )


def test_a_fit_equals_one_without_the_bad_rows(run, short_fit, broken):
    """If bad rows are known from the start; others make batches shorter."""
    rows = json.loads((broken / "train.json").read_text())["data"]
    for row in (rows[3], rows[5], rows[7]):
        row |= {"question": "What?", "image": "2.png"}
    for split, split_rows in (("train", rows), ("val", rows[:1])):
        (broken / f"{split}.json").write_text(json.dumps({"data": split_rows}))
    folder = run(*flags(short_fit, broken, *SKIP))
    (broken / "train.json").write_text(json.dumps({"data": [row for row in rows if row["image"] != "missing.png"]}))
    run(*flags(short_fit, broken))
    first, second = (
        torch.load(next(folder.glob(f"lightning_logs/version_{i}/checkpoints/*.ckpt")), weights_only=True)["state_dict"]
        for i in range(2)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_batch_of_bad_examples_alone_trains_nothing(run, short_fit, broken):
    rows = json.loads((broken / "train.json").read_text())["data"]
    (broken / "train.json").write_text(json.dumps({"data": [rows[3], rows[0], rows[5], rows[7]]}))
    more = ("--data.batch_size", 1, "--trainer.max_steps", 4, "--trainer.accumulate_grad_batches", 1)
    folder = run(*flags(short_fit, broken, *SKIP, *more, "--trainer.val_check_interval", 1.0))
    checkpoint = torch.load(next(folder.rglob("*.ckpt")), weights_only=True)
    assert checkpoint["global_step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_predict_answers_the_good_examples(run, short_fit, broken):
    args = flags(short_fit, broken, *SKIP)
    folder = run("predict", *args[1:], "--data.predict_split", "val", "--trainer.logger", "false")
    assert len(json.loads((folder / "submission.json").read_text())) == 12
    assert len(named(folder)) == 4


def test_a_data_set_of_bad_rows_alone_is_refused(run, short_fit, broken, capfd):
    rows = json.loads((broken / "train.json").read_text())["data"]
    (broken / "train.json").write_text(json.dumps({"data": [rows[1]]}))
    with pytest.raises(SystemExit):
        run(*flags(short_fit, broken, *SKIP))
    assert "data.on_bad_example skip: no row is left, the first one's error: " in capfd.readouterr().err


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_and_streams(tiny, tmp_path, streaming):
    def page(grey):
        Image.new("L", (60, 40), grey).save(png := io.BytesIO(), "PNG")
        return {"bytes": png.getvalue(), "path": None}

    rows = [{"id": i, "question": f"What is {i}?", "answers": ["a"], "image": page(i)} for i in range(12)]
    rows[5]["image"], rows[7]["question"] = {"bytes": b"cut", "path": None}, "a <image>"
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    (tmp_path / "set").mkdir()
    data.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    module = DocVQADataModule(
        str(tmp_path / "set"),
        tiny,
        on_bad_example="skip",
        batch_size=3,
        num_workers=0,
        image_size=112,
        held_out=0.4,
        **({"streaming": True, "limit_val": 2} if streaming else {"val_split": "train"}),
    )
    module.trainer = Trainer(max_steps=4, logger=False, accelerator="cpu")
    module.setup("fit")
    batches = list(islice(module.train_dataloader(), 4))
    assert {line.split(": ")[0].split("/")[-1] for batch in batches for line in batch.skipped} == {
        "set train, row 5",
        "set train, row 7",
    }
    seen = [question for batch in batches for question in batch.question_ids]
    assert set(seen) >= set(range(12)) - {5, 7} - ({0, 1} if streaming else set())

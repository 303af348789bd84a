"""The splits of each stage, the order of training questions, and when pages are decoded."""

import json
import shutil

import pytest
import torch
from PIL import Image

from idefics_lit.data import split_roles
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.errors import InputError


@pytest.fixture
def data(tiny):
    """Return a function that sets up a data module with the tiny processor for a stage."""

    def make(stage, source="synthetic", **options):
        options = {"num_workers": 0, "limit_train": 12, **options}
        module = DocVQADataModule(str(source), tiny, **options)
        module.setup(stage)
        return module

    return make


@pytest.fixture
def official(tmp_path):
    """Write an official folder: 2 questions on each of a split's pages, two answers each."""

    shades = {"train": 0, "val": 100, "test": 200}  # the same image in two files would be one page

    def write(**splits):
        for split, pages in splits.items():
            rows = []
            for number in range(2 * pages):
                image = f"{split}{number // 2}.png"
                Image.new("L", (40, 30), shades[split] + number // 2).save(tmp_path / image)
                row = {"questionId": number, "question": f"{split} {number}?", "image": image}
                rows.append(row | {"answers": ["a", "bc", "def"]})
            (tmp_path / f"{split}.json").write_text(json.dumps({"data": rows}))
        return tmp_path

    return write


def questions(examples):
    return [examples[i].question for i in range(len(examples))]


def pages(examples):
    return {page for of_question in examples.page_ids for page in of_question}


@pytest.mark.parametrize(
    ("stage", "split", "expected"),
    [("fit", "train", "train"), ("fit", "val", "val"), ("validate", "val", "val"), ("test", "test", "test")],
)
def test_each_stage_opens_its_splits(data, official, stage, split, expected):
    examples = data(stage, official(train=3, val=2, test=1)).examples[split]
    assert {question.split()[0] for question in questions(examples)} == {expected}


@pytest.mark.parametrize(
    ("splits", "options", "expected"),
    [
        ({"train": 9, "val": 2, "test": 1}, {}, "test"),
        ({"train": 9, "val": 2}, {}, "val"),
        ({"train": 9}, {}, "train"),
        ({"train": 9, "val": 2, "test": 1}, {"predict_split": "val"}, "val"),
        ({"train": 9, "val": 2, "test": 1}, {"test_split": "val"}, "val"),
    ],
)
def test_prediction_takes_the_test_split_or_else_the_validation_split(data, official, splits, options, expected):
    module = data("predict", official(**splits), **options)
    assert {question.split()[0] for question in questions(module.examples["predict"])} == {expected}


def test_splits_may_be_named(data, official):
    module = data("fit", official(train=3, val=2, test=1), train_split="val", val_split="test")
    assert (len(module.examples["train"]), len(module.examples["val"])) == (4, 2)


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("nielsr/docvqa_1200_examples", {}, "test"),
        ("nielsr/docvqa_1200_examples", {"val_split": "test"}, "test"),
        ("nielsr/docvqa_1200_examples", {"val_split": "train"}, "train"),
        ("me/docvqa_1200_examples", {}, "train"),
        ("me/docvqa_1200_examples", {"val_split": "test"}, "test"),
    ],
)
def test_only_a_set_known_for_it_is_validated_on_its_test_split(data, official, monkeypatch, source, options, expected):
    folder = str(official(train=20, test=2))
    find = split_roles.find_splits
    monkeypatch.setattr(split_roles, "find_splits", lambda _, *args: find(folder, *args))
    module = data("fit", source, limit_train=None, **options)
    assert {question.split()[0] for question in questions(module.examples["val"])} == {expected}
    held_out = pages(module.examples["train"]).isdisjoint(pages(module.examples["val"]))
    assert held_out == (options.get("val_split") != "train")


def test_the_split_that_is_trained_on_is_validated_on_by_held_out_pages(data, official):
    """As lmms-lab/DocVQA, which has a validation and a test split alone."""
    module = data("fit", official(val=9, test=2), train_split="val", held_out=0.3, limit_train=None)
    train, val = module.examples["train"], module.examples["val"]
    assert (len(train), len(val)) == (12, 6) and pages(train).isdisjoint(pages(val))
    assert {"seed", "held_out"} < module.held_out_by.keys()


@pytest.mark.parametrize("option", ["train_split", "val_split"])
def test_an_unknown_split_is_named(data, official, option):
    with pytest.raises(InputError, match="no split 'dev', it has train, val: choose with"):
        data("fit", official(train=3, val=2), **{option: "dev"})


def test_held_out_pages_are_not_trained_on(data, official):
    source = official(train=20)
    module = data("fit", source, held_out=0.2, limit_train=None)
    train, val = module.examples["train"], module.examples["val"]
    assert (len(train), len(val)) == (32, 8)
    assert not pages(train) & pages(val)
    assert pages(data("validate", source, held_out=0.2).examples["val"]) == pages(val)
    assert pages(data("fit", source, held_out=0.2, seed=1).examples["val"]) != pages(val)


@pytest.mark.parametrize("held_out", [0, 1, -0.1])
def test_a_share_outside_0_and_1_is_refused(held_out):
    with pytest.raises(InputError, match=r"data.held_out .*: must be a fraction between 0 and 1"):
        DocVQADataModule("synthetic", held_out=held_out)


def test_a_single_page_cannot_be_held_out(data, official):
    with pytest.raises(InputError, match=r"its 1 pages are too few to hold out 0.05"):
        data("fit", official(train=1))


def test_limits_take_the_first(data, official):
    module = data("fit", official(train=3, val=2), limit_train=3, limit_val=1)
    assert questions(module.examples["train"]) == ["train 0?", "train 1?", "train 2?"]
    assert questions(module.examples["val"]) == ["val 0?"]


def test_an_empty_split_is_named(data, official):
    with pytest.raises(InputError, match="split 'val' is empty"):
        data("fit", official(train=3, val=0))


def test_a_row_without_answers_is_named_but_may_be_predicted(data, official):
    folder = official(train=2, val=1)
    rows = json.loads((folder / "val.json").read_text())
    rows["data"][1]["answers"] = []
    (folder / "val.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"val.json, row 1 \(questionId 1, .*no answer"):
        data("fit", folder)
    assert len(data("predict", folder).examples["predict"]) == 2


def test_setting_up_decodes_no_page(data, official, monkeypatch):
    folder = official(train=3, val=2)
    monkeypatch.setattr(Image, "open", lambda *args: pytest.fail("a page was opened"))
    module = data("fit", folder)
    module.train_dataloader()
    module.val_dataloader()


def epochs(module, count=2):
    """Return the token ids and labels of each epoch's batches."""
    loader = module.train_dataloader()
    batches_of_epochs = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches_of_epochs.append([(batch.input_ids.tolist(), batch.labels.tolist()) for batch in loader])
    return batches_of_epochs


@pytest.mark.parametrize("num_workers", [0, 2])
def test_order_and_answers_depend_on_seed_and_epoch_alone(data, official, num_workers):
    source = official(train=4, val=1)
    first, second = epochs(data("fit", source))
    torch.manual_seed(1)
    assert epochs(data("fit", source, num_workers=num_workers)) == [first, second]
    assert first != second
    assert epochs(data("fit", source, seed=1), 1) != [first]


def test_drawn_answers_differ_between_epochs(data, official):
    module = data("fit", official(train=6, val=1))
    collate = module.collator("train")
    answers = []
    for epoch in range(2):
        batch = collate([module.examples["train"][index, epoch, False] for index in range(12)])
        answers.append((batch.labels >= 0).sum(dim=1).tolist())
    assert answers[0] != answers[1]
    assert len(set(answers[0])) > 1


def test_every_question_is_visited_once_an_epoch(data, official):
    module = data("fit", official(train=5, val=1))
    visited = [index for index, *_ in module.train_dataloader().sampler]
    assert sorted(visited) == list(range(10))
    assert visited != sorted(visited)


@pytest.mark.parametrize("source", ["synthetic", "synthetic:form,table"])
def test_synthetic_splits_share_no_page(data, source):
    module = data("fit", source, limit_train=None)
    module.setup("test")
    train, val, test = (pages(module.examples[split]) for split in ("train", "val", "test"))
    assert not (train & val or train & test or val & test)
    assert len(train) > len(val) > 0
    families = {family for family, _ in train}
    assert families == ({"form", "table"} if ":" in source else {"form", "table", "letter"})


def test_synthetic_pages_depend_on_the_seed(data):
    one, same, other = (data("validate", seed=seed).examples["val"][0] for seed in (0, 0, 1))
    assert one.images[0].tobytes() == same.images[0].tobytes() != other.images[0].tobytes()


def test_an_unknown_family_is_named(data):
    with pytest.raises(InputError, match="poem"):
        data("fit", "synthetic:poem")


@pytest.mark.parametrize(
    ("option", "value"),
    [("batch_size", 0), ("eval_batch_size", -1), ("num_workers", -1), ("limit_train", 0), ("limit_val", 0)],
)
def test_numbers_out_of_range_are_named(option, value):
    with pytest.raises(InputError, match=f"data.{option} {value}: must be . or more"):
        DocVQADataModule("synthetic", **{option: value})


def test_image_size_reaches_the_pages(data, docvqa):
    sizes = [data("validate", docvqa, image_size=size).val_dataloader() for size in (224, 448)]
    small, large = (next(iter(loader)).pixel_values.shape[-2:] for loader in sizes)
    assert max(small) == 224
    assert max(large) == 448
    for size in (1, 13, 449, 5000):
        with pytest.raises(InputError, match=rf"data.image_size {size}: choose from 14 to 448"):
            data("validate", docvqa, image_size=size)


def test_a_folder_of_a_data_set_with_a_stray_json_is_not_official(data, tmp_path):
    (tmp_path / "train").mkdir()
    for grey, name in enumerate(("a.png", "b.png")):
        Image.new("L", (40, 30), grey).save(tmp_path / "train" / name)
    rows = [{"file_name": name, "question": "What?", "answer": "a"} for name in ("a.png", "b.png")]
    (tmp_path / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert len(data("fit", tmp_path, held_out=0.5).examples["train"]) == 1


def test_a_copied_folder_gives_the_same_held_out_pages(data, official, tmp_path_factory):
    source = official(train=20)
    copy = shutil.copytree(source, tmp_path_factory.mktemp("copy"), dirs_exist_ok=True)
    assert questions(data("validate", source).examples["val"]) == questions(data("validate", copy).examples["val"])

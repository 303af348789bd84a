"""A page is its image or its file, whatever it is called: held-out pages, streams, shared rows, `check`."""

import io
import json
import os
import shutil
import zipfile
from dataclasses import replace
from itertools import islice

import datasets
import pytest
from lightning import Trainer
from PIL import Image

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.example import Example
from idefics_lit.data.grouping import group_by_shared_pages
from idefics_lit.data.sources.hub import HubDocVQA
from idefics_lit.data.sources.splits import find_splits
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.errors import InputError
from idefics_lit.pretrained import load_processor


def draw(file, grey):
    Image.new("L", (40, 30), grey).save(file, "PNG")


def stored(grey):
    draw(png := io.BytesIO(), grey)
    return {"bytes": png.getvalue(), "path": None}


def greys(examples):
    """The pages of some questions, each of which is of a grey of its own."""
    return {image.getpixel((0, 0)) for example in examples for image in example.images}


def jsonl(folder, images, split="train"):
    rows = [{"question": f"{split} {i}?", "image": image, "answers": ["a"]} for i, image in enumerate(images)]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def official(folder, images, split="train"):
    rows = [{"questionId": i, "question": "?", "image": image, "answers": ["a"]} for i, image in enumerate(images)]
    (folder / f"{split}.json").write_text(json.dumps({"data": rows}))
    return str(folder)


@pytest.fixture
def data(tiny):
    """Set up a data module for a fit."""

    def make(source, **options):
        module = DocVQADataModule(source, tiny, **{"num_workers": 0, "image_size": 112, **options})
        module.trainer = Trainer(max_steps=2, logger=False, accelerator="cpu")
        module.setup("fit")
        return module

    return make


def both(module):
    return [[examples[i] for i in range(len(examples))] for examples in map(module.examples.get, ("train", "val"))]


@pytest.mark.parametrize("write", [jsonl, official])
def test_a_page_has_many_names(tmp_path, write):
    (tmp_path / "scans").mkdir()
    draw(tmp_path / "p.png", 0)
    draw(tmp_path / "q.png", 1)
    os.symlink(tmp_path / "p.png", tmp_path / "symbolic.png")
    os.link(tmp_path / "p.png", tmp_path / "scans" / "hard.png")
    shutil.copy(tmp_path / "p.png", tmp_path / "copy.png")
    names = ["p.png", "./p.png", "scans/../p.png", str(tmp_path / "p.png")]
    names += ["symbolic.png", "scans/hard.png", "copy.png"]
    examples = find_splits(write(tmp_path, [*names, "q.png"]), None, None, "en", 0)["train"]()
    assert not examples.faults
    assert len(set(examples.page_ids[:-1])) == 1
    assert not {*examples.page_ids[-1]} & {*examples.page_ids[0]}


def test_a_name_may_hold_colons(tmp_path):
    draw(tmp_path / "a::b.png", 5)
    examples = find_splits(jsonl(tmp_path, ["a::b.png"]), None, None, "en", 0)["train"]()
    assert greys([examples[0]]) == {5}


def test_stored_paths_lead_to_the_same_page(tmp_path):
    for grey, name in enumerate(("p.png", "q.png")):
        draw(tmp_path / name, grey)
    rows = [{"question": "?", "image": name} for name in ("p.png", "./p.png", str(tmp_path / "p.png"), "q.png")]
    ids = HubDocVQA(datasets.Dataset.from_list(rows), "set", folder=str(tmp_path)).page_ids
    assert ids[0] == ids[1] == ids[2] != ids[3]


@pytest.mark.parametrize("write", [jsonl, official])
def test_a_page_is_decoded_once_for_the_questions_that_follow_one_another(tmp_path, write):
    draw(tmp_path / "p.png", 0)
    rows = datasets.Dataset.from_list([{"question": "?", "image": stored(3)} for _ in range(2)])
    for examples in (
        find_splits(write(tmp_path, ["p.png"] * 2), None, None, "en", 0)["train"](),
        HubDocVQA(rows, "set"),
    ):
        assert examples[0].images[0] is examples[1].images[0]


@pytest.mark.parametrize(("write", "seed"), [(jsonl, 0), (official, 1)])
def test_no_held_out_page_is_trained_on_under_another_name(tmp_path, data, write, seed):
    for grey in range(20):
        draw(tmp_path / f"{grey}.png", grey)
        os.symlink(tmp_path / f"{grey}.png", tmp_path / f"{grey}-link.png")
    images = [f"{start}{grey}{end}.png" for grey in range(20) for start, end in (("", ""), ("./", ""), ("", "-link"))]
    train, val = both(data(write(tmp_path, images), held_out=0.2, seed=seed))
    assert len(greys(val)) == 4 and len(train) + len(val) == 60 and not greys(train) & greys(val)


@pytest.mark.parametrize("seed", range(2))
def test_a_page_among_several_is_held_out_too(tmp_path, data, seed):
    for grey in range(40):
        draw(tmp_path / f"{grey}.png", grey)
    images = [[f"{i}.png", f"{i + 1}.png"] for i in range(0, 40, 2)] + [f"{i}.png" for i in range(40)]
    train, val = both(data(jsonl(tmp_path, images), held_out=0.1, seed=seed))
    assert val and len(train) + len(val) == 60 and not greys(train) & greys(val)


def test_pages_that_hang_together_are_no_validation_set(tmp_path, data):
    for grey in range(12):
        draw(tmp_path / f"{grey}.png", grey)
    chain = [[f"{i}.png", f"{i + 1}.png"] for i in range(9)]
    for seed in range(2):
        train, val = both(data(jsonl(tmp_path, [*chain, "10.png", "11.png"]), held_out=0.1, seed=seed))
        assert len(val) == 1 and not greys(train) & greys(val)
    with pytest.raises(InputError, match=r"its 9 pages, in 1 groups .* are too few to hold out"):
        data(jsonl(tmp_path, chain))


def test_group_by_shared_pages():
    assert group_by_shared_pages([("a",), ("b", "c"), ("d",), ("c", "e"), ("a", "a"), ("e",), ("f", "d")]) == [
        [0, 4],
        [1, 3, 5],
        [2, 6],
    ]


TEXT = datasets.Value("string")
TURNS = {"images": datasets.List(datasets.Image()), "texts": datasets.List({"user": TEXT, "assistant": TEXT})}
SINGLE = {"question": TEXT, "image": datasets.Image(), "answers": datasets.List(TEXT)}
NAMED = SINGLE | {"ucsf_document_id": TEXT, "ucsf_document_page_no": TEXT}


def rows(form):
    """Each page twice: a question about it, or a few, and the same image in another row."""
    for i in range(40):
        grey = i % 20
        if form is TURNS:
            texts = [{"user": f"{i} {turn}?", "assistant": "a"} for turn in range(1 + i % 2)]
            yield {"images": [stored(grey)] + [stored(100 + i)] * (i % 3 == 0), "texts": texts}
        else:
            ids = {"ucsf_document_id": f"d{i}", "ucsf_document_page_no": "1"}
            yield {"question": f"{i}?", "image": stored(grey), "answers": ["a"], **(ids if form is NAMED else {})}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", [SINGLE, NAMED, TURNS], ids=["single", "named", "turns"])
def test_the_same_image_in_two_rows_is_one_page(tmp_path, data, form, streaming):
    made = datasets.Dataset.from_list(list(rows(form)), features=datasets.Features(form))
    made.to_parquet(str(tmp_path / "train.parquet"))
    module = data(str(tmp_path), streaming=streaming, held_out=0.2, **({"limit_val": 4} if streaming else {}))
    val = [module.examples["val"][i] for i in range(len(module.examples["val"]))]
    train = module.train_dataloader().dataset
    train = list(islice(train, 80)) if streaming else [train[i] for i in range(len(train))]
    assert val and len(greys(train)) > 10 and not greys(train) & greys(val)


@pytest.mark.parametrize("kind", ["path", "archive"])
def test_a_stream_of_files_tells_pages_by_their_content(tmp_path, data, kind):
    names = [f"{i}.png" for i in range(20)]
    for i, name in enumerate(names):
        draw(tmp_path / name, i % 10)
    metadata = "".join(json.dumps({"file_name": name, "question": "?", "answer": "a"}) + "\n" for name in names)
    (tmp_path / "metadata.jsonl").write_text(metadata)
    if kind == "archive":
        (tmp_path / "set").mkdir()
        with zipfile.ZipFile(tmp_path / "set" / "train.zip", "w") as archive:
            for name in (*names, "metadata.jsonl"):
                archive.write(tmp_path / name, name)
    module = data(str(tmp_path / "set" if kind == "archive" else tmp_path), streaming=True, limit_val=3)
    val = [module.examples["val"][i] for i in range(3)]
    train = list(islice(module.train_dataloader().dataset, 30))
    assert len(greys(val)) == 3 and len(greys(train)) == 7 and not greys(train) & greys(val)


@pytest.mark.parametrize("train", [True, False])
def test_a_row_is_shared_by_the_same_images_alone(tiny, train):
    """Crops and augmented copies keep the page's id; the same page may be decoded once for each question."""
    collate = Idefics2Collator(load_processor(tiny, image_size=112), train=train)
    page, copy, crop = Image.new("L", (90, 112), 9), Image.new("L", (90, 112), 9), Image.new("L", (90, 80), 9)
    augmented = Image.new("L", (90, 112), 10)
    examples = [
        Example(i, "?", [image], ["a"], page_id="p") for i, image in enumerate((page, crop, copy, augmented, page))
    ]
    batch = collate(examples)
    assert len(batch.pixel_values) == 3 and len({key for row in batch.image_keys for key in row}) == 3
    for i, row in enumerate((0, 1, 0, 2, 0)):
        alone = collate([replace(examples[i], page_id=None)])
        height, width = alone.pixel_values.shape[-2:]
        assert (batch.pixel_values[row, ..., :height, :width] == alone.pixel_values[0]).all()
        assert batch.image_sizes[row] == alone.image_sizes[0]
        if not train:
            assert batch.question_rows[i] == row


def test_crops_with_their_pages_ids_are_answered_from_their_own_image(run, tmp_path):
    """With the reader that comes with the package: two pages under one published id, one question."""
    drawn = SyntheticPages("test", 9)
    found = [drawn[i] for i in range(len(drawn))]
    asked = [[e for e in found if e.question == question] for question in dict.fromkeys(e.question for e in found)]
    examples = next(some for some in asked if len(some) > 1)[:2]
    made = []
    for example in examples:
        example.images[0].save(png := io.BytesIO(), "PNG")
        ids = {"ucsf_document_id": "d", "ucsf_document_page_no": "1", "image": {"bytes": png.getvalue(), "path": None}}
        made.append({"question": example.question, "answers": example.answers, **ids})
    for name, some in (("together", made), ("first", made[:1]), ("second", made[1:])):
        (tmp_path / name).mkdir()
        features = datasets.Features(NAMED)
        datasets.Dataset.from_list(some, features=features).to_parquet(str(tmp_path / name / "validation.parquet"))
    args = ["predict", "--model.pretrained", "tiny", "--model.quantization", "none", "--data.prompt_style", "idefics"]
    args += ["--data.num_workers", 0, "--data.batch_size", 2, "--trainer.accelerator", "cpu"]
    args += ["--model.max_new_tokens", 8]
    args += ["--trainer.precision", "32-true", "--trainer.logger", "false"]
    answers = {}
    for name in ("together", "first", "second"):
        run(*args, "--data.source", tmp_path / name, "--trainer.default_root_dir", tmp_path / "out" / name)
        (file,) = (tmp_path / "out" / name).rglob("predictions.jsonl")
        answers[name] = [json.loads(line)["prediction"] for line in file.read_text().splitlines()]
    assert answers["together"] == answers["first"] + answers["second"]
    assert answers["first"] != answers["second"]


def test_check_counts_each_page_that_is_in_both_splits(run, tmp_path, tiny, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    for grey in range(4):
        draw(tmp_path / f"{grey}.png", grey)
    draw(tmp_path / "again.bmp", 2)
    jsonl(tmp_path, ["0.png", ["1.png", "2.png"]])
    jsonl(tmp_path, [["1.png", "3.png"], "3.png", "again.bmp"], "validation")
    args = ["check", "--model.pretrained", tiny, "--data.source", tmp_path, "--data.num_workers", 0]
    run(*args, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_steps", 1)
    assert "validation pages that are trained on too, by their pixels: 2, such as" in capfd.readouterr().out

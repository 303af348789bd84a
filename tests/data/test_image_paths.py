"""Image paths of tables and official files: of Windows, of pages of a PDF, and outside the data's folder."""

import json
import re

import datasets
import pytest
from PIL import Image

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.sources.splits import find_splits
from idefics_lit.errors import InputError

GREYS = (0, 100, 200)


def draw(file, grey):
    file.parent.mkdir(exist_ok=True, parents=True)
    Image.new("L", (40, 30), grey).save(file)


def draw_pages(file):
    first, *others = (Image.new("L", (40, 30), grey) for grey in GREYS)
    first.save(file, save_all=True, append_images=others)


def csv(folder, *images, name="train.csv"):
    cells = ['"{}"'.format(json.dumps(i).replace('"', '""')) if isinstance(i, list) else i for i in images]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("question,image,answer\n" + "".join(f"a?,{cell},b\n" for cell in cells))


def official(folder, *images):
    rows = [{"questionId": i, "question": "?", "image": image, "answers": ["a"]} for i, image in enumerate(images)]
    (folder / "train.json").write_text(json.dumps({"data": rows}))


def jsonl(folder, *images):
    rows = [{"question": "a?", "image": image, "answer": "b"} for image in images]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def parquet(folder, *images):
    rows = [{"question": "a?", "image": image, "answer": "b"} for image in images]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "train.parquet"))


def open_train(folder, image_root=None):
    return find_splits(str(folder), None, None, "en", 0, image_root)["train"]()


def greys(examples):
    assert not examples.faults
    return [[page.convert("L").getpixel((20, 15)) for page in examples[i].images] for i in range(len(examples))]


@pytest.mark.parametrize("write", [csv, official, jsonl])
@pytest.mark.parametrize("kind", ["pdf", "tif"])
def test_a_page_of_a_file_is_named_by_its_number(tmp_path, write, kind):
    draw_pages(tmp_path / f"a.{kind}")
    names = [f"a.{kind}#page=1", f"a.{kind}#page=3", f"./a.{kind}#page=3", f"{tmp_path}/a.{kind}#page=2"]
    write(tmp_path, *names)
    examples = open_train(tmp_path)
    assert greys(examples) == [[0], [200], [200], [100]]
    ids = examples.page_ids
    assert ids[1] == ids[2] and len({*ids}) == 3
    assert examples[1].images[0] is examples[2].images[0]  # decoded once


def test_pages_of_a_pdf_are_those_of_a_question(tmp_path):
    draw_pages(tmp_path / "a.pdf")
    csv(tmp_path, ["a.pdf#page=2", "a.pdf#page=1"])
    assert greys(open_train(tmp_path)) == [[100, 0]]


def test_pages_of_a_pdf_are_held_out_one_by_one(tmp_path, tiny):
    draw_pages(tmp_path / "a.pdf")
    csv(tmp_path, *(f"a.pdf#page={number}" for number in (1, 1, 2, 2, 3, 3)))
    module = DocVQADataModule(str(tmp_path), tiny, held_out=0.34, num_workers=0)
    module.setup("fit")
    train, val = ([page for pages in greys(module.examples[split]) for page in pages] for split in ("train", "val"))
    assert len(train) == 4 and len(val) == 2 and not {*train} & {*val}


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("a.pdf", r"a.pdf has 3 pages: name one of them, as in a.pdf#page=1"),
        ("a.tif", r"a.tif is a TIFF of 3 pages: name one of them, as in a.tif#page=1"),
        ("a.pdf#page=4", r"a.pdf has 3 pages"),
        ("a.tif#page=4", r"a.tif has 3 pages"),
        ("p.png#page=2", r"p.png has 1 pages"),
        ("a.pdf#page=0", r"the page in 'a.pdf#page=0' isn't a number from 1"),
        ("a.pdf#page=x", r"the page in 'a.pdf#page=x' isn't a number from 1"),
        ("b.pdf#page=1", r"the image file.* is missing in"),
    ],
)
@pytest.mark.parametrize("write", [csv, official])
def test_a_page_that_is_not_there_is_named(tmp_path, write, image, message):
    draw(tmp_path / "p.png", 0)
    for name in ("a.pdf", "a.tif"):
        draw_pages(tmp_path / name)
    write(tmp_path, image)
    with pytest.raises(InputError, match=rf"row 0.*{message}"):
        open_train(tmp_path)[0]


@pytest.mark.parametrize("write", [csv, official, jsonl])
def test_backslashes_divide_folders(tmp_path, write):
    draw(tmp_path / "scans" / "p.png", 9)
    draw(tmp_path / "a\\b.png", 8)
    draw(tmp_path / "a" / "b.png", 7)
    write(tmp_path, "scans\\p.png", ".\\scans\\p.png", "scans/p.png", "a\\b.png", "a/b.png")
    examples = open_train(tmp_path)
    assert greys(examples) == [[9], [9], [9], [8], [7]]  # a name that exists is that file's
    assert len({*examples.page_ids[:3]}) == 1


def test_backslashes_in_a_subfolder(tmp_path):
    draw(tmp_path / "data" / "scans" / "p.png", 9)
    csv(tmp_path, "scans\\p.png", name="data/train.csv")
    assert greys(open_train(tmp_path)) == [[9]]


@pytest.mark.parametrize("write", [csv, official, jsonl])
@pytest.mark.parametrize("image", ["..\\p.png", "../p.png", "..\\p.png#page=1"])
def test_no_path_leaves_the_folder(tmp_path, write, image):
    draw(tmp_path / "p.png", 9)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", image)
    with pytest.raises(InputError, match=r"outside the data's folder.*: see data.image_root"):
        open_train(tmp_path / "data")[0]


@pytest.mark.parametrize("write", [csv, official, jsonl])
def test_images_may_lie_in_a_folder_of_their_own(tmp_path, write):
    draw(tmp_path / "images" / "scans" / "p.png", 9)
    draw(tmp_path / "data" / "scans" / "p.png", 7)
    draw(tmp_path / "q.png", 5)
    images = tmp_path / "images"
    write(tmp_path / "data", "scans/p.png", f"{images}/scans/p.png", str(tmp_path / "q.png"), "../q.png")
    examples = open_train(tmp_path / "data", str(images))
    assert [examples[i].images[0].getpixel((0, 0)) for i in range(2)] == [9, 9]
    assert examples.page_ids[0] == examples.page_ids[1]
    assert list(examples.faults) == [2, 3] and "outside the data's folder" in examples.faults[2]


def test_a_folder_of_images_in_the_options(run, tiny, tmp_path, capfd):
    draw(tmp_path / "images" / "p.png", 9)
    (tmp_path / "data").mkdir()
    for name in ("train.csv", "val.csv"):
        csv(tmp_path / "data", str(tmp_path / "images" / "p.png"), name=name)
    flags = ["check", "--model.pretrained", tiny, "--data.source", "data", "--data.num_workers", 0]
    flags += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_steps", 1]
    with pytest.raises(SystemExit):
        run(*flags)
    assert "outside the data's folder: see data.image_root" in capfd.readouterr().out
    run(*flags, "--data.image_root", "images")
    with pytest.raises(SystemExit):
        run(*flags, "--data.image_root", "nowhere")
    assert "data.image_root nowhere: no such folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ("caf\u00e9.png", "cafe\u0301.png"),  # composed and decomposed, as macOS writes it
        ("cafe\u0301.png", "caf\u00e9.png"),
        ("Page.PNG", "page.png"),
        ("my%20page.png", "my page.png"),
        ("my page.png", "my%20page.png"),
        ("Scans/P.png", "scans/p.png"),
    ],
)
@pytest.mark.parametrize("write", [csv, official, parquet])
def test_a_file_in_other_letters_is_named(tmp_path, write, image, file):
    draw(tmp_path / file, 0)
    write(tmp_path, image)
    with pytest.raises(InputError, match=rf"row 0.*missing in .*{re.escape(ascii(file))} is there, in other letters"):
        open_train(tmp_path)[0]

"""`check` tells what a fit would meet, without a model's weights."""

import json
import math
import re
import time
from itertools import islice, pairwise
from pathlib import Path

import datasets
import pytest
from hub_files import FAMILY, FILES
from PIL import Image

from idefics_lit.cli.check import TOKEN_BINS
from idefics_lit.cli.gpu_estimates import is_measured_model
from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.example import Example
from idefics_lit.model.memory import activations_gib, count_weights
from idefics_lit.model.tiny import tiny_config, tiny_model, tiny_processor
from idefics_lit.pretrained import load_config, load_processor
from idefics_lit.training.module import Idefics2Module

ROOT = Path(__file__).parents[2]
CPU = (
    *("--trainer.accelerator", "cpu"),
    *("--trainer.precision", "32-true"),
    *("--trainer.max_steps", "6"),
    *("--trainer.logger", "false"),
)


@pytest.fixture
def check(run, tiny, capfd, monkeypatch):
    """Check data as a user would; returns the exit code and what is printed, runs of spaces made two."""
    monkeypatch.setenv("COLUMNS", "300")

    def check(source, *args, pretrained=tiny, workers=0):
        code = 0
        capfd.readouterr()
        try:
            run(
                "check",
                "--model.pretrained",
                pretrained,
                "--data.source",
                source,
                "--data.num_workers",
                workers,
                *CPU,
                *args,
            )
        except SystemExit as stop:
            code = stop.code
        printed = capfd.readouterr()
        return code, [re.sub(" {2,}", "  ", line.strip()) for line in (printed.out + printed.err).splitlines()]

    return check


def rows_of(docvqa, split):
    return json.loads((docvqa / f"{split}.json").read_text())["data"]


def spread(values):
    values, last = sorted(values), len(values) - 1
    middle, high = math.ceil(len(values) / 2) - 1, math.ceil(0.95 * len(values)) - 1
    return " / ".join(str(values[place]) for place in (0, middle, high, last))


@pytest.fixture
def folder(tmp_path):
    """Write an official folder: rows of training and of validation questions, on pages p and q, and a broken one."""

    def write(train, val):
        folder = tmp_path / "data"
        folder.mkdir()
        for number, name in enumerate(("p", "q", "same_as_p")):
            Image.new("L", (40, 30), 255 if name != "q" else number).save(folder / f"{name}.png")
        (folder / "broken.png").write_bytes((folder / "p.png").read_bytes()[:60])
        for split, rows in (("train", train), ("val", val)):
            full = [
                {"questionId": i, "question": "What?", "image": "p.png", "answers": ["a"], **row}
                for i, row in enumerate(rows)
            ]
            (folder / f"{split}.json").write_text(json.dumps({"data": full}))
        return folder

    return write


@pytest.mark.parametrize("workers", [0, 2])
def test_clean_data(check, docvqa, tmp_path, workers):
    code, lines = check(docvqa, "--data.questions_per_page", 4, "--data.batch_size", 8, workers=workers)
    assert code == 0
    assert not (tmp_path / "check.txt").exists()
    assert "questions  24  5" in lines
    assert "broken rows  0  0" in lines
    # The tiny model's tokens are bytes, but for <s>, a page's 66 and two <end_of_utterance>.
    around = 1 + len("User: Answer briefly.") + 66 + len("\nAssistant:") + 2
    lengths, answers, beyond = {}, {}, {}
    for split in ("train", "val"):
        rows = rows_of(docvqa, split)
        sizes = [{len(f" {answer}".encode()) for answer in row["answers"]} for row in rows]
        answers[split] = [len(f" {a}".encode()) for row in rows for a in dict.fromkeys(row["answers"])]
        lengths[split] = [around + len(r["question"].encode()) + max(s) for r, s in zip(rows, sizes, strict=True)]
        beyond[split] = sum(min(some) > 32 for some in sizes)
    assert f"tokens in all  {spread(lengths['train'])}  {spread(lengths['val'])}" in lines
    assert f"tokens of an answer  {spread(answers['train'])}  {spread(answers['val'])}" in lines
    assert f"beyond max_new_tokens 32  {beyond['train']}  {beyond['val']}" in lines
    counted = [
        [sum(low < n <= high for n in answers[split]) for split in answers] for low, high in pairwise(TOKEN_BINS)
    ]
    assert f"9 to 16  {counted[3][0]}  {counted[3][1]}" in lines
    areas = sorted(
        (Image.open(docvqa / image).size for image in {row["image"] for row in rows_of(docvqa, "train")}), key=math.prod
    )
    assert any(line.startswith("largest page, pixels  {} x {}  ".format(*areas[-1])) for line in lines)
    pages = {row["image"] for row in rows_of(docvqa, "train")}
    assert f"pages  {len(pages)}  {len({row['image'] for row in rows_of(docvqa, 'val')})}" in lines
    assert "steps  6, of 3 an epoch: 2.00 epochs" in lines
    assert "questions  48 seen on 1 device" in lines


def test_pages_that_are_missing_are_one_kind(check, tmp_path):
    """With three examples, however many there are, and beside other kinds."""
    Image.new("L", (40, 30)).save(tmp_path / "p.png")
    images = [*(f"scan {n}/it's {n}.png" for n in range(40)), *(f"../{n}.png" for n in range(9)), "p.png"]
    text = "question,image,answer\n" + "".join(f"a?,{image},b\n" for image in images)
    (tmp_path / "train.csv").write_text(text + ",p.png,b\n")
    (tmp_path / "val.csv").write_text(text)
    code, lines = check(tmp_path)
    assert code == 1
    kinds = lines[lines.index("broken rows  training  validation") + 1 :]
    assert kinds[:3] == [
        *("the image file … is missing in …  40  40", "the image path … lies outside the data's folder  9  9"),
        "no question in column 'question'  1  0",
    ]
    assert [line.partition(": ")[2][:14] for line in kinds[3:10]] == ["the image file"] * 3 + ["the image path"] * 3 + [
        "no question in"
    ]
    assert kinds[10].startswith("all 99 lines: ")


def test_memory_does_not_grow_with_the_questions_about_a_page(check, tmp_path, monkeypatch):
    """A batch holds each page once, and not all questions about it."""
    batches, tokenize = [], Idefics2Collator.tokenize
    monkeypatch.setattr(Idefics2Collator, "tokenize", lambda self, rows: batches.append(rows) or tokenize(self, rows))
    for page in range(6):
        Image.new("L", (40, 30), page).save(tmp_path / f"{page}.png")
    row = {"question": "What?", "answers": ["a"], "image": [f"{page}.png" for page in range(6)]}
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(f"{json.dumps(row)}\n" * 300)
    assert check(tmp_path, "--data.batch_size", 1, "--data.image_size", 56)[0] == 0
    assert [len({id(image) for row in rows for image in row.images}) for rows in batches[:2]] == [6, 6]
    assert max(map(len, batches)) == 256


@pytest.mark.parametrize("broken", ["train", "val"])
@pytest.mark.parametrize("fault", [{"answers": []}, {"image": "broken.png"}])
def test_a_fit_that_can_not_start(check, folder, broken, fault):
    source = folder(**{split: [fault if split == broken else {}] * 4 for split in ("train", "val")})
    code, lines = check(source, "--data.on_bad_example", "skip")
    assert code == 1
    name = {"train": "training", "val": "validation"}[broken]
    assert lines[-1] == f"no {name} question is left: fix the broken rows"


def test_the_recipe_is_checked_without_gpu_and_writes_no_run(run, folder, tiny, tmp_path, capfd):
    source = folder([{}], [{"image": "q.png"}])
    flags = ["--model.pretrained", tiny, "--data.source", source, "--data.num_workers", 0]
    loggers = ["--trainer.logger+=WandbLogger", "--trainer.logger+=CSVLogger", "--trainer.logger.save_dir", "logs"]
    for devices in (4, "[0,1,2,3]", "0,1,2,3"):
        gpus = ["--trainer.accelerator", "gpu", "--trainer.devices", devices]
        run("check", "--config", ROOT / "configs" / "docvqa.yaml", *flags, *gpus)
        assert "seen on 4 devices" in capfd.readouterr().out
    for more in ([], loggers):
        run("check", "--config", ROOT / "configs" / "docvqa.yaml", *flags, *more)
        assert "seen on 1 device\n" in re.sub(" +", " ", capfd.readouterr().out).replace(" \n", "\n")
    run("check", "--config", ROOT / "configs" / "docvqa.yaml", "--config", ROOT / "configs" / "fsdp.yaml", *flags)
    assert not list(tmp_path.rglob("*wandb*"))


def test_the_time_of_the_data_is_that_of_a_fit(check, docvqa, tmp_path):
    """A page with many questions is read again for every few of them."""
    Image.new("L", (1700, 2200), 255).save(tmp_path / "p.png")
    rows = "".join(f"{n},What is {n}?,p.png,{n}\n" for n in range(400))
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(f"id,question,image,answer\n{rows}")
    steps = 10
    options = {"questions_per_page": 4, "batch_size": 8}
    flags = [str(flag) for name, value in options.items() for flag in (f"--data.{name}", value)]
    _, lines = check(tmp_path, *flags, "--trainer.max_steps", steps)
    (line,) = (line for line in lines if line.startswith("time of the data"))
    rate = float(re.search(r"at ([\d.,]+) questions/s", line)[1].replace(",", ""))
    assert "80 questions a device" in line
    module = DocVQADataModule(str(tmp_path), "tiny", num_workers=0, **options)
    module.setup("fit")
    start = time.perf_counter()
    questions = sum(len(batch.question_ids) for batch in islice(module.train_dataloader(), steps))
    measured = questions / (time.perf_counter() - start)
    assert measured / 2.5 < rate < measured * 2.5


def test_a_page_that_is_replaced_is_read_again(check, folder):
    source = folder([{}], [{"image": "q.png"}])
    assert check(source)[0] == 0
    (source / "p.png").write_bytes((source / "p.png").read_bytes()[:40])
    code, lines = check(source)
    assert code == 1 and "broken rows  1  0" in lines


def test_every_kind_of_broken_row(check, folder, tmp_path):
    long = "a" * 2100
    train = [
        *({}, {"answers": []}, {"answers": ["a", "<image>"]}, {"question": "<image>?"}),
        *({"image": "broken.png"}, {"image": "broken.png"}, {"question": long}, {"answers": ["a", long]}, {}),
    ]
    # What only training would meet: validation's texts are made of the first answer.
    val = [{}, {"answers": ["a", "<image>"]}, {"answers": ["a", long]}, {"answers": None}]
    source = folder(train, val)
    code, lines = check(source)
    assert code == 1
    assert lines[-1] == "broken rows: 8; fix them, or leave them out with --data.on_bad_example skip"
    assert "questions  9  4" in lines
    assert "broken rows  7  1" in lines
    assert "no answer  1  1" in lines
    assert "holds one of the model's special tokens  2  0" in lines
    assert "the image can't be read  2  0" in lines
    assert "tokens are more than 2048  2  0" in lines
    written = (tmp_path / "check.txt").read_text().splitlines()
    assert [int(re.search(r"row (\d+)", line)[1]) for line in written] == [1, 2, 3, 4, 5, 6, 7, 3]
    assert sorted(line for line in lines if line in written) == sorted(written)  # up to three of each kind
    assert f"all 8 lines: {tmp_path / 'check.txt'}" in lines or "all 8 lines: check.txt" in lines
    assert check(source, "--data.on_bad_example", "skip")[0] == 0
    assert check(source, "--data.max_length", "9999")[1][-1].startswith("broken rows: 6; ")


def test_rows_of_a_data_set(check, tmp_path):
    Image.new("L", (40, 30), 255).save(tmp_path / "p.png")
    row = {"id": 1, "query": "What?", "answers": ["a"], "question_types": ["form"]}
    row["image"] = {"bytes": (tmp_path / "p.png").read_bytes(), "path": None}
    rows = [row, {**row, "query": None}, {**row, "image": {"bytes": b"cut", "path": None}}]
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": made, "validation": made.select([0])}).save_to_disk(tmp_path / "data")
    code, lines = check("data", workers=2)
    assert code == 1
    assert "no question in column 'query'  1  0" in lines
    assert "the row can't be read  1  0" in lines
    assert "form  1  1" in lines


def test_what_belongs_to_no_one_row(check, folder):
    train = [{"questionId": 7}, {"questionId": 7, "image": "q.png"}, {"questionId": 8}]
    val = [{"image": "same_as_p.png"}, {"answers": ["1234567890", "twelve bytes"]}]
    code, lines = check(folder(train, val), "--model.max_new_tokens", 10)
    assert code == 0  # a fit doesn't stop at it
    assert "ids that occur twice  1  0" in lines
    assert "training ids that occur twice: 7" in lines
    assert any(line.startswith("validation pages that are trained on too, by their pixels: 1, ") for line in lines)
    assert any("row 0 (questionId 0, image same_as_p.png)" in line for line in lines)
    assert "beyond max_new_tokens 10  0  1" in lines  # with the space before it an answer of ten bytes has eleven
    assert any(line.endswith("no accepted answer fits in model.max_new_tokens 10: 1") for line in lines)


def test_texts_are_shown_as_they_are_trained_on(check, tmp_path):
    """Five of each split, spread over it, among them what a CSV's reader may change."""
    Image.new("L", (40, 30)).save(tmp_path / "p.png")
    answers = [f'"[""{n}.0"", ""N/A""]"' for n in range(14)]
    rows = "".join(f"{n:03},[red] {n:02}?,p.png,{answer}\n" for n, answer in enumerate(answers))
    (tmp_path / "train.csv").write_text(f"id,question,image,answers\n{rows}")
    (tmp_path / "val.csv").write_text("question,image,answer\n<b>?,p.png,é\n")
    code, lines = check(tmp_path)
    assert code == 0
    start, end = (lines.index(f"{name} questions, as the model gets them") for name in ("training", "validation"))
    prompt = r"'User: Answer briefly.<image>[red] {:02}?<end_of_utterance>\nAssistant:'"
    shown = [
        [f"{tmp_path}/train.csv, row {n} (line {n + 2})", f"id  '{n:03}'", f"prompt  {prompt.format(n)}"]
        for n in (0, 2, 5, 8, 11)
    ]
    expected = [[*some, f"answers  '{int(some[1][-4:-1])}.0', 'N/A'"] for some in shown]
    assert lines[start + 1 : end - 1] == [line for some in expected for line in some]
    assert lines[end + 2] == "id  0" and "<b>?" in lines[end + 3] and lines[end + 4] == "answers  'é'"


def test_limits_and_held_out_pages(check, docvqa):
    (code, lines) = check(docvqa, "--data.limit_train", 10, "--data.limit_val", 3, "--data.val_in_fit", 1)
    assert code == 0
    assert "questions  10  3" in lines


def test_a_stream_is_checked_where_it_is_scored(check, tmp_path):
    Image.new("L", (40, 30), 255).save(tmp_path / "p.png")
    row = {"query": "What?", "answers": ["a"], "image": {"bytes": (tmp_path / "p.png").read_bytes(), "path": None}}
    made = datasets.Dataset.from_list([row] * 6).cast_column("image", datasets.Image())
    (tmp_path / "data").mkdir()
    made.to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    code, lines = check("data", "--data.streaming", "true", "--data.limit_val", 4)
    assert code == 0
    assert "questions  4" in lines
    assert "training  a stream, not read: 6 steps" in lines


def test_nothing_is_loaded_but_config_and_processor(check, docvqa, tmp_path, monkeypatch):
    """And the weights, of which there are none, are counted once."""
    calls = []
    for name in ("cli.fit_estimates", "training.options_in_effect"):
        monkeypatch.setattr(
            f"idefics_lit.{name}.count_weights", lambda *args: calls.append(args) or count_weights(*args)
        )
    tiny_config().save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    code, lines = check(docvqa, "--model.quantization", "none", pretrained=tmp_path / "base")
    assert code == 0 and len(calls) == 1
    weights = sum(p.numel() for p in tiny_model().parameters()) * 4 / 2**30
    (counted,) = (float(line.split()[1]) for line in lines if line.startswith("weights  "))
    assert weights < counted < weights + 0.02
    (tmp_path / "base" / "config.json").unlink()
    assert any(
        line.startswith("GPU  no estimate: model.pretrained") for line in check(docvqa, pretrained=tmp_path / "base")[1]
    )


def test_images_and_tokens_of_pages_that_are_cut_into_tiles(check, folder, stand_in):
    """Three pages of 40 x 30 pixels, two of which are equal, and a tall one."""
    source = folder([{}, {"image": "q.png"}, {"image": "tall.png"}], [{"image": "same_as_p.png"}])
    Image.new("L", (30, 120), 7).save(source / "tall.png")
    code, lines = check(source, pretrained=stand_in)
    assert code == 0
    collate = Idefics2Collator(load_processor(stand_in), train=True)
    spans = {
        sum(count): stop - start
        for size in ((40, 30), (30, 120))
        for batch in [collate([Example(1, "What?", [Image.new("L", size)], ["a"])])]
        for count, ((start, stop),) in zip(batch.page_images, batch.page_spans, strict=True)
    }
    assert [*spans] == [13, 5]
    start = next(i for i, line in enumerate(lines) if line.startswith("pages of so many images"))
    assert lines[start + 1 : start + 3] == [f"5, {spans[5]} tokens  1  0", f"13, {spans[13]} tokens  2  1"]
    (memory,) = (line for line in lines if line.startswith("GPU memory  "))
    assert re.match(r"GPU memory  about 1\.\d GiB at the largest batch: .* peaks of Idefics2-8b measured", memory)
    assert any(line.startswith("time of the GPU  no estimate") for line in lines)


@pytest.mark.parametrize("name", FAMILY)
def test_no_other_model_is_taken_for_idefics2(name):
    assert not is_measured_model(load_config(str(FILES / name)))  # Idefics3-8B has Idefics2-8b's sizes


def test_memory_of_the_full_size(hub_files):
    config = load_config(str(hub_files))
    assert is_measured_model(config)
    options = dict(Idefics2Module(str(hub_files)).hparams)
    weights = {
        (quantize_vision, dequantize): count_weights(config, {**options, "quantize_vision": quantize_vision}).gib(
            in_4_bits=not dequantize, precision="16-mixed"
        )
        for quantize_vision, dequantize in ((True, False), (False, False), (True, True))
    }
    # benchmarks/results/full_size.json: 4.607 GiB are allocated between steps; docs/memory.md: 0.6 and 11 GiB more.
    assert weights[True, False] == pytest.approx(4.607, abs=0.1)
    assert weights[False, False] - weights[True, False] == pytest.approx(0.6, abs=0.05)
    assert weights[True, True] - weights[True, False] == pytest.approx(11, abs=0.3)
    measured = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())["peak_gib"]
    for held, peaks in measured.items():
        for name, gib in peaks.items():
            pages = int(name.split(",")[-2 if "a page" in name else -1].split()[-1]) // (4 if "a page" in name else 1)
            images = 5 if "splitting" in name else 1
            tokens = (368 if images == 5 else 112) if "a page" not in name else (480 if images == 5 else 208)
            held_gib = activations_gib(config, 3785 * images * pages, tokens * pages, "checkpointing" in held)
            assert weights[True, False] + held_gib == pytest.approx(gib, abs=0.55), (held, name)


def test_the_smallest_image_size_is_fitted_and_a_smaller_one_refused(check, run, short_fit, docvqa, capfd):
    """A page must have a patch."""
    assert check(docvqa, "--data.image_size", 14)[0] == 0
    code, lines = check(docvqa, "--data.image_size", 13)
    assert code == 2 and any("data.image_size 13: choose from 14 to 448" in line for line in lines)
    with pytest.raises(SystemExit, match="2"):
        run(*short_fit("--data.image_size", 13))
    assert "data.image_size 13: choose from 14 to 448" in capfd.readouterr().err
    run(*short_fit("--data.image_size", 14, "--trainer.max_steps", 2))

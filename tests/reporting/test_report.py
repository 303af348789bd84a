"""``report.html`` in an offline browser, the answers in W&B and TensorBoard, and the curves in checkpoints."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from idefics_lit.cli.main import main
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.example import Example, Examples
from idefics_lit.evaluation.answer import Answer
from idefics_lit.reporting.history import MAX_POINTS, History
from idefics_lit.reporting.page_gallery import add_images, group_by_page
from idefics_lit.reporting.report_page import MAX_BYTES, render_report, score_section

DOCS = Path(__file__).parents[2] / "docs"
MAX_STEPS, VAL_CHECK_INTERVAL = 4, 2


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The folder of a fit of the package's small model, logged to TensorBoard."""
    folder = tmp_path_factory.mktemp("fit")
    flags = ["--model.pretrained", "tiny", "--model.quantization", "none", "--model.lr", "1e-3"]
    flags += ["--model.warmup_steps", 2, "--data.source", "synthetic:form,id_card,table", "--data.limit_train", 64]
    flags += ["--data.limit_val", 24, "--data.eval_batch_size", 24, "--data.batch_size", 4, "--data.num_workers", 0]
    flags += ["--data.questions_per_page", 4, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    flags += ["--trainer.max_steps", MAX_STEPS, "--trainer.log_every_n_steps", 1]
    flags += ["--trainer.val_check_interval", VAL_CHECK_INTERVAL]
    flags += ["--trainer.num_sanity_val_steps", -1, "--trainer.logger", "TensorBoardLogger"]
    main([str(flag) for flag in ["fit", *flags, "--trainer.logger.save_dir", folder]])
    return folder / "lightning_logs" / "version_0"


@pytest.fixture
def opened(browser):
    """Open a report in an offline browser; fail if it requests anything or logs an error."""
    contexts, errors = [], []

    def opened(path, width=1280, height=1520, scheme="light"):
        size = {"width": width, "height": height}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme, offline=True))
        page = contexts[-1].new_page()
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda r: errors.append(r.url) if r.url.partition(":")[0] not in ("file", "data") else None)
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors


def curve(page, chart, style):
    """Return the (step, value) points of a curve, computed from its coordinates."""
    return page.evaluate(
        """([chart, style]) => {
            const svg = document.querySelector(`svg[aria-label="${chart}"]`);
            const [x, y] = ["x", "y"].map(axis => svg.dataset[axis].split(" ").map(Number));
            const value = ([low, high, start, stop], x) => low + (x - start) / (stop - start) * (high - low);
            return [...svg.querySelector(`polyline.${style}`).points].map(p => [value(x, p.x), value(y, p.y)]);
        }""",
        [chart, style],
    )


def logged(folder, name):
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def visible(page):
    """Return types, score and text of each visible question, by page."""
    return page.evaluate(
        """() => [...document.querySelectorAll("article")].filter(card => card.checkVisibility()).map(card =>
            [...card.querySelectorAll("li")].filter(item => item.checkVisibility()).map(item => ({
                types: [...item.querySelectorAll(".type")].map(type => type.textContent),
                score: Number(item.dataset.score), text: item.textContent})))"""
    )


def test_curves_show_the_logged_values(fitted, opened):
    page = opened(fitted / "report.html")
    losses = [value for _, value in logged(fitted, "train/loss")]
    drawn = curve(page, "Loss", "faint")
    assert [x for x, _ in drawn] == pytest.approx(range(1, MAX_STEPS + 1), abs=0.01)
    assert [y for _, y in drawn] == pytest.approx(losses, rel=0.01, abs=0.01)
    rates = [value for _, value in logged(fitted, "lr")]
    assert [y for _, y in curve(page, "Learning rate", "c1")] == pytest.approx(rates, abs=1e-6)
    scores = [value for _, value in logged(fitted, "val/anls")]
    drawn = curve(page, "ANLS", "c0")
    assert [x for x, _ in drawn] == pytest.approx(
        [0, VAL_CHECK_INTERVAL, MAX_STEPS], abs=0.01
    )  # the first before training
    assert [y for _, y in drawn[1:]] == pytest.approx(scores, abs=0.001)
    types = page.locator('svg[aria-label="ANLS"] polyline').count() - 1
    assert types == page.locator(".table:not(.half) tbody tr").count() - 1 >= 3


def test_the_values_under_the_pointer_are_those_of_their_own_step(fitted, opened):
    page = opened(fitted / "report.html")
    chart = page.locator('svg[aria-label="Loss"]')
    figure, box = page.locator("figure", has=chart), chart.bounding_box()
    left, right = 46 / 400, 392 / 400  # of the plot
    losses, validations = dict(logged(fitted, "train/loss")), dict(logged(fitted, "val/loss"))
    for step in (VAL_CHECK_INTERVAL + 1, MAX_STEPS):
        x = box["x"] + box["width"] * (left + (right - left) * step / MAX_STEPS)
        page.mouse.move(x, box["y"] + box["height"] / 2)
        assert figure.locator("small").text_content() == f"step {step}"
        assert figure.locator(".legend .c1 b").text_content() == f"{losses[step - 1]:.4g}"
        validated, *own_step = figure.locator(".legend .c2 b").text_content().split(" (step ")
        validation_step = MAX_STEPS if step == MAX_STEPS else VAL_CHECK_INTERVAL
        assert own_step == ([] if step == MAX_STEPS else [f"{validation_step})"])
        assert validated == f"{validations[validation_step - 1]:.4g}"


def test_hyperparameters_and_the_answers_before_training_are_shown(fitted, opened):
    page = opened(fitted / "report.html")
    page.get_by_text("Hyperparameters").click()
    shown = dict(
        page.locator("details dl div").evaluate_all("all => all.map(div => [...div.children].map(e => e.innerText))")
    )
    expected = {"model.lr": "0.001", "model.lora.r": "8", "data.limit_train": "64", "trainer.max_steps": str(MAX_STEPS)}
    assert shown.items() >= expected.items() and "data.limit_test" not in shown
    before = page.locator("li dt", has_text="before").count()
    assert before == page.locator("li").count() > 0
    scores = page.locator("li dd small").all_text_contents()
    (row,) = page.locator(".table:not(.half) tbody tr", has_text="all").all()
    assert sum(map(float, scores)) / before == pytest.approx(float(row.locator("td").nth(1).text_content()), abs=0.005)


def test_the_histogram_counts_the_questions(fitted, opened):
    page = opened(fitted / "report.html")
    records = [json.loads(line) for line in (fitted / "val_predictions.jsonl").open()]
    tooltips = page.locator('svg[aria-label="Questions by score"] rect.c1 title').all_text_contents()
    counts = {text.split()[-1]: int(text.split()[0]) for text in tooltips}
    assert sum(counts.values()) == len(records)
    assert counts["1"] == sum(record["score"] == 1 for record in records)


def test_the_gallery_is_sorted_by_score_and_filtered(fitted, opened):
    page = opened(fitted / "report.html")
    records = [json.loads(line) for line in (fitted / "val_predictions.jsonl").open()]
    cards = visible(page)
    assert sum(map(len, cards)) == len(records)
    card_scores = [[question["score"] for question in card] for card in cards]
    assert all(scores == sorted(scores) for scores in card_scores)
    assert [scores[0] for scores in card_scores] == sorted(scores[0] for scores in card_scores)
    assert {record["score"] for record in records} > {1.0}  # otherwise nothing is sorted

    # Each card has its page, at full size.
    sizes = page.locator("article img").evaluate_all("all => all.map(img => [img.naturalWidth, img.naturalHeight])")
    assert sizes == [[448, 336]] * len(cards)

    for question_type in sorted({name for record in records for name in record["question_types"]}):
        page.get_by_label("Question type").select_option(question_type)
        shown = [question for card in visible(page) for question in card]
        assert all(question_type in question["types"] for question in shown)
        assert len(shown) == sum(question_type in record["question_types"] for record in records)
        assert page.locator("output").text_content() == f"{len(shown)} of {len(records)}"
        first = [card[0]["score"] for card in visible(page)]
        assert first == sorted(first)
    page.get_by_label("Question type").select_option("")
    page.get_by_label("Score", exact=True).select_option("bad")
    assert sum(map(len, visible(page))) == sum(record["score"] == 0 for record in records)
    page.get_by_label("Score", exact=True).select_option("")
    kinds = page.get_by_label("Kind of answer")
    counts = {}
    for kind in kinds.locator("option").all_text_contents()[1:]:
        kinds.select_option(kind)
        shown = [question for card in visible(page) for question in card]
        assert all(kind in question["text"] for question in shown)
        counts[kind] = len(shown)
    assert counts["right"] == sum(record["score"] == 1 for record in records)
    assert sum(counts.values()) == len(records)
    table = page.locator(".kinds tbody tr")
    rows = [row.split("\t")[:2] for row in table.all_inner_texts()]
    assert {name: int(count) for name, count in rows} == counts
    kinds.select_option("")
    page.get_by_label("Search").fill(records[0]["question"].upper())
    assert all(records[0]["question"] in question["text"] for card in visible(page) for question in card)


def test_the_confidence_of_each_answer_and_its_curves_are_shown(fitted, opened):
    page = opened(fitted / "report.html")
    records = [json.loads(line) for line in (fitted / "val_predictions.jsonl").open()]
    texts = sorted(question["text"] for card in visible(page) for question in card)
    for record in records:
        assert any(record["question"] in text and f"confidence {record['confidence']:.0%}" in text for text in texts)
    *_, (coverage, risk) = curve(page, "Risk", "c1")
    anls = sum(record["score"] for record in records) / len(records)
    assert (coverage, risk) == (pytest.approx(1, abs=0.01), pytest.approx(1 - anls, abs=0.01))
    assert re.search(
        r"Answer \d+% of the questions at [\d.]+% ANLS: threshold 0\.\d+", page.locator("body").inner_text()
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(fitted, opened, scheme):
    page = opened(fitted / "report.html", 390, 800, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator("article button").first.click()
    assert page.locator("button.large").bounding_box() == {"x": 0, "y": 0, "width": 390, "height": 800}
    page.keyboard.press("Escape")
    assert page.locator("button.large").count() == 0


def test_the_screenshot_in_the_readme_has_the_layout_of_the_page(fitted, opened, tmp_path):
    """``REPORT=lightning_logs/version_0/report.html pytest tests/reporting -k screenshot`` replaces it."""
    report = Path(os.environ.get("REPORT", fitted / "report.html")).resolve()
    path = DOCS / "report.png" if "REPORT" in os.environ else tmp_path / "report.png"
    page = opened(report)
    assert page.locator("article img").first.evaluate("img => img.decode().then(() => img.naturalWidth)")
    page.screenshot(path=path)
    with Image.open(DOCS / "report.png") as shown, Image.open(path) as taken:
        assert shown.size == taken.size
        # Tiles and upper half of the charts, below the title, whose texts differ: which pixels are background.
        masks = [
            np.all(np.asarray(image.convert("RGB"))[100:450] == (246, 247, 249), axis=2) for image in (shown, taken)
        ]
        assert np.mean(masks[0] == masks[1]) > 0.99 and 0.2 < masks[0].mean() < 0.6
    assert (DOCS / "report.png").stat().st_size < 500_000


def test_tensorboard_has_curves_and_images(fitted):
    events = EventAccumulator(str(fitted)).Reload()
    assert {"train/loss", "lr", "val/loss", "val/anls"} <= set(events.Tags()["scalars"])
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("val/worst/")]
    assert len(tags) == (fitted / "report.html").read_text().count("<article>")
    (image,) = events.Images(tags[0])
    with Image.open(io.BytesIO(image.encoded_image_string)) as page_and_text:
        assert page_and_text.width == 448 and page_and_text.height > 336
    assert image.step == MAX_STEPS


def test_a_missing_tensorboard_is_an_error(run, short_fit, monkeypatch, capsys):
    monkeypatch.setattr("idefics_lit.cli.loggers.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(*short_fit("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "."))
    assert capsys.readouterr().err.endswith("with tensorboard: pip install tensorboard\n")


def test_questions_and_answers_are_escaped(run, tiny, docvqa, tmp_path, opened):
    data = tmp_path / "data"
    data.mkdir()
    (data / "documents").symlink_to(docvqa / "documents")
    questions = json.loads((docvqa / "val.json").read_text())
    evil = "<script>window.broken = 1</script>"
    for question in questions["data"]:
        question["question"] = f"{evil} {question['questionId']}"
        question["answers"] = ['"><img src=x onerror="window.broken = 1">', "</dd></li><b>bold</b>"]
        question["question_types"] = [f"</option>{evil}"]
    (data / "val.json").write_text(json.dumps(questions))
    flags = ["--model.pretrained", tiny, "--data.source", data, "--data.image_size", 112, "--model.max_new_tokens", 2]
    folder = run("validate", *flags, "--data.num_workers", 0, "--trainer.accelerator", "cpu")
    page = opened(folder / "lightning_logs/version_0/report.html")
    assert page.evaluate("window.broken") is None
    shown = [question for card in visible(page) for question in card]
    assert len(shown) == len(questions["data"])
    for question in shown:
        assert evil in question["text"] and "</dd></li><b>bold</b>" in question["text"]
        assert question["types"] == [f"</option>{evil}"]
    assert page.locator("main b").all_text_contents() == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.limit_val_batches", "0"],
        ["--trainer.logger", "false"],
    ],
)
def test_every_fit_writes_a_report(run, short_fit, opened, flags, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    folder = run(*short_fit(*flags, "--trainer.max_steps", 2, "--trainer.val_check_interval", 1))
    (path,) = folder.rglob("report.html")
    assert str(path.relative_to(folder)) in capsys.readouterr().out
    page = opened(path)
    assert [x for x, _ in curve(page, "Learning rate", "c1")] == pytest.approx([1, 2], abs=0.01)
    assert bool(visible(page)) == ("--trainer.limit_val_batches" not in flags)


@pytest.mark.parametrize("logger", [["false"], ["CSVLogger", "--trainer.logger.version", "3"]], ids=["none", "csv"])
def test_fast_dev_run_writes_nothing_into_the_current_folder(run, short_fit, logger, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "report.html").write_text("another run's")
    (tmp_path / "val_predictions.jsonl").write_text("another run's")
    run(*short_fit("--trainer.fast_dev_run", "true", "--trainer.logger", *logger))
    (path,) = re.findall(r"report +(\S+report.html)", capsys.readouterr().out)
    assert "<article>" in Path(path).read_text()
    assert {path.name for path in tmp_path.rglob("*")} == {"report.html", "val_predictions.jsonl"}
    assert (tmp_path / "report.html").read_text() == "another run's"


def test_a_failed_report_does_not_end_the_fit(run, short_fit, monkeypatch):
    def broken(*args):
        raise OSError("no page\nat all")

    monkeypatch.setattr("idefics_lit.reporting.report.add_images", broken)
    with pytest.warns(UserWarning, match=r"No pages in the report: no page$"):
        folder = run(*short_fit("--trainer.max_steps", 2))
    assert "<article>" not in next(folder.rglob("report.html")).read_text()
    monkeypatch.setattr("idefics_lit.reporting.report.render_report", broken)
    with pytest.warns(UserWarning, match=r"No report: no page$"):
        run(*short_fit("--trainer.max_steps", 2))
    assert len(list(folder.rglob("val_predictions.jsonl"))) == 2


def test_the_curves_of_a_resumed_fit_are_complete(run, short_fit, opened):
    callback = "--trainer.callbacks"
    checkpoints = [
        f"{callback}+=ModelCheckpoint",
        f"{callback}.save_top_k",
        "-1",
        f"{callback}.every_n_train_steps",
        "2",
    ]
    folder = run(*short_fit(*checkpoints, "--trainer.max_steps", 4))
    run(*short_fit(*checkpoints, "--trainer.max_steps", 4), "--ckpt_path", next(folder.rglob("*step=2.ckpt")))
    first, second = (
        torch.load(next(folder.glob(f"lightning_logs/version_{i}/checkpoints/*step=4.ckpt")), weights_only=True)
        for i in range(2)
    )
    curves = first["callbacks"]["Report"]
    assert second["callbacks"]["Report"] == curves
    assert [step for step, *_ in curves["steps"]] == [1, 2, 3, 4] and curves["validations"]
    page = opened(folder / "lightning_logs/version_1/report.html")
    assert [x for x, _ in curve(page, "Learning rate", "c1")] == pytest.approx([1, 2, 3, 4], abs=0.01)
    # The report of an evaluation has the curves of the checkpoint.
    checkpoint = next(folder.glob("lightning_logs/version_1/checkpoints/*step=4.ckpt"))
    run("validate", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu")
    page = opened(folder / "lightning_logs/version_2/report.html")
    assert len(curve(page, "Learning rate", "c1")) == 4 and visible(page)


def test_the_curves_of_a_long_fit_stay_small():
    history = History()
    for step in range(1, 100_001):
        history.add_step(step, torch.tensor(1 / step), 1e-4)
    state = history.state_dict()
    torch.save(state, file := io.BytesIO())
    assert file.tell() < 60_000
    assert MAX_POINTS / 2 <= len(history.steps) <= MAX_POINTS and history.last_step == 100_000
    assert sum(mean.num_steps for mean in history.steps) == 100_000
    mean_loss = sum(mean.loss * mean.num_steps for mean in history.steps) / 100_000
    assert mean_loss == pytest.approx(np.mean(1 / np.arange(1, 100_001)), rel=1e-5)
    resumed = History()
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert resumed.state_dict() == state


class Noise(Examples):
    """Documents of one and of eleven pages of noise, which JPEG can't compress; every fifth can't be opened."""

    def __init__(self, pages):
        self.page_ids = list(range(pages))
        noise = np.random.default_rng(0).integers(0, 256, (1200, 900, 3), np.uint8)
        self.page = Image.fromarray(noise)

    def __getitem__(self, index):
        if index % 5 == 4:
            raise OSError(f"page {index} is <broken>")
        return Example(index, "", [self.page] * (1 + 10 * (index % 2)))


@pytest.mark.parametrize("pages", [3, 30])
def test_the_page_has_at_most_5_mb(pages, opened, tmp_path):
    text = "<long> " * 10_000
    answers = [
        Answer(i, f"{i} {text}", text, [text] * 20, i / 2000, [f"{i} {text}"], -1.0, 4, index=i % pages)
        for i in range(2000)
    ]
    cards = group_by_page(answers, examples := Noise(pages))
    content = render_report({"title": "noise"}, cards, add_images(cards, examples), 1.0)
    assert len(content) <= MAX_BYTES
    (tmp_path / "report.html").write_bytes(content)
    page = opened(tmp_path / "report.html")
    shown = visible(page)
    num_questions = sum(map(len, shown))
    assert 3 <= len(shown) <= pages
    assert page.get_by_text(f"{num_questions} of 2000 questions, on {len(shown)} of {pages} pages.").is_visible()
    assert [card[0]["score"] for card in shown] == [i / 2000 for i in range(len(shown))]
    assert page.get_by_text("is <broken>").count() == len(shown) // 5
    for i, card in enumerate(page.locator("article").all()):
        assert card.locator("img").count() == (0 if i % 5 == 4 else 8 if i % 2 else 1)
        assert card.get_by_text("and 3 more pages").count() == (i % 2 and i % 5 != 4)


@pytest.mark.parametrize("streaming", [False, True])
def test_questions_have_their_pages_when_rows_are_skipped(tmp_path, tiny, streaming):
    shades = [10, 60, 110, 160, 210]
    rows = [
        {
            "question": str(shade) if shade != 110 else "",  # is skipped
            "images": [{"bytes": png(shade), "path": None}, {"bytes": png(shade + 20), "path": None}],
            "answers": ["a"],
        }
        for shade in shades
    ]
    for split in ("train", "validation"):
        features = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
        (tmp_path / "set").mkdir(exist_ok=True)
        features.to_parquet(str(tmp_path / "set" / f"{split}-00000-of-00001.parquet"))
    options = {"on_bad_example": "skip", "streaming": streaming, "limit_val": 5}
    data = DocVQADataModule(str(tmp_path / "set"), tiny, **options)
    data.setup("validate")
    examples = data.examples["val"]
    answers = [Answer(i, examples[i].question, "", ["a"], 0.5, [], -1.0, 4, index=i) for i in range(len(examples))]
    cards = add_images(group_by_page(answers, examples), examples)
    assert [card.answers[0].question for card in cards] == ["10", "60", "160", "210"]
    for card in cards:
        shade = int(card.answers[0].question)
        assert [np.asarray(image).mean() for image in card.images] == pytest.approx([shade, shade + 20], abs=2)


def png(shade):
    Image.new("L", (40, 30), shade).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_wandb_gets_a_table_and_the_adapter_offline(run, short_fit, monkeypatch, capfd, end_wandb):
    for name in ("WANDB_DATA_DIR", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = [
        "--trainer.logger",
        "WandbLogger",
        "--trainer.logger.save_dir",
        "logs",
        "--trainer.logger.log_model",
        "true",
    ]
    folder = run(*short_fit(*logger, "--trainer.max_steps", 3))
    end_wandb()
    assert "anonymous" not in capfd.readouterr().err
    (offline,) = folder.glob("logs/wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", offline]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    artifacts = {}
    for record in map(json.loads, lines):
        if record["type"] == "artifact":
            contents = record["artifact"]["manifest"]["contents"]
            artifacts[record["artifact"]["type"]] = {
                content["path"]: Path(content["local_path"]) for content in contents
            }
    table = json.loads(artifacts["run_table"]["val/answers.table.json"].read_text())
    (path,) = folder.rglob("val_predictions.jsonl")
    records = [json.loads(line) for line in path.open()]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert {row["question"] for row in rows} == {record["question"] for record in records}
    for row in rows:
        record = next(record for record in records if record["question"] == row["question"])
        assert (row["prediction"], row["score"]) == (record["prediction"], record["score"])
        assert row["references"] == " | ".join(record["references"])
        with Image.open(artifacts["run_table"][row["page"]["path"]]) as page:
            assert min(page.size) > 200
        assert artifacts["run_table"][row["page"]["path"]].is_relative_to(folder / "logs" / "wandb")
    checkpoint = torch.load(artifacts["model"]["model.ckpt"], weights_only=True)
    assert all("lora" in name for name in checkpoint["state_dict"])


def test_a_question_type_may_be_called_all():
    answers = {
        i: Answer(i, "Who?", "", ["a"], score, [name], -1.0, 4, index=i)
        for i, (name, score) in enumerate((("all", 1.0), ("form", 0.0)))
    }
    history = History()
    history.add_validation(1, 0.5, answers)
    (validation,) = history.validations
    assert (validation.anls, validation.types) == (0.5, {"all": 1.0, "form": 0.0})
    rows = score_section(answers, {})["rows"]
    assert rows == [("all", 2, "", "0.500"), ("all", 1, "", "1.000"), ("form", 1, "", "0.000")]

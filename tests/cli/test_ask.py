"""The command `ask`: questions about pages of images and PDFs, answered on the screen."""

import json
import re

import pytest
import torch
from PIL import Image

from idefics_lit.cli.ask import PageQuestions
from idefics_lit.data.documents import read_page
from idefics_lit.data.sources.splits import find_splits
from idefics_lit.data.sources.synthetic import SyntheticPages
from idefics_lit.evaluation.confidence import fit_temperature

READER = ("--model.pretrained", "tiny", "--model.quantization", "none", "--trainer.accelerator", "cpu")


@pytest.fixture
def pages():
    """Two drawn pages, each with its questions, whose answers the reader knows."""
    drawn = SyntheticPages("ask", 2)
    by_page = {page: [drawn[i] for i, of in enumerate(drawn.page_ids) if of == page] for page in drawn.page_ids}
    return [(asked[0].images[0].copy(), {q.question: q.answers for q in asked}) for asked in by_page.values()]


@pytest.fixture
def ask(run, capfd):
    """Run `ask --json`; returns the lines, which must be all there is on the screen."""

    def ask(*args):
        capfd.readouterr()
        run("ask", *READER, "--json", *args)
        out, err = capfd.readouterr()
        assert err == ""
        return [json.loads(line) for line in out.splitlines()]

    return ask


@pytest.fixture
def fails(run, capfd):
    """Run `ask`, which ends in exit code 2 and one line; returns the line."""

    def fails(*args):
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            run("ask", *READER, *args)
        assert caught.value.code == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return fails


def test_it_reads_pages_of_images_and_pdfs(ask, pages, tmp_path):
    first, second = (image for image, _ in pages)
    first.save(tmp_path / "first.png")
    first.save(tmp_path / "both.pdf", save_all=True, append_images=[second])
    questions = [next(iter(answers)) for _, answers in pages]
    flags = [arg for question in questions for arg in ("--question", question)]
    lines = ask("--image", "first.png", "both.pdf", *flags)
    asked = [(line["image"], line["page"], line["question"]) for line in lines]
    shown = (("first.png", 1), ("both.pdf", 1), ("both.pdf", 2))
    assert asked == [(*page, question) for page in shown for question in questions]
    assert lines[0]["answer"] in pages[0][1][questions[0]]
    assert lines[2]["answer"] in pages[0][1][questions[0]]
    assert lines[5]["answer"] in pages[1][1][questions[1]]
    assert not list(tmp_path.glob("lightning_logs"))


def test_flags_are_repeated_or_take_several(ask, pages, tmp_path):
    """And a question may look like YAML."""
    image, answers = pages[0]
    for name in ("a.png", "b.tif"):
        image.save(tmp_path / name)
    question, further = list(answers)[1], "Total: [how, {much}]?"
    lines = ask("--image", "a.png", "--image", "b.tif", "--question", question, further)
    assert [line["image"] for line in lines] == ["a.png", "a.png", "b.tif", "b.tif"]
    assert [line["question"] for line in lines] == [question, further] * 2
    assert all(line["answer"] in answers[question] for line in lines[::2])


def test_every_page_is_answered_under_its_name_whatever_a_config_says_for_runs(ask, pages, tmp_path):
    (first, answers), (second, others) = pages
    first.save(tmp_path / "first.png")
    second.save(tmp_path / "second.png")
    questions = [next(iter(some)) for some in (answers, others)]
    more = ("--trainer.devices", 2, "--trainer.strategy", "ddp_fork", "--trainer.limit_predict_batches", 1)
    lines = ask("--image", "first.png", "second.png", "--question", *questions, *more)
    asked = [(line["image"], line["question"]) for line in lines]
    assert asked == [(page, question) for page in ("first.png", "second.png") for question in questions]
    assert lines[0]["answer"] in answers[questions[0]] and lines[3]["answer"] in others[questions[1]]


def test_one_file_and_one_question_need_no_list(pages, tmp_path):
    pages[0][0].save(tmp_path / "first.png")
    asked = PageQuestions(str(tmp_path / "first.png"), "What is the date?")
    assert [asked[i].question for i in range(len(asked))] == ["What is the date?"]


def test_a_file_that_has_been_replaced_is_read_anew(pages, tmp_path):
    (first, _), (second, _) = pages
    for page in (first, second):
        page.save(tmp_path / "page.png")
        (image,) = PageQuestions([str(tmp_path / "page.png")], ["What is the date?"])[0].images
        assert image.tobytes() == page.tobytes()


def test_a_tiff_has_pages_and_a_photograph_is_held_upright(ask, pages, tmp_path):
    first, second = (image for image, _ in pages)
    first.save(tmp_path / "fax.tif", save_all=True, append_images=[second])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to see it
    second.rotate(90, expand=True).save(tmp_path / "photo.png", exif=exif)
    question, answers = next(iter(pages[1][1].items()))
    lines = ask("--image", "fax.tif", "photo.png", "--question", question)
    assert [(line["image"], line["page"]) for line in lines] == [("fax.tif", 1), ("fax.tif", 2), ("photo.png", 1)]
    assert lines[1]["answer"] in answers and lines[2]["answer"] in answers


def test_what_is_filled_into_a_pdfs_form_is_seen(tmp_path, form):
    assert read_page(str(form), 0).convert("L").getextrema()[0] < 128


@pytest.fixture
def form(tmp_path):
    """A PDF of one blank page, with a text field that a black square fills."""
    look = b"0 0 0 rg 0 0 40 40 re f"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[4 0 R]>>>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Annots[4 0 R]>>",
        b"<</Type/Annot/Subtype/Widget/FT/Tx/T(a)/V(x)/F 4/P 3 0 R/Rect[10 10 50 50]/AP<</N 5 0 R>>>>",
        b"<</Type/XObject/Subtype/Form/BBox[0 0 40 40]/Length %d>>stream\n%s\nendstream" % (len(look), look),
    ]
    content, places = b"%PDF-1.4\n", []
    for number, obj in enumerate(objects, start=1):
        places.append(len(content))
        content += b"%d 0 obj%s endobj\n" % (number, obj)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(content)
    (tmp_path / "form.pdf").write_bytes(content + b"xref\n0 6\n0000000000 65535 f \n" + table + trailer)
    return tmp_path / "form.pdf"


def test_the_table(run, capfd, pages, tmp_path):
    image, answers = pages[0]
    image.save(tmp_path / "both.pdf", save_all=True, append_images=[image])
    question, expected = next(iter(answers.items()))
    run("ask", *READER, "--image", "both.pdf", "--question", question)
    out, err = capfd.readouterr()
    first, answer, second, again = (line.rstrip() for line in out.splitlines())
    assert (first, second, err) == ("both.pdf, page 1", "both.pdf, page 2", "")
    assert answer == again and re.sub(r"  \d+%$", "", answer) in {f"  {question}  {text}" for text in expected}


def test_the_confidence_is_that_of_predict_and_below_the_minimum_the_answer_is_not_sure(run, ask, capfd, tmp_path):
    test = find_splits("synthetic:form", None, None, "en", 0)["test"]()
    test[0].images[0].save(tmp_path / "page.png")
    run("predict", *READER, "--data.source", "synthetic:form", "--data.limit_test", 8, "--data.num_workers", 0)
    predicted = [json.loads(line) for line in next(tmp_path.rglob("predictions.jsonl")).read_text().splitlines()]
    predicted = [record for i, record in enumerate(predicted) if test.page_ids[i] == test.page_ids[0]]
    flags = ["--image", "page.png", "--question", *(record["question"] for record in predicted)]
    lines = ask(*flags)
    assert [line["confidence"] for line in lines] == [round(record["confidence"], 4) for record in predicted]
    assert all(0 < line["confidence"] < 1 and line["temperature"] == 1 for line in lines)
    lowest, highest = (pick(line["confidence"] for line in lines) for pick in (min, max))
    minimum = ("--min_confidence", (lowest + highest) / 2)
    kept = [None if line["confidence"] < minimum[1] else line["answer"] for line in lines]
    assert [line["answer"] for line in ask(*flags, *minimum)] == kept and {type(text) for text in kept} == {
        str,
        type(None),
    }
    capfd.readouterr()
    run("ask", *READER, *flags, *minimum)
    shown = capfd.readouterr().out.splitlines()[1:]
    assert ["not sure" in line for line in shown] == [text is None for text in kept]


def test_the_temperature_of_the_training_is_used_and_named(run, tmp_path, capfd):
    data = ("--data.source", "synthetic:receipt", "--data.limit_train", "4", "--data.limit_val", "24")
    fit = ("--trainer.max_steps", "1", "--data.batch_size", "2", "--data.num_workers", "0")
    fit += ("--data.val_every_n_steps", "1", "--trainer.num_sanity_val_steps", "0")
    run("fit", *READER, *data, *fit, "--trainer.enable_progress_bar", "false")
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    temperature = torch.load(checkpoint, weights_only=True)["temperature"]
    records = [json.loads(line) for line in next(tmp_path.rglob("val_predictions.jsonl")).read_text().splitlines()]
    right = [record["score"] == 1 for record in records]
    assert (
        temperature == fit_temperature([record["log_probability"] for record in records], right) not in (0.01, 1, 100)
    )
    find_splits("synthetic:form", None, None, "en", 0)["test"]()[0].images[0].save(tmp_path / "page.png")
    run("export", "--ckpt_path", checkpoint, "--output", "out", "--trainer.accelerator", "cpu")
    question = ("--image", "page.png", "--question", "What is the date?", "--trainer.accelerator", "cpu")
    sources = [("--ckpt_path", checkpoint), (*READER[:4], "--model.adapter", tmp_path / "out"), READER[:4]]
    capfd.readouterr()
    for source in sources:
        run("ask", *source, *question, "--json")
    tuned, exported, base = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert tuned["temperature"] == exported["temperature"] == round(temperature, 4)
    assert tuned["confidence"] == exported["confidence"] and base["temperature"] == 1
    run("ask", "--ckpt_path", checkpoint, *question)
    assert f"at the temperature {temperature:.2f} of the training" in capfd.readouterr().out


def test_a_checkpoints_options_are_kept(run, ask, pages, tmp_path, capfd):
    """Its adapter answers as it does in predict."""
    options = ("--data.source", "synthetic:form", "--data.limit_train", "8", "--data.limit_test", "4")
    options += ("--data.prompt_style", "idefics", "--data.num_workers", "0", "--data.image_size", "400")
    fit = ("--trainer.max_steps", "4", "--model.lr", "0.01", "--model.warmup_steps", "0", "--data.batch_size", "2")
    run("fit", *READER, *options, *fit, "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false")
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    run("predict", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
    predictions = [json.loads(line) for line in next(tmp_path.rglob("predictions.jsonl")).read_text().splitlines()]
    test = find_splits("synthetic:form", None, None, "en", 0)["test"]()
    test[0].images[0].save(tmp_path / "page.png")
    of_page = [record for i, record in enumerate(predictions) if test.page_ids[i] == test.page_ids[0]]
    flags = [arg for record in of_page for arg in ("--question", record["question"])]
    capfd.readouterr()
    run("ask", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu", "--json", "--image", "page.png", *flags)
    out, err = capfd.readouterr()
    assert err == ""
    answers = [json.loads(line)["answer"] for line in out.splitlines()]
    assert answers == [record["prediction"] for record in of_page]
    without = ask("--image", "page.png", *flags)
    assert answers != [line["answer"] for line in without]


def encrypted(content):
    """The PDF, with a password in its trailer that isn't the empty one."""
    lock = b"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>/ID[<00><00>]" % (b"11" * 32, b"22" * 32)
    assert b"trailer\n<<" in content
    return content.replace(b"trailer\n<<", b"trailer\n<<" + lock)


def test_errors(fails, pages, tmp_path):
    image = pages[0][0]
    image.save(tmp_path / "page.png")
    image.save(tmp_path / "page.pdf")
    (tmp_path / "locked.pdf").write_bytes(encrypted((tmp_path / "page.pdf").read_bytes()))
    (tmp_path / "cut.pdf").write_bytes((tmp_path / "page.pdf").read_bytes()[:200])
    (tmp_path / "cut.png").write_bytes((tmp_path / "page.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    for args, message in (
        (["--question", "What?"], "image is missing: give --image FILE"),
        (["--image", "page.png"], "question is missing: give --question"),
        (["--image", "page.png", "--question", " "], "question: one is empty"),
        (
            ["--image", "page.png", "--question", "?", "--min_confidence", 7],
            "min_confidence 7.0: give a number from 0 to 1",
        ),
        (["--image", "nope.png", "--question", "What?"], "image nope.png: no such file"),
        (["--image", ".", "--question", "What?"], "image .: it can't be read: .*directory"),
        (["--image", "page.png", "text.png", "--question", "What?"], "image text.png: neither an image nor a PDF"),
        (["--image", "locked.pdf", "--question", "What?"], "image locked.pdf: .*save a copy without the password"),
        (["--image", "cut.pdf", "--question", "What?"], "image cut.pdf: the PDF can't be opened .* it may be damaged"),
        (["--image", "cut.png", "--question", "What?"], "image cut.png: page 1 can't be read: "),
        (["--image", "page.png", "--question", "What is <image>?"], "question 'What is <image>\\?' about page.png: "),
    ):
        assert re.search(message, line := fails(*args)), line

"""The command `demo`: a page in the browser that answers what `ask` does, base and tuned."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest

from idefics_lit.cli import demo
from idefics_lit.cli.main import main
from idefics_lit.data.sources.synthetic import SyntheticPages

CPU = ("--trainer.accelerator", "cpu")
READER = ("--model.pretrained", "tiny", "--model.quantization", "none", *CPU)
PROMPT = ("--data.prompt_style", "idefics", "--data.image_size", "400")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With two drawn pages and an adapter that hardly learned to read them."""
    folder = tmp_path_factory.mktemp("demo")
    drawn = SyntheticPages("demo", 2, ["form"])
    first, second = (drawn[drawn.page_ids.index(page)].images[0] for page in sorted(set(drawn.page_ids)))
    first.save(folder / "first.png")
    first.save(folder / "both.pdf", save_all=True, append_images=[second])
    fit = ("--data.source", "synthetic:form", "--data.limit_train", "8", "--data.num_workers", "0", *PROMPT)
    fit += ("--model.lr", "0.01", "--model.warmup_steps", "0", "--trainer.max_steps", "4", "--trainer.logger", "false")
    fit += ("--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false")
    main(["fit", *READER, *fit, "--trainer.default_root_dir", str(folder)])
    next(folder.rglob("*.ckpt")).rename(folder / "tuned.ckpt")
    return folder


@pytest.fixture(scope="module")
def process(folder):
    """The command as it is typed, while someone else has the first port."""
    (folder / "empty").mkdir()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # it is taken indeed
            other.bind(("127.0.0.1", demo.PORTS[0]))
        other.listen()
        process = subprocess.Popen(
            [sys.executable, "-m", "idefics_lit", "demo", "--ckpt_path", "../tuned.ckpt", *CPU],
            cwd=folder / "empty",
            env={**os.environ, "TMPDIR": str(folder / "empty"), "http_proxy": "http://127.0.0.1:9"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background jobs, and so their children, ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        process.starting, process.address_line = process.stdout.readline(), process.stdout.readline()
    yield process
    process.kill()


@pytest.fixture
def page(process, browser):
    """The page, opened; all that the browser asks for must be the demo's own."""
    address = process.address_line.split()[0]
    page = browser.new_page()
    asked_for = []
    page.on("request", lambda request: asked_for.append(request.url))
    page.goto(address)
    yield page
    page.close()
    assert asked_for and all(url.startswith((address, "blob:", "data:")) for url in asked_for), asked_for


@pytest.fixture
def ask(folder, run, capfd):
    """What `ask` says of a page, base and tuned."""

    def ask(file, number, question):
        answers = []
        for model in ((*READER, *PROMPT), ("--ckpt_path", folder / "tuned.ckpt", *CPU)):
            capfd.readouterr()
            run("ask", *model, "--json", "--image", folder / file, "--question", question)
            lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
            answers.append(f"{lines[number - 1]['answer']} ({lines[number - 1]['confidence']:.0%})")
        return answers

    return ask


def row(page, question):
    """Ask, and return the new row of the table."""
    box = page.get_by_role("textbox", name="Question")
    box.fill(question)
    box.press("Enter")
    page.wait_for_function("element => element.value === ''", arg=box.element_handle())
    return page.locator(".answers tr").nth(1).locator("td").all_inner_texts()


def upload(page, file):
    page.locator("input[type=file]").set_input_files(file)
    page.locator("img:visible").wait_for()


def test_base_and_tuned_model_answer_as_ask_does(page, folder, ask):
    upload(page, folder / "first.png")
    question = "What is written at the top of the page?"
    answers = ask("first.png", 1, question)
    assert len(set(answers)) == 2
    assert row(page, question) == [question, *answers]
    assert row(page, further := "How <b>many</b> ${1+1}?") == [further, *ask("first.png", 1, further)]
    assert page.locator(".answers tr").count() == 3
    assert page.locator(".answers th").all_inner_texts() == ["Question", "Base", "Tuned"]


def test_a_pdf_has_pages(page, folder, ask):
    upload(page, folder / "both.pdf")
    first = page.locator("img:visible").get_attribute("src")
    page.get_by_role("spinbutton").fill("2")
    page.get_by_role("spinbutton").press("Enter")
    page.wait_for_function("first => document.querySelector('img').src !== first", arg=first)
    question = "What is written at the top of the page?"
    assert row(page, question) == [f"page 2: {question}", *ask("both.pdf", 2, question)]


def test_mistakes_are_named_beside_the_question_and_the_next_page_is_answered(page, folder):
    box = page.get_by_role("textbox", name="Question")
    page.get_by_role("button", name="Ask").click()
    message = page.get_by_text("drop a page first")
    message.wait_for()
    assert message.bounding_box()["y"] > box.bounding_box()["y"] + box.bounding_box()["height"]
    box.click()  # fails if something covers it
    (folder / "text.png").write_text("no image")
    page.locator("input[type=file]").set_input_files(folder / "text.png")
    page.get_by_text("image text.png: neither an image nor a PDF").wait_for()
    upload(page, folder / "first.png")
    box.press("Enter")
    page.get_by_text("question: one is empty, ask something").wait_for()
    box.fill("What is <image>?")
    box.press("Enter")
    page.get_by_text(re.compile("about first.png: .* special tokens")).wait_for()
    assert len(row(page, "What is the date?")) == 3


def test_only_this_machine_reaches_it_and_ctrl_c_ends_it(process, page, folder):
    assert process.starting == "starting the web page …\n"
    port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", process.address_line)[1])
    assert port in demo.PORTS[1:]
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    upload(page, folder / "first.png")
    assert list((folder / "empty").rglob("first.png"))
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "")
    assert process.returncode == 0
    assert not list((folder / "empty").iterdir())


def test_without_a_checkpoint_there_is_one_answer(run, folder, browser, capfd, monkeypatch):
    def drive(seconds):
        page = browser.new_page()
        page.goto(re.search(r"http://\S+", capfd.readouterr().out)[0])
        upload(page, folder / "first.png")
        rows.append(row(page, "What is the date?"))
        page.close()
        raise KeyboardInterrupt

    rows = []
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "no_proxy"):
        monkeypatch.setenv(name, "")  # restored at the end
    monkeypatch.setattr(demo, "time", SimpleNamespace(sleep=drive))
    run("demo", *READER)
    assert len(rows[0]) == 2


def test_the_page_is_there_before_the_model(run, folder, browser, capfd, monkeypatch):
    def load(answerer):
        page = browser.new_page()
        page.goto(re.search(r"http://\S+", capfd.readouterr().out)[0])
        page.get_by_text(demo.LOADING).wait_for()
        upload(page, folder / "first.png")
        box = page.get_by_role("textbox", name="Question")
        box.fill("What is the date?")
        box.press("Enter")
        page.wait_for_timeout(300)
        assert page.locator(".answers tr").count() == 0
        original(answerer)
        page.get_by_text(demo.LOADING).wait_for(state="hidden")
        page.locator(".answers td").first.wait_for()
        page.close()
        raise KeyboardInterrupt

    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "no_proxy"):
        monkeypatch.setenv(name, "")  # and as it was in the end
    original = demo.PageAnswerer.load
    monkeypatch.setattr(demo.PageAnswerer, "load", load)
    run("demo", *READER)


def test_errors(run, capfd, monkeypatch):
    def fails(*args):
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            run("demo", *READER, *args)
        assert caught.value.code == 2
        return capfd.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = f"nothing can listen at 127.0.0.1:{port}: Address already in use: give another --host or --port"
        assert fails("--port", port) == f"error: {taken}\n"
    assert "nothing can listen at 127.0.0.1:70000: " in fails("--port", "70000")
    assert "nothing can listen at no.such.host:7860: " in fails("--host", "no.such.host")
    assert fails("--ckpt_path", "nope.ckpt") == "error: ckpt_path nope.ckpt: no such file\n"
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert fails() == "error: demo needs gradio: pip install 'idefics_lit[demo]'\n"

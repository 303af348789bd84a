"""The command ``demo``: a web page that shows the answers of base and fine-tuned model to questions about a page.

What is special here:

- the page is there before the model is loaded, and says so;
- one model gives both answers, with its adapter enabled or disabled;
- one event at a time uses the model and the PDF library;
- nothing leaves the machine: no usage statistics, no requests for fonts.
"""

import errno
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idefics_lit.cli.ask import PageQuestions, prompt_collator
from idefics_lit.data.documents import count_pages, read_page
from idefics_lit.errors import InputError, first_line
from idefics_lit.evaluation.confidence import confidence
from idefics_lit.training.checkpoint import read_checkpoint
from idefics_lit.training.module import Idefics2Module

if TYPE_CHECKING:
    import gradio

PORTS = range(7860, 7960)
LOADING = "The model is being loaded. A question is answered as soon as it is there."
# Messages are shown at the bottom: at the top, gradio's own place, they cover the question.
CSS = """
:root, .gradio-container { --font: system-ui, sans-serif; --font-mono: ui-monospace, monospace }
.gradio-container .prose code { white-space: pre-wrap; overflow-wrap: anywhere }
.answers table { width: 100%; table-layout: fixed; border-collapse: collapse }
.answers th, .answers td { padding: 8px 12px 8px 0; text-align: left; vertical-align: top; overflow-wrap: break-word }
.answers th { opacity: 0.7; font-weight: 400 }
.answers th:first-child { width: 45% }
.answers td { border-top: 1px solid var(--border-color-primary) }
.answers td + td { font-weight: 600 }
.toast-wrap { top: auto !important; bottom: var(--size-4) }
"""


def demo(module: Idefics2Module, data: Mapping[str, Any], ckpt_path: str | None, host: str, port: int | None) -> None:
    """Serve the web page until Ctrl-C or SIGTERM; load the model meanwhile.

    Args:
        module: the module with the checkpoint's options; its model isn't loaded yet.
        data: the data module's options, on which prompt and pages depend.
        ckpt_path: the checkpoint of the adapter; by default the base model alone answers.
        host: the address to listen on.
        port: the port; by default the first free one of `PORTS`.

    Raises:
        InputError: gradio isn't installed, the address can't be used, or the checkpoint doesn't fit the model.
    """
    if find_spec("gradio") is None:
        raise InputError("demo needs gradio: pip install 'idefics_lit[demo]'")
    port = _free_port(host, port)
    print("starting the web page …", flush=True)
    with suppress(KeyboardInterrupt), _sigterm_as_ctrl_c(), tempfile.TemporaryDirectory(prefix="idefics_lit-") as temp:
        # Uploads are deleted with the temporary folder. gradio requests its own URL at the start, without a proxy.
        os.environ |= {"GRADIO_TEMP_DIR": temp, "GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": "*"}
        tuned = f", tuned in `{ckpt_path}`" if ckpt_path else ""
        title = f"# Ask a page\n`{module.hparams.pretrained}`{tuned}"
        answerer = PageAnswerer(module, data, ckpt_path)
        app = _build_app(answerer, title)
        app.launch(
            server_name=host,
            server_port=port,
            css=CSS,
            footer_links=[],
            share=False,
            ssr_mode=False,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"{app.local_url} (Ctrl-C ends it)", flush=True)
        try:
            answerer.load()
            while True:
                time.sleep(60)
        finally:
            app.close(verbose=False)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class PageAnswerer:
    """Answers questions with the base model and, if there is a checkpoint, with the fine-tuned model.

    Args:
        module: the module; its model isn't loaded yet.
        data: the data module's options.
        ckpt_path: the checkpoint of the adapter; by default the base model alone answers.

    Attributes:
        columns: the names of the models that answer.
        loaded: set when the model is loaded.
    """

    def __init__(self, module: Idefics2Module, data: Mapping[str, Any], ckpt_path: str | None) -> None:
        self.module, self.data, self.ckpt_path = module, data, ckpt_path
        self.columns = ["Base", "Tuned"] if ckpt_path else ["Answer"]
        self.loaded = threading.Event()

    def load(self) -> None:
        """Load the model and the checkpoint."""
        self.module.configure_model()
        if self.ckpt_path:
            checkpoint = read_checkpoint(self.ckpt_path)
            self.module.on_load_checkpoint(checkpoint)
            self.module.load_state_dict(checkpoint["state_dict"])
        self.module.eval()
        self.collator = prompt_collator(self.data, self.module.model.dtype)
        self.loaded.set()

    def __call__(self, file: str, page: int, question: str) -> list[str]:
        """Return each model's answer to a question about page ``page`` of a file, counted from 1.

        Each answer is followed by its confidence. The temperature is the fine-tuned model's alone.
        """
        example = PageQuestions([file], [question])[page - 1]
        self.loaded.wait()
        batch = self.module.transfer_batch_to_device(self.collator([example]), self.module.model.device, 0)
        answers = []
        for column in self.columns:
            is_base = column == "Base"
            with self.module.model.disable_adapter() if is_base else nullcontext():
                decoded = self.module.evaluator.decode(batch)
            sure = confidence(decoded.log_probabilities[0], 1.0 if is_base else self.module.temperature)
            answers.append(f"{decoded.texts[0]} ({sure:.0%})")
            self.module.evaluator.free_memory()  # CUDA graphs are captured either with the adapter or without it
        return answers


def _build_app(answerer: PageAnswerer, title: str) -> "gradio.Blocks":
    import gradio as gr  # imported late: it takes seconds and reads GRADIO_TEMP_DIR

    def model_status() -> Iterator[str]:
        if not answerer.loaded.is_set():
            yield LOADING
            answerer.loaded.wait()
        yield ""

    def warn(error: InputError, file: str) -> None:
        """Show a message with the uploaded file's own name; a raised error would hide the question."""
        gr.Warning(str(error).replace(file, Path(file).name))

    def open_file(file: str | None) -> list[Any]:
        """Show the first page of a new file, or a warning that it can't be read."""
        count, image = 0, None
        if file:
            try:
                count, image = count_pages(file), read_page(file, 0)
            except InputError as error:
                warn(error, file)
                file = None
        number = gr.Slider(maximum=max(count, 2), value=1, visible=count > 1)
        return [file, number, gr.Image(image, visible=image is not None), [], ""]

    def show_page(file: str, number: int) -> Any:  # noqa: ANN401
        try:
            return read_page(file, number - 1)
        except InputError as error:
            warn(error, file)
            return gr.skip()

    def ask(file: str | None, number: int, question: str, rows: list[list[str]]) -> Any:  # noqa: ANN401
        if not file:
            gr.Warning("drop a page first")
            return gr.skip()
        try:
            page = f"page {number}: " if count_pages(file) > 1 else ""
            rows = [[page + question, *answerer(file, number, question)], *rows]
        except InputError as error:
            warn(error, file)
            return gr.skip()
        return [rows, _html_table(["Question", *answerer.columns], rows), ""]

    one_at_a_time: Any = {"concurrency_id": "model", "concurrency_limit": 1}
    with gr.Blocks(title="Ask a page") as app:
        gr.Markdown(title)
        status = gr.Markdown()
        app.load(model_status, outputs=status, show_progress="hidden", concurrency_limit=None)
        with gr.Row():
            with gr.Column():
                file = gr.File(label="Image or PDF", file_types=["image", ".pdf"])
                number = gr.Slider(1, 2, step=1, label="Page", visible=False, buttons=[])
                image = gr.Image(interactive=False, show_label=False, visible=False, buttons=["fullscreen"])
            with gr.Column():
                question = gr.Textbox(label="Question")
                button = gr.Button("Ask", variant="primary")
                table = gr.HTML(elem_classes="answers", apply_default_css=False)
                rows = gr.State([])
        gr.on([file.upload, file.clear], open_file, file, [file, number, image, rows, table], **one_at_a_time)
        number.input(show_page, [file, number], image, trigger_mode="always_last", **one_at_a_time)
        gr.on(
            [question.submit, button.click],
            ask,
            [file, number, question, rows],
            [rows, table, question],
            show_progress_on=table,
            **one_at_a_time,
        )
    return app


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{name}</th>" for name in header)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _free_port(host: str, port: int | None) -> int:
    for candidate in PORTS if port is None else [port]:
        try:
            with socket.create_server((host, candidate)) as server:
                number: int = server.getsockname()[1]
                return number
        except (OSError, OverflowError) as error:
            reason = error
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                break
    why = first_line(getattr(reason, "strerror", reason)).split(" (")[0]
    raise InputError(f"nothing can listen at {host}:{candidate}: {why}: give another --host or --port")

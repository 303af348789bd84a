"""A page in the browser: drop an image or a PDF, ask, see what base and tuned model answer.

What is special here: there is one model, whose adapter is switched off for the base's answers; one event at a time
reaches it and the PDF library; and nothing leaves the machine, no statistics and no requests for fonts.
"""

import errno
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from idefics_lit.cli.ask import Asked, collator
from idefics_lit.data.documents import count_pages, read_page
from idefics_lit.errors import InputError, first_line
from idefics_lit.training.checkpoint import read_checkpoint
from idefics_lit.training.module import Idefics2Module

if TYPE_CHECKING:
    import gradio

PORTS = range(7860, 7960)
CSS = """
:root, .gradio-container { --font: system-ui, sans-serif; --font-mono: ui-monospace, monospace }
.gradio-container .prose code { white-space: pre-wrap; overflow-wrap: anywhere }
.answers table { width: 100%; table-layout: fixed; border-collapse: collapse }
.answers th, .answers td { padding: 8px 12px 8px 0; text-align: left; vertical-align: top; overflow-wrap: break-word }
.answers th { opacity: 0.7; font-weight: 400 }
.answers th:first-child { width: 45% }
.answers td { border-top: 1px solid var(--border-color-primary) }
.answers td + td { font-weight: 600 }
"""


def serve(module: Idefics2Module, data: Mapping[str, Any], ckpt_path: str | None, host: str, port: int | None) -> None:
    """Load the model and answer until Ctrl-C or SIGTERM.

    Args:
        module: of the checkpoint's options; its model isn't loaded yet.
        data: the data module's options; prompt and pages depend on them.
        ckpt_path: the checkpoint of the adapter; the base model alone answers unless given.
        host: the address to listen at.
        port: the port, the first free one of `PORTS` unless given.

    Raises:
        InputError: gradio isn't installed, nothing can listen there, or the checkpoint doesn't fit.
    """
    if find_spec("gradio") is None:
        raise InputError("demo needs gradio: pip install 'idefics_lit[demo]'")
    port = _free_port(host, port)
    with suppress(KeyboardInterrupt), _until_sigterm(), tempfile.TemporaryDirectory(prefix="idefics_lit-") as folder:
        module.configure_model()
        if ckpt_path:
            checkpoint = read_checkpoint(ckpt_path)
            module.on_load_checkpoint(checkpoint)
            module.load_state_dict(checkpoint["state_dict"])
        # What is uploaded goes when it ends; and gradio, which sees whether it can be reached, needs no proxy for that.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": "*"}
        page = _page(Answers(module.eval(), data, tuned=ckpt_path is not None), _title(module, ckpt_path))
        page.launch(
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
        print(f"{page.local_url} (Ctrl-C ends it)", flush=True)
        try:
            while True:
                time.sleep(60)
        finally:
            page.close(verbose=False)


@contextmanager
def _until_sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Answers:
    """What base and tuned model answer.

    Args:
        module: in eval mode.
        data: the data module's options.
        tuned: whether its adapter is a checkpoint's; the base model alone answers if not.
    """

    def __init__(self, module: Idefics2Module, data: Mapping[str, Any], *, tuned: bool) -> None:
        self.module = module
        self.collator = collator(data, module.model.dtype)
        base: Any = module.model.disable_adapter
        self.models = {"Base": base, "Tuned": nullcontext} if tuned else {"Answer": nullcontext}

    def __call__(self, file: str, page: int, question: str) -> list[str]:
        """Return each model's answer to a question about a file's page, which is counted from 1."""
        example = Asked([file], [question])[page - 1]
        batch = self.module.transfer_batch_to_device(self.collator([example]), self.module.model.device, 0)
        answers = []
        for adapter in self.models.values():
            with adapter():
                answers += self.module.generate(batch)
            self.module.evaluator.free_memory()  # CUDA graphs were captured with the adapter, or without
        return answers


def _page(answers: Answers, title: str) -> "gradio.Blocks":
    import gradio as gr  # it makes folders at once, where GRADIO_TEMP_DIR says

    def opened(file: str | None) -> list[Any]:
        """Show a new file's first page, or why there is none."""
        count, image = 0, None
        if file:
            try:
                count, image = count_pages(file), read_page(file, 0)
            except InputError as error:
                gr.Warning(_named(error, file))
                file = None
        number = gr.Slider(maximum=max(count, 2), value=1, visible=count > 1)
        return [file, number, gr.Image(image, visible=image is not None), [], ""]

    def turned(file: str, number: int) -> Image:
        try:
            return read_page(file, number - 1)
        except InputError as error:
            raise gr.Error(_named(error, file), print_exception=False) from error

    def ask(file: str | None, number: int, question: str, rows: list[list[str]]) -> list[Any]:
        if not file:
            raise gr.Error("drop a page first", print_exception=False)
        try:
            where = f"page {number}: " if count_pages(file) > 1 else ""
            rows = [[where + question, *answers(file, number, question)], *rows]
        except InputError as error:
            raise gr.Error(_named(error, file), print_exception=False) from error
        return [rows, _table(["Question", *answers.models], rows), ""]

    one_at_a_time: Any = {"concurrency_id": "one", "concurrency_limit": 1}
    with gr.Blocks(title="Ask a page") as page:
        gr.Markdown(title)
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
        gr.on([file.upload, file.clear], opened, file, [file, number, image, rows, table], **one_at_a_time)
        number.input(turned, [file, number], image, trigger_mode="always_last", **one_at_a_time)
        gr.on(
            [question.submit, button.click],
            ask,
            [file, number, question, rows],
            [rows, table, question],
            **one_at_a_time,
        )
    return page


def _title(module: Idefics2Module, ckpt_path: str | None) -> str:
    tuned = f", tuned in `{ckpt_path}`" if ckpt_path else ""
    return f"# Ask a page\n`{module.hparams.pretrained}`{tuned}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{name}</th>" for name in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _named(error: InputError, file: str) -> str:
    """Call the file what the user calls it."""
    return str(error).replace(file, Path(file).name)


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

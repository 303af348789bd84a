"""`transformers serve` answers with a merged model as `ask` does, through its OpenAI-style API."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from idefics_lit import Idefics2Module, export_adapter
from idefics_lit.data.sources.synthetic import SyntheticPages


@pytest.fixture
def serve(tmp_path):
    """Serve a model folder; returns a function that posts a request and returns the response."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    log = (tmp_path / "log").open("w")
    processes = []

    def serve(folder):
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
        command += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--dtype", "float32"]
        processes.append(subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}))
        end = time.monotonic() + 120
        while not reachable():
            assert processes[0].poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.2)
        return post

    def reachable():
        try:
            return urllib.request.urlopen(f"{url}/health", timeout=2).status == 200
        except OSError:
            return False

    def post(body):
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    yield serve
    for process in processes:
        process.kill()
        process.wait()
    log.close()


@pytest.mark.slow
def test_its_answers_are_those_of_ask(serve, run, capfd, tmp_path):
    export_adapter(Idefics2Module("tiny", quantization="none"), tmp_path / "merged", merge=True)
    drawn = SyntheticPages("serving", 2, families=("form",))
    drawn[0].images[0].save(tmp_path / "page.png")
    questions = [drawn[i].question for i in range(len(drawn)) if drawn[i].page_id == drawn[0].page_id]
    model = ("--model.pretrained", tmp_path / "merged", "--model.quantization", "none")
    same = ("--trainer.accelerator", "cpu", "--json", "--image", tmp_path / "page.png")
    capfd.readouterr()
    run("ask", *model, *same, "--question", *questions)
    expected = [json.loads(line)["answer"] for line in capfd.readouterr().out.splitlines()]
    post = serve(tmp_path / "merged")
    page = "data:image/png;base64," + base64.b64encode((tmp_path / "page.png").read_bytes()).decode()
    answers = []
    for question in questions:
        content = [
            {"type": "text", "text": "Answer briefly."},
            {"type": "image_url", "image_url": {"url": page}},
            {"type": "text", "text": question},
        ]
        body = {"model": str(tmp_path / "merged"), "messages": [{"role": "user", "content": content}]}
        answers.append(post(body)["choices"][0]["message"]["content"].strip())
    assert len(questions) > 3
    assert answers == expected

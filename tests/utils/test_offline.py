"""Without a network: the Hub's files are read from the cache at once, or an error says that they aren't there."""

import os
import shutil
import subprocess
import sys

from PIL import Image

COMMIT = "0" * 40


def ask(folder, pretrained):
    Image.new("RGB", (112, 112), "white").save(folder / "page.png")
    command = [sys.executable, "-m", "idefics_lit", "ask", "--model.pretrained", pretrained, "--image", "page.png"]
    command += ["--question", "What?", "--trainer.accelerator", "cpu", "--model.quantization", "none"]
    # No program listens on port 9.
    variables = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    return subprocess.run(
        [*command, "--model.max_new_tokens", "2"], cwd=folder, env={**os.environ, **variables},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_model_that_is_not_in_the_cache_is_one_line(tmp_path):
    run = ask(tmp_path, "owner/model")
    (line,) = run.stderr.splitlines()
    assert run.returncode == 2 and line.startswith("error: model.pretrained 'owner/model': no processor can be loaded")
    assert line.endswith("check the network")


def test_a_model_in_the_cache_is_used_without_a_word(tmp_path, tiny):
    repository = tmp_path / "hub" / "hub" / "models--owner--model"
    shutil.copytree(tiny, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    run = ask(tmp_path, "owner/model")
    assert run.returncode == 0 and not run.stderr, run.stderr

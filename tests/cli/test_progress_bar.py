"""Lightning's other progress bars take the place of the package's own."""

import pytest
import yaml
from PIL import Image


@pytest.mark.parametrize(
    ("name", "options", "printed"),
    [("TQDMProgressBar", {"refresh_rate": 2}, "train/loss="), ("RichProgressBar", {"leave": True}, "v_num:")],
)
def test_another_progress_bar_is_used(run, short_fit, capfd, name, options, printed):
    flags = [flag for option, value in options.items() for flag in (f"--trainer.callbacks.{option}", str(value))]
    run(*short_fit("--trainer.max_steps", 2, "--trainer.callbacks+", name, *flags))
    assert printed in "".join(capfd.readouterr())


def test_ask_ignores_the_progress_bar_of_a_config(run, tiny, tmp_path, capfd):
    Image.new("RGB", (112, 112), "white").save(tmp_path / "page.png")
    trainer = {"accelerator": "cpu", "callbacks": {"class_path": "TQDMProgressBar"}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"model": {"pretrained": tiny}, "trainer": trainer}))
    run("ask", "--config", "my.yaml", "--json", "--image", "page.png", "--question", "Who?")
    assert '"question": "Who?"' in capfd.readouterr().out


def test_a_prediction_of_one_batch_shows_its_speed(run, tiny, docvqa, capfd):
    options = ["--model.quantization", "none", "--model.max_new_tokens", 2, "--data.image_size", 112]
    options += ["--data.num_workers", 0, "--trainer.accelerator", "cpu", "--trainer.limit_predict_batches", 1]
    run("predict", "--model.pretrained", tiny, "--data.source", docvqa, "--data.eval_batch_size", 2, *options)
    (bar,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("Predicting")]
    assert "it/s" in bar and "0.00it/s" not in bar

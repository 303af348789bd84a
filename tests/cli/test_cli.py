"""The command line: help, configs, what a checkpoint remembers, what is silent."""

import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

from idefics_lit.cli.lightning_cli import DocVQACLI
from idefics_lit.cli.main import main
from idefics_lit.cli.parser import COMMANDS, readable_error
from idefics_lit.cli.progress_bar import ProgressBar

ROOT = Path(__file__).parents[2]
REAL = Path(__file__).parents[1] / "assets" / "docvqa-public-domain"
SMALL = (
    *("--trainer.accelerator", "cpu"),
    *("--trainer.max_steps", "1"),
    *("--trainer.limit_val_batches", "1"),
    *("--trainer.num_sanity_val_steps", "0"),
    *("--data.num_workers", "0"),
)


def shows(capsys, *args):
    """Return what a command prints that ends by itself, as --help does."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    assert not caught.value.code
    return capsys.readouterr().out


def config_of(capsys, *args):
    return yaml.safe_load(shows(capsys, *args, "--print_config"))


@pytest.fixture(scope="module")
def fitted(tiny, tmp_path_factory):
    """A run's folder: one step, rank 2, learning rate 0.002."""
    folder = tmp_path_factory.mktemp("fit")
    model = ("--model.pretrained", tiny, "--model.lora.r", "2", "--model.lr", "0.002", "--model.max_new_tokens", "1")
    data = ("--data.source", str(REAL), "--data.limit_val", "3", "--data.prompt_style", "idefics")
    logs = ("--trainer.logger.init_args.save_dir", str(folder))
    main(["fit", *SMALL, *model, "--model.quantization", "none", *data, *logs])
    return folder / "lightning_logs" / "version_0"


@pytest.fixture
def checkpoint(fitted):
    return next(fitted.rglob("*.ckpt"))


def test_help_tells_what_the_commands_do(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = shows(capsys, "--help")
    assert text.startswith("usage: python -m idefics_lit ")
    assert len(text.splitlines()) < 30
    for name, line in COMMANDS.items():
        assert f"{name} " in text and line in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_short_and_ours_comes_first(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "120")
    text = shows(capsys, command, "--help")
    assert len(text.splitlines()) < 190
    places = [text.index(option) for option in ("--ckpt_path", "--model.lr", "--data.source", "--trainer.max_steps")]
    assert places == sorted(places)
    assert "--trainer.barebones" not in text


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_printed_whole(capsys, command, config):
    printed = config_of(capsys, command, "--config", config)
    assert "barebones" in printed["trainer"]
    for group, values in yaml.safe_load(config.read_text()).items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if name == "strategy":
                assert printed[group][name]["class_path"] == value["class_path"]
            elif name not in ("callbacks", "callbacks+", "logger", "lora"):
                assert printed[group][name] == value


def test_a_checkpoint_is_the_default(in_effect, checkpoint, tiny):
    options = in_effect("validate", "--ckpt_path", checkpoint)
    assert (options.model.pretrained, options.data.pretrained) == (tiny, tiny)
    assert (options.model.lora.r, options.model.lr, options.model.quantization) == (2, 0.002, "none")
    assert (options.data.source, options.data.prompt_style, options.data.limit_val) == (str(REAL), "idefics", 3)


def test_flags_and_configs_win_over_a_checkpoint(in_effect, checkpoint, tmp_path):
    (tmp_path / "my.yaml").write_text("data: {limit_val: 2}\nmodel: {lora: {dropout: 0.5}}")
    flags = ("--config", tmp_path / "my.yaml", "--model.lr", "0.5", "--data.prompt_style", "recipe")
    options = in_effect("fit", "--ckpt_path", checkpoint, *flags)
    assert (options.model.lr, options.data.prompt_style, options.data.limit_val) == (0.5, "recipe", 2)
    assert (options.model.lora.r, options.model.lora.dropout, options.model.lora.alpha) == (2, 0.5, 8)


def test_validate_from_a_checkpoint_alone(run, checkpoint, capfd):
    folder = run("validate", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu")
    printed = capfd.readouterr().out
    assert re.search(r"│ val/anls +│ \d\.\d{4} │", printed) and not re.search(r"\d\.\d{5}", printed), printed
    assert not list(folder.rglob("config.yaml"))


def test_predict_from_a_checkpoint_alone(run, checkpoint):
    folder = run("predict", "--ckpt_path", checkpoint, "--trainer.accelerator", "cpu")
    assert len(next(folder.rglob("predictions.jsonl")).read_text().splitlines()) == 5
    assert not list(folder.rglob("config.yaml"))


def test_the_saved_config_repeats_the_fit(in_effect, fitted, tiny):
    options = in_effect("fit", "--config", fitted / "config.yaml")
    assert (options.model.pretrained, options.model.lr, options.data.source) == (tiny, 0.002, str(REAL))
    assert options.trainer.max_steps == 1


def test_the_progress_bar_can_be_disabled(in_effect, monkeypatch):
    trainers = []
    monkeypatch.setattr(DocVQACLI, "after_instantiate_classes", lambda cli: trainers.append(cli.trainer))
    for enabled in ("true", "false"):
        in_effect("fit", "--data.source", "synthetic", *SMALL, "--trainer.enable_progress_bar", enabled)
    shown, hidden = (trainer.progress_bar_callback for trainer in trainers)
    assert isinstance(shown, ProgressBar) and hidden is None


@pytest.mark.parametrize(("mode", "expected"), [(None, "offline"), ("disabled", "disabled")])
def test_wandb_needs_no_account(in_effect, tmp_path, monkeypatch, mode, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", mode or "")
    if not mode:
        monkeypatch.delenv("WANDB_MODE")
    in_effect("fit", *SMALL, "--data.source", "synthetic", "--trainer.logger", "WandbLogger")
    assert os.environ["WANDB_MODE"] == expected


def test_the_option_that_was_meant_is_named():
    assert readable_error("unrecognized arguments: --data.sorce x", ["data.source"]) == (
        "no option data.sorce, did you mean data.source?"
    )
    assert readable_error("unrecognized arguments: --zzz", ["data.source"]) == "no option zzz"


@pytest.mark.parametrize(("path", "name"), [("idefics_lit/__main__.py", "python -m idefics_lit"), ("idefics-lit",) * 2])
def test_module_and_script_are_one_program(capsys, monkeypatch, path, name):
    script = re.search('^idefics-lit = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    # Collects no garbage among the imported modules, and shows no traceback if Ctrl-C interrupts an import.
    start = EntryPoint("idefics-lit", script, "console_scripts").load()
    assert start.__module__ == "idefics_lit.__main__"
    program = start if path == name else lambda: runpy.run_module("idefics_lit", run_name="__main__")
    monkeypatch.setattr(sys, "argv", [f"/somewhere/{path}", "--help"])
    with pytest.raises(SystemExit):
        program()
    assert capsys.readouterr().out.startswith(f"usage: {name} ")


def test_only_the_command_line_filters_and_its_help_has_no_noise():
    code = """if True:
        import logging, warnings
        import idefics_lit.cli.main
        assert "LeafSpec" not in str(warnings.filters)
        assert not logging.getLogger("bitsandbytes.backends.cpu.ops").filters
        idefics_lit.cli.main.main(["--help"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_command_prints_the_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    out, err = capsys.readouterr()
    assert caught.value.code == 0 and err == ""
    assert all(f"\n    {command} " in out for command in COMMANDS), out

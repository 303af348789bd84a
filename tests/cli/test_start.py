import subprocess
import sys

from idefics_lit.training.module import Idefics2Module


def test_help_and_mistakes_import_no_heavy_packages(tmp_path):
    """They take little longer than `import lightning`, which imports transformers without its models."""
    program = """
import sys
from idefics_lit.cli.main import main

codes = []
for line in (
    "--help", "fit --help", "fit --model.lrr 1", "fit --model.lr high", "fit --config missing.yaml", "fit", "ask",
    "fit --data.source synthetic --trainer.accelerator cpu --model.lr=-1",
):
    try:
        main(line.split())
    except SystemExit as end:
        codes.append(end.code)
heavy = "peft bitsandbytes datasets pandas wandb transformers.modeling_utils transformers.processing_utils".split()
print(codes, [name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.stderr.splitlines()[-1] == "[0, 0, 2, 2, 2, 2, 2, 2] []", run.stderr


def test_loading_a_model_imports_no_inductor(tmp_path):
    """Inductor is imported only where something is compiled."""
    program = """
import sys
from idefics_lit import Idefics2Module

Idefics2Module("tiny").configure_model()
print("bitsandbytes" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "True False", run.stderr


def test_a_missing_source_is_reported_before_anything_is_loaded(run, tmp_path, capsys):
    flags = ["--trainer.accelerator", "cpu", "--model.pretrained", tmp_path / "no_model"]
    for command in ("fit", "validate", "test", "predict"):
        try:
            run(command, *flags, "--data.source", tmp_path / "no_pages")
        except SystemExit as end:
            assert end.code == 2
        assert "no_pages" in capsys.readouterr().err


def test_the_weights_stay_on_their_device_at_the_end(run, short_fit, monkeypatch):
    moved = []
    monkeypatch.setattr(Idefics2Module, "cpu", lambda module: moved.append("fit") or module)
    run(*short_fit("--trainer.max_steps", 1, "--trainer.limit_val_batches", 0))
    assert not moved

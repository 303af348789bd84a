import subprocess
import sys


def test_a_warning_is_one_line_without_a_place_in_the_source(short_fit, tmp_path):
    args = short_fit("--trainer.max_steps", 1, "--trainer.limit_val_batches", 0, "--trainer.logger", "false")
    args[args.index("--model.warmup_steps") + 1] = "99"
    fit = subprocess.run(
        [sys.executable, "-m", "idefics_lit", *args], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert fit.returncode == 0, fit.stderr
    assert [line for line in fit.stderr.splitlines() if line.startswith("warning: model.warmup_steps 99: ")], fit.stderr
    assert "rank_zero_warn" not in fit.stderr and "site-packages" not in fit.stderr

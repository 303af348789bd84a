"""What only a GPU can show; `pytest -m gpu` runs it."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_fit_in_mixed_precision(run, tiny, docvqa, precision):
    options = ["--model.pretrained", tiny, "--data.source", docvqa, "--data.limit_train", 4, "--trainer.max_steps", 2]
    folder = run("fit", *options, "--trainer.precision", precision, "--trainer.gradient_clip_val", 1.0)
    checkpoint = torch.load(next(folder.rglob("*.ckpt")), weights_only=True)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in checkpoint["state_dict"].values())

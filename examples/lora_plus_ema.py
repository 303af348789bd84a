"""Subclass the module: LoRA+ learning rates, with an exponential moving average of the adapter.

python examples/lora_plus_ema.py [PRETRAINED]
"""

import logging
import sys
import warnings
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.optim.lr_scheduler import CosineAnnealingLR

from idefics_lit import DocVQADataModule, Idefics2Module


class LoRAPlusModule(Idefics2Module):
    """Trains the adapter's B matrices with a larger learning rate than A: https://arxiv.org/abs/2402.12354.

    Args:
        ratio: the learning rate of B divided by that of A, which is ``lr``.
        options: those of `Idefics2Module`.
    """

    def __init__(self, *, ratio: float = 16.0, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.save_hyperparameters("ratio")

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW with a group for A and one for B, and a cosine schedule."""
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        options = self.hparams
        groups = [
            {"params": [p for name, p in trained.items() if "lora_B" not in name], "lr": options.lr},
            {"params": [p for name, p in trained.items() if "lora_B" in name], "lr": options.lr * options.ratio},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        schedule = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# Hide Lightning's advertisement and a warning that concerns its own code.
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())
warnings.filterwarnings("ignore", message=".*LeafSpec")

pretrained = sys.argv[1] if len(sys.argv) > 1 else "tiny"  # or HuggingFaceM4/idefics2-8b
seed_everything(0)
module = LoRAPlusModule(pretrained=pretrained, ratio=8.0, lr=1e-4, max_new_tokens=8)
data = DocVQADataModule("synthetic:id_card", pretrained, limit_train=16, limit_val=8, batch_size=2, num_workers=0)
checkpoint = ModelCheckpoint(monitor="val/anls", mode="max")
trainer = Trainer(
    max_epochs=1,
    precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
    callbacks=[EMAWeightAveraging(decay=0.9), checkpoint],  # validation scores the average, checkpoints hold it
    logger=False,
)
trainer.fit(module, data)
(scores,) = trainer.validate(module, data, ckpt_path="best", weights_only=True)
best = LoRAPlusModule.load_from_checkpoint(checkpoint.best_model_path, weights_only=True)
print(f"ANLS {scores['val/anls']:.3f}, during the fit {checkpoint.best_model_score:.3f}, ratio {best.hparams.ratio}")

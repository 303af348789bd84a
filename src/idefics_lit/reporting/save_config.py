"""Save the config of a fit."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from idefics_lit.training.experiment import describe
from idefics_lit.training.run_folder import run_folder
from idefics_lit.utils.files import replacing


class SaveConfig(SaveConfigCallback):
    """Save a fit's config as ``config.yaml`` in the run's folder, and the options that define it in its checkpoints."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; Lightning calls this on rank 0 only."""
        if stage == "fit":
            # Null is not the default of every option, so nulls are written too.
            config = self.parser.dump(self.config, skip_none=False)
            with replacing(run_folder(trainer) / "config.yaml") as file:
                file.write(f"{config}\n".encode())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the options by which ``--ckpt_path last`` recognises the checkpoints of the same experiment."""
        checkpoint["experiment"] = describe(self.config.as_dict())

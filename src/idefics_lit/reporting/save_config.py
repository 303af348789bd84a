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
            self._write(trainer, self.config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the values in effect in place of those that were left open."""
        if not trainer.is_global_zero:
            return
        config, data = self.config.clone(), getattr(trainer, "datamodule", None)
        for name, value in getattr(pl_module, "options", {}).items():
            if config.model[name] is None:
                config.model[name] = value
        if step := getattr(data, "step", None):
            config.data.batch_size = step.batch_size
            config.data.global_batch_size = step.examples_per_device * trainer.world_size
            config.trainer.accumulate_grad_batches = trainer.accumulate_grad_batches
        if data is not None:
            config.data.image_splitting = data.hparams.image_splitting
        if config.data.streaming:  # the order of a stream depends on the number of its workers
            config.data.num_workers = getattr(data, "num_workers", None)
        self._write(trainer, config)

    def _write(self, trainer: Trainer, config: Any) -> None:  # noqa: ANN401
        # Null is not the default of every option, so nulls are written too.
        text = self.parser.dump(config, skip_none=False)
        with replacing(run_folder(trainer) / "config.yaml") as file:
            file.write(f"{text}\n".encode())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the options by which ``--ckpt_path last`` recognises the checkpoints of the same experiment."""
        checkpoint["experiment"] = describe(self.config.as_dict())

"""AdamW and its learning-rate schedule. In a resumed run this run's settings apply, not the checkpoint's."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import transformers
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from idefics_lit.errors import InputError
from idefics_lit.training.lightning_compat import close_train_dataloader


class ResumableLambdaLR(LambdaLR):
    """A LambdaLR that resumes at the checkpoint's step with the optimizer's own learning rates and this schedule."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step; the learning rates are those that this schedule has at that step."""
        super().load_state_dict(state_dict)
        self.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        self._set_rates()

    def replace_lr(self, old: float, new: float) -> None:
        """Replace the learning rate from which the schedule was made; groups with other rates keep their ratio to it.

        Sets the rates of the current step, whatever they have been changed to.
        """
        self.base_lrs = [new if lr == old else lr * new / old for lr in self.base_lrs]
        self._set_rates()

    def _set_rates(self) -> None:
        for group, base_lr, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = base_lr, base_lr * factor(self.last_epoch)


def adamw_with_schedule(
    parameters: Sequence[nn.Parameter],
    trainer: Trainer,
    *,
    lr: float,
    weight_decay: float,
    warmup_steps: int,
    schedule: Literal["linear", "cosine"],
) -> tuple[AdamW, ResumableLambdaLR]:
    """Return AdamW and a schedule with linear warm-up, to be stepped after every optimizer step.

    Args:
        parameters: the trained parameters. Weight decay applies to matrices, not to biases and norms.
        trainer: the Trainer, which knows the number of optimizer steps.
        lr: the learning rate after the warm-up.
        weight_decay: AdamW's weight decay.
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        schedule: how the learning rate falls to 0 at the last step. If there is no last step, it stays constant.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(
        [group for group in groups if group["params"]],
        lr=lr,
        # With a gradient scaler a fused optimizer unscales the gradients itself, which would be after the clipping.
        fused=parameters[0].is_cuda and not (scaler and trainer.gradient_clip_val),
    )
    total_steps: Any = trainer.estimated_stepping_batches
    close_train_dataloader(trainer)
    name: str = schedule
    if total_steps == float("inf"):
        rank_zero_warn(
            f"model.schedule {schedule}: training has no last step at which the learning rate could reach 0, so it "
            f"stays at model.lr after the warm-up: give trainer.max_steps or trainer.max_epochs to let it fall"
        )
        name = "constant_with_warmup"
    elif warmup_steps >= total_steps and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        rank_zero_warn(
            f"model.warmup_steps {warmup_steps}: training takes {total_steps} optimizer steps, so the learning rate "
            f"doesn't reach model.lr: give fewer"
        )
    factors: Any = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    scheduler = ResumableLambdaLR(optimizer, factors.lr_lambdas)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.register_load_state_dict_pre_hook(
        partial(_keep_settings, settings=settings, scheduler=scheduler, trainer=trainer)
    )
    return optimizer, scheduler


def _keep_settings(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    *,
    settings: Sequence[dict[str, Any]],
    scheduler: LambdaLR,
    trainer: Trainer,
) -> dict[str, Any] | None:
    """Replace the settings of a checkpoint's parameter groups with the optimizer's own before they are loaded.

    Groups that a subclass has added or changed keep the checkpoint's settings, and so do all groups if a subclass uses
    a scheduler of its own.
    """
    saved, current = ([len(g["params"]) for g in s["param_groups"]] for s in (state_dict, optimizer.state_dict()))
    if saved != current:
        raise InputError(
            f"the checkpoint's optimizer has groups of {saved} weights, this run's of {current}: it belongs to another "
            f"adapter, or is damaged"
        )
    if any(config.scheduler is not scheduler for config in trainer.lr_scheduler_configs):
        return None
    groups = list(state_dict["param_groups"])
    for i, (group, own) in enumerate(zip(optimizer.param_groups, settings, strict=False)):
        if i < len(groups) and all(group.get(name) == value for name, value in own.items()):
            groups[i] = {**groups[i], **own}
    return {**state_dict, "param_groups": groups}

"""The private names of Lightning and torch that the package uses, each with the reason.

Checked with Lightning 2.6.6 and torch 2.14.1. If an upgrade removes a name, this module's import fails. Without the
check the effect would be silent; for example, a run would no longer react to SIGTERM.
"""

import inspect
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import WandbLogger


def require_private(owner: Any, *names: str) -> None:  # noqa: ANN401
    """Check that private names exist.

    Args:
        owner: the class or module that defines the names, or the class whose constructor uses them as attributes.
        names: the names.

    Raises:
        ImportError: one doesn't exist in the installed version.
    """
    classes = inspect.getmro(owner) if inspect.isclass(owner) else ()
    constructors = [inspect.unwrap(vars(kind)["__init__"]) for kind in classes if "__init__" in vars(kind)]
    attributes = {name for init in constructors if inspect.isfunction(init) for name in init.__code__.co_names}
    for name in names:
        if not hasattr(owner, name) and name not in attributes:
            raise ImportError(f"{owner.__name__} has no {name}: install the versions that pyproject.toml allows")


require_private(WandbLogger, "_wandb_init")
require_private(RichProgressBar, "_get_train_description")


def remove_wandb_anonymous(trainer: Trainer) -> None:
    """Keep WandbLogger from passing ``anonymous``, which wandb warns about even where the user doesn't set it."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger._wandb_init.pop("anonymous", None)


class TrainDescriptionProgressBar(RichProgressBar):
    """Lightning's progress bar, but a training without ``max_epochs`` is "Epoch 3" instead of "Epoch 3/-2".

    Lightning takes the text from a private method, and has no public text for training as for validation.
    """

    def _get_train_description(self, current_epoch: int) -> str:
        description = super()._get_train_description(current_epoch)
        return description if (self.trainer.max_epochs or -1) > 0 else f"Epoch {current_epoch}"

"""Hide log messages and warnings of Lightning's Trainer that users can't act on; print the others in one line.

Only the command line calls this. What other libraries print is hidden where the package calls them.
"""

import logging
import re
import warnings

import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]

HIDDEN_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\). is deprecated",
    # The length of a stream is the number of its training questions, independent of the workers.
    "Your `IterableDataset` has `__len__` defined",
    # DDP reduces gradients on the stream on which CUDA graphs are replayed.
    "The AccumulateGrad node's stream does not match",
    # With float16 the first optimizer steps are skipped until the loss scale fits.
    r"Detected call of `lr_scheduler.step\(\)` before",
)
# Concern the callbacks of a resumed fit, and no other command.
HIDDEN_WARNINGS_UNLESS_FIT = (
    "Be aware that when using `ckpt_path`, callbacks",
    "The dirpath has changed from",
)
HIDDEN_MESSAGES = re.compile(
    "💡 Tip: |TPU available: False|`Trainer.fit` stopped: `max_|You are using a CUDA device .* that has Tensor Cores"
)
FILTERED_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")


def hide_noise(*, fit: bool, quiet: bool) -> None:
    """Install the filters.

    Args:
        fit: the command is ``fit``.
        quiet: also hide Lightning's messages about devices and seeds, and the progress bar of loading weights.
    """
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING if quiet else logging.NOTSET)
    if quiet and not are_progress_bars_disabled():
        transformers.logging.disable_progress_bar()  # disables the Hub's too
        enable_progress_bars()
    for message in HIDDEN_WARNINGS if fit else (*HIDDEN_WARNINGS, *HIDDEN_WARNINGS_UNLESS_FIT):
        warnings.filterwarnings("ignore", message=message)
    warnings.formatwarning = _one_line  # type: ignore[assignment]
    for name in FILTERED_LOGGERS:
        logging.getLogger(name).addFilter(_is_shown)


def _one_line(message: Warning | str, *_: object) -> str:
    """Return a warning without the place in the source, which is the package's own or Lightning's."""
    return f"warning: {' '.join(str(message).split())}\n"


def _is_shown(record: logging.LogRecord) -> bool:
    return not HIDDEN_MESSAGES.match(record.getMessage())

"""The entry point of the command line: a user's mistake ends in one line on standard error and exit code 2.

The help and errors in the options need the signatures of `Idefics2Module` and `DocVQADataModule` alone. These classes
import the model, peft, bitsandbytes and the data sources in the methods that use them, which saves 2 s at every start.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from idefics_lit.cli.lightning_cli import WITHOUT_RUN, CommandTrainer, DocVQACLI
from idefics_lit.cli.noise_filter import hide_noise
from idefics_lit.cli.parser import COMMANDS, CommandParser, HelpFormatter, default_logger
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.errors import InputError
from idefics_lit.reporting.prediction_writers import EvaluationWriter, PredictionWriter
from idefics_lit.reporting.report import Report
from idefics_lit.reporting.save_config import SaveConfig
from idefics_lit.reporting.skipped_examples import SkippedExamples
from idefics_lit.reporting.summary import Summary
from idefics_lit.training.finite_checks import FiniteLossCheck, OverflowCheck
from idefics_lit.training.module import Idefics2Module
from idefics_lit.training.preemption import PreemptionSync, SaveOnInterrupt

OUT_OF_MEMORY = (
    "the GPU's memory doesn't suffice: give a smaller data.batch_size, whose batches are accumulated to the same "
    "step, or --model.gradient_checkpointing true, or for an evaluation a smaller data.eval_batch_size"
)


def main(args: Sequence[str] | None = None) -> None:
    """Run one of `COMMANDS`, or print the help if there is none.

    Args:
        args: the command line; ``sys.argv`` by default.

    Raises:
        SystemExit: with code 2 and one line on standard error after a user's mistake; ``--debug`` or the environment
            variable ``IDEFICS_LIT_DEBUG=1`` shows the traceback instead. With code 143 after SIGTERM and 130 after
            Ctrl-C.
    """
    args = list(sys.argv[1:] if args is None else args) or ["--help"]
    debug = "--debug" in args or os.environ.get("IDEFICS_LIT_DEBUG", "0") not in ("", "0")
    hide_noise(fit="fit" in args, quiet=not WITHOUT_RUN.isdisjoint(args))
    writer = EvaluationWriter()
    report = Report(writer)
    summary = Summary(writer, report)
    training = [PreemptionSync(), FiniteLossCheck(), OverflowCheck(), SaveOnInterrupt()]
    try:
        DocVQACLI(
            Idefics2Module,
            DocVQADataModule,
            trainer_class=CommandTrainer,
            args=[arg for arg in args if arg != "--debug"],
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={
                "callbacks": [*training, PredictionWriter(), writer, summary, SkippedExamples(), report],
                "enable_model_summary": False,
                "logger": default_logger().as_dict(),
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=CommandParser,
            parser_kwargs={
                "prog": Path(sys.argv[0]).name if "idefics-lit" in sys.argv[0] else "python -m idefics_lit",
                "description": "Fine-tune Idefics2 on document questions.",
                "formatter_class": HelpFormatter,
                "exit_on_error": False,
                **{
                    command: {
                        "command": command,
                        "description": description,
                        "usage": "%(prog)s [--config FILE] [--OPTION VALUE ...]",
                    }
                    for command, description in COMMANDS.items()
                },
            },
        )
    except Exception as error:
        if debug or not (isinstance(error, InputError | torch.OutOfMemoryError) or _is_raised_by_lightning(error)):
            raise
        text = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else str(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns a KeyboardInterrupt into a SystemExit with code 1.
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            raise SystemExit(128 + signal.SIGINT) from None
        raise


def _is_raised_by_lightning(error: Exception) -> bool:
    """Return whether Lightning itself refuses something, such as a monitored metric that isn't logged."""
    if isinstance(error, MisconfigurationException):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    folder = Path(lightning.__file__).parent
    return folder in Path(frame.filename).parents and (frame.line or "").startswith("raise ")

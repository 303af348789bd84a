"""Lightning's Trainer with the commands that this program adds to its own."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer

from idefics_lit.cli.ask import AnswerPrinter, Asked
from idefics_lit.cli.check import check
from idefics_lit.pretrained import DTYPES

if TYPE_CHECKING:
    from idefics_lit.data.datamodule import DocVQADataModule
    from idefics_lit.training.module import Idefics2Module

# Of the commands that have some of their own, as argparse takes them.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "ask": {
        "image": {"nargs": "+", "action": "extend", "metavar": "F", "help": "images and PDFs"},
        "question": {"nargs": "+", "action": "extend", "metavar": "Q", "help": "what to ask about each page"},
        "json": {"action": "store_true", "help": "print JSON lines"},
    },
    "demo": {
        "host": {"type": str, "default": "127.0.0.1", "help": "the address to listen at; 0.0.0.0 lets others in"},
        "port": {"type": int | None, "help": "the port to listen at, the first free one from 7860 on unless given"},
    },
    "export": {
        "output": {"type": str | None, "metavar": "FOLDER", "help": "the folder to write"},
        "merge": {"type": bool, "default": False, "help": "write the base in 16 bits with the adapter in it"},
        "push_to_hub": {"type": str | None, "metavar": "NAME", "help": "upload it to the Hub as OWNER/NAME"},
    },
}


class DocVQATrainer(Trainer):
    """A Trainer that checks data, asks, shows and exports too. Its own methods are commands of the command line."""

    def check(self, model: "Idefics2Module", datamodule: "DocVQADataModule") -> None:
        """Read all training and validation questions and say what training would meet.

        Args:
            model: gives the options that memory and time depend on; no weights are loaded.
            datamodule: the data.
        """
        check(self, model, datamodule)

    def ask(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        image: Sequence[str] | None,
        question: Sequence[str] | None,
        json: bool,
        ckpt_path: str | None,
    ) -> None:
        """Ask every question about every page and print the answers.

        Args:
            model: what answers.
            datamodule: gives the options of prompt and pages; no data is read.
            image: files of images and PDFs.
            question: the questions.
            json: print JSON lines instead of a table.
            ckpt_path: the checkpoint of the adapter, the base model answers unless given.
        """
        asked = Asked(image or (), question or ())
        self.callbacks.append(AnswerPrinter(asked, as_json=json))  # type: ignore[attr-defined]
        loader = asked.loader(datamodule.hparams, DTYPES.get(str(self.precision), torch.float32))
        self.predict(model, loader, return_predictions=False, ckpt_path=ckpt_path, weights_only=True)

    def demo(
        self,
        model: "Idefics2Module",
        datamodule: LightningDataModule,
        host: str,
        port: int | None,
        ckpt_path: str | None,
    ) -> None:
        """Answer questions in a browser, with the checkpoint's adapter and without it, until Ctrl-C.

        Args:
            model: what answers.
            datamodule: gives the options of prompt and pages; no data is read.
            host: the address to listen at.
            port: the port, the first free one from 7860 on unless given.
            ckpt_path: the checkpoint of the adapter, the base model alone answers unless given.
        """
        from idefics_lit.cli.demo import serve  # its import takes seconds, and needs an extra

        model.trainer = self  # for its device and precision
        serve(model, datamodule.hparams, ckpt_path, host, port)

    def export(
        self,
        model: "Idefics2Module",
        datamodule: LightningDataModule,
        output: str | None,
        merge: bool,
        push_to_hub: str | None,
        ckpt_path: str | None,
    ) -> None:
        """Write a checkpoint's adapter as a folder that plain peft loads, or merged into its base.

        Args:
            model: of the checkpoint's options.
            datamodule: gives the options of prompt and pages; no data is read.
            output: the folder.
            merge: write the base's weights with the adapter in them.
            push_to_hub: upload the folder to this repository.
            ckpt_path: the checkpoint.
        """
        from idefics_lit.cli.export import export  # bitsandbytes talks when it is imported

        device = self.strategy.root_device
        export(model, datamodule.hparams, ckpt_path, output, device=device, merge=merge, push_to_hub=push_to_hub)

"""A command line of your own: Lightning's LightningCLI with this package's module and your data.

python examples/own_cli.py fit --data.folder my/pages --model.pretrained tiny --trainer.max_epochs 1
python examples/own_cli.py validate --data.folder my/pages --model.pretrained tiny --ckpt_path CHECKPOINT

The folder holds pages that are named after their answer, such as ``Miller.png``.
"""

import logging
import warnings
from pathlib import Path

from lightning import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from idefics_lit import Example, Idefics2Collator, Idefics2Module, load_processor


class NamedPages(Dataset):
    """A question about each page, whose file name is the answer."""

    def __init__(self, paths: list[Path], question: str) -> None:
        self.paths, self.question = paths, question

    def __len__(self) -> int:
        """Return the number of pages."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        """Return the question about a page."""
        path = self.paths[index]
        return Example(path.stem, self.question, [Image.open(path)], [path.stem])


class PagesDataModule(LightningDataModule):
    """Pages of a folder; every fourth is for validation.

    Args:
        folder: the folder.
        pretrained: the model whose processor is used.
        question: the question about every page.
        batch_size: questions in a batch.
    """

    def __init__(
        self,
        folder: str,
        pretrained: str = "HuggingFaceM4/idefics2-8b",
        question: str = "What is the name?",
        batch_size: int = 2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """List the pages and load the processor."""
        self.paths = sorted(Path(self.hparams.folder).glob("*.png"))
        self.processor = load_processor(self.hparams.pretrained)

    def train_dataloader(self) -> DataLoader:
        """Return batches with labels, in random order."""
        pages = NamedPages([path for i, path in enumerate(self.paths) if i % 4], self.hparams.question)
        collator = Idefics2Collator(self.processor, train=True)
        return DataLoader(pages, self.hparams.batch_size, shuffle=True, collate_fn=collator)

    def val_dataloader(self) -> DataLoader:
        """Return batches with prompts and references."""
        collator = Idefics2Collator(self.processor, train=False)
        return DataLoader(NamedPages(self.paths[::4], self.hparams.question), collate_fn=collator)


class PagesCLI(LightningCLI):
    """LightningCLI with one option for the module's model and the data's processor."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link them."""
        parser.link_arguments("model.pretrained", "data.pretrained")


if __name__ == "__main__":
    # Hide Lightning's advertisement and a warning that concerns its own code.
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: "Tip:" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*LeafSpec")
    PagesCLI(Idefics2Module, PagesDataModule, seed_everything_default=0)

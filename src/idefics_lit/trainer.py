"""Lightning's Trainer with the commands that this program adds to its own."""

from lightning import LightningDataModule, LightningModule, Trainer


class DocVQATrainer(Trainer):
    """A Trainer that checks data too. Its own methods are commands of the command line."""

    def check(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Read all training and validation questions and say what training would meet.

        Args:
            model: gives the options that memory and time depend on; no weights are loaded.
            datamodule: the data.
        """
        raise NotImplementedError

"""What the batches of a fit would be: their sizes, and how fast the loader yields them."""

import time
from collections.abc import Hashable, Sequence
from itertools import chain, repeat
from typing import NamedTuple

from idefics_lit.cli.split_statistics import SplitStatistics
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.grouping import group_by_page
from idefics_lit.data.subset import Subset
from idefics_lit.model.packing import LENGTH_MULTIPLE

LOADER_SECONDS = 3.0  # to measure the training loader


def loader_rate(split: SplitStatistics, datamodule: DocVQADataModule, limit: int) -> float:
    """Measure how many training questions a second a fit's own loader yields, which reads some questions of each page.

    Args:
        split: the statistics of the training split, whose good rows are loaded and become the data module's.
        datamodule: the data module.
        limit: the number of questions after which to stop, if `LOADER_SECONDS` aren't over yet.
    """
    datamodule.examples["train"] = Subset(split.examples, list(split.questions))
    loader = datamodule.train_dataloader()
    questions, start = 0, time.perf_counter()
    for batch in chain.from_iterable(repeat(loader)):
        questions += len(batch.question_ids)
        seconds = time.perf_counter() - start
        if seconds > LOADER_SECONDS or questions >= limit:
            break
    return questions / seconds


class BatchStatistics(NamedTuple):
    """Sizes of a training batch.

    Attributes:
        questions: its questions.
        rows: its rows, each with the questions about one page.
        padded_tokens: tokens with padding.
        tokens: tokens without padding.
        patches: image patches.
    """

    questions: int
    rows: int
    padded_tokens: int
    tokens: int
    patches: int


def first_epoch_batches(split: SplitStatistics, datamodule: DocVQADataModule, patch_size: int) -> list[BatchStatistics]:
    """Return the batches of the first epoch on one device, with each question's longest answer.

    Args:
        split: the statistics of the training split.
        datamodule: in a fit of its Trainer.
        patch_size: edge of a patch, in pixels.
    """
    examples = Subset(split.examples, list(split.questions))
    questions = list(split.questions.values())
    order = [index for index, *_ in datamodule.train_sampler(examples)]
    batch_size, batches = datamodule.batch_size, []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [[i] for i in batch] if datamodule.hparams.train_on_prompt else _group_by_page(examples.page_ids, batch)
        lengths = [questions[row[0]].page.tokens + sum(questions[i].question_tokens for i in row) for row in rows]
        padded_length = -(-max(lengths) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        patches = sum(questions[row[0]].page.patches(patch_size) for row in rows)
        batches.append(BatchStatistics(len(batch), len(rows), padded_length * len(rows), sum(lengths), patches))
    return batches


def _group_by_page(page_ids: Sequence[Hashable], rows: Sequence[int]) -> list[list[int]]:
    return [[rows[i] for i in group] for group in group_by_page(page_ids[row] for row in rows)]

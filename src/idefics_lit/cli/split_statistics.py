"""Statistics of a split: what training would read of each question, without training.

What is special here:

- a page is processed once for all questions about it;
- all accepted answers are tokenized, not only the one that training would draw;
- the workers of the DataLoader return counts instead of pixels.
"""

import re
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.example import Example, Examples
from idefics_lit.data.grouping import group_by_page
from idefics_lit.data.samplers import TrainSampler
from idefics_lit.data.skipping import SkipBadExamples, known_faults
from idefics_lit.data.subset import Subset
from idefics_lit.errors import InputError
from idefics_lit.model.packing import LENGTH_MULTIPLE


@dataclass
class QuestionStatistics:
    """Counts of one question.

    Attributes:
        error: why training would refuse it, one line; the counts may be missing then.
        question_id: its id in the data.
        types: its question types.
        page_digests: a digest of the pixels of each of its pages, equal for equal pages in different files.
        page_sizes: width and height of each of its pages, in pixels.
        vision_pixels: pixels of its pages that the vision tower processes, after scaling.
        page_tokens: tokens before the question.
        question_tokens: tokens of the question with each accepted answer.
        answer_tokens: tokens of each accepted answer alone.
    """

    error: str = ""
    question_id: int | str = ""
    types: list[str] = field(default_factory=list)
    page_digests: Sequence[str] = ()
    page_sizes: list[tuple[int, int]] = field(default_factory=list)
    vision_pixels: int = 0
    page_tokens: int = 0
    question_tokens: list[int] = field(default_factory=list)
    answer_tokens: list[int] = field(default_factory=list)

    @property
    def total_tokens(self) -> int:
        """Tokens of page, question and longest answer."""
        return self.page_tokens + max(self.question_tokens)


class StatisticsCollator:
    """A ``collate_fn`` that returns the statistics of the questions about one page.

    Args:
        collator: the collator of the split.
    """

    def __init__(self, collator: Idefics2Collator) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Example | InputError]) -> list[QuestionStatistics]:
        """Return the statistics of each example."""
        questions, variants = [], []  # a variant has one of the accepted answers
        for example in examples:
            if isinstance(example, InputError):
                questions.append(QuestionStatistics(str(example)))
                continue
            sizes = [image.size for image in example.images]
            question = QuestionStatistics("", example.question_id, example.question_types, page_sizes=sizes)
            questions.append(question)
            variants += [(question, replace(example, answers=[answer])) for answer in dict.fromkeys(example.answers)]
        try:
            self._count(variants)
        except InputError:  # find the variants that cause it
            for i, (question, example) in enumerate(variants):
                try:
                    self._count([(question, example)])
                except InputError as error:
                    is_first_answer = i == 0 or variants[i - 1][0] is not question
                    if is_first_answer or self.collator.train:  # evaluation tokenizes the first answer only
                        question.error = str(error)
        return questions

    def _count(self, variants: Sequence[tuple[QuestionStatistics, Example]]) -> None:
        if not variants:
            return
        tokens = self.collator.tokenize([example for _, example in variants])
        vision_pixels = tokens.images["pixel_attention_mask"].flatten(1).sum(1).tolist()
        for row, members in enumerate(tokens.row_members):
            for i in members:
                question, _ = variants[i]
                question.page_tokens, question.vision_pixels = len(tokens.page_ids[row]), vision_pixels[row]
                question.page_digests = tokens.digests[i]
                question.question_tokens.append(len(tokens.full_ids[i]))
                # Without the end token.
                question.answer_tokens.append(len(tokens.full_ids[i]) - len(tokens.prompt_ids[i]) - 1)


class SplitStatistics(NamedTuple):
    """Statistics of a split.

    Attributes:
        examples: its examples, broken ones included.
        errors: why training would refuse a broken row, one line each, by index.
        questions: the statistics of the other rows, by index.
        seconds: how long the DataLoader took.
        processed_pages: how many times a page was processed.
    """

    examples: Examples
    errors: dict[int, str]
    questions: dict[int, QuestionStatistics]
    seconds: float
    processed_pages: int

    @property
    def page_rows(self) -> dict[str, int]:
        """The index of the first question about each page, by the page's digest."""
        rows = reversed(self.questions.items())
        return {digest: row for row, question in rows for digest in question.page_digests}

    @property
    def page_sizes(self) -> list[tuple[int, int]]:
        """Width and height of each different page, in pixels."""
        return list(
            {
                digest: size
                for question in self.questions.values()
                for digest, size in zip(question.page_digests, question.page_sizes, strict=True)
            }.values()
        )

    @property
    def error_kinds(self) -> Counter[str]:
        """Number of broken rows by kind of error, independent of row, name and value."""
        return Counter(_error_kind(line, self.examples.source(row)) for row, line in self.errors.items())

    @property
    def repeated_ids(self) -> list[int | str]:
        """The question ids that occur more than once."""
        counts = Counter(question.question_id for question in self.questions.values())
        return [question_id for question_id, count in counts.items() if count > 1]


def _error_kind(line: str, source: str) -> str:
    text = line.replace(source, "", 1).removeprefix(": ")
    return re.sub(r"""^(?:'.*'|".*") (?=holds )|^\d+ (?=tokens )""", "", text).partition(":")[0]


def compute_statistics(
    datamodule: DocVQADataModule,
    split: str,
    advance: Any = lambda questions: None,  # noqa: ANN401
) -> SplitStatistics:
    """Read a split and compute its statistics.

    Args:
        datamodule: the data module, opened.
        split: "train" or "val".
        advance: called with the number of questions read since the last call.
    """
    examples = datamodule.examples[split]
    collator = datamodule.collator(split)
    collator.train_on_prompt = False  # otherwise a page is processed for each question; lengths are the same
    errors = known_faults(examples, need_answers=True)
    advance(len(errors))
    batches = _group_by_page(examples.page_ids, [row for row in range(len(examples)) if row not in errors])
    loader = DataLoader(
        SkipBadExamples(examples),
        batch_sampler=batches,
        collate_fn=StatisticsCollator(collator),
        num_workers=datamodule.workers(),
    )
    statistics: dict[int, QuestionStatistics] = {}
    start = time.perf_counter()
    for rows, questions in zip(batches, loader, strict=True):
        for row, question in zip(rows, questions, strict=True):
            if question.error:
                errors[row] = question.error
            else:
                statistics[row] = question
        advance(len(rows))
    seconds = time.perf_counter() - start
    return SplitStatistics(
        examples, dict(sorted(errors.items())), dict(sorted(statistics.items())), seconds, len(batches)
    )


def _group_by_page(page_ids: Sequence[Hashable], rows: Sequence[int]) -> list[list[int]]:
    return [[rows[i] for i in group] for group in group_by_page(page_ids[row] for row in rows)]


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


def first_epoch_batches(
    split: SplitStatistics,
    options: Any,  # noqa: ANN401
    batch_size: int,
    world_size: int,
    patch_size: int = 14,
) -> list[BatchStatistics]:
    """Return the batches of the first epoch on one device, with each question's longest answer.

    Args:
        split: the statistics of the training split.
        options: the data module's options.
        batch_size: of each device.
        world_size: the number of devices.
        patch_size: edge of a patch, in pixels.
    """
    examples = Subset(split.examples, list(split.questions))
    questions = list(split.questions.values())
    sampler = TrainSampler(examples, options.questions_per_page, seed=options.seed, num_replicas=world_size, rank=0)
    order = [index for index, *_ in sampler]
    batches = []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [[i] for i in batch] if options.train_on_prompt else _group_by_page(examples.page_ids, batch)
        lengths = [questions[row[0]].page_tokens + sum(max(questions[i].question_tokens) for i in row) for row in rows]
        padded_length = -(-max(lengths) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        patches = sum(questions[row[0]].vision_pixels for row in rows) // patch_size**2
        batches.append(BatchStatistics(len(batch), len(rows), padded_length * len(rows), sum(lengths), patches))
    return batches

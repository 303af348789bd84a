"""Statistics of a split: what training would read of each question, without training.

What is special here:

- a page is processed once for up to `QUESTIONS_AT_ONCE` questions about it;
- all accepted answers are tokenized, not only the one that training would draw;
- the workers of the DataLoader return counts instead of pixels.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from PIL.Image import Image
from torch.utils.data import DataLoader

from idefics_lit.data.collator import Idefics2Collator
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.example import Example, Examples
from idefics_lit.data.grouping import group_by_page
from idefics_lit.data.image_tokens import page_spans
from idefics_lit.data.page_keys import page_digest
from idefics_lit.data.skipping import SkipBadExamples, known_faults
from idefics_lit.data.workers import ignore_group_signals
from idefics_lit.errors import InputError

QUESTIONS_AT_ONCE = 256  # about one page


@dataclass(slots=True)
class PageStatistics:
    """Counts of the pages of a question, one object for the questions about the same pages.

    Attributes:
        digests: a digest of the pixels of each page, equal for equal pages in different files.
        sizes: width and height of each page, in pixels.
        image_sizes: the number of images of each height and width, in pixels, that the vision tower processes.
        image_tokens: for each page the number of its images and of its tokens.
        tokens: tokens before the question, the prompt's included.
    """

    digests: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    image_sizes: Mapping[tuple[int, int], int] = field(default_factory=dict)
    image_tokens: tuple[tuple[int, int], ...] = ()
    tokens: int = 0

    def patches(self, patch_size: int) -> int:
        """Return the number of image patches, of which an image has whole ones only."""
        return sum(n * (h // patch_size) * (w // patch_size) for (h, w), n in self.image_sizes.items())


@dataclass(slots=True)
class QuestionStatistics:
    """Counts of one question.

    Attributes:
        error: why training would refuse it, one line; the counts may be missing then.
        question_id: its id in the data.
        types: its question types.
        page: the counts of its pages.
        question_tokens: tokens of the question with its longest accepted answer.
        answer_tokens: tokens of each accepted answer alone.
    """

    error: str = ""
    question_id: int | str = ""
    types: list[str] = field(default_factory=list)
    page: PageStatistics = field(default_factory=PageStatistics)
    question_tokens: int = 0
    answer_tokens: list[int] = field(default_factory=list)

    @property
    def total_tokens(self) -> int:
        """Tokens of page, question and longest answer."""
        return self.page.tokens + self.question_tokens


class SharedPages(SkipBadExamples):
    """Examples of which those of a batch share the pages with the same pixels, so that each is in memory once."""

    def __getitems__(self, indices: Sequence[int]) -> list[Example | InputError]:
        """Return the examples of a batch, or the errors that they raise."""
        pages: dict[str, Image] = {}
        shared: set[int] = set()
        examples = []
        for index in indices:
            example = self[index]
            if isinstance(example, Example):
                example.images = [
                    image if id(image) in shared else pages.setdefault(page_digest(image), image)
                    for image in example.images
                ]
                shared.update(map(id, example.images))
            examples.append(example)
        return examples


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
            question = QuestionStatistics("", example.question_id, example.question_types)
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
        rows = self.collator.process_pages([variants[members[0]][1] for members in tokens.row_members])
        for members, ids, images in zip(tokens.row_members, tokens.page_ids, rows, strict=True):
            first, counts = members[0], [len(page) for page in images]
            spans = page_spans(self.collator.processor, ids, counts)
            page = PageStatistics(
                tokens.digests[first],
                tuple(image.size for image in variants[first][1].images),
                Counter((image.shape[1], image.shape[2]) for page in images for image in page),
                tuple((count, stop - start) for count, (start, stop) in zip(counts, spans, strict=True)),
                len(ids),
            )
            for i in members:
                question, length = variants[i][0], len(tokens.full_ids[i])
                question.page, question.question_tokens = page, max(question.question_tokens, length)
                question.answer_tokens.append(length - len(tokens.prompt_ids[i]) - 1)  # without the end token


class SplitStatistics(NamedTuple):
    """Statistics of a split.

    Attributes:
        examples: its examples, broken ones included.
        errors: why training would refuse a broken row, one line each, by index.
        questions: the statistics of the other rows, by index.
    """

    examples: Examples
    errors: dict[int, str]
    questions: dict[int, QuestionStatistics]

    @property
    def page_rows(self) -> dict[str, int]:
        """The index of the first question about each page, by the page's digest."""
        rows = reversed(self.questions.items())
        return {digest: row for row, question in rows for digest in question.page.digests}

    @property
    def page_sizes(self) -> list[tuple[int, int]]:
        """Width and height of each different page, in pixels."""
        pages = (question.page for question in self.questions.values())
        return list({d: size for page in pages for d, size in zip(page.digests, page.sizes, strict=True)}.values())

    @property
    def image_tokens(self) -> Counter[tuple[int, int]]:
        """How many different pages have so many images and tokens."""
        pages = (question.page for question in self.questions.values())
        return Counter({d: n for page in pages for d, n in zip(page.digests, page.image_tokens, strict=True)}.values())

    @property
    def errors_by_kind(self) -> dict[str, list[str]]:
        """The errors of broken rows by their kind, which doesn't depend on row, name and value."""
        kinds: dict[str, list[str]] = {}
        for row, line in self.errors.items():
            kinds.setdefault(_error_kind(line, self.examples.source(row)), []).append(line)
        return kinds

    @property
    def repeated_ids(self) -> list[int | str]:
        """The question ids that occur more than once."""
        counts = Counter(question.question_id for question in self.questions.values())
        return [question_id for question_id, count in counts.items() if count > 1]


# What differs between errors of one kind: quoted values, paths and a leading number, but not the name of a column.
VALUE = re.compile(
    r"""(?P<kept>(?:column|no)\ '[^']*')
    |(?<!\w)(?:'(?:[^'\\]|\\.)*'?|"(?:[^"\\]|\\.)*"?)
    |\S*[/\\]\S*?(?=:?\ |:?$)
    |^\d+(?=\ )""",
    re.VERBOSE,
)


def _error_kind(line: str, source: str) -> str:
    text = line.replace(source, "", 1).removeprefix(": ")
    return VALUE.sub(lambda value: value["kept"] or "…", text).partition(":")[0].removeprefix("… ")


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
    good = [row for row in range(len(examples)) if row not in errors]
    groups = group_by_page((examples.page_ids[row] for row in good), QUESTIONS_AT_ONCE)
    batches = [[good[i] for i in group] for group in groups]
    loader = DataLoader(
        SharedPages(examples),
        batch_sampler=batches,
        collate_fn=StatisticsCollator(collator),
        num_workers=datamodule.workers(),
        worker_init_fn=ignore_group_signals,
    )
    statistics: dict[int, QuestionStatistics] = {}
    for rows, questions in zip(batches, loader, strict=True):
        for row, question in zip(rows, questions, strict=True):
            if question.error:
                errors[row] = question.error
            else:
                statistics[row] = question
        advance(len(rows))
    return SplitStatistics(examples, dict(sorted(errors.items())), dict(sorted(statistics.items())))

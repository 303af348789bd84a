"""Every question of a split, read as a fit would read it, and what is found out on the way.

What is special here: a page is processed once for all questions on it, all accepted answers are tokenised and not only
the one that would be drawn, and a loader's worker sends numbers back, no pixels.
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
from idefics_lit.model.packing import MULTIPLE


@dataclass
class Question:
    """What is found out about a question.

    Attributes:
        error: what is wrong with it, a line; the rest may be empty then.
        question_id: the data's own.
        types: its types.
        pixels: a key of each of its pages' pixels, the same for the same page in another file.
        sizes: width and height of its pages.
        seen: the pixels that the vision tower sees of them.
        page: tokens before the question.
        lengths: tokens of the question with each accepted answer.
        answers: tokens of each accepted answer alone.
    """

    error: str = ""
    question_id: int | str = ""
    types: list[str] = field(default_factory=list)
    pixels: Sequence[str] = ()
    sizes: list[tuple[int, int]] = field(default_factory=list)
    seen: int = 0
    page: int = 0
    lengths: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of page, question and longest answer."""
        return self.page + max(self.lengths)


class Reader:
    """A loader's ``collate_fn`` for the questions on one page; pixels stay in the worker.

    Args:
        collator: the split's.
    """

    def __init__(self, collator: Idefics2Collator) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Example | InputError]) -> list[Question]:
        """Return what is found out about each."""
        questions, asked = [], []
        for example in examples:
            if isinstance(example, InputError):
                questions.append(Question(str(example)))
                continue
            sizes = [image.size for image in example.images]
            question = Question("", example.question_id, example.question_types, sizes=sizes)
            questions.append(question)
            asked += [(question, replace(example, answers=[answer])) for answer in dict.fromkeys(example.answers)]
        try:
            self._measure(asked)
        except InputError:  # which one is it?
            for number, (question, example) in enumerate(asked):
                try:
                    self._measure([(question, example)])
                except InputError as error:
                    first = number == 0 or asked[number - 1][0] is not question
                    if first or self.collator.train:  # an evaluation reads the first answer alone
                        question.error = str(error)
        return questions

    def _measure(self, asked: Sequence[tuple[Question, Example]]) -> None:
        if not asked:
            return
        tokens = self.collator.tokens([example for _, example in asked])
        seen = tokens.images["pixel_attention_mask"].flatten(1).sum(1).tolist()
        for row, members in enumerate(tokens.members):
            for i in members:
                question, _ = asked[i]
                question.page, question.seen, question.pixels = len(tokens.pages[row]), seen[row], tokens.digests[i]
                question.lengths.append(len(tokens.whole[i]))
                # Without the token that ends it.
                question.answers.append(len(tokens.whole[i]) - len(tokens.asked[i]) - 1)


class Split(NamedTuple):
    """A split that was read.

    Attributes:
        examples: its questions, bad ones included.
        broken: what is wrong with those that are bad, a line each, by number.
        good: the others, by number.
        seconds: how long the loader took.
        groups: how often it processed a page.
    """

    examples: Examples
    broken: dict[int, str]
    good: dict[int, Question]
    seconds: float
    groups: int

    @property
    def pages(self) -> dict[str, int]:
        """The first question on each page, by the page's pixels."""
        return {page: row for row, question in reversed(self.good.items()) for page in question.pixels}

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each page, by the page's pixels once."""
        pages = {p: s for question in self.good.values() for p, s in zip(question.pixels, question.sizes, strict=True)}
        return list(pages.values())

    @property
    def kinds(self) -> Counter[str]:
        """Count what is wrong with broken rows, whatever their names and numbers."""
        return Counter(_kind(line, self.examples.source(row)) for row, line in self.broken.items())

    @property
    def repeated(self) -> list[int | str]:
        """The question ids that occur more than once."""
        counts = Counter(question.question_id for question in self.good.values())
        return [question_id for question_id, count in counts.items() if count > 1]


def _kind(line: str, where: str) -> str:
    what = line.replace(where, "", 1).removeprefix(": ")
    return re.sub(r"""^(?:'.*'|".*") (?=holds )|^\d+ (?=tokens )""", "", what).partition(":")[0]


def read_split(datamodule: DocVQADataModule, split: str, advance: Any = lambda questions: None) -> Split:  # noqa: ANN401
    """Read a split of a data module that is open.

    Args:
        datamodule: the data.
        split: "train" or "val".
        advance: called with the number of questions read since the last call.
    """
    examples = datamodule.examples[split]
    collator = datamodule.collator(split)
    collator.train_on_prompt = False  # a page would be processed for each question; lengths are the same
    broken = known_faults(examples, need_answers=True)
    advance(len(broken))
    groups = _by_page(examples.page_ids, [row for row in range(len(examples)) if row not in broken])
    loader = DataLoader(
        SkipBadExamples(examples), batch_sampler=groups, collate_fn=Reader(collator), num_workers=datamodule.workers()
    )
    good: dict[int, Question] = {}
    started = time.perf_counter()
    for rows, questions in zip(groups, loader, strict=True):
        for row, question in zip(rows, questions, strict=True):
            if question.error:
                broken[row] = question.error
            else:
                good[row] = question
        advance(len(rows))
    seconds = time.perf_counter() - started
    return Split(examples, dict(sorted(broken.items())), dict(sorted(good.items())), seconds, len(groups))


def _by_page(page_ids: Sequence[Hashable], rows: Sequence[int]) -> list[list[int]]:
    return [[rows[i] for i in group] for group in group_by_page(page_ids[row] for row in rows)]


class Batch(NamedTuple):
    """A training batch: its questions, its rows, their tokens with padding and without, its images' patches."""

    questions: int
    rows: int
    padded: int
    tokens: int
    patches: int


def first_epoch(split: Split, options: Any, world_size: int, patch: int = 14) -> list[Batch]:  # noqa: ANN401
    """Return the batches of a fit's first epoch on one device, each question with its longest answer.

    Args:
        split: what is trained on.
        options: the data module's.
        world_size: the number of devices.
        patch: pixels of a patch's edge.
    """
    left = Subset(split.examples, list(split.good))
    questions = list(split.good.values())
    visits = TrainSampler(left, options.questions_per_page, seed=options.seed, num_replicas=world_size, rank=0)
    order = [index for index, *_ in visits]
    batches = []
    for start in range(0, len(order), options.batch_size):
        batch = order[start : start + options.batch_size]
        rows = [[i] for i in batch] if options.train_on_prompt else _by_page(left.page_ids, batch)
        lengths = [questions[row[0]].page + sum(max(questions[i].lengths) for i in row) for row in rows]
        longest = -(-max(lengths) // MULTIPLE) * MULTIPLE
        patches = sum(questions[row[0]].seen for row in rows) // patch**2
        batches.append(Batch(len(batch), len(rows), longest * len(rows), sum(lengths), patches))
    return batches

"""What the batches of a fit demand of the device: their mean size, and the largest of them."""

from collections.abc import Iterator
from itertools import chain, islice
from math import ceil

from PIL import Image

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.example import Example
from idefics_lit.data.grouping import group_by_page
from idefics_lit.data.image_layout import count_images, image_edge, page_edge
from idefics_lit.data.image_tokens import largest_page_tokens
from idefics_lit.errors import InputError
from idefics_lit.model.batch import Batch
from idefics_lit.model.execution import Workload

SAMPLED_QUESTIONS = 16
CHARACTERS_PER_TOKEN = 3  # fewer than texts have
LENGTH_MARGIN = 1.25  # of the longest text over the longest sampled one


def workload(datamodule: DocVQADataModule) -> Workload:
    """Return the mean size of a fit's batches; of a stream, as if each question had a page of its own."""
    options, images, pages = datamodule.hparams, datamodule.processor.image_processor, _most_pages(datamodule)
    step, page_ids = datamodule.step, datamodule.examples["train"].page_ids if "train" in datamodule.examples else []
    groups = group_by_page(page_ids, 1 if options.train_on_prompt else options.questions_per_page)
    return Workload(
        batch_sizes=step.batch_sizes if step else [datamodule.batch_size],
        questions_per_row=len(page_ids) / len(groups) if groups else 1.0,
        images_per_page=pages * count_images(images, (page_edge(images), page_edge(images))),
        longest_edge=image_edge(images),
        page_tokens=pages * largest_page_tokens(datamodule.processor),
    )


def count_pages(datamodule: DocVQADataModule) -> int:
    """Return the number of pages that a fit reads, for training and validation."""
    return len({pages for examples in datamodule.examples.values() for pages in examples.page_ids})


def largest_batch(datamodule: DocVQADataModule) -> Batch:
    """Return a batch that needs as much memory as any of a fit: square pages, the most rows, long texts.

    The rows are counted in the first epoch, in which this rank's batches are as large as in others. The texts are
    longer than those of `SAMPLED_QUESTIONS` questions, half of which have the longest answers of all.
    """
    questions = list(_sample(datamodule))
    question = _words(max((len(example.question) for example in questions), default=100))
    answer = _words(max((len(text) for example in questions for text in example.answers), default=20))
    edge = page_edge(datamodule.processor.image_processor)
    pages = [Image.new("RGB", (edge, edge), "white")] * _most_pages(datamodule)
    collator = datamodule.collator("train")
    collator.max_length *= 2  # the margin isn't an error
    collator.pages.cached_features = None
    rows = _largest_rows(datamodule)
    page_ids = chain.from_iterable([row] * count for row, count in enumerate(rows))
    return collator([Example(i, question, pages, [answer], page_id=page_id) for i, page_id in enumerate(page_ids)])


def _largest_rows(datamodule: DocVQADataModule) -> list[int]:
    """Return numbers of questions, so that no batch has more rows, more questions in a row, or more questions."""
    size, options = datamodule.batch_size, datamodule.hparams
    if options.train_on_prompt:
        return [1] * size
    if "train" not in datamodule.examples:  # a stream: the longest row, and as many others as possible
        longest = min(size, options.questions_per_page)
        return [longest, *[1] * (size - longest)]
    examples = datamodule.examples["train"]
    page_ids, order = examples.page_ids, iter(datamodule.train_sampler(examples))
    batches = iter(lambda: [page_ids[index] for index, *_ in islice(order, size)], [])
    counts = [[*map(len, group_by_page(batch))] for batch in batches]
    longest, rows = max(map(max, counts)), max(map(len, counts))
    rest = max(size - longest, rows - 1)
    return [longest, *(rest // (rows - 1) + (row < rest % (rows - 1)) for row in range(rows - 1))]


def _most_pages(datamodule: DocVQADataModule) -> int:
    """Return the largest number of pages of a question; of a stream, those of the validation questions."""
    examples = datamodule.examples.get("train", datamodule.examples["val"])
    return max(map(len, examples.page_ids), default=1)


def _sample(datamodule: DocVQADataModule) -> Iterator[Example]:
    """Yield questions from all over a split, and those with the longest answers."""
    split = "train" if "train" in datamodule.examples else "val"  # a stream is read later
    answers, dataset = datamodule.examples[split].answers, datamodule.dataset(split)
    half = SAMPLED_QUESTIONS // 2
    longest = sorted(range(len(answers)), key=lambda i: max(map(len, answers[i]), default=0))[-half:]
    for index in dict.fromkeys([*longest, *range(0, len(answers), ceil(len(answers) / half))]):
        try:
            example = dataset[index]
        except InputError:  # the loader raises it, with its own message
            continue
        if isinstance(example, Example):
            yield example


def _words(characters: int) -> str:
    return " ".join(["the"] * ceil(LENGTH_MARGIN * characters / CHARACTERS_PER_TOKEN))

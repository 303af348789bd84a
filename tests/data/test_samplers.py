"""The questions of each optimizer step are the same on any number of ranks, in any batches."""

from itertools import islice, product

import pytest
from lightning import Trainer

from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.example import Examples
from idefics_lit.data.samplers import TrainSampler

PAGE_SIZES = (7, 1, 4, 4, 9, 2, 5)  # questions about each page, repeatedly


class Questions(Examples):
    """Questions that are never opened."""

    def __init__(self, count):
        pages = (f"page {number}" for number in range(count) for _ in range(PAGE_SIZES[number % len(PAGE_SIZES)]))
        self.page_ids = [(page,) for page in islice(pages, count)]
        self.answers = [("yes",)] * count

    def __len__(self):
        return len(self.page_ids)


def cut(values, size):
    return [values[start : start + size] for start in range(0, len(values), size)]


def steps_of(examples, questions_per_page, global_batch, ranks, epoch=1):
    """The questions of each optimizer step, as sets, and how many each rank has in each."""
    share, steps = global_batch // ranks, []
    for rank in range(ranks):
        sampler = TrainSampler(examples, questions_per_page, share, num_replicas=ranks, rank=rank, seed=3)
        sampler.set_epoch(epoch)
        samples = list(sampler)
        assert len(samples) == len(sampler)
        steps.append(cut(samples, share))
    assert len({len(own) for own in steps}) == 1
    united = [
        [i for own in shares for i, _, is_padding in own if not is_padding] for shares in zip(*steps, strict=True)
    ]
    return [sorted(step) for step in united], [{len(own) for own in shares} for shares in zip(*steps, strict=True)]


@pytest.mark.parametrize("count", [1, 16, 97, 211, 240])
@pytest.mark.parametrize("questions_per_page", [1, 3, 4, 8])
def test_ranks_share_the_steps_of_one_process(count, questions_per_page):
    examples = Questions(count)
    for ranks, share in product((1, 2, 3, 4, 5, 8), (1, 2, 4, 5)):
        one, _ = steps_of(examples, questions_per_page, ranks * share, 1)
        shared, sizes = steps_of(examples, questions_per_page, ranks * share, ranks)
        assert shared == one, (ranks, share)
        assert all(len(size) == 1 for size in sizes)  # else ranks would wait for each other
        assert sorted(index for step in shared for index in step) == list(range(count))


@pytest.mark.parametrize(("batch_size", "global_batch", "ranks"), [(1, 4, 2), (2, 12, 3), (1, 10, 2), (1, 8, 8)])
def test_an_epoch_that_is_resumed_has_the_steps_of_one_process(docvqa, batch_size, global_batch, ranks):
    """The loaders of all ranks are stopped after the first step, and others continue."""
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    batches = global_batch // ranks // batch_size  # of a step

    def loader(rank, ranks, **sizes):
        trainer = type("Rank", (Trainer,), {"world_size": ranks, "global_rank": rank})(**options)
        trainer.fit_loop.epoch_loop.batch_progress.current.ready = batches
        data = DocVQADataModule(str(docvqa), "tiny", image_size=112, num_workers=0, **sizes)
        data.trainer = trainer
        data.setup("fit")
        return data.train_dataloader()

    one = [sorted(batch.question_ids) for batch in loader(0, 1, batch_size=global_batch)]
    steps = [[] for _ in one]
    for rank in range(ranks):
        stopped, resumed = (
            loader(rank, ranks, batch_size=batch_size, global_batch_size=global_batch) for _ in range(2)
        )
        ids = [batch.question_ids for batch in islice(stopped, batches)]
        resumed.load_state_dict(stopped.state_dict())
        ids += [batch.question_ids for batch in resumed]
        for step, own in zip(steps, cut(ids, batches), strict=True):
            step += [i for batch in own for i in batch]
    assert [sorted(step) for step in steps] == one


def test_a_position_in_the_order_of_an_earlier_version_is_not_continued():
    """Its ranks had other questions; one process has the same."""
    settings = [
        TrainSampler(Questions(8), 4, 2, num_replicas=ranks, rank=0).order_settings["trainer.devices"]
        for ranks in (1, 2)
    ]
    assert settings[0] == 1 and settings[1] != 2

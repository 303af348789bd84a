"""Streams: what each worker of each rank reads, in which order, and where a resumed run continues."""

import io
import os
from collections import Counter
from itertools import groupby, islice

import datasets
import pytest
import torch
import yaml
from lightning import Trainer
from PIL import Image
from torchdata.stateful_dataloader import StatefulDataLoader

from idefics_lit.data import streamed_questions
from idefics_lit.data.datamodule import DocVQADataModule
from idefics_lit.data.loaders import StreamLoader
from idefics_lit.data.sources.streaming import find_streams
from idefics_lit.data.streamed_questions import StreamedQuestions
from idefics_lit.errors import InputError


def page(number):
    Image.new("L", (40, 30), number).save(png := io.BytesIO(), "PNG")
    return {"bytes": png.getvalue(), "path": None}


PAGE = page(255)


@pytest.fixture(autouse=True)
def window(monkeypatch):
    monkeypatch.setattr(streamed_questions, "SHUFFLE_WINDOW", 16)


def turns(number):
    """A row in the form of Docmatix: one to three questions on two images."""
    texts = [{"user": f"{number}.{i}?", "assistant": "a", "source": "made"} for i in range(1 + number % 3)]
    return {"images": [page(number), page(number + 100)], "texts": texts}


def single(number):
    """A row in the form of DocumentVQA: one question, three on a page."""
    ids = {"ucsf_document_id": f"d{number // 3}", "ucsf_document_page_no": "1"}
    return {"questionId": number, "question": f"{number}?", "image": page(number // 3), "answers": ["a", "b"], **ids}


def questions(form, rows):
    return [f"{r}.{i}?" for r in rows for i in range(1 + r % 3)] if form is turns else [f"{r}?" for r in rows]


def write(folder, form, rows=100, shards=1, split="train", **changes):
    """Write a split as parquet files, whose row groups are no windows; ``changes`` are made to its last row."""
    folder.mkdir(exist_ok=True)
    made = [form(number) for number in range(rows)]
    made[-1] |= changes
    for shard in range(shards):
        some = datasets.Dataset.from_list(made[shard * rows // shards : (shard + 1) * rows // shards])
        images = datasets.List(datasets.Image()) if form is turns else datasets.Image()
        some = some.cast_column("images" if form is turns else "image", images)
        some.to_parquet(str(folder / f"{split}-{shard:05}-of-{shards:05}.parquet"), batch_size=7)
    return str(folder)


def stream(source, split="train"):
    return find_streams(source, None, None, "en")[split]


def visits(examples):
    return [(example.epoch, example.question, example.images[0].size) for example in examples]


def loader(source, rank=0, world_size=1, num_workers=2):
    part = StreamedQuestions(stream(source), rank, world_size)
    return StatefulDataLoader(part, batch_size=4, num_workers=num_workers, collate_fn=visits)


@pytest.mark.parametrize(("form", "shards"), [(turns, 9), (turns, 1), (single, 3)])
def test_an_epoch_has_each_question_once_over_ranks_and_workers(tmp_path, form, shards):
    source = write(tmp_path / "set", form, shards=shards)
    seen = Counter()
    for rank in range(2):
        batches, left = iter(loader(source, rank, 2)), set()
        while len(left) < 2:  # until both workers are in the next epoch
            for worker in range(2):
                for epoch, question, size in next(batches):
                    assert size == (40, 30)
                    seen.update([question] if epoch == 0 else [])
                    left |= {worker} if epoch else set()
    assert seen == Counter(questions(form, range(100)))


@pytest.mark.parametrize("shards", [1, 4])
def test_the_order_is_a_function_of_seed_and_epoch(tmp_path, shards):
    source = write(tmp_path / "set", single, shards=shards)
    first, again, other = (list(islice(StreamedQuestions(stream(source), seed=seed), 300)) for seed in (0, 0, 1))
    orders = [[example.question for example in some] for some in (first, again, other)]
    epochs = [orders[0][:100], orders[0][100:200], orders[0][200:]]
    assert [example.epoch for example in first] == [0] * 100 + [1] * 100 + [2] * 100
    assert all(sorted(epoch) == sorted(questions(single, range(100))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, sorted(epochs[0])]}) == 4
    assert orders[0] == orders[1] != orders[2]
    assert [example.question_id for example in first] == [int(question[:-1]) for question in orders[0]]


@pytest.mark.parametrize(("form", "shards", "num_workers"), [(turns, 9, 2), (turns, 1, 2), (single, 3, 0)])
def test_a_resumed_loader_goes_on_at_the_next_question(tmp_path, form, shards, num_workers):
    """In the middle of a window, at its end, in the next epoch; and when it was resumed before."""
    source = write(tmp_path / "set", form, shards=shards)
    whole = list(islice(loader(source, num_workers=num_workers), 60))
    for stops in ([1], [3, 5], [20, 16]):
        state, batches = None, []
        for stop in [*stops, 60 - sum(stops)]:
            part = loader(source, num_workers=num_workers)
            if state:
                part.load_state_dict(state)
            batches += islice(part, stop)
            state = part.state_dict()
        assert batches == whole
    assert whole[-1][0][0] > 0


def test_a_stream_in_another_order_is_refused(tmp_path):
    """Whatever decides it; and not the folder that it lies in."""
    trainer = Trainer(max_steps=10, logger=False, accelerator="cpu")

    for folder, shards in (("a", 4), ("b", 4), ("c", 3)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "set", turns, shards=shards)

    def part(folder="a", **options):
        questions = StreamedQuestions(stream(str(tmp_path / folder / "set")), **options)
        return StreamLoader(questions, trainer, batch_size=4, collate_fn=visits)

    list(islice(begun := part(), 3))
    state = begun.state_dict()
    part("b").load_state_dict(state)
    for options, differing in (
        ({"seed": 1}, r"data.seed 0, here 1$"),
        ({"questions_per_page": 2}, r"data.questions_per_page 1, here 2$"),
        ({"held_out": ["0-1"]}, r"held-out pages 0 \(\w+\), here 1 \(\w+\)$"),
        ({"folder": "c"}, r"data.source set train, 4 files, here set train, 3 files$"),
    ):
        with pytest.raises(InputError, match=rf"stream had another order, resume with the same: {differing}"):
            part(**options).load_state_dict(state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_whose_rows_have_changed_is_refused(tmp_path, num_workers):
    """The files keep their names and number, and the new rows are in the window in which the fit stopped."""

    def part():
        return loader(source, num_workers=num_workers)

    def other(number):
        return {**single(number), "question": f"{number} again?"}

    source = write(tmp_path / "set", single, shards=2)
    list(islice(begun := part(), 3))
    state = begun.state_dict()
    write(tmp_path / "set", other, shards=2)
    resumed = part()
    resumed.load_state_dict(state)
    with pytest.raises(InputError, match="set train: its rows aren't those that the checkpoint's fit has read"):
        next(iter(resumed))


def test_an_earlier_versions_place_in_a_stream_is_refused(tmp_path):
    questions = StreamedQuestions(stream(write(tmp_path / "set", turns)))
    part = StreamLoader(questions, Trainer(max_steps=10, logger=False, accelerator="cpu"), collate_fn=visits)
    with pytest.raises(InputError, match=r"read by an earlier version, .*: resume with that version, or train anew"):
        part.load_state_dict({"num_workers": 0, "ranks": part.state_dict()["ranks"]})


def test_another_epoch_of_the_trainers_goes_on(tmp_path):
    source = write(tmp_path / "set", turns, shards=4)
    trainer = Trainer(max_steps=10, logger=False, accelerator="cpu")
    part = StreamLoader(StreamedQuestions(stream(source)), trainer, batch_size=4, num_workers=2, collate_fn=visits)
    assert len(part) == 10
    assert [*islice(part, 7), *islice(part, 5)] == list(islice(loader(source), 12))


def resume_as_rank(rank, source, file):
    """Read as one of two ranks; both resume from what the first one saved, as Lightning does it."""
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=2)
    trainer = Trainer(max_steps=10, logger=False, accelerator="cpu", devices=2, strategy="ddp")

    def part():
        questions = StreamedQuestions(stream(source), rank, 2)
        return StreamLoader(questions, trainer, batch_size=4, num_workers=2, collate_fn=visits)

    batches = iter(running := part())
    read = list(islice(batches, 18))  # into the second window, whose place depends on the first one's questions
    state = running.state_dict()
    if rank == 0:
        torch.save(state, file)
    torch.distributed.barrier()
    (resumed := part()).load_state_dict(torch.load(file, weights_only=True))
    rest = list(islice(batches, 5))
    assert list(islice(resumed, 5)) == rest
    file.with_suffix(f".{rank}").write_text("\n".join(question for batch in read + rest for _, question, _ in batch))


def test_a_checkpoint_of_the_first_rank_says_where_all_ranks_are(tmp_path):
    source, file = write(tmp_path / "set", turns, rows=400, shards=5), tmp_path / "state"
    torch.multiprocessing.start_processes(resume_as_rank, (source, file), nprocs=2, start_method="fork")
    first, second = (set(file.with_suffix(f".{rank}").read_text().splitlines()) for rank in range(2))
    assert len(first) == len(second) == 92 and not first & second


def test_questions_on_a_page_follow_one_another_and_share_its_images(tmp_path):
    source = write(tmp_path / "set", turns)
    examples = list(islice(StreamedQuestions(stream(source), questions_per_page=2), 199))
    runs = [list(run) for _, run in groupby(examples, key=lambda example: example.page_id)]
    lengths = Counter(len(run) for run in runs)
    # Of pages with one, two and three questions: 1, 2 and 2 + 1. Few runs happen to meet.
    assert lengths[2] > 55 and lengths[3] < 8
    pairs = [run for run in runs if len(run) == 2]
    assert all(first.images[0] is second.images[0] for first, second in pairs)
    assert {len(example.images) for example in examples} == {2}


def test_a_saved_folder_is_streamed(tmp_path):
    rows = datasets.Dataset.from_list([single(number) for number in range(20)]).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "set"))
    examples = list(islice(StreamedQuestions(stream(str(tmp_path / "set"))), 20))
    assert {example.question for example in examples} == set(questions(single, range(20)))


@pytest.fixture
def data(tiny):
    """Open a stream for the first steps of a fit."""

    def data(source, stage="fit", max_steps=2, **options):
        options = {"limit_val": 5, "image_size": 112, "num_workers": 0} | options
        module = DocVQADataModule(source, tiny, streaming=True, **options)
        module.trainer = Trainer(max_steps=max_steps, logger=False, accelerator="cpu")
        module.setup(stage)
        return module

    return data


def test_of_the_split_that_is_trained_on_the_first_questions_are_validated_on(data, tmp_path):
    """As a source with a validation and a test split alone has it."""
    source = write(tmp_path / "set", single, split="validation")
    module = data(write(tmp_path / "set", single, split="test"), train_split="validation")
    scored = {page for page_ids in module.examples["val"].page_ids for page in page_ids}
    assert source and scored and module.train_dataloader().dataset.held_out == scored


@pytest.mark.parametrize("form", [turns, single])
def test_the_first_questions_are_validated_on_and_their_pages_left_out(data, tmp_path, form):
    source = write(tmp_path / "set", form, shards=9)
    module = data(source)
    held_out = [module.examples["val"][i] for i in range(5)]
    assert [example.question for example in held_out] == questions(form, range(100))[:5]
    assert sum(len(batch.prompts.references) for batch in module.val_dataloader()) == 5
    trained = list(islice(module.train_dataloader().dataset, 300))
    assert data(source, val_in_fit=2).train_dataloader().dataset.held_out == {
        page for e in held_out for page in e.page_id
    }
    # Rows 0 to 2 with 6 questions, of which 5 are scored; pages 0 and 1 with 3 questions each.
    rest = questions(form, range(100))[6:]
    assert Counter(example.question for example in trained if example.epoch == 0) == Counter(rest)


def test_a_validation_and_a_test_split_are_read_from_the_front(data, tmp_path):
    source = write(tmp_path / "set", turns, shards=2)
    for split in ("validation", "test"):
        write(tmp_path / "set", turns, shards=2, rows=10, split=split)
    module = data(source, limit_test=7)
    assert len(module.examples["val"]) == 5
    epoch = [example for example in islice(module.train_dataloader().dataset, 300) if example.epoch == 0]
    assert len(epoch) == len(questions(turns, range(100)))
    test = data(source, "test", limit_test=7).examples["test"]
    assert [test[i].question for i in range(7)] == questions(turns, range(10))[:7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit_val": None}, r"data.limit_val is missing: say how many"),
        ({"stage": "test"}, r"data.limit_test is missing: say how many"),
        ({"max_steps": -1}, r"trainer.max_steps is missing: a stream has no end"),
        ({"limit_train": 5}, r"data.limit_train: a stream is trained on for trainer.max_steps steps: leave it out"),
        ({"columns": {"question": "nope"}}, r"has no column 'nope' for question; it has images, texts"),
    ],
)
def test_a_missing_or_wrong_option_is_named(data, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        data(write(tmp_path / "set", turns), **options)


@pytest.mark.parametrize("name", ["synthetic:form", "docvqa"])
def test_what_can_not_be_streamed_is_named(data, docvqa, name):
    with pytest.raises(InputError, match=r"can't be streamed, and needn't be: leave data.streaming out"):
        data(str(docvqa) if name == "docvqa" else name)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        (
            turns,
            {"images": [{"bytes": b"no image", "path": None}]},
            r"set train, row 49 of shard 1, question 0: the row",
        ),
        (turns, {"images": []}, r"set train, row 49 of shard 1, question 0: no image in column 'images'"),
        (turns, {"texts": None}, r"set train, row 49 of shard 1: 'texts' is no list of user's and assistant's texts"),
        (single, {"question": None}, r"set train, row 49 of shard 1: no question in column 'question'"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_row_that_can_not_be_read_is_named(tmp_path, form, changes, message, world_size):
    """Also where ranks share a shard: row 49 is the second one's."""
    source = write(tmp_path / "set", form, shards=2, **changes)
    with pytest.raises(InputError, match=message):
        list(islice(StreamedQuestions(stream(source), 49 % world_size, world_size), 200))


def test_a_bad_row_among_the_first_is_known(tmp_path):
    source = write(tmp_path / "set", single, rows=3, question=" ")
    rows = stream(source).first(3)
    assert rows.faults == {2: f"{source} train, row 2: no question in column 'question': drop the row"}
    assert (rows.answers, rows[0].question) == ([["a", "b"], ["a", "b"], []], "0?")
    with pytest.raises(InputError, match=r"row 2: no question in column"):
        rows[2]


def test_texts_of_mixed_kinds_are_streamed(tmp_path):
    """`datasets` stores them as JSON."""
    mixed = [{"question": q, "answers": ["a", 5], "image": PAGE} for q in ("What?", 1976)]
    made = datasets.Dataset.from_list(mixed, on_mixed_types="use_json").cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "set"))
    rows = stream(str(tmp_path / "set")).first(2)
    assert [(row.question, row.answers) for row in (rows[0], rows[1])] == [("What?", ["a", "5"]), ("1976", ["a", "5"])]


def test_a_broken_file_is_named(tmp_path):
    source = write(tmp_path / "set", turns, shards=2)
    file = tmp_path / "set" / "train-00001-of-00002.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:50] + b"\0" * 2000 + content[2050:])
    with pytest.raises(InputError, match=r"set train, shard 1, window 0 of 16 rows: can't be read"):
        list(islice(StreamedQuestions(stream(source)), 200))
    with pytest.raises(InputError, match=r"set train, shard 1: can't be read"):
        stream(source).first(200)


def test_more_consumers_than_rows_are_refused(tmp_path):
    source = write(tmp_path / "set", turns, rows=3)
    assert next(iter(StreamedQuestions(stream(source), 2, 4)))
    with pytest.raises(InputError, match=r"set train: no question is left to train on for one of 4 workers: lower"):
        next(iter(StreamedQuestions(stream(source), 3, 4)))


def flags(tiny, source, *more):
    """Four steps of two batches, a checkpoint each."""
    flags = ["--model.pretrained", tiny, "--data.source", source, "--data.streaming", "true", "--data.limit_val", 5]
    flags += ["--data.image_size", 112, "--data.num_workers", 2, "--data.questions_per_page", 2]
    flags += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--model.max_new_tokens", 4]
    flags += ["--model.lr", "1e-2", "--model.warmup_steps", 0, "--trainer.max_steps", 4]
    flags += ["--trainer.accumulate_grad_batches", 2, "--trainer.callbacks+=ModelCheckpoint"]
    flags += ["--trainer.callbacks.save_top_k", -1, "--trainer.callbacks.every_n_train_steps", 1]
    return ["fit", *flags, *more]


def checkpoints(folder, run):
    return folder / "lightning_logs" / f"version_{run}" / "checkpoints"


def assert_same_end(folder):
    """The first two runs ended in the same adapter, which isn't the one that the second began with."""
    whole, resumed = (torch.load(checkpoints(folder, i) / "epoch=0-step=4.ckpt", weights_only=True) for i in (0, 1))
    begun = torch.load(checkpoints(folder, 0) / "epoch=0-step=3.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert not all(torch.equal(value, begun[name]) for name, value in whole["state_dict"].items())


def test_the_saved_config_has_the_number_of_workers(run, tiny, tmp_path, monkeypatch):
    """On which the order of a stream depends; by default it is that of the cores."""
    monkeypatch.setattr("idefics_lit.data.datamodule.suggested_max_num_workers", lambda _: 1)
    source = write(tmp_path / "set", turns, shards=3)
    folder = run(*flags(tiny, source, "--data.num_workers", "null", "--trainer.max_steps", 1))
    config = yaml.safe_load(next(folder.rglob("config.yaml")).read_text())
    assert config["data"]["num_workers"] == 1


@pytest.mark.slow
def test_a_resumed_fit_ends_in_the_same_adapter(run, tiny, tmp_path, capsys):
    source = write(tmp_path / "set", turns, shards=3)
    folder = run(*flags(tiny, source))
    middle = checkpoints(folder, 0) / "epoch=0-step=3.ckpt"
    run(*flags(tiny, source, "--ckpt_path", middle))
    assert_same_end(folder)
    with pytest.raises(SystemExit):
        run(*flags(tiny, source, "--ckpt_path", middle, "--data.num_workers", 1))
    assert "stream had another order, resume with the same: data.num_workers 2, here 1" in capsys.readouterr().err
    source = write(tmp_path / "broken", turns, rows=8, images=[{"bytes": b"no image", "path": None}])
    with pytest.raises(SystemExit):
        run(*flags(tiny, source))
    assert "broken train, row 7, question " in (error := capsys.readouterr().err)
    assert ": the row can't be read: cannot identify image" in error

"""A user's mistake ends in one line that names it, and exit code 2."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from idefics_lit.model.tiny import build_tiny

CPU = (
    *("--trainer.accelerator", "cpu"),
    *("--trainer.precision", "32-true"),
    *("--trainer.max_steps", "1"),
    *("--trainer.enable_progress_bar", "false"),
    *("--trainer.num_sanity_val_steps", "0"),
    *("--trainer.limit_val_batches", "1"),
    *("--model.quantization", "none"),
    *("--model.max_new_tokens", "1"),
    *("--data.num_workers", "0"),
)
REAL = Path(__file__).parents[1] / "assets" / "docvqa-public-domain"
ROW = {"questionId": 1, "question": "What?", "image": "p.png", "answers": ["a"]}


def match(pattern, line):
    assert re.search(pattern, line), line


@pytest.fixture
def fails(run, capfd):
    """Run a command that ends in exit code 2 and one line on standard error; returns the line."""

    def fails(*args):
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(*args)
        assert caught.value.code == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if line and "%|" not in line]  # no progress bars
        assert [line[:7] for line in lines] == ["error: "], lines
        return lines[0]

    return fails


@pytest.fixture
def fit_fails(fails, tiny):
    """Run a fit of the tiny model that fails; returns the line."""
    return lambda *args: fails("fit", "--model.pretrained", tiny, *CPU, *args)


@pytest.fixture
def folder(tmp_path):
    """Write an official folder of one good row and one that is changed; None drops a key."""

    def write(**changes):
        row = {key: value for key, value in {**ROW, "questionId": 2, **changes}.items() if value is not None}
        folder = tmp_path / "data"
        folder.mkdir()
        Image.new("L", (40, 30), 255).save(folder / "p.png")
        Image.new("L", (40, 30), 255).save(tmp_path / "outside.png")
        (folder / "broken.png").write_bytes((folder / "p.png").read_bytes()[:60])
        (folder / "val.json").write_text(json.dumps({"data": [ROW]}))
        (folder / "train.json").write_text(json.dumps({"data": [ROW, row]}))
        return folder

    return write


def test_a_jobs_wrong_environment(fit_fails, monkeypatch):
    for name, value in {"NTASKS": "2", "JOB_NAME": "fit", "PROCID": "0", "JOB_ID": "17"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    match("trainer: You set `--ntasks=2` .*`--ntasks-per-node=2`", fit_fails("--data.source", "synthetic"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "--config", "nope.yaml"], "config: File does not exist: .*nope.yaml"),
        (["fit"], "data.source is missing: give --config FILE, or"),
        (["fit", "--data.sorce", "x"], "no option data.sorce, did you mean data.source?"),
        (["fit", "--model.lr", "fast"], "model.lr: Expected a float. Got value: fast"),
        (["fit", "--model.quantization", "int8"], r"model.quantization: .*'nf4', 'none'.* Got value: int8"),
        (
            [
                "fit",
                "--data.source",
                "synthetic",
                "--model.cuda_graphs",
                "true",
                "--model.gradient_checkpointing",
                "true",
            ],
            "model.cuda_graphs can't capture model.gradient_checkpointing: leave one",
        ),
        (["fit", "--trainer.precision", "12"], "trainer.precision: Expected one of .*Got value: 12"),
        (["fit", "--data.columns", "x"], r"data.columns: Expected one of dict\[str, str\], NoneType. Got value: x"),
        (["fti"], "invalid choice: 'fti' .*'fit', 'validate', 'test', 'predict'"),
    ],
)
def test_command_line(fails, args, message):
    match(message, fails(*args))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {sorce: x}", "no option data.sorce, did you mean data.source?"),
        ("model: {lora: {rank: 2}}", "no option model.lora.rank"),
        ("model: {lr: fast}", "model.lr: Expected a float. Got value: fast"),
        ("data: [", "Problems parsing config: .* line "),
        ("model: {lora: null}", "model.lora is null: give its options, or leave it out"),
        ("trainer: null", "trainer is null: give its options, or leave it out"),
        ("", "Unexpected config"),
    ],
)
def test_config_file(fails, tmp_path, text, message):
    (tmp_path / "my.yaml").write_text(text)
    match(message, fails("fit", "--config", "my.yaml"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.source", "nobody/nothing"], "data.source 'nobody/nothing' is no file or folder here, nor a data set"),
        (["--data.source", "synthetic:poem"], "poem"),
        (["--data.val_split", "dev"], "no split 'dev', it has train, val: choose with --data.train_split"),
        (["--data.max_length", "20"], "train.json, row .*: .* tokens are more than 20: shorten the question, or"),
        (["--data.image_size", "5000"], "data.image_size 5000: choose from 14 to 448"),
        (["--data.batch_size", "0"], "data.batch_size 0: must be 1 or more"),
        (["--data.batch_size", "-2"], "data.batch_size -2: must be 1 or more"),
        (["--data.num_workers", "-1"], "data.num_workers -1: must be 0 or more"),
        (["--data.limit_train", "0"], "data.limit_train 0: must be 1 or more"),
        (["--data.seed", "1" + "0" * 18], "data.seed 10{18}: must be a number of at most 18 digits"),
        (["--data.held_out", "1.5"], "data.held_out 1.5: must be a fraction between 0 and 1"),
        (["--model.lora.target_modules", "nothing"], "model.lora: Target modules nothing not found"),
        (
            ["--model.lora.target_modules", "(q_proj"],
            r"model.lora.target_modules '\(q_proj' is not a regular expression",
        ),
        (["--model.lora.r", "0"], "model.lora: .*r.* should be a positive integer"),
        (["--trainer.precision", "16-mixed"], "trainer.precision 16-mixed needs a GPU: give --trainer.precision bf16-"),
        (["--trainer.precision", "64-true"], "trainer.precision 64-true: choose one of 16-mixed, bf16-mixed, 32-true"),
        (["--model.pretrained", "no/where"], "model.pretrained 'no/where': no processor can be loaded .* give a Hub"),
        (["--trainer.logger.init_args.save_dir", "file/logs"], "the output folder file/logs can't be written: "),
        (["--trainer.logger", "false", "--trainer.default_root_dir", "file/logs"], "the output folder file/logs can't"),
        (["--model.weight_decay", "-1"], "model.weight_decay -1.0: give 0 or more"),
        (["--model.lora.alpha", "0"], "model.lora.alpha 0: give more than 0"),
        (["--model.schedule", "step"], r"model.schedule: Expected a Literal\['linear', 'cosine'\]. Got value: step"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches 0: give 1 or more"),
        (["--trainer.val_check_interval", "0"], "trainer.val_check_interval 0: give 1 or more batches"),
        (["--trainer.val_check_interval", "100"], r"`val_check_interval` \(100\) must be less than or equal to the"),
        (["--trainer.max_steps", "-5"], "`max_steps` must be a non-negative integer or -1"),
        (["--trainer.devices", "-3"], "trainer: `devices` selected with `CPUAccelerator` should be an int > 0"),
        (["--seed_everything", "-4"], "-4 is not in bounds"),
        (["--ckpt_path", "best"], "`ModelCheckpoint` is not configured to save the best model"),
        (["--ckpt_path", "nope.ckpt"], "ckpt_path nope.ckpt: no such file"),
        (["--ckpt_path", "file"], "ckpt_path file: not a checkpoint of this program, or a damaged one"),
        (["--ckpt_path", "."], "ckpt_path .: not a checkpoint of this program, or a damaged one"),
    ],
)
def test_options(fit_fails, tmp_path, args, message):
    (tmp_path / "file").write_text("not a folder")
    match(message, fit_fails("--data.source", REAL, *args))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"questionId": None}, "train.json, row 1 .*: no 'questionId': add it or drop the row"),
        ({"question": None}, r"train.json, row 1 \(questionId 2, image p.png\): no 'question'"),
        ({"image": None}, r"train.json, row 1 \(questionId 2, .*: no 'image'"),
        ({"answers": None}, r"train.json, row 1 \(questionId 2, .*: no answer: add one or drop the row"),
        ({"answers": []}, r"train.json, row 1 \(questionId 2, .*: no answer: add one or drop the row"),
        ({"image": "q.png"}, r"train.json, row 1 \(questionId 2, image q.png\): the image file is missing"),
        ({"image": "../outside.png"}, r"row 1 \(questionId 2, image ../outside.png\): the image lies outside"),
        ({"image": "broken.png"}, r"row 1 \(questionId 2, image broken.png\): the image can't be read"),
        ({"question": "What is <image>?"}, r"row 1 \(questionId 2, .*holds one of the model's special tokens: reword"),
        ({"answers": ["<end_of_utterance>"]}, r"row 1 \(questionId 2, .*holds one of the model's special tokens: rew"),
        ({"question": "a" * 4100}, r"row 1 \(questionId 2, .* tokens are more than 2048: shorten the question, or"),
        ({"question": " \n"}, r"train.json, row 1 \(questionId 2, image p.png\): no 'question'"),
        ({"question": "\ud800"}, r"row 1 \(questionId 2, .*'question' holds '\\ud800', a character that is no text"),
        ({"question": ["What?"]}, r"row 1 \(questionId 2, .*'question' holds list where a text should be: mend it or"),
        ({"answers": [None, float("nan"), " "]}, r"row 1 \(questionId 2, .*: no answer: add one or drop the row"),
        ({"answers": [{"text": "a"}]}, r"row 1 \(questionId 2, .*'answers' holds dict where a text should be: mend it"),
        ({"image": {"path": "p.png"}}, r"row 1 \(questionId 2, .*'image' holds dict where a text should be: mend it"),
        ({"image": "a" * 5000}, r"row 1 \(questionId 2, image a{100}\): the image file is missing"),
    ],
)
def test_rows(fit_fails, folder, changes, message):
    match(message, fit_fails("--data.source", folder(**changes)))


def test_a_bad_page_met_by_a_worker(fit_fails, folder):
    args = ("--data.source", folder(image="broken.png"), "--data.num_workers", "2")
    match(r"row 1 \(questionId 2, image broken.png\): the image can't be read", fit_fails(*args))


def test_a_question_longer_than_the_model_takes(fit_fails, folder):
    args = ("--data.source", folder(question="a" * 4100), "--data.max_length", "9999")
    match(r"4\d\d\d tokens, but .* takes 4096", fit_fails(*args))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "data.source .* is no folder that can be read"),
        ('{"data": [{"questionId": 1, "que', "train.json: not a readable JSON file .*: fetch it again"),
        ('[{"questionId": 1}]', "train.json: no column for question among questionId"),
        ('{"data": []}', "data.source .*: split 'train' is empty"),
    ],
)
def test_json(fit_fails, tmp_path, text, message):
    (tmp_path / "data").mkdir()
    if text:
        (tmp_path / "data" / "train.json").write_text(text)
    match(message, fit_fails("--data.source", "data"))


@pytest.mark.parametrize(
    ("change", "args", "message"),
    [
        ({}, ["--data.columns.question", "ask"], "data.columns: data train has no column 'ask' for question; it has"),
        ({}, ["--data.columns", "{ask: query}"], "data.columns names 'ask', but an example's fields are question_id"),
        ({"query": None}, [], "data train, row 1: no question in column 'query'"),
        ({"image": None}, [], "data train, row 1: no image in column 'image'"),
        ({"answers": []}, [], "data train, row 1: no answer: add one or drop the row"),
        ({"id": None}, [], "data train, row 1: no question_id in column 'id'"),
        ({"image": {"bytes": b"cut", "path": None}}, [], "data train, row 1: the row can't be read: cannot identify"),
        ({"image": {"bytes": b"", "path": None}}, [], "data train, row 1: the row can't be read: cannot identify"),
        ({"query": " "}, [], "data train, row 1: no question in column 'query'"),
    ],
)
def test_data_sets(fit_fails, tmp_path, change, args, message):
    Image.new("L", (40, 30), 255).save(tmp_path / "p.png")
    row = {"id": 1, "query": "What?", "answers": ["a"], "image": {"bytes": (tmp_path / "p.png").read_bytes()}}
    row["image"]["path"] = None
    rows = datasets.Dataset.from_list([row, {**row, **change}]).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": rows, "validation": rows.select([0])}).save_to_disk(tmp_path / "data")
    match(message, fit_fails("--data.source", "data", *args))


def test_a_tokeniser_longer_than_the_embedding(fit_fails, tmp_path):
    build_tiny(tmp_path / "base")
    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    processor.tokenizer.add_tokens(["<more>"])
    processor.save_pretrained(tmp_path / "base")
    args = ("--data.source", REAL, "--model.pretrained", "base")
    match("model.pretrained 'base': its tokenizer has 265 tokens but its embedding only 264 rows", fit_fails(*args))


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    """A checkpoint of rank 2 and alpha 4."""
    from idefics_lit.cli.main import main

    folder = tmp_path_factory.mktemp("run")
    flags = ["--model.lora.r", "2", "--model.lora.alpha", "4", "--trainer.logger.init_args.save_dir", str(folder)]
    main(["fit", "--model.pretrained", tiny, "--data.source", str(REAL), *CPU, *flags])
    return next(folder.rglob("*.ckpt"))


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("code-ran",)


def cut(path):
    path.write_bytes(path.read_bytes()[:3000])


def pickled(path):
    path.write_bytes(pickle.dumps(RunsCode()))


def saved_with_code(path):
    torch.save({"state_dict": {}, "extra": RunsCode()}, path)


def of_another_program(path):
    torch.save({"weights": torch.zeros(1)}, path)


def changed(**changes):
    def change(path):
        torch.save({**torch.load(path, weights_only=True), **changes}, path)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        *(cut, pickled, saved_with_code, of_another_program),
        *(
            changed(hyper_parameters=value)
            for value in (None, [1], {"hidden": 3}, {"pretrained": "tiny", "lora": None})
        ),
        *(changed(base=value) for value in ({}, "x", {"names": ["a"], "values": 3, "dtype": "F32", "revision": None})),
        *(changed(loops=value) for value in (None, {}, {"fit_loop": {}}, "x")),
        *(changed(datamodule_hyper_parameters=None), changed(state_dict=None), changed(state_dict={"lora_A": "x"})),
    ],
)
def test_damaged_checkpoints(fit_fails, checkpoint, tmp_path, damage):
    path = tmp_path / "my.ckpt"
    path.write_bytes(checkpoint.read_bytes())
    damage(path)
    match("ckpt_path my.ckpt: not a checkpoint of this program, or a damaged one", fit_fails("--ckpt_path", "my.ckpt"))
    assert not (tmp_path / "code-ran").exists()


LOOPS = ("state_dict", "epoch_loop.state_dict", "epoch_loop.batch_progress", "epoch_progress")


def changed_loop(name, value):
    def change(path):
        checkpoint = torch.load(path, weights_only=True)
        assert name in checkpoint["loops"]["fit_loop"]
        checkpoint["loops"]["fit_loop"][name] = value
        torch.save(checkpoint, path)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        *(changed_loop(name, "x") for name in LOOPS),
        changed_loop("epoch_progress", {"total": {}}),
        *(changed(callbacks=value) for value in ("x", ["x"])),
        *(changed(optimizer_states=value) for value in ([{}], "x")),
        *(changed(lr_schedulers=value) for value in ("x", [3])),
        *(changed_loop("state_dict", {"combined_loader": value}) for value in (["x"], [{"made by": {}}])),
    ],
)
def test_a_damaged_state_of_training(fit_fails, checkpoint, tmp_path, damage):
    path = tmp_path / "my.ckpt"
    path.write_bytes(checkpoint.read_bytes())
    damage(path)
    line = fit_fails("--ckpt_path", "my.ckpt", "--trainer.max_steps", "9")
    match(r"ckpt_path my\.ckpt: .*damaged", line)


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("fit", ["--model.lora.r", "3"], r"another adapter, .*\(.*lora_A.*: \(2, \d+\) saved, \(3, \d+\) here"),
        ("fit", ["--model.lora.target_modules", ".*q_proj"], r"another adapter, .*\(.*lora.* saved, none here"),
        ("validate", ["--model.lora.alpha", "5"], "trained with model.lora.alpha 4, this run has 5"),
    ],
)
def test_checkpoints_of_another_adapter(fails, checkpoint, command, args, message):
    match(message, fails(command, "--ckpt_path", checkpoint, *CPU, *args))


def test_a_checkpoint_of_another_version(fit_fails, checkpoint, tmp_path):
    options = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    torch.save(torch.load(checkpoint, weights_only=True) | {"hyper_parameters": {**options, "new": 1}}, "my.ckpt")
    match(
        "ckpt_path my.ckpt: it was trained with model.new, which is no option here",
        fit_fails("--ckpt_path", "my.ckpt"),
    )


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("hyper_parameters", {"lr": "fast"}, "model.lr: Expected a float. Got value: fast"),
        ("datamodule_hyper_parameters", {"limit_val": "many"}, "data.limit_val: .*Got value: many"),
    ],
)
def test_a_checkpoint_with_an_invalid_option(fails, checkpoint, tmp_path, part, options, message):
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({**saved, part: {**saved[part], **options}}, tmp_path / "my.ckpt")
    line = fails("validate", "--ckpt_path", "my.ckpt", *CPU)
    match(f"ckpt_path my.ckpt: it was trained with an invalid option: {message}: the file is damaged", line)


def test_a_metric_that_is_not_logged(run, tiny, capfd):
    """It is known when the first validation has logged what there is; other text may stand before the line."""
    stopping = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/f1")
    with pytest.raises(SystemExit) as caught:
        run("fit", "--model.pretrained", tiny, *CPU, "--data.source", REAL, *stopping)
    assert caught.value.code == 2
    line = capfd.readouterr().err.splitlines()[-1]
    match("error: Early stopping conditioned on metric `val/f1` which is not available. .*`train/loss`", line)


def test_text_of_the_data_is_no_markup(run, tiny, folder, capfd):
    """In tables, and in the names of metrics that loggers and tables get."""
    source = folder(question_types=["[/list]", "[bold]x\ny"], question="[/q]?", answers=["[/a]"])
    shutil.copy(source / "train.json", source / "val.json")
    flags = ("--data.image_size", 112, "--trainer.val_check_interval", 1, "--data.val_in_fit", 2)
    written = run("fit", "--model.pretrained", tiny, *CPU, "--data.source", source, *flags)
    assert "[/list]" in capfd.readouterr().out
    names = next(written.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"val/anls_(/list)", "val/anls_(bold)x y"} <= set(names)


def test_debug_shows_the_traceback(run, monkeypatch):
    from idefics_lit.errors import InputError

    with pytest.raises(InputError, match=r"data.source is missing"):
        run("fit", "--debug")
    monkeypatch.setenv("IDEFICS_LIT_DEBUG", "1")
    with pytest.raises(InputError, match=r"data.source is missing"):
        run("fit")

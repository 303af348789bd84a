"""Which run a command resumes, and each run's own folder."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.loggers.csv_logs import CSVLogger as FabricCSVLogger
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment

from idefics_lit.errors import InputError
from idefics_lit.training.lightning_compat import CheckpointConnector

ROOT = Path(__file__).parents[2]
DOCVQA = ("--config", ROOT / "configs" / "docvqa.yaml")
ONE, OTHER = ("--model.lr", "0.01"), ("--model.lr", "0.05")
LAST = ("--ckpt_path", "last")
JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The checkpoint of a fit of one step, and its flags."""
    from idefics_lit.cli.main import main

    folder = tmp_path_factory.mktemp("trained")
    docvqa = Path(__file__).parents[1] / "assets" / "docvqa-public-domain"
    flags = ["--model.pretrained", tiny, "--model.quantization", "none", "--model.max_new_tokens", 2, *ONE]
    flags += ["--data.source", docvqa, "--data.image_size", 112, "--data.limit_train", 10, "--data.limit_val", 2]
    flags += ["--data.num_workers", 0, "--data.batch_size", 2, "--trainer.accelerator", "cpu"]
    flags += ["--trainer.max_steps", 1, "--trainer.num_sanity_val_steps", 0, "--trainer.limit_val_batches", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", *map(str, flags)])
    return next(folder.rglob("*.ckpt")).resolve(), flags


@pytest.fixture
def flags(trained, tmp_path, monkeypatch):
    """The flags, in a folder where the fit has been."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "lightning_logs/version_0/checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(trained[0], folder / "one.ckpt")
    return trained[1]


def changed(name, **parts):
    """Save what the fit saved, newer and changed: ``path`` is the new file's."""
    checkpoint = torch.load("lightning_logs/version_0/checkpoints/one.ckpt", weights_only=True)
    for key, value in parts.items():
        if value is None:
            checkpoint.pop(key, None)
        elif isinstance(value, dict):
            checkpoint[key] = {**checkpoint.get(key, {}), **value}
        else:
            checkpoint[key] = value
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, name)


def another(name):
    """Save a newer checkpoint of another fit, of another learning rate."""
    changed(name, hyper_parameters={"lr": 0.05}, experiment={"model.lr": 0.05})


MINE = "lightning_logs/version_0/checkpoints/one.ckpt"


def test_two_fits_in_one_folder_go_on_each_with_its_own(run, short_fit, capfd):
    every = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", 1)
    for options in (ONE, OTHER):
        folder = run(*short_fit(*every, *options, "--trainer.max_steps", 1))
    capfd.readouterr()
    run(*short_fit(*every, *ONE, "--trainer.max_steps", 2, *LAST))
    name = "checkpoints/epoch=0-step=1.ckpt"
    lines = capfd.readouterr().err.splitlines()
    assert f"skipped: lightning_logs/version_1/{name}: model.lr 0.05, here 0.01" in lines
    assert f"last checkpoint: lightning_logs/version_0/{name}" in lines
    (again,) = folder.glob("lightning_logs/version_2/checkpoints/*.ckpt")
    checkpoint = torch.load(again, weights_only=True)
    assert (checkpoint["global_step"], checkpoint["hyper_parameters"]["lr"]) == (2, 0.01)


@pytest.mark.parametrize(
    "more",
    [
        [
            "--trainer.max_steps",
            7,
            "--trainer.val_check_interval",
            2,
            "--data.num_workers",
            1,
            "--model.compile",
            "true",
        ],
        ["--data.batch_size", 1, "--trainer.accumulate_grad_batches", 2],
        [
            "--trainer.callbacks",
            '[{"class_path": "Timer"}, {"class_path": "ModelCheckpoint"}, {"class_path": "LearningRateMonitor"}, '
            '{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}]',
        ],
    ],
    ids=["how long and how fast", "less memory", "callbacks that change nothing"],
)
def test_what_may_change(in_effect, flags, more):
    another("lightning_logs/version_1/checkpoints/other.ckpt")
    assert in_effect("fit", *flags, *more, *LAST).ckpt_path == MINE


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--data.seed", 1], "data.seed 0, here 1"),
        (["--data.batch_size", 4], "data.global_batch_size 2, here 4"),
        (["--data.batch_size", "null"], "data.global_batch_size 2, here 16"),
        (["--trainer.devices", 2], "data.global_batch_size 2, here 4"),  # two batches a step instead of one
        (["--trainer.gradient_clip_val", 1], "trainer.gradient_clip_val None, here 1"),
        (["--seed_everything", 1], "seed_everything 0, here 1"),
        (
            ["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", 0.1],
            "trainer.callbacks none, here lightning.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.1, ",
        ),
        (
            ["--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling", "{0: 2}"],
            "trainer.callbacks none, here lightning.pytorch.callbacks.GradientAccumulationScheduler(",
        ),
        (["--model.lora.r", 4, "--model.lora.dropout", 0], "model.lora.r 8, here 4; model.lora.dropout"),
    ],
)
def test_what_makes_another_experiment(in_effect, flags, more, why, capfd):
    assert in_effect("fit", *flags, *more, *LAST).ckpt_path is None
    error = capfd.readouterr().err
    assert f"skipped: {MINE}: {why}" in error
    assert "no checkpoint in lightning_logs yet: the fit begins" in error


def test_an_older_version_wrote_it(in_effect, flags):
    changed(MINE, experiment=None)
    changed("lightning_logs/version_1/checkpoints/other.ckpt", experiment=None, hyper_parameters={"lr": 0.05})
    assert in_effect("fit", *flags, *LAST).ckpt_path == MINE


def test_a_version_that_is_given_names_the_run(in_effect, flags, monkeypatch):
    another("lightning_logs/a/checkpoints/other.ckpt")
    named = ("--trainer.logger.version", "a")
    assert in_effect("fit", *flags, *named, *LAST).ckpt_path == "lightning_logs/a/checkpoints/other.ckpt"
    another("logs/idefics_lit/b/checkpoints/other.ckpt")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb = ["--trainer.logger", "WandbLogger", "--trainer.logger.save_dir", "logs"]
    wandb += ["--trainer.logger.project", "idefics_lit"]
    found = [in_effect("fit", *flags, *wandb, *more, *LAST).ckpt_path for more in ((), ("--trainer.logger.id", "b"))]
    monkeypatch.setenv("WANDB_RUN_ID", "b")
    found.append(in_effect("fit", *flags, *wandb, *LAST).ckpt_path)
    assert found == [None, *["logs/idefics_lit/b/checkpoints/other.ckpt"] * 2]


def test_files_of_others_and_weights_alone_are_passed_over(in_effect, flags, capfd):
    changed("lightning_logs/version_1/checkpoints/weights.ckpt", optimizer_states=None)
    changed("lightning_logs/version_2/checkpoints/theirs.ckpt", hyper_parameters=None)
    changed("lightning_logs/version_3/checkpoints/none.ckpt", hyper_parameters=3)
    changed("lightning_logs/version_4/checkpoints/empty.ckpt", optimizer_states=[])
    changed("lightning_logs/version_5/checkpoints/list.ckpt", experiment=[1])
    Path("lightning_logs/graph.ckpt").write_bytes(b"a session of TensorFlow")
    with pytest.warns(UserWarning, match=r"theirs.ckpt: not a checkpoint of this program"):
        assert in_effect("fit", *flags, *LAST).ckpt_path == MINE
    error = capfd.readouterr().err
    assert "weights.ckpt: weights alone" in error and "empty.ckpt: weights alone" in error


def test_a_checkpoint_of_other_groups_or_of_an_unknown_prompt_is_refused(run, flags, capfd):
    states = torch.load(MINE, weights_only=True)["optimizer_states"]
    states[0]["param_groups"][0]["params"].pop()
    changed("groups.ckpt", optimizer_states=states)
    changed("prompt.ckpt", datamodule_hyper_parameters={"prompt_style": "new"})
    for command, file, why in (("fit", "groups", "optimizer has groups of ["), ("validate", "prompt", "prompt_style")):
        with pytest.raises(SystemExit):
            run(command, *flags, "--data.prompt_style", "recipe", "--ckpt_path", f"{file}.ckpt")
        assert why in capfd.readouterr().err.splitlines()[-1]


class Elsewhere(CSVLogger):
    def __init__(self, save_dir: str = "elsewhere") -> None:
        super().__init__(save_dir)


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("options", [{"new": 1}, {"lr": "fast"}])
def test_options_that_are_none_here_are_passed_over(in_effect, flags, command, options):
    changed("lightning_logs/version_1/checkpoints/theirs.ckpt", experiment=None, hyper_parameters=options)
    with pytest.warns(UserWarning, match=r"Skipped: ckpt_path .*theirs.ckpt: .*(model.new|model.lr)"):
        assert in_effect(command, *flags, *LAST).ckpt_path == MINE


def test_other_loggers_have_their_own_folders(in_effect, flags):
    """As Lightning's MLFlowLogger has, whose module isn't installed here."""
    logger = ("--trainer.logger", f"{Elsewhere.__module__}.Elsewhere")
    assert "save_dir" not in in_effect("fit", *flags, *logger).trainer.logger.init_args
    given = in_effect("fit", *flags, *logger, "--trainer.logger.save_dir", "mine")
    assert given.trainer.logger.init_args.save_dir == "mine"


def test_from_another_folder_with_relative_paths(in_effect, flags, tmp_path, monkeypatch, docvqa):
    flags = [*flags, "--data.source", docvqa.name]
    (tmp_path / docvqa.name).symlink_to(docvqa)
    assert in_effect("fit", *flags, *LAST).ckpt_path == MINE
    (tmp_path / "elsewhere" / docvqa.name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    logs = ("--trainer.logger.save_dir", "..")
    assert in_effect("fit", *flags, *logs, *LAST).ckpt_path is None  # another folder of that name
    flags[-1] = f"../{docvqa.name}"
    assert in_effect("fit", *flags, *logs, *LAST).ckpt_path == f"../{MINE}"


@pytest.mark.parametrize("logger", ["false", "true", "csv", "list"])
def test_wherever_runs_log(in_effect, flags, logger, tmp_path):
    """Without a logger, with the default by another name, in another folder, and with several."""
    options = {
        "false": "false",
        "true": "true",
        "csv": '{"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}',
    }
    options["list"] = f"[{options['csv']}]"
    folder = {"false": "", "true": "lightning_logs/version_0"}.get(logger, "logs/lightning_logs/version_0")
    changed(path := str(Path(folder, "checkpoints", "mine.ckpt")))
    if logger != "true":
        another("lightning_logs/version_0/checkpoints/newer.ckpt")
    assert in_effect("fit", *flags, "--trainer.logger", options[logger], *LAST).ckpt_path == path


def test_checkpoints_elsewhere(in_effect, flags):
    changed("elsewhere/mine.ckpt")
    folder = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath", "elsewhere"]
    assert in_effect("fit", *flags, *folder, *LAST).ckpt_path == "elsewhere/mine.ckpt"


def test_an_evaluation_is_told_which_of_two_experiments(in_effect, flags, capfd):
    assert in_effect("validate", *LAST).ckpt_path == MINE
    assert in_effect("validate", "--data.source", "synthetic", *LAST).ckpt_path == MINE
    another("lightning_logs/version_1/checkpoints/other.ckpt")
    capfd.readouterr()
    for command in ("validate", "fit"):
        with pytest.raises(SystemExit):
            in_effect(command, *LAST)
        other = "lightning_logs/version_1/checkpoints/other.ckpt"
        assert capfd.readouterr().err.splitlines()[-1] == (
            f"error: ckpt_path last: {other} or {MINE}? They belong to two experiments (model.lr 0.01, here 0.05): "
            f"give one of them as --ckpt_path"
        )
    assert in_effect("validate", *ONE, *LAST).ckpt_path == MINE
    options = in_effect("fit", *OTHER, *LAST)
    assert (options.ckpt_path, options.data.limit_train) == (other, 10)
    with pytest.raises(SystemExit):
        in_effect("fit", "--model.lr", 0.3, *LAST)


def test_slurms_checkpoint_is_its_runs_alone(run, in_effect, flags, monkeypatch, capfd):
    """With a logger too; another experiment's job begins, and an evaluation loads nothing that it isn't given."""
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(SLURMEnvironment, "_validate_srun_used", staticmethod(lambda: None))
    shutil.move(MINE, "hpc_ckpt_1.ckpt")
    assert in_effect("fit", *flags).ckpt_path == "hpc_ckpt_1.ckpt"
    assert in_effect("fit", *flags, *LAST).ckpt_path == "hpc_ckpt_1.ckpt"
    capfd.readouterr()
    folder = run("fit", *flags, *OTHER)
    assert "skipped: hpc_ckpt_1.ckpt: model.lr 0.01, here 0.05" in capfd.readouterr().err
    assert list(folder.rglob("*step=1.ckpt"))
    assert in_effect("validate", *flags).ckpt_path is None
    monkeypatch.setattr("idefics_lit.training.checkpoint.AtomicCheckpointIO.load_checkpoint", None)
    run("validate", *flags)


@pytest.mark.parametrize("more", [[], ["--data.source", "synthetic"]])
def test_a_job_that_is_queued_again_goes_on_from_what_it_saved(in_effect, flags, more, monkeypatch, capfd):
    """And not from the checkpoint that it began with; that names the source, or the command does."""
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    start = ("--ckpt_path", MINE)
    flags = [*flags, *more] if more else []  # else all of it is the checkpoint's
    flags += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    changed("hpc_ckpt_1.ckpt", experiment={"data.source": more[1]} if more else {})
    another("hpc_ckpt_2.ckpt")
    assert in_effect("fit", *flags, *start).ckpt_path == MINE
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert in_effect("fit", *flags, *start).ckpt_path == "hpc_ckpt_1.ckpt"
    assert "skipped: hpc_ckpt_2.ckpt: model.lr 0.05, here 0.01" in capfd.readouterr().err
    assert in_effect("validate", *flags, *start).ckpt_path == MINE
    with monkeypatch.context() as patch:
        patch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
        assert in_effect("fit", *flags, *start).ckpt_path is None  # rank 0 tells it
    os.utime(MINE)
    assert in_effect("fit", *flags, *start).ckpt_path == MINE


def test_rank_0_decides(in_effect, flags, monkeypatch, capfd):
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    assert in_effect("fit", *flags, *LAST).ckpt_path is None
    assert not capfd.readouterr().err
    loaded = []
    told = SimpleNamespace(
        broadcast=lambda _: "theirs.ckpt", load_checkpoint=lambda path, **_: loaded.append(path) or {}
    )
    connector = CheckpointConnector(SimpleNamespace(strategy=told))
    migrate = "lightning.pytorch.trainer.connectors.checkpoint_connector._pl_migrate_checkpoint"
    monkeypatch.setattr(migrate, lambda checkpoint, _: checkpoint)
    connector.resume_start(None)
    assert loaded == ["theirs.ckpt"]
    with pytest.raises(InputError, match=r"rank 0 found theirs.ckpt, this rank mine.ckpt"):
        connector.resume_start("mine.ckpt")


@pytest.mark.long
def test_both_ranks_go_on_with_it(two_ranks, tmp_path):
    options = ("--trainer.devices", "2", "--data.limit_val", "4")
    first = two_ranks(tmp_path, *options, "--trainer.max_steps", "2", *LAST)
    assert first.end() == [0, 0], first.printed()
    again = two_ranks(tmp_path, *options, "--trainer.max_steps", "4", *LAST)
    assert again.end() == [0, 0], again.printed()
    path = "lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt"
    assert again.printed().count(f"last checkpoint: {path}") == 1
    assert f"Restored all states from the checkpoint at {path}" in again.printed()
    assert (tmp_path / "lightning_logs/version_1/checkpoints/epoch=0-step=4.ckpt").exists()


def init_args(options):
    return options.trainer.logger.init_args


def test_a_logger_inherits_nothing_from_the_default_one(in_effect, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb = init_args(in_effect("fit", *DOCVQA, "--trainer.precision", "32-true"))
    assert (wandb.name, wandb.project, wandb.save_dir) == (None, "idefics_lit", "lightning_logs")
    for name in ("CSVLogger", "TensorBoardLogger"):
        inside = init_args(in_effect("fit", *DOCVQA, "--trainer.precision", "32-true", "--trainer.logger", name))
        alone = init_args(in_effect("fit", "--data.source", "synthetic", "--trainer.logger", name))
        folders = [Path(args.save_dir, args.name) for args in (inside, alone)]
        assert folders == [Path("lightning_logs")] * 2


def racing(patch):
    """Let another command take the number that one has seen to be free."""
    taken, next_version = [], FabricCSVLogger._get_next_version

    def race(logger):
        number = next_version(logger)
        if not taken:
            taken.append(Path(logger.root_dir, f"version_{number}"))
            taken[0].mkdir(parents=True)
        return number

    patch.setattr(FabricCSVLogger, "_get_next_version", race)
    return taken


@pytest.mark.parametrize("command", ["predict", "validate", "test"])
def test_two_commands_at_once_have_a_folder_each(run, flags, command):
    with pytest.MonkeyPatch.context() as patch:
        taken = racing(patch)
        folder = run(command, *flags, "--data.test_split", "val", "--data.limit_test", 2)
    assert taken == [Path("lightning_logs/version_1")] and not list(taken[0].iterdir())
    names = {"predict": "submission.json", "validate": "val_predictions.jsonl", "test": "test_predictions.jsonl"}
    assert (folder / "lightning_logs/version_2" / names[command]).exists()


@pytest.mark.parametrize(("command", "file"), [("predict", "submission.json"), ("validate", "val_predictions.jsonl")])
def test_without_a_logger_answers_are_not_replaced(run, flags, command, file, tmp_path, capfd):
    args = [command, *flags, "--data.test_split", "val", "--data.limit_test", 2, "--trainer.logger", "false"]
    run(*args)
    answers = (tmp_path / file).read_bytes()
    with pytest.raises(SystemExit):
        run(*args, "--data.limit_test", 1, "--data.limit_val", 1)
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / file} holds the answers of another run: move it away, or give another")
    assert (tmp_path / file).read_bytes() == answers
    run(*args, "--trainer.default_root_dir", "other")
    assert (tmp_path / "other" / file).read_bytes() == answers


def test_check_too_and_it_leaves_no_empty_one(run, flags, monkeypatch, tmp_path, docvqa):
    run("check", *flags)
    assert not Path("lightning_logs/version_1").exists()
    shutil.copytree(docvqa, tmp_path / "broken")
    for page in (tmp_path / "broken" / "documents").iterdir():
        page.write_bytes(b"")
    for options in ([], [*DOCVQA]):
        with pytest.raises(SystemExit):
            run("check", *options, *flags, "--data.source", "broken", "--data.val_split", "val")
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("check.txt"))
    assert found == ["lightning_logs/version_1/check.txt", "lightning_logs/version_2/check.txt"]

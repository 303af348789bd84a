"""A full disk and runs in one folder: what was there stays, and one line says why."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from idefics_lit.errors import InputError
from idefics_lit.model.feature_cache import FolderCache
from idefics_lit.utils.files import replacing


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of so many KiB; where that isn't permitted there is nothing to test on."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def small_disk(kilobytes):
        if not shutil.which("mount") or os.geteuid() != 0:
            pytest.skip("a file system can be mounted by root alone")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr}")
        return folder

    yield small_disk
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


def test_what_killed_writers_leave_is_removed_when_it_is_old(tmp_path):
    left = [tmp_path / f"step={number}.ckpt.{number:016x}.tmp" for number in range(2)]
    others = tmp_path / "notes.tmp"
    for file in (*left, others):
        file.touch()
    for file in (left[0], others):
        os.utime(file, (0, 0))
    with replacing(tmp_path / "step=2.ckpt") as file:
        file.write(b"2")
    assert sorted(tmp_path.iterdir()) == sorted([left[1], others, tmp_path / "step=2.ckpt"])


def every_step(*more):
    flags = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps", 1]
    return [*flags, "--trainer.callbacks.save_top_k", -1, *more]


def checkpoints(folder):
    return sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def test_a_full_disk_leaves_the_last_good_checkpoint(run, short_fit, small_disk, capfd):
    """The disk holds two and a half checkpoints of 1.3 MB: the fit fails at the third, and resumes with more room."""
    disk = small_disk(3300)
    args = short_fit(*every_step("--trainer.logger", "false", "--trainer.default_root_dir", disk))
    with pytest.raises(SystemExit) as caught:
        run(*args)
    assert caught.value.code == 2
    assert (
        capfd.readouterr()
        .err.splitlines()[-1]
        .endswith(
            "step=3.ckpt can't be written: No space left on device; no file is left: free disk space, then resume with "
            "--ckpt_path last"
        )
    )
    assert {path.suffix for path in (disk / "checkpoints").iterdir()} == {".ckpt"}
    kept = checkpoints(disk)
    assert [torch.load(path, weights_only=True)["global_step"] for path in kept] == [1, 2]
    subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
    run(*args, "--ckpt_path", "last")
    assert torch.load(checkpoints(disk)[-1], weights_only=True)["global_step"] == 9


def test_a_full_disk_when_a_fit_begins(run, short_fit, small_disk, capfd):
    disk = small_disk(4)
    (disk / "full").write_bytes(bytes(4096))
    with pytest.raises(SystemExit) as caught:
        run(*short_fit("--trainer.logger", "false", "--trainer.default_root_dir", disk))
    assert caught.value.code == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {disk}/config.yaml can't be written: No space left on device; no file is left")
    assert {path.name for path in disk.iterdir()} == {".lock", "full"}


def test_a_full_disk_in_the_cache_is_said_once_and_changes_nothing(run, short_fit, small_disk):
    disk = small_disk(40)
    args = short_fit(*every_step("--trainer.max_steps", 2, "--trainer.limit_val_batches", 0))
    expected = torch.load(checkpoints(run(*args))[-1], weights_only=True)["state_dict"]
    shutil.rmtree("lightning_logs")
    with pytest.warns(UserWarning, match=r"model\.feature_cache: .* No space left on device") as warned:
        found = torch.load(checkpoints(run(*args, "--model.feature_cache", disk))[-1], weights_only=True)["state_dict"]
    assert sum("model.feature_cache" in str(warning.message) for warning in warned) == 1
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(path.suffix == ".safetensors" for path in disk.iterdir())
    (disk / "another program's").touch()
    with pytest.raises(OSError), (disk / "another program's").open("wb") as file:
        file.write(bytes(10**5))
    with pytest.warns(UserWarning, match=r"model\.feature_cache: .* No space left on device"):
        FolderCache(str(disk), 1, "model").put("page", torch.zeros(10**4))


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "deep" / "file"
    with replacing(path) as file:
        file.write(b"first")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"sec")
        _ = 1 / 0
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]
    (tmp_path / "folder").mkdir()
    refused = pytest.raises(InputError, match=r"folder can't be written: Is a directory; the old file is unchanged")
    with refused, replacing(tmp_path / "folder") as file:
        file.write(b"third")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "deep", tmp_path / "folder"]


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    """In two containers both may have the process id 1; here they have the test's."""
    path = tmp_path / "file"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_a_fit_does_not_write_over_another_ones_checkpoints(run, short_fit, capfd):
    args = short_fit(*every_step("--trainer.logger", "false", "--trainer.max_steps", 2))
    folder = run(*args)
    before = {path: path.read_bytes() for path in checkpoints(folder)}
    with pytest.raises(SystemExit):
        run(*args)
    error = capfd.readouterr().err.splitlines()[-1]
    held = f"error: {folder}/checkpoints holds another run's checkpoints: resume it with --ckpt_path last, or"
    assert error.startswith(held)
    assert {path: path.read_bytes() for path in checkpoints(folder)} == before
    run(*args, "--ckpt_path", "last", "--trainer.max_steps", 3)
    assert len(checkpoints(folder)) == 3


def test_two_fits_at_once_in_one_folder(run, short_fit, tmp_path, capfd):
    """The second is refused where the folder is given, and has its own number where it isn't."""
    import fcntl

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            run(*short_fit("--trainer.logger", "false", "--trainer.max_steps", 1))
    assert f"error: another run is writing to {tmp_path}: give" in capfd.readouterr().err
    (tmp_path / "lightning_logs").mkdir()

    taken, mkdir = [], Path.mkdir

    def racing(path, *args, **kwargs):
        """Another fit takes the number that this one has seen to be free."""
        if path.name == "version_0" and not taken:
            taken.append(path)
            mkdir(path, parents=True)
        return mkdir(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", racing)
        run(*short_fit("--trainer.max_steps", 1))
    assert not list((tmp_path / "lightning_logs/version_0").iterdir())
    assert (tmp_path / "lightning_logs/version_1/config.yaml").exists()

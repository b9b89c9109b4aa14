"""Manifests and the directory of checkpoints: what counts as one, what is refused by name, what is kept."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from drpo_megatron.checkpoint import manifest as manifests
from drpo_megatron.checkpoint.manifest import CheckpointError, Manifest
from drpo_megatron.checkpoint.store import CheckpointStore


def write(store: CheckpointStore, step: int, **metrics: float) -> Path:
    partial = store.begin(step)
    (partial / manifests.STATE / "__0_0.distcp").write_bytes(bytes(range(256)) * 40)
    (partial / manifests.DRIVER).write_bytes(b"driver")
    files = {name: manifests.checksum(partial / name) for name in manifests.data_files(partial)}
    made = Manifest(step, 2 * step, {"tensor": 2}, {"torch": "1"}, "float32", True, 1.5, metrics, files)
    return store.commit(partial, made)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    path = write(store, 3, **{"reward/mean": 0.5})
    assert path.name == "step_000003" and store.checkpoints() == [path]
    read = manifests.read(path)
    assert (read.step, read.version, read.layout, read.metrics) == (3, 6, {"tensor": 2}, {"reward/mean": 0.5})
    assert read.total_bytes == 256 * 40 + 6
    for part in range(3):
        manifests.check_files(path, read, part, 3)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", ["state/__0_0.distcp", "driver.pt"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str, name: str) -> None:
    path = write(CheckpointStore(tmp_path), 1)
    file = path / name
    contents = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(contents[:-1])
    elif damage == "flipped":
        contents[len(contents) // 2] ^= 1
        file.write_bytes(contents)
    else:
        file.unlink()
    says = {"truncated": "bytes, and", "flipped": "SHA-256 differs", "missing": "is missing"}[damage]
    with pytest.raises(CheckpointError, match=rf"{name}.*{says}"):
        manifests.check_files(path, manifests.read(path))


def test_one_of_the_ranks_that_share_the_work_finds_it(tmp_path: Path) -> None:
    path = write(CheckpointStore(tmp_path), 1)
    (path / manifests.DRIVER).write_bytes(b"drivel")
    found = []
    for part in range(2):
        try:
            manifests.check_files(path, manifests.read(path), part, 2)
        except CheckpointError as error:
            found.append(str(error))
    assert len(found) == 1 and "driver.pt" in found[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "not written to its end"),
        ("{", "is damaged"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1}', "is damaged"),
        ("[]", "is damaged"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str | None, says: str) -> None:
    path = write(CheckpointStore(tmp_path), 1)
    (path / manifests.MANIFEST).unlink()
    if text is not None:
        (path / manifests.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=says):
        manifests.read(path)


def test_what_was_not_finished_is_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    kept = write(store, 1)
    partial = store.begin(2)
    (partial / manifests.STATE / "__0_0.distcp").write_bytes(b"half")
    assert store.checkpoints() == [kept]
    assert list((store.begin(3) / manifests.STATE).iterdir()) == [] and not partial.exists()


def test_a_step_that_is_done_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 2, loss=1.0)
    path = write(store, 2, loss=2.0)
    assert manifests.read(path).metrics == {"loss": 2.0}
    store.wait_for_deletions()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000002"]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step, reward in enumerate([0.1, 0.9, 0.8, 0.2, 0.3], start=1):
        write(store, step, reward=reward)
    write(store, 6)  # without the metric: it cannot be the best
    write(store, 7, reward=0.0)
    store.retain(keep=1, keep_best=2, metric="reward")
    assert [p.name for p in store.checkpoints()] == ["step_000007", "step_000003", "step_000002"]
    store.retain(keep=2, keep_best=0, metric="reward")
    assert [p.name for p in store.checkpoints()] == ["step_000007", "step_000003"]


def test_old_ones_are_deleted_beside_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving a checkpoint its name does not wait for the files of those it replaces; the next one does."""
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        write(store, step)
    may_delete, rmtree = threading.Event(), shutil.rmtree

    def slow(path: Path) -> None:
        assert may_delete.wait(timeout=300)
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", slow)
    store.retain(keep=1, keep_best=0, metric="reward")
    removed = [tmp_path / f".step_00000{step}.removed" for step in (1, 2)]
    assert [p.name for p in store.checkpoints()] == ["step_000003"] and all(path.is_dir() for path in removed)
    may_delete.set()
    store.begin(4)
    assert not any(path.exists() for path in removed)

    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    write(store, 4)
    monkeypatch.setattr(shutil, "rmtree", denied)
    store.retain(keep=1, keep_best=0, metric="reward")
    with pytest.raises(CheckpointError, match=r"old checkpoint could not be removed.*denied.*step_000003"):
        store.begin(5)


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"set save\.directory"):
        CheckpointStore(tmp_path / "file").begin(1)
    store = CheckpointStore(tmp_path / "full")
    partial = store.begin(1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"step_000001 could not be written.*No space left"):
        store.commit(partial, Manifest(1, 1, {}, {}, "float32", True, 0.0))
    assert store.checkpoints() == []

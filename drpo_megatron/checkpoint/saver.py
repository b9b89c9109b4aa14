"""Saves checkpoints while training goes on, and finds the one to go on from."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from drpo_megatron.checkpoint import manifest as manifests
from drpo_megatron.checkpoint import state
from drpo_megatron.checkpoint.manifest import CheckpointError, FileSum, Manifest
from drpo_megatron.checkpoint.store import CheckpointStore
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.platform.distributed import control_group, from_rank_0
from drpo_megatron.platform.process import killed_with_parent
from drpo_megatron.platform.versions import versions
from drpo_megatron.training.step import Policy
from drpo_megatron.weights.hf_io import carry_files

log = logging.getLogger(__name__)

_SUMS = "sums_rank_{}.json"


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What a run goes on from. driver: rank 0's own state, None on the other ranks and when the checkpoint has none."""

    manifest: Manifest
    driver: Any


class Saver:
    """One a rank; every method but `close` is collective over all ranks.

    A save goes on in a fork of the process while training does, which sees host memory as it was; a device's tensors
    are copied there first. The checkpoint has its name only after `poll` found all ranks done. At most one save is
    under way: the next one waits for it.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._store = CheckpointStore(config.checkpoint_directory)
        self._queue = AsyncCallsQueue()

    def resume(self, policy: Policy) -> Resumed | None:
        """Load the newest checkpoint whose files are what was written; None when there is none at all.

        Ranks check the files together, each reading a part of them. Raises CheckpointError when there are checkpoints
        and none is good, or the good one does not fit the policy.
        """
        problems: list[str] = []
        for path in from_rank_0(self._store.checkpoints()):
            problem = _first_problem(path)
            if problem is None:
                return self._load(policy, path)
            problems.append(problem)
            if dist.get_rank() == 0:
                log.warning("a checkpoint is not used: %s", problem)
        if problems:
            raise CheckpointError(
                f"no checkpoint in {self._store.directory} can be used: {'; '.join(problems)}. Move them away to start "
                "anew"
            )
        return None

    def _load(self, policy: Policy, path: Path) -> Resumed:
        manifest = manifests.read(path)
        _check_model(path / manifests.HF_FILES, policy.hf)
        same_layout = manifest.layout == self._config.parallel.model_dump()
        whole = state.load(policy, path / manifests.STATE, same_layout=same_layout)
        driver = None
        if dist.get_rank() == 0:
            log.info("weights%s of %s", ", optimizer and schedule" * whole, path)
            if (path / manifests.DRIVER).exists():
                driver = torch.load(path / manifests.DRIVER, weights_only=True)
        return Resumed(manifest, driver)

    def save(self, policy: Policy, step: int, version: int, driver: Any, metrics: dict[str, float]) -> None:
        """Begin a checkpoint after `step` steps; without save.asynchronous it is complete when this returns.

        driver, metrics: rank 0's; plain data and tensors. Raises CheckpointError when this one, or the one before,
        cannot be written.
        """
        self.finish()
        config = self._config
        directory = self._on_rank_0(lambda: self._store.begin(step))
        request = state.begin_save(policy, directory / manifests.STATE)
        manifest = Manifest(
            step=step,
            version=version,
            layout=config.parallel.model_dump(),
            versions=versions(),
            dtype=config.model.dtype,
            optimizer=True,
            time=time.time(),
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        )
        self._on_rank_0(lambda: _write_beside(directory, driver, config.model.path))
        if request.async_fn is not None:
            write = partial(_write_and_sum, request.async_fn, directory, dist.get_rank(), config.save.asynchronous)
            request = request._replace(async_fn=write)
        request.add_finalize_fn(lambda: self._on_rank_0(lambda: self._commit(directory, manifest)))
        if config.save.asynchronous:
            self._queue.schedule_async_request(request)
        else:
            with _reported(directory):
                request.execute_sync()

    def poll(self) -> None:
        """Give a checkpoint its name, if one has been written meanwhile. Raises as `save` does."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for the save that is under way, and for what it replaced to be deleted."""
        self._finalize(blocking=True)
        self._on_rank_0(self._store.wait_for_deletions)

    def wait_for_writer(self) -> None:
        """Until this rank's part of the save that is under way is written. Not collective; `poll` then completes it."""
        for call in self._queue.async_calls:
            if call.async_caller.process is not None:
                call.async_caller.process.join()

    def close(self) -> None:
        """End what is under way, without a checkpoint of it. Not collective: other ranks may be gone."""
        for call in self._queue.async_calls:
            call.async_caller.close(abort=True)

    def _finalize(self, blocking: bool) -> None:
        if self._queue.async_calls:
            with _reported(self._store.directory):
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def _commit(self, directory: Path, manifest: Manifest) -> None:
        sums: dict[str, FileSum] = {}
        for rank in range(dist.get_world_size()):
            of_rank = directory / _SUMS.format(rank)
            if of_rank.exists():
                sums |= {name: FileSum(**entry) for name, entry in json.loads(of_rank.read_text()).items()}
                of_rank.unlink()
        for name in manifests.data_files(directory):
            if name not in sums and name.endswith(".distcp"):
                raise CheckpointError(f"{directory / name} was not written to its end")
            sums[name] = sums.get(name) or manifests.checksum(directory / name)
        path = self._store.commit(directory, dataclasses.replace(manifest, files=sums))
        log.info("checkpoint %s", path)
        save = self._config.save
        self._store.retain(save.keep, save.keep_best, save.best_metric)

    def _on_rank_0[T](self, work: Callable[[], T]) -> T:
        """`work()` of rank 0 alone, on all ranks. An error of it is raised on all of them."""
        result: T | None = None
        error: str | None = None
        if dist.get_rank() == 0:
            try:
                result = work()
            except (CheckpointError, OSError) as failure:
                error = f"{failure}"
        answer: tuple[T, str | None] = from_rank_0((result, error))
        if answer[1] is not None:
            raise CheckpointError(answer[1])
        return answer[0]


def leave_alone_what_stays() -> None:
    """Take what exists now out of all later garbage collections; call it once the policy is built.

    Megatron-Core's optimizers collect garbage in every save, which goes through all objects of all libraries: two
    thirds of the time that training waited for an asynchronous one.
    """
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _reported(directory: Path) -> Iterator[None]:
    """Turns what torch says of a failed write into one line that names the place and the first cause."""
    try:
        yield
    except CheckpointException as error:
        causes = [f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items()]
        free = shutil.disk_usage(directory).free
        raise CheckpointError(
            f"a checkpoint in {directory} could not be written: {'; '.join(causes) or 'see rank 0'} "
            f"({free / 1e9:.1f} GB are free there; torch calls a failed write an unexpected position)"
        ) from error


def _check_model(of_checkpoint: Path, hf: HFModelConfig) -> None:
    """Raises CheckpointError naming what differs."""
    other = dataclasses.asdict(HFModelConfig.load(of_checkpoint))
    differing = [f"{key} {other[key]!r} / {now!r}" for key, now in dataclasses.asdict(hf).items() if other[key] != now]
    if differing:
        raise CheckpointError(
            f"{of_checkpoint.parent} is of another model than model.path: {', '.join(differing)}; go on with its own, "
            "or give the run another name"
        )


def _write_beside(directory: Path, driver: Any, model_path: Path) -> None:
    if driver is not None:
        torch.save(driver, directory / manifests.DRIVER)
    (directory / manifests.HF_FILES).mkdir()
    carry_files(model_path, directory / manifests.HF_FILES)


def _write_and_sum(write: Callable[..., None], directory: Path, rank: int, own_process: bool, *args: Any) -> None:
    """Write this rank's files, and read them once more for their checksums."""
    if own_process:
        killed_with_parent()
    write(*args)
    files = sorted((directory / manifests.STATE).glob(f"__{rank}_*"))
    sums = {file.relative_to(directory).as_posix(): dataclasses.asdict(manifests.checksum(file)) for file in files}
    (directory / _SUMS.format(rank)).write_text(json.dumps(sums))


def _first_problem(path: Path) -> str | None:
    """What makes the checkpoint unusable, on all ranks. Collective."""
    problem: str | None = None
    try:
        manifests.check_files(path, manifests.read(path), dist.get_rank(), dist.get_world_size())
    except (CheckpointError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=control_group())
    return next((found for found in problems if found is not None), None)

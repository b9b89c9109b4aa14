"""What both directions of a conversion share: work divided over processes, and the check of a checkpoint's files."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drpo_megatron.checkpoint.manifest import STATE, Manifest, check_files

_DATA_SUFFIX = ".distcp"


def run_in_processes[T](processes: int, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]) -> list[T]:
    """`function(*job)` of every job, in the order of `jobs`. The first failure ends the rest and is raised.

    Processes are spawned: `function` and jobs must pickle. Raises ChildProcessError when one of them was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process that wrote files was killed, perhaps for memory: take fewer --processes"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def check_small_files(checkpoint: Path, manifest: Manifest) -> None:
    """Compare the files that a reader interprets with the manifest, and the sizes of all. Raises CheckpointError."""
    check_files(checkpoint, manifest, contents=False)
    small = {name: file for name, file in manifest.files.items() if not name.endswith(_DATA_SUFFIX)}
    check_files(checkpoint, dataclasses.replace(manifest, files=small))


@contextmanager
def checked_beside(checkpoint: Path, manifest: Manifest, threads: int) -> Iterator[None]:
    """Compare the checksums of the state's data while the block runs, and have them all compared when it ends.

    Raises CheckpointError for a file that differs, which is then the reason of whatever the block failed with.
    """
    names = [name for name in manifest.files if name.startswith(STATE) and name.endswith(_DATA_SUFFIX)]
    singles = [dataclasses.replace(manifest, files={name: manifest.files[name]}) for name in names]
    # hashlib lets other threads run.
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(check_files, checkpoint, single) for single in singles]
        try:
            yield
        except Exception as error:
            for future in futures:
                if (damage := future.exception()) is not None:
                    raise damage from error
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        for done in concurrent.futures.as_completed(futures):
            done.result()

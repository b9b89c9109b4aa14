"""The directory of a run's checkpoints: written beside and renamed, the newest good one found, old ones removed.

Only rank 0 writes here. What has the name of a checkpoint is complete; everything else is a leftover.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from drpo_megatron.checkpoint import manifest as manifests
from drpo_megatron.checkpoint.manifest import CheckpointError, Manifest

log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{6,})")
_LEFTOVER = re.compile(r"\.step_\d+\.(partial|removed)")


class CheckpointStore:
    """Checkpoints under `directory`, which is made when it is needed. They are named by the steps that were done.

    Files of old ones are deleted in a thread: to free a gigabyte takes a file system as long as a tenth of writing it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._deletions = ThreadPoolExecutor(1, thread_name_prefix="old-checkpoints")
        self._deleting: list[Future[None]] = []

    def checkpoints(self) -> list[Path]:
        """Newest first. Whether they are good is for `manifest.check_files`."""
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)

    def begin(self, step: int) -> Path:
        """An empty directory beside the checkpoints. Leftovers of earlier attempts are removed.

        Raises CheckpointError when it cannot be made, and as `wait_for_deletions`.
        """
        self.wait_for_deletions()
        partial = self.directory / f".step_{step:06d}.partial"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path)
            (partial / manifests.STATE).mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(
                f"{partial} cannot be made ({error.strerror}): free it, or set save.directory"
            ) from error
        return partial

    def commit(self, partial: Path, manifest: Manifest) -> Path:
        """Write the manifest and give the directory its name. Everything is on disk when this returns."""
        final = self.directory / f"step_{manifest.step:06d}"
        try:
            manifests.write(partial, manifest)
            for directory in (partial / manifests.STATE, partial):
                _sync(directory)
            if final.exists():  # an earlier attempt's, which was not good enough to go on from
                self._remove(final)
            partial.rename(final)
            _sync(self.directory)
        except OSError as error:
            raise CheckpointError(f"{final} could not be written ({error})") from error
        return final

    def retain(self, keep: int, keep_best: int, metric: str) -> None:
        """Remove all but the newest `keep`, and of the others the `keep_best` with the highest `metric`."""
        older = self.checkpoints()[keep:]
        values: dict[Path, float] = {}
        for path in older if keep_best else ():
            try:
                values[path] = manifests.read(path).metrics[metric]
            except (CheckpointError, KeyError) as error:
                log.warning("%s does not count among the best: %s", path, error)
        best = sorted(values, key=lambda path: values[path], reverse=True)[:keep_best]
        for path in older:
            if path not in best:
                self._remove(path)

    def _remove(self, checkpoint: Path) -> None:
        """In two steps: a half-removed one has another name. `wait_for_deletions` ends the second."""
        removed = self.directory / f".{checkpoint.name}.removed"
        if removed.exists():  # an earlier removal of that step is not done ...
            self.wait_for_deletions()
        if removed.exists():  # ... or was cut off
            shutil.rmtree(removed)
        checkpoint.rename(removed)
        self._deleting.append(self._deletions.submit(lambda: shutil.rmtree(removed)))

    def wait_for_deletions(self) -> None:
        """Until no file of a removed checkpoint is left. Raises CheckpointError when one cannot be deleted."""
        deleting, self._deleting = self._deleting, []
        for deletion in deleting:
            try:
                deletion.result()
            except OSError as error:
                raise CheckpointError(f"an old checkpoint could not be removed ({error})") from error


def _sync(directory: Path) -> None:
    """A name is on disk when its directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

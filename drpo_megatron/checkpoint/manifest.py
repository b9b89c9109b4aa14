"""`manifest.json` of a checkpoint: what it holds, and the checksum of every file. No torch, no Megatron.

A checkpoint is a directory:

    manifest.json   written last: without it there is no checkpoint
    state/          Megatron-Core's distributed checkpoint (torch_dist): model, optimizer, random-number generators
    driver.pt       what rank 0 alone holds: position in the data, prompts in flight, partial rollouts
    hf/             config.json, tokenizer and whatever else lies beside the weights of a Hugging Face directory

`state/` names weights as Megatron-Core does, over the whole model and without any parallelism.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
STATE = "state"
DRIVER = "driver.pt"
HF_FILES = "hf"

FORMAT = 1


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names it, what is wrong, and the file."""


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """step: steps of the main loop that are done. version: updates that the weights have. layout: the trainer's, by the
    names of the `parallel` section. versions: of the packages that wrote it. metrics: of the last step. files: by path
    in the checkpoint, all but the manifest itself. optimizer: whether it holds more than weights.
    """

    step: int
    version: int
    layout: dict[str, Any]
    versions: dict[str, str]
    dtype: str
    optimizer: bool
    time: float
    """Seconds since 1970."""
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, FileSum] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def checksum(path: Path) -> FileSum:
    """Reads the whole file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileSum(file.tell(), digest)


def data_files(directory: Path) -> list[str]:
    """Paths in the checkpoint of all files but the manifest, sorted."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def write(directory: Path, manifest: Manifest) -> None:
    """Write it, on disk when this returns."""
    raw = {"format": FORMAT} | dataclasses.asdict(manifest)
    with (directory / MANIFEST).open("w") as file:
        file.write(json.dumps(raw, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(directory: Path) -> Manifest:
    """Raises CheckpointError when there is none, it is damaged, or a later version of this package wrote it."""
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {MANIFEST}: it is no checkpoint, or one that was not written to its end"
        )
    try:
        raw = json.loads(path.read_text())
        written = raw.pop("format")
        if written != FORMAT:
            raise CheckpointError(f"{path} has format {written}; this version reads {FORMAT}")
        raw["files"] = {name: FileSum(**entry) for name, entry in raw["files"].items()}
        return Manifest(**raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def check_files(directory: Path, manifest: Manifest, part: int = 0, parts: int = 1, *, contents: bool = True) -> None:
    """Compare the files with the manifest: every `parts`th from `part`, so that ranks can share the work.

    contents: their checksums too, not only that they are there with the right size. Raises CheckpointError naming the
    first that differs.
    """
    for name in sorted(manifest.files)[part::parts]:
        path, expected = directory / name, manifest.files[name]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != expected.bytes:
            raise CheckpointError(f"{path} has {size} bytes, and {expected.bytes} were written")
        if contents and checksum(path) != expected:
            raise CheckpointError(f"{path} has other contents than were written: its SHA-256 differs")

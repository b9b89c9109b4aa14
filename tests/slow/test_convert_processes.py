"""Conversion by several processes, by a writer that is killed, and by the scripts in tools as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from drpo_megatron.checkpoint import manifest
from drpo_megatron.weights.convert_jobs import run_in_processes
from drpo_megatron.weights.convert_to_checkpoint import hf_to_checkpoint
from drpo_megatron.weights.convert_to_hf import checkpoint_to_hf
from tests.support import tiny_models

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in ("qwen2", "qwen3_moe"):
        tiny_models.write(family, root / family)
    return root


def test_several_processes_write_the_same_files(models: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        out = tmp_path / str(processes)
        hf_to_checkpoint(models / "qwen3_moe", out / "checkpoint", max_shard_bytes=200_000, processes=processes)
        checkpoint_to_hf(out / "checkpoint", out / "hf", max_shard_bytes=200_000, processes=processes)
    for one in sorted((tmp_path / "1").rglob("*.*")):
        if one.is_file() and one.name not in (".metadata", manifest.MANIFEST):  # a random id; the time
            assert one.read_bytes() == (tmp_path / "2" / one.relative_to(tmp_path / "1")).read_bytes(), one


def _end_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_is_reported() -> None:
    with pytest.raises(ChildProcessError, match="fewer --processes"):
        run_in_processes(1, _end_itself, [()])


def test_tools(models: Path, tmp_path: Path) -> None:
    """The scripts, as a user starts them: both directions, with verification."""

    def script(name: str, *arguments: str | Path) -> str:
        command = [sys.executable, ROOT / "tools" / name, *arguments]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout

    said = script("convert_hf_to_checkpoint.py", models / "qwen2", tmp_path / "checkpoint", "--verify")
    assert "50 tensors equal the source's to the bit; logits of 64 random tokens are equal" in said
    said = script(
        "convert_checkpoint_to_hf.py", tmp_path / "checkpoint", tmp_path / "hf", "--dtype", "bf16", "--verify"
    )
    assert "to the bit in bf16" in said
    assert (tmp_path / "hf" / "model.safetensors").is_file()

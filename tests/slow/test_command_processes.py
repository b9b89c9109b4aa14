"""Commands as a shell starts them, in processes of their own: what they print, and what they find beside them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from drpo_megatron.commands import EXIT_REFUSED
from drpo_megatron.doctor import FAIL, OK, libraries
from tests.unit import test_layout_refusals
from tests.unit.test_layout_refusals import QUICKSTART, base

models = test_layout_refusals.models  # the fixture

ROOT = Path(__file__).parents[2]


def completions(line: str, directory: Path) -> list[str]:
    """What a shell offers at the end of `line`, asked for by argcomplete's protocol: variables, and file 8."""
    out = directory / "completions"
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n"}
    environment |= {"COMP_TYPE": "9", "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:", "_ARGCOMPLETE_SHELL": "bash"}
    command = shlex.join([sys.executable, "-c", "from drpo_megatron.cli import main; main()"])
    subprocess.run(
        ["bash", "-c", f"{command} 8> {shlex.quote(str(out))} 9> /dev/null"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=directory,
        check=True,
    )
    return [offer.rstrip() for offer in out.read_text().split("\n") if offer]


def test_the_shell_completes(tmp_path: Path) -> None:
    for path in (
        "configs/a.yaml",
        "configs/notes.txt",
        "runs/one/metrics.jsonl",
        "runs/two/config.yaml",
        "runs/none/x",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    assert {"train", "plan", "status"} <= set(completions("drpo ", tmp_path))
    assert completions("drpo tra", tmp_path) == ["train"]
    assert completions("drpo train --dry", tmp_path) == ["--dry-run"]
    assert completions("drpo train configs/", tmp_path) == ["configs/a.yaml"]
    assert sorted(completions("drpo status runs/", tmp_path)) == ["runs/none/", "runs/one", "runs/two"]
    assert completions("drpo train configs/a.yaml training.update", tmp_path) == ["training.updates_per_batch="]
    # Behind a character that breaks words for the shell it wants the rest alone.
    assert completions("drpo train configs/a.yaml model.dtype=", tmp_path) == ["float32", "bfloat16"]
    assert completions("drpo train configs/a.yaml training.export=f", tmp_path) == ["false"]
    assert completions("drpo train configs/a.yaml training.steps=", tmp_path) == []


def test_a_refusal_is_one_line(models: Path, tmp_path: Path) -> None:
    """Of a process of its own, which imports Megatron-Core: nothing that it says then stands before the reason."""
    command = [sys.executable, "-m", "drpo_megatron.cli", "train", str(QUICKSTART), "--dry-run"]
    overrides = [*base(models / "qwen3", tmp_path / "runs"), "parallel.tensor=3"]
    refused = subprocess.run([*command, *overrides], capture_output=True, text=True)
    assert refused.returncode == EXIT_REFUSED
    assert refused.stderr.startswith("drpo: parallel: 4 attention heads") and refused.stderr.count("\n") == 1


@pytest.mark.server
def test_sglang_imports_in_a_process_of_its_own() -> None:
    assert libraries.sglang().state == OK


def test_sglang_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_IMPORT_SGLANG", "import sglang_of_tomorrow")
    finding = libraries.sglang()
    assert finding.state == FAIL
    assert "No module named 'sglang_of_tomorrow'" in finding.says and "make install" in finding.says

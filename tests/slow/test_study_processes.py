"""A run of the study does not outlive its worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from drpo_megatron.study import worker


def test_a_run_does_not_begin_without_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker was killed between its fork and what ties the two together."""
    begun = tmp_path / "begun"
    monkeypatch.setattr(worker.importlib, "import_module", lambda name: begun.touch())
    for parent, begins in ((os.getpid(), True), (os.getpid() + 1, False)):
        child = os.fork()
        if child == 0:
            worker._train(tmp_path, parent)
        os.waitpid(child, 0)
        assert begun.exists() == begins
        begun.unlink(missing_ok=True)

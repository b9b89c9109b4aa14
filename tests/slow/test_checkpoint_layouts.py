"""Checkpoints of every kind of optimizer, resumed in every layout that can take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.test_checkpoints import CASES, check_converted, check_resumed, save_and_go_on, write_models
from tests.support.launch import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints")
    write_models(path, CASES)
    return path


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> list[dict[str, Any]]:
    return run_ranks(2, save_and_go_on, root, CASES)[0]


def test_goes_on_as_if_never_stopped(root: Path, uninterrupted: list[dict[str, Any]]) -> None:
    check_resumed(root, CASES, uninterrupted)


def test_conversion_of_what_a_run_saved(root: Path, uninterrupted: list[dict[str, Any]]) -> None:
    check_converted(root, CASES, uninterrupted)

"""Weights & Biases, offline: its client starts a process."""

from __future__ import annotations

import importlib.metadata
import json
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.observability import Tracker
from tests.unit import test_tracking
from tests.unit.test_config import MINIMAL
from tests.unit.test_tracking import METRICS, run_config, three_groups

no_wandb_key = test_tracking.no_wandb_key  # the fixture


def test_wandb_offline_writes_into_the_run(no_wandb_key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        pytest.fail(f"a name was looked up: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = run_config(tmp_path, wandb=True, tensorboard=False)
    with Tracker(config) as tracker:
        for step in range(2):
            tracker.log(step, METRICS)
            tracker.log_samples(step, three_groups())
    time.sleep(1.1)  # the names of offline runs have seconds
    with Tracker(config, first_step=2) as tracker:
        tracker.log(2, METRICS)
    first, second = (
        wandb_records(path) for path in sorted((tmp_path / "test" / "wandb").glob("offline-run-*/*.wandb"))
    )
    settings = {item.key: json.loads(item.value_json) for item in first["run"][0].config.update}
    assert settings["tracking"]["samples"] == 8 and settings["optimizer"]["lr"] == MINIMAL["optimizer"]["lr"]
    assert settings["code"]["torch"] == importlib.metadata.version("torch")
    # The same run of wandb goes on: `wandb sync` puts the files of one id together, in the order of their starts.
    assert first["run"][0].run_id == second["run"][0].run_id == (tmp_path / "test/wandb_run_id").read_text().strip()
    assert [history["step"] for history in wandb_history(first)] == [0, 1]
    assert [history["step"] for history in wandb_history(second)] == [2]
    for step, history in enumerate(wandb_history(first) + wandb_history(second)):
        assert history["_step"] == step and history["reward/mean"] == 0.25
        assert history["total/tokens"] == 200 * (step + 1) and history["total/seconds"] == 2 * (step + 1)
    axes = {metric.name or metric.glob_name: metric.step_metric for metric in first["metric"]}
    assert axes == {"step": "", "total/tokens": "", "total/seconds": "", "*": "step"}
    table = wandb_history(first)[1]["samples.path"]
    (path,) = (tmp_path / "test" / "wandb").glob(f"offline-run-*/files/{table}")
    rows = json.loads(path.read_text())
    assert rows["columns"][:3] == ["prompt", "response", "reward"]
    assert [row[:3] for row in rows["data"]] == [[f"question {i}", f"answer {i}", i] for i in range(3)]


def wandb_history(records: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        for history in records["history"]
    ]


def wandb_records(path: Path) -> dict[str, list[Any]]:
    """An offline file's records by kind. The file is LevelDB's log behind a header of 7 bytes; wandb's own process
    may still write it when the run is closed.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 300
    while True:
        found: dict[str, list[Any]] = defaultdict(list)
        for data in log_entries(path.read_bytes()):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            found[kind].append(getattr(record, kind))
        if "exit" in found:
            return found
        assert time.monotonic() < deadline, sorted(found)
        time.sleep(0.1)


def log_entries(log: bytes) -> Iterator[bytes]:
    """Blocks of 32 KiB hold pieces: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last)."""
    at, entry = 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:  # no piece begins in so short a rest
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        if at + 7 + length > len(log):
            return  # it is being written
        entry += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield entry
            entry = b""

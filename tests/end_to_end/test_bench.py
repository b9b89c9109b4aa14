"""`drpo bench` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from drpo_megatron.bench import loss

pytestmark = [pytest.mark.server, pytest.mark.distributed]


def test_step() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "drpo_megatron.cli", "bench", "step", "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    figures = {name: figure["value"] for name, figure in report["figures"].items()}
    shares = {name: value for name, value in figures.items() if name.startswith("share_")}
    assert shares.keys() == {f"share_{verb}" for verb in ("generate", "score", "advantages", "pack", "train", "sync")}
    assert 0.8 < sum(shares.values()) < 1.2  # medians of shares that add up to 1 in each step
    assert figures["generate_tokens_per_s"] > 0 and figures["train_tokens_per_s"] > 0
    assert 0.3 < figures["drpo_over_cross_entropy"] < 3


@pytest.mark.parametrize(("ranks", "task"), [(2, "bare"), (1, "dense"), (1, "mcore"), (1, "memory-fused")])
def test_loss_workers(ranks: int, task: str) -> None:
    """Each way runs and reports; the sizes that count are the bench's own."""
    samples = loss._worker(ranks, 64, task, vocabulary=512, tokens=256)
    assert len(samples) == (1 if task.startswith("memory") else loss.REPETITIONS)
    assert all(s >= 0 for s in samples)

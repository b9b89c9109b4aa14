"""`drpo bench` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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

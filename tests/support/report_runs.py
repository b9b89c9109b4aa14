"""Directories of runs for `drpo report` and `drpo diff`, made without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

TRAPS = (
    "</script><script>window.hurt = 1</script>",
    "<img src=x onerror='window.hurt = 1'>",
    "<!-- <!--DATA-->",
    "\u2028&lt;",
)
"""Texts that break a page which takes them for markup."""


def metrics(step: int, **changed: float | None) -> dict[str, float | None]:
    """A step of a run; every value is known from the step."""
    return {
        "step": step,
        "time": 1e9 + step,
        "loss/mean": 0.01 * step,
        "reward/mean": step / 10,
        "reward/min": 0.0,
        "reward/max": 1.0,
        "policy/entropy": 4 - step / 10,
        "mismatch/k3": 1e-7 * (step + 1),
        "mismatch/abs_dlogp_mean": 1e-5 * (step + 1),
        "mismatch/abs_dlogp_max": 1e-3 * (step + 1),
        "drpo/weight_q01": 0.9,
        "drpo/weight_q50": 1.0,
        "drpo/weight_q99": 1.1,
        "grad_norm": 0.5,
        "train/skipped_updates": 0.0,
        "perf/generate_s": 1.0 + step,
        "perf/train_s": 2.0,
        "perf/step_s": 3.0 + step,
        "perf/tokens_per_s": 100.0,
        "perf/mfu": None,
    } | changed


def rollout(step: int, index: int, *, traps: bool = False, trained: bool = True, **changed: Any) -> dict[str, Any]:
    """One of 8 of a step, in groups of 2; rewards go from 0 to 7/8. The last token was put in."""
    trap = TRAPS[index % len(TRAPS)] if traps else ""
    tokens = {"logp": [-1.0, -2.5, 0.0], "loss_weight": [1.5, -0.5, 0.0]} if trained else {}
    return (
        {
            "group": index // 2,
            "prompt": {
                "id": f"p{index // 2}",
                "token_ids": [1, 2],
                "text": f"ask {index} {trap}",
                "answer": trap or None,
            },
            "response_ids": [3, 4, 5],
            "logmu": [-1.25, -2.0, 0.0],
            "weight_versions": [2 * step] * 3,
            "response_mask": [1, 1, 0],
            "finish_reason": "stop",
            "text": f"say {step}.{index} {trap}",
            "reward": index / 8,
            "reward_error": None,
            "advantage": 0.5,
        }
        | tokens
        | changed
    )


def write_run(
    directory: Path,
    rows: Sequence[dict[str, float | None]],
    *,
    dumped: Sequence[int] = (),
    config: dict[str, Any] | None = None,
    **of_rollouts: bool,
) -> Path:
    """A run with two updates a step and 8 samples in each of the steps that are `dumped`."""
    settings = {
        "name": directory.name,
        "model": {"path": str(directory / "nowhere")},
        "rollout": {"samples_per_prompt": 2},
        "training": {"updates_per_batch": 2},
    }
    (directory / "rollouts").mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})))
    (directory / "versions.json").write_text(json.dumps({"torch": "2.14.1"}))
    for step in dumped:
        lines = [json.dumps(rollout(step, index, **of_rollouts)) for index in range(8)]
        (directory / "rollouts" / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    return directory

"""Writes a run's metrics (`metrics.jsonl`, TensorBoard, wandb) and its rollouts, each step once."""

from __future__ import annotations

import dataclasses
import json
import math
import netrc
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from drpo_megatron.config.load import dump_config
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.platform.versions import code_version
from drpo_megatron.records import RolloutGroup
from drpo_megatron.rollout.dump import RolloutDump

if TYPE_CHECKING:
    from drpo_megatron.fp8.health import TensorHealth

# wandb waits for its servers this long at the start and at the end of a run.
WANDB_TIMEOUT_S = 60.0

TOTALS = {"total/tokens": "train/tokens", "total/seconds": "perf/step_s"}
"""Sums over the steps of a run, x-axes besides the step, by the metric of a step that they sum."""

SAMPLE_COLUMNS = ("prompt", "response", "reward", "advantage", "tokens", "finish_reason")


class Tracker:
    """Context manager over the run's directory, which is made if it is missing.

    `metrics.jsonl` is appended to and flushed at every step, so that it is complete up to the last step however the run
    ends. first_step: that of a run that goes on from a checkpoint; what was logged of it and later ones is removed.
    Raises RuntimeError when wandb is to be online and cannot be reached.
    """

    def __init__(self, config: RunConfig, first_step: int = 0) -> None:
        self._config = config
        directory = config.run_directory
        self._rollouts = RolloutDump(directory / "rollouts")
        self._rollouts.directory.mkdir(parents=True, exist_ok=True)
        # wandb first: it is the one that can fail.
        self._wandb = _start_wandb(config, resumes=first_step > 0) if config.tracking.wandb else None
        self._tensorboard = _tensorboard_writer(config, first_step) if config.tracking.tensorboard else None
        _forget_from(directory, first_step)
        self._totals = _last_totals(directory / "metrics.jsonl")
        self._rollouts.forget_from(first_step)
        if config.tracking.dump_rollouts:
            self._rollouts.write_about(config)
        self._metrics = (directory / "metrics.jsonl").open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step, with the totals up to it. `time` is Unix time in seconds; a value that is not finite is null
        in metrics.jsonl.
        """
        for total, of_step in TOTALS.items():
            self._totals[total] += metrics.get(of_step, 0.0)
        metrics = {**metrics, **self._totals}
        line: dict[str, float | None] = {"step": step, "time": time.time()}
        line |= {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self._metrics.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics}, step=step)

    def log_fp8(self, step: int, tensors: Sequence[TensorHealth]) -> None:
        """Append to fp8.jsonl, one tensor a line."""
        with (self._config.run_directory / "fp8.jsonl").open("a") as file:
            for tensor in tensors:
                file.write(json.dumps({"step": step} | dataclasses.asdict(tensor)) + "\n")

    def log_samples(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Show the first sample of the first groups in wandb, as a table, and in TensorBoard, as text."""
        rows = [_sample_row(group) for group in groups[: self._config.tracking.samples] if group.rollouts]
        if not rows:
            return
        if self._wandb is not None:
            import wandb

            table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)
            self._wandb.log({"samples": table}, step=step)
        if self._tensorboard is not None:
            lines = [" | ".join(json.dumps(cell, ensure_ascii=False) for cell in row) for row in rows]
            self._tensorboard.add_text("samples", "\n\n".join([" | ".join(SAMPLE_COLUMNS), *lines]), step)

    def dump_rollouts(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Write the step's files in rollouts/ (`rollout.dump`), unless tracking.dump_rollouts is off."""
        if self._config.tracking.dump_rollouts:
            self._rollouts.write(step, groups, routed_experts=self._config.tracking.dump_routed_experts)

    def close(self, failed: bool = False) -> None:
        """Flush and close everything. `failed` marks the wandb run so. May be called twice."""
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


def _forget_from(directory: Path, first_step: int) -> None:
    """Remove what was logged of `first_step` and later ones: those steps are done again."""
    for path in (directory / "metrics.jsonl", directory / "fp8.jsonl"):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A line that was cut is of a step that no checkpoint has.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first_step]
        if len(kept) < len(lines):
            beside = path.with_suffix(".tmp")
            beside.write_text("".join(kept))
            beside.rename(path)
    # Numbered by the steps that were done, as checkpoints are.
    for results in (directory / "evaluation").glob("*/step_*.jsonl"):
        if int(results.stem.removeprefix("step_")) > first_step:
            results.unlink()


def _last_totals(metrics: Path) -> dict[str, float]:
    """Those of the last step that is kept; 0 before the first."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    return {total: last.get(total) or 0.0 for total in TOTALS}


def _sample_row(group: RolloutGroup) -> list[str | float | int]:
    first = group.rollouts[0]
    return [
        group.prompt.text,
        first.text,
        first.reward,
        first.advantage,
        len(first.response_ids),
        first.finish_reason,
    ]


def _tensorboard_writer(config: RunConfig, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # takes a second

    writer = SummaryWriter(log_dir=str(config.run_directory / "tb"), purge_step=first_step or None)
    for name, text in (("config", dump_config(config)), ("code", json.dumps(code_version(), indent=1))):
        writer.add_text(name, f"```\n{text}\n```", first_step)
    return writer


def wandb_is_online() -> bool:
    """Whether wandb has a key: WANDB_API_KEY, or an entry of its host in the netrc file. WANDB_MODE decides first."""
    mode = os.environ.get("WANDB_MODE")
    if mode is not None:
        return mode in ("online", "shared")
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except FileNotFoundError:
        return False
    except netrc.NetrcParseError as error:
        raise RuntimeError(f"{path} cannot be read ({error}); correct it, or set tracking.wandb=false") from error


def _start_wandb(config: RunConfig, resumes: bool) -> Any:
    # Before the import: crash reports would go to a host of wandb's even in offline mode.
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    import wandb

    online = wandb_is_online()
    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        init_timeout=WANDB_TIMEOUT_S,
        finish_timeout=WANDB_TIMEOUT_S,
        # The system monitor asks a cloud's metadata address where it runs: not when there is to be no traffic.
        x_disable_stats=not online,
        x_disable_machine_info=not online,
    )
    # The same run of wandb after a stop. Its steps may not go back: those that are done again are not logged twice.
    record = config.run_directory / "wandb_run_id"
    run_id = record.read_text().strip() if resumes and record.exists() else uuid.uuid4().hex[:8]
    record.write_text(f"{run_id}\n")
    try:
        run = wandb.init(
            id=run_id,
            resume="allow" if resumes and online else None,
            project=config.tracking.wandb_project,
            name=config.name,
            dir=str(config.run_directory),
            config=config.model_dump(mode="json") | {"code": code_version()},
            mode="online" if online else "offline",
            settings=settings,
        )
    except wandb.Error as error:
        raise RuntimeError(
            f"wandb cannot be started ({error}); set WANDB_MODE=offline or tracking.wandb=false"
        ) from error
    # Behind "*", the curves' own axis, all that may be chosen as another.
    for axis in ("step", *TOTALS):
        run.define_metric(axis)
    run.define_metric("*", step_metric="step")
    return run

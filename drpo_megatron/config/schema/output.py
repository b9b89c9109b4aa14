"""What a run leaves behind: checkpoints, exports, metrics."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from drpo_megatron.config.schema.section import Section


class SaveConfig(Section):
    every: int | None = Field(None, gt=0)
    """Steps from one checkpoint to the next; the last step has one too. null: there are none. With checkpoints, a run
    that is told to stop (SIGUSR1, SIGTERM, Ctrl-C) saves one first and ends with code 75, and `drpo train --resume`
    goes on from the newest that is good, also with another `parallel` section."""
    directory: Path | None = None
    """Where checkpoints lie, for all ranks. null: checkpoints/ of the run's directory."""
    keep: int = Field(2, gt=0)
    """Checkpoints that are kept, the newest."""
    keep_best: int = Field(0, ge=0)
    """Older ones that are kept besides: those with the highest `best_metric` in their step."""
    best_metric: str = "reward/mean"
    """A metric of the step."""
    asynchronous: bool = True
    """Train on while a checkpoint is written; it needs host memory for a copy of weights and optimizer state."""
    deadline_s: float = Field(25.0, gt=0)
    """Seconds for the checkpoint after SIGTERM or Ctrl-C; then the run is ended without it. SLURM kills 30 s after
    SIGTERM. After SIGUSR1 there is no limit."""
    hf_every: int | None = Field(None, gt=0)
    """Steps from one export to the next: the weights as a Hugging Face directory, exports/step_N of the run."""
    resume: bool = False
    """Go on from the newest checkpoint, if there is one. What `drpo train --resume` sets."""


class TrackingConfig(Section):
    directory: Path = Path("runs")
    """The run lives in directory/name."""
    wandb: bool = True
    """Log to wandb; offline when there is no API key."""
    wandb_project: str = "drpo-megatron"
    """Project of the wandb run."""
    tensorboard: bool = True
    """Write TensorBoard events to the run's tb/."""
    samples: int = Field(8, ge=0)
    """Samples of a step that wandb and TensorBoard show, each of another prompt."""
    dump_rollouts: bool = True
    """Write every rollout of a step to rollouts/; `drpo train --rollouts` trains from them."""
    dump_routed_experts: bool = False
    """Write the experts that each token of a mixture of experts took there too: (layers × experts a token) bytes for
    each, twice that with more than 256 experts. Without them a replay needs model.routing_replay = false."""
    progress: bool = True
    """Live display in the terminal; one line a step where there is none."""

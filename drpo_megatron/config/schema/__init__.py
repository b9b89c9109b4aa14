"""The configuration of a run, typed. The help text of a setting is the string under it; an unknown key is an error.

Sections follow the verbs of the main loop: model, data, reward, rollout, algorithm, parallel, training, fp8, sync,
save, evaluation, tracking.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from drpo_megatron.config.schema.model import (
    DataConfig,
    FileData,
    FunctionData,
    ModelConfig,
    ReasoningGymData,
    RewardConfig,
)
from drpo_megatron.config.schema.output import SaveConfig, TrackingConfig
from drpo_megatron.config.schema.rollout import (
    EvaluationConfig,
    EvaluationSampling,
    EvaluationSet,
    RolloutConfig,
    RouterConfig,
    SamplingConfig,
    ServerConfig,
    SyncConfig,
)
from drpo_megatron.config.schema.section import Section
from drpo_megatron.config.schema.training import (
    AlgorithmConfig,
    Fp8Config,
    OptimizerConfig,
    ParallelConfig,
    ProjectionConfig,
    TrainingConfig,
)
from drpo_megatron.platform.layout import ParallelLayout

__all__ = [
    "AlgorithmConfig",
    "DataConfig",
    "EvaluationConfig",
    "EvaluationSampling",
    "EvaluationSet",
    "FileData",
    "Fp8Config",
    "FunctionData",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProjectionConfig",
    "ReasoningGymData",
    "RewardConfig",
    "RolloutConfig",
    "RouterConfig",
    "RunConfig",
    "SamplingConfig",
    "SaveConfig",
    "Section",
    "ServerConfig",
    "SyncConfig",
    "TrackingConfig",
    "TrainingConfig",
]


class RunConfig(Section):
    name: str = Field(pattern="^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200)
    """Name of the run and of its directory."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initialisation, data order and sampling."""
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    rollout: RolloutConfig
    algorithm: AlgorithmConfig = Field(default_factory=lambda: AlgorithmConfig())
    parallel: ParallelConfig = Field(default_factory=lambda: ParallelConfig())
    optimizer: OptimizerConfig
    training: TrainingConfig
    fp8: Fp8Config = Field(default_factory=lambda: Fp8Config())
    sync: SyncConfig = Field(default_factory=lambda: SyncConfig())
    save: SaveConfig = Field(default_factory=lambda: SaveConfig())
    evaluation: EvaluationConfig = Field(default_factory=lambda: EvaluationConfig())
    tracking: TrackingConfig = Field(default_factory=lambda: TrackingConfig())

    @property
    def layout(self) -> ParallelLayout:
        """Raises ValueError for a combination that Megatron-Core cannot build."""
        return ParallelLayout(**self.parallel.model_dump())

    @property
    def run_directory(self) -> Path:
        return self.tracking.directory / self.name

    @property
    def checkpoint_directory(self) -> Path:
        return self.save.directory or self.run_directory / "checkpoints"

    @property
    def evaluation_sampling(self) -> EvaluationSampling:
        """`evaluation`'s settings, and rollout.sampling's where it has none."""
        training, own = self.rollout.sampling, self.evaluation
        return EvaluationSampling(
            temperature=training.temperature if own.temperature is None else own.temperature,
            top_p=own.top_p,
            max_new_tokens=own.max_new_tokens or training.max_new_tokens,
            stop=training.stop,
            ignore_eos=training.ignore_eos,
        )

    @property
    def horizon(self) -> int:
        return self.algorithm.horizon or self.rollout.sampling.max_new_tokens

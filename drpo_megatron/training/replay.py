"""Where a run's groups come from: servers that sample them (`experience.Experience`), or a former run's dump."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal, Protocol, Self

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.records import Metrics, RolloutGroup
from drpo_megatron.rollout.dump import RolloutDump


class ExperienceSource(Protocol):
    """What rank 0 asks for the groups of a step."""

    def generate(self, step: int) -> Literal["", "stopped", "no server"]:
        """Make the groups of `step` ready, sampled and scored; returns why there are none, with nothing lost."""

    def take_groups(self) -> list[RolloutGroup]:
        """Those groups, once."""

    @property
    def metrics(self) -> Metrics:
        """Of the last step: what is known of it here alone."""

    def state(self) -> Any:
        """For a checkpoint, as plain data and tensors; None when the step says all."""

    def restore(self, state: Any) -> None:
        """Go on where `state` was taken."""

    def server_states(self) -> list[str]:
        """Lines for the report on a run that stands still."""


class Replay:
    """The groups of `rollout.from_dump`, step by step. No servers, and nobody to bring weights to.

    Rewards, log μ and weight versions are those of the dump; advantages are computed again.
    """

    def __init__(self, config: RunConfig) -> None:
        assert config.rollout.from_dump is not None
        self._dump = RolloutDump(config.rollout.from_dump)
        self._groups: list[RolloutGroup] = []
        self.metrics: Metrics = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def generate(self, step: int) -> Literal["", "stopped", "no server"]:
        """Raises DumpError for a step that cannot be read."""
        self._groups = self._dump.read(step)
        return ""

    def take_groups(self) -> list[RolloutGroup]:
        groups, self._groups = self._groups, []
        return groups

    def state(self) -> None:
        pass

    def restore(self, state: Any) -> None:
        """Where a run that sampled was in its data does not matter: the dump is read by step."""

    def server_states(self) -> list[str]:
        return [f"no servers: rollouts are read from {self._dump.directory}"]

"""A run on one rank: the policy that every rank holds, what rank 0 alone holds, and the verbs of the main loop."""

from __future__ import annotations

import contextlib
import logging
from types import TracebackType
from typing import Self, TextIO

import torch.distributed as dist

from drpo_megatron.algorithms import compute_advantages
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.observability import Tracker, VerbTimer, Watchdog, progress_display
from drpo_megatron.platform import peak_flops_per_s, peak_memory_bytes
from drpo_megatron.platform.distributed import control_group, from_rank_0
from drpo_megatron.records import RolloutGroup
from drpo_megatron.training.experience import Experience
from drpo_megatron.training.metrics import step_metrics
from drpo_megatron.training.packing import TrainSequence, train_sequences
from drpo_megatron.training.placement import placement_of
from drpo_megatron.training.probe import SyncProbe
from drpo_megatron.training.step import Policy, UpdateResult
from drpo_megatron.weights.exporter import iter_hf_tensors, save_hf

log = logging.getLogger(__name__)


class Run:
    """Context manager: entering starts the server (rank 0) and builds the policy; leaving stops everything it started.

    Every verb is collective: all ranks call it. Groups exist on rank 0 only; the other ranks hold empty lists of them.
    `version` counts the updates that were applied to the weights; the server's tokens carry the version that sampled
    them.
    """

    def __init__(self, config: RunConfig, terminal: TextIO | None, watchdog: Watchdog) -> None:
        self.config = config
        self.terminal = terminal
        self.version = 0
        self.watchdog = watchdog
        self.timer = VerbTimer(watchdog.watch)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as started:
            self.experience: Experience | None = None
            if dist.get_rank() == 0:
                self.experience = started.enter_context(Experience(self.config))
                self.watchdog.server_states = self.experience.server_states
                self.tracker = started.enter_context(Tracker(self.config))
                self.progress = started.enter_context(progress_display(self.config, self.terminal))
            self.placement = placement_of(self.config, self.experience)
            self.policy = self.placement.start(lambda: Policy(self.config))
            self.probe = SyncProbe(self.config, self.policy.hf.vocab_size)
            dist.barrier(control_group())
            self.resources = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resources.close()

    def begin(self, step: int) -> None:
        self.step = self.watchdog.step = step
        self.timer.reset()

    def generate(self) -> list[RolloutGroup]:
        """The groups of this step, sampled and scored. When no server is left, those that come back get the weights and
        make what is missing.
        """
        with self.timer("generate"):
            self.placement.for_generation()
            while not from_rank_0(self.experience.generate() if self.experience else None):
                self._push_weights()
                self.placement.for_generation()
        return self.experience.take_groups() if self.experience else []

    def advantages(self, groups: list[RolloutGroup]) -> None:
        """Set the advantage of every rollout from the rewards of its group."""
        with self.timer("advantages"):
            if self.experience:
                values = compute_advantages(self.config.algorithm.advantage, [g.rewards for g in groups])
                for group, of_group in zip(groups, values, strict=True):
                    for rollout, advantage in zip(group.rollouts, of_group, strict=True):
                        rollout.advantage = advantage

    def pack(self, groups: list[RolloutGroup]) -> list[list[TrainSequence]]:
        """The global batch of each update of this step, on every rank: disjoint parts of the groups."""
        with self.timer("pack"):
            count = self.config.training.updates_per_batch
            parts = [groups[i::count] for i in range(count)]
            algorithm = self.config.algorithm
            return from_rank_0(
                [train_sequences(part, algorithm.aggregation, self.config.horizon) for part in parts]
                if groups
                else None
            )

    def train(self, sequences: list[TrainSequence]) -> UpdateResult:
        """One optimizer update."""
        with self.timer("train"):
            self.placement.for_training()
            result = self.policy.update(sequences, self.version)
        self.version += result.applied
        return result

    def sync(self) -> None:
        """Bring the servers' weights to this version, and verify them."""
        with self.timer("sync"):
            if self.experience:
                self.experience.before_sync()
            self._push_weights()

    def _push_weights(self) -> None:
        """Raises ServerGaveUp when all servers' restarts are used up: every attempt that fails uses one."""
        while True:
            self.placement.for_sync()
            buckets = iter_hf_tensors(
                self.policy.modules, self.policy.hf, bucket_bytes=int(self.config.sync.bucket_mb * 2**20)
            )
            pushed = False
            if self.experience:
                pushed = self.experience.push_weights(buckets, self.version)
            else:
                for _ in buckets:  # this rank's part in gathering each bucket
                    pass
            if from_rank_0(pushed) and self._probe():
                return

    def _probe(self) -> bool:
        """Whether all servers answered. Raises ProbeMismatch on rank 0 when one computes other log-probs."""
        if not from_rank_0(self.experience.probe_is_due() if self.experience else None):
            return True
        self.placement.for_probe()
        scores = from_rank_0(self.experience.probe(self.probe.token_ids) if self.experience else None)
        if scores is None:
            return False
        self.placement.for_sync()
        metrics = self.probe.compare(self.policy, scores)
        if self.experience:
            self.experience.sync_metrics |= metrics
        return True

    def log(self, groups: list[RolloutGroup], results: list[UpdateResult]) -> None:
        """Reduce the step's metrics on rank 0 and write them once."""
        gathered: list[list[UpdateResult]] = [[] for _ in range(dist.get_world_size())]
        is_driver = self.experience is not None
        dist.gather_object(results, gathered if is_driver else None, dst=0, group=control_group())
        if not self.experience:
            return
        metrics = step_metrics(
            self.config,
            groups,
            gathered,
            verb_seconds=self.timer.seconds(),
            sync=self.experience.sync_metrics | self.experience.producer.metrics,
            skipped_updates=self.policy.guard.skipped_total,
            peak_memory_bytes=peak_memory_bytes(),
            peak_flops_per_s=peak_flops_per_s(),
        )
        self.tracker.log(self.step, metrics)
        self.tracker.dump_rollouts(self.step, groups)
        self.progress.update(self.step, metrics)

    def finish(self) -> None:
        """Write the trained model as a Hugging Face directory beside the run's metrics."""
        if self.config.training.export:
            self.placement.for_training()
            out = self.config.run_directory / "hf"
            save_hf(self.policy.modules, self.policy.hf, out, self.config.model.path)

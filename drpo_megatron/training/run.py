"""A run on one rank: the policy that every rank holds, what rank 0 alone holds, and the verbs of the main loop."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self, TextIO

import torch.distributed as dist

from drpo_megatron.algorithms import compute_advantages
from drpo_megatron.checkpoint.saver import Saver, leave_alone_what_stays
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.fp8 import audit
from drpo_megatron.fp8.health import HealthLog
from drpo_megatron.fp8.selection import Selection
from drpo_megatron.observability import Tracker, VerbTimer, Watchdog, progress_display
from drpo_megatron.observability.profiler import StepProfiler
from drpo_megatron.platform import peak_flops_per_s, peak_memory_bytes
from drpo_megatron.platform.distributed import control_group, from_rank_0, to_rank_0
from drpo_megatron.records import Metrics, RolloutGroup
from drpo_megatron.training.metrics import step_metrics
from drpo_megatron.training.packing import TrainSequence, groups_of_updates, train_sequences
from drpo_megatron.training.placement import placement_of
from drpo_megatron.training.probe import SyncProbe
from drpo_megatron.training.replay import ExperienceSource, Replay
from drpo_megatron.training.step import Policy, UpdateResult
from drpo_megatron.training.stop import StopRequested, StopSignal
from drpo_megatron.training.trained_tokens import note_trained_tokens
from drpo_megatron.weights.exporter import iter_hf_tensors, save_hf

if TYPE_CHECKING:
    from drpo_megatron.training.experience import Experience

log = logging.getLogger(__name__)


class Run:
    """Context manager: entering starts the server (rank 0) and builds the policy; leaving stops everything it started.

    source: rank 0's, of groups; experience: the same where servers sample them, None in a replay. Every verb is
    collective: all ranks call it. Groups exist on rank 0 only; the other ranks hold empty lists of them. `version`
    counts the updates that were applied to the weights; the server's tokens carry the version that sampled them.
    `first_step`: the steps that the checkpoint has which this run goes on from.
    """

    def __init__(self, config: RunConfig, terminal: TextIO | None, watchdog: Watchdog, stop: StopSignal) -> None:
        self.config = config
        self.terminal = terminal
        self.version = 0
        self.first_step = 0
        self.stop = stop
        self.saver = Saver(config)
        self._saves = config.save.every is not None or config.save.hf_every is not None
        self.last_metrics: Metrics = {}
        self.health = HealthLog()
        self.watchdog = watchdog
        self.profiler = StepProfiler(config.training.profile_steps, config.run_directory / "profile", dist.get_rank())
        self.timer = VerbTimer(watchdog.watch, self.profiler)
        self._audited = False

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as started:
            self.experience: Experience | None = None
            self.source: ExperienceSource | None = None
            if dist.get_rank() == 0:
                if self.config.rollout.from_dump is None:
                    # Here, because the other ranks need none of what it imports.
                    from drpo_megatron.training.experience import Experience

                    self.source = self.experience = started.enter_context(Experience(self.config, self.stop.is_set))
                else:
                    self.source = started.enter_context(Replay(self.config))
                self.watchdog.server_states = self.source.server_states
            self.placement = placement_of(self.config, self.experience)
            self.policy = self.placement.start(lambda: Policy(self.config))
            leave_alone_what_stays()
            started.callback(self.saver.close)
            if self.config.save.resume:
                self._resume()
            if self.source:
                self.tracker = started.enter_context(Tracker(self.config, self.first_step))
                self.progress = started.enter_context(progress_display(self.config, self.terminal))
            self.probe = SyncProbe(self.config, self.policy.hf.vocab_size)
            dist.barrier(control_group())
            self.resources = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resources.close()

    def _resume(self) -> None:
        """Go on from the newest good checkpoint; start anew when there is none."""
        if resumed := self.saver.resume(self.policy):
            self.first_step, self.version = resumed.manifest.step, resumed.manifest.version
            if self.source and resumed.driver is not None:
                self.source.restore(resumed.driver)

    def begin(self, step: int) -> None:
        self.step = self.watchdog.step = step
        self.profiler.begin(step)
        self.save_metrics = {"save/stall_s": self.timer.seconds().get("save", 0.0)} if self._saves else {}
        self.timer.reset()
        every = self.config.fp8.health_every
        self._examine = every is not None and step % every == 0

    def generate(self) -> list[RolloutGroup]:
        """The groups of this step, sampled and scored. When no server is left, those that come back get the weights and
        make what is missing. Raises StopRequested, with the step not begun.
        """
        with self.timer("generate"):
            self.placement.for_generation()
            while outcome := from_rank_0(self.source.generate(self.step) if self.source else None):
                if outcome == "stopped":
                    self._save_and_stop(self.step)
                self._push_weights()
                self.placement.for_generation()
        return self.source.take_groups() if self.source else []

    def advantages(self, groups: list[RolloutGroup]) -> None:
        """Set the advantage of every rollout from the rewards of its group."""
        with self.timer("advantages"):
            if self.source:
                values = compute_advantages(self.config.algorithm.advantage, [g.rewards for g in groups])
                for group, of_group in zip(groups, values, strict=True):
                    for rollout, advantage in zip(group.rollouts, of_group, strict=True):
                        rollout.advantage = advantage

    def pack(self, groups: list[RolloutGroup]) -> list[list[TrainSequence]]:
        """The global batch of each update of this step, on every rank: disjoint parts of the groups."""
        with self.timer("pack"):
            parts = groups_of_updates(groups, self.config.training.updates_per_batch)
            algorithm = self.config.algorithm
            packed: list[list[TrainSequence]] = from_rank_0(
                [train_sequences(part, algorithm.aggregation, self.config.horizon) for part in parts]
                if groups
                else None
            )
        return packed

    def train(self, sequences: list[TrainSequence]) -> UpdateResult:
        """One optimizer update."""
        with self.timer("train"):
            self.placement.for_training()
            result = self.policy.update(sequences, self.version, examine=self._examine)
            self._audit()
        self._examine = False  # the first update of the step is enough
        self.version += result.applied
        return result

    def _audit(self) -> None:
        """After the first update: whether the trainer computes those layers in FP8 that it should."""
        config, hf = self.config, self.policy.hf
        if config.fp8.recipe is None or self._audited:
            return
        found = audit.audit_trainer(self.policy.modules, hf, Selection.of(config.fp8, hf.num_layers))
        if self.source:
            audit.record(config.run_directory, "trainer", found)
        self._audited = True

    def sync(self) -> None:
        """Bring the servers' weights to this version, and verify them; a replay has no servers."""
        with self.timer("sync"):
            if self.config.rollout.from_dump is not None:
                return
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
            pushed, stopped = from_rank_0((pushed, self.stop.is_set()))
            # A signal to the whole job ends its servers: who goes on later has others.
            if pushed and self._probe():
                self.placement.after_sync()
                return
            if stopped:
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

    def evaluate(self) -> None:
        """In steps that `evaluation.every` names and after the last: let the servers, which hold this step's weights,
        answer the sets; a replay has none. A run that is told to stop does not finish it.
        """
        every, done = self.config.evaluation.every, self.step + 1
        if (
            self.config.rollout.from_dump is not None
            or every is None
            or (done % every and done < self.config.training.steps)
        ):
            return
        with self.timer("evaluate"):
            self.placement.for_probe()
            while from_rank_0(self.experience.evaluate(done) if self.experience else None) == "no server":
                self._push_weights()
                self.placement.for_probe()
            self.placement.for_sync()

    def log(self, groups: list[RolloutGroup], results: list[UpdateResult]) -> None:
        """Reduce the step's metrics on rank 0 and write them once."""
        gathered = to_rank_0(results)
        if not self.source:
            return
        if self.config.tracking.dump_rollouts:
            note_trained_tokens(groups, gathered)
        metrics = step_metrics(
            self.config,
            groups,
            gathered,
            verb_seconds=self.timer.seconds(),
            of_source=self.source.metrics | self.save_metrics,
            skipped_updates=self.policy.guard.skipped_total,
            peak_memory_bytes=peak_memory_bytes(),
            peak_flops_per_s=peak_flops_per_s(),
        )
        looks = [result.fp8 for of_rank in gathered for result in of_rank if result.fp8]
        if looks:
            tensors, of_fp8 = self.health.add(looks)
            metrics |= of_fp8
            self.tracker.log_fp8(self.step, tensors)
        self.last_metrics = metrics
        self.tracker.log(self.step, metrics)
        self.tracker.log_samples(self.step, groups)
        self.tracker.dump_rollouts(self.step, groups)
        self.progress.update(self.step, metrics)

    def save(self) -> None:
        """The checkpoint and the export that are due after this step, and the name of one that was being written.

        Raises StopRequested when the run was told to stop, with a checkpoint complete.
        """
        settings, done = self.config.save, self.step + 1
        with self.timer("save"):
            self.saver.poll()
            if from_rank_0(self.stop.is_set()):
                self._save_and_stop(done)
            if settings.every and (done % settings.every == 0 or done == self.config.training.steps):
                self._save(done)
            if settings.hf_every and done % settings.hf_every == 0:
                self._export(self.config.run_directory / "exports" / f"step_{done:06d}")

    def _save(self, steps_done: int) -> None:
        self.placement.for_training()
        driver = self.source.state() if self.source else None
        self.saver.save(self.policy, steps_done, self.version, driver, self.last_metrics)

    def _save_and_stop(self, steps_done: int) -> NoReturn:
        if steps_done > self.first_step:
            self._save(steps_done)
        self.saver.finish()
        holds = f"{self.config.checkpoint_directory} holds a checkpoint of them" if steps_done else "nothing is lost"
        raise StopRequested(f"stopped as it was told to, after {steps_done} steps; {holds}")

    def _export(self, out: Path) -> None:
        """A run that goes on from a checkpoint may do a step again that has been exported."""
        self.placement.for_training()
        save_hf(self.policy.modules, self.policy.hf, out, self.config.model.path, replace=True)

    def finish(self) -> None:
        """Wait for the last checkpoint, and write the trained model as a Hugging Face directory beside the run's
        metrics.
        """
        self.saver.finish()
        if self.config.training.export:
            self._export(self.config.run_directory / "hf")

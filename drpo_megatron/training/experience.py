"""What rank 0 alone holds: prompts, the rollout servers, the producer of groups, the verifiers, and the weight sync.
`replay.Replay` stands in for it where a former run's rollouts are trained.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import torch

from drpo_megatron.config.functions import import_function
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.data import load_prompts
from drpo_megatron.evaluation.during_training import TrainingEvaluation
from drpo_megatron.fp8 import audit
from drpo_megatron.fp8.rollout import RolloutWeights, server_model
from drpo_megatron.records import Metrics, Prompt, RolloutGroup
from drpo_megatron.rewards import RewardPool
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.client import RolloutClient
from drpo_megatron.rollout.driver import decode
from drpo_megatron.rollout.errors import ServerDied, ServerError, ServersFailed
from drpo_megatron.rollout.experts import RoutedExpertsFormat
from drpo_megatron.rollout.fleet import fleet_of
from drpo_megatron.rollout.probe import ServerScore, score_on_servers
from drpo_megatron.rollout.producer import RolloutProducer, Sampler
from drpo_megatron.rollout.sampler import GroupSampler
from drpo_megatron.rollout.turns import FunctionSampler
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.receivers import Receivers
from drpo_megatron.sync.verify import ServerLayout

log = logging.getLogger(__name__)

_ABORT_S = 30.0
_PROBE_S = 20.0


class Experience:
    """Context manager: entering starts the servers and the verifiers without waiting for them; leaving stops both.

    stopped: whether the run was told to stop. What waits for servers then ends.
    """

    def __init__(self, config: RunConfig, stopped: Callable[[], bool] = lambda: False) -> None:
        self.config = config
        self._stopped = stopped
        self._groups: list[RolloutGroup] = []
        self.sync_metrics: Metrics = {}
        self._evaluation_metrics: Metrics = {}
        self._version = 0
        self._audited = False

    def __enter__(self) -> Self:
        config = self.config
        with contextlib.ExitStack() as started:
            self.fp8_weights = RolloutWeights.of(config)
            if self.fp8_weights:
                self.fp8_weights.write_model(config)
            self.fleet = started.enter_context(fleet_of(config))
            self.rewards = started.enter_context(RewardPool(config.reward, config.data))
            # While the servers start.
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(config.model.path)
            self.evaluation = TrainingEvaluation(config, self.tokenizer)
            self.experts = RoutedExpertsFormat.load(config.model.path)
            self.producer = RolloutProducer(
                config.rollout,
                config.training.updates_per_batch,
                load_prompts(config.data, self.tokenizer, config.seed),
                client=lambda: RolloutClient(self.fleet, config.rollout, self.experts),
                sampler=self._sampler,
                finish=self._finish,
                abort=self._abort,
            )
            started.enter_context(self.producer)
            self._layout = ServerLayout.from_config(
                config.model.path, config.rollout.server.tensor_parallel, getattr(torch, config.model.dtype)
            )
            directory = config.run_directory / "sync"
            self.weights = WeightSync(config.sync, self._layout, server_model(config), directory, self.fleet.api_key)
            started.callback(self.weights.close, servers_alive=False)
            self.resources = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resources.close()

    def connect(self) -> None:
        """Wait for the servers. Raises ServerStartError when one does not come up."""
        self.fleet.wait_all()

    def generate(self, step: int) -> Literal["", "stopped", "no server"]:
        """Wait for the groups of the next step, sampled and scored; returns why there are none. Nothing is lost then.

        Raises GenerationError when living servers keep failing.
        """
        self._evaluation_metrics = {}
        try:
            groups = self.producer.take(self._stopped)
        except ServerDied as death:
            log.warning("generation waits for a server: %s", death)
            return "stopped" if self._stopped() else "no server"
        if groups is None:
            return "stopped"
        self._groups = groups
        return ""

    def go_on(self) -> None:
        """The servers generate with the weights of the last push: sample for the next step."""
        self.producer.synced(self._version)

    def admit_untrained(self) -> None:
        """Let the servers sample with the weights that they started with, version 0, where nobody pushes others. Waits
        for one when none is up. Raises ServerGaveUp when no server is left for good.
        """
        self.fleet.wait_any(self._stopped)
        self.fleet.admit(self.fleet.up(), 0)
        self.go_on()

    def take_groups(self) -> list[RolloutGroup]:
        """The groups of the last complete `generate`."""
        groups, self._groups = self._groups, []
        return groups

    def evaluate(self, steps_done: int) -> Literal["", "stopped", "no server"]:
        """Let the servers answer the sets of `evaluation`; returns why they did not. Raises as `generate` does."""
        try:
            metrics = self.evaluation.run(self.fleet, self._version, steps_done, self._stopped)
        except ServerDied as death:
            log.warning("evaluation waits for a server: %s", death)
            return "stopped" if self._stopped() else "no server"
        if metrics is None:
            return "stopped"
        self._evaluation_metrics = metrics
        return ""

    @property
    def metrics(self) -> Metrics:
        return self.sync_metrics | self.producer.metrics | self._evaluation_metrics

    def state(self) -> Any:
        return self.producer.state()

    def restore(self, state: Any) -> None:
        self.producer.restore(state)

    def before_sync(self) -> None:
        """Wait until the weights may change, as the schedule wants it."""
        try:
            self.producer.before_sync()
        except ServerDied as death:
            log.warning("what was in flight begins again after the sync: %s", death)

    def server_states(self) -> list[str]:
        """Lines for the report on a run that stands still; bounded in time."""
        return self.fleet.states()

    def push_weights(self, buckets: Iterator[list[tuple[str, torch.Tensor]]], version: int) -> bool:
        """Send the stream of full tensors to the servers that are up, quantized for FP8 rollouts; wait for one if none
        is. False when one of them died meanwhile, or there is none and the run was told to stop; the stream is used up
        either way.

        Raises SyncMismatch when a server then holds something else, ServerGaveUp when no server is left for good.
        """
        stream = itertools.chain.from_iterable(self.fp8_weights.stream(buckets) if self.fp8_weights else buckets)
        try:
            with self.fleet.paused():
                self.fleet.wait_any(self._stopped)
                urls = self.fleet.up()
                if not urls:
                    raise ServersFailed({})
                self.weights.connect(urls, self.fleet.comebacks)
                report = self.weights.push(stream, version, stay_paused=self.fleet.is_lent)
                self._audit(urls)
        except ServerError as error:
            for _ in stream:
                pass
            if not isinstance(error, ServersFailed):
                raise
            log.warning("weight version %d did not arrive: %s", version, error)
            self.fleet.report(error.reasons)
            return False
        self.fleet.admit(urls, version)
        self._version = version
        self.sync_metrics = {
            "sync/bytes": float(report.bytes),
            "sync/seconds": report.seconds,
            "sync/buckets": float(report.buckets),
            "sync/verified_parameters": float(report.verified),
            "sync/server_restarts": float(self.fleet.restarts),
            "sync/servers": float(len(urls)),
        }
        if report.delta_share is not None:
            self.sync_metrics["sync/delta_share"] = report.delta_share
        return True

    def _audit(self, urls: Sequence[str]) -> None:
        """Once, when no server generates yet: whether they compute those layers in FP8 that they should."""
        if self.fp8_weights is None or self._audited:
            return
        quantized, directory = self.fp8_weights.quantized, self.config.run_directory
        timeout_s, api_key = self.config.sync.timeout_s, self.fleet.api_key
        found = audit.audit_servers(urls, self._layout, quantized, directory, timeout_s, api_key)
        audit.record(directory, "servers", found)
        self._audited = True

    def probe_is_due(self) -> bool:
        """Whether the last push was verified."""
        return self.sync_metrics["sync/verified_parameters"] > 0

    def probe(self, token_ids: Sequence[int]) -> dict[str, ServerScore] | None:
        """By URL, what the servers make of `token_ids`. None when one of them died."""
        urls, key = self.fleet.serving_urls(), self.fleet.api_key
        try:
            return score_on_servers(urls, token_ids, self.config.sync.timeout_s, self.experts, key)
        except ServerError as error:
            with contextlib.closing(Receivers(urls, 1, key)) as servers:
                gone = servers.unresponsive(_PROBE_S)
            if not gone:
                raise
            log.warning("a rollout server died when it was probed: %s", error)
            self.fleet.report(gone)
            return None

    def _sampler(self, number: int, prompt: Prompt) -> Sampler:
        rollout = self.config.rollout
        seed = f"{self.config.seed}:{number}" if self.config.training.deterministic else None
        if rollout.function is not None:
            function = import_function(rollout.function)
            return FunctionSampler(prompt, rollout.samples_per_prompt, rollout.sampling, function, self.tokenizer, seed)
        return GroupSampler(prompt, rollout.samples_per_prompt, rollout.sampling, seed)

    async def _finish(self, group: RolloutGroup) -> None:
        decode([group], self.tokenizer)
        await self.rewards.score_async(group.rollouts)

    def _abort(self) -> None:
        for url in self.fleet.serving_urls():
            try:
                ServerAdmin(url, self.fleet.api_key).abort_all(_ABORT_S)
            except ServerError as error:
                log.warning("%s did not end its requests: %s", url, error)

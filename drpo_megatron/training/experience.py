"""What rank 0 alone holds: prompts, the rollout server and its client, the verifiers, and the weight sync."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import torch
from transformers import AutoTokenizer

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.data import load_prompts
from drpo_megatron.records import Metrics, Prompt, RolloutGroup
from drpo_megatron.rewards import RewardPool
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.errors import ServerDied, ServerError, ServersFailed
from drpo_megatron.rollout.experts import RoutedExpertsFormat
from drpo_megatron.rollout.probe import ServerScore, score_on_servers
from drpo_megatron.rollout.server import server_of
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.verify import ServerLayout

log = logging.getLogger(__name__)


class Experience:
    """Context manager: entering starts the server and the verifiers without waiting for them; leaving stops both."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._prompts: list[Prompt] = []
        self._groups: list[RolloutGroup] = []
        self.sync_metrics: Metrics = {}

    def __enter__(self) -> Self:
        config = self.config
        with contextlib.ExitStack() as started:
            self.server = started.enter_context(server_of(config))
            self.rewards = started.enter_context(RewardPool(config.reward, config.data))
            tokenizer = AutoTokenizer.from_pretrained(config.model.path)
            self.source = load_prompts(config.data, tokenizer, config.seed)
            self.experts = RoutedExpertsFormat.load(config.model.path)
            self.driver = RolloutDriver(config.rollout, self.server, tokenizer, self.experts)
            self.resources = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resources.close()

    def connect(self) -> None:
        """Wait for the server and open the way for weights to it. Raises ServerStartError when it does not come up."""
        layout = ServerLayout.from_config(
            self.config.model.path, self.server.tensor_parallel, getattr(torch, self.config.model.dtype)
        )
        url = self.server.wait_ready()
        directory = self.config.run_directory / "sync"
        self.weights = WeightSync(self.config.sync, layout, self.config.model.path, directory)
        self.weights.connect([url])
        self.resources.callback(self.weights.close, servers_alive=False)

    def generate(self) -> bool:
        """Sample the groups of a step. False when the server died; the complete groups are kept for the next call.

        Raises GenerationError when a living server keeps failing.
        """
        self._prompts = self._prompts or self.source.next(self.config.rollout.prompts_per_step)
        try:
            self._groups = self.driver.generate(self._prompts)
        except ServerDied as death:
            log.warning("the rollout server died, %d groups are missing: %s", self.driver.pending, death)
            return False
        self._prompts = []
        return True

    def take_groups(self) -> list[RolloutGroup]:
        """The groups of the last complete `generate`."""
        groups, self._groups = self._groups, []
        return groups

    def restart_server(self) -> None:
        """Raises ServerGaveUp after `rollout.server.max_restarts`. The new server needs the weights."""
        self.weights.connect([self.driver.restart_server()])

    def score(self, groups: list[RolloutGroup]) -> None:
        """Set reward and reward_error of every rollout."""
        self.rewards.score([rollout for group in groups for rollout in group.rollouts])

    def push_weights(self, buckets: Iterator[list[tuple[str, torch.Tensor]]], version: int) -> bool:
        """Send the stream of full tensors to the server. False when the server died; the stream is used up either way.

        Raises SyncMismatch when the server then holds something else.
        """
        try:
            report = self.weights.push(itertools.chain.from_iterable(buckets), version)
        except ServerError as error:
            if self.server.alive() and not isinstance(error, ServersFailed):
                raise
            log.warning("the rollout server died before weight version %d arrived: %s", version, error)
            return False
        self.sync_metrics = {
            "sync/bytes": float(report.bytes),
            "sync/seconds": report.seconds,
            "sync/buckets": float(report.buckets),
            "sync/verified_parameters": float(report.verified),
            "sync/server_restarts": float(self.server.restarts),
        }
        return True

    def probe(self, token_ids: Sequence[int]) -> dict[str, ServerScore] | None:
        """By URL, what the servers make of `token_ids`; empty when the last push was not verified. None when the server
        died.
        """
        if not self.sync_metrics["sync/verified_parameters"]:
            return {}
        try:
            return score_on_servers([self.server.url], token_ids, self.config.sync.timeout_s, self.experts)
        except ServerError as error:
            if self.server.alive() and not isinstance(error, ServerDied):
                raise
            log.warning("the rollout server died when it was probed: %s", error)
            return None

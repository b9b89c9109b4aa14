"""What rank 0 alone holds: prompts, the rollout server and its client, the verifiers, and the weight sync."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import torch
from transformers import AutoTokenizer

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.data import load_prompts
from drpo_megatron.records import Metrics, Prompt, RolloutGroup
from drpo_megatron.rewards import RewardPool
from drpo_megatron.rollout.admin import MemoryTag
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.errors import ServerDied, ServerError
from drpo_megatron.rollout.experts import RoutedExpertsFormat
from drpo_megatron.rollout.memory import ServerMemory
from drpo_megatron.rollout.server import server_of
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.verify import ServerLayout

log = logging.getLogger(__name__)

_DEATH_GRACE_S = 2.0


class Experience:
    """Context manager: entering starts the server and the verifiers without waiting for them; leaving stops both."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._prompts: list[Prompt] = []
        self._groups: list[RolloutGroup] = []
        self.sync_metrics: Metrics = {}
        self._server_memory = ServerMemory(config.sync.timeout_s)

    def __enter__(self) -> Self:
        config = self.config
        with contextlib.ExitStack() as started:
            self.server = started.enter_context(server_of(config))
            self.rewards = started.enter_context(RewardPool(config.reward, config.data))
            tokenizer = AutoTokenizer.from_pretrained(config.model.path)
            self.source = load_prompts(config.data, tokenizer, config.seed)
            experts = RoutedExpertsFormat.load(config.model.path)
            self.driver = RolloutDriver(config.rollout, self.server, tokenizer, experts)
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
        self.weights = WeightSync(url, self.config.sync, layout, self.config.model.path, directory)
        self.weights.connect()
        self.resources.callback(self.weights.close, server_alive=False)

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
        url = self.driver.restart_server()
        self._server_memory.restarted()
        self.weights.reconnect(url)

    def release_server_memory(self, *tags: MemoryTag) -> None:
        """Let the server give back device memory; it stops generating until it has all of it again."""
        self._unless_dead(lambda: self._server_memory.release(self.server.url, *tags))

    def resume_server_weights(self) -> None:
        """Memory for the server's weights, which are undefined until the next push."""
        self._unless_dead(lambda: self._server_memory.resume(self.server.url, "weights"))

    def resume_server_cache(self) -> None:
        """The server has all its memory and generates. Raises RuntimeError when no push brought its weights back."""
        if "weights" in self._server_memory.released:
            raise RuntimeError("the server gave its weights up and no sync followed: sync() before generate()")
        self._unless_dead(lambda: self._server_memory.resume(self.server.url, "kv_cache"))

    def _unless_dead(self, request: Callable[[], None]) -> None:
        """A dead server holds no memory, and who wants to use it next finds it dead."""
        try:
            request()
        except ServerError as error:
            if not self._server_died():
                raise
            log.warning("the rollout server died: %s", error)

    def _server_died(self) -> bool:
        """A connection breaks before the end of its process can be seen."""
        deadline = time.monotonic() + _DEATH_GRACE_S
        while alive := self.server.alive():
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return not alive

    def score(self, groups: list[RolloutGroup]) -> None:
        """Set reward and reward_error of every rollout."""
        self.rewards.score([rollout for group in groups for rollout in group.rollouts])

    def push_weights(self, buckets: Iterator[list[tuple[str, torch.Tensor]]], version: int) -> bool:
        """Send the stream of full tensors to the server. False when the server died; the stream is used up either way.

        Raises SyncMismatch when the server then holds something else.
        """
        try:
            report = self.weights.push(
                itertools.chain.from_iterable(buckets), version, stay_paused=bool(self._server_memory.released)
            )
        except ServerError as error:
            if not self._server_died():
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

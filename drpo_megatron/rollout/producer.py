"""Sampled and scored groups for training, as far ahead of it as the schedule allows.

An event loop in a thread of its own keeps groups in flight. Let P be the groups of a step, u its updates, and L the
steps that generation may be ahead (0 synchronous, 1 one step off, ⌊max_staleness / u⌋ asynchronous). A group is begun
only while `begun ≤ (synced + L + 1)·P`, where `synced` counts the batches that were taken and whose training has
reached the servers. A group that was begun after `synced = s` is then trained in step s + L at the latest if the oldest
go first, so that its first token is at most L·u versions old: no answer has to be thrown away for its age.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

from drpo_megatron.config.schema import RolloutConfig
from drpo_megatron.data.prompts import PromptSource
from drpo_megatron.records import Metrics, Prompt, RolloutGroup
from drpo_megatron.rollout.client import RolloutClient
from drpo_megatron.rollout.errors import ServerDied, Stopped
from drpo_megatron.rollout.snapshot import group_from, group_state

log = logging.getLogger(__name__)

_STOP_S = 0.2  # until a stop is noticed
_ABORT_S = 60.0  # for aborted requests to come back with what they have
_ABORT_EVERY_S = 1.0


class Sampler(Protocol):
    """How one group is sampled: `sampler.GroupSampler`, or a user's function (`turns.FunctionSampler`)."""

    async def run(self, client: RolloutClient) -> RolloutGroup: ...

    @property
    def tokens(self) -> int: ...

    def drop_older_than(self, version: int) -> None: ...

    def state(self) -> Any:
        """What was sampled, as plain data and tensors."""

    def restore(self, state: Any) -> None: ...


@dataclass
class Ticket:
    """One group from its prompt to its reward. number: the prompt's in the stream. begun: `synced` when it began. cut:
    a step did not wait for it; the next one does, or slow groups would never be trained.
    """

    number: int
    sampler: Sampler
    begun: int = 0
    cut: bool = False
    group: RolloutGroup | None = None


@dataclass
class StepCounts:
    """Of one step: groups that were sampled, replaced for want of a signal, and carried over with `tokens` sampled."""

    sampled: int = 0
    replaced: int = 0
    carried: int = 0
    tokens: int = 0


@dataclass
class _Ahead:
    """How far generation may be ahead. Counts of batches."""

    steps: int
    taken: int = 0
    synced: int = 0

    def open_groups(self, per_step: int, over_sampling: float) -> int:
        """Groups that may be begun and not taken."""
        waiting = self.taken == self.synced
        return self.steps * per_step + (math.ceil(per_step * over_sampling) if waiting else 0)


def steps_ahead(config: RolloutConfig, updates_per_batch: int) -> int:
    """L of the module's text."""
    if config.schedule == "asynchronous":
        return (config.max_staleness or 0) // updates_per_batch
    return int(config.schedule == "one_step_off")


def staleness_limit(config: RolloutConfig, updates_per_batch: int) -> int:
    """`rollout.max_staleness`, or what the schedule needs."""
    if config.max_staleness is not None:
        return config.max_staleness
    return steps_ahead(config, updates_per_batch) * updates_per_batch


def oldest_version(group: RolloutGroup) -> float:
    """Of the weights that sampled a token; infinity without one. What a function inserted no weights sampled."""
    sampled = (zip(r.weight_versions, r.response_mask, strict=True) for r in group.rollouts)
    return min((version for tokens in sampled for version, own in tokens if own), default=math.inf)


class RolloutProducer:
    """Context manager: entering starts the thread, `synced` the first groups; leaving ends it and what is in flight.

    sampler: makes the sampler of a prompt, which has a number in the stream. finish: decodes and scores a group. abort:
    tells the servers to end what they run, with the tokens they have. All methods are called by one thread, the
    trainer's.
    """

    def __init__(
        self,
        config: RolloutConfig,
        updates_per_batch: int,
        source: PromptSource,
        client: Callable[[], RolloutClient],
        sampler: Callable[[int, Prompt], Sampler],
        finish: Callable[[RolloutGroup], Awaitable[None]],
        abort: Callable[[], None],
    ) -> None:
        self._config = config
        self._source = source
        self._make_client, self._make_sampler = client, sampler
        self._finish, self._abort = finish, abort
        self._limit = staleness_limit(config, updates_per_batch)
        self._ahead = _Ahead(steps_ahead(config, updates_per_batch))
        self._queue: deque[Ticket] = deque()  # to be begun before new prompts
        self._running: dict[asyncio.Task[None], Ticket] = {}
        self._done: list[Ticket] = []
        self._began = False
        self._stopping = False
        self._error: BaseException | None = None
        self._counts, self.counts = StepCounts(), StepCounts()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- called by the trainer ----------------------------------------------------------------------------------

    def take(self, stopped: Callable[[], bool] = lambda: False) -> list[RolloutGroup] | None:
        """The groups of the next step, in the order of the data; waits for them. None when `stopped()` before they are
        there: nothing is taken then.

        Raises ServerDied when no server is left: nothing is lost, and after `synced` it may be called again. Raises
        GenerationError, RewardError or DataError for good.
        """
        self._stopping = False
        work = asyncio.run_coroutine_threadsafe(self._take(), self._loop)
        # Not `result(timeout=…)`, whose TimeoutError a rollout function may raise too.
        while not concurrent.futures.wait([work], timeout=_STOP_S).done:
            if stopped() and not self._stopping:
                self._call(self._stop_waiting())
        return work.result()

    def before_sync(self) -> None:
        """Wait until the weights may change. Raises as `take` does."""
        if self._config.schedule == "one_step_off":
            self._call(self._drained())

    def synced(self, version: int) -> None:
        """The servers hold weight version `version`, the result of all batches that were taken."""
        self._call(self._synced(version))

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as plain data and tensors: the position in the data, and what was begun and not trained.

        Of that, groups that are done and responses that were cut are kept as they are. What the servers are at begins
        again: with its prompt's seed it gives the same, where training is deterministic.
        """
        return self._call(self._state())

    def restore(self, state: dict[str, Any]) -> None:
        """Before the first `synced`: go on where `state` was taken. Prompts that were begun come first, each once."""
        if self._began:
            raise RuntimeError("restore() before the first group is begun")
        self._source.restore(state["source"])
        self._counts = StepCounts(**state["counts"])
        for of_one in state["begun"]:
            prompt = self._source.at(of_one["number"])
            ticket = Ticket(of_one["number"], self._make_sampler(of_one["number"], prompt), cut=of_one["cut"])
            ticket.begun = -of_one["age"]
            if of_one["group"] is None:
                ticket.sampler.restore(of_one["sampled"])
                self._queue.append(ticket)
            else:
                ticket.group = group_from(prompt, of_one["group"])
                self._done.append(ticket)

    # --- in the event loop --------------------------------------------------------------------------------------

    async def _open(self) -> None:
        self._changed = asyncio.Condition()
        self._client = await self._make_client().__aenter__()

    async def _close(self) -> None:
        await self._cancel(list(self._running))
        await self._client.__aexit__(None, None, None)

    async def _stop_waiting(self) -> None:
        async with self._changed:
            self._stopping = True
            self._changed.notify_all()

    async def _take(self) -> list[RolloutGroup] | None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._stopping or self._failed() or self._ready() is not None)
            if self._stopping:
                return None
            self._raise_error()
            batch = self._ready()
            assert batch is not None
            for ticket in batch:
                self._done.remove(ticket)
            self._ahead.taken += 1
            self.counts, self._counts = self._counts, StepCounts()
        if self._config.over_sampling > 1:
            await self._cut()
        await self._pump()
        return [t.group for t in sorted(batch, key=lambda t: t.number) if t.group is not None]

    def _ready(self) -> list[Ticket] | None:
        """The batch, once it is complete: first the groups that must not become older, then those that are done."""
        size = self._config.prompts_per_step
        begun = sorted([*self._done, *self._running.values()], key=lambda t: t.number)
        due = [t for t in begun if t.cut][:size]
        if self._config.schedule == "asynchronous":
            due = [t for t in begun if t.begun <= self._ahead.taken - self._ahead.steps][:size]
        elif self._config.schedule == "one_step_off":
            due = begun[:size]
        if any(ticket.group is None for ticket in due):
            return None
        rest = [ticket for ticket in self._done if ticket not in due]
        batch = [*due, *rest][:size]
        return batch if len(batch) == size else None

    async def _drained(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._running)
            self._raise_error()

    async def _synced(self, version: int) -> None:
        self._began = True
        self._client.version = version
        self._ahead.synced = self._ahead.taken
        if isinstance(self._error, ServerDied):
            self._error = None
        for ticket in list(self._done):
            # only what over-sampling left: see the module's text
            if ticket.group and oldest_version(ticket.group) < version - self._limit:
                self._done.remove(ticket)
                ticket.group = None
                self._queue.append(ticket)
        for ticket in self._queue:
            ticket.sampler.drop_older_than(version - self._limit)
        self._queue = deque(sorted(self._queue, key=lambda t: t.number))
        await self._pump()

    async def _state(self) -> dict[str, Any]:
        begun = sorted([*self._done, *self._running.values(), *self._queue], key=lambda t: t.number)
        # What runs is begun again, and counted then.
        counts = replace(self._counts, sampled=self._counts.sampled - len(self._running))
        return {
            "source": self._source.state(),
            "begun": [self._ticket_state(ticket) for ticket in begun],
            "counts": asdict(counts),
        }

    def _ticket_state(self, ticket: Ticket) -> dict[str, Any]:
        return {
            "number": ticket.number,
            "age": self._ahead.synced - ticket.begun,
            "cut": ticket.cut,
            "sampled": ticket.sampler.state(),
            "group": None if ticket.group is None else group_state(ticket.group),
        }

    async def _pump(self) -> None:
        """Begin as many groups as may be begun."""
        allowed = self._ahead.open_groups(self._config.prompts_per_step, self._config.over_sampling)
        while self._error is None and len(self._running) + len(self._done) < allowed:
            if not self._queue:
                ((number, prompt),) = self._source.take(1)
                self._queue.append(Ticket(number, self._make_sampler(number, prompt)))
            ticket = self._queue.popleft()
            if not ticket.sampler.tokens:
                ticket.begun = self._ahead.synced
            self._counts.sampled += 1
            self._running[asyncio.create_task(self._produce(ticket))] = ticket

    async def _produce(self, ticket: Ticket) -> None:
        """Ends with the ticket done, or back in the queue."""
        task = asyncio.current_task()
        assert task is not None
        group: RolloutGroup | None = None
        error: BaseException | None = None
        try:
            group = await ticket.sampler.run(self._client)
            await self._finish(group)
        except (asyncio.CancelledError, Stopped):
            group = None
        except Exception as failure:  # noqa: BLE001 - raised by the next call of the trainer
            group, error = None, failure
        async with self._changed:
            del self._running[task]
            if group is None:
                self._queue.appendleft(ticket)
                self._error = self._error or error
            elif self._is_replaced(group):
                self._counts.replaced += 1
            else:
                ticket.group = group
                self._done.append(ticket)
            self._changed.notify_all()
        if group is not None:
            await self._pump()

    def _is_replaced(self, group: RolloutGroup) -> bool:
        config = self._config
        signal = max(group.rewards) > min(group.rewards)
        most = config.dynamic_sampling_limit * config.prompts_per_step
        return config.dynamic_sampling and not signal and self._counts.sampled < most

    async def _cut(self) -> None:
        """End what is still in flight; it goes on in the next step."""
        cut = list(self._running)
        if not cut:
            return
        for task in cut:
            self._running[task].cut = True
        self._client.stopped = True
        running, deadline = set(cut), self._loop.time() + _ABORT_S
        while running and self._loop.time() < deadline:
            # Again, because a server that was computing the prompt of a group begins its samples after an abort.
            await asyncio.to_thread(self._abort)
            _, running = await asyncio.wait(running, timeout=_ABORT_EVERY_S)
        await self._cancel(cut)
        self._client.stopped = False
        self.counts.carried = len(self._queue)
        self.counts.tokens = sum(t.sampler.tokens for t in self._queue)

    async def _cancel(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _failed(self) -> bool:
        # With the servers gone everything in flight ends: then, and not before, it can be begun again.
        return self._error is not None and not (isinstance(self._error, ServerDied) and self._running)

    def _raise_error(self) -> None:
        if self._error is not None:
            error = self._error
            if not isinstance(error, ServerDied):
                self._error = None
            raise error

    # --- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call[T](self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @property
    def metrics(self) -> Metrics:
        """Of the last batch that was taken."""
        counts = self.counts
        return {
            "rollout/sampled_groups": float(counts.sampled),
            "rollout/replaced_groups": float(counts.replaced),
            "rollout/carried_groups": float(counts.carried),
            "rollout/carried_tokens": float(counts.tokens),
            "rollout/groups_ready": float(len(self._done)),
        }

"""The order of groups, how far generation runs ahead, that none is lost or trained twice; with a scripted sampler."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from drpo_megatron.config.schema import DataConfig, FunctionData, RolloutConfig, SamplingConfig
from drpo_megatron.data.prompts import PromptSource
from drpo_megatron.data.rows import open_rows
from drpo_megatron.records import Prompt, Rollout, RolloutGroup
from drpo_megatron.rollout import producer as producer_module
from drpo_megatron.rollout.client import RolloutClient
from drpo_megatron.rollout.errors import GenerationError, ServerDied, Stopped
from drpo_megatron.rollout.producer import RolloutProducer

ROWS = 1000


def row(index: int, seed: int) -> dict[str, Any]:
    return {"prompt": f"{index}"}


class Tokenizer:
    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(text)]}


class World:
    """The servers: what runs, since which version, and how long it takes."""

    def __init__(self) -> None:
        self.version = 0
        self.random = random.Random(1)
        self.begun: list[int] = []
        self.down = False
        self.no_signal: set[int] = set()
        self.slow: set[int] = set()
        self.aborted = asyncio.Event()
        self.cutting = False
        self.deaf = 0  # aborts that find nothing to abort

    def group(self, prompt: Prompt, versions: list[int]) -> RolloutGroup:
        flat = prompt.token_ids[0] in self.no_signal
        rollouts = [
            Rollout(prompt, [1] * len(versions), [0.0] * len(versions), list(versions), "stop", reward=reward)
            for reward in (0.0, 0.0 if flat else 1.0)
        ]
        return RolloutGroup(prompt, rollouts)


class Client(RolloutClient):
    """Never asked: the samplers here make their groups themselves."""


class OneGroup:
    def __init__(self, world: World, prompt: Prompt) -> None:
        self.world, self.prompt = world, prompt
        self.versions: list[int] = []

    @property
    def tokens(self) -> int:
        return len(self.versions)

    def drop_older_than(self, version: int) -> None:
        if any(v < version for v in self.versions):
            self.versions.clear()

    def state(self) -> list[int]:
        return list(self.versions)

    def restore(self, state: list[int]) -> None:
        self.versions = list(state)

    async def run(self, client: RolloutClient) -> RolloutGroup:
        self.world.begun.append(self.prompt.token_ids[0])
        for _ in range(self.world.random.randint(1, 4)):
            await asyncio.sleep(0.001)
            if self.world.down:
                raise ServerDied("gone")
            self.versions.append(self.world.version)
        if self.prompt.token_ids[0] in self.world.slow:
            while not self.world.aborted.is_set():
                await asyncio.sleep(0.001)
            if client.stopped:
                raise Stopped
        versions, self.versions = self.versions, []
        return self.world.group(self.prompt, versions)


@contextmanager
def producer(world: World, updates: int = 1, **settings: Any) -> Iterator[RolloutProducer]:
    config = RolloutConfig(
        **{"prompts_per_step": 4, "samples_per_prompt": 2, "sampling": SamplingConfig(max_new_tokens=8)} | settings
    )
    data = DataConfig(source=FunctionData(function=f"{__name__}:row", size=ROWS), chat_template=False, shuffle=False)
    source = PromptSource(data, open_rows(data.source), Tokenizer(), seed=0)

    class Nobody:
        url = "http://127.0.0.1:1"
        api_key = None

        def serving(self) -> int:
            return 1

        def check_soon(self) -> None: ...

    async def finish(group: RolloutGroup) -> None:
        await asyncio.sleep(0)

    def abort() -> None:
        world.cutting = True
        if world.deaf:
            world.deaf -= 1
        else:
            world.aborted.set()

    with RolloutProducer(
        config,
        updates,
        source,
        client=lambda: Client(Nobody(), config),
        sampler=lambda _, prompt: OneGroup(world, prompt),
        finish=finish,
        abort=abort,
    ) as made:
        yield made


def numbers(groups: list[RolloutGroup]) -> list[int]:
    return [g.prompt.token_ids[0] for g in groups]


def oldest(groups: list[RolloutGroup]) -> int:
    return min(v for g in groups for r in g.rollouts for v in r.weight_versions)


def begun(state: dict[str, Any]) -> list[int]:
    return [ticket["number"] for ticket in state["begun"]]


def train(made: RolloutProducer, world: World, steps: int, updates: int = 1) -> list[tuple[list[int], int]]:
    """What each step trained, and how old its oldest token was."""
    trained = []
    made.synced(world.version)
    for _ in range(steps):
        groups = made.take()
        trained.append((numbers(groups), world.version - oldest(groups)))
        made.before_sync()
        world.version += updates
        made.synced(world.version)
    return trained


def test_synchronous_is_in_order_and_never_stale() -> None:
    world = World()
    with producer(world) as made:
        trained = train(made, world, 5)
    assert [n for n, _ in trained] == [list(range(4 * s, 4 * s + 4)) for s in range(5)]
    assert {age for _, age in trained} == {0}
    assert len(world.begun) <= 24, "a step's groups are begun after its weights arrived, and only those"


def test_one_step_off_is_one_step_old_and_in_order() -> None:
    world = World()
    with producer(world, updates=2, schedule="one_step_off") as made:
        trained = train(made, world, 6, updates=2)
    assert [n for n, _ in trained] == [list(range(4 * s, 4 * s + 4)) for s in range(6)]
    # the first two batches are begun together
    assert [age for _, age in trained] == [0, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(("staleness", "updates"), [(1, 1), (3, 1), (4, 2), (8, 2)])
def test_asynchronous_is_bounded_and_loses_nothing(staleness: int, updates: int) -> None:
    world = World()
    world.slow = {5}  # one that takes longer than several steps
    with producer(world, updates=updates, schedule="asynchronous", max_staleness=staleness) as made:
        made.synced(0)
        ages, trained = [], []
        for step in range(40):
            if step == min(3, staleness // updates):
                world.aborted.set()  # the slow one ends, because from here on it would be waited for
            groups = made.take()
            trained += numbers(groups)
            ages.append(world.version - oldest(groups))
            world.version += updates
            made.synced(world.version)
        left = begun(made.state())
    assert max(ages) <= staleness and max(ages) > 0
    assert Counter(trained + left) == Counter(range(len(trained) + len(left)))
    assert len(left) <= 4 * (staleness // updates + 1)


def test_a_death_loses_nothing_and_trains_nothing_twice() -> None:
    world = World()
    with producer(world, schedule="asynchronous", max_staleness=2) as made:
        made.synced(0)
        trained: list[int] = []
        deaths = 0
        for step in range(20):
            world.down = world.down or step % 6 == 3  # until it is noticed
            while True:
                try:
                    groups = made.take()
                    break
                except ServerDied:
                    deaths += 1
                    world.down = False
                    made.synced(world.version)
            trained += numbers(groups)
            world.version += 1
            made.synced(world.version)
        world.down = False
        left = begun(made.state())
    assert deaths == 3
    assert Counter(trained + left) == Counter(range(len(trained) + len(left)))


def test_the_position_survives_a_restart() -> None:
    world = World()
    with producer(world, schedule="asynchronous", max_staleness=2) as made:
        before = [n for step, _ in train(made, world, 5) for n in step]
        state = made.state()
    again = World()
    with producer(again, schedule="asynchronous", max_staleness=2) as made:
        made.restore(state)
        after = [n for step, _ in train(made, again, 5) for n in step]
        left = begun(made.state())
        with pytest.raises(RuntimeError, match="before the first group"):
            made.restore(state)
    done = [ticket["number"] for ticket in state["begun"] if ticket["group"] is not None]
    assert done and not set(again.begun) & set(done)  # trained as they were sampled
    wanted = [number for number in begun(state) if number not in done]
    assert again.begun[: len(wanted)] == wanted
    assert Counter(before + after + left) == Counter(range(len(before + after + left)))


def test_what_is_kept_over_a_restart_is_never_too_old() -> None:
    """Of a run with slow groups: those that were cut go on with the tokens they have, as far as they may."""
    world = World()
    world.slow = {0, 3}
    with producer(world, over_sampling=1.5, max_staleness=1) as made:
        made.synced(0)
        assert numbers(made.take()) == [1, 2, 4, 5]
        state = made.state()
    kept = {ticket["number"]: ticket["sampled"] for ticket in state["begun"]}
    assert kept.keys() == {0, 3} and all(kept.values()) and all(ticket["cut"] for ticket in state["begun"])
    for version, goes_on in ((1, True), (2, False)):
        again = World()
        again.version = version
        with producer(again, over_sampling=1.5, max_staleness=1) as made:
            made.restore(state)
            made.synced(version)
            groups = made.take()
            assert groups is not None and numbers(groups)[:2] == [0, 3]
            assert all((r.weight_versions[0] == 0) is goes_on for g in groups[:2] for r in g.rollouts)


def test_a_cut_aborts_until_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that still computes a prompt begins its samples after the first abort."""
    monkeypatch.setattr(producer_module, "_ABORT_EVERY_S", 0.01)
    world = World()
    world.slow, world.deaf = {0}, 2
    with producer(world, over_sampling=1.25) as made:
        made.synced(0)
        assert numbers(made.take()) == [1, 2, 3, 4]
        assert world.aborted.is_set() and world.deaf == 0 and made.counts.tokens > 0


def test_a_stop_in_a_cut_leaves_the_groups_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken by then, and in no state that is saved."""
    monkeypatch.setattr(producer_module, "_ABORT_EVERY_S", 0.5)
    world = World()
    world.slow, world.deaf = {0}, 1
    with producer(world, over_sampling=1.25) as made:
        made.synced(0)
        groups = made.take(lambda: bool(world.cutting))
        assert groups is not None and numbers(groups) == [1, 2, 3, 4]


def test_a_stop_takes_nothing() -> None:
    world = World()
    world.slow = set(range(4))
    with producer(world) as made:
        made.synced(0)
        assert made.take(lambda: True) is None
        world.aborted.set()
        groups = made.take(lambda: False)
        assert groups is not None and numbers(groups) == [0, 1, 2, 3]


def test_groups_without_a_signal_are_replaced_within_a_limit() -> None:
    world = World()
    world.no_signal = {1, 2, 5, 6, 7}
    with producer(world, dynamic_sampling=True) as made:
        (first, _), (second, _) = train(made, world, 2)
        assert not set(first + second) & world.no_signal
    world = World()
    world.no_signal = set(range(ROWS))
    with producer(world, dynamic_sampling=True, dynamic_sampling_limit=2) as made:
        made.synced(0)
        assert len(made.take()) == 4
        assert made.metrics["rollout/sampled_groups"] == 8 and made.metrics["rollout/replaced_groups"] == 4


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_over_sampling_cuts_and_carries_over(max_staleness: int) -> None:
    world = World()
    world.slow = {0, 3}
    with producer(world, over_sampling=1.5, max_staleness=max_staleness) as made:
        made.synced(0)
        assert numbers(made.take()) == [1, 2, 4, 5]
        assert made.metrics["rollout/carried_groups"] == 2 and made.metrics["rollout/carried_tokens"] > 0
        world.slow, world.version = set(), 1
        made.synced(1)
        groups = made.take()
    assert {0, 3} <= set(numbers(groups)) or len(world.begun) >= 12  # they compete with the others
    carried = [g for g in groups if g.prompt.token_ids[0] in (0, 3)]
    kept = [min(r.weight_versions) for g in carried for r in g.rollouts]
    assert kept and set(kept) == {1 - max_staleness}
    assert Counter(world.begun)[0] == Counter(world.begun)[3] == 2


@pytest.mark.parametrize("error", [GenerationError("no"), TimeoutError("no")], ids=lambda e: type(e).__name__)
def test_another_error_reaches_the_trainer(error: Exception) -> None:
    """A user's function may well raise a TimeoutError, which is not one of waiting for it."""
    world = World()

    class Broken(OneGroup):
        async def run(self, client: RolloutClient) -> RolloutGroup:
            raise error

    with producer(world) as made:
        made._make_sampler = lambda _, prompt: Broken(world, prompt)
        made.synced(0)
        outcome: list[BaseException | None] = []
        took = threading.Thread(target=lambda: outcome.append(failure_of(made.take)), daemon=True)
        took.start()
        took.join(timeout=300)
        assert [repr(failure) for failure in outcome] == [repr(error)]


def failure_of(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except (GenerationError, TimeoutError) as error:
        return error
    return None


def test_what_a_function_inserted_is_of_no_weights() -> None:
    """Such tokens, before the first sampled one, have version 0 and make no group too old for training."""
    rollout = Rollout(Prompt("0", "", [1]), [1] * 3, [0.0] * 3, [0, 7, 8], "stop", response_mask=[0, 1, 1])
    assert producer_module.oldest_version(RolloutGroup(rollout.prompt, [rollout])) == 7

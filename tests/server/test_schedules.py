"""A real SGLang server whose weights change while it generates, whose requests are cut, and that is asked in turns."""

from __future__ import annotations

import copy
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig, ServerConfig, SyncConfig
from drpo_megatron.data.prompts import PromptSource
from drpo_megatron.records import Prompt, Rollout, RolloutGroup
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.client import RolloutClient
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.errors import ServerDied, ServerStartError
from drpo_megatron.rollout.fleet import Fleet
from drpo_megatron.rollout.member import Member
from drpo_megatron.rollout.producer import RolloutProducer, Sampler
from drpo_megatron.rollout.sampler import GroupSampler
from drpo_megatron.rollout.server import ExternalServer, SGLangServer
from drpo_megatron.rollout.turns import FunctionSampler, Session, Trajectory
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.verify import ServerLayout
from tests.support import tiny_models
from tests.support.servers import make_prompts, perturb

pytestmark = pytest.mark.server

PROMPTS = make_prompts(64, tiny_models.VOCAB_SIZE)
TOLERANCE = 1e-4
LONG = SamplingConfig(max_new_tokens=300, ignore_eos=True)


class Stream(PromptSource):
    """The prompts, in order."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, n: int) -> list[tuple[int, Prompt]]:
        first, self._next = self._next, self._next + n
        return [(i, PROMPTS[i]) for i in range(first, self._next)]

    def state(self) -> dict[str, int]:
        return {"next": self._next}


@dataclass
class Setup:
    fleet: Fleet
    weights: WeightSync
    path: Path
    models: dict[int, PreTrainedModel]
    """Every version that was pushed."""

    @property
    def version(self) -> int:
        return max(self.models)

    def push(self) -> None:
        model = copy.deepcopy(self.models[self.version])
        perturb(model, self.version)
        self.models[self.version + 1] = model
        with self.fleet.paused():
            self.weights.connect(self.fleet.up())
            self.weights.push(model.state_dict().items(), self.version)
        self.fleet.admit(self.fleet.up(), self.version)

    @contextmanager
    def producer(
        self, config: RolloutConfig, sampler: Callable[[Prompt], Sampler] | None = None
    ) -> Iterator[RolloutProducer]:
        async def reward(group: RolloutGroup) -> None:
            for i, rollout in enumerate(group.rollouts):
                rollout.reward = float(i % 2)

        def abort() -> None:
            ServerAdmin(self.fleet.url).abort_all(30)

        with RolloutProducer(
            config,
            1,
            Stream(),
            client=lambda: RolloutClient(self.fleet, config),
            sampler=sampler or (lambda _, prompt: GroupSampler(prompt, config.samples_per_prompt, config.sampling)),
            finish=reward,
            abort=abort,
        ) as made:
            yield made

    def largest_error(self, rollouts: list[Rollout]) -> float:
        """Of log μ of every sampled token, against transformers with the weights of that token's version."""
        largest = 0.0
        for rollout in rollouts:
            tokens_T = torch.tensor(rollout.prompt.token_ids + rollout.response_ids)
            start = len(rollout.prompt.token_ids)
            for version in set(rollout.weight_versions):
                with torch.no_grad():
                    logits_TV = self.models[version](tokens_T[None]).logits[0, start - 1 : -1].float()
                logprobs_T = torch.log_softmax(logits_TV, dim=-1).gather(1, tokens_T[start:, None])[:, 0]
                mine_T = torch.tensor(rollout.weight_versions) == version
                sampled_T = mine_T & torch.tensor(rollout.response_mask).bool()
                difference_T = (logprobs_T - torch.tensor(rollout.logmu)).abs()[sampled_T]
                largest = max([largest, *difference_T.tolist()])
        return largest


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    path = tmp_path_factory.mktemp("qwen3")
    model = tiny_models.write("qwen3", path)
    server = SGLangServer(ServerConfig(), path, "float32", 0, path / "log" / "server-0.log")
    layout = ServerLayout.from_config(path, 1, torch.float32)
    weights = WeightSync(SyncConfig(bucket_mb=0.05, timeout_s=60), layout, path, path / "sync")
    with Fleet(ServerConfig(), [Member("server-0", server)], None, None) as fleet:
        fleet.wait_all()
        made = Setup(fleet, weights, path, {0: model})
        made.push()
        yield made
        weights.close(servers_alive=False)


def settings(**changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"prompts_per_step": 4, "samples_per_prompt": 4, "sampling": LONG} | changes)


def rollouts_of(groups: list[RolloutGroup]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def test_weights_that_change_in_the_middle_of_responses(setup: Setup) -> None:
    """Each token has the version that sampled it, and its log-prob is that version's."""
    config = settings(schedule="asynchronous", max_staleness=2)
    trained: list[Rollout] = []
    numbers: list[str] = []
    with setup.producer(config) as producer:
        producer.synced(setup.version)
        for _ in range(4):
            groups = producer.take()
            numbers += [group.prompt.id for group in groups]
            trained += rollouts_of(groups)
            assert min(v for r in rollouts_of(groups) for v in r.weight_versions) >= setup.version - 2
            producer.before_sync()
            setup.push()
            producer.synced(setup.version)
    mixed = [r for r in trained if len(set(r.weight_versions)) > 1]
    assert mixed, "the weights must have changed in the middle of a response"
    assert all(r.weight_versions == sorted(r.weight_versions) for r in trained)
    assert all(len(r.response_ids) == LONG.max_new_tokens and r.finish_reason == "length" for r in trained)
    assert setup.largest_error(trained) < TOLERANCE
    assert max(Counter(numbers).values()) == 1


def test_what_is_cut_goes_on_with_what_it_had(setup: Setup) -> None:
    config = settings(over_sampling=2.0, max_staleness=1, prompts_per_step=2)
    slow = SamplingConfig(max_new_tokens=450, ignore_eos=True)
    short = SamplingConfig(max_new_tokens=20, ignore_eos=True)

    def sampler(_: int, prompt: Prompt) -> Sampler:
        return GroupSampler(prompt, 4, slow if prompt in PROMPTS[:2] else short)

    before = setup.version
    with setup.producer(config, sampler) as producer:
        producer.synced(before)
        groups = producer.take()
        assert [group.prompt.id for group in groups] == ["prompt-2", "prompt-3"]
        assert producer.metrics["rollout/carried_groups"] == 2
        had = producer.metrics["rollout/carried_tokens"]
        assert had > 0
        setup.push()
        producer.synced(setup.version)
        carried = producer.take()
    assert [group.prompt.id for group in carried] == ["prompt-0", "prompt-1"], "no group is cut twice"
    made = rollouts_of(carried)
    assert all(len(r.response_ids) == 450 for r in made)
    assert sum(v == before for r in made for v in r.weight_versions) == had
    assert setup.largest_error(made + rollouts_of(groups)) < TOLERANCE


def test_turns_with_inserted_tokens(setup: Setup) -> None:
    async def two_turns(prompt: Prompt, session: Session) -> Trajectory:
        trajectory = Trajectory(prompt)
        await session.sample(trajectory, max_new_tokens=7)
        assert session.insert(trajectory, "tool") > 0
        await session.sample(trajectory, max_new_tokens=9)
        return trajectory

    tokenizer = AutoTokenizer.from_pretrained(setup.path)
    config = settings(prompts_per_step=3)
    with setup.producer(config, lambda _, prompt: FunctionSampler(prompt, 4, LONG, two_turns, tokenizer)) as producer:
        producer.synced(setup.version)
        made = rollouts_of(producer.take())
    inserted = tokenizer("tool", add_special_tokens=False)["input_ids"]
    for rollout in made:
        assert rollout.response_mask == [1] * 7 + [0] * len(inserted) + [1] * 9
        assert rollout.response_ids[7:-9] == inserted
    assert setup.largest_error(made) < TOLERANCE


def test_a_server_that_was_started_elsewhere(setup: Setup) -> None:
    """Known by its address alone, it gets the weights, serves, and is left running."""
    config = ServerConfig(addresses=[setup.fleet.url])
    with Fleet(config, [Member("server-0", ExternalServer(setup.fleet.url))], None, None) as elsewhere:
        elsewhere.wait_all()
        assert elsewhere.commands() == [] and elsewhere.up() == [setup.fleet.url]
        other = Setup(elsewhere, setup.weights, setup.path, setup.models)
        with setup.fleet.paused():
            other.push()
        setup.fleet.admit(setup.fleet.up(), setup.version)
        groups = RolloutDriver(settings(), elsewhere, AutoTokenizer.from_pretrained(setup.path)).generate(PROMPTS[:4])
        assert f"weight version {setup.version}" in "\n".join(elsewhere.states())
    assert {v for r in rollouts_of(groups) for v in r.weight_versions} == {setup.version}
    assert setup.largest_error(rollouts_of(groups)) < TOLERANCE
    assert setup.fleet.serving() == 1
    nobody = Fleet(
        ServerConfig(start_timeout_s=1, health_timeout_s=1, max_restarts=0),
        [Member("server-0", ExternalServer("http://127.0.0.1:9"))],
        None,
        None,
    )
    with nobody, pytest.raises(ServerStartError, match=r"not ready after rollout\.server\.start_timeout_s = 1 s"):
        nobody.wait_all()


def test_a_death_is_waited_out(setup: Setup) -> None:
    """Last. With the only server gone nothing is lost: it comes back, gets the weights, and everything is sampled."""
    (member,) = setup.fleet._members
    pid = member.server.pid
    assert pid is not None
    config = settings(schedule="asynchronous", max_staleness=2)
    taken: list[str] = []
    with setup.producer(config) as producer:
        producer.synced(setup.version)
        taken += [group.prompt.id for group in producer.take()]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ServerDied):
            for _ in range(4):  # what was complete before is taken first
                taken += [group.prompt.id for group in producer.take()]
        setup.fleet.wait_any()
        assert member.restarts == 1
        setup.push()
        producer.synced(setup.version)
        groups = producer.take()
        taken += [group.prompt.id for group in groups]
        begun = [ticket["number"] for ticket in producer.state()["begun"]]
    assert sorted(taken + [PROMPTS[n].id for n in begun]) == sorted(p.id for p in PROMPTS[: len(taken) + len(begun)])
    assert setup.largest_error(rollouts_of(groups)) < TOLERANCE

"""A real SGLang server whose weights change while it generates, whose requests are cut, and that is asked in turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from transformers import AutoTokenizer

from drpo_megatron.config.schema import SamplingConfig, ServerConfig
from drpo_megatron.records import Prompt, Rollout
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.errors import ServerStartError
from drpo_megatron.rollout.fleet import Fleet
from drpo_megatron.rollout.member import Member
from drpo_megatron.rollout.producer import Sampler
from drpo_megatron.rollout.sampler import GroupSampler
from drpo_megatron.rollout.server import ExternalServer
from drpo_megatron.rollout.turns import FunctionSampler, Session, Trajectory
from tests.support.schedules import LONG, PROMPTS, TOLERANCE, Schedule, rollouts_of, settings
from tests.support.server_pool import Loans
from tests.support.servers import LIMIT_S

pytestmark = pytest.mark.server


@pytest.fixture
def setup(borrow: Loans) -> Iterator[Schedule]:
    """A fleet of one server, which was started elsewhere, with the weights of a push."""
    pooled = borrow("plain")
    weights = pooled.sync(bucket_mb=0.05)
    settings = ServerConfig(addresses=[pooled.url], start_timeout_s=LIMIT_S, health_timeout_s=LIMIT_S)
    with Fleet(settings, [Member("server-0", ExternalServer(pooled.url))], None, None) as fleet:
        fleet.wait_all()
        made = Schedule(fleet, weights, pooled.model, {0: pooled.reference()})
        made.push()
        yield made
        assert fleet.restarts == 0
        weights.close()


def test_weights_that_change_in_the_middle_of_responses(setup: Schedule) -> None:
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


def test_what_is_cut_goes_on_with_what_it_had(setup: Schedule) -> None:
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


def test_turns_with_inserted_tokens(setup: Schedule) -> None:
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


def test_a_server_that_was_started_elsewhere(setup: Schedule) -> None:
    """Known by its address alone, it gets the weights, serves, and is left running."""
    url = setup.fleet.url
    assert setup.fleet.commands() == [] and setup.fleet.up() == [url] and setup.fleet.serving() == 1
    driver = RolloutDriver(settings(), setup.fleet, AutoTokenizer.from_pretrained(setup.path))
    groups = driver.generate(PROMPTS[:4])
    assert f"weight version {setup.version}" in "\n".join(setup.fleet.states())
    assert {v for r in rollouts_of(groups) for v in r.weight_versions} == {setup.version}
    assert setup.largest_error(rollouts_of(groups)) < TOLERANCE
    with Fleet(ServerConfig(addresses=[url]), [Member("server-0", ExternalServer(url))], None, None) as another:
        another.wait_all()
    assert setup.fleet.serving() == 1 and ServerAdmin(url).model_info(LIMIT_S)["weight_version"] == str(setup.version)


def test_nobody_at_the_address() -> None:
    nobody = Fleet(
        ServerConfig(start_timeout_s=1, health_timeout_s=1, max_restarts=0),
        [Member("server-0", ExternalServer("http://127.0.0.1:9"))],
        None,
        None,
    )
    with nobody, pytest.raises(ServerStartError, match=r"not ready after rollout\.server\.start_timeout_s = 1 s"):
        nobody.wait_all()

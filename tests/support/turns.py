"""A trainer that takes turns with two servers on their devices: what the tests of their memory share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from drpo_megatron.config.schema import SamplingConfig
from drpo_megatron.records import RolloutGroup
from drpo_megatron.rollout.memory import FleetMemory
from tests.support import tiny_models
from tests.support.fleets import Pair
from tests.support.servers import LIMIT_S, largest_logprob_error, make_prompts, perturb

SAMPLING = SamplingConfig(temperature=0.7, max_new_tokens=24)
PROMPTS = make_prompts(4, tiny_models.VOCAB_SIZE)
TOLERANCE = 1e-4


@dataclass
class Turns:
    """The servers, their memory, and the way of weights to them."""

    pair: Pair
    memory: FleetMemory
    transport: str = "distributed"

    def __post_init__(self) -> None:
        self.weights = self.pair.way(transport=self.transport)

    def push(self) -> None:
        """As `Experience.push_weights` does it."""
        pair = self.pair
        pair.version += 1
        perturb(pair.model, pair.version)
        urls = pair.fleet.up()
        self.weights.connect(urls, pair.fleet.comebacks)
        tensors = pair.model.state_dict().items()
        assert self.weights.push(tensors, pair.version, stay_paused=pair.fleet.is_lent).verified
        pair.fleet.admit(urls, pair.version)

    def turn(self) -> None:
        """From training to generation."""
        self.memory.release("kv_cache", "weights")
        self.memory.resume_weights()
        self.push()
        self.memory.resume_all()
        assert not self.pair.fleet.is_lent

    def generate(self) -> list[RolloutGroup]:
        return self.pair.driver.generate(PROMPTS, 2, SAMPLING)

    def check(self, groups: list[RolloutGroup]) -> None:
        """Tokens are of the last push, with its log-probs."""
        assert {v for g in groups for r in g.rollouts for v in r.weight_versions} == {self.pair.version}
        assert largest_logprob_error(groups, self.pair.model, SAMPLING.temperature) < TOLERANCE

    @property
    def lacking(self) -> list[frozenset[str]]:
        return list(self.memory.released.values())


@contextmanager
def turns_of(pair: Pair, transport: str = "distributed") -> Iterator[Turns]:
    """Its way of weights is closed at the end."""
    made = Turns(pair, FleetMemory(pair.fleet, timeout_s=LIMIT_S), transport)
    try:
        yield made
    finally:
        made.weights.close()

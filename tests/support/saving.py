"""A trainer that saves all the time, for test_killed_while_saving: imported once, where its runs are forked."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

from drpo_megatron import platform

platform.activate()

from drpo_megatron.checkpoint.saver import Saver  # noqa: E402 - Megatron-Core is imported after the platform is ready
from drpo_megatron.config.schema import RunConfig  # noqa: E402
from drpo_megatron.platform import distributed  # noqa: E402
from drpo_megatron.platform.ports import free_port  # noqa: E402
from drpo_megatron.training.step import Policy  # noqa: E402
from tests.support.updates import make_sequences  # noqa: E402


def train(config: RunConfig, asynchronous: bool, tell: Connection) -> None:
    """Go on from the newest checkpoint; one update a step, a checkpoint after each. Tells (what, step) until killed."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(rank, MASTER_PORT=str(free_port("127.0.0.1")))
    distributed.initialize(config.layout, seed=0)
    policy = Policy(config)
    saver = Saver(config.model_copy(update={"save": config.save.model_copy(update={"asynchronous": asynchronous})}))
    resumed = saver.resume(policy)
    step = resumed.manifest.step if resumed else 0
    if resumed:
        assert (resumed.manifest.version, resumed.driver["steps"]) == (step, list(range(step)))
        assert policy.scheduler.num_steps == step
    tell.send(("resumed", step))
    sequences = make_sequences(policy.hf.vocab_size)
    while True:
        policy.update(sequences, step)
        step += 1
        saver.save(policy, step, step, {"steps": list(range(step))}, {})
        # An asynchronous one is complete when the next one begins.
        tell.send(("complete", step - 1 if asynchronous else step))

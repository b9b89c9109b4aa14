"""Servers that die while the trainer has their memory: `tests/server/test_server_memory.py` has the rest."""

from __future__ import annotations

import os
import signal
import time

import pytest

from drpo_megatron.rollout.errors import ServersFailed
from drpo_megatron.rollout.member import State
from tests.support.fleets import Pair, wait_for
from tests.support.servers import LIMIT_S
from tests.support.turns import turns_of

pytestmark = pytest.mark.server


def test_no_server_starts_while_the_trainer_has_the_devices(pair: Pair) -> None:
    """One is killed; the other ends because it is asked for what it has, which is why FleetMemory counts. When none is
    left the trainer makes room, and both come back.
    """
    with turns_of(pair) as setup:
        fleet, memory = pair.fleet, setup.memory
        killed, failing = pair.members
        memory.release("kv_cache", "weights")
        with pytest.raises(RuntimeError, match="no sync followed"):
            memory.resume_all()
        assert killed.server.pid is not None
        os.killpg(killed.server.pid, signal.SIGKILL)
        wait_for(lambda: killed.state is State.RESTING and time.monotonic() > killed.at + 1, fleet)
        memory.resume_weights()
        setup.push()
        assert setup.lacking == [{"kv_cache"}] and fleet.serving() == 1

        assert memory.release("kv_cache", "weights") == 1
        pair.admin(failing.server.url).resume_memory(["weights"], LIMIT_S)
        memory.resume_weights()
        assert (killed.state, failing.state) == (State.RESTING, State.RESTING) and fleet.is_lent
        with pytest.raises(ServersFailed):
            fleet.wait_any()  # a push that finds none: it cannot wait for what does not start
        assert memory.release("kv_cache") == 0
        time.sleep(2)
        assert (killed.restarts, failing.restarts) == (0, 0), "it would take the memory that the trainer has"

        memory.wait_any()
        assert not fleet.is_lent and fleet.up()
        # waits for the other one, and takes its memory too
        assert memory.release("kv_cache", "weights") == 2
        assert setup.lacking == [{"kv_cache", "weights"}] * 2
        memory.resume_weights()
        setup.push()
        memory.resume_all()
        assert fleet.serving() == 2 and (killed.restarts, failing.restarts) == (1, 1)
        setup.check(setup.generate())

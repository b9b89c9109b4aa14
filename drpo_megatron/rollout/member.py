"""One server of a fleet: its state, and what a check finds."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum

from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerError
from drpo_megatron.rollout.server import ExternalServer, Server


class State(StrEnum):
    STARTING = "starting"
    WAITING = "waiting for weights"
    SERVING = "serving"
    RESTING = "waiting to restart"
    LOST = "given up"


@dataclass(frozen=True)
class Fault:
    """What a check found. `old_weights`: the server is well and holds other weights than it was given."""

    reason: str
    old_weights: bool = False


@dataclass
class Member:
    """One server of the fleet. `version`: of the weights it got in the last push it took part in."""

    name: str
    server: Server
    state: State = State.STARTING
    version: int | None = None
    restarts: int = 0
    at: float = 0.0
    """When it started, or when it is to be restarted; monotonic clock."""
    failed_checks: int = 0
    next_check: float = 0.0
    check: Future[Fault | None] | None = None
    reason: str = ""
    """Why it was last taken out."""
    log_tail: str = ""
    load: tuple[int, int] | None = None
    """Requests that it ran and that waited in it when it was last looked at; None where it does not say."""

    def row(self) -> str:
        """For people: a line of the table."""
        version = "none" if self.version is None else str(self.version)
        url = "no address" if self.state in (State.RESTING, State.LOST) else self.server.url
        last = f", last failure: {self.reason}" if self.reason else ""
        return f"{self.name} ({url}): {self.state}, weight version {version}, {self.restarts} restarts{last}"

    def status(self) -> dict[str, object]:
        """For programs: what `row` says, and the load of a server in traffic."""
        running, waiting = self.load if self.load and self.state is State.SERVING else (None, None)
        return {
            "name": self.name,
            "url": None if self.state in (State.RESTING, State.LOST) else self.server.url,
            "state": str(self.state),
            "version": self.version,
            "restarts": self.restarts,
            "running": running,
            "waiting": waiting,
            "reason": self.reason,
        }

    def examine(self, limit_s: float, api_key: str | None) -> Fault | None:
        """What is wrong with it now, asked of the server: may take twice `limit_s`."""
        server, state, version = self.server, self.state, self.version
        if state is State.STARTING and self.restarts and isinstance(server, ExternalServer):
            # It is not ended by a restart, and the push that failed may have left it paused, which generates nothing.
            with contextlib.suppress(ServerError):
                ServerAdmin(server.url, api_key).continue_generation(limit_s)
        if not server.healthy(limit_s):
            return Fault(f"does not generate within rollout.server.health_timeout_s = {limit_s:g} s")
        if state is State.SERVING:
            admin = ServerAdmin(server.url, api_key)
            try:
                held = admin.model_info(limit_s)["weight_version"]
            except ServerError as error:
                return Fault(str(error))
            if held != str(version):
                return Fault(f"has weight version {held} where the last push was {version}", old_weights=True)
            try:
                self.load = admin.load(limit_s)
            except ServerError:
                self.load = None  # people alone read it: whether the server is well was asked above
        return None

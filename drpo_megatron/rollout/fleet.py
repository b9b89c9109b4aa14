"""The rollout servers of a run: who is alive, with which weights, and that the dead come back.

A server is in traffic only with the weights of the last push. One that dies, hangs, or answers with other weights is
taken out, restarted with a growing delay, and put back by the next push.

The servers' devices may be lent to the trainer (`Fleet.lent`). No server starts meanwhile: it would take the memory
that the trainer has, and size its KV cache by what the trainer leaves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from drpo_megatron.config.schema import RunConfig, ServerConfig
from drpo_megatron.fp8.rollout import server_model, server_settings
from drpo_megatron.rollout.errors import ServerError, ServerGaveUp, ServersFailed, ServerStartError
from drpo_megatron.rollout.experts import RoutedExpertsFormat
from drpo_megatron.rollout.member import Fault, Member, State
from drpo_megatron.rollout.router import Router
from drpo_megatron.rollout.server import ExternalServer, Server, SGLangServer
from drpo_megatron.rollout.server_args import with_delta_loader
from drpo_megatron.rollout.state import server_state
from drpo_megatron.rollout.status_file import NAME, StatusFile

log = logging.getLogger(__name__)

_POLL_S = 0.25
_BACKOFF_S = 1.0  # before the first restart of a server; it doubles with each
_MAX_BACKOFF_S = 60.0
_CHECK_EVERY_S = 5.0
_CHECKS_THAT_MAY_FAIL = 1  # a server under load may miss one


class Fleet:
    """Context manager: entering starts the servers without waiting for them; leaving ends them.

    A thread of its own watches and restarts them. With more than one, a `Router` is the address of generation.
    """

    def __init__(
        self,
        config: ServerConfig,
        members: Sequence[Member],
        router: Router | None,
        api_key: str | None,
        status: StatusFile | None = None,
    ) -> None:
        self._config = config
        self._members = list(members)
        self._router = router
        self._status = status
        self.api_key = api_key
        self._changed = threading.Condition(threading.RLock())
        self._quiet = 0
        self._comebacks = 0
        self._lent = False
        self._closing = False
        self._error: BaseException | None = None
        self._checks = ThreadPoolExecutor(max_workers=len(self._members), thread_name_prefix="fleet-check")
        self._watch = threading.Thread(target=self._run, name="fleet", daemon=True)

    # --- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        # The servers are killed with the thread that starts them: the one that watches them also starts them.
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._watch.join()
        self._checks.shutdown(wait=False)

    def wait_all(self) -> None:
        """Wait until every server came up for the first time. Raises ServerStartError for the first that does not."""
        with self._changed:
            while any(m.state is State.STARTING for m in self._members):
                self._raise_error()
                self._changed.wait(_POLL_S)
                for member in self._members:
                    if member.restarts or member.state in (State.RESTING, State.LOST):
                        raise ServerStartError(f"{member.name}: {member.reason}; {member.log_tail}")

    def wait_any(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until at least one server is up, or `stopped()`. Raises ServerGaveUp when the restarts of all are used
        up, and ServersFailed when the devices are lent, so that none will be.
        """
        with self._changed:
            # Also with servers up: nobody watches them any more when the thread has failed.
            self._raise_error()
            while not self.up() and not stopped():
                self._raise_error()
                if all(m.state is State.LOST for m in self._members):
                    reasons = "\n".join(f"{m.name}: {m.reason}; {m.log_tail}" for m in self._members)
                    raise ServerGaveUp(
                        f"no rollout server is left, and rollout.server.max_restarts is {self._config.max_restarts}: "
                        f"find the cause in the servers' logs\n{reasons}"
                    )
                if self._lent:
                    raise ServersFailed({m.name: m.reason for m in self._members})
                self._changed.wait(_POLL_S)

    # --- what a push needs --------------------------------------------------------------------------------------

    def up(self) -> list[str]:
        """URLs of the servers that can take weights."""
        with self._changed:
            return [m.server.url for m in self._members if m.state in (State.WAITING, State.SERVING)]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While generation is paused: a server that does not generate is not a sick one."""
        with self._changed:
            self._quiet += 1
        try:
            yield
        finally:
            with self._changed:
                self._quiet -= 1
                for member in self._members:
                    member.failed_checks, member.check = 0, None
                    member.next_check = time.monotonic() + _CHECK_EVERY_S

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """While the trainer has memory on the servers' devices, and the servers, paused, lack some of theirs.

        Waits first for servers that are starting. Those that die meanwhile are restarted afterwards, and the router
        learns of all changes then: it would ask a paused server to generate.
        """
        try:
            with self._changed:
                self._lent = True
                while any(m.state is State.STARTING for m in self._members):
                    self._raise_error()
                    self._changed.wait(_POLL_S)
            with self.paused():
                yield
        finally:
            with self._changed:
                self._lent = False
                self._route()
                self._changed.notify_all()

    @property
    def is_lent(self) -> bool:
        return self._lent

    def admit(self, urls: Sequence[str], version: int) -> None:
        """These servers hold the weights `version`: they, and no others, are in traffic from now on.

        The router takes back what was restarted; a server that it cannot reach is taken out.
        """
        with self._changed:
            for member in self._members:
                if member.state in (State.WAITING, State.SERVING):
                    taken = member.server.url in urls
                    member.state = State.SERVING if taken else State.WAITING
                    member.version = version if taken else member.version
            self._route()

    def report(self, failures: Mapping[str, str]) -> None:
        """These servers (by URL) failed, for these reasons: end them, and restart them after a while."""
        with self._changed:
            for member in self._members:
                if member.state in (State.WAITING, State.SERVING) and member.server.url in failures:
                    self._take_out(member, failures[member.server.url])
            self._route()

    # --- what generation needs ----------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where generation requests go. Changes when the only server restarts."""
        return self._router.url if self._router else self._members[0].server.url

    def serving(self) -> int:
        """Servers in traffic whose processes run."""
        with self._changed:
            return sum(m.state is State.SERVING and m.server.ended() is None for m in self._members)

    def serving_urls(self) -> list[str]:
        with self._changed:
            return [m.server.url for m in self._members if m.state is State.SERVING]

    def check_soon(self) -> None:
        """Something is odd with an answer: look at every server now."""
        with self._changed:
            for member in self._members:
                member.next_check = 0.0
            self._changed.notify_all()

    # --- for people ---------------------------------------------------------------------------------------------

    def table(self) -> list[str]:
        """One line a server: address, state, weight version, restarts, last failure."""
        with self._changed:
            return [member.row() for member in self._members]

    def states(self) -> list[str]:
        """For the report on a run that stands still: the table, and what can be seen of every server from outside. Does
        not wait for the fleet's lock, whose holder may be what hangs; bounded in time.
        """
        rows = [member.row() for member in self._members]

        def look(member: Member) -> list[str]:
            log_path = member.server.log_path if isinstance(member.server, SGLangServer) else None
            return server_state(member.name, member.server.url, member.server.pid, log_path, self.api_key)

        seen = [m for m in self._members if m.state not in (State.RESTING, State.LOST)]
        with ThreadPoolExecutor(max_workers=len(self._members)) as pool:
            return rows + [line for lines in pool.map(look, seen) for line in lines]

    @property
    def servers(self) -> list[Server]:
        return [member.server for member in self._members]

    @property
    def comebacks(self) -> int:
        """How often a server was started again, here or, as far as it was seen, by somebody else."""
        with self._changed:
            return self._comebacks

    @property
    def restarts(self) -> int:
        """Of all servers and the router."""
        with self._changed:
            return sum(m.restarts for m in self._members) + (self._router.restarts if self._router else 0)

    def commands(self) -> list[list[str]]:
        """Command lines of what is started here."""
        servers = [m.server for m in self._members if isinstance(m.server, SGLangServer)]
        lines = [server.command()[0] for server in servers]
        return lines + ([self._router.command()] if self._router else [])

    # --- the watching thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            for member in self._members:
                self._start(member)
            if self._router:
                self._router.start()
                self._router.wait_ready()
            with self._changed:
                while not self._closing:
                    for member in self._members:
                        self._look_at(member)
                    self._look_at_router()
                    if self._status:
                        self._status.write(self._members)
                    self._changed.notify_all()
                    self._changed.wait(_POLL_S)
        except BaseException as error:  # noqa: BLE001 - raised by whoever waits for the fleet
            with self._changed:
                self._error = error
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closing)
        finally:
            running = [*(m.server for m in self._members), *([self._router] if self._router else [])]
            with ThreadPoolExecutor(max_workers=len(running)) as pool:
                list(pool.map(lambda process: process.stop(), running))

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _start(self, member: Member) -> None:
        member.server.start()
        member.state, member.version = State.STARTING, None
        member.failed_checks, member.at, member.check = 0, time.monotonic(), None

    def _look_at(self, member: Member) -> None:
        now = time.monotonic()
        if member.state is State.LOST:
            return
        if member.state is State.RESTING:
            if now >= member.at and not self._lent:
                member.restarts += 1
                self._comebacks += 1
                self._start(member)
            return
        if ended := member.server.ended():
            self._take_out(member, f"SGLang {ended}")
            self._route()
        elif member.check is not None:
            if member.check.done():
                self._judge(member, member.check.result())
        elif member.state is State.STARTING or (now >= member.next_check and not self._quiet):
            member.check = self._checks.submit(member.examine, self._config.health_timeout_s, self.api_key)

    def _judge(self, member: Member, fault: Fault | None) -> None:
        member.check = None
        now = time.monotonic()
        if member.state is State.STARTING:
            if fault is None:
                member.state, member.next_check = State.WAITING, now + _CHECK_EVERY_S
            elif now - member.at > self._config.start_timeout_s:
                limit = f"rollout.server.start_timeout_s = {self._config.start_timeout_s:g} s"
                self._take_out(member, f"was not ready after {limit}")
            return
        if self._quiet:
            return  # it was asked before the pause and answered in it
        member.next_check = now + _CHECK_EVERY_S
        if fault is None:
            member.failed_checks = 0
        elif fault.old_weights:
            # Its requests may end, and it stays until the next push.
            log.warning("%s %s: out of traffic", member.name, fault.reason)
            member.state, member.reason = State.WAITING, fault.reason
            self._comebacks += 1
            self._route()
        else:
            member.failed_checks += 1
            if member.failed_checks > _CHECKS_THAT_MAY_FAIL:
                self._take_out(member, fault.reason)
                self._route()

    def _take_out(self, member: Member, reason: str) -> None:
        tail = member.server.log_tail() if isinstance(member.server, SGLangServer) else ""
        member.server.stop()
        member.reason, member.log_tail, member.check = reason, tail, None
        if member.restarts >= self._config.max_restarts:
            member.state = State.LOST
            log.error("%s %s, and its restarts are used up; %s", member.name, reason, tail)
        else:
            member.state = State.RESTING
            member.at = time.monotonic() + min(_BACKOFF_S * 2**member.restarts, _MAX_BACKOFF_S)
            log.warning("%s %s: out of traffic, and started again; %s", member.name, reason, tail)

    def _route(self) -> None:
        if self._router is None or self._lent or not self._router.alive():
            return  # it gets its routes when the devices come back, or when it is started again
        serving = {m.server.url: m for m in self._members if m.state is State.SERVING}
        try:
            unreached = self._router.route_to(set(serving))
        except ServerError:
            if self._router.alive():
                raise
            return
        for url in unreached:
            self._take_out(serving[url], "sglang-router cannot reach it")

    def _look_at_router(self) -> None:
        if self._router is None or self._router.alive():
            return
        if self._router.restarts >= self._config.max_restarts:
            raise ServerGaveUp("sglang-router ended more often than rollout.server.max_restarts allows")
        log.warning("sglang-router ended: starting it again")
        self._router.stop()
        self._router.restarts += 1
        self._router.start()
        self._router.wait_ready()
        if not self._quiet:  # it would ask paused servers to generate; the end of the push routes to them
            self._route()


def fleet_of(config: RunConfig, log_directory: Path | None = None) -> Fleet:
    """The servers that a run's configuration asks for, not started. The model's directory must exist, and the one of
    `fp8.rollout` when they start. log_directory: the run's log/ by default.

    Raises ServerStartError for arguments that SGLang does not have and an API key that is not in the environment.
    """
    settings = server_settings(config)
    api_key = api_key_of(settings)
    log_directory = log_directory or config.run_directory / "log"
    servers: list[Server] = [ExternalServer(url, api_key) for url in settings.addresses]
    if not servers:
        experts = RoutedExpertsFormat.load(config.model.path) is not None
        servers = [
            SGLangServer(
                with_delta_loader(settings) if config.sync.transport == "delta" else settings,
                server_model(config),
                config.model.dtype,
                config.seed,
                log_directory / f"server-{index}.log",
                index=index,
                routed_experts=experts,
                api_key=api_key,
                colocated=config.rollout.placement == "colocated",
                deterministic=config.training.deterministic,
                emulate_fp8=config.fp8.rollout and config.fp8.backend == "emulate",
            )
            for index in range(settings.count)
        ]
    router = Router(config.rollout.router, log_directory / "router.log", api_key) if len(servers) > 1 else None
    members = [Member(f"server-{index}", server) for index, server in enumerate(servers)]
    return Fleet(settings, members, router, api_key, StatusFile(config.run_directory / NAME))


def api_key_of(config: ServerConfig) -> str | None:
    """Raises ServerStartError when the environment does not hold the key that the configuration names."""
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ServerStartError(
            f"rollout.server.api_key_env is {config.api_key_env}, and the environment has no such variable: "
            "export it with a key of your own"
        )
    return key

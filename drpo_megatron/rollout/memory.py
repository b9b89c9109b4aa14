"""What the servers of a fleet hold on devices that they share with the trainer, and how they give it back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from drpo_megatron.rollout.admin import MemoryTag, ServerAdmin
from drpo_megatron.rollout.errors import ServerError
from drpo_megatron.rollout.fleet import Fleet


class FleetMemory:
    """Takes device memory from every server that is up, and gives it back.

    A server is paused while it lacks memory, so that a request that comes then waits and is not computed; and from the
    first release to `resume_all` the fleet is `Fleet.lent`, so that no server starts, and what is released can be noted
    by address. SGLang ends when it is asked for what it does not have, in both directions, so each method asks only for
    what is still to do.

    A server that fails a request, each bounded by `timeout_s`, is reported to its fleet, which ends it: its memory is
    free either way.
    """

    def __init__(self, fleet: Fleet, timeout_s: float) -> None:
        self._fleet = fleet
        self._timeout_s = timeout_s
        self._released: dict[str, set[MemoryTag]] = {}
        self._lent = contextlib.ExitStack()

    @property
    def released(self) -> Mapping[str, frozenset[MemoryTag]]:
        """What each server that is up lacks, by URL."""
        return {url: frozenset(self._released.get(url, ())) for url in self._fleet.up()}

    def release(self, *tags: MemoryTag) -> int:
        """Retract running requests, which then wait, and give back the device memory of `tags`.

        Waits for servers that are starting. Returns the number of servers that are up; the others hold no memory.
        """
        if not self._fleet.is_lent:
            self._lent.enter_context(self._fleet.lent())

        def ask(server: ServerAdmin) -> None:
            released = self._released.setdefault(server.url, set())
            if wanted := [tag for tag in tags if tag not in released]:
                server.pause_generation("retract", self._timeout_s)
                server.release_memory(wanted, self._timeout_s)
                released.update(wanted)

        self._each(ask)
        return len(self._fleet.up())

    def resume_weights(self) -> None:
        """Take back the memory of the weights. They are undefined until the next push."""
        self._each(lambda server: self._resume(server, "weights"))

    def resume_all(self) -> None:
        """The trainer has left the devices: take back the KV cache and go on generating.

        Raises RuntimeError for a server whose weights nothing brought back.
        """
        if any("weights" in lacking for lacking in self.released.values()):
            raise RuntimeError("the servers gave their weights up and no sync followed: sync() before generate()")

        def ask(server: ServerAdmin) -> None:
            if self._released.get(server.url):
                self._resume(server, "kv_cache")
                server.continue_generation(self._timeout_s)

        self._each(ask)
        self._released.clear()
        self._lent.close()

    def wait_any(self) -> None:
        """Wait until a server is up, when none was and the trainer has left the devices. Raises as `Fleet.wait_any`."""
        self.resume_all()
        self._fleet.wait_any()

    def _resume(self, server: ServerAdmin, tag: MemoryTag) -> None:
        released = self._released.get(server.url, set())
        if tag in released:
            server.resume_memory([tag], self._timeout_s)
            released.remove(tag)

    def _each(self, request: Callable[[ServerAdmin], None]) -> None:
        urls = self._fleet.up()
        failures: dict[str, str] = {}
        with ThreadPoolExecutor(max_workers=max(1, len(urls)), thread_name_prefix="memory") as threads:
            asked = {url: threads.submit(request, ServerAdmin(url, self._fleet.api_key)) for url in urls}
            for url, answer in asked.items():
                try:
                    answer.result()
                except ServerError as error:
                    failures[url] = str(error)
        if failures:
            self._fleet.report(failures)

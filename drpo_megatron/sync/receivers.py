"""The servers of a push: a request goes to all of them at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerError, ServersFailed


class Receivers:
    """Servers of `ranks` tensor-parallel ranks each, at `urls`. `close` ends its threads.

    With an `api_key`, every request carries it.
    """

    def __init__(self, urls: Sequence[str], ranks: int, api_key: str | None = None) -> None:
        if not urls:
            raise ValueError("a weight push needs a server")
        self.admins = [ServerAdmin(url, api_key) for url in urls]
        self.ranks = ranks
        self._threads = ThreadPoolExecutor(max_workers=2 * len(urls), thread_name_prefix="weight-sync")

    @property
    def world_size(self) -> int:
        """Tensor-parallel ranks of all servers."""
        return self.ranks * len(self.admins)

    def each[T](self, request: Callable[[ServerAdmin], T]) -> list[T]:
        """What `request` returns for every server, in order. Raises ServersFailed as soon as one fails."""
        return self.start(request).result()

    def start[T](self, request: Callable[[ServerAdmin], T]) -> Answers[T]:
        """Send, without waiting."""
        return Answers({self._threads.submit(request, admin): admin.url for admin in self.admins})

    def unresponsive(self, timeout_s: float) -> dict[str, str]:
        """URL → reason, of the servers whose scheduler does not answer within `timeout_s`."""
        probes = {admin.url: self._threads.submit(admin.check_scheduler, timeout_s) for admin in self.admins}
        failures: dict[str, str] = {}
        for url, probe in probes.items():
            try:
                probe.result()
            except ServerError as error:
                failures[url] = str(error)
        return failures

    def close(self) -> None:
        self._threads.shutdown(wait=False)


class Answers[T]:
    """Of one request to every server."""

    def __init__(self, futures: dict[Future[T], str]) -> None:
        self._futures = futures

    def result(self) -> list[T]:
        """In the order of the servers. Raises ServersFailed as soon as one fails: others may wait for that one."""
        for future in as_completed(self._futures):
            try:
                future.result()
            except ServerError as error:
                raise ServersFailed({self._futures[future]: str(error)}) from error
        return [future.result() for future in self._futures]

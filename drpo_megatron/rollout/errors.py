"""What can go wrong with a rollout server, by what the caller can do about it."""

from __future__ import annotations

from collections.abc import Mapping


class ServerError(RuntimeError):
    """A rollout server did not do what was asked."""


class ServerStartError(ServerError):
    """The server cannot start, or ended before it answered. Starting it again with the same settings does not help."""


class ServerDied(ServerError):
    """The server was running and is gone: restart it, push the weights, go on."""


class ServerGaveUp(ServerError):
    """The server died more often than `rollout.server.max_restarts` allows."""


class ServerRequestError(ServerError):
    """A living server refused a request, or did not answer it in time."""


class GenerationError(ServerError):
    """A rollout request failed for good although the server lives."""


class ServersFailed(ServerError):
    """Servers of a fleet failed a request. `reasons`: what each said, by URL."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        super().__init__("; ".join(f"{url}: {reason}" for url, reason in self.reasons.items()))


class OldWeights(ServerError):
    """A server sampled with weights that were replaced before it was asked."""


class Stopped(Exception):
    """Sampling was told to stop: no error, what was sampled is kept."""

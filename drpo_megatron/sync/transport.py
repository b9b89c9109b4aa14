"""What a weight transport is, and what transports share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerRequestError
from drpo_megatron.sync.buckets import Bucket


@dataclass(frozen=True)
class Deadline:
    """The limit of one push, in seconds of the monotonic clock."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds until then. Raises ServerRequestError when it has passed."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise ServerRequestError("a weight sync took longer than sync.timeout_s: raise it, or find what stalls")
        return left


class Transport(Protocol):
    """Carries buckets to one server, which is paused meanwhile. Errors are those of `push.WeightSync.push`."""

    def connect(self) -> None:
        """Be ready to send, within sync.timeout_s."""

    def send(self, buckets: Iterator[Bucket], deadline: Deadline) -> None:
        """Bring every bucket into the server's model; return when it holds the last one. `buckets` is not empty, and a
        bucket's tensors may change once the next is asked for.
        """

    def close(self, *, server_alive: bool) -> None:
        """Give back what `connect` took, on the server too if it is alive."""


@contextlib.contextmanager
def weight_update(admin: ServerAdmin, deadline: Deadline) -> Iterator[None]:
    """The server's bracket around buckets: it prepares its weights before them and repacks them after."""
    admin.begin_weight_update(deadline.left())
    try:
        yield
    finally:
        # an update that was left open would refuse the next one
        admin.end_weight_update(deadline.left())

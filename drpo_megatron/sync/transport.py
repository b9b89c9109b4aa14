"""What a weight transport is, and what transports share."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from drpo_megatron.rollout.errors import ServerRequestError, ServersFailed
from drpo_megatron.sync.buckets import Bucket
from drpo_megatron.sync.receivers import Receivers

log = logging.getLogger(__name__)

_ABANDON_S = 10.0  # a living server closes its bracket in much less


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
    """Carries buckets to the servers of its `Receivers`, which are paused meanwhile.

    Errors are those of `push.WeightSync.push`. After one in `send` only `close(servers_alive=False)` may follow.
    """

    def connect(self) -> None:
        """Be ready to send, within sync.timeout_s."""

    def send(self, buckets: Iterator[Bucket], deadline: Deadline) -> int | None:
        """Bring every bucket into the servers' models; return when they hold the last one. `buckets` is not empty, and
        a bucket's tensors may change once the next is asked for. Returns the bytes that went out where they are not the
        buckets'.
        """

    def close(self, *, servers_alive: bool) -> None:
        """Give back what `connect` took, on the servers too if they are alive."""


@contextlib.contextmanager
def weight_update(receivers: Receivers, deadline: Deadline, abandon: Callable[[], None]) -> Iterator[None]:
    """The servers' bracket around buckets: they prepare their weights before them and repack them after.

    When the body fails, `abandon` first releases what a server may wait for. The bracket is then closed where a server
    answers: one that was left open would refuse the next.
    """
    receivers.each(lambda server: server.begin_weight_update(deadline.left()))
    try:
        yield
    except BaseException:
        abandon()
        try:
            receivers.each(lambda server: server.end_weight_update(_ABANDON_S))
        except ServersFailed as error:
            log.warning("an unfinished weight update stays open: %s", error)
        raise
    receivers.each(lambda server: server.end_weight_update(deadline.left()))

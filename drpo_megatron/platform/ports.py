"""Ports for processes that are started here and bind theirs later."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000  # above those of services
_ATTEMPTS = 100
_draw = random.SystemRandom()  # a seeded run must not ask for the ports of its twin


def free_port(host: str) -> int:
    """A port of `host` that nobody listens at, outside the range from which the system serves connections and bind(0).

    A server takes seconds until it binds: any outgoing connection of the machine would take a port of that range from
    it. Raises OSError when a hundred draws find none.
    """
    for _ in range(_ATTEMPTS):
        port = _draw.choice(_candidates())
        if not in_use(host, port):
            return port
    raise OSError(f"no free port on {host} in {_ATTEMPTS} draws from {_candidates()}: end processes that listen there")


def in_use(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for a server
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def _candidates() -> range:
    low, high = map(int, _RANGE.read_text().split()) if _RANGE.exists() else (32768, 60999)
    return max(range(_LOWEST, low), range(high + 1, 65536), key=len)

"""Ports for servers that bind later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from drpo_megatron.platform import ports

HOST = "127.0.0.1"


def test_no_connection_takes_the_port() -> None:
    """Binding to 0 is how every client and most servers get theirs."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    drawn = {ports.free_port(HOST) for _ in range(200)}
    assert not [p for p in drawn if low <= p <= high]
    assert len(drawn) > 150  # two runs of a host do not meet


def test_a_port_that_is_taken_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "_candidates", lambda: range(port, port + 1))
        with pytest.raises(OSError, match=r"no free port on 127\.0\.0\.1"):
            ports.free_port(HOST)
    assert ports.free_port(HOST) == port

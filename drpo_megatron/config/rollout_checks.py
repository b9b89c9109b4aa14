"""What the settings of rollouts and weight sync must satisfy together."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

from drpo_megatron.config.functions import import_function
from drpo_megatron.config.schema import RunConfig


def rollout_problems(config: RunConfig) -> Iterator[str]:
    """One line each: `path.to.key: problem; what to do`."""
    yield from _schedule(config)
    yield from _function(config)
    yield from _addresses(config)
    yield from _ports(config)


def _schedule(config: RunConfig) -> Iterator[str]:
    rollout, updates = config.rollout, config.training.updates_per_batch
    if rollout.schedule == "asynchronous" and (rollout.max_staleness or 0) < updates:
        yield (
            f"rollout.max_staleness: is {rollout.max_staleness}, and a step makes training.updates_per_batch = "
            f"{updates} weight versions, so nothing could be sampled ahead; set it to {updates} or more"
        )
    if rollout.schedule == "one_step_off" and rollout.max_staleness is not None and rollout.max_staleness < updates:
        yield (
            f"rollout.max_staleness: is {rollout.max_staleness}, and a step ahead is training.updates_per_batch = "
            f"{updates} weight versions; set it to null"
        )
    if rollout.over_sampling > 1 and rollout.schedule != "synchronous":
        yield (
            f"rollout.over_sampling: is {rollout.over_sampling:g}, and with rollout.schedule = {rollout.schedule} slow "
            "groups delay no step by themselves; set it to 1"
        )


def _function(config: RunConfig) -> Iterator[str]:
    if config.rollout.function is not None:
        try:
            import_function(config.rollout.function)
        except ValueError as error:
            yield f"rollout.function: {error}"


def _addresses(config: RunConfig) -> Iterator[str]:
    server, sync = config.rollout.server, config.sync
    elsewhere = False
    for address in server.addresses:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            yield f"rollout.server.addresses: {address!r} is not the address of a server; write http://HOST:PORT"
        else:
            elsewhere = elsewhere or not is_loopback(parts.hostname)
    if len(set(server.addresses)) < len(server.addresses):
        yield "rollout.server.addresses: names a server twice; remove one"
    if server.addresses and server.count > 1:
        yield (
            f"rollout.server.count: is {server.count}, and with rollout.server.addresses no server is started here; "
            "remove one of them"
        )
    if server.api_key_env is not None and not os.environ.get(server.api_key_env):
        yield (
            f"rollout.server.api_key_env: the environment has no variable {server.api_key_env}; export it with a key "
            "of your own"
        )
    if server.api_key_env is None and (elsewhere or not is_loopback(server.host)):
        yield (
            "rollout.server.api_key_env: is required for servers that listen on more than loopback, because whoever "
            "reaches them could replace their weights; set it to the name of a variable with a key"
        )
    if elsewhere and sync.transport == "distributed" and is_loopback(sync.address):
        yield (
            f"sync.address: is {sync.address}, which servers on other hosts cannot reach; set it to this host's address"
        )
    if elsewhere and sync.transport == "shared_memory":
        yield (
            "sync.transport: shared_memory reaches servers on this host only, and rollout.server.addresses names "
            "others; set it to distributed or disk"
        )
    if sync.directory is not None and sync.transport != "disk":
        yield f"sync.directory: has no effect with sync.transport = {sync.transport}; remove it"


def _ports(config: RunConfig) -> Iterator[str]:
    server = config.rollout.server
    if server.port is None or server.addresses:
        return
    for port in range(server.port, server.port + server.count):
        with socket.socket() as s:
            # Without this a port that a finished server leaves in TIME_WAIT would count as taken.
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((server.host, port))
            except (OSError, OverflowError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                yield f"rollout.server.port: {port} cannot be used ({reason}); choose another, or null"


def is_loopback(host: str) -> bool:
    """A name other than localhost counts as elsewhere: what it resolves to is known where it is used."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

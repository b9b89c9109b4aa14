"""What the settings of rollouts and weight sync must satisfy together."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from drpo_megatron.config.functions import import_function
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.platform import backend
from drpo_megatron.rollout.server_args import FP8_REPORT

if TYPE_CHECKING:
    from drpo_megatron.models.hf_config import HFModelConfig


def placement_notes(config: RunConfig) -> Iterator[str]:
    """What a colocated run does not do: on a machine without a GPU, and on devices that no server uses."""
    if config.rollout.placement != "colocated":
        return
    server, ranks = config.rollout.server, _ranks(config)
    servers = server.count * server.tensor_parallel
    if ranks is not None and servers < ranks:
        yield (
            f"rollout.placement is colocated and rollout.server.count × rollout.server.tensor_parallel = {servers}: "
            f"{ranks - servers} of the trainer's {ranks} devices wait while the servers generate"
        )
    if backend() != "nccl":
        yield (
            "rollout.placement is colocated and there is no GPU: trainer and servers take turns in the same order, and "
            "no memory becomes free. The servers have no memory saver and keep weights and KV cache; the trainer's "
            "weights and gradients go from host memory to host memory, and Megatron leaves fp32 main weights and their "
            "optimizer state where they are"
        )


def fp8_notes(config: RunConfig) -> Iterator[str]:
    if config.fp8.rollout and config.rollout.server.addresses:
        yield (
            "fp8.rollout is true and servers were started elsewhere: they need an FP8 model of the same layers (`drpo "
            f"convert --dtype fp8`, or server_model/ of an earlier run) and --custom-weight-loader {FP8_REPORT}, and "
            "this package installed; the run stops at one that is not so"
        )


def rollout_problems(config: RunConfig) -> Iterator[str]:
    """One line each: `path.to.key: problem; what to do`."""
    yield from _schedule(config)
    yield from _function(config)
    if config.rollout.from_dump is not None:
        return  # no server is started
    yield from _addresses(config)
    yield from port_problems(config)
    yield from _placement(config)


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
    if server.api_key_env is not None:
        key = os.environ.get(server.api_key_env)
        if not key:
            yield (
                f"rollout.server.api_key_env: the environment has no variable {server.api_key_env}; export it with a "
                "key of your own"
            )
        elif key.startswith("-") and not server.addresses:
            yield (
                f"rollout.server.api_key_env: the key in {server.api_key_env} begins with '-', and SGLang would take "
                "it for an argument; choose another"
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
            "others; set it to distributed, delta or disk"
        )
    if elsewhere and sync.transport in ("disk", "delta") and sync.directory is None:
        yield (
            f"sync.directory: is required for sync.transport = {sync.transport} with servers on other hosts; set it to "
            "a directory that they have too"
        )
    if sync.directory is not None and sync.transport not in ("disk", "delta"):
        yield f"sync.directory: has no effect with sync.transport = {sync.transport}; remove it"


def port_problems(config: RunConfig) -> Iterator[str]:
    """Ports that the configuration names for servers of this host, and that cannot be bound now."""
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


def _placement(config: RunConfig) -> Iterator[str]:
    """Servers on the trainer's devices: which ones, when, and what cannot share a device."""
    rollout, ranks = config.rollout, _ranks(config)
    server = rollout.server
    if rollout.placement != "colocated" or ranks is None:
        return
    if rollout.schedule != "synchronous":
        yield (
            f"rollout.schedule: {rollout.schedule} generates while the trainer trains, and with rollout.placement = "
            "colocated they take turns on the same devices; set it to synchronous, or rollout.placement to "
            "disaggregated"
        )
    if server.addresses:
        yield (
            "rollout.server.addresses: names servers that were started elsewhere, and rollout.placement = colocated "
            "starts them on the trainer's devices; remove it, or set rollout.placement to disaggregated"
        )
    if server.count * server.tensor_parallel > ranks:
        yield (
            f"rollout.server.tensor_parallel: {server.tensor_parallel} × rollout.server.count = {server.count} ranks "
            f"of servers are more than the {ranks} devices of the trainer (tensor × pipeline × context × data), which "
            "rollout.placement = colocated shares; lower one of them, or set rollout.placement to disaggregated"
        )
    strange = [d for d in server.devices or [] if not 0 <= d < ranks]
    if strange:
        yield (
            f"rollout.server.devices: {strange} are not among the trainer's 0 to {ranks - 1}, which rollout.placement "
            "= colocated shares; name some of those, set it to null, or set rollout.placement to disaggregated"
        )
    if server.args.get("weight_cache_mode", "off") != "off":
        yield (
            f"rollout.server.args.weight_cache_mode: {server.args['weight_cache_mode']} keeps a server's weights on "
            "the device, and rollout.placement = colocated releases them; remove it"
        )
    if backend() != "nccl":
        return
    if config.sync.transport == "distributed":
        yield (
            "sync.transport: distributed is NCCL, which refuses two ranks on one device, and rollout.placement = "
            "colocated puts trainer and servers there; set it to shared_memory"
        )
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").lower():
            yield (
                f"rollout.placement: is colocated and the environment has {name}={os.environ[name]}, with which "
                "SGLang's memory saver does not work; take expandable_segments out"
            )


def fp8_rollout_problems(config: RunConfig, hf: HFModelConfig) -> Iterator[str]:
    """What FP8 rollouts need of the machine, the servers and the model."""
    if not config.fp8.rollout or config.rollout.from_dump is not None:
        return
    yield from _fp8_servers(config)
    if hf.mla is not None:
        yield (
            f"fp8.rollout: {hf.model_type} has latent attention, whose projections SGLang merges and unpacks for its "
            "kernels, so that what it holds cannot be verified; set it to false"
        )
    if config.fp8.backend == "emulate":
        if hf.moe is not None:
            yield (
                f"fp8.rollout: {hf.model_type} is a mixture of experts, whose FP8 products are not emulated; set it to "
                "false, or fp8.backend to transformer_engine on a machine with a GPU"
            )
        return
    ranks = config.rollout.server.tensor_parallel
    for what, size in _fp8_widths(hf, ranks):
        if size % 128:
            yield (
                f"fp8.rollout: {what} are {size} on a rank of a server (rollout.server.tensor_parallel = {ranks}), and "
                "SGLang's FP8 layers need a multiple of 128; lower rollout.server.tensor_parallel, or set fp8.rollout "
                "to false"
            )


def _fp8_widths(hf: HFModelConfig, ranks: int) -> Iterator[tuple[str, int]]:
    """Rows and columns of the quantized weights on one rank of a server."""
    yield "the hidden columns", hf.hidden_size
    yield "the rows of the queries", hf.num_heads * hf.head_dim // ranks
    yield "the rows of the keys", max(hf.num_kv_heads // ranks, 1) * hf.head_dim
    if hf.moe is None or not all(hf.moe.layers):
        yield "the MLP's columns", hf.ffn_hidden_size // ranks
    if hf.moe is not None:
        yield "the columns of an expert's MLP", hf.moe.ffn_hidden_size // ranks
        if hf.moe.shared_ffn_hidden_size:
            yield "the columns of the shared experts' MLP", hf.moe.shared_ffn_hidden_size // ranks


def _fp8_servers(config: RunConfig) -> Iterator[str]:
    server, emulate, gpu = config.rollout.server, config.fp8.backend == "emulate", backend() == "nccl"
    if emulate and gpu:
        yield (
            "fp8.rollout: fp8.backend is emulate, and SGLang computes in real FP8 on this machine's GPU; set "
            "fp8.backend to transformer_engine"
        )
    if not emulate and not gpu:
        yield (
            "fp8.rollout: fp8.backend is transformer_engine, and SGLang's FP8 layers need a GPU, which this machine "
            "does not have; set fp8.backend to emulate"
        )
    if server.addresses and emulate:
        yield (
            "rollout.server.addresses: names servers that were started elsewhere, and only those that the run starts "
            "emulate FP8; remove it, or set fp8.rollout to false"
        )
    if not emulate and config.model.dtype == "float32":
        yield (
            "model.dtype: is float32, and what SGLang's FP8 layers read and write is bfloat16; set it to bfloat16, or "
            "fp8.rollout to false"
        )
    for name in ("quantization", "load_format"):
        if name in server.args:
            yield f"rollout.server.args.{name}: is decided by fp8.rollout; remove it"
    if str(server.args.get("kv_cache_dtype", "auto")).startswith("fp8"):
        yield (
            f"rollout.server.args.kv_cache_dtype: is {server.args['kv_cache_dtype']}, and servers of fp8.rollout start "
            "without weights and have no scales for an FP8 cache; remove it"
        )


def _ranks(config: RunConfig) -> int | None:
    """Ranks of the trainer; None for a layout that is refused."""
    try:
        return config.layout.world_size
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """A name other than localhost counts as elsewhere: what it resolves to is known where it is used."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

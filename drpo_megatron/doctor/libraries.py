"""What the machine computes and communicates with: pinned packages, GPUs, NCCL, gloo, Transformer Engine, SGLang."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from drpo_megatron import platform
from drpo_megatron.config import ConfigError
from drpo_megatron.config.fp8_checks import machine_problems
from drpo_megatron.doctor import FAIL, OK, SKIPPED, Finding, apex
from launch.preflight import count_gpus

if TYPE_CHECKING:
    from drpo_megatron.config.schema import RunConfig

_COLLECTIVE_S = 20.0
_IMPORT_S = 120.0
_ELEMENTS = 2**18
_NO_GPU = "there is no GPU"

# SGLang patches libraries of the process that imports it: it gets one of its own.
_IMPORT_SGLANG = """
from drpo_megatron import platform
if not platform.has_cuda():
    from drpo_megatron.platform.sglang_cpu import install_stand_ins
    install_stand_ins()
import sglang.launch_server
import sglang.srt.server_args
"""


def examine(config: RunConfig | None) -> Iterator[Finding]:
    yield from packages()
    yield gpus(config)
    yield fp8(config)
    yield nccl()
    yield gloo()
    yield transformer_engine()
    yield from apex.examine()
    yield sglang_arguments(config)
    yield sglang()


def packages() -> Iterator[Finding]:
    """Against the versions that are pinned together: those of the installed drpo-megatron's metadata, which
    requirements/ are at its installation.
    """
    wrong = []
    pinned = pinned_versions()
    for name, version in pinned.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = ""
        if found != version:
            wrong.append(f"{name} {found or 'is missing'} where {version} is pinned")
    if wrong:
        yield Finding("packages", FAIL, f"{'; '.join(wrong)}: `make install` installs what is tested together")
        return
    shown = ", ".join(f"{name} {pinned[name]}" for name in ("torch", "megatron-core", "sglang", "transformers"))
    yield Finding("packages", OK, f"Python {sys.version.split()[0]}; {len(pinned)} packages as pinned: {shown}")


def pinned_versions() -> dict[str, str]:
    """Package → version, of this package's own requirements, and of the extra `gpu` what this machine can use."""
    pinned = {}
    for line in importlib.metadata.requires("drpo-megatron") or []:
        requirement = Requirement(line)
        exact = [s.version for s in requirement.specifier if s.operator == "=="]
        mine = requirement.marker is None or requirement.marker.evaluate({"extra": "gpu"})
        if exact and mine and (requirement.name != "transformer-engine" or platform.has_cuda()):
            pinned[requirement.name] = exact[0]
    return pinned


def gpus(config: RunConfig | None) -> Finding:
    """As the driver shows them, and whether torch can use them."""
    name = "GPUs"
    seen, usable = count_gpus(), _device_count()
    if not seen and not usable:
        return Finding(name, SKIPPED, "nvidia-smi shows none: training and rollouts run on the CPU")
    if not usable:
        return Finding(
            name,
            FAIL,
            f"nvidia-smi shows {seen} and torch can use none: the driver may be older than torch's CUDA "
            f"({_cuda_version()}), or CUDA_VISIBLE_DEVICES hides them",
        )
    if config and (needed := devices_needed(config)) > usable:
        return Finding(
            name,
            FAIL,
            f"the run needs {needed} for ranks and servers on this host and torch can use {usable}: lower "
            "parallel or rollout.server.count, set rollout.placement to colocated, or use `drpo submit`",
        )
    return Finding(name, OK, f"{usable}: {_device_names()}; driver {_driver()}, CUDA {_cuda_version()}")


def devices_needed(config: RunConfig) -> int:
    """Of this host, when it runs all ranks, and the servers that are not elsewhere. Raises ConfigError for a layout
    that cannot be.
    """
    try:
        ranks = config.layout.world_size
    except ValueError as error:
        raise ConfigError([f"parallel: {error}"]) from error
    server = config.rollout.server
    servers = 0 if server.addresses else server.count * server.tensor_parallel
    return max(ranks, servers) if config.rollout.placement == "colocated" else ranks + servers


def _device_count() -> int:
    import torch

    return torch.cuda.device_count() if platform.has_cuda() else 0


def _cuda_version() -> str:
    import torch

    return str(torch.version.cuda)


def _device_names() -> str:
    import torch

    of_each = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{p.name} ({p.total_memory / 1e9:.0f} GB, compute capability {p.major}.{p.minor})" for p in of_each]
    return ", ".join(dict.fromkeys(names))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COLLECTIVE_S)
    return done.stdout.split("\n")[0].strip() or "unknown"


def fp8(config: RunConfig | None) -> Finding:
    """Whether the device has the recipe of the configuration, or which recipes it has."""
    name, capability = "FP8", platform.compute_capability()
    if config and config.fp8.recipe and config.fp8.backend == "transformer_engine":
        if problems := list(machine_problems(config.fp8)):
            return Finding(name, FAIL, "; ".join(problems))
        return Finding(name, OK, f"this device computes fp8.recipe = {config.fp8.recipe}")
    if capability is None:
        return Finding(name, SKIPPED, f"{_NO_GPU}; fp8.backend = emulate computes the same numbers")
    if capability < (8, 9):
        return Finding(
            name, SKIPPED, f"a compute capability of {capability[0]}.{capability[1]} has none; 8.9 is the first"
        )
    return Finding(name, OK, f"tensor cores of compute capability {capability[0]}.{capability[1]} have it")


def nccl() -> Finding:
    """Where there are two GPUs: the sum over all of this host. Not run: no GPU."""
    import torch

    if not platform.has_cuda():
        return Finding("NCCL", SKIPPED, f"{_NO_GPU}: ranks talk by gloo")
    from torch.cuda import nccl as library

    version = ".".join(map(str, library.version()))
    count = torch.cuda.device_count()
    if count < 2:
        return Finding("NCCL", SKIPPED, f"{version}, and one GPU has nobody to talk to")
    tensors = [torch.full((_ELEMENTS,), float(index + 1), device=f"cuda:{index}") for index in range(count)]
    try:
        library.all_reduce(tensors)
        sums = {tensor.min().item() for tensor in tensors} | {tensor.max().item() for tensor in tensors}
    except RuntimeError as error:
        return Finding(
            "NCCL", FAIL, f"{version}: an all-reduce over {count} GPUs failed ({error}); NCCL_DEBUG=INFO says more"
        )
    if sums != {count * (count + 1) / 2}:
        return Finding(
            "NCCL", FAIL, f"{version}: an all-reduce over {count} GPUs adds up wrongly; try NCCL_P2P_DISABLE=1"
        )
    return Finding("NCCL", OK, f"{version}: an all-reduce over {count} GPUs adds up")


def gloo() -> Finding:
    """An all-reduce of two members in threads of this process, over the loopback device."""
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=_COLLECTIVE_S)
    sums: list[float] = []
    errors: list[str] = []

    def member(rank: int, store: dist.Store) -> None:
        try:
            group = dist.ProcessGroupGloo(store, rank, 2, limit)
            values = torch.full((_ELEMENTS,), float(rank + 1))
            group.allreduce([values]).wait()  # type: ignore[attr-defined]  # torch's annotations lack it
            sums.extend([values.min().item(), values.max().item()])
        except RuntimeError as error:
            errors.append(str(error).splitlines()[0])

    store = dist.HashStore()
    threads = [threading.Thread(target=member, args=(rank, store), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_COLLECTIVE_S)
    if errors or len(sums) < 4:
        why = errors[0] if errors else f"it did not end within {_COLLECTIVE_S:g} s"
        return Finding(
            "gloo",
            FAIL,
            f"an all-reduce of two on this host failed ({why}): its name must resolve to an address of its own, or set "
            "GLOO_SOCKET_IFNAME=lo",
        )
    if set(sums) != {3.0}:
        return Finding("gloo", FAIL, f"an all-reduce of 1 and 2 gave {sums[0]:g}: `make install`")
    return Finding("gloo", OK, "an all-reduce of two on this host adds up")


def transformer_engine() -> Finding:
    """Whether its extension loads. Not run with a GPU."""
    name = "Transformer Engine"
    if not platform.has_cuda():
        return Finding(name, SKIPPED, f"{_NO_GPU}: layers are Megatron-Core's local ones")
    if importlib.util.find_spec("transformer_engine") is None:
        return Finding(name, FAIL, "is not installed: `make install` takes the extra `gpu` where nvidia-smi is found")
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return Finding(name, FAIL, f"does not load ({error}): install the build for torch's CUDA, {_cuda_version()}")
    return Finding(name, OK, f"{importlib.metadata.version('transformer-engine')} loads")


def sglang_arguments(config: RunConfig | None) -> Finding:
    """Read from its source, as `drpo train` does; with a configuration, those that it sets."""
    from drpo_megatron.rollout.errors import ServerStartError
    from drpo_megatron.rollout.fleet import fleet_of
    from drpo_megatron.rollout.server_args import installed_arguments

    name = "SGLang's arguments"
    try:
        known = installed_arguments()
        if config and (config.model.path / "config.json").exists():
            fleet_of(config).commands()
    except ServerStartError as error:
        return Finding(name, FAIL, str(error))
    given = "; those of rollout.server.args are among them" if config and config.rollout.server.args else ""
    return Finding(name, OK, f"{len(known)} are understood{given}")


def sglang() -> Finding:
    """Import the server in a process of its own, as it starts."""
    name = "SGLang"
    try:
        done = subprocess.run([sys.executable, "-c", _IMPORT_SGLANG], capture_output=True, text=True, timeout=_IMPORT_S)
    except subprocess.TimeoutExpired:
        return Finding(name, FAIL, f"its import did not end within {_IMPORT_S:g} s: is the disk of the packages slow?")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return Finding(name, FAIL, f"its import failed ({''.join(last)}): `make install`")
    return Finding(name, OK, f"{importlib.metadata.version('sglang')} can be imported")

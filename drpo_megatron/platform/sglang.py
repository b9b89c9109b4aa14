"""How this machine starts an SGLang server: the command, its environment and the arguments the machine calls for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from drpo_megatron import platform
from drpo_megatron.platform.sglang_cpu import EMULATE_FP8

_CPU_ARGS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    "disable_overlap_schedule": True,  # there is no device to schedule ahead for
    "sleep_on_idle": True,  # the trainer needs the cores between rollouts
    "skip_server_warmup": True,
    "max_total_tokens": 32768,  # the default claims a share of the machine's memory for the KV cache
    "max_running_requests": 256,
    "log_level_http": "warning",
}
_TORCHRUN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


# Matrix products on CPU round differently with their rows: with the batch, and with what a cache left out.
_CPU_DETERMINISTIC_ARGS: dict[str, Any] = {"max_running_requests": 1, "disable_radix_cache": True}


def sglang_default_args(deterministic: bool = False) -> dict[str, Any]:
    """SGLang arguments, by their own names, that this machine calls for. The user's take precedence."""
    return {} if platform.has_cuda() else _CPU_ARGS | (_CPU_DETERMINISTIC_ARGS if deterministic else {})


def sglang_launch_command(
    args: Sequence[str],
    *,
    tensor_parallel: int,
    threads: int,
    devices: Sequence[int] | None,
    index: int = 0,
    colocated: bool = False,
    emulate_fp8: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of this host's server number `index`, with the command line `args`.

    With CUDA it is SGLang's own launcher on the `index`-th `tensor_parallel` of `devices`, by default of those behind
    the devices of this node's training ranks; `colocated`: of those ranks' own, with SGLang's memory saver, which lets
    it give device memory back. Without CUDA it is `platform.sglang_cpu` with `threads` CPU threads a tensor-parallel
    rank, and `colocated` changes nothing. `emulate_fp8`: let a server without CUDA compute FP8 models.

    Raises ValueError when this host has not as many devices.
    """
    # a rendezvous in the server must not take part in the trainer's
    env = {k: v for k, v in os.environ.items() if k not in _TORCHRUN_VARIABLES and not k.startswith("TORCHELASTIC_")}
    if platform.has_cuda():
        first = index * tensor_parallel
        if devices is None:
            first += 0 if colocated else int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
            devices = range(first + tensor_parallel)
        devices = devices[first : first + tensor_parallel]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        there = platform.device_count()
        if max(devices, default=there) >= there:
            wanted = ", ".join(map(str, devices)) or "beyond those of rollout.server.devices"
            raise ValueError(
                f"rollout server {index} is to have CUDA devices {wanted} of a host with {there}: leave it some "
                "(parallel.*), take turns (rollout.placement=colocated), or say where it is (rollout.server.devices, "
                "rollout.server.addresses)"
            )
        env["CUDA_VISIBLE_DEVICES"] = ",".join(names[d] if names else str(d) for d in devices)
        saver = ["--enable-memory-saver"] if colocated else []
        return [sys.executable, "-m", "sglang.launch_server", *args, *saver], env
    env["OMP_NUM_THREADS"] = str(threads)
    env["SGLANG_USE_CPU_ENGINE"] = "1"
    if emulate_fp8:
        env[EMULATE_FP8] = "1"
    if tensor_parallel > 1:
        # without it SGLang wants a NUMA node a rank
        cores, first = sorted(os.sched_getaffinity(0)), index * tensor_parallel
        env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            str(cores[(first + r) % len(cores)]) for r in range(tensor_parallel)
        )
    return [sys.executable, "-m", "drpo_megatron.platform.sglang_cpu", *args], env


def feed_forward_multiple(tensor_parallel: int) -> int:
    """SGLang pads the intermediate size of an MLP to a multiple of this: on CPU to 32 a rank, elsewhere not."""
    return 1 if platform.has_cuda() else 32 * tensor_parallel

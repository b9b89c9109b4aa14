"""SGLang's HTTP server on a machine without CUDA: `python -m drpo_megatron.platform.sglang_cpu <sglang arguments>`.

The server, its scheduler and its model code are SGLang's own. This module stands in for what the CUDA build expects of
the machine, and starts the scheduler and the detokenizer as forks of the server: they then share its imports, in memory
and in time, where spawned processes import everything again (forking is not possible once CUDA is in use).
"""

from __future__ import annotations

import gc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from drpo_megatron.platform.process import keep_freed_memory
from drpo_megatron.platform.sglang_cpu_imports import cut_imports, register_model

EMULATE_FP8 = "DRPO_EMULATE_FP8"
"""Environment variable with which the server computes FP8 models: see `platform.sglang_cpu_fp8`."""


class _KernelStandIn(ModuleType):
    """Takes the place of `sgl_kernel`, whose CUDA libraries do not load here. Calling a function of it raises."""

    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"sgl_kernel.{name} is a CUDA kernel and this server runs on CPU")

        return refuse


class _NoCudart:
    """`torch.cuda.cudart()` without a CUDA runtime: SGLang registers host buffers with it unconditionally."""

    class cudaError:
        success = 0

    @staticmethod
    def cudaHostRegister(*args: Any) -> int:
        return 0

    @staticmethod
    def cudaHostUnregister(*args: Any) -> int:
        return 0

    @staticmethod
    def cudaGetErrorString(error: Any) -> str:
        return str(error)


def install_stand_ins() -> None:
    """Make SGLang importable and its scheduler work without a CUDA device. Raises RuntimeError where one exists."""
    import torch

    if torch.cuda.is_available():
        raise RuntimeError("this machine has a CUDA device: start the server with `python -m sglang.launch_server`")
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # sglang chooses its platform while it is imported
    os.environ["SGLANG_NCCL_SO_PATH"] = os.devnull  # tensor-parallel ranks use NCCL where it loads, device or not
    kernel = _KernelStandIn("sgl_kernel")
    kernel.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", loader=None)
    sys.modules["sgl_kernel"] = kernel
    torch.cuda.cudart = lambda: _NoCudart
    # /release_memory_occupation synchronizes the accelerator the wheel was built for, present or not
    torch.cuda.synchronize = lambda device=None: None


def allow_deterministic_inference() -> None:
    """SGLang refuses --enable-deterministic-inference with the CPU's attention, compiles the sampling by seeds, for
    which there need be no compiler, and hashes them in `sgl_kernel`. Its batch-invariant kernels are for GPUs: here no
    batch has two requests.
    """
    import torch
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups.choices import add_deterministic_attention_backend_choices

    add_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda *args, **kwargs: None
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    global _library
    _library = torch.library.Library("sgl_kernel", "FRAGMENT")
    _library.define("murmur_hash32_cpu(Tensor seeds_N, Tensor positions_N, Tensor columns_V) -> Tensor")
    _library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")


_library: Any = None  # torch forgets the operator with it


def murmur_hash32(seeds_N: Any, positions_N: Any, columns_V: Any) -> Any:
    """MurmurHash3 (x86, 32 bits, seed 0) of the 16 bytes that seed (8), position (4) and column (4) are in little
    endian: int64 [N, V], from integers [N], [N] and [V].
    """
    import torch

    mask = 2**32 - 1

    def rotated(x: torch.Tensor, bits: int) -> torch.Tensor:
        return (x << bits | x >> 32 - bits) & mask

    # Products overflow 64 bits and are right in the lower 32.
    seeds_N1, positions_N1 = seeds_N.to(torch.int64)[:, None], positions_N.to(torch.int64)[:, None]
    hash_NV = torch.zeros((1, 1), dtype=torch.int64)
    for block in (seeds_N1, seeds_N1 >> 32, positions_N1, columns_V.to(torch.int64)[None]):
        mixed = rotated((block & mask) * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask
        hash_NV = rotated(hash_NV ^ mixed, 13) * 5 + 0xE6546B64 & mask
    hash_NV ^= 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hash_NV = (hash_NV ^ hash_NV >> shift) * factor & mask
    return hash_NV ^ hash_NV >> 16


def fork_workers(model_path: str) -> None:
    """Import what SGLang's workers import to serve this model, then make it fork them instead of spawning them."""
    import multiprocessing

    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler
    import sglang.srt.model_executor.model_runner  # noqa: F401

    register_model(model_path)
    set_start_method = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: set_start_method("fork", force=True)


def sleep_while_paused() -> None:
    """SGLang's scheduler asks for messages without a pause while it is paused, as in every push of weights: on a core
    that the trainer needs for the push. Here it waits for the next one as it does when it is idle.
    """
    from sglang.srt.managers.scheduler import Scheduler

    record = Scheduler._record_scheduler_state_for_paused_engine

    def record_and_wait(self: Any) -> None:
        record(self)
        self.maybe_sleep_on_idle()

    Scheduler._record_scheduler_state_for_paused_engine = record_and_wait  # type: ignore[method-assign]  # a stand-in


def prepare(command_line: Sequence[str]) -> Any:
    """Import all that the server and its workers need for what the command line says; returns SGLang's arguments."""
    cut_imports(command_line)
    install_stand_ins()
    import sglang.launch_server  # noqa: F401
    from sglang.srt.server_args import prepare_server_args

    from drpo_megatron.platform import sglang_cpu_attention

    sglang_cpu_attention.install()
    if "--enable-deterministic-inference" in command_line:
        allow_deterministic_inference()
    if EMULATE_FP8 in os.environ:
        from drpo_megatron.platform import sglang_cpu_fp8

        sglang_cpu_fp8.install()
    arguments = prepare_server_args(list(command_line))
    fork_workers(arguments.model_path)
    sleep_while_paused()
    return arguments


def main() -> None:
    keep_freed_memory()
    gc.disable()  # imports make nothing that it could collect, and a seventh of their time is its search
    arguments = prepare(sys.argv[1:])
    gc.freeze()  # the workers share these objects: a search would make copies of their pages
    gc.enable()
    from sglang.launch_server import run_server
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()

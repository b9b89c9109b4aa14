"""The CUDA→CPU redirect: lets Megatron-Core, which names `cuda` throughout, run on CPU tensors and gloo.

Every patch changes what a CUDA call means in this process, and is made only when no CUDA device exists. Functions are
wrapped where torch defines them, so code that was imported earlier and other threads see the redirect too.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

from drpo_megatron.platform.quiet import hush_advice_for_gpus

_CPU = torch.device("cpu")

# Tensor factories with a `device` and often a `pin_memory` argument.
_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
]
_TENSOR_FACTORIES = ["new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"]

# Megatron-Core takes the fused optimizers and multi-tensor kernels of these packages wherever they can be imported,
# and they abort without a CUDA driver.
_CUDA_ONLY_PACKAGES = ("transformer_engine", "apex", "amp_C")

_active = False


def activate() -> None:
    """Install the redirect once. See `drpo_megatron.platform.activate`."""
    global _active
    if _active:
        return
    _hide_cuda_only_packages()
    hush_advice_for_gpus()
    _redirect_tensors()
    _redirect_cuda_module()
    _redirect_collectives()
    _redirect_megatron()
    _active = True


def _hide_cuda_only_packages() -> None:
    taken = [name for name in _CUDA_ONLY_PACKAGES if sys.modules.get(name) is not None]
    if taken and "megatron.core" in sys.modules:
        raise RuntimeError(
            f"Megatron-Core was imported together with {', '.join(taken)}, which need a CUDA device: "
            "call drpo_megatron.platform.activate() before importing megatron.core, or uninstall them on this machine"
        )
    for name in _CUDA_ONLY_PACKAGES:
        # None makes `import name` raise ModuleNotFoundError, which Megatron-Core answers with its torch code.
        sys.modules[name] = None  # type: ignore[assignment]


def _is_cuda(target: Any) -> bool:
    return (isinstance(target, str) and target.startswith("cuda")) or (
        isinstance(target, torch.device) and target.type == "cuda"
    )


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with CUDA devices, given by keyword or position, replaced by the CPU; pinned memory needs CUDA too."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*(_CPU if _is_cuda(a) else a for a in args), **kwargs)

    return call


def _redirect_tensors() -> None:
    # torch caches the set of factories that `with torch.device(...)` acts on at its first use. It must hold the
    # originals, which the wrappers call, or transformers' construction on the meta device would stop working.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _TENSOR_FACTORIES:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    # Stand-ins take any arguments, which no type of what they stand for says.
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.to, module.to = _on_cpu(tensor.to), _on_cpu(module.to)
    # Moving to the GPU is the identity: the tensor is already on the only device.
    tensor.cuda = module.cuda = tensor.pin_memory = lambda self, *args, **kwargs: self

    original_type: Callable[..., Any] = tensor.type

    @functools.wraps(original_type)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The mixed-precision optimizers sort parameters by comparing this name with 'torch.cuda.FloatTensor'.
        answer = original_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    tensor.type = tensor_type


class _NoStream:
    """Stands for a CUDA stream or event. CPU work is done when the call returns, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else _NoStream()

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        raise RuntimeError("CUDA events measure nothing on CPU: time with time.perf_counter()")

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


def _redirect_cuda_module() -> None:
    cuda: Any = torch.cuda  # stand-ins take any arguments, which no type of what they stand for says
    stream = _NoStream()
    # Megatron-Core allocates with `device=torch.cuda.current_device()`.
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda *args, **kwargs: None
    # Overlap of communication and computation is written with streams and events.
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.synchronize = cuda.empty_cache = lambda *args, **kwargs: None
    # The model-parallel RNG tracker saves and restores the CUDA generator; here that is torch's CPU generator.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Profiler ranges need the CUDA driver.
    cuda.nvtx.range_push = cuda.nvtx.range_pop = cuda.nvtx.mark = lambda *args, **kwargs: None


def _redirect_collectives() -> None:
    """Lists of tensors of unequal sizes, which NCCL takes and gloo does not: tokens sent to experts are such lists."""
    import torch.distributed as dist

    equal_all_gather, equal_reduce_scatter = dist.all_gather, dist.reduce_scatter

    @functools.wraps(equal_all_gather)
    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes = [len(t) if t.dim() else 1 for t in tensor_list]
        if min(sizes) == max(sizes):
            return equal_all_gather(tensor_list, tensor, *args, **kwargs)
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        received = [torch.empty_like(padded) for _ in sizes]
        equal_all_gather(received, padded, *args, **kwargs)
        for target, source in zip(tensor_list, received, strict=True):
            target.copy_(source[: len(target)])
        return None

    @functools.wraps(equal_reduce_scatter)
    def reduce_scatter(output: torch.Tensor, input_list: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        sizes = [len(t) if t.dim() else 1 for t in input_list]
        if min(sizes) == max(sizes):
            return equal_reduce_scatter(output, input_list, *args, **kwargs)
        padded = [t.new_zeros(max(sizes), *t.shape[1:]) for t in input_list]
        for target, source in zip(padded, input_list, strict=True):
            target[: len(source)] = source
        received = torch.empty_like(padded[0])
        equal_reduce_scatter(received, padded, *args, **kwargs)
        output.copy_(received[: len(output)])
        return None

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter


def _alone_in_place(collective: Callable[..., Any]) -> Callable[..., Any]:
    """`collective` that leaves the buffer of a single rank as it is, like NCCL: gloo copies it, up to three times."""
    import torch.distributed as dist

    @functools.wraps(collective)
    def call(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group") or dist.group.WORLD
        assert group is not None, "torch.distributed has been initialized"
        # One that is asked for by itself to run on its own must answer with a handle.
        answerless = not kwargs.get("async_op") or group in dist.distributed_c10d._world.pg_coalesce_state
        if answerless and group.size() == 1 and output.data_ptr() == source.data_ptr():
            return None
        return collective(output, source, *args, **kwargs)

    return call


class _AccumulatingProducts:
    """Stands for apex's `fused_weight_gradient_mlp_cuda`: a weight's gradient is added where it ends, in one pass."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input_TI: torch.Tensor, grad_TO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
        if input_TI.dtype == main_grad_OI.dtype:
            main_grad_OI.addmm_(grad_TO.t(), input_TI)
        else:
            main_grad_OI.add_(torch.mm(grad_TO.t(), input_TI))


def _redirect_megatron() -> None:
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import layers, random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # These reach into CUDA's C++ generators, past torch.cuda.
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, _alone_in_place(getattr(param_and_grad_buffer, name)))

    buffer = param_and_grad_buffer._ParamAndGradBuffer
    offload = buffer.offload_to_cpu

    @functools.wraps(offload)
    def offload_to_cpu(self: Any, move_params: bool = True, move_grads: bool = True) -> None:
        # Without a copy from before, the original's is `param_data.cpu()`: here the tensor that it then empties.
        if move_params and self.param_data is not None and self.param_data_cpu is None:
            self.param_data_cpu = torch.empty_like(self.param_data)
        offload(self, move_params, move_grads)

    buffer.offload_to_cpu = offload_to_cpu  # type: ignore[method-assign]  # a stand-in

    layers.fused_weight_gradient_mlp_cuda = _AccumulatingProducts  # type: ignore[attr-defined]  # only apex brings it
    layers._grad_accum_fusion_available = True

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # The original converts to numpy only what it had to move off a GPU; the dispatcher expects numpy.
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu

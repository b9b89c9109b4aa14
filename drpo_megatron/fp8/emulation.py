"""FP8 training without FP8 hardware: linear layers of Megatron-Core, quantized around products in float32.

The three products of a linear layer take the operands that Transformer Engine's take:

    y  = dq(x) · dq(w)^T        x and w in blocks along the input features
    dx = dq(g) · dq(w)          g and w in blocks along the output features
    dw = dq(g)^T · dq(x)        g and x in blocks along the tokens

each quantized from the unquantized tensor (`fp8.numerics`); one scale a tensor has no direction, and 128 × 128 blocks
of weights have both. `docs/fp8.md` says where this differs from Transformer Engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor

from drpo_megatron.config.schema import Fp8Config
from drpo_megatron.fp8 import numerics
from drpo_megatron.fp8.numerics import BLOCK, E4M3, E5M2, Format, Quantized
from drpo_megatron.models.mla_attention import ReplicatedLinear

Role = Literal["input", "weight", "gradient"]
ROLES: tuple[Role, ...] = ("input", "weight", "gradient")
FORWARD_ROLES, BACKWARD_ROLES = slice(0, 2), slice(2, 3)

Observer = Callable[[Role, Tensor, Quantized], None]
"""Is shown every tensor [rows, columns] of a layer, with what it becomes in blocks along its columns."""


class Quantizer:
    """How one layer's operands are quantized. Its delayed scales are state; without them it has none.

    amax_history: float32 [length, 3], the newest first, one column a role. scales: float32 [3], what values are
    multiplied by. They are 0 and 1 at first, as in Transformer Engine. trains: whether the chunk's forward that runs is
    followed by a backward. active: False computes products without FP8. observer: None but where somebody looks.
    """

    def __init__(self, fp8: Fp8Config, device: torch.device) -> None:
        if fp8.recipe is None:
            raise ValueError("fp8.recipe is null: there is nothing to quantize with")
        self.recipe = fp8.recipe
        self.power_of_two = fp8.block_scales == "power_of_two"
        self.formats: dict[Role, Format] = {
            "input": E4M3,
            "weight": E4M3,
            "gradient": E5M2 if fp8.number_format == "hybrid" else E4M3,
        }
        self.observer: Observer | None = None
        self.trains = True
        self.active = True
        if fp8.recipe == "delayed":
            self.amax_history = torch.zeros(fp8.amax_history, len(ROLES), device=device)
            self.scales = torch.ones(len(ROLES), device=device)
        # Of forwards whose activations will be computed again, first in, first out: Megatron's schedules run the
        # backwards of a chunk in the order of its forwards.
        self._awaited: deque[Tensor] = deque()

    def forward_scales(self) -> Tensor | None:
        """The scales of this forward pass; the recomputation of one takes those that it had."""
        if self.recipe != "delayed":
            return None
        if is_checkpointing() and torch.is_grad_enabled():
            return self._awaited.popleft()
        scales = self.scales.clone()
        if is_checkpointing() and self.trains:
            self._awaited.append(scales)
        return scales

    def is_recorded(self) -> bool:
        """Whether a forward pass here and now counts: those of evaluation do not, nor does a recomputation."""
        return self.recipe == "delayed" and self.trains and is_checkpointing() != torch.is_grad_enabled()

    def quantize(
        self, x_MK: Tensor, role: Role, scales: Tensor | None, *, record: bool, both: bool
    ) -> tuple[Quantized, Quantized | None]:
        """`x` in blocks along its columns, and, with `both`, its transpose [K, M] in blocks along its rows.

        scales: those of `delayed`. record: the largest value enters the history.
        """
        x_MK, fmt = x_MK.detach(), self.formats[role]
        match self.recipe:
            case "delayed":
                at = ROLES.index(role)
                assert scales is not None
                if record:
                    newest = self.amax_history[0, at]
                    newest.copy_(torch.maximum(newest, numerics.amax(x_MK)))
                rows = numerics.with_scale(x_MK, fmt, scales[at])
            case "tensorwise":
                rows = numerics.tensorwise(x_MK, fmt)
            case "blockwise":
                block = (BLOCK if role == "weight" else 1, BLOCK)
                rows = numerics.blockwise(x_MK, fmt, block, power_of_two=self.power_of_two)
            case "mxfp8":
                rows = numerics.mxfp8(x_MK, fmt)
        if self.observer is not None:
            self.observer(role, x_MK, rows)
        if not both:
            return rows, None
        # Every pass of the quantization is faster over rows that are contiguous.
        if self.recipe == "mxfp8":
            return rows, numerics.mxfp8(x_MK.t().contiguous(), fmt)
        if self.recipe == "blockwise" and role != "weight":
            return rows, numerics.blockwise(x_MK.t().contiguous(), fmt, (1, BLOCK), power_of_two=self.power_of_two)
        return rows, Quantized(rows.values.t(), rows.scales.t(), (rows.block[1], rows.block[0]))

    def state(self) -> dict[str, Tensor] | None:
        """What a checkpoint keeps: delayed scales and their history, copied."""
        if self.recipe != "delayed":
            return None
        return {"amax_history": self.amax_history.cpu().clone(), "scales": self.scales.cpu().clone()}

    def load_state(self, state: dict[str, Tensor] | None) -> None:
        """None, from a run without delayed scales, starts anew. A history of another length is cut or filled up with
        zeros at its old end.
        """
        if self.recipe != "delayed" or state is None:
            return
        self.scales.copy_(state["scales"])
        read = state["amax_history"]
        # Behind the first place, which is free, the oldest comes first.
        kept = min(len(read), len(self.amax_history)) - 1
        self.amax_history.zero_()
        if kept:
            self.amax_history[-kept:] = read[-kept:].to(self.amax_history.device)


class _QuantizedLinear(torch.autograd.Function):
    """x [..., K], weight [N, K] → [..., N] in the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        quantizer: Quantizer,
        record: bool,
        for_backward: bool,
        scales: Tensor | None,
    ) -> Tensor:
        x_TK = x.reshape(-1, x.shape[-1])
        x_rows, x_columns = quantizer.quantize(x_TK, "input", scales, record=record, both=for_backward)
        w_rows, w_columns = quantizer.quantize(weight, "weight", scales, record=record, both=for_backward)
        if x_columns is not None and w_columns is not None:
            ctx.save_for_backward(x_columns.values, x_columns.scales, w_columns.values, w_columns.scales)
            ctx.blocks = (x_columns.block, w_columns.block)
        ctx.quantizer, ctx.dtypes, ctx.input_shape = quantizer, (x.dtype, weight.dtype), x.shape
        return _product(x_rows, w_rows).to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x_values, x_scales, w_values, w_scales = ctx.saved_tensors
        x_columns, w_columns = (
            Quantized(x_values, x_scales, ctx.blocks[0]),
            Quantized(w_values, w_scales, ctx.blocks[1]),
        )
        quantizer: Quantizer = ctx.quantizer
        g_TN = gradient.reshape(-1, gradient.shape[-1])
        delayed = quantizer.recipe == "delayed"
        g_rows, g_columns = quantizer.quantize(
            g_TN, "gradient", quantizer.scales if delayed else None, record=delayed, both=True
        )
        assert g_columns is not None
        dx = _product(g_rows, w_columns).to(ctx.dtypes[0]).view(ctx.input_shape)
        return dx, _product(g_columns, x_columns).to(ctx.dtypes[1]), None, None, None, None


def _product(a_MK: Quantized, b_NK: Quantized) -> Tensor:
    return a_MK.dequantize() @ b_NK.dequantize().t()


def linear(x: Tensor, weight: Tensor, quantizer: Quantizer, bias: Tensor | None = None) -> Tensor:
    """x [..., K] · weight [N, K]^T + bias [N], the products of operands in FP8; in the dtype of x.

    The weight's gradient is rounded to its dtype, and Megatron's wrapper adds it to `main_grad` in float32.
    """
    if not quantizer.active:
        return F.linear(x, weight, bias)
    record, scales = quantizer.is_recorded(), quantizer.forward_scales()
    y: Tensor = _QuantizedLinear.apply(x, weight, quantizer, record, torch.is_grad_enabled(), scales)
    return y if bias is None else y + bias


class _ExtraState(torch.nn.Module):
    """What checkpoints of the layer keep beside its parameters. Transformer Engine's layers keep theirs so too."""

    quantizer: Quantizer

    def get_extra_state(self) -> dict[str, Tensor] | None:
        return self.quantizer.state()

    def set_extra_state(self, state: dict[str, Tensor] | None) -> None:
        self.quantizer.load_state(state)


class EmulatedColumnParallelLinear(_ExtraState, ColumnParallelLinear):
    """Megatron-Core's, with its matrix product quantized. Under sequence parallelism the input is quantized as a whole:
    Transformer Engine shares the largest value over the ranks before it gathers.
    """

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **_: Any,
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return linear(input, weight, self.quantizer, bias)


class EmulatedRowParallelLinear(_ExtraState, RowParallelLinear):
    """Megatron-Core's, with its matrix product quantized. Its outputs are summed over the ranks unquantized."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
        return linear(input, weight, self.quantizer)


class EmulatedReplicatedLinear(_ExtraState, ReplicatedLinear):
    """The down projections of multi-latent attention, with their matrix products quantized."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return linear(x, self.weight, self.quantizer), None


EMULATED: dict[type, type] = {
    ColumnParallelLinear: EmulatedColumnParallelLinear,
    RowParallelLinear: EmulatedRowParallelLinear,
    ReplicatedLinear: EmulatedReplicatedLinear,
}


def emulated_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The quantized linear layers of a model chunk by their name in it."""
    return {name: m for name, m in model.named_modules() if isinstance(m, tuple(EMULATED.values()))}


def emulate(model: GPTModel, fp8: Fp8Config) -> None:
    """Quantize the linear layers of a chunk's transformer layers but the first and last of the model that `fp8` leaves
    out. The chunk must be of the local specs.

    Embedding, output projection, norms and routers are no linear layers inside a transformer layer.
    """
    layers = fp8.quantized_layers(model.config.num_layers)
    for layer in model.decoder.layers:
        if layer.layer_number - 1 not in layers:
            continue
        modules: list[Any] = list(layer.modules())
        for module in modules:
            if type(module) in EMULATED:
                module.__class__ = EMULATED[type(module)]
                module.quantizer = Quantizer(fp8, module.weight.device)
    if fp8.recipe == "delayed":
        _DelayedUpdates(model.decoder, fp8, [m.quantizer for m in emulated_layers(model).values()])


class _DelayedUpdates:
    """Moves the scales of a chunk on: those of inputs and weights after each micro-batch's forward, those of gradients
    after its backward, when Transformer Engine does.

    Largest values are first shared over the ranks of tensor, context and data parallelism, as Megatron-Core's
    `get_amax_reduction_group`. Every one of them runs the same number of micro-batches.
    """

    def __init__(self, decoder: torch.nn.Module, fp8: Fp8Config, quantizers: list[Quantizer]) -> None:
        self.fp8, self.quantizers = fp8, quantizers
        decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        decoder.register_forward_hook(self._after_forward)

    def _before_forward(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        for quantizer in self.quantizers:
            quantizer.trains = torch.is_grad_enabled()
        if not torch.is_grad_enabled():
            return None
        if decoder.pre_process:
            return args, kwargs | {"hidden_states": _AfterBackward.apply(kwargs["hidden_states"], self._after_backward)}
        # Later stages get what the schedule has put there.
        decoder.input_tensor = _AfterBackward.apply(decoder.input_tensor, self._after_backward)
        return None

    def _after_forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._update(FORWARD_ROLES)

    def _after_backward(self) -> None:
        self._update(BACKWARD_ROLES)

    @torch.no_grad()
    def _update(self, roles: slice) -> None:
        """For all layers in one collective and one pass."""
        if not self.quantizers:
            return
        fmt = self.quantizers[0].formats[ROLES[roles][0]]
        history_LNR = torch.stack([q.amax_history[:, roles] for q in self.quantizers], dim=1)
        scales_NR = torch.stack([q.scales[roles] for q in self.quantizers])
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        dist.all_reduce(history_LNR[0], op=dist.ReduceOp.MAX, group=group)
        scales_NR = numerics.delayed_scale(history_LNR, scales_NR, fmt, self.fp8.margin, self.fp8.amax_algorithm)
        history_LNR = numerics.rolled(history_LNR)
        for n, quantizer in enumerate(self.quantizers):
            quantizer.amax_history[:, roles] = history_LNR[:, n]
            quantizer.scales[roles] = scales_NR[n]


class _AfterBackward(torch.autograd.Function):
    """Identity, whose backward, the last of the chunk's layers, calls a function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[], None]) -> Tensor:
        ctx.function = function
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.function()
        return gradient, None

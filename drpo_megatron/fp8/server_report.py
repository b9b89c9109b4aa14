"""Which linear layers of a rollout server are in FP8: SGLang calls `report` in each tensor-parallel rank.

It looks at the model as it stands in memory, whatever the server was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from drpo_megatron.sync.loader_call import write_answer

_WEIGHTS = ("weight", "w13_weight", "w2_weight")


def layers(model: torch.nn.Module) -> dict[str, bool]:
    """Weight of a linear layer, by its parameter's name → whether its products are in FP8.

    A layer counts when its weight is stored in FP8 and SGLang's FP8 method multiplies it, or when its method emulates
    that. Linear layers are SGLang's own and its experts; embeddings and the output projection are none.
    """
    return dict(_layers(model))


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, bool]]:
    for module_name, module in model.named_modules():
        kinds = {base.__name__ for base in type(module).__mro__}
        if not kinds & {"LinearBase", "FusedMoE"}:
            continue
        method = getattr(module, "quant_method", None)
        methods = {base.__name__ for base in type(method).__mro__}
        emulated = getattr(method, "emulates_fp8", False)
        for name, parameter in module.named_parameters(recurse=False):
            if name in _WEIGHTS:
                stored = parameter.dtype is torch.float8_e4m3fn and methods & {"Fp8LinearMethod", "Fp8MoEMethod"}
                yield f"{module_name}.{name}", bool(stored or emulated)


def report(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Write `layers` as JSON to the file that the request, the one name in `named_tensors`, gives as `answer`."""
    ((request, _),) = named_tensors
    write_answer(Path(json.loads(request)["answer"]), json.dumps(layers(model)))

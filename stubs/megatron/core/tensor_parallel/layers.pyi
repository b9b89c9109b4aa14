from typing import Any

import torch
from torch.distributed import ProcessGroup

_grad_accum_fusion_available: bool

class VocabParallelEmbedding(torch.nn.Module):
    weight: torch.nn.Parameter

class ColumnParallelLinear(torch.nn.Module):
    weight: torch.nn.Parameter
    tp_group: ProcessGroup

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...
    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor: ...

class RowParallelLinear(torch.nn.Module):
    weight: torch.nn.Parameter
    tp_group: ProcessGroup

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]: ...
    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor: ...

from collections.abc import Callable
from typing import Any

import torch

# Collectives of torch, which this module keeps by these names.
dist_all_gather_func: Callable[..., Any]
dist_reduce_scatter_func: Callable[..., Any]

class _ParamAndGradBucket:
    offset: int
    numel_unpadded: int

class _ParamAndGradBuffer:
    buckets: list[_ParamAndGradBucket]
    param_data: torch.Tensor | None
    param_data_cpu: torch.Tensor | None
    param_index_map: dict[torch.nn.Parameter, tuple[int, int, int]]

    def offload_to_cpu(self, move_params: bool = True, move_grads: bool = True) -> None: ...
    def reload_from_cpu(self, move_params: bool = True, move_grads: bool = True) -> None: ...

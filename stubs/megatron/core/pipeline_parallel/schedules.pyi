from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, type_check_only

import torch

@type_check_only
class _ForwardBackward(Protocol):
    """What its three schedules take."""

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., tuple[torch.Tensor, Any]],
        data_iterator: Iterator[Any] | list[Iterator[Any]],
        model: torch.nn.Module | Sequence[torch.nn.Module],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        forward_only: bool = False,
    ) -> list[Any]: ...

def get_forward_backward_func() -> _ForwardBackward: ...

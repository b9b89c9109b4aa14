from collections.abc import Sequence
from typing import Any

import torch

def finalize_model_grads(
    model: Sequence[torch.nn.Module],
    num_tokens: torch.Tensor | None = None,
    pg_collection: Any = None,
    force_all_reduce: bool | None = False,
) -> None: ...

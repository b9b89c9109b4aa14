from typing import Any

import torch

class MoEAuxLossAutoScaler(torch.autograd.Function): ...

def z_loss_func(
    logits: torch.Tensor, z_loss_coeff: float, padding_mask: torch.Tensor | None = None
) -> torch.Tensor: ...

# It answers with an array of numpy where one is asked for.
def maybe_move_tensor_to_cpu(tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False) -> Any: ...

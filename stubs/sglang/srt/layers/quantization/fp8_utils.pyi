import torch

def block_quant_dequant(
    x_q_block: torch.Tensor, x_s: torch.Tensor, block_size: list[int], dtype: torch.dtype
) -> torch.Tensor: ...

import torch
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase

class UnquantizedLinearMethod(QuantizeMethodBase):
    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor: ...

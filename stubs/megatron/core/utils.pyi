import torch
from megatron.core.transformer.transformer_config import TransformerConfig

def get_model_config(model: torch.nn.Module) -> TransformerConfig: ...

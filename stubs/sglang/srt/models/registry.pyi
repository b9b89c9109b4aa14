import torch

class _ModelRegistry:
    models: dict[str, type[torch.nn.Module] | str]

ModelRegistry: _ModelRegistry

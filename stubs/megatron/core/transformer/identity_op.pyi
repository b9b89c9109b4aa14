import torch

class IdentityOp(torch.nn.Module):
    def __init__(self, *args: object, **kwargs: object) -> None: ...

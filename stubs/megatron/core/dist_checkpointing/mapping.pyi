from dataclasses import dataclass

import torch

class ShardedBase:
    key: str

@dataclass
class ShardedTensor(ShardedBase):
    key: str
    data: torch.Tensor | None
    dtype: torch.dtype
    local_shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    axis_fragmentations: tuple[int, ...] | None

@dataclass
class ShardedObject(ShardedBase):
    key: str
    data: object
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]

# Only Megatron-Core makes them: to name the functions that it is built of serves nobody here.
class ShardedTensorFactory(ShardedBase):
    data: torch.Tensor

from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

class DistributedDataParallel(torch.nn.Module):
    module: MegatronModule
    ddp_config: DistributedDataParallelConfig
    buffers: list[_ParamAndGradBuffer]  # type: ignore[assignment]  # it hides torch's method of this name
    expert_parallel_buffers: list[_ParamAndGradBuffer]

    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        module: MegatronModule,
        disable_bucketing: bool = False,
    ) -> None: ...
    def no_sync(self) -> AbstractContextManager[None]: ...
    def start_param_sync(self, *unused: Any, force_sync: bool = False) -> None: ...
    def zero_grad_buffer(self) -> None: ...
    def broadcast_params(self) -> None: ...
    def offload_grad_buffers(self) -> None: ...
    def restore_grad_buffers(self) -> None: ...

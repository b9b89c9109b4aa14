from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed import ProcessGroup

class DistributedOptimizer(MegatronOptimizer):
    buffers: list[_ParamAndGradBuffer]
    data_parallel_group: ProcessGroup

    def sharded_param_state_fully_reshardable(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> dict[int, Any]: ...
    def _get_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter) -> dict[str, torch.Tensor]: ...
    def _set_main_param_and_optimizer_states(
        self, model_param: torch.nn.Parameter, tensors: dict[str, Any]
    ) -> None: ...
    def _init_optimizer_states_with_dummy_values(self) -> None: ...

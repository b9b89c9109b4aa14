from collections.abc import Sequence

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer as MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig as OptimizerConfig

def get_megatron_optimizer(config: OptimizerConfig, model_chunks: Sequence[torch.nn.Module]) -> MegatronOptimizer: ...

from dataclasses import dataclass

import torch

@dataclass(kw_only=True)
class OptimizerConfig:
    lr: float | None = None
    min_lr: float | None = None
    weight_decay: float = 0.01
    fp8_recipe: str | None = None
    bf16: bool = False
    params_dtype: torch.dtype = ...
    use_precision_aware_optimizer: bool = False
    exp_avg_dtype: torch.dtype = ...
    exp_avg_sq_dtype: torch.dtype = ...
    optimizer: str = "adam"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-08
    use_distributed_optimizer: bool = False
    overlap_param_gather: bool = False
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        # Set there, from the fields.
        self.use_precision_aware_optimizer_no_fp8_or_ds_fp8: bool

"""Multi-latent attention of the local specs: the latents' projections lie whole on every tensor-parallel rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class ReplicatedLinear(MegatronModule):
    """A linear layer without bias whose weight [out, in] every tensor-parallel rank holds.

    Under sequence parallelism each rank applies it to its own tokens, so that its gradient is partial.
    """

    def __init__(self, config: TransformerConfig, in_features: int, out_features: int, device: torch.device) -> None:
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(
            torch.empty(out_features, in_features, dtype=config.params_dtype, device=device)
        )
        # Megatron-Core marks parameters so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None

    def get_extra_state(self) -> dict[str, torch.Tensor] | None:
        """None, as Megatron-Core's linear layers have it. Checkpoints of FP8 training keep scales there."""
        return None

    def set_extra_state(self, state: dict[str, torch.Tensor] | None) -> None:
        """Ignored."""


class _NoQueryNormWithoutLatent(QKNormConfigResolver):
    """Without a latent of the queries Megatron-Core asks for a norm inside their projection when the key-value latent
    has one. The input is normalized already, and the files hold no such norm.
    """

    def _mla_fused_linear_or_default(self, module_spec: Any, module_name: str) -> Any:
        if module_name == "linear_q_proj":
            return module_spec
        return super()._mla_fused_linear_or_default(module_spec, module_name)


class PlainQueryMLASelfAttention(MLASelfAttention):
    """Megatron-Core's attention, whose queries are normalized in their latent only. With Transformer Engine's layers it
    ran on a GPU in its test of logits only.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> Any:
        return _NoQueryNormWithoutLatent(self.config, submodules).resolve()


class LocalMLASelfAttention(PlainQueryMLASelfAttention):
    """Megatron-Core's attention with the down projections that Transformer Engine's spec has.

    The stock local spec splits the down projections over the tensor-parallel ranks and gathers their outputs. The
    gradient of the rotary part of the key, which all heads share, is then only that of each rank's own heads.
    """

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        device = self.linear_kv_up_proj.weight.device
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config, config.hidden_size, config.q_lora_rank, device)
        self.linear_kv_down_proj = ReplicatedLinear(
            config, config.hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim, device
        )

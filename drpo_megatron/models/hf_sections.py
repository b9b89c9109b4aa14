"""The parts of a decoder that have numbers of their own: rotary embedding, experts, latent attention. No torch, no
Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `type` is default, linear, llama3 or yarn; the other fields belong to the types that scale.

    Multi-latent attention takes default and yarn, other attention default, linear and llama3. With yarn, cosine and
    sine are multiplied by m(mscale) / m(mscale_all_dim) and attention scores by m(mscale_all_dim)², where
    m(x) = 1 + 0.1 · x · ln(factor).
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts. `layers` says for each layer of the model whether its MLP is one.

    The router scores all experts by `score_function`. With `expert_bias` a bias, which no gradient reaches, is added
    for the choice alone. `topk_groups` of `num_groups` groups of experts are eligible, by the sum of their two best
    scores (None: all are). With `normalize` the weights of the chosen experts sum to `scaling_factor`; without, they
    are the scores times `scaling_factor`. Every token also passes an MLP of width `shared_ffn_hidden_size`, all shared
    experts together; 0 is none.
    """

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    layers: tuple[bool, ...]
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scaling_factor: float = 1.0
    expert_bias: bool = False
    num_groups: int | None = None
    topk_groups: int | None = None
    shared_ffn_hidden_size: int = 0


@dataclass(frozen=True)
class MLAConfig:
    """Multi-latent attention: keys and values come from a latent of `kv_lora_rank`, queries from one of `q_lora_rank`.

    A query or key head has `qk_nope_head_dim` dimensions without rotary position and `qk_rope_head_dim` with it, in
    interleaved pairs; of the key the latter are shared by all heads. `q_lora_rank` None: queries have no latent.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

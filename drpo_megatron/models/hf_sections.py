"""What mixture of experts and multi-latent attention add to `config.json`. No torch, no Megatron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


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


class RawConfig:
    """The parsed JSON, with errors that name the file."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source

    def need(self, *keys: str) -> Any:
        """The value of a key, which may have several spellings. Raises ValueError when none is there."""
        for key in keys:
            if self.raw.get(key) is not None:
                return self.raw[key]
        raise ValueError(
            f"{self.source}: {keys[0]} is missing; a {self.raw.get('model_type')} configuration must state it"
        )

    def refuse(self, key: str, value: Any, reason: str) -> ValueError:
        return ValueError(f"{self.source}: {key} = {value!r} is not supported, {reason}; use another model")


def moe_config(raw: Mapping[str, Any], model_type: str, source: str) -> MoEConfig | None:
    """The experts of a configuration; None for a dense one. Raises ValueError naming what is not supported."""
    config = RawConfig(raw, source)
    if model_type == "qwen3_moe":
        moe = _qwen3_moe(config)
    elif model_type == "deepseek_v3":
        moe = _deepseek_v3_moe(config)
    else:
        return None
    if not 1 <= moe.top_k <= moe.num_experts:
        raise ValueError(f"{source}: num_experts_per_tok = {moe.top_k} of {moe.num_experts} experts is not possible")
    if moe.normalize and moe.top_k == 1:
        raise config.refuse("norm_topk_prob", True, "because with one expert a token the router has no gradient")
    return moe


def _qwen3_moe(config: RawConfig) -> MoEConfig:
    raw = config.raw
    step, dense = int(raw.get("decoder_sparse_step") or 1), set(raw.get("mlp_only_layers") or ())
    return MoEConfig(
        num_experts=int(config.need("num_experts", "num_local_experts")),
        top_k=int(config.need("num_experts_per_tok")),
        ffn_hidden_size=int(config.need("moe_intermediate_size")),
        layers=tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(int(config.need("num_hidden_layers")))
        ),
        normalize=bool(raw.get("norm_topk_prob", False)),
    )


def _deepseek_v3_moe(config: RawConfig) -> MoEConfig:
    raw = config.raw
    for key, only, reason in (
        ("scoring_func", "sigmoid", "because the router of this family scores by sigmoid"),
        ("topk_method", "noaux_tc", "because the router of this family chooses by biased scores"),
        ("moe_layer_freq", 1, "because every layer after the dense ones holds experts"),
        ("norm_topk_prob", True, "because Megatron-Core normalizes the weights of sigmoid scores"),
    ):
        if raw.get(key, only) != only:
            raise config.refuse(key, raw[key], reason)
    num_layers, dense = int(config.need("num_hidden_layers")), int(raw.get("first_k_dense_replace") or 0)
    num_experts, top_k = (
        int(config.need("n_routed_experts", "num_local_experts")),
        int(config.need("num_experts_per_tok")),
    )
    num_groups, topk_groups = int(raw.get("n_group") or 1), int(raw.get("topk_group") or 1)
    grouped = topk_groups < num_groups
    if num_experts % num_groups:
        raise config.refuse("n_group", num_groups, f"because {num_experts} experts do not divide over it")
    if grouped and top_k // topk_groups != 2:
        # Megatron-Core ranks groups by their best top_k / topk_groups scores, transformers by their best two.
        raise config.refuse(
            "topk_group", topk_groups, f"because num_experts_per_tok = {top_k} must be two experts a group"
        )
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        ffn_hidden_size=int(config.need("moe_intermediate_size")),
        layers=tuple(layer >= dense for layer in range(num_layers)),
        score_function="sigmoid",
        scaling_factor=float(raw.get("routed_scaling_factor") or 1.0),
        expert_bias=True,
        num_groups=num_groups if grouped else None,
        topk_groups=topk_groups if grouped else None,
        shared_ffn_hidden_size=int(config.need("moe_intermediate_size")) * int(raw.get("n_shared_experts") or 0),
    )


def mla_config(raw: Mapping[str, Any], model_type: str, source: str) -> MLAConfig | None:
    """The latent attention of a configuration; None without one. Raises ValueError naming what is not supported."""
    if model_type != "deepseek_v3":
        return None
    config = RawConfig(raw, source)
    if not raw.get("rope_interleave", True):
        raise config.refuse("rope_interleave", False, "because Megatron-Core rotates interleaved pairs")
    num_heads = int(config.need("num_attention_heads"))
    if int(raw.get("num_key_value_heads") or num_heads) != num_heads:
        raise config.refuse(
            "num_key_value_heads", raw["num_key_value_heads"], f"because all {num_heads} heads have keys of their own"
        )
    if float(config.need("rms_norm_eps")) != 1e-6:
        # transformers normalizes the latents with 1e-6 whatever the configuration says; Megatron-Core has one number.
        raise config.refuse("rms_norm_eps", raw["rms_norm_eps"], "because the latents are normalized with 1e-06")
    return MLAConfig(
        q_lora_rank=None if raw.get("q_lora_rank") is None else int(raw["q_lora_rank"]),
        kv_lora_rank=int(config.need("kv_lora_rank")),
        qk_nope_head_dim=int(config.need("qk_nope_head_dim")),
        qk_rope_head_dim=int(config.need("qk_rope_head_dim")),
        v_head_dim=int(config.need("v_head_dim")),
    )

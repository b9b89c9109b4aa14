"""Tiny random Hugging Face directories, one a family, made with transformers: the independent side of parity tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from drpo_megatron.models.families import FAMILIES
from drpo_megatron.models.hf_rope import MLA_ROPE_TYPES, ROPE_TYPES
from drpo_megatron.models.recipes import write_char_tokenizer

# Neither a multiple of 2 nor of the rows a rank is padded to.
VOCAB_SIZE = 515

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough for attention to be far from uniform: small weights would hide mistakes in it.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# For the families that have them: values without which the model is refused.
_IF_KNOWN: dict[str, Any] = {"sliding_window": None}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 64,
}


_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}


_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    **ROPE_TYPES,
    "yarn": (*MLA_ROPE_TYPES["yarn"], "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}


_VALUES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "rope_parameters": _LLAMA3_ROPE, "rms_norm_eps": 1e-5},
    "qwen2": {"tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 24, "rms_norm_eps": 1e-6},
    "qwen3_moe": {
        "tie_word_embeddings": False,
        "head_dim": 24,
        "rms_norm_eps": 1e-6,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0, 2],
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _YARN_ROPE,
        "q_lora_rank": 28,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 24,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "num_mtp_layers": 1,
    },
    "gemma": {"head_dim": 24},
}


def config(family: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a family, with `changes` over its values.

    llama: scaled rotary, untied. qwen2: biases, tied. qwen3: head norms, head_dim ≠ hidden / heads, untied.

    qwen3_moe: layers 0 and 2 are dense, the others have 8 experts. deepseek_v3: layer 0 is dense, the others have 16
    experts in 4 groups and two shared ones; latents for query and key-value, yarn, value heads narrower than key heads.

    gemma: head_dim ≠ hidden / heads, tied. Other families differ from transformers' values by their size only.
    """
    if family not in FAMILIES:
        raise ValueError(f"no tiny model of family {family}")
    kind = CONFIG_MAPPING[family]
    known = {key: value for key, value in _IF_KNOWN.items() if key in kind.__dataclass_fields__}
    return kind(**_COMMON | known | _VALUES.get(family, {}) | changes)


def random_changes(family: str, seed: int) -> dict[str, Any]:
    """Values of `config` by which `seed` makes a random architecture of any family, from the keys its class has.

    The vocabulary is at least VOCAB_SIZE. Sizes divide over two tensor-parallel ranks, but for one key-value head.
    """
    rng = random.Random(f"{family} {seed}")
    fields = set(CONFIG_MAPPING[family].__dataclass_fields__)
    layers, heads = rng.choice([2, 3, 4]), rng.choice([2, 4, 6])
    latent, experts = "kv_lora_rank" in fields, rng.choice([4, 8])
    groups = rng.choice([1, 2])
    pool: dict[str, Any] = {
        "first_k_dense_replace": rng.randrange(layers),
        "decoder_sparse_step": rng.choice([1, 2]),
        "mlp_only_layers": sorted(rng.sample(range(layers), rng.randrange(layers))),
        "moe_intermediate_size": 4 * rng.randint(2, 9),
        "n_group": 2 * groups,
        "topk_group": groups,
        "n_routed_experts": 2 * experts,
        "n_shared_experts": rng.choice([1, 2]),
        "num_local_experts": experts,
        "num_experts": experts,
        "num_experts_per_tok": 2 * groups if "topk_group" in fields else rng.choice([2, 3]),
        "norm_topk_prob": True if "topk_group" in fields else rng.choice([True, False]),
        "routed_scaling_factor": round(rng.uniform(0.5, 3), 2),
        "q_lora_rank": rng.choice([None, 20, 28]),
        "kv_lora_rank": rng.choice([16, 20]),
        "qk_nope_head_dim": 4 * rng.randint(2, 4),
        "qk_rope_head_dim": 4 * rng.randint(2, 4),
        "v_head_dim": 4 * rng.randint(2, 5),
    }
    changes = {key: value for key, value in pool.items() if key in fields} | {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if latent else rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "hidden_size": heads * rng.choice([8, 12, 16]),
        "intermediate_size": 4 * rng.randint(10, 30),
        "vocab_size": VOCAB_SIZE + rng.randrange(40),
        "tie_word_embeddings": rng.choice([True, False]),
        "rms_norm_eps": 1e-6 if latent else rng.choice([1e-6, 1e-5, 1e-3]),
        "rope_parameters": rope(rng.choice(list(FAMILIES[family].rope_types)), rng),
    }
    return changes if latent else changes | {"head_dim": rng.choice([8, 12, 24])}


def rope(kind: str, rng: random.Random | None = None) -> dict[str, Any]:
    """`rope_parameters` of a type, random ones with `rng`. Original contexts are shorter than the tests' sequences."""
    chosen = {"llama3": _LLAMA3_ROPE, "yarn": _YARN_ROPE}.get(kind, {"rope_theta": 500.0, "factor": 4.0})
    keys = _ROPE_KEYS[kind]
    chosen = {key: chosen[key] for key in (*keys, "rope_theta")} | {"rope_type": kind}
    if rng is None:
        return chosen
    pool: dict[str, Any] = {
        "rope_theta": round(10 ** rng.uniform(2, 6)),
        "factor": rng.choice([2.0, 4.0, 8.0]),
        "original_max_position_embeddings": rng.choice([32, 64]),
        "low_freq_factor": rng.choice([1.0, 2.0]),
        "high_freq_factor": rng.choice([3.0, 5.0]),
        "beta_fast": rng.choice([8.0, 16.0]),
        "beta_slow": rng.choice([1.0, 2.0]),
        "mscale": round(rng.uniform(0.5, 1.5), 2),
        "mscale_all_dim": round(rng.uniform(0.5, 1.5), 2),
    }
    return {key: pool.get(key, value) for key, value in chosen.items()}


def write(
    family: str,
    out_dir: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> PreTrainedModel:
    """Write a random model and a character tokenizer to `out_dir`; return the model, on the CPU, for reference results.

    `changes` are values of the configuration.

    Norm weights, biases and routers are random too: at their initial ones and zeros a wrong one would go unnoticed.
    The router's bias stays in float32, as in the files of published models.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, **changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            # About the initial value, which is 0 where norms are zero-centred.
            parameter.data += torch.empty_like(parameter).uniform_(-0.5, 0.5)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
        elif name.endswith(".gate.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    router_biases = {name: b for name, b in model.named_buffers() if name.endswith(".e_score_correction_bias")}
    for bias in router_biases.values():
        torch.nn.init.normal_(bias, std=0.1)
    router_biases = {name: bias.clone() for name, bias in router_biases.items()}
    model.to(dtype)
    for name, bias in router_biases.items():
        model.get_buffer(name).data = bias
    write_char_tokenizer(out_dir)
    model.save_pretrained(out_dir, max_shard_size=max_shard_size)
    return model.eval()

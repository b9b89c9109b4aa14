"""Under which keys Megatron-Core's distributed checkpoints hold the parameters of the weight map.

A key stands for one parameter, or for several along leading dimensions: layers that are all alike are stacked, and so
are the experts of a layer. Layer specs spell norms differently; a reader takes every spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from drpo_megatron.models.hf_config import HFModelConfig

_ROOTS = ("embedding.", "decoder.", "output_layer.")
_LAYER_KEY = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_EXPERT_KEY = re.compile(r"mlp\.experts\.experts\.(.+)")
_EXPERT_NAME = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

# What the linear layer behind a norm calls it in a spec that fuses the two. Specs that do not fuse store some of their
# norms under these names too.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
_FUSED = {plain: fused for fused, plain in _FUSED_NORMS.items()}


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: a key, and an index into the leading dimensions of its tensor."""

    key: str
    index: tuple[int, ...] = ()


def is_weight(key: str) -> bool:
    """Whether a key of a checkpoint belongs to the model's parameters, and not to optimizer or random numbers."""
    return key.startswith(_ROOTS)


def parameters_of(key: str, shape: Sequence[int]) -> Iterator[tuple[str, Place]]:
    """(name in the weight map, place) of every parameter that a key of this shape holds. Norms have unfused names."""
    match = _LAYER_KEY.fullmatch(key)
    if match is None:
        yield key, Place(key)
        return
    layers: list[tuple[str, tuple[int, ...]]] = (
        [(str(i), (i,)) for i in range(shape[0])] if match[1] is None else [(match[1], ())]
    )
    expert = _EXPERT_KEY.fullmatch(match[2])
    for layer, index in layers:
        if expert is None:
            yield f"decoder.layers.{layer}.{_FUSED_NORMS.get(match[2], match[2])}", Place(key, index)
            continue
        for i in range(shape[len(index)]):
            yield f"decoder.layers.{layer}.mlp.experts.local_experts.{i}.{expert[1]}", Place(key, (*index, i))


def places(name: str, hf: HFModelConfig) -> list[tuple[Place, tuple[int, ...]]]:
    """(place, leading dimensions of the key's tensor) under which Megatron-Core looks for a parameter of `hf`.

    Layers are stacked in a dense model. There are several places where specs spell a norm differently.
    """
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return [(Place(name), ())]
    layer, inner = int(match[1]), match[2]
    stacked = hf.moe is None
    root = "decoder.layers." if stacked else f"decoder.layers.{layer}."
    index = (layer,) * stacked
    leading = (hf.num_layers,) * stacked
    if expert := _EXPERT_NAME.fullmatch(inner):
        assert hf.moe is not None
        return [
            (
                Place(f"{root}mlp.experts.experts.{expert[2]}", (*index, int(expert[1]))),
                (*leading, hf.moe.num_experts),
            )
        ]
    spellings = [inner]
    if inner in _FUSED:
        spellings.append(_FUSED[inner])
    if inner == "input_layernorm.weight":
        # Latent attention has no linear layer behind this norm that could take it in.
        spellings = spellings[:1] if hf.mla else spellings[1:]
    if hf.mla is None and inner == "self_attention.q_layernorm.weight":
        spellings = [inner]
    return [(Place(root + spelling, index), leading) for spelling in spellings]


def extra_states(hf: HFModelConfig) -> Iterator[str]:
    """Keys of the objects that linear layers and norms ask for beside their weights.

    Megatron-Core's layers keep nothing in them, Transformer Engine's the scales of FP8; a load fails without them.
    """
    for layer in range(hf.num_layers):
        stacked = hf.moe is None
        root = "decoder.layers." if stacked else f"decoder.layers.{layer}."
        shard = f"shard_{layer}_{hf.num_layers}" if stacked else "shard_0_1"
        for module in _modules(hf, layer):
            yield f"{root}{module}._extra_state/{shard}"
        if hf.is_moe_layer(layer):
            assert hf.moe is not None
            for linear in ("linear_fc1", "linear_fc2"):
                for i in range(hf.moe.num_experts):
                    yield f"{root}mlp.experts.experts.{linear}._extra_state/shard_{i}_{hf.moe.num_experts}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


def _modules(hf: HFModelConfig, layer: int) -> list[str]:
    attention = ["linear_proj", "q_layernorm", "k_layernorm"]
    if hf.mla is None:
        attention.append("linear_qkv")
    else:
        attention += ["linear_q_proj", "linear_q_down_proj", "linear_q_up_proj"]
        attention += ["linear_kv_down_proj", "linear_kv_up_proj", "kv_layernorm"]
    modules = ["input_layernorm", "pre_mlp_layernorm", *(f"self_attention.{name}" for name in attention)]
    mlp = "mlp.shared_experts" if hf.is_moe_layer(layer) else "mlp"
    return [*modules, f"{mlp}.linear_fc1", f"{mlp}.linear_fc2"]

"""Parameters of one rank, counted from the architecture. `models.meta` builds the same, for tests to compare with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from drpo_megatron.models.hf_config import HFModelConfig, padded_vocab_size
from drpo_megatron.models.memory import FLOAT32_ADAM, AdamBytes, ModelStateMemory, optimizer_shards, state_memory
from drpo_megatron.platform.layout import ParallelLayout

EXPERTS = "experts"
KINDS = ("embedding", "attention", "mlp", EXPERTS, "router", "norms", "head")
"""`mlp` is of dense layers and shared experts, `experts` of routed ones; `head` is the output projection, or with tied
embeddings the copy of the embedding that the last of several stages holds."""


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: the layers, counted from 0, of each of its model chunks."""

    index: int
    chunks: tuple[tuple[int, ...], ...]
    first: bool
    last: bool

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for chunk in self.chunks for layer in chunk)


def stages_of(hf: HFModelConfig, layout: ParallelLayout) -> list[Stage]:
    """The stages in order. With virtual stages Megatron-Core deals the layers out in rounds, one chunk a stage each.

    Raises ValueError when the layers do not divide.
    """
    layers = layout.layers_per_stage(hf.num_layers)
    rounds = layout.virtual_pipeline or 1
    made = []
    for index, count in enumerate(layers):
        starts = [(r * hf.num_layers + sum(layers[:index])) // rounds for r in range(rounds)]
        chunks = tuple(tuple(range(start, start + count // rounds)) for start in starts)
        made.append(Stage(index, chunks, index == 0, index == layout.pipeline - 1))
    return made


def rank_parameters(hf: HFModelConfig, layout: ParallelLayout, stage: Stage) -> Counter[str]:
    """Elements by kind on one rank of `stage`."""
    tp = layout.tensor
    elements: Counter[str] = Counter()
    for is_moe, count in Counter(map(hf.is_moe_layer, stage.layers)).items():
        for kind, number in layer_parameters(hf, layout, is_moe).items():
            elements[kind] += count * number
    vocabulary = padded_vocab_size(hf.vocab_size, tp) // tp * hf.hidden_size
    if stage.first:
        elements["embedding"] += vocabulary
    if stage.last:
        elements["norms"] += hf.hidden_size
        if not hf.tied_embeddings or layout.pipeline > 1:
            elements["head"] += vocabulary
    return elements


def layer_parameters(hf: HFModelConfig, layout: ParallelLayout, is_moe: bool) -> Counter[str]:
    """Elements by kind of a layer on one rank. Projections into a latent lie whole on every tensor-parallel rank."""
    hidden, tp = hf.hidden_size, layout.tensor
    elements: Counter[str] = Counter(norms=2 * hidden)
    if hf.mla is None:
        # A server with more ranks than key-value heads holds copies of them.
        width = hf.num_heads // tp * hf.head_dim
        kv_width = max(1, hf.num_kv_heads // tp) * hf.head_dim
        elements["attention"] = 2 * hidden * (width + kv_width) + (width + 2 * kv_width) * hf.qkv_bias
        elements["norms"] += 2 * hf.head_dim * hf.qk_norm
    else:
        mla, heads = hf.mla, hf.num_heads // tp
        query = heads * mla.qk_head_dim
        rank = mla.q_lora_rank
        elements["attention"] = (
            (hidden * query if rank is None else rank * (hidden + query))
            + hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
            + mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
            + heads * mla.v_head_dim * hidden
        )
        elements["norms"] += (rank or 0) + mla.kv_lora_rank
    if not is_moe or hf.moe is None:
        elements["mlp"] = 3 * hidden * hf.ffn_hidden_size // tp
        return elements
    moe = hf.moe
    elements[EXPERTS] = 3 * hidden * moe.ffn_hidden_size // layout.expert_tensor * (moe.num_experts // layout.expert)
    elements["router"] = hidden * moe.num_experts
    elements["mlp"] = 3 * hidden * moe.shared_ffn_hidden_size // tp
    return elements


def total_parameters(hf: HFModelConfig) -> int:
    """Of the whole model, without padding of the vocabulary. The routers' biases, which no gradient reaches, count."""
    alone = ParallelLayout()
    elements = rank_parameters(hf, alone, stages_of(hf, alone)[0])
    padding = (padded_vocab_size(hf.vocab_size, 1) - hf.vocab_size) * hf.hidden_size
    biases = hf.moe.num_experts * sum(hf.moe.layers) if hf.moe and hf.moe.expert_bias else 0
    return elements.total() - padding * (1 if hf.tied_embeddings else 2) + biases


def states_of(
    elements: Counter[str],
    layout: ParallelLayout,
    weight_bytes: int,
    distributed_optimizer: bool,
    adam: AdamBytes = FLOAT32_ADAM,
) -> ModelStateMemory:
    """Weights, gradients and optimizer state of a rank with these elements."""
    by_shards: Counter[int] = Counter()
    for kind, number in elements.items():
        by_shards[optimizer_shards(layout, kind == EXPERTS) if distributed_optimizer else 1] += number
    parts: Sequence[ModelStateMemory] = [state_memory(n, weight_bytes, shards, adam) for shards, n in by_shards.items()]
    return sum(parts, ModelStateMemory(0, 0, 0))

"""Memory of activations: what each layer keeps for the backward, and how much of it a pipeline schedule has in flight.

The counting is Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models), section 4, for
decoders with rotary positions, gated MLPs, RMSNorm and no dropout, and attention that keeps no scores. What a layer
keeps depends on its kernels, so there are two inventories:

* `transformer_engine`: norms fused into the linear layer behind them, fused rotary embedding and SwiGLU, flash
  attention, grouped products of experts. Counted from its code, and measured for
  one model on one GPU without recomputation: docs/results/update-h200.md.
* `local`: torch's operations one by one, with `scaled_dot_product_attention`, which keeps what flash attention keeps.
  `drpo bench plan` measures it. The masks of context-parallel pieces are not counted.

Everything is bytes on one rank. T: tokens of a micro-batch on one context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from drpo_megatron.models.hf_config import HFModelConfig, padded_vocab_size
from drpo_megatron.plan.parameters import Stage
from drpo_megatron.platform.layout import ParallelLayout

Kernels = Literal["transformer_engine", "local"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class LayerBytes:
    """Bytes a token of T. kept: from forward to backward without recomputation. core: of those, what recomputing the
    core attention does not keep. working: what the layer's backward needs beside what is kept.
    """

    kept: float
    core: float
    working: float


@dataclass(frozen=True)
class ActivationModel:
    """The activations of one model on one rank of one layout. element: bytes of the parameters' dtype."""

    hf: HFModelConfig
    layout: ParallelLayout
    element: int
    kernels: Kernels

    @cached_property
    def hidden(self) -> float:
        """Bytes a token of one hidden state, of which sequence parallelism leaves each rank its slice."""
        return self.element * self.hf.hidden_size / self._slices

    @cached_property
    def dense_layer(self) -> LayerBytes:
        return self._layer(is_moe=False)

    @cached_property
    def moe_layer(self) -> LayerBytes:
        return self._layer(is_moe=True)

    def chunk_kept(self, layers: Sequence[int], recompute: Recompute, *, last: bool) -> float:
        """Bytes a token that a model chunk keeps for one micro-batch in flight."""
        kept = 0.0
        for layer in layers:
            one = self._of(layer)
            kept += {"none": one.kept, "selective": one.kept - one.core, "full": self.hidden}[recompute]
        # The chunk's result: sent to the next stage and held for the schedule, or normed and handed to the loss.
        return kept + (self._norm(self.hf.hidden_size, self._slices) if last else self.hidden)

    def backward_working(self, layer: int, recompute: Recompute) -> float:
        """Bytes a token beside what is kept, while the backward of `layer` runs."""
        one = self._of(layer)
        # Recomputed from its input, which is kept already.
        return one.working + (one.kept - self._input_kept if recompute == "full" else 0.0)

    def _of(self, layer: int) -> LayerBytes:
        return self.moe_layer if self.hf.is_moe_layer(layer) else self.dense_layer

    @property
    def _local(self) -> bool:
        return self.kernels == "local"

    @property
    def _slices(self) -> int:
        return self.layout.tensor if self.layout.sequence_parallel else 1

    @property
    def _input_kept(self) -> float:
        """A layer keeps its input, but for torch's norm in half precision, which keeps a float32 copy instead."""
        return 0.0 if self._local and self.element < 4 else self.hidden

    def _norm(self, width: int, slices: int) -> float:
        """A norm and its result, which the linear layer behind it keeps."""
        if self._local:
            # In float32: the input, and the input over its root mean square.
            return (4 + 4 + self.element) * width / slices
        return 2 * self.element * width / slices

    def _attention(self) -> tuple[float, float]:
        """(kept, and of that the core attention's own) with the norm before it."""
        hf, b, tp = self.hf, self.element, self.layout.tensor
        heads, kv_heads = hf.num_heads // tp, hf.num_kv_heads // tp
        kept = self._norm(hf.hidden_size, self._slices)
        core = 4.0 * heads  # log-sum-exp
        if hf.mla is None:
            query, key = heads * hf.head_dim, kv_heads * hf.head_dim
            value = out = query
            # The projections' result stays for the values, which are a part of it, and rotated queries and keys.
            kept += b * (query + 2 * key) + b * (query + key)
            rotary = hf.head_dim
            if hf.qk_norm and self._local:
                kept += 8 * query + (8 if b < 4 else 4) * key + 4 * (heads + kv_heads)
            elif hf.qk_norm:
                kept += b * query
            gathered = 2 * key
        else:
            mla = hf.mla
            kept += self._norm(mla.q_lora_rank or 0, self._slices) + self._norm(mla.kv_lora_rank, self._slices)
            kept += b * mla.qk_rope_head_dim / self._slices
            query, value = heads * mla.qk_head_dim, heads * mla.v_head_dim
            # torch's attention wants values as wide as keys, and pads them; else they are a part of the projection.
            kept += b * 3 * query if self._local else b * (2 * query + value + heads * mla.qk_nope_head_dim)
            out = query if self._local else value
            rotary, gathered = mla.qk_rope_head_dim, 2 * query
        if self._local:
            # Cosine and sine for queries and keys, and the result of each sequence beside all of them in one.
            kept += 4 * b * rotary
            core += b * out
            if self.layout.context > 1:
                core += b * self.layout.context * gathered
        return kept + core + b * value, core

    def _layer(self, *, is_moe: bool) -> LayerBytes:
        hf, b, tp, slices = self.hf, self.element, self.layout.tensor, self._slices
        attention, core = self._attention()
        kept = attention + self._norm(hf.hidden_size, slices)
        # Gate and up, and what the down projection takes; torch also keeps silu(gate), up + 0, and their product.
        kept_widths = 5 if self._local else 3
        gathered = 2 * b * hf.hidden_size if slices > 1 else 0.0
        if not is_moe or hf.moe is None:
            width = b * hf.ffn_hidden_size / tp
            kept += kept_widths * width
            # Behind the down projection two widths of gradients are new; behind gate and up all of the MLP is free.
            working = self.hidden + max(2 * width, gathered + (2 - kept_widths) * width)
            return LayerBytes(kept, core, working)
        moe = hf.moe
        routed = moe.top_k * self.layout.expert_tensor / slices  # rows of experts a token, when they are balanced
        row = b * hf.hidden_size
        width = b * moe.ffn_hidden_size / self.layout.expert_tensor
        shared = b * moe.shared_ffn_hidden_size / tp
        # The product times the router's weight is one more width in torch.
        kept += routed * (row + (kept_widths + self._local) * width) + kept_widths * shared
        scores = 8 if moe.score_function == "sigmoid" else 4
        kept += (moe.num_experts * (scores + 8) + 24 * moe.top_k) / slices
        # Gradients of the experts' results and of their inputs, which torch makes once by expert and once together.
        working = self.hidden + (2 * routed * row if self._local else routed * (row + 2 * width))
        return LayerBytes(kept, core, working)


@dataclass(frozen=True)
class LossBytes:
    """Memory of the loss on the last stage, in bytes. logits: in flight. gradient: of the hidden states, and their
    copy. placeholder: what autograd is handed for the weight's gradient, which is in `main_grad`.
    """

    logits: float
    gradient: float
    placeholder: float


def loss_bytes(
    hf: HFModelConfig, layout: ParallelLayout, element: int, tokens: float, budget: int, backend: str
) -> LossBytes:
    """tokens: those of a micro-batch that are trained. budget: `algorithm.projection.memory_budget`."""
    columns = padded_vocab_size(hf.vocab_size, layout.tensor) // layout.tensor
    whole = tokens * columns * element
    # The dense backend has logits, their float32 copy with its soft-max, and the gradient.
    logits = whole + 3 * tokens * columns * 4 if backend == "dense" else min(float(budget), whole)
    tied_on_one_stage = hf.tied_embeddings and layout.pipeline == 1
    return LossBytes(
        logits=logits,
        gradient=2 * tokens * hf.hidden_size * element,
        placeholder=0 if tied_on_one_stage else columns * hf.hidden_size * element,
    )


def schedule_of(stage: Stage, layout: ParallelLayout, micro_batches: int) -> Iterator[tuple[bool, int]]:
    """(is it a forward, chunk) in the order in which Megatron-Core runs them on `stage`: 1F1B, interleaved or not."""
    stages, chunks = layout.pipeline, len(stage.chunks)
    total = micro_batches * chunks
    later = stages - stage.index - 1
    warm_up = min(total, later if chunks == 1 else 2 * later + (chunks - 1) * stages)
    # Rounds of `stages` micro-batches through each chunk in turn; the backward takes the chunks from the last one.
    order = [i // stages % chunks for i in range(total)]
    yield from ((True, order[i]) for i in range(warm_up))
    for i in range(warm_up, total):
        yield True, order[i]
        yield False, chunks - 1 - order[i - warm_up]
    yield from ((False, chunks - 1 - order[i]) for i in range(total - warm_up, total))


@dataclass(frozen=True)
class StagePeak:
    """Bytes at the fullest moment of a stage's forwards and backwards, by what holds them."""

    activations: float
    loss: float

    @property
    def total(self) -> float:
        return self.activations + self.loss


def stage_peak(
    model: ActivationModel, stage: Stage, recompute: Recompute, tokens: float, loss: LossBytes, micro_batches: int
) -> StagePeak:
    """The fullest moment of `stage`: kept activations of what is in flight, and what the running operation needs.

    tokens: T. micro_batches: of an update, the same on all ranks.
    """
    hf, layout = model.hf, model.layout
    final = len(stage.chunks) - 1
    kept = [
        tokens * model.chunk_kept(layers, recompute, last=stage.last and chunk == final)
        for chunk, layers in enumerate(stage.chunks)
    ]
    working = [tokens * max(model.backward_working(i, recompute) for i in layers) for layers in stage.chunks]
    embedding = 0.0
    if stage.first:
        embedding = padded_vocab_size(hf.vocab_size, layout.tensor) // layout.tensor * hf.hidden_size * model.element
    held, fullest = 0.0, StagePeak(0.0, 0.0)
    # The schedule repeats itself: later micro-batches hold no more.
    for forward, chunk in schedule_of(stage, layout, min(micro_batches, 2 * layout.pipeline)):
        moments = []
        if forward:
            held += kept[chunk]
            if stage.last and chunk == final:
                moments.append(StagePeak(held, loss.logits + loss.gradient))
                moments.append(StagePeak(held, loss.placeholder + loss.gradient))
        else:
            handed = loss.gradient / 2 if stage.last and chunk == final else 0.0
            moments.append(StagePeak(held + working[chunk], handed))
            held -= kept[chunk]
            if stage.first and chunk == 0:
                # The gradient of the whole embedding is made before it is added to the others.
                moments.append(StagePeak(held + embedding, 0.0))
        fullest = max(fullest, *moments, key=lambda moment: moment.total) if moments else fullest
    return fullest

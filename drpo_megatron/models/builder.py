"""Builds the policy: Megatron-Core GPTModel chunks from a Hugging Face configuration and a parallel layout.

The last stage returns hidden states, not logits: the projection to the vocabulary belongs to the loss operation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, layers
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from drpo_megatron import platform
from drpo_megatron.config.schema import Fp8Config
from drpo_megatron.fp8.emulation import emulate
from drpo_megatron.fp8.recipes import is_emulated, transformer_engine_arguments
from drpo_megatron.models.hf_config import HFModelConfig, check_layout, padded_vocab_size
from drpo_megatron.models.mla_arguments import has_rope_kernel, mla_arguments
from drpo_megatron.models.packs import positioned_seq_params, prefix_packed_seq_params, rotate_by_position
from drpo_megatron.models.rope import inverse_frequencies
from drpo_megatron.models.routing import MicroBatchRouting, RoutedSeqParams, RouterTraining, bind_routers
from drpo_megatron.models.shared_prefixes import SharedPrefixes
from drpo_megatron.models.specs import SpecBackend, block_spec
from drpo_megatron.platform.layout import ParallelLayout

# Every GPTModel logs that HybridModel will follow it. The model is built in this module only, so this is where to move.
logging.getLogger(GPTModel.__module__).setLevel(logging.ERROR)

Recompute = Literal["none", "selective", "full"]


class HiddenStateOutput(ColumnParallelLinear):
    """The output layer without its matrix product: it owns the weight and hands the hidden states on.

    It stays a module that is called in the forward, because the distributed optimizer's parameter all-gather waits in
    the forward hook of the module that owns a parameter.
    """

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        return input_, None


def embedding_scale(hidden_size: int, dtype: torch.dtype) -> float:
    """√hidden_size as transformers multiplies by it: rounded to `dtype`, the parameters'."""
    return torch.tensor(hidden_size**0.5, dtype=dtype).item()


class ScaledEmbedding(LanguageModelEmbedding):
    """An embedding times √hidden. The output projection that is tied to it is not scaled."""

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, tokentype_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        scale = embedding_scale(self.config.hidden_size, self.word_embeddings.weight.dtype)
        return super().forward(input_ids, position_ids, tokentype_ids) * scale


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its approximation with tanh."""
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh}


def transformer_config(
    hf: HFModelConfig,
    layout: ParallelLayout,
    *,
    params_dtype: torch.dtype,
    recompute: Recompute,
    spec_backend: SpecBackend,
    deterministic: bool = False,
    accumulate_gradients: bool = False,
    router: RouterTraining | None = None,
    fp8: Fp8Config | None = None,
) -> TransformerConfig:
    """Megatron-Core's configuration of `hf` under `layout`. Every architecture number comes from `hf`."""
    fused = spec_backend == "transformer_engine"
    full: dict[str, Any] = {"recompute_method": "uniform", "recompute_num_layers": 1} if recompute == "full" else {}
    return (MLATransformerConfig if hf.mla else TransformerConfig)(
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_hidden_size,
        num_attention_heads=hf.num_heads,
        num_query_groups=hf.num_kv_heads,
        kv_channels=hf.head_dim,
        layernorm_epsilon=hf.rms_norm_eps,
        # The norms of the latents have the same switch as those of query and key heads.
        qk_layernorm=hf.qk_norm or hf.mla is not None,
        add_qkv_bias=hf.qkv_bias,
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        layernorm_zero_centered_gamma=hf.zero_centered_norms,
        activation_func=_ACTIVATIONS[hf.activation],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.sequence_parallel,
        transformer_impl=spec_backend,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype is torch.bfloat16,
        deterministic_mode=deterministic,
        recompute_granularity=None if recompute == "none" else recompute,
        **full,
        **_moe_arguments(hf, layout, router or RouterTraining(), fused),
        **mla_arguments(hf),
        **transformer_engine_arguments(fp8 or Fp8Config()),
        # The loss returns (sum, tokens): the schedule divides by the global count and not by the micro-batches.
        calculate_per_token_loss=True,
        # With two stages the interleaved schedule sends activations and gradients to the same rank. One batch of
        # operations would match them by their order, which is not the same on both sides.
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        batch_p2p_comm=layout.virtual_pipeline is None,
        # Packs are padded to one length, so stages need not exchange shapes.
        variable_seq_lengths=False,
        # Weights come from the Hugging Face directory; drawing random ones first would be thrown away.
        perform_initialization=False,
        # Megatron-Core's output layer refuses this fusion without apex's extension, also where it never multiplies; for
        # Transformer Engine's layers see `_add_weight_gradients_in_place`.
        gradient_accumulation_fusion=accumulate_gradients and layers._grad_accum_fusion_available,
        # These fusions are Transformer Engine, apex or torch.compile kernels.
        bias_activation_fusion=fused and hf.activation == "silu",
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused and (hf.mla is None or has_rope_kernel(hf.mla, hf.rope)),
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _moe_arguments(hf: HFModelConfig, layout: ParallelLayout, router: RouterTraining, fused: bool) -> dict[str, Any]:
    moe = hf.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(is_moe) for is_moe in moe.layers],
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.score_function,
        # Softmax over the chosen experts is softmax over all of them, normalized over the chosen.
        "moe_router_pre_softmax": moe.score_function == "softmax" and not moe.normalize,
        "moe_router_topk_scaling_factor": None if moe.scaling_factor == 1 else moe.scaling_factor,
        "moe_router_num_groups": moe.num_groups,
        "moe_router_group_topk": moe.topk_groups,
        # Rounded logits would change which experts are chosen.
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": router.bias_update_rate,
        "moe_router_load_balancing_type": "aux_loss" if router.aux_loss else "none",
        "moe_aux_loss_coeff": router.aux_loss,
        "moe_z_loss_coeff": router.z_loss or None,
        "moe_token_dispatcher_type": layout.moe_dispatcher,
        # Transformer Engine's kernels.
        "moe_grouped_gemm": fused,
        "moe_permute_fusion": fused,
    }


def build_model(
    hf: HFModelConfig,
    layout: ParallelLayout,
    *,
    params_dtype: torch.dtype,
    recompute: Recompute = "none",
    spec_backend: SpecBackend,
    router: RouterTraining | None = None,
    device: torch.device | None = None,
    deterministic: bool = False,
    accumulate_gradients: bool = False,
    fp8: Fp8Config | None = None,
) -> list[GPTModel]:
    """This rank's model chunks: one, or `virtual_pipeline` of them. Process groups of `layout` must exist.

    Matrices are uninitialised until `weights.importer.load_hf` fills them. `recompute`: "none" keeps activations,
    "selective" recomputes the core attention, "full" each layer. `router`: None trains routers by the policy's loss
    alone. `device`: None is this process's; inside `models.meta.rank_on_meta` it must be the meta device.
    `deterministic`: Transformer Engine refuses kernels that are not; it goes with `platform.determinism.enable`.
    `accumulate_gradients`: linear layers add their weight's gradient to its `main_grad`, where a kernel for it exists;
    only for a model that `training.optimizer.wrap_data_parallel` then wraps. `fp8`: the linear layers' products are in
    FP8 with its recipe; its emulation needs the local specs. Raises ValueError when the model does not divide over the
    layout.
    """
    check_layout(hf, layout)
    config = transformer_config(
        hf,
        layout,
        params_dtype=params_dtype,
        recompute=recompute,
        spec_backend=spec_backend,
        deterministic=deterministic,
        accumulate_gradients=accumulate_gradients,
        router=router,
        fp8=fp8,
    )
    virtual_stages = [None] if layout.virtual_pipeline is None else list(range(layout.virtual_pipeline))
    device = device or platform.device()
    chunks = [_build_chunk(hf, layout, config, spec_backend, vp_stage, device) for vp_stage in virtual_stages]
    if accumulate_gradients and spec_backend == "transformer_engine":
        for chunk in chunks:
            _add_weight_gradients_in_place(chunk)
    if fp8 is not None and is_emulated(fp8):
        for chunk in chunks:
            emulate(chunk, fp8)
    return chunks


def _build_chunk(
    hf: HFModelConfig,
    layout: ParallelLayout,
    config: TransformerConfig,
    spec_backend: SpecBackend,
    vp_stage: int | None,
    device: torch.device,
) -> GPTModel:
    model = GPTModel(
        config,
        block_spec(config, spec_backend, vp_stage=vp_stage),
        vocab_size=padded_vocab_size(hf.vocab_size, layout.tensor),
        max_sequence_length=hf.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=hf.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=hf.rope.theta,
        vp_stage=vp_stage,
    )
    model.to(device)
    if hf.mla is None:
        # Multi-latent attention layers have their own.
        model.rotary_pos_emb.inv_freq = inverse_frequencies(hf).to(device)
    rotate_by_position(model)
    if hf.scaled_embeddings and model.pre_process:
        if type(model.embedding) is not LanguageModelEmbedding:
            raise TypeError(f"the embedding is a {type(model.embedding).__name__}, not a LanguageModelEmbedding")
        model.embedding.__class__ = ScaledEmbedding
    if model.post_process:
        if type(model.output_layer) is not ColumnParallelLinear:
            raise TypeError(f"the output layer is a {type(model.output_layer).__name__}, not a ColumnParallelLinear")
        # Only the forward differs: parameter, its attributes and the tie to the embedding stay as GPTModel made them.
        model.output_layer.__class__ = HiddenStateOutput
    bind_routers(model, config)
    return model


def _add_weight_gradients_in_place(model: GPTModel) -> None:
    """Let Transformer Engine's products add to `main_grad`, with its own kernels. Megatron-Core has one setting for
    these layers and for its own, which need apex.

    Each weight must be used once in a forward: of the first micro-batch in FP8 the gradient is written and not added.
    """
    layers: Iterable[Any] = model.modules()
    for module in layers:
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DistributedDataParallel and similar wrappers, or `model` itself."""
    inner: Any = model
    while not isinstance(inner, GPTModel):
        inner = inner.module
    return inner


def forward_packed(
    model: torch.nn.Module,
    tokens_T: torch.Tensor,
    position_ids_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    prefixes: SharedPrefixes | None = None,
    routing: MicroBatchRouting | None = None,
) -> torch.Tensor:
    """Run one model chunk, wrapped or not, on packed sequences.

    tokens_T, position_ids_T: int64 [T]. cu_seqlens: int32 [S + 1], from 0 to T, padding counted as a sequence of its
    own. max_seqlen: at least the longest of them. Rotary positions restart with each sequence of cu_seqlens. Under
    sequence parallelism T must divide by the tensor-parallel size. Under context parallelism the tokens are this
    rank's T of the pack's cp·T (`models.context_attention`); cu_seqlens and max_seqlen are the whole pack's. With
    Transformer Engine that was not run: it takes two GPUs. prefixes: the sequences are segments that may continue one
    another; rotary positions are then position_ids_T, and cu_seqlens and max_seqlen are not read. routing: what the
    routers of a mixture of experts follow; None leaves the choice to them.

    Returns, in the parameters' dtype, on the last stage the hidden states after the final norm [1, T, H]
    (sequence parallel: [1, T / tp, H], this rank's slice of the tokens), on earlier stages [T, 1, H] ([T / tp, 1, H])
    for the next stage. Without sequence parallelism hidden states are equal on all tensor-parallel ranks, and their
    gradient must be summed over these ranks by the operation that projects them.
    """
    if prefixes is not None:
        return _forward(model, tokens_T, position_ids_T, prefix_packed_seq_params(prefixes, position_ids_T, routing))
    config = unwrap(model).config
    context = config.context_parallel_size
    if context == 1 and config.transformer_impl == "local":
        packed: RoutedSeqParams = positioned_seq_params(cu_seqlens, max_seqlen, tokens_T.numel(), routing)
        return _forward(model, tokens_T, position_ids_T, packed)
    if cu_seqlens.numel() > 2 and max_seqlen == context * tokens_T.numel():
        # Megatron-Core's unfused rotary embedding takes a frequency table of T rows for one with a row a packed token.
        # Positions would then count through the pack, and the float32 angles lose digits as they grow. One row more
        # makes it a table by position again.
        max_seqlen += 1
    # Transformer Engine cuts the padded sequences into the ranks' chunks. Padding belongs to its sequence, at the end,
    # where causal attention leaves it unseen: both kinds of bounds are the same, and nothing lies between sequences.
    padded: dict[str, Any] = {}
    if context > 1:
        padded = {"cu_seqlens_q_padded": cu_seqlens, "cu_seqlens_kv_padded": cu_seqlens, "pad_between_seqs": False}
    packed = RoutedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        routing=routing,
        **padded,
    )
    return _forward(model, tokens_T, position_ids_T, packed)


def _forward(
    model: torch.nn.Module, tokens_T: torch.Tensor, position_ids_T: torch.Tensor, packed: RoutedSeqParams
) -> torch.Tensor:
    hidden: torch.Tensor = model(
        input_ids=tokens_T[None], position_ids=position_ids_T[None], attention_mask=None, packed_seq_params=packed
    )
    return hidden


def output_weight(model: torch.nn.Module) -> torch.nn.Parameter | None:
    """This rank's rows of the output projection, [padded vocabulary / tp, H]; None where the chunk is not the last.

    With tied embeddings it is the embedding's own parameter (one stage) or its copy on the last stage. Rows from
    `vocab_size` on, counted over the ranks, are padding.
    """
    gpt = unwrap(model)
    if not gpt.post_process:
        return None
    return (
        gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else gpt.output_layer.weight
    )


@torch.no_grad()
def logits(model: torch.nn.Module, hf: HFModelConfig, hidden_1TH: torch.Tensor) -> torch.Tensor:
    """Full logits [T, vocab_size] from `forward_packed`'s result on the last stage, on every tensor-parallel rank.

    For tests and evaluation: it gathers the whole vocabulary. Collective over the tensor-parallel group.
    """
    gpt = unwrap(model)
    group = parallel_state.get_tensor_model_parallel_group()
    hidden_TH = hidden_1TH.squeeze(0)
    if gpt.config.sequence_parallel:
        hidden_TH = gather_from_sequence_parallel_region(hidden_TH, group=group)
    weight_VH = output_weight(gpt)
    assert weight_VH is not None, "only the last stage has logits"
    local_TV = F.linear(hidden_TH, weight_VH)
    shards = [torch.empty_like(local_TV) for _ in range(group.size())]
    dist.all_gather(shards, local_TV.contiguous(), group=group)
    return torch.cat(shards, dim=-1)[:, : hf.vocab_size]

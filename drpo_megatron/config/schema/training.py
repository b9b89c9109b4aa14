"""The update: loss, layout, optimizer, loop, FP8."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from drpo_megatron.config.schema.section import Section


class ProjectionConfig(Section):
    backend: Literal["fused", "dense"] = "fused"
    """How hidden states become the loss: one operation that never holds [tokens, vocabulary], or autograd over whole
    logits, the reference."""
    memory_budget_mb: int = Field(256, gt=0)
    """Memory for the logits in flight on one rank, in MiB; it decides how many tokens are a chunk. On a GPU as much
    again in the first update, in which kernels are tuned. Fused only."""
    tail_tolerance: float = Field(0.0, ge=0, lt=1)
    """Leave columns with almost no gradient out of the backward products, as long as a bound on the relative error of
    both gradients stays below this. The error is several times smaller than the bound. 0: exact. Fused only."""

    @property
    def memory_budget(self) -> int:
        """In bytes."""
        return self.memory_budget_mb * 2**20


class AlgorithmConfig(Section):
    loss: str = "drpo"
    """A loss of algorithms/losses.py, or `module:function` for one of your own (docs/extending.md)."""
    loss_args: dict[str, Any] = Field(default_factory=dict)
    """Its parameters, for example {delta: 12.5}. drpo's delta has no default: state it."""
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"] = "seq_mean_token_sum_norm"
    """How token losses become one number; denominators are of the global batch."""
    horizon: int | None = Field(None, gt=0)
    """Divisor of seq_mean_token_sum_norm. null: rollout.sampling.max_new_tokens."""
    advantage: Literal["mean", "mean_std", "leave_one_out", "reinforce_pp_baseline"] = "mean"
    """Advantage inside a group. `mean` (reward − group mean) is the paper's."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    projection: ProjectionConfig = Field(default_factory=lambda: ProjectionConfig())


class ParallelConfig(Section):
    tensor: int = Field(1, gt=0)
    """Tensor-parallel size (TP)."""
    pipeline: int = Field(1, gt=0)
    """Pipeline-parallel size (PP)."""
    virtual_pipeline: int | None = Field(None, gt=1)
    """Model chunks a pipeline stage (interleaved schedule)."""
    first_stage_layers: int | None = Field(None, gt=0)
    """Layers of the first pipeline stage, which also holds the embedding. null: as many as the other stages."""
    last_stage_layers: int | None = Field(None, gt=0)
    """Layers of the last pipeline stage, which also holds the output projection. null: as many as the other stages."""
    context: int = Field(1, gt=0)
    """Context-parallel size (CP): ranks that share every sequence, which is padded to a multiple of twice this size."""
    expert: int = Field(1, gt=0)
    """Expert-parallel size (EP)."""
    expert_tensor: int = Field(1, gt=0)
    """Tensor-parallel size of an expert (ETP)."""
    moe_dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts: each to the ranks it needs, or all to every rank (few experts, small EP)."""
    data: int = Field(1, gt=0)
    """Data-parallel size (DP). Ranks in all: tensor × pipeline × context × data."""
    sequence_parallel: bool = False
    """Megatron's sequence parallelism; needs tensor > 1."""


class OptimizerConfig(Section):
    lr: float = Field(gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Linear warm-up, in optimizer updates."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decays."""
    eps: float = Field(1e-08, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    clip_grad: float = Field(1.0, ge=0)
    """Clip the global gradient norm to this. 0: no clipping."""
    distributed: bool = True
    """Shard the optimizer state over data parallel ranks."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of Adam's moments. bfloat16 needs Transformer Engine's Adam (a GPU), `distributed` and bfloat16 weights; it
    computes in float32, and keeps of a main weight only the 16 bits that its bfloat16 weight lacks."""
    overlap_grad_reduce: bool = True
    """Reduce the gradients of a bucket over data-parallel ranks while the backward goes on. False: all of them after
    it."""
    overlap_param_gather: bool = False
    """Gather the updated parameters of a bucket while the next update's forward runs up to it; needs `distributed`. It
    saves time only between the updates of one batch, because a sync needs whole weights."""
    bucket_parameters: int | None = Field(None, gt=0)
    """Parameters in a bucket of the overlapped communication. null: Megatron-Core's 40 million, or 1 million a
    data-parallel rank if that is more."""


class TrainingConfig(Section):
    steps: int = Field(gt=0)
    """Steps of the main loop: one rollout batch each."""
    updates_per_batch: int = Field(1, gt=0)
    """Optimizer updates on each rollout batch, on disjoint parts of its groups."""
    tokens_per_micro_batch: int = Field(8192, gt=0)
    """Token budget of a packed micro-batch on one data-parallel rank, its context-parallel ranks together. A longer
    sequence is alone."""
    shared_prefix: Literal["auto", "always", "never"] = "auto"
    """Compute the prompt of a group once a micro-batch, and let all its responses attend to it. auto: in updates where
    that saves a rank 10 % of its positions or more. auto packs plainly with context parallelism, which always refuses,
    and with Transformer Engine, where always uses FlexAttention."""
    threads: int = Field(1, gt=0)
    """CPU threads of a training rank, where it runs on CPU."""
    deterministic: bool = False
    """The same seed gives the same bits, also over a stop and `--resume`: deterministic kernels and collectives, and
    each sample has a seed of its own in servers whose kernels do not depend on the batch (SGLang's
    enable_deterministic_inference; without a GPU they take one request at a time). Slower. Not with the asynchronous
    schedule, whose weights change at no fixed moment."""
    max_skipped_updates: int = Field(3, gt=0)
    """Stop with a report after this many updates in a row with a non-finite gradient norm."""
    profile_steps: list[int] = Field(default_factory=list)
    """Steps, counted from 0, of which every rank writes a trace of each verb and a summary to profile/ of the run."""
    verb_timeout_s: float | None = Field(3600.0, gt=0, le=86400)
    """Limit of each verb of the main loop (generate, train, sync, …) and of what stands between two. Behind it the run
    has stalled: every rank writes its stacks and rank 0 the state of the rollout servers, and `drpo train` ends with
    code 75. Longer than the slowest step's slowest verb, with the restart of a server. null: no limit."""
    timeout_s: float = Field(7200.0, gt=0)
    """Limit of a collective; a rank that waits longer ends the job with an error. Above verb_timeout_s, which also says
    what the other ranks were doing."""
    export: bool = True
    """Write the trained model as a Hugging Face directory (`hf/` of the run) at the end."""


class Fp8Config(Section):
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    """Train the linear layers of attention, MLPs and experts in FP8: inputs, weights and gradients of their outputs are
    quantized for all three matrix products. delayed: one scale a tensor, from the history of its largest values.
    tensorwise: one scale a tensor, from the tensor itself. blockwise: 1 × 128 for inputs and gradients, 128 × 128 for
    weights. mxfp8: 1 × 32, scales are powers of two. null: in the model's dtype. Embeddings, the output projection,
    norms, routers and the attention itself are never quantized."""
    backend: Literal["transformer_engine", "emulate"] = "transformer_engine"
    """transformer_engine: on the tensor cores of a GPU. emulate: the same numbers, quantized and dequantized around
    products in float32, on any device; slow, for studies."""
    format: Literal["hybrid", "e4m3"] | None = None
    """hybrid: e4m3 for inputs and weights, e5m2 for gradients. null: hybrid for delayed and tensorwise, e4m3 for
    blockwise and mxfp8."""
    unquantized_first_layers: int = Field(0, ge=0)
    """Layers at the start of the model that stay in its dtype, in training and in rollouts."""
    unquantized_last_layers: int = Field(0, ge=0)
    """Layers at its end that do."""
    margin: int = Field(0, ge=0)
    """delayed: scales are 2^margin times coarser than the largest value asks for."""
    amax_history: int = Field(1024, gt=0)
    """delayed: micro-batches whose largest values a scale comes from."""
    amax_algorithm: Literal["max", "most_recent"] = "max"
    """delayed: the largest or the newest value of the history."""
    block_scales: Literal["power_of_two", "float32"] = "power_of_two"
    """blockwise: power_of_two is Transformer Engine's default. float32 is what rollout servers compute with: the same
    weights then have the same FP8 numbers on both sides."""
    parameters: bool = False
    """Keep the quantized layers' parameters in FP8 and gather them so; main weights stay in float32. Transformer Engine
    only."""
    rollout: bool = False
    """Rollout servers compute in FP8: weights with one scale for each 128 × 128 block, quantized in the sync, inputs of
    linear layers with one for each 1 × 128. Without a GPU (backend emulate) the server gets the dequantized weights and
    rounds the inputs of its products the same way."""
    health_every: int | None = Field(None, gt=0)
    """Steps from one look at the numbers to the next: largest value, saturated and underflowed share of each quantized
    tensor go to fp8.jsonl of the run, with the cosine between the gradient in FP8 and the one without. null: never."""

    @property
    def number_format(self) -> Literal["hybrid", "e4m3"]:
        """`format`, with its default."""
        return self.format or ("hybrid" if self.recipe in ("delayed", "tensorwise") else "e4m3")

    def quantized_layers(self, num_layers: int) -> range:
        """The layers of a model that are quantized, counted from 0 over the whole model."""
        return range(self.unquantized_first_layers, num_layers - self.unquantized_last_layers)

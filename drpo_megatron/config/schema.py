"""The configuration of a run, typed. The help text of a setting is the string under it; an unknown key is an error.

Sections follow the verbs of the main loop: model, data, reward, rollout, algorithm, parallel, training, fp8, sync,
save, evaluation, tracking.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from drpo_megatron.platform.layout import ParallelLayout


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _is_usable(cls, value: Any) -> Any:
        if isinstance(value, Path) and (len(str(value)) > 1000 or any(len(os.fsencode(p)) > 255 for p in value.parts)):
            raise ValueError("must be a path that file systems take: 255 bytes a name")
        return value


class ModelConfig(Section):
    path: Path
    """Hugging Face directory: config.json, safetensors and tokenizer. The truth about the model."""
    recipe: str | None = None
    """How to make `path` when it does not exist: a name from models/recipes.py (tiny_qwen3,
    tiny_qwen3_blocks, tiny_qwen3_moe, smollm2_135m)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter dtype of the trainer and the server. Main weights and log-probs are float32 either way."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward: nothing, the core attention, or whole layers."""
    routing_replay: bool | None = None
    """Mixture of experts: train each token with the experts that the rollout engine sent it to. The engines round
    differently, a near tie then takes another expert, and the log-prob jumps though the policy did not change. null:
    true for a mixture of experts. false: the trainer's routers choose, and are still compared."""
    moe_aux_loss_coefficient: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss of every layer, a mean over micro-batches by their tokens; 1 is balanced."""
    moe_z_loss_coefficient: float = Field(0.0, ge=0)
    """Weight of the mean squared log-sum-exp of router logits, for every layer."""
    moe_bias_update_rate: float = Field(0.0, ge=0)
    """Step of the router's bias of each expert after an update, towards equal loads. Models with such a bias only."""


class ReasoningGymData(Section):
    type: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    """Name of a reasoning-gym task, for example `basic_arithmetic`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the task's own configuration."""
    size: int = Field(10000, gt=0)
    """Number of problems that are generated (lazily)."""
    seed: int = 1
    """Seed of the problems; evaluation data takes another one."""


class FileData(Section):
    type: Literal["jsonl", "parquet"]
    """Format of the file."""
    path: Path
    """One row a prompt."""
    layout: Literal["keys", "auto", "gsm8k", "math", "aime", "dapo"] = "keys"
    """Where a row has its prompt and answer. keys: under `prompt_key` and `answer_key`. gsm8k, math, aime, dapo: as the
    files of these data sets have them (data/layouts.py). auto: the one of all these that the first row fits; more than
    one, or none, is an error that names them."""
    prompt_key: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages."""
    answer_key: str | None = "answer"
    """Column with the reference answer, given to the verifier; dots reach into nested ones. null for none."""


class FunctionData(Section):
    type: Literal["function"] = "function"
    function: str
    """`module:function`, called as f(index, seed) -> {'prompt', 'answer', 'metadata'}."""
    size: int = Field(10000, gt=0)
    """Number of problems."""
    seed: int = 1
    """Handed to the function."""


class DataConfig(Section):
    source: ReasoningGymData | FileData | FunctionData = Field(discriminator="type")
    """Where the prompts come from."""
    system_prompt: str | None = None
    """Put in front of every prompt as the system message."""
    prompt_template: str = "{prompt}"
    """Text around the prompt; `{prompt}` is replaced."""
    chat_template: bool = True
    """Apply the tokenizer's chat template. False: the text is tokenized as it is."""
    max_prompt_tokens: int = Field(1024, gt=0)
    """A longer prompt is an error before training starts."""
    shuffle: bool = True
    """Shuffle the prompts in every epoch, with the run's seed."""


class RewardConfig(Section):
    type: Literal["reasoning_gym", "math_verify", "function"]
    """The verifier."""
    function: str | None = None
    """For type `function`: `module:function`, called as f(text, answer, metadata) -> float."""
    extract: str | None = None
    """Regular expression; its last match's first group is what reasoning-gym scores. null: the stripped text."""
    timeout_s: float = Field(10.0, gt=0)
    """Seconds for one sample; a later answer is reward 0, counted and logged."""
    workers: int = Field(1, gt=0)
    """Processes that verify."""
    memory_mb: int | None = Field(4096, gt=0)
    """Address space of each of them, in MiB (RLIMIT_AS); a sample that needs more is reward 0, counted and logged.
    math-verify takes 83, reasoning-gym 241, a function that imports torch 3200, one that uses CUDA far more than the
    memory. null: no limit."""


class SamplingConfig(Section):
    temperature: float = Field(1.0, gt=0)
    """Temperature of the rollout. The training log-prob applies the same one."""
    max_new_tokens: int = Field(gt=0)
    """Longest response, in tokens."""
    stop: list[str] = Field(default_factory=list)
    """Strings that end a response besides the end-of-sequence token."""
    ignore_eos: bool = False
    """Go on past the end-of-sequence token: every response has max_new_tokens."""


class EvaluationSampling(SamplingConfig):
    """How answers are sampled that are judged and not trained, so that μ need not be their distribution: the most
    likely tokens alone (temperature 0), or without the tail (top_p).
    """

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)


class ServerConfig(Section):
    count: int = Field(1, gt=0, le=256)
    """Servers on the host of rank 0. With more than one, sglang-router stands in front of them."""
    addresses: list[str] = Field(default_factory=list)
    """Servers that were started elsewhere, as http://HOST:PORT; none is started here then. They must serve `model.path`
    in `model.dtype`, with the `tensor_parallel` and the random_seed of their own, and --weight-version 0."""
    host: str = "127.0.0.1"
    """Address the servers bind to. Another one than loopback needs `api_key_env`."""
    api_key_env: str | None = None
    """Environment variable with the key that every request to a server must carry."""
    port: int | None = Field(None, ge=1, le=65535)
    """Port of the first server; the others take the following ones. null: free ones."""
    tensor_parallel: int = Field(1, gt=0)
    """Tensor-parallel size of each server."""
    threads: int = Field(1, gt=0)
    """CPU threads of a server's model process, where it runs on CPU."""
    devices: list[int] | None = None
    """CUDA devices of the servers, `tensor_parallel` for each. null: the ones behind the trainer's, or with
    rollout.placement colocated the trainer's first ones. Without a GPU it has no effect."""
    start_timeout_s: float = Field(300.0, gt=0)
    """Seconds until a server must answer /health_generate."""
    health_timeout_s: float = Field(30.0, gt=0)
    """Seconds within which a server must generate a token when it is asked to; one that does not do so twice is
    restarted."""
    max_restarts: int = Field(3, ge=0)
    """Restarts of each server that died or hangs, over the whole run. The run goes on with those that are left."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of SGLang by their own names; checked against the installed version."""


class RouterConfig(Section):
    policy: Literal["round_robin", "random", "cache_aware", "power_of_two"] = "round_robin"
    """How sglang-router chooses the server of a request."""


class RolloutConfig(Section):
    prompts_per_step: int = Field(gt=0)
    """Prompts (groups) of a step."""
    samples_per_prompt: int = Field(gt=0)
    """Samples of each prompt: the group of the advantage."""
    sampling: SamplingConfig
    schedule: Literal["synchronous", "one_step_off", "asynchronous"] = "synchronous"
    """When groups are sampled. synchronous: while training waits. one_step_off: a step ahead, while the step before it
    trains; weights change between batches only. asynchronous: all the time, as far ahead as `max_staleness` allows;
    weights change in the middle of a response."""
    max_staleness: int | None = Field(None, ge=0)
    """How old, in weight versions (updates), the oldest token of a batch may be at the batch's first update. null: what
    the schedule needs, 0 or one step's updates; asynchronous must set it."""
    over_sampling: float = Field(1.0, ge=1)
    """Groups that are sampled for a step, over those it takes: it takes the first that are done, the others are aborted
    and go on in the next step, which waits for them, with the tokens they have as far as `max_staleness` allows."""
    dynamic_sampling: bool = False
    """Replace groups whose samples all have the same reward: they have no advantage, and so no gradient."""
    dynamic_sampling_limit: float = Field(4.0, ge=1)
    """Groups sampled for a step in all, over those it takes. Beyond it groups without a signal fill the step."""
    function: str | None = None
    """`module:function` for rollouts of several turns: an async f(prompt, session) -> Trajectory, see rollout/turns.py.
    null: one request for all samples of a prompt."""
    from_dump: Path | None = None
    """Train from the rollouts in this run directory, or its rollouts/, instead of sampling: no server is started and no
    weights are synced. What `drpo train --rollouts` sets."""
    concurrency: int = Field(256, gt=0)
    """Requests in flight at the same time."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Seconds for one request."""
    request_retries: int = Field(6, ge=0)
    """Retries of a request that failed while a server is alive."""
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """Where the servers run: on devices of their own, or on the trainer's, which both then hold in turns.
    colocated: the trainer waits in host memory while the servers generate, and the servers give up their KV cache and
    weights while the trainer trains. It needs the synchronous schedule."""
    server: ServerConfig = Field(default_factory=lambda: ServerConfig())
    router: RouterConfig = Field(default_factory=lambda: RouterConfig())


class ProjectionConfig(Section):
    backend: Literal["fused", "dense"] = "fused"
    """How hidden states become the loss: one operation that never holds [tokens, vocabulary], or autograd over whole
    logits, the reference."""
    memory_budget_mb: int = Field(256, gt=0)
    """Memory for the logits in flight on one rank, in MiB; it decides how many tokens are a chunk. Fused only."""
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
    and with Transformer Engine, where always uses FlexAttention (not run: no GPU)."""
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


class SyncConfig(Section):
    transport: Literal["distributed", "shared_memory", "disk", "delta"] = "distributed"
    """How weights reach the server: NCCL (gloo without a GPU), host memory that both map, files, or files with what
    changed since the last push (delta). For delta, the trainer's rank 0 and each tensor-parallel rank of a server keep
    a copy of all weights in host memory; without a base in common, and where it would take longer, weights go whole. A
    server on another host needs this package installed."""
    directory: Path | None = None
    """Where the disk and delta transports write: a path that the server has too, and for delta may write to. Empty: in
    the run's directory."""
    address: str = "127.0.0.1"
    """Address at which the servers reach the trainer's rank 0, for the distributed transport."""
    bucket_mb: float = Field(512.0, gt=0)
    """Size of a flattened bucket, in MiB."""
    verify_every: int = Field(1, ge=0)
    """Compare checksums with the server, and log-probs of the probe, after every Nth sync. 0: after the first only."""
    probe_tolerance: float | None = Field(None, gt=0)
    """Stop when trainer and server differ by more than this, in nats, in the log-prob of a token of the probe, a fixed
    sequence of random tokens. null: 0.001 for a model in float32, 1 in bfloat16, 5 with fp8.rollout."""
    timeout_s: float = Field(300.0, gt=0)
    """Limit of one sync."""


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


class SaveConfig(Section):
    every: int | None = Field(None, gt=0)
    """Steps from one checkpoint to the next; the last step has one too. null: there are none. With checkpoints, a run
    that is told to stop (SIGUSR1, SIGTERM, Ctrl-C) saves one first and ends with code 75, and `drpo train --resume`
    goes on from the newest that is good, also with another `parallel` section."""
    directory: Path | None = None
    """Where checkpoints lie, for all ranks. null: checkpoints/ of the run's directory."""
    keep: int = Field(2, gt=0)
    """Checkpoints that are kept, the newest."""
    keep_best: int = Field(0, ge=0)
    """Older ones that are kept besides: those with the highest `best_metric` in their step."""
    best_metric: str = "reward/mean"
    """A metric of the step."""
    asynchronous: bool = True
    """Train on while a checkpoint is written; it needs host memory for a copy of weights and optimizer state."""
    deadline_s: float = Field(25.0, gt=0)
    """Seconds for the checkpoint after SIGTERM or Ctrl-C; then the run is ended without it. SLURM kills 30 s after
    SIGTERM. After SIGUSR1 there is no limit."""
    hf_every: int | None = Field(None, gt=0)
    """Steps from one export to the next: the weights as a Hugging Face directory, exports/step_N of the run."""
    resume: bool = False
    """Go on from the newest checkpoint, if there is one. What `drpo train --resume` sets."""


class EvaluationSet(Section):
    source: ReasoningGymData | FileData | FunctionData = Field(discriminator="type")
    """Where its prompts come from; they are taken in order."""
    limit: int | None = Field(None, gt=0)
    """Take the first prompts only. null: all."""
    samples: int | None = Field(None, gt=0)
    """Answers to each prompt. null: evaluation.samples."""
    system_prompt: str | None = None
    """null: data.system_prompt."""
    prompt_template: str | None = None
    """null: data.prompt_template."""
    reward: RewardConfig | None = None
    """The verifier. null: `reward`."""


class EvaluationConfig(Section):
    every: int | None = Field(None, gt=0)
    """Steps from one evaluation of the weights to the next, after the sync; the last step has one too. null: none
    during training. `drpo evaluate` needs `sets` only."""
    samples: int = Field(1, gt=0)
    """Answers to each prompt."""
    ks: list[int] | None = None
    """The k of pass@k and maj@k, each at most the samples. null: 1 and the samples."""
    temperature: float | None = Field(None, ge=0)
    """null: rollout.sampling.temperature. 0: the most likely token each time."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most likely tokens that have this probability together."""
    max_new_tokens: int | None = Field(None, gt=0)
    """Longest answer, in tokens. null: rollout.sampling.max_new_tokens. `stop` and `ignore_eos` are those of
    rollout.sampling."""
    sets: dict[str, EvaluationSet] = Field(default_factory=dict)
    """By name, of letters, digits, _ and -, which the metrics have: evaluation/NAME/…"""


class TrackingConfig(Section):
    directory: Path = Path("runs")
    """The run lives in directory/name."""
    wandb: bool = True
    """Log to wandb; offline when there is no API key."""
    wandb_project: str = "drpo-megatron"
    """Project of the wandb run."""
    tensorboard: bool = True
    """Write TensorBoard events to the run's tb/."""
    samples: int = Field(8, ge=0)
    """Samples of a step that wandb and TensorBoard show, each of another prompt."""
    dump_rollouts: bool = True
    """Write every rollout of a step to rollouts/; `drpo train --rollouts` trains from them."""
    dump_routed_experts: bool = False
    """Write the experts that each token of a mixture of experts took there too: (layers × experts a token) bytes for
    each, twice that with more than 256 experts. Without them a replay needs model.routing_replay = false."""
    progress: bool = True
    """Live display in the terminal; one line a step where there is none."""


class RunConfig(Section):
    name: str = Field(pattern="^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200)
    """Name of the run and of its directory."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initialisation, data order and sampling."""
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    rollout: RolloutConfig
    algorithm: AlgorithmConfig = Field(default_factory=lambda: AlgorithmConfig())
    parallel: ParallelConfig = Field(default_factory=lambda: ParallelConfig())
    optimizer: OptimizerConfig
    training: TrainingConfig
    fp8: Fp8Config = Field(default_factory=lambda: Fp8Config())
    sync: SyncConfig = Field(default_factory=lambda: SyncConfig())
    save: SaveConfig = Field(default_factory=lambda: SaveConfig())
    evaluation: EvaluationConfig = Field(default_factory=lambda: EvaluationConfig())
    tracking: TrackingConfig = Field(default_factory=lambda: TrackingConfig())

    @property
    def layout(self) -> ParallelLayout:
        """Raises ValueError for a combination that Megatron-Core cannot build."""
        return ParallelLayout(**self.parallel.model_dump())

    @property
    def run_directory(self) -> Path:
        return self.tracking.directory / self.name

    @property
    def checkpoint_directory(self) -> Path:
        return self.save.directory or self.run_directory / "checkpoints"

    @property
    def evaluation_sampling(self) -> EvaluationSampling:
        """`evaluation`'s settings, and rollout.sampling's where it has none."""
        training, own = self.rollout.sampling, self.evaluation
        return EvaluationSampling(
            temperature=training.temperature if own.temperature is None else own.temperature,
            top_p=own.top_p,
            max_new_tokens=own.max_new_tokens or training.max_new_tokens,
            stop=training.stop,
            ignore_eos=training.ignore_eos,
        )

    @property
    def horizon(self) -> int:
        return self.algorithm.horizon or self.rollout.sampling.max_new_tokens

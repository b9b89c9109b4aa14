"""Rollouts: sampling, servers, weight sync; and evaluation, which samples too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from drpo_megatron.config.schema.model import FileData, FunctionData, ReasoningGymData, RewardConfig
from drpo_megatron.config.schema.section import Section


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

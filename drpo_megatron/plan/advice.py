"""Whether a plan fits, and the first single change of settings with which it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from drpo_megatron.config.optimizer_checks import moment_problems
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.plan.activations import Kernels
from drpo_megatron.plan.run_plan import Plan, make_plan

Changes = dict[str, Any]
"""Values by dotted key."""


def with_changes(config: RunConfig, changes: Changes) -> RunConfig:
    """Raises pydantic's ValidationError, a ValueError, for a value that the schema refuses."""
    raw = config.model_dump()
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = raw
        for parent in parents:
            section = section[parent]
        section[last] = value
    return RunConfig.model_validate(raw)


def as_overrides(changes: Changes) -> str:
    """As `drpo` takes them on its command line."""
    return " ".join(
        f"{key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"
        for key, value in changes.items()
    )


def verdicts(plan: Plan, hf: HFModelConfig, kernels: Kernels = "transformer_engine") -> list[str]:
    """By how much trainer and servers fit, one sentence each, or what to change."""
    return [_trainer(plan, hf, kernels), _server(plan, hf, kernels)]


def _trainer(plan: Plan, hf: HFModelConfig, kernels: Kernels) -> str:
    memory, needed = plan.device.memory, plan.trainer_bytes
    name = f"the {memory / 1e9:g} GB of {plan.device.name}"
    if plan.trainer_fits:
        return f"the trainer fits: {needed / 1e9:.1f} GB of {name}, {(memory - needed) / 1e9:.1f} GB are left"
    sentence = f"the trainer does not fit: {needed / 1e9:.1f} GB, {(needed - memory) / 1e9:.1f} GB above {name}"
    for changes in _trainer_changes(plan.config):
        try:
            other = make_plan(with_changes(plan.config, changes), hf, plan.device, plan.assumptions, kernels)
        except ValueError:
            continue
        if other.trainer_fits:
            gpus = f" on {other.ranks} ranks" if other.ranks != plan.ranks else ""
            return f"{sentence}; set {as_overrides(changes)}, which takes {other.trainer_bytes / 1e9:.1f} GB{gpus}"
    return f"{sentence}; no single change is enough: `drpo plan CONFIG --search --gpus N` proposes whole layouts"


def _trainer_changes(config: RunConfig) -> Iterator[Changes]:
    """What costs least first: nothing, recomputation, smaller micro-batches, coarser moments, then more ranks."""
    parallel = config.parallel
    optimizer = config.optimizer
    if not optimizer.distributed:
        yield {"optimizer.distributed": True}
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    if config.model.recompute != "full":
        yield {"model.recompute": "full"}
    longest = config.data.max_prompt_tokens + config.rollout.sampling.max_new_tokens
    if config.training.tokens_per_micro_batch > longest:
        yield {"training.tokens_per_micro_batch": longest}
    changes: Changes = {"optimizer.moments_dtype": "bfloat16"}
    if optimizer.moments_dtype == "float32" and not list(moment_problems(with_changes(config, changes))):
        yield changes
    for key in ("data", "expert", "context", "tensor", "pipeline"):
        changes = {f"parallel.{key}": 2 * getattr(parallel, key)}
        if key == "tensor":
            changes["parallel.sequence_parallel"] = True
        if key == "pipeline":
            changes |= {"parallel.first_stage_layers": None, "parallel.last_stage_layers": None}
        yield changes


def _server(plan: Plan, hf: HFModelConfig, kernels: Kernels) -> str:
    server, longest = plan.server, plan.workload.longest
    if plan.server_fits:
        return (
            f"a server fits: {server.weights / 1e9:.1f} GB of weights a rank leave its cache {server.kv_tokens} "
            f"tokens, {server.kv_tokens // longest} of the longest sequences"
        )
    sentence = (
        f"a server does not fit: {server.weights / 1e9:.1f} GB of weights of the {server.available / 1e9:.1f} GB that "
        f"a rank may take leave its cache {server.kv_tokens} tokens, and a sequence may have {longest}"
    )
    ranks = plan.config.rollout.server.tensor_parallel
    while ranks < hf.num_heads and hf.num_heads % (2 * ranks) == 0:
        ranks *= 2
        changes: Changes = {"rollout.server.tensor_parallel": ranks, "rollout.server.devices": None}
        if make_plan(with_changes(plan.config, changes), hf, plan.device, plan.assumptions, kernels).server_fits:
            return f"{sentence}; set rollout.server.tensor_parallel={ranks}"
    return f"{sentence}; take another --device, or a shorter rollout.sampling.max_new_tokens"

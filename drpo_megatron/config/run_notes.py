"""What a user should know about settings that are legal."""

from __future__ import annotations

from collections.abc import Iterator

from drpo_megatron.config.rollout_checks import fp8_notes, placement_notes
from drpo_megatron.config.schema import RunConfig


def notes(config: RunConfig) -> list[str]:
    """What a user should know about legal settings that may not do what they look like. Said once, at the start."""
    return [
        *_boundary_note(config),
        *_budget_note(config),
        *_sharing_note(config),
        *_timeout_note(config),
        *_replay_note(config),
        *placement_notes(config),
        *fp8_notes(config),
        *_determinism_note(config),
    ]


def _budget_note(config: RunConfig) -> Iterator[str]:
    budget = config.training.tokens_per_micro_batch
    longest = config.data.max_prompt_tokens + config.rollout.sampling.max_new_tokens
    if budget < longest:
        yield (
            f"training.tokens_per_micro_batch is {budget}, and a sequence may have data.max_prompt_tokens + "
            f"rollout.sampling.max_new_tokens = {longest} tokens: a longer one is a micro-batch above the budget"
        )


def _sharing_note(config: RunConfig) -> Iterator[str]:
    context = config.layout.context
    if config.training.shared_prefix == "auto" and context > 1:
        yield (
            f"training.shared_prefix is auto and parallel.context is {context}: a prefix is not split over "
            "context-parallel ranks, so every response is computed with its own copy of the prompt"
        )


def _replay_note(config: RunConfig) -> Iterator[str]:
    if config.rollout.from_dump is not None and config.evaluation.every is not None:
        yield "evaluation.every is set and rollouts come from a dump: there are no servers, and nothing is evaluated"


def _timeout_note(config: RunConfig) -> Iterator[str]:
    """A verb may wait for a request, for a sync, and for the restart of a server."""
    limits = {
        "rollout.request_timeout_s": config.rollout.request_timeout_s,
        "rollout.server.start_timeout_s": config.rollout.server.start_timeout_s,
        "sync.timeout_s": config.sync.timeout_s,
    }
    verb = config.training.verb_timeout_s
    longer = [f"{key} = {seconds:g}" for key, seconds in limits.items() if verb is not None and seconds >= verb]
    if longer:
        yield (f"training.verb_timeout_s is {verb:g}, not above {', '.join(longer)}: what waits so long ends the run")


def _determinism_note(config: RunConfig) -> Iterator[str]:
    if config.training.deterministic and config.rollout.schedule == "asynchronous":
        yield (
            "training.deterministic is true and rollout.schedule is asynchronous: which tokens a push finds sampled is "
            "a matter of time, so that two runs differ; the trainer alone is repeatable"
        )
    if config.training.deterministic and config.rollout.server.addresses:
        yield (
            "training.deterministic is true and servers were started elsewhere: they need "
            "--enable-deterministic-inference"
        )


def _boundary_note(config: RunConfig) -> Iterator[str]:
    delta = config.algorithm.loss_args.get("delta")
    if isinstance(delta, int | float) and delta >= 1:
        yield (
            f"algorithm.loss_args.delta is {delta}, and |π − μ| is at most 1: the boundary of the trust region is "
            f"never reached, and weights stay within 1 ± {1 / delta:.3g}"
        )

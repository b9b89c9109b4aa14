"""A server's log-probs of given tokens: its side of the comparison that follows a weight sync."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import GenerationError
from drpo_megatron.rollout.experts import RoutedExpertsFormat


@dataclass(frozen=True)
class ServerScore:
    """What a server makes of L tokens, with P = L − 1.

    logprobs_P: float64, natural log-prob of every token but the first given those before it, at temperature 1.
    routed_experts_PLK: of a mixture of experts, `Rollout.routed_experts` of the tokens but the last.
    """

    logprobs_P: np.ndarray
    routed_experts_PLK: np.ndarray | None = None


def score_tokens(
    url: str,
    token_ids: Sequence[int],
    timeout_s: float,
    experts: RoutedExpertsFormat | None = None,
    api_key: str | None = None,
) -> ServerScore:
    """Let the server at `url` compute the log-probs of `token_ids`, two or more of them, from the first to the last.

    Nothing of its prefix cache is used. `experts`: of a mixture of experts, to get those that were taken. Raises
    ServerDied and ServerRequestError as `ServerAdmin` does, and GenerationError for an answer that is not one log-prob
    a token.
    """
    meta = ServerAdmin(url, api_key).score(list(token_ids), routed_experts=experts is not None, timeout_s=timeout_s)
    # SGLang scores a prompt at temperature 1 whatever the request's is, and the first token has no log-prob.
    values = [entry[0] for entry in meta["input_token_logprobs"]]
    if len(values) != len(token_ids) or values[0] is not None:
        raise GenerationError(f"{url} returned {len(values)} log-probs for a prompt of {len(token_ids)} tokens")
    logprobs_P = np.array([math.nan if value is None else value for value in values[1:]], dtype=np.float64)
    if not np.isfinite(logprobs_P).all():
        raise GenerationError(f"{url} returned a log-prob that is not finite: its weights or its kernels are broken")
    # One token was sampled, so that the last of the prompt has experts too.
    routed_PLK = None if experts is None else experts.decode(meta, len(token_ids))[:-1]
    return ServerScore(logprobs_P, routed_PLK)


def score_on_servers(
    urls: Sequence[str],
    token_ids: Sequence[int],
    timeout_s: float,
    experts: RoutedExpertsFormat | None = None,
    api_key: str | None = None,
) -> dict[str, ServerScore]:
    """`score_tokens` of every server, at the same time, by URL. Raises what the first of them that fails raises."""
    with ThreadPoolExecutor(max_workers=len(urls), thread_name_prefix="probe") as threads:
        asked = {url: threads.submit(score_tokens, url, token_ids, timeout_s, experts, api_key) for url in urls}
        return {url: answer.result() for url, answer in asked.items()}

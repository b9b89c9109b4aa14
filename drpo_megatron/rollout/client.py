"""Generation requests to SGLang or its router: token ids in, token ids with log μ out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp
import numpy as np

from drpo_megatron.config.schema import EvaluationSampling, RolloutConfig, SamplingConfig
from drpo_megatron.rollout.admin import authorization
from drpo_megatron.rollout.errors import GenerationError, OldWeights, ServerDied, Stopped
from drpo_megatron.rollout.experts import RoutedExpertsFormat

REPEATED = 128
"""Tokens of equal inputs, together, that are rather computed again for each than once in a pass of their own."""

_BACKOFF_S = 0.5  # before the first retry of a request; it doubles with each
_FINISH_REASONS = ("stop", "length", "abort")


@dataclass(frozen=True)
class Completion:
    """What the server sampled after one input: fields as in `records.Rollout`, of the sampled tokens.

    routed_experts: int16 [input + sampled − 1, L, K], None for a dense model. An `abort` ended before its time, with
    the tokens it had.
    """

    token_ids: list[int]
    logmu: list[float]
    weight_versions: list[int]
    finish_reason: str
    routed_experts: np.ndarray | None = None


class Servers(Protocol):
    """What a client needs to know of the servers: a `rollout.fleet.Fleet`."""

    @property
    def url(self) -> str:
        """Where requests go."""

    @property
    def api_key(self) -> str | None: ...

    def serving(self) -> int:
        """How many are in traffic and run."""

    def check_soon(self) -> None:
        """One of them answered with weights that it should not have."""


class RolloutClient:
    """Async context manager: a connection pool to the servers, with a bound on the requests in flight.

    `config` bounds the requests, and for each its seconds and retries. `experts` is asked for and decoded with every
    sample; None for a dense model. `version`: of the last push; a request that is sent from now on must not come back
    with older tokens. While `stopped`, no request is sent.
    """

    def __init__(self, servers: Servers, config: RolloutConfig, experts: RoutedExpertsFormat | None = None) -> None:
        self._servers = servers
        self._config = config
        self._experts = experts
        self._slots = asyncio.Semaphore(config.concurrency)
        self.version = 0
        self.stopped = False
        self.retries = 0

    async def __aenter__(self) -> Self:
        limit = aiohttp.ClientTimeout(total=self._config.request_timeout_s)
        # one connection a request: a broken one then belongs to one group
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        headers = authorization(self._servers.api_key)
        self._session = aiohttp.ClientSession(connector=connector, timeout=limit, headers=headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def complete(
        self,
        inputs: Sequence[list[int]],
        sampling: SamplingConfig,
        budgets: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Completion]:
        """One continuation of each of `inputs`, in one request.

        budgets: the largest number of new tokens of each, by default the sampling's. seeds: of each, for a server with
        enable_deterministic_inference. Requests that fail while a server lives, or come back with older tokens than
        `version`, are sent again. Raises ServerDied when no server is left and GenerationError when a request fails for
        good, and Stopped.
        """
        body = request_body(inputs, sampling, budgets, seeds, routed_experts=self._experts is not None)
        async with self._slots:
            if self.stopped:
                raise Stopped
            oldest = self.version
            return await self._with_retries(body, inputs, oldest)

    async def _with_retries(self, body: dict[str, Any], inputs: Sequence[list[int]], oldest: int) -> list[Completion]:
        attempts = self._config.request_retries + 1
        failure = ""
        for attempt in range(attempts):
            if attempt:
                self.retries += 1
                await asyncio.sleep(_BACKOFF_S * 2 ** (attempt - 1))
                # in a thread: the fleet may be busy with its servers
                if not await asyncio.to_thread(self._servers.serving):
                    raise ServerDied(f"no rollout server is left ({failure})")
            try:
                answers = await self._post(body)
                if len(answers) != len(inputs):
                    raise GenerationError(f"asked for {len(inputs)} samples and got {len(answers)}")
                completions = [parse_answer(i, a, self._experts) for i, a in zip(inputs, answers, strict=True)]
                _refuse_old(completions, oldest)
                return completions
            except OldWeights as error:
                failure = str(error)
                await asyncio.to_thread(self._servers.check_soon)
            except TimeoutError:
                failure = f"no answer within {self._config.request_timeout_s:g} s"
            except (aiohttp.ClientError, ConnectionError) as error:
                failure = f"{type(error).__name__}: {error}"
        if not await asyncio.to_thread(self._servers.serving):
            raise ServerDied(f"no rollout server is left ({failure})")
        raise GenerationError(f"a rollout request failed {attempts} times although a server lives; last: {failure}")

    async def _post(self, body: dict[str, Any]) -> list[Any]:
        async with self._session.post(f"{self._servers.url}/generate", json=body) as response:
            if response.status == 200:
                answer = await response.json()
                return answer if isinstance(answer, list) else [answer]
            failure = f"status {response.status}: {(await response.text())[:500]}"
        if response.status < 500:
            raise GenerationError(f"the rollout server refused a request with {failure}")
        raise ConnectionError(failure)


def _refuse_old(completions: Sequence[Completion], oldest: int) -> None:
    found = min((v for c in completions for v in c.weight_versions), default=oldest)
    if found < oldest:
        raise OldWeights(f"an answer has tokens of weight version {found}, and {oldest} was pushed before it was asked")


def request_body(
    inputs: Sequence[list[int]],
    sampling: SamplingConfig,
    budgets: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    *,
    routed_experts: bool = False,
) -> dict[str, Any]:
    """Body of /generate for one continuation of each of `inputs`, with the experts of each token if `routed_experts`.

    Equal inputs with nothing of their own go as one input with SGLang's `n`: the server computes it once, in a request
    that it waits for, and then the samples, each a message to its scheduler. Several inputs are one message and each is
    computed, which is faster up to `REPEATED` tokens.

    Nothing but the temperature shapes the distribution (no top-p, top-k, min-p or penalties): SGLang's log-probs are of
    the distribution before truncation, and μ would not be what was sampled from. Answers that are not trained may be
    sampled with top-p.
    """
    parameters: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if isinstance(sampling, EvaluationSampling) else 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": sampling.max_new_tokens,
        "ignore_eos": sampling.ignore_eos,
    }
    if sampling.stop:
        parameters["stop"] = sampling.stop
    of_each: Any = parameters
    alike = budgets is None and seeds is None and all(one == inputs[0] for one in inputs)
    if len(inputs) > 1 and alike and sum(map(len, inputs)) > REPEATED:
        parameters["n"] = len(inputs)
        inputs = inputs[:1]
    if budgets is not None or seeds is not None:
        of_each = [dict(parameters) for _ in inputs]
        for one, budget in zip(of_each, budgets or (), strict=budgets is not None):
            one["max_new_tokens"] = budget
        for one, seed in zip(of_each, seeds or (), strict=seeds is not None):
            one["sampling_seed"] = seed
    body = {"input_ids": list(inputs), "sampling_params": of_each, "return_logprob": True}
    return body | ({"return_routed_experts": True} if routed_experts else {})


def parse_answer(
    input_ids: list[int], answer: dict[str, Any], experts: RoutedExpertsFormat | None = None
) -> Completion:
    """One element of /generate's answer; with routed experts where `experts` is given.

    Raises GenerationError when tokens, log-probs, weight versions and experts do not fit together or a log-prob is not
    finite.
    """
    meta = answer["meta_info"]
    token_ids: list[int] = answer["output_ids"]
    logprobs = meta["output_token_logprobs"]
    if [entry[1] for entry in logprobs] != token_ids:
        raise GenerationError("the server's log-probs belong to other tokens than it sampled")
    logmu = [float("nan") if entry[0] is None else float(entry[0]) for entry in logprobs]
    if not all(math.isfinite(value) for value in logmu):
        raise GenerationError("the rollout server returned a log-prob that is not finite")
    reason = meta["finish_reason"]["type"]
    if reason not in _FINISH_REASONS:
        raise GenerationError(f"unknown finish reason {reason!r}")
    positions = len(input_ids) + len(token_ids) - 1
    return Completion(
        token_ids=token_ids,
        logmu=logmu,
        weight_versions=token_versions(meta, len(token_ids)),
        finish_reason=reason,
        routed_experts=None if experts is None else experts.decode(meta, positions),
    )


def token_versions(meta: dict[str, Any], length: int) -> list[int]:
    """Weight version of each of `length` tokens, from the spans `[start, end)` of SGLang's `weight_versions`.

    Raises GenerationError when the spans do not cover every token once.
    """
    spans = meta.get("weight_versions")
    if spans is None:
        spans = [{"version": meta["weight_version"], "start": 0, "end": length}]
    versions: list[int] = []
    for span in spans:
        if span["start"] != len(versions):
            raise GenerationError(f"weight version spans leave a gap or overlap: {spans}")
        versions.extend([int(span["version"])] * (span["end"] - span["start"]))
    if len(versions) != length:
        raise GenerationError(f"weight version spans cover {len(versions)} of {length} tokens: {spans}")
    return versions

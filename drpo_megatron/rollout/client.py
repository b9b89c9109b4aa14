"""Generation requests to an SGLang server: token ids in, token ids with log μ out.

One request carries all samples of one prompt, as a batch of the same prompt: the server computes its prefix once, a
failure costs one group and not the step, and it is the fastest of the request shapes that keep groups apart.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig
from drpo_megatron.records import Prompt, Rollout, RolloutGroup
from drpo_megatron.rollout.errors import GenerationError, ServerDied
from drpo_megatron.rollout.experts import RoutedExpertsFormat

_BACKOFF_S = 0.5  # before the first retry of a request; it doubles with each
_DEATH_GRACE_S = 2.0  # a connection breaks before the exit of its process can be seen
_HEALTH_TIMEOUT_S = 30.0  # SGLang itself gives up on its scheduler after 20
_FINISH_REASONS = ("stop", "length", "abort")


@dataclass
class GenerationJob:
    """Groups to generate, and those that are done. Run it again after a failure and only the rest is asked for."""

    prompts: Sequence[Prompt]
    samples_per_prompt: int
    sampling: SamplingConfig
    completed: dict[int, RolloutGroup] = field(default_factory=dict)
    retries: int = 0

    @property
    def missing(self) -> list[int]:
        """Positions in `prompts` whose group is not complete."""
        return [i for i in range(len(self.prompts)) if i not in self.completed]

    def groups(self) -> list[RolloutGroup]:
        """The groups in the order of `prompts`. Raises RuntimeError while some are missing."""
        if self.missing:
            raise RuntimeError(f"{len(self.missing)} of {len(self.prompts)} groups are not generated yet")
        return [self.completed[i] for i in range(len(self.prompts))]


class RolloutClient:
    """Runs generation jobs against one server.

    `alive` says whether the server's process runs. `config` bounds the requests in flight, and for each its seconds and
    retries. `experts` is asked for and decoded with every sample; None for a dense model.
    """

    def __init__(
        self,
        url: str,
        config: RolloutConfig,
        alive: Callable[[], bool],
        experts: RoutedExpertsFormat | None = None,
    ) -> None:
        self._url = url
        self._config = config
        self._alive = alive
        self._experts = experts

    async def run(self, job: GenerationJob) -> None:
        """Generate the missing groups of `job` into `job.completed`.

        Raises ServerDied when the server is gone and GenerationError when a request fails for good; the groups that
        completed until then stay in the job.
        """
        slots = asyncio.Semaphore(self._config.concurrency)
        limit = aiohttp.ClientTimeout(total=self._config.request_timeout_s)
        # one connection a request: a broken one then belongs to one group
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=limit) as session:
            tasks = [asyncio.create_task(self._group(session, slots, job, i)) for i in job.missing]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _group(
        self, session: aiohttp.ClientSession, slots: asyncio.Semaphore, job: GenerationJob, position: int
    ) -> None:
        prompt = job.prompts[position]
        async with slots:
            body = request_body(prompt, job.samples_per_prompt, job.sampling, routed_experts=self._experts is not None)
            answers = await self._post(session, body, job)
        rollouts = [parse_answer(prompt, answer, self._experts) for answer in answers]
        if len(rollouts) != job.samples_per_prompt:
            raise GenerationError(f"asked for {job.samples_per_prompt} samples of {prompt.id}, got {len(rollouts)}")
        job.completed[position] = RolloutGroup(prompt, rollouts)

    async def _post(self, session: aiohttp.ClientSession, body: dict[str, Any], job: GenerationJob) -> list[Any]:
        """Send one request, again after failures of a living server, and return its answers, one a sample."""
        attempts = self._config.request_retries + 1
        for attempt in range(attempts):
            try:
                async with session.post(f"{self._url}/generate", json=body) as response:
                    if response.status == 200:
                        answer = await response.json()
                        return answer if isinstance(answer, list) else [answer]
                    failure = f"status {response.status}: {(await response.text())[:500]}"
                    if response.status < 500:
                        raise GenerationError(f"the rollout server refused a request with {failure}")
            except (aiohttp.ClientError, TimeoutError) as error:
                failure = f"{type(error).__name__}: {error}"
                if isinstance(error, TimeoutError):
                    failure = f"no answer within {self._config.request_timeout_s:g} s"
                if await self._dead(session):
                    raise ServerDied(f"the rollout server is gone ({failure})") from error
            if attempt + 1 < attempts:
                job.retries += 1
                await asyncio.sleep(_BACKOFF_S * 2**attempt)
        if not self._alive():
            raise ServerDied(f"the rollout server is gone ({failure})")
        raise GenerationError(f"a rollout request failed {attempts} times although the server lives; last: {failure}")

    async def _dead(self, session: aiohttp.ClientSession) -> bool:
        """Whether the server's process ended, or it does not generate any more."""
        for _ in range(10):
            if not self._alive():
                return True
            await asyncio.sleep(_DEATH_GRACE_S / 10)
        try:
            limit = aiohttp.ClientTimeout(total=_HEALTH_TIMEOUT_S)
            async with session.get(f"{self._url}/health_generate", timeout=limit) as response:
                return response.status != 200
        except (aiohttp.ClientError, TimeoutError):
            return True


def request_body(
    prompt: Prompt, samples: int, sampling: SamplingConfig, *, routed_experts: bool = False
) -> dict[str, Any]:
    """Body of /generate for `samples` responses to one prompt, with the experts of each token if `routed_experts`.

    Nothing but the temperature shapes the distribution (no top-p, top-k, min-p or penalties): SGLang's log-probs are of
    the distribution before truncation, and μ would not be what was sampled from.
    """
    parameters: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": 1.0,
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
    body = {"input_ids": [prompt.token_ids] * samples, "sampling_params": parameters, "return_logprob": True}
    return body | ({"return_routed_experts": True} if routed_experts else {})


def parse_answer(prompt: Prompt, answer: dict[str, Any], experts: RoutedExpertsFormat | None = None) -> Rollout:
    """One element of /generate's answer as a Rollout, without text; with routed experts where `experts` is given.

    Raises GenerationError when tokens, log-probs, weight versions and experts do not fit together or a log-prob is not
    finite.
    """
    meta = answer["meta_info"]
    token_ids: list[int] = answer["output_ids"]
    logprobs = meta["output_token_logprobs"]
    if [entry[1] for entry in logprobs] != token_ids:
        raise GenerationError(f"{prompt.id}: the server's log-probs belong to other tokens than it sampled")
    logmu = [float("nan") if entry[0] is None else float(entry[0]) for entry in logprobs]
    if not all(math.isfinite(value) for value in logmu):
        raise GenerationError(f"{prompt.id}: the rollout server returned a log-prob that is not finite")
    reason = meta["finish_reason"]["type"]
    if reason not in _FINISH_REASONS:
        raise GenerationError(f"{prompt.id}: unknown finish reason {reason!r}")
    positions = len(prompt.token_ids) + len(token_ids) - 1
    return Rollout(
        prompt=prompt,
        response_ids=token_ids,
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

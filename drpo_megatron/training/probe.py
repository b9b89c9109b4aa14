"""The log-prob probe: after a verified weight sync, trainer and servers must give fixed tokens the same log-probs.

Checksums prove that the weights are the same. The probe proves that both engines make the same policy of them: rotary
frequencies, norms, scales and the vocabulary's padding are no weights. It costs a forward of a few dozen tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.fp8.recipes import token_multiple
from drpo_megatron.fp8.rollout import RolloutWeights
from drpo_megatron.models.builder import forward_packed, output_weight
from drpo_megatron.platform import device
from drpo_megatron.platform.distributed import from_rank_0, to_rank_0
from drpo_megatron.records import Metrics, TrainBatch
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerError
from drpo_megatron.rollout.fleet import api_key_of
from drpo_megatron.rollout.probe import ServerScore
from drpo_megatron.sync.verify import ExpectedChecksums, ServerLayout, SyncMismatch
from drpo_megatron.training.context import pack_multiple, sequence_multiple, split_context
from drpo_megatron.training.packing import TrainSequence, pack
from drpo_megatron.training.routing import UpdateRouting
from drpo_megatron.training.step import Policy
from drpo_megatron.vocab_parallel import fused_logprobs, project_logprobs
from drpo_megatron.weights.exporter import iter_hf_tensors

NUM_TOKENS = 48
TOLERANCES = {"float32": 1e-3, "bfloat16": 1.0}
"""In nats, by the model's dtype. Between trainer and SGLang in float32 3e-6 to 4e-5 were measured."""
FP8_TOLERANCE = 5.0
"""With FP8 rollouts, for any dtype. What they differ by is rounding that is meant, and the probe's tokens are random:
their log-probs are low, and differ more than those of sampled tokens. Up to 0.3 was measured on the quickstart model
and 2.2 on SmolLM2-135M."""


class ProbeMismatch(SyncMismatch):
    """Trainer and server give a token different log-probs after a sync.

    difference: the largest, in nats. position: of that token in the probe. token: its id. url: the server. names: the
    Hugging Face tensors that differ; empty when the engines compute differently with the same weights.
    """

    def __init__(self, difference: float, tolerance: float, position: int, token: int, url: str, names: list[str]):
        self.difference, self.position, self.token, self.url, self.names = difference, position, token, url, names
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        reason = f"tensors that differ: {listed}" if names else "no tensor differs: the engines compute differently"
        ServerError.__init__(
            self,
            f"trainer and rollout server {url} differ by {difference:.3g} in the log-prob of token {token} at position "
            f"{position} of the probe, and sync.probe_tolerance is {tolerance:g}; {reason}",
        )


def probe_tokens(vocab_size: int, seed: int) -> list[int]:
    """NUM_TOKENS token ids, random and the same for the same arguments."""
    # SGLang mentions the last id of a vocabulary as 0: it is left out.
    tokens: list[int] = np.random.default_rng(seed).integers(0, vocab_size - 1, NUM_TOKENS).tolist()
    return tokens


@torch.no_grad()
def policy_logprobs(
    policy: Policy, token_ids: list[int], routed_experts_PLK: np.ndarray | None = None
) -> np.ndarray | None:
    """float64 [P], the policy's log-prob of every token of `token_ids` but the first, at temperature 1; None but on
    rank 0.

    A forward-only pass of Megatron's schedule; collective over all ranks, which give the same arguments.
    routed_experts_PLK: int16, what the routers of a mixture of experts follow; None leaves the choice to them.
    """
    layout, length = policy.layout, len(token_ids)
    sequence = TrainSequence(
        token_ids_L=np.asarray(token_ids, dtype=np.int32),
        sampled_L=np.arange(length) > 0,
        logmu_L=np.zeros(length, dtype=np.float32),
        version_L=np.zeros(length, dtype=np.int32),
        advantage=0.0,
        weight=0.0,
        routed_experts_PLK=routed_experts_PLK,
    )
    # Data-parallel ranks compute the same; the interleaved schedule gets empty micro-batches beside the one.
    micro_batches = pack(
        [sequence],
        data_rank=0,
        data_size=1,
        token_budget=length,
        pad_multiple=pack_multiple(layout, token_multiple(policy.config.fp8)),
        sequence_multiple=sequence_multiple(layout),
        count_multiple=layout.pipeline if layout.virtual_pipeline else 1,
        version=0,
    )
    packed_length = len(micro_batches[0].tokens_T)
    rank = parallel_state.get_context_parallel_rank()
    batches = [split_context(batch, rank, layout.context).to(device()) for batch in micro_batches]
    routing = None
    if routed_experts_PLK is not None:
        routing = UpdateRouting(policy.hf, layout, replay=True)
    modules = policy.modules
    for module in modules:
        module.eval()
    try:
        scored: list[tuple[np.ndarray, np.ndarray]] = policy.forward_backward(
            forward_step_func=partial(_forward_step, policy, routing),
            data_iterator=[iter(batches) for _ in modules],
            model=modules,
            num_microbatches=len(batches),
            seq_length=packed_length,
            micro_batch_size=1,
            forward_only=True,
        )
    finally:
        for module in modules:
            module.train()
    return _on_rank_0(scored, length - 1)


def _forward_step(
    policy: Policy, routing: UpdateRouting | None, batches: Iterator[TrainBatch], model: torch.nn.Module
) -> tuple[torch.Tensor, object]:
    batch = next(batches)
    hidden = forward_packed(
        model,
        batch.tokens_T,
        batch.position_ids_T,
        batch.cu_seqlens,
        batch.max_seqlen,
        routing=routing.micro_batch(batch) if routing else None,
    )
    return hidden, partial(_score, policy, batch, model)


def _score(
    policy: Policy, batch: TrainBatch, model: torch.nn.Module, hidden_1TH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, tuple[np.ndarray, np.ndarray]]:
    """The 3-tuple of Megatron's schedule, the last of it (positions [N], log-probs [N]) of this rank's tokens."""
    projection, mask_T = policy.config.algorithm.projection, batch.mask_T
    vocabulary: dict[str, Any] = policy.objective.vocabulary | {"temperature": 1.0}
    weight_VH = output_weight(model)
    assert weight_VH is not None, "the schedule scores on the last stage"
    projected = (hidden_1TH.squeeze(0), weight_VH, batch.labels_T)
    if projection.backend == "fused":
        logp_N, _ = fused_logprobs(*projected, mask_T=mask_T, memory_budget=projection.memory_budget, **vocabulary)
    else:
        logp_N, _ = project_logprobs(*projected, mask_T=mask_T, **vocabulary)
    scored = batch.position_ids_T[mask_T].cpu().numpy(), logp_N.double().cpu().numpy()
    return hidden_1TH.new_zeros(()), mask_T.sum().int(), scored


def _on_rank_0(scored: list[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray | None:
    """The ranks' parts put together. Collective."""
    mine = scored if parallel_state.get_tensor_model_parallel_rank() == 0 else []
    gathered: list[list[tuple[np.ndarray, np.ndarray]]] = to_rank_0(mine)
    if dist.get_rank() != 0:
        return None
    logprobs_P = np.full(count, np.nan)
    for parts in gathered:
        for positions_N, logp_N in parts:
            logprobs_P[positions_N] = logp_N
    return logprobs_P


class SyncProbe:
    """Compares the policy with the servers' scores of `token_ids`."""

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        self.config = config
        self.token_ids = probe_tokens(vocab_size, config.seed)
        default = FP8_TOLERANCE if config.fp8.rollout else TOLERANCES[config.model.dtype]
        self.tolerance = config.sync.probe_tolerance or default

    def compare(self, policy: Policy, scores: Mapping[str, ServerScore]) -> Metrics:
        """The metrics of the probe. `scores`: by URL, the same on every rank; empty compares nothing. Collective.

        The policy follows the experts of each server, because a near tie that falls another way is no mistake. Raises
        ProbeMismatch on rank 0, with the names of the tensors that differ by then.
        """
        worst: tuple[float, int, str] = (0.0, 0, "")
        for experts_PLK, urls in _by_experts(scores):
            logprobs_P = policy_logprobs(policy, self.token_ids, experts_PLK)
            if logprobs_P is None:
                continue
            for url in urls:
                # What is not a number is no agreement.
                difference_P = np.nan_to_num(np.abs(scores[url].logprobs_P - logprobs_P), nan=np.inf)
                largest = int(difference_P.argmax())
                worst = max(worst, (float(difference_P[largest]), largest + 1, url))
        failed = from_rank_0(worst if worst[0] > self.tolerance else None)
        if failed is not None:
            self._explain(policy, *failed)
        return {"sync/probe_abs_dlogp_max": worst[0]} if scores else {}

    def _explain(self, policy: Policy, difference: float, position: int, url: str) -> None:
        """Compare the checksums of what both hold now, and raise on rank 0. Collective."""
        config = self.config
        is_driver = dist.get_rank() == 0
        layout = ServerLayout.from_config(
            config.model.path, config.rollout.server.tensor_parallel, getattr(torch, config.model.dtype)
        )
        expected = ExpectedChecksums(layout, device())
        weights = RolloutWeights.of(config)
        buckets = iter_hf_tensors(policy.modules, policy.hf, bucket_bytes=int(config.sync.bucket_mb * 2**20))
        for bucket in weights.stream(buckets) if weights else buckets:
            for name, tensor in bucket:
                expected.add(name, tensor)
        if not is_driver:
            return
        names: list[str] = []
        try:
            expected.verify(ServerAdmin(url, api_key_of(config.rollout.server)).weight_checksums(config.sync.timeout_s))
        except SyncMismatch as mismatch:
            names = mismatch.names
        raise ProbeMismatch(difference, self.tolerance, position, self.token_ids[position], url, names)


def _by_experts(scores: Mapping[str, ServerScore]) -> Iterator[tuple[np.ndarray | None, list[str]]]:
    """(experts, the servers that took them): one forward serves them all."""
    groups: dict[bytes, list[str]] = {}
    for url, score in scores.items():
        taken = score.routed_experts_PLK
        groups.setdefault(b"" if taken is None else np.sort(taken, axis=-1).tobytes(), []).append(url)
    for urls in groups.values():
        yield scores[urls[0]].routed_experts_PLK, urls

"""The records that flow through a step: `Prompt → Rollout → RolloutGroup → TrainBatch`.

They hold plain data only. `Prompt` and `Rollout` are what is dumped to `runs/NAME/rollouts/` (`to_json`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # verifier processes and the configuration checks read records and do without torch
    import numpy as np
    import torch

    from drpo_megatron.models.shared_prefixes import SharedPrefixes


@dataclass(frozen=True)
class Prompt:
    """One task for the policy.

    id: unique in its data source and stable between runs. token_ids: the prompt after the chat template.
    text: the same, readable. answer and metadata: what the verifier needs.
    """

    id: str
    token_ids: list[int]
    text: str
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Rollout:
    """One sampled response.

    response_ids: the sampled tokens. logmu: the rollout engine's natural log-probability of each of them at the
    sampling temperature. weight_versions: the version of the weights that sampled each of them. All three have equal
    length. response_mask: 1 for tokens the policy sampled, 0 for tokens put in by a tool. finish_reason: `stop`,
    `length`, `abort`. routed_experts: of a mixture of experts, int16 [prompt + response − 1, L, K]: the K experts, in
    any order, that each position took in each of the model's L mixture-of-experts layers (the last token was no input).
    logp and loss_weight: of each token when it was trained, the trainer's log-probability and w of `LossOutputs`, 0
    where it was not sampled; empty before.
    """

    prompt: Prompt
    response_ids: list[int]
    logmu: list[float]
    weight_versions: list[int]
    finish_reason: str
    response_mask: list[int] = field(default_factory=list)
    text: str = ""
    reward: float = 0.0
    reward_error: str | None = None
    advantage: float = 0.0
    logp: list[float] = field(default_factory=list)
    loss_weight: list[float] = field(default_factory=list)
    routed_experts: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.response_mask = self.response_mask or [1] * len(self.response_ids)
        lengths = {len(self.response_ids), len(self.logmu), len(self.weight_versions), len(self.response_mask)}
        if len(lengths) != 1:
            raise ValueError(
                f"rollout of {self.prompt.id}: tokens, log μ, versions and mask differ in length: {lengths}"
            )

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    def to_json(self) -> dict[str, Any]:
        """Everything but the routed experts, which are many times the rest: `left_out` has their shape. The lists are
        this rollout's own.
        """
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "routed_experts"}
        record["prompt"] = asdict(self.prompt)
        if self.routed_experts is not None:
            record["left_out"] = {"routed_experts": list(self.routed_experts.shape)}
        return record


@dataclass
class RolloutGroup:
    """The samples of one prompt. Advantages are computed inside a group."""

    prompt: Prompt
    rollouts: list[Rollout]

    @property
    def rewards(self) -> list[float]:
        return [r.reward for r in self.rollouts]


@dataclass
class TrainBatch:
    """One micro-batch of packed sequences, on one device. T is the padded number of packed tokens, S the number of
    sequences.

    tokens_T (int64) and position_ids_T (int64, restart at 0 in each sequence) are the model's inputs; `cu_seqlens`
    (int32, [S+1] or [S+2] when the tail is padding) bounds the sequences. labels_T is the token that position t
    predicts. logmu_T, advantages_T (float32) belong to labels_T. mask_T (bool) is true where labels_T was sampled by
    the policy. weights_T (float32) carries the aggregation with its global denominator, so that `loss = Σ_t
    weights_T·L_T` over all micro-batches and data-parallel ranks. sequence_ids_T (int64) numbers the sequences of this
    micro-batch from 0, rows_T (int64) is `TrainSequence.row`. On a context-parallel rank the `_T` are its part
    (`training.context.split_context`) and the bounds those of the whole pack. prefixes: None, or the pack is one with
    shared prefixes: a sequence is then a segment, which may continue another one, and its position ids count on from
    there. num_tokens is T of the whole pack without padding, num_update_tokens its sum over the micro-batches of the
    update on all data-parallel ranks.
    routed_experts_TLK (int16) is `Rollout.routed_experts`, −1 at padding.
    """

    tokens_T: torch.Tensor
    position_ids_T: torch.Tensor
    labels_T: torch.Tensor
    logmu_T: torch.Tensor
    advantages_T: torch.Tensor
    mask_T: torch.Tensor
    weights_T: torch.Tensor
    sequence_ids_T: torch.Tensor
    rows_T: torch.Tensor
    staleness_T: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    num_sequences: int
    num_tokens: int
    num_update_tokens: int = 0
    routed_experts_TLK: torch.Tensor | None = None
    prefixes: SharedPrefixes | None = None

    def to(self, device: torch.device) -> TrainBatch:
        moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in vars(self).items()}
        return TrainBatch(**moved)


Metrics = dict[str, float]

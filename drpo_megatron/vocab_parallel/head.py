"""From hidden states to log-probabilities by autograd over whole logits: the reference of the fused operation.

Memory held for the backward pass, with N the number of trained tokens of the micro-batch: the hidden states [N, H] and
the logits of this rank's shard [N, V/tp] in the weight's dtype; the backward pass adds their gradient of the same
size. Tokens outside the mask are never projected. No [N, V] tensor exists on any rank, and no float32 copy of the
logits is kept.
"""

from __future__ import annotations

from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import linear

from drpo_megatron.vocab_parallel.logprob import vocab_parallel_logprob_entropy


def project_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    mask_T: Tensor,
    group: ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    sequence_parallel: bool = False,
) -> tuple[Tensor, Tensor]:
    """log π(target) and entropy of the N = mask_T.sum() masked-in tokens, in their order: `(logp_N, entropy_N)`.

    hidden_TH: the last layer's normalized output, the same on every rank of `group`; under `sequence_parallel` this
    rank's [T/tp, H] slice of it. weight_VH: this rank's rows of the output (or tied embedding) weight, V = padded
    vocabulary / tp. targets_T (int64) and mask_T (bool): [T], the same on every rank; index anything that belongs to
    the results with `mask_T`. group: the tensor-parallel group, None for a whole vocabulary. Other arguments, dtypes
    and errors: `vocab_parallel_logprob_entropy`. Raises ValueError when hidden states and targets do not match in
    length.

    The weight's gradient is the shard's own. The hidden gradient is summed over the group: an all-reduce of [N, H], or
    the reduce-scatter of [T, H] that belongs to the sequence-parallel gather.
    """
    trained_N = trained_tokens(targets_T, mask_T)
    hidden_NH = select_tokens(hidden_TH, targets_T, trained_N, group, sequence_parallel)
    logits_NV = linear(hidden_NH, weight_VH)
    return vocab_parallel_logprob_entropy(
        logits_NV, targets_T[trained_N], group=group, vocab_size=vocab_size, temperature=temperature
    )


def trained_tokens(targets_T: Tensor, mask_T: Tensor) -> Tensor:
    """Where `mask_T` is true, int64 [N]. A GPU is waited for here once, and not at each indexing by the mask.

    Raises ValueError when mask and targets do not match in length.
    """
    if len(targets_T) != len(mask_T):
        raise ValueError(f"{len(targets_T)} targets and {len(mask_T)} mask entries: they belong to the same tokens")
    return mask_T.nonzero().squeeze(1)


def select_tokens(
    hidden_TH: Tensor, targets_T: Tensor, trained_N: Tensor, group: ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """The hidden states [N, H] of the tokens at the distinct places `trained_N`, in order, whose gradient is summed
    over the group on its way back.

    Raises ValueError when hidden states and targets do not match in length.
    """
    if sequence_parallel and group is not None:
        hidden_TH = gather_from_sequence_parallel_region(hidden_TH, group=group)
    if len(hidden_TH) != len(targets_T):
        raise ValueError(
            f"{len(hidden_TH)} hidden states for {len(targets_T)} targets: "
            "pass sequence_parallel=True exactly when hidden states are split over the group"
        )
    # Not copied when nothing is left out; kernels take rows that lie one after the other.
    everything = len(trained_N) == len(hidden_TH)
    hidden_NH = hidden_TH.contiguous() if everything else hidden_TH.index_select(0, trained_N)
    if group is not None and not sequence_parallel:
        # After the selection, so that only trained tokens travel in the backward pass.
        hidden_NH = copy_to_tensor_model_parallel_region(hidden_NH, group=group)
    return hidden_NH

"""The vocabulary, sharded over tensor-parallel ranks: projection, log-prob, entropy and policy loss as one operation.

`fused_policy_loss` and `fused_logprobs` never hold [tokens, vocabulary], not even of one shard; `project_logprobs` is
the dense path by autograd that they are compared with.
"""

from drpo_megatron.vocab_parallel.chunks import DEFAULT_MEMORY_BUDGET
from drpo_megatron.vocab_parallel.fused import FusedLoss, fused_logprobs, fused_policy_loss
from drpo_megatron.vocab_parallel.head import project_logprobs, trained_tokens
from drpo_megatron.vocab_parallel.logprob import vocab_parallel_logprob_entropy
from drpo_megatron.vocab_parallel.tail import TailReport

__all__ = [
    "DEFAULT_MEMORY_BUDGET",
    "FusedLoss",
    "TailReport",
    "fused_logprobs",
    "fused_policy_loss",
    "project_logprobs",
    "trained_tokens",
    "vocab_parallel_logprob_entropy",
]

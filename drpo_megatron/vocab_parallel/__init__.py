"""Log-probabilities over vocabulary shards: no tensor of [tokens, whole vocabulary] exists."""

from drpo_megatron.vocab_parallel.head import project_logprobs
from drpo_megatron.vocab_parallel.logprob import vocab_parallel_logprob_entropy

__all__ = ["project_logprobs", "vocab_parallel_logprob_entropy"]

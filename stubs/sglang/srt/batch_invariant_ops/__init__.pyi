from sglang.srt.batch_invariant_ops.batch_invariant_ops import (
    enable_batch_invariant_mode as enable_batch_invariant_mode,
)

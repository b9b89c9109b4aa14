"""The stand-in for the hash by which SGLang samples with seeds, against SGLang's own Triton kernel, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import torch
from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32_kernel
from drpo_megatron.platform.sglang_cpu import murmur_hash32

seeds_N = torch.tensor([0, 1, 42, 2**31 - 1, 2**40 + 5, 2**63 - 1])
positions_N = torch.tensor([0, 7, 1, 2**31 - 1, 12, 99999])
columns_V = torch.arange(300)
expected_NV = torch.empty(6, 300, dtype=torch.uint32)
murmur_hash32_kernel[(6, 2)](seeds_N, positions_N, columns_V, expected_NV, 6, 300, BLOCK_SIZE=256)
found_NV = murmur_hash32(seeds_N.to(torch.uint64), positions_N, columns_V)
assert torch.equal(found_NV, expected_NV.to(torch.int64))
assert len(found_NV.unique()) > 1790
"""


def test_the_hash_is_sglangs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

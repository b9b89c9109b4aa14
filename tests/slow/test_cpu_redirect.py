"""What Megatron-Core finds in place of CUDA extensions, in a process that it changes for good."""

from __future__ import annotations

import subprocess
import sys

CHECKS = """
import os
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import torch
import torch.distributed as dist
from torch.distributed import _coalescing_manager
from drpo_megatron.platform import distributed
from drpo_megatron.platform.layout import ParallelLayout
distributed.initialize(ParallelLayout(), timeout_s=30)

from megatron.core.tensor_parallel import layers
from drpo_megatron.platform.cpu import _AccumulatingProducts
assert layers._grad_accum_fusion_available
assert layers.fused_weight_gradient_mlp_cuda is _AccumulatingProducts

from megatron.core.distributed import param_and_grad_buffer as buffers
buffer, group = torch.arange(6.0), dist.group.WORLD
calls = []
def counted(function):
    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)
    return call
c10d = dist.distributed_c10d
c10d.all_gather_single = counted(c10d.all_gather_single)
c10d.reduce_scatter_single = counted(c10d.reduce_scatter_single)
for function in (buffers.dist_all_gather_func, buffers.dist_reduce_scatter_func):
    assert function(buffer, buffer, group=group, async_op=False) is None
    with _coalescing_manager(group, async_ops=True) as pending:
        function(buffer, buffer, group=group, async_op=True)
    pending.wait()
assert not calls and torch.equal(buffer, torch.arange(6.0))
# Another buffer is filled, and who asks for a handle gets one.
for function in (buffers.dist_all_gather_func, buffers.dist_reduce_scatter_func):
    calls.clear()
    elsewhere = torch.zeros(6)
    function(elsewhere, buffer, group=group, async_op=False)
    assert torch.equal(elsewhere, buffer)
    function(buffer, buffer, group=group, async_op=True).wait()
    assert len(calls) == 2 and torch.equal(buffer, elsewhere)
distributed.shutdown()
"""


def test_what_megatron_finds() -> None:
    """The kernel above, and collectives that leave the buffer of a single rank as it is, like NCCL's."""
    subprocess.run([sys.executable, "-c", CHECKS], check=True)

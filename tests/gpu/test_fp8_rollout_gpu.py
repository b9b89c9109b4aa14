"""FP8 rollouts in SGLang's own FP8 layers, which only a GPU can run."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.server.test_fp8_rollout import TRANSPORTS, Served, reference
from tests.support.server_pool import WHOLE_BLOCKS, fp8_launch, ready
from tests.support.servers import perturb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device for SGLang's FP8 kernels"),
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """On the last device: NCCL refuses a trainer and a server on one."""
    sizes = WHOLE_BLOCKS | {"num_hidden_layers": 3, "initializer_range": 0.05}
    devices = [torch.cuda.device_count() - 1]
    directory = tmp_path_factory.mktemp("served")
    launch = fp8_launch(directory, "bfloat16", "transformer_engine", 1, devices, **sizes)
    with launch.server:
        pooled = ready("fp8", launch)
        yield Served(pooled, pooled.reference())


def test_pushes_to_an_fp8_server_on_a_gpu(served: Served) -> None:
    """A server that starts without weights is filled by each transport that works with these devices, with checksums of
    FP8 parameters, and computes in FP8 where it should.
    """
    transports = TRANSPORTS if torch.cuda.device_count() > 1 else [t for t in TRANSPORTS if t != "distributed"]
    for version, transport in enumerate(transports, start=1):
        if version % 2 == 0:
            perturb(served.model, version)
        assert served.push(version, transport=transport).verified == 3 + 3 * 8
        found = served.logprobs()
        error_P = np.abs(found - reference(served.model, 1))
        assert error_P.mean() < 0.2 * np.abs(found - reference(served.model, 1, factor=0.5)).mean()
    layers = served.audit(served.weights.quantized)
    assert {n for n, in_fp8 in layers.items() if in_fp8} == {n for n in layers if re.match(r"model\.layers\.[12]\.", n)}
    assert served.push(9, transport=transports[-1]).verified, "the audit left the weights as they were"

"""A user trains a mixture of experts where servers and trainer share the devices: they take turns, the weights are in
step, and the trainer follows the servers' experts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import DIGITS, MOE, SMALL, dump, metrics, settings
from tests.support.server_pool import ServerPool
from tests.support.trainer import train

pytestmark = [pytest.mark.server, pytest.mark.distributed]

LAYERS, EXPERTS_A_TOKEN = 2, 2


def test_colocated_mixture_of_experts(servers: ServerPool, tmp_path: Path) -> None:
    """An evaluation is one more turn of the server's."""
    words = (
        *SMALL,
        "training.steps=3",
        "evaluation.every=2",
        f"evaluation.sets.digits={DIGITS}",
        "rollout.placement=colocated",
        "optimizer.overlap_param_gather=true",
        "sync.transport=shared_memory",
    )
    outcome = train(MOE, *settings(tmp_path), *words, launch=servers.launch).done()
    assert "no memory becomes free" in outcome.output
    steps = metrics(tmp_path)
    assert [s["step"] for s in steps] == [0, 1, 2]
    assert [s["sync/servers"] for s in steps] == [1] * 3 and steps[-1]["sync/server_restarts"] == 0
    assert ["evaluation/digits/avg@1" in s for s in steps] == [False, True, True]
    for step in steps:
        assert step["mismatch/router_disagreement"] == 0
        # The two engines' routers agree in float32 but for near ties, of which a short run has hardly any.
        assert step["router/own_disagreement"] < 0.02
        assert step["mismatch/abs_dlogp_max"] < 1e-3
        assert step["sync/verified_parameters"] > 0
        assert 0 < step["sync/probe_abs_dlogp_max"] < 1e-3
        assert 1 <= step["moe/aux_loss"] < 8
        assert step["train/skipped_updates"] == 0
    assert any(step["grad_norm"] > 0 for step in steps)
    rollouts = dump(tmp_path, 2)
    for rollout in rollouts:
        positions = len(rollout["prompt"]["token_ids"]) + len(rollout["response_ids"]) - 1
        assert rollout["left_out"] == {"routed_experts": [positions, LAYERS, EXPERTS_A_TOKEN]}
    assert {v for r in rollouts for v in r["weight_versions"]} == {4}  # two updates in each of the steps before
    assert list((tmp_path / "run" / "hf").glob("*.safetensors"))

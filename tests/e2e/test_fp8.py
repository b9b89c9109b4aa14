"""A user turns on FP8, in rollouts and in training: emulated on a machine without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import QUICKSTART, SMALL, settings
from tests.support.server_pool import ServerPool
from tests.support.trainer import train

pytestmark = [pytest.mark.server, pytest.mark.distributed]

FP8 = ("fp8.rollout=true", "fp8.backend=emulate", "fp8.unquantized_first_layers=1", "fp8.recipe=blockwise")
OF_SERVERS = ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj")
OF_TRAINER = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv")


def test_rollouts_and_training_in_fp8(servers: ServerPool, tmp_path: Path) -> None:
    """The run starts its server itself: only then do servers emulate FP8."""
    words = (*SMALL, *FP8, "training.steps=2", "training.export=false")
    steps = train(QUICKSTART, *settings(tmp_path), *words, launch=servers.launch).done().metrics
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["mismatch/k3"] < 0.1 and step["train/skipped_updates"] == 0
        assert step["sync/verified_parameters"] == 19
        assert 0 < step["sync/probe_abs_dlogp_max"] < 5
    layers = json.loads((tmp_path / "run" / "fp8_layers.json").read_text())
    assert set(layers) == {"servers", "trainer"}
    assert layers["servers"]["fp8"] == [f"model.layers.1.{part}.weight" for part in OF_SERVERS]
    assert layers["servers"]["not"] == [f"model.layers.0.{part}.weight" for part in OF_SERVERS]
    assert layers["trainer"]["fp8"] == [f"decoder.layers.1.{part}.weight" for part in OF_TRAINER]
    assert layers["trainer"]["not"] == [f"decoder.layers.0.{part}.weight" for part in OF_TRAINER]

"""A user turns on FP8, emulated on a machine without a GPU: in the servers alone, and in the trainer as well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import QUICKSTART, SMALL, server_of, settings
from tests.support.trainer import train

pytestmark = [pytest.mark.server, pytest.mark.distributed]

FP8 = (*SMALL, "training.steps=2", "training.export=false", "fp8.rollout=true", "fp8.backend=emulate")
FP8 = (*FP8, "fp8.unquantized_first_layers=1")
OF_SERVERS = ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj")
OF_TRAINER = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of these runs' kind, with one layer left as it is."""
    root = tmp_path_factory.mktemp("fp8")
    # What a server reports of its layers it needs an argument for, which a run gives to those that it starts.
    with server_of(QUICKSTART, *settings(root, "server"), *FP8) as url:
        yield f"rollout.server.addresses=[{url}]"


def test_rollouts_in_fp8(server: str, tmp_path: Path) -> None:
    """The mismatch is rounding's: in float32 it is below 1e-9, here it is above 1e-5."""
    outcome = train(QUICKSTART, *settings(tmp_path), *FP8, server).done()
    steps = outcome.metrics
    assert len(steps) == 2
    for step in steps:
        assert 1e-5 < step["mismatch/k3"] < 0.1 and step["sync/verified_parameters"] == 19
        assert 1e-2 < step["sync/probe_abs_dlogp_max"] < 5
    layers = json.loads((tmp_path / "run" / "fp8_layers.json").read_text())
    assert set(layers) == {"servers"}
    assert layers["servers"]["fp8"] == [f"model.layers.1.{part}.weight" for part in OF_SERVERS]
    assert layers["servers"]["not"] == [f"model.layers.0.{part}.weight" for part in OF_SERVERS]


def test_rollouts_and_training_in_fp8(server: str, tmp_path: Path) -> None:
    outcome = train(QUICKSTART, *settings(tmp_path), *FP8, "fp8.recipe=blockwise", server).done()
    steps = outcome.metrics
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["mismatch/k3"] < 0.1 and step["train/skipped_updates"] == 0
    layers = json.loads((tmp_path / "run" / "fp8_layers.json").read_text())
    assert set(layers) == {"servers", "trainer"}
    assert layers["trainer"]["fp8"] == [f"decoder.layers.1.{part}.weight" for part in OF_TRAINER]
    assert layers["trainer"]["not"] == [f"decoder.layers.0.{part}.weight" for part in OF_TRAINER]

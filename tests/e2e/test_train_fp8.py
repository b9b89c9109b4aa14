"""`drpo train` with FP8 rollouts, and with training in FP8 as well, emulated."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_train import LIMIT_S, command, metrics

pytestmark = [pytest.mark.server, pytest.mark.distributed]

SMALL = ("training.steps=2", "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "training.export=false")
FP8 = ("fp8.rollout=true", "fp8.backend=emulate", "fp8.unquantized_first_layers=1")


def train(directory: Path, *overrides: str) -> list[dict[str, Any]]:
    done = subprocess.run(command(directory, *SMALL, *overrides), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(directory)


def test_rollouts_in_fp8(tmp_path: Path) -> None:
    """The mismatch is rounding's: in float32 it is below 1e-9 (test_train), here it is above 1e-5."""
    for step in train(tmp_path, *FP8):
        assert 1e-5 < step["mismatch/k3"] < 0.1 and step["sync/verified_parameters"] == 19
        assert 1e-2 < step["sync/probe_abs_dlogp_max"] < 5
    layers = json.loads((tmp_path / "run" / "fp8_layers.json").read_text())
    assert set(layers) == {"servers"}
    parts = ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj")
    assert layers["servers"]["fp8"] == [f"model.layers.1.{part}.weight" for part in parts]
    assert layers["servers"]["not"] == [f"model.layers.0.{part}.weight" for part in parts]


def test_both_in_fp8(tmp_path: Path) -> None:
    for step in train(tmp_path, *FP8, "fp8.recipe=blockwise"):
        assert 0 < step["mismatch/k3"] < 0.1 and step["train/skipped_updates"] == 0
    layers = json.loads((tmp_path / "run" / "fp8_layers.json").read_text())
    assert set(layers) == {"servers", "trainer"}
    parts = ("mlp.linear_fc1", "mlp.linear_fc2", "self_attention.linear_proj", "self_attention.linear_qkv")
    assert layers["trainer"]["fp8"] == [f"decoder.layers.1.{part}.weight" for part in parts]
    assert layers["trainer"]["not"] == [f"decoder.layers.0.{part}.weight" for part in parts]


def test_a_layer_that_is_not_quantized_stops_the_run(tmp_path: Path) -> None:
    """A server whose list of exceptions is taken by parts of names, as others have done."""
    broken = tmp_path / "broken"
    broken.mkdir()
    # Python runs this in every process of the run.
    (broken / "sitecustomize.py").write_text(
        "import sys\n"
        "def broken():\n"
        "    import sglang.srt.layers.quantization.utils as utils\n"
        "    utils.is_layer_skipped = lambda prefix, ignored_layers, fused_mapping: 'layers.1.mlp' in prefix\n"
        "    install()\n"
        "if 'drpo_megatron.platform.sglang_cpu' in sys.orig_argv:\n"
        "    import drpo_megatron.platform.sglang_cpu_fp8 as emulation\n"
        "    install, emulation.install = emulation.install, broken\n"
    )
    path = os.pathsep.join([str(broken), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command(tmp_path, *SMALL, "fp8.rollout=true", "fp8.backend=emulate"),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=os.environ | {"PYTHONPATH": path},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "2 layers should be in FP8 and are not: model.layers.1.mlp.down_proj.weight" in said

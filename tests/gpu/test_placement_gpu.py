"""Colocated placement where memory really moves: only GPUs can show it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig, ServerConfig, SyncConfig
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.fleet import Fleet
from drpo_megatron.rollout.member import Member
from drpo_megatron.rollout.memory import FleetMemory
from drpo_megatron.rollout.server import SGLangServer
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.verify import ServerLayout
from tests.gpu.devices import needs_devices
from tests.ranks.test_placement import CASES, UPDATES, move_between_updates
from tests.support.launch import run_ranks
from tests.support.servers import make_prompts, perturb
from tests.support.tiny_models import VOCAB_SIZE, write
from tests.support.updates import make_sequences

pytestmark = pytest.mark.gpu

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
# Transformer Engine's attention over packed sequences is for 16-bit numbers.
ON_GPU = {name: settings for name, settings in CASES.items() if name.startswith("bfloat16")}


@pytest.mark.parametrize("ranks", [1, 2])
def test_moving_out_and_back_on_gpus(tmp_path: Path, ranks: int) -> None:
    """No weight, gradient or optimizer state is left on the device, and the updates are those of a trainer that stays,
    up to the order of atomic additions.
    """
    needs_devices(ranks)
    write("qwen2", tmp_path / "qwen2")
    sequences = make_sequences(VOCAB_SIZE)
    layout, model = {"data": ranks}, str(tmp_path / "qwen2")
    reports = run_ranks(ranks, move_between_updates, model, layout, sequences, ON_GPU, timeout_s=600)
    for report in reports:
        for case, found in report.items():
            weights, _ = found["before"]
            assert found["emptied"] == [((weights, 0), (0, 0))] * UPDATES, case
            assert found["left on a GPU"] == 0 and found["megatron"] > 0, case
            assert found["moved"] and found["hooks"] and found["same storages"], case
            for name, weight in found["expected"].items():
                error = (found["after"][name] - weight).float().norm() / weight.float().norm()
                assert error <= 1e-2, (case, name)


def test_a_server_frees_its_device(tmp_path: Path) -> None:
    needs_devices(1)
    model = write("qwen3", tmp_path, dtype=torch.bfloat16)
    config = RolloutConfig(
        prompts_per_step=4,
        samples_per_prompt=2,
        sampling=SamplingConfig(max_new_tokens=24),
        server=ServerConfig(devices=[0], args={"mem_fraction_static": 0.6}),
    )
    server = SGLangServer(config.server, tmp_path, "bfloat16", 0, tmp_path / "server.log", colocated=True)
    with Fleet(config.server, [Member("server-0", server)], None, None) as fleet:
        fleet.wait_all()
        memory = FleetMemory(fleet, timeout_s=60)
        layout = ServerLayout.from_config(tmp_path, 1, torch.bfloat16)
        weights = WeightSync(SyncConfig(transport="shared_memory"), layout, tmp_path, tmp_path / "sync")
        free, total = torch.cuda.mem_get_info(0)
        memory.release("kv_cache", "weights")
        released, _ = torch.cuda.mem_get_info(0)
        assert released - free > 0.5 * total
        memory.resume_weights()
        perturb(model, 1)
        weights.connect(fleet.up())
        assert weights.push(model.state_dict().items(), 1, stay_paused=True).verified
        fleet.admit(fleet.up(), 1)
        assert torch.cuda.mem_get_info(0)[0] - free > 0.4 * total, "the KV cache comes after the push"
        memory.resume_all()
        assert torch.cuda.mem_get_info(0)[0] - free < 0.1 * total
        driver = RolloutDriver(config, fleet, AutoTokenizer.from_pretrained(tmp_path))
        groups = driver.generate(make_prompts(4, VOCAB_SIZE))
        assert {v for g in groups for r in g.rollouts for v in r.weight_versions} == {1}
        weights.close()


@pytest.mark.parametrize(
    ("transport", "servers"),
    [("shared_memory", "rollout.server.tensor_parallel=2"), ("disk", "rollout.server.count=2")],
)
def test_taking_turns_on_gpus(tmp_path: Path, transport: str, servers: str) -> None:
    """Two ranks, and a server of two ranks or two servers, on the same two devices."""
    needs_devices(2)
    arguments = [
        *("-m", "drpo_megatron.cli", "train", str(QUICKSTART)),
        f"tracking.directory={tmp_path}",
        f"model.path={tmp_path / 'model'}",
        "model.dtype=bfloat16",
        "tracking.wandb=false",
        "training.steps=3",
        "rollout.placement=colocated",
        servers,
        f"sync.transport={transport}",
    ]
    subprocess.run([sys.executable, *arguments], check=True, timeout=900)
    steps = [json.loads(line) for line in (tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    assert all(s["sync/verified_parameters"] > 0 and s["mismatch/abs_dlogp_mean"] < 0.05 for s in steps)

"""What only GPUs can show: logits on one, whole runs on three."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launch import run_ranks
from tests.support.tiny_models import VOCAB_SIZE, write

pytestmark = pytest.mark.gpu
needs_three = pytest.mark.skipif(
    torch.cuda.device_count() < 3, reason="needs three CUDA devices: two ranks and a server"
)

LENGTHS = (5, 1, 90, 32)
ROOT = Path(__file__).parents[2]


def packed_logits(model_path: str, tokens_T: torch.Tensor) -> torch.Tensor:
    """Logits of one packed batch on one GPU, with Transformer Engine's layers, float32 on the CPU."""
    from drpo_megatron.models.builder import build_model, forward_packed, logits
    from drpo_megatron.models.hf_config import HFModelConfig
    from drpo_megatron.platform import device, distributed, spec_backend
    from drpo_megatron.platform.layout import ParallelLayout
    from drpo_megatron.weights.importer import load_hf

    assert spec_backend() == "transformer_engine"
    layout = ParallelLayout()
    distributed.initialize(layout)
    hf = HFModelConfig.load(model_path)
    (model,) = build_model(hf, layout, params_dtype=torch.bfloat16, spec_backend=spec_backend())
    load_hf([model], model_path, hf)
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device())
    positions_T = torch.cat([torch.arange(n) for n in LENGTHS]).to(device())
    with torch.no_grad():
        hidden = forward_packed(model, tokens_T.to(device()), positions_T, bounds, max(LENGTHS))
        logits_TV = logits(model, hf, hidden).float().cpu()
    distributed.shutdown()
    return logits_TV


# Without experts: rounded, a router may choose others.
DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "deepseek_v3": {"first_k_dense_replace": 4, "q_lora_rank": None},
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device for Transformer Engine's layers")
@pytest.mark.parametrize("family", DENSE)
def test_transformer_engine_logits(tmp_path: Path, family: str) -> None:
    """bf16 rounds to 2^-8: the error of both engines against float32 must be of the same size."""
    reference = write(family, tmp_path / family, dtype=torch.bfloat16, **DENSE[family])
    tokens_T = torch.randint(0, VOCAB_SIZE, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    ours_TV = run_ranks(1, packed_logits, str(tmp_path / family), tokens_T)[0]

    def expected(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(part[None]).logits[0].float() for part in tokens_T.split(LENGTHS)])

    theirs_TV = expected(reference)
    exact_TV = expected(reference.float())
    assert (ours_TV - exact_TV).norm() <= 2 * (theirs_TV - exact_TV).norm()


def train(tmp_path: Path, recipe: str, *overrides: str) -> list[dict[str, Any]]:
    """Metrics of three steps of a recipe in bf16: two ranks over NCCL, a server on the third device."""
    subprocess.run(
        [
            sys.executable,
            *("-m", "drpo_megatron.cli", "train", str(ROOT / "configs" / f"{recipe}.yaml")),
            f"tracking.directory={tmp_path}",
            f"model.path={tmp_path / 'model'}",
            "model.dtype=bfloat16",
            "tracking.wandb=false",
            "training.steps=3",
            *overrides,
        ],
        check=True,
        timeout=900,
    )
    steps = [json.loads(line) for line in (tmp_path / recipe / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    return steps


@needs_three
@pytest.mark.parametrize("transport", ["distributed", "shared_memory", "disk", "delta"])
def test_quickstart_on_gpus(tmp_path: Path, transport: str) -> None:
    """NCCL, the distributed optimizer, checksums of GPU weights; the other ways for weights."""
    steps = train(tmp_path, "quickstart", f"sync.transport={transport}")
    assert all(s["sync/verified_parameters"] > 0 for s in steps)
    # bf16 on both sides: a few units in the last place of a log-probability of some nats
    assert all(s["mismatch/abs_dlogp_mean"] < 0.05 for s in steps)


@needs_three
def test_routing_replay_on_gpus(tmp_path: Path) -> None:
    """Transformer Engine's layers with our router, grouped experts over two ranks, experts recorded by SGLang."""
    steps = train(tmp_path, "tiny-qwen3-moe")
    assert all(s["sync/verified_parameters"] > 0 for s in steps)
    assert all(s["mismatch/router_disagreement"] == 0 for s in steps)
    assert all(s["mismatch/abs_dlogp_mean"] < 0.05 for s in steps)

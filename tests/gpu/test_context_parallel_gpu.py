"""Context parallelism with Transformer Engine's attention over NCCL, which only GPUs can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launch import run_ranks
from tests.support.tiny_models import VOCAB_SIZE, write
from tests.support.updates import DELTA, make_sequences, run_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: one a context-parallel rank"),
]

# Multiples of four, for two ranks.
LENGTHS = (8, 4, 92, 32)


def local_logits(model_path: str, tokens_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(where this rank's tokens are in the pack, their logits), float32 on the CPU."""
    import torch.distributed as dist

    from drpo_megatron.models.builder import build_model, forward_packed, logits
    from drpo_megatron.models.context_attention import context_positions
    from drpo_megatron.models.hf_config import HFModelConfig
    from drpo_megatron.platform import device, distributed, spec_backend
    from drpo_megatron.platform.layout import ParallelLayout
    from drpo_megatron.weights.importer import load_hf

    assert spec_backend() == "transformer_engine"
    layout = ParallelLayout(context=2)
    distributed.initialize(layout)
    hf = HFModelConfig.load(model_path)
    (model,) = build_model(hf, layout, params_dtype=torch.bfloat16, spec_backend=spec_backend())
    load_hf([model], model_path, hf)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    mine = context_positions(bounds.tolist(), dist.get_rank(), layout.context)
    positions_T = torch.cat([torch.arange(n) for n in LENGTHS])
    with torch.no_grad():
        hidden = forward_packed(
            model, tokens_T[mine].to(device()), positions_T[mine].to(device()), bounds.to(device()), max(LENGTHS)
        )
        logits_TV = logits(model, hf, hidden).float().cpu()
    distributed.shutdown()
    return mine, logits_TV


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_context_parallel_logits(tmp_path: Path, family: str) -> None:
    """bf16 rounds to 2^-8: the error of both engines against float32 must be of the same size."""
    reference = write(family, tmp_path / family, dtype=torch.bfloat16)
    tokens_T = torch.randint(0, VOCAB_SIZE, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    parts = run_ranks(2, local_logits, str(tmp_path / family), tokens_T)
    ours_TV = torch.empty(sum(LENGTHS), VOCAB_SIZE)
    for mine, logits_TV in parts:
        ours_TV[mine] = logits_TV

    def expected(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(part[None]).logits[0].float() for part in tokens_T.split(LENGTHS)])

    theirs_TV = expected(reference)
    exact_TV = expected(reference.float())
    assert (ours_TV - exact_TV).norm() <= 2 * (theirs_TV - exact_TV).norm()


def updates(model_path: str, parallels: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Metrics of one bf16 update under each layout, over all ranks."""
    import torch.distributed as dist

    from drpo_megatron.algorithms import TokenStats, summarize
    from drpo_megatron.config.schema import RunConfig
    from drpo_megatron.platform import distributed

    reports = []
    for index, parallel in enumerate(parallels):
        plain = run_config(Path(model_path), parallel).model_dump()
        plain["model"]["dtype"] = "bfloat16"
        config = RunConfig.model_validate(plain)
        start = distributed.initialize if index == 0 else distributed.change_layout
        start(config.layout, timeout_s=60, seed=0)
        from drpo_megatron.training.step import Policy

        result = Policy(config).update(make_sequences(VOCAB_SIZE), version=0)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, result.stats)
        metrics = summarize(TokenStats.cat([s for s in everyone if s is not None]), DELTA)
        reports.append(metrics | {"grad_norm": result.grad_norm})
    distributed.shutdown()
    return reports


def test_context_parallel_update(tmp_path: Path) -> None:
    """Equal to the data-parallel update of the same sequences, up to bf16's rounding of other partial sums."""
    write("llama", tmp_path / "llama", dtype=torch.bfloat16)
    data, context = run_ranks(2, updates, str(tmp_path / "llama"), [{"data": 2}, {"context": 2}])[0]
    assert context["policy/entropy"] == pytest.approx(data["policy/entropy"], rel=0.01)
    assert context["grad_norm"] == pytest.approx(data["grad_norm"], rel=0.05)

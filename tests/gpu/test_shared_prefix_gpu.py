"""Shared prefixes through FlexAttention in Transformer Engine's layers, which only a GPU can show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drpo_megatron.bench.prefix import synthetic_updates
from tests.support.launch import run_ranks
from tests.support.tiny_models import VOCAB_SIZE, write
from tests.support.updates import DELTA, run_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device for FlexAttention's kernel"),
]


def test_flex_attention() -> None:
    """Output and gradients of the compiled kernel against torch's SDPA, both in bf16, relative to float32."""
    from drpo_megatron.models.flex_attention import flex_prefix_attention
    from drpo_megatron.models.packs import prefix_packed_seq_params
    from drpo_megatron.models.prefix_attention import prefix_attention
    from drpo_megatron.models.shared_prefixes import SharedPrefixes

    prefixes = SharedPrefixes((0, 200, 300, 420, 431, 760), (-1, 0, 0, 0, -1))
    pack = prefix_packed_seq_params(prefixes, prefixes.position_ids().cuda())
    generator = torch.Generator("cuda").manual_seed(0)
    leaves = [torch.randn(760, heads, 64, device="cuda", generator=generator) for heads in (8, 2, 2)]
    cotangent = torch.randn(760, 512, device="cuda", generator=generator)

    def results(attend: object, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in leaves]
        output = attend(*inputs, pack, None)  # type: ignore[operator]
        return [output.float(), *(g.float() for g in torch.autograd.grad(output, inputs, cotangent.to(dtype)))]

    exact = results(prefix_attention, torch.float32)
    theirs = results(prefix_attention, torch.bfloat16)
    ours = results(flex_prefix_attention, torch.bfloat16)
    for expected, sdpa, flex in zip(exact, theirs, ours, strict=True):
        assert (flex - expected).norm() <= 2 * (sdpa - expected).norm()


def updates(model_path: str) -> list[dict[str, float]]:
    """Metrics of one bf16 update, packed plainly and with shared prefixes."""
    from drpo_megatron.algorithms import summarize
    from drpo_megatron.config.schema import RunConfig
    from drpo_megatron.platform import distributed, spec_backend

    assert spec_backend() == "transformer_engine"
    (sequences,) = synthetic_updates(1, groups=2, samples=4, vocabulary=VOCAB_SIZE)
    reports = []
    for mode in ("never", "always"):
        plain = run_config(Path(model_path), {}).model_dump()
        plain["model"]["dtype"] = "bfloat16"
        plain["training"]["shared_prefix"] = mode
        config = RunConfig.model_validate(plain)
        start = distributed.initialize if mode == "never" else distributed.change_layout
        start(config.layout, timeout_s=60, seed=0)
        from drpo_megatron.training.step import Policy

        result = Policy(config).update(sequences, version=0)
        assert result.stats is not None
        reports.append(summarize(result.stats, DELTA) | {"grad_norm": result.grad_norm})
    distributed.shutdown()
    return reports


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shared_prefix_update(tmp_path: Path, family: str) -> None:
    write(family, tmp_path / family, dtype=torch.bfloat16)
    never, always = run_ranks(1, updates, str(tmp_path / family))[0]
    assert always["policy/entropy"] == pytest.approx(never["policy/entropy"], rel=0.01)
    assert always["grad_norm"] == pytest.approx(never["grad_norm"], rel=0.05)

"""Moments below float32: Megatron-Core's distributed optimizer over Transformer Engine's real `FusedAdam`, of which
only the CUDA kernels are stand-ins, against AdamW written out here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import te_install, tiny_models
from tests.parity import Case, configuration
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

REDUCED = {
    "bfloat16": {"optimizer.exp_avg_dtype": "bfloat16", "optimizer.exp_avg_sq_dtype": "bfloat16"},
    "first moment": {"optimizer.exp_avg_dtype": "bfloat16"},
}
UPDATES, CLIP, DECAY, LR = 4, 0.5, 0.1, 1e-2
EPS = 1e-3  # so that steps depend on the size of gradients, and clipping shows


def _on_two_ranks(root: Path, te_path: str | None) -> dict[str, Any]:
    if te_path is not None:
        sys.path.insert(0, te_path)
    import torch.distributed as dist

    from drpo_megatron import platform
    from drpo_megatron.platform import cpu
    from tests import te_kernels

    te_kernels.install()
    cpu._CUDA_ONLY_PACKAGES = tuple(name for name in cpu._CUDA_ONLY_PACKAGES if name != "transformer_engine")
    platform.activate()
    from transformer_engine.pytorch.optimizers import FusedAdam

    from drpo_megatron.checkpoint.manifest import CheckpointError
    from drpo_megatron.checkpoint.saver import Saver
    from drpo_megatron.models.memory import AdamBytes
    from drpo_megatron.platform import distributed
    from drpo_megatron.training.optimizer import apply_update
    from drpo_megatron.training.step import Policy

    def configured(name: str, **settings: Any) -> Any:
        own = {"optimizer.lr": LR, "optimizer.weight_decay": DECAY, "optimizer.eps": EPS, "optimizer.clip_grad": CLIP}
        own |= {"optimizer.overlap_grad_reduce": False, "model.dtype": "bfloat16"}
        saved = {"save.every": 1, "save.asynchronous": False, "save.directory": root / name.replace(" ", "-")}
        return configuration(Case(name, "qwen3", {"data": 2}, own | saved | settings), root / "model")

    def gradients(policy: Policy, update: int, rank: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * update + rank)
        return {
            name: torch.randn(p.shape, generator=generator) * 10 ** -(index % 3)
            for index, (name, p) in enumerate(policy.chunks[0].module.named_parameters())
        }

    def update(policy: Policy, number: int) -> float:
        (chunk,) = policy.chunks
        chunk.zero_grad_buffer()
        mine = gradients(policy, number, dist.get_rank())
        for name, p in chunk.module.named_parameters():
            p.main_grad.copy_(mine[name])
        chunk.finish_grad_sync()
        norm, applied = apply_update(policy.optimizer, CLIP)
        assert applied
        return norm

    def weights(policy: Policy) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in policy.chunks[0].module.named_parameters()}

    distributed.initialize(configured("", **{}).layout, timeout_s=60, seed=0)
    report: dict[str, Any] = {}
    for name, reduced in REDUCED.items():
        config = configured(name, **reduced)
        policy = Policy(config)
        dtypes = {key: getattr(torch, getattr(config.optimizer, f"{key}_dtype")) for key in ("exp_avg", "exp_avg_sq")}
        main = {n: w.float() for n, w in weights(policy).items()}
        moments = {n: {key: torch.zeros_like(w) for key in dtypes} for n, w in main.items()}
        norms = []
        for number in range(1, UPDATES + 1):
            if number == UPDATES:
                saver = Saver(config)
                saver.save(policy, 3, 3, {}, {})
                saver.close()
            norm = update(policy, number)
            both = [gradients(policy, number, rank) for rank in range(2)]
            whole = {n: both[0][n] + both[1][n] for n in main}
            expected_norm = float(torch.stack([g.norm() for g in whole.values()]).norm())
            norms.append(norm / expected_norm - 1)
            for n, g in whole.items():
                g = g * min(1.0, CLIP / (expected_norm + 1e-6))
                m, v = moments[n]["exp_avg"], moments[n]["exp_avg_sq"]
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                decay = 0.0 if main[n].dim() == 1 else DECAY
                step = (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + EPS)
                main[n] = main[n] - LR * (step + decay * main[n])
                moments[n] = {key: t.to(dtypes[key]).float() for key, t in (("exp_avg", m), ("exp_avg_sq", v))}
        after = weights(policy)
        (part,) = policy.optimizer.chained_optimizers
        states = [s for s in part.optimizer.state.values() if s]
        numel = sum(s["exp_avg"].numel() for s in states)
        bytes_of = {key: sum(s[key].nbytes for s in states) for key in ("exp_avg", "exp_avg_sq", "master_param")}
        adam = AdamBytes.of(config)

        resumed = Policy(config)
        assert Saver(config).resume(resumed) is not None
        update(resumed, UPDATES)
        report[name] = {
            "class": isinstance(part.optimizer, FusedAdam),
            "norms": norms,
            "worst": max(float((after[n].float() - w).abs().max() / w.abs().max()) for n, w in main.items()),
            "moved": max(float((after[n].float() - w).abs().max()) for n, w in weights(Policy(config)).items()),
            "moments": bytes_of["exp_avg"] + bytes_of["exp_avg_sq"] - numel * adam.moments,
            "main": bytes_of["master_param"] - numel * adam.main_weight,
            "resumed": all(torch.equal(w, after[n]) for n, w in weights(resumed).items()),
        }
        try:
            Saver(configured(name)).resume(Policy(configured(name)))
        except CheckpointError as error:
            report[name]["other dtype"] = str(error)
    fp8 = Policy(configured("fp8", **{"optimizer.exp_avg_dtype": "fp8"})).optimizer.chained_optimizers[0].optimizer
    report["fp8"] = {"exp_avg": str(fp8.exp_avg_dtype), "exp_avg_sq": str(fp8.exp_avg_sq_dtype)}
    distributed.shutdown()
    return report


def test_moments_below_float32(tmp_path: Path) -> None:
    """Two data-parallel ranks: four clipped updates are those of AdamW with rounded moments, on both ranks; states have
    the bytes that the plan counts; a checkpoint goes on to the bit, and not with other moments.
    """
    tiny_models.write("qwen3", tmp_path / "model")
    with te_install.directory() as path:
        ranks = run_ranks(2, _on_two_ranks, tmp_path, path, spawn=True)
    for report in ranks:
        for name in REDUCED:
            of = report[name]
            assert of["class"]
            assert max(abs(n) for n in of["norms"]) < 1e-5
            # Half a step of bfloat16: what is compared is the weight that is trained with.
            assert of["worst"] < 2**-8, name
            assert of["moved"] > 0.01
            assert of["moments"] == 0 and of["main"] == 0
            assert of["resumed"]
            assert "optimizer.exp_avg_dtype = bfloat16, now it is float32" in of["other dtype"]
        assert report["fp8"] == {"exp_avg": "torch.uint8", "exp_avg_sq": "torch.float32"}

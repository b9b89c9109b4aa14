"""Moments in bfloat16: Megatron-Core's distributed optimizer over Transformer Engine's real `FusedAdam`, of which
only the CUDA kernels are stand-ins, against AdamW written out here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import te_install, tiny_models
from tests.support.launch import run_ranks
from tests.support.parity import Case, configuration

pytestmark = pytest.mark.distributed

UPDATES, CLIP, DECAY, LR = 4, 0.5, 0.1, 1e-2
EPS = 1e-3  # so that steps depend on the size of gradients, and clipping shows


def _on_two_ranks(root: Path, te_path: str | None) -> dict[str, Any]:
    if te_path is not None:
        sys.path.insert(0, te_path)
    import torch.distributed as dist

    from drpo_megatron import platform
    from drpo_megatron.platform import cpu
    from tests.support import te_kernels

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

    def configured(dtype: str) -> Any:
        settings = {"optimizer.lr": LR, "optimizer.weight_decay": DECAY, "optimizer.eps": EPS}
        settings |= {"optimizer.clip_grad": CLIP, "optimizer.overlap_grad_reduce": False, "model.dtype": "bfloat16"}
        settings |= {"save.every": 1, "save.asynchronous": False, "save.directory": root / "checkpoints"}
        return configuration(Case(dtype, "qwen3", {"data": 2}, settings | {"optimizer.moments_dtype": dtype}), root)

    def gradients(policy: Policy, update: int, rank: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(100 * update + rank)
        return {
            name: torch.randn(p.shape, generator=generator) * 10 ** -(index % 3)
            for index, (name, p) in enumerate(policy.chunks[0].module.named_parameters())
        }

    def update(policy: Policy, number: int, factor: float = 1.0) -> tuple[float, bool]:
        (chunk,) = policy.chunks
        chunk.zero_grad_buffer()
        mine = gradients(policy, number, dist.get_rank())
        for name, p in chunk.module.named_parameters():
            p.main_grad.copy_(mine[name] * factor)
        chunk.finish_grad_sync()
        return apply_update(policy.optimizer, CLIP)

    def save(policy: Policy, step: int) -> None:
        saver = Saver(config)
        saver.save(policy, step, step, {}, {})
        saver.close()

    def weights(policy: Policy) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in policy.chunks[0].module.named_parameters()}

    config = configured("bfloat16")
    distributed.initialize(config.layout, seed=0)
    policy = Policy(config)
    before = weights(policy)
    skipped = not update(policy, 0, factor=float("nan"))[1]
    save(policy, 0)  # which makes states with a step of rate 0
    untouched = all(torch.equal(w, before[n]) for n, w in weights(policy).items())

    main = {n: w.float() for n, w in before.items()}
    moments = {n: (torch.zeros_like(w), torch.zeros_like(w)) for n, w in main.items()}
    norms = []
    for number in range(1, UPDATES + 1):
        if number == UPDATES:
            save(policy, number - 1)
        norm, applied = update(policy, number)
        assert applied
        both = [gradients(policy, number, rank) for rank in range(2)]
        whole = {n: both[0][n] + both[1][n] for n in main}
        expected_norm = float(torch.stack([g.norm() for g in whole.values()]).norm())
        norms.append(norm / expected_norm - 1)
        for n, g in whole.items():
            g = g * min(1.0, CLIP / (expected_norm + 1e-6))
            m, v = moments[n]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            decay = 0.0 if main[n].dim() == 1 else DECAY
            step = (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + EPS)
            main[n] = main[n] - LR * (step + decay * main[n])
            moments[n] = m.bfloat16().float(), v.bfloat16().float()
    after = weights(policy)
    (part,) = policy.optimizer.chained_optimizers
    states = [s for s in part.optimizer.state.values() if s]
    numel = sum(s["exp_avg"].numel() for s in states)
    counted = AdamBytes.of(config)

    resumed = Policy(config)
    assert Saver(config).resume(resumed) is not None
    (again,) = resumed.optimizer.chained_optimizers
    left = [p for group in again.optimizer.param_groups for p in group["params"] if p.grad is not None]
    update(resumed, UPDATES)
    other = configured("float32")
    with pytest.raises(CheckpointError) as refused:
        Saver(other).resume(Policy(other))
    distributed.shutdown()
    return {
        "class": isinstance(part.optimizer, FusedAdam),
        "skipped": skipped and untouched,
        "norms": norms,
        "worst": max(float((after[n].float() - w).abs().max() / w.abs().max()) for n, w in main.items()),
        "moved": max(float((after[n] - w).abs().max()) for n, w in before.items()),
        "moments": sum(s[key].nbytes for s in states for key in ("exp_avg", "exp_avg_sq")) - numel * counted.moments,
        "main": sum(s["master_param"].nbytes for s in states) - numel * counted.main_weight,
        "gradients left": len(left),
        "resumed": all(torch.equal(w, after[n]) for n, w in weights(resumed).items()),
        "refused": str(refused.value),
    }


def test_moments_in_bfloat16(tmp_path: Path) -> None:
    """Two data-parallel ranks: four clipped updates are those of AdamW with rounded moments, on both ranks; states have
    the bytes that the plan counts; a checkpoint after a skipped update changes nothing, one later goes on to the bit,
    and not with other moments.
    """
    tiny_models.write("qwen3", tmp_path)
    path = te_install.directory()
    ranks = run_ranks(2, _on_two_ranks, tmp_path, path, spawn=True)
    for of in ranks:
        assert of["class"] and of["skipped"]
        assert max(abs(n) for n in of["norms"]) < 1e-5
        # Half a step of bfloat16: what is compared is the weight that is trained with.
        assert of["worst"] < 2**-8
        assert of["moved"] > 0.01
        assert of["moments"] == 0 and of["main"] == 0
        assert of["gradients left"] == 0 and of["resumed"]
        assert "optimizer.moments_dtype = bfloat16, now it is float32" in of["refused"]

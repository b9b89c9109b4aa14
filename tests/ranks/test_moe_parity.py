"""Mixture of experts and multi-latent attention equal transformers', with experts divided over ranks in every way.

Data-parallel ranks have different tokens: an expert's rank computes for tokens that it did not read.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

from drpo_megatron.platform.layout import ParallelLayout
from tests.ranks.test_model_parity import LENGTHS, hf_tensors, packed_batch, pipeline_logits, same_directory
from tests.support import tiny_models
from tests.support.launch import run_ranks

pytestmark = pytest.mark.distributed

FAMILIES = ("qwen3_moe", "deepseek_v3")
MICRO_BATCHES = 2
TWO_RANKS = {
    "dp2": ParallelLayout(data=2),
    "ep2": ParallelLayout(data=2, expert=2),
    "ep2-allgather": ParallelLayout(data=2, expert=2, moe_dispatcher="allgather"),
    "etp2": ParallelLayout(data=2, expert_tensor=2),
    "tp2sp": ParallelLayout(tensor=2, sequence_parallel=True),
    "tp2sp-ep2": ParallelLayout(tensor=2, sequence_parallel=True, expert=2),
    "tp2sp-etp2": ParallelLayout(tensor=2, sequence_parallel=True, expert_tensor=2),
    "pp2": ParallelLayout(pipeline=2),
}
FOUR_RANKS = {
    "dp2-tp2sp-ep2": ParallelLayout(tensor=2, sequence_parallel=True, data=2, expert=2),
    "dp2-tp2sp-ep2-etp2": ParallelLayout(tensor=2, sequence_parallel=True, data=2, expert=2, expert_tensor=2),
    "dp2-tp2sp-ep4-allgather": ParallelLayout(
        tensor=2, sequence_parallel=True, data=2, expert=4, moe_dispatcher="allgather"
    ),
    "dp2-pp2-ep2": ParallelLayout(pipeline=2, data=2, expert=2),
    "vpp2-tp2sp-ep2": ParallelLayout(tensor=2, sequence_parallel=True, expert=2, pipeline=2, virtual_pipeline=2),
}
# Recomputing a layer routes its tokens again.
RECOMPUTED = ("ep2-allgather", "dp2-tp2sp-ep2")


def batch_seeds(layout: ParallelLayout, data_rank: int) -> range:
    """Seeds of a data-parallel rank's micro-batches."""
    return range(MICRO_BATCHES * data_rank, MICRO_BATCHES * (data_rank + 1))


def cotangent(seed: int, hidden_size: int) -> torch.Tensor:
    """[T, H]: the gradient of the loss by the hidden states after the final norm."""
    return torch.randn(sum(LENGTHS), hidden_size, generator=torch.Generator().manual_seed(100 + seed))


def transformers_results(model: Any) -> tuple[dict[int, torch.Tensor], dict[int, dict[str, torch.Tensor]]]:
    """transformers' logits and its gradients by Hugging Face name, both by the seed of the batch."""
    logits, gradients = {}, {}
    for seed in range(2 * MICRO_BATCHES):
        model.zero_grad()
        sequences = packed_batch(seed)[0].split(LENGTHS)
        hidden_TH = torch.cat([model.model(s[None]).last_hidden_state[0] for s in sequences])
        (hidden_TH * cotangent(seed, hidden_TH.size(1))).sum().backward()
        logits[seed] = model.lm_head(hidden_TH).detach()
        # A parameter without a gradient is the output projection, or a prediction layer that does not take part.
        stacked = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        gradients[seed] = revert_weight_conversion(model, stacked)
    return logits, gradients


def hf_gradients(chunks: list[Any], hf: Any, layout: ParallelLayout) -> dict[str, np.ndarray]:
    """The gradients of all ranks' batches by Hugging Face name, on rank 0. Overwrites the weights with them."""
    from megatron.core import parallel_state as ps
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from drpo_megatron.models.builder import forward_packed
    from drpo_megatron.training.optimizer import wrap_data_parallel
    from drpo_megatron.weights.exporter import iter_hf_tensors

    def forward_step(batches: Any, model: Any) -> Any:
        seed = next(batches)
        hidden_1TH = forward_packed(model, *packed_batch(seed), max(LENGTHS))

        def loss(output_1TH: torch.Tensor) -> Any:
            mine = cotangent(seed, hf.hidden_size)
            if layout.sequence_parallel:
                mine = mine.chunk(layout.tensor)[ps.get_tensor_model_parallel_rank()]
            return (output_1TH.squeeze(0) * mine).sum(), torch.tensor(len(mine), dtype=torch.int), {}

        return hidden_1TH, loss

    wrapped = wrap_data_parallel(chunks, distributed_optimizer=False)
    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    seeds = batch_seeds(layout, ps.get_data_parallel_rank())
    rows = sum(LENGTHS)
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(seeds) for _ in wrapped],
        model=wrapped,
        num_microbatches=MICRO_BATCHES,
        seq_length=rows,
        micro_batch_size=1,
        forward_only=False,
    )
    with torch.no_grad():
        for chunk in wrapped:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    return {name: t.numpy().copy() for bucket in iter_hf_tensors(chunks, hf) for name, t in bucket}


def _check_family(root: Path, family: str, key: str, layout: ParallelLayout) -> dict[str, Any]:
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    from drpo_megatron.models.builder import build_model
    from drpo_megatron.models.hf_config import HFModelConfig
    from drpo_megatron.weights.exporter import iter_hf_tensors, save_hf
    from drpo_megatron.weights.importer import load_hf

    source = root / f"{family}-fp32"
    hf = HFModelConfig.load(source)
    recompute = "full" if key in RECOMPUTED else "none"
    chunks = build_model(hf, layout, params_dtype=torch.float32, recompute=recompute, spec_backend="local")
    load_hf(chunks, source, hf)
    data_rank = ps.get_data_parallel_rank()
    answer: dict[str, Any] = {
        "data_rank": data_rank,
        "logits": pipeline_logits(chunks, hf, layout, seed=batch_seeds(layout, data_rank)[0]),
    }
    buckets = list(iter_hf_tensors(chunks, hf, dtype=torch.bfloat16, bucket_bytes=20_000))
    answer["buckets"] = len(buckets)
    answer["stream"] = [(name, str(tensor.dtype), tuple(tensor.shape)) for bucket in buckets for name, tensor in bucket]
    answer["gradients"] = hf_gradients(chunks, hf, layout)

    source = root / f"{family}-bf16"
    chunks = build_model(hf, layout, params_dtype=torch.bfloat16, spec_backend="local")
    load_hf(chunks, source, hf)
    out = root / f"{family}-{key}-exported"
    save_hf(chunks, hf, out, source, max_shard_bytes=100_000)
    if dist.get_rank() == 0:
        same_directory(out, source)
    return answer


def _all_layouts(root: Path, layouts: dict[str, ParallelLayout]) -> dict[str, Any]:
    from drpo_megatron.platform.distributed import change_layout, initialize, shutdown

    answers: dict[str, Any] = {}
    for i, (key, layout) in enumerate(layouts.items()):
        if i == 0:
            initialize(layout, timeout_s=60, seed=1)
        else:
            change_layout(layout, timeout_s=60)
        for family in FAMILIES:
            answers[f"{family}-{key}"] = _check_family(root, family, key, layout)
    shutdown()
    return answers


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("models")
    expected = {}
    for family in FAMILIES:
        expected[family] = transformers_results(tiny_models.write(family, root / f"{family}-fp32"))
        tiny_models.write(family, root / f"{family}-bf16", dtype=torch.bfloat16, max_shard_size="60KB")
    return root, expected


@pytest.mark.parametrize(("world", "layouts"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["2 ranks", "4 ranks"])
def test_parity_with_transformers(
    world: int, layouts: dict[str, ParallelLayout], reference: tuple[Path, dict[str, Any]]
) -> None:
    root, expected = reference
    ranks = run_ranks(world, _all_layouts, root, layouts)
    for key, layout in layouts.items():
        for family in FAMILIES:
            case = f"{family}-{key}"
            logits, gradients = expected[family]
            answers = [r[case] for r in ranks]
            _logits_are_equal(case, layout, answers, logits)
            _stream_is_complete(answers, root / f"{family}-fp32")
            seeds = [s for rank in range(layout.data) for s in batch_seeds(layout, rank)]
            total = {name: sum(gradients[seed][name] for seed in seeds) for name in gradients[0]}
            _gradients_are_equal(case, answers[0]["gradients"], total)


def _logits_are_equal(case: str, layout: ParallelLayout, answers: list[Any], logits: dict[int, torch.Tensor]) -> None:
    last_stage = [a for a in answers if a["logits"] is not None]
    assert len(last_stage) == len(answers) // layout.pipeline
    assert {a["data_rank"] for a in last_stage} == set(range(layout.data))
    for answer in last_stage:
        expected = logits[batch_seeds(layout, answer["data_rank"])[0]]
        assert expected.std() > 0.5
        actual = torch.from_numpy(answer["logits"])
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0, msg=lambda m: f"{case}: {m}")


def _stream_is_complete(answers: list[Any], source: Path) -> None:
    """Each name once, in the dtype asked for, except the router's bias; all on rank 0; the same buckets everywhere."""
    tensors = hf_tensors(source)
    stream = answers[0]["stream"]
    assert Counter(name for name, _, _ in stream) == Counter(list(tensors))
    for name, dtype, shape in stream:
        kept = name.endswith("e_score_correction_bias")
        assert (dtype, shape) == ("torch.float32" if kept else "torch.bfloat16", tuple(tensors[name].shape)), name
    assert {len(a["stream"]) for a in answers[1:]} == {0}
    assert len({a["buckets"] for a in answers}) == 1 and answers[0]["buckets"] > 10


def _gradients_are_equal(case: str, actual: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> None:
    outside = {name for name in actual if name == "lm_head.weight" or name.endswith("e_score_correction_bias")}
    assert actual.keys() - outside == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, f"{name} has no gradient in the reference"
        error = (torch.from_numpy(actual[name]) - gradient).abs().max() / scale
        assert error < 1e-3, f"{case}: {name} differs by {error:.1e} of its largest gradient"

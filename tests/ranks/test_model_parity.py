"""The built model equals transformers', and weights survive import and export to the bit, in layouts of two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from drpo_megatron.platform.layout import ParallelLayout
from tests.support import tiny_models
from tests.support.launch import run_ranks

pytestmark = pytest.mark.distributed

FAMILIES = ("llama", "qwen2", "qwen3")
LAYOUTS = {
    "tp1": ParallelLayout(data=2),
    "tp2": ParallelLayout(tensor=2),
    "tp2sp": ParallelLayout(tensor=2, sequence_parallel=True),
    "pp2": ParallelLayout(pipeline=2),
    "vpp2": ParallelLayout(pipeline=2, virtual_pipeline=2),
    "pp2uneven": ParallelLayout(pipeline=2, first_stage_layers=1),
}
# Sums to an even number, which sequence parallelism needs. Longer than the llama3 rope's original context of 64.
LENGTHS = (5, 1, 90, 32)


def packed_batch(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens_T, position_ids_T, cu_seqlens of sequences of LENGTHS."""
    generator = torch.Generator().manual_seed(seed)
    tokens_T = torch.randint(0, tiny_models.VOCAB_SIZE, (sum(LENGTHS),), generator=generator)
    positions_T = torch.cat([torch.arange(n) for n in LENGTHS])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return tokens_T, positions_T, cu_seqlens


def pipeline_logits(chunks: list[Any], hf: Any, layout: ParallelLayout, seed: int = 3) -> np.ndarray | None:
    """Logits [T, V] where this rank has the last stage. Hidden states go from chunk to chunk by send and recv."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    from drpo_megatron.models.builder import forward_packed, logits

    tokens_T, positions_T, cu_seqlens = packed_batch(seed)
    rows = len(tokens_T) // (layout.tensor if layout.sequence_parallel else 1)
    stage = ps.get_pipeline_model_parallel_rank()
    result = None
    for number in range(layout.stages):
        chunk = chunks[number // layout.pipeline]
        if number % layout.pipeline != stage:
            continue
        if number > 0:
            received = torch.empty(rows, 1, hf.hidden_size)
            dist.recv(received, group=ps.get_pipeline_model_parallel_group(), group_src=(stage - 1) % layout.pipeline)
            chunk.set_input_tensor(received)
        with torch.no_grad():
            hidden = forward_packed(chunk, tokens_T, positions_T, cu_seqlens, max(LENGTHS))
        if number < layout.stages - 1:
            assert hidden.shape == (rows, 1, hf.hidden_size)
            dist.send(hidden, group=ps.get_pipeline_model_parallel_group(), group_dst=(stage + 1) % layout.pipeline)
        else:
            assert hidden.shape == (1, rows, hf.hidden_size)
            # numpy: torch shares a tensor through a file that is gone once this process has ended.
            result = logits(chunk, hf, hidden).numpy()
    return result


def _batch_layout_equals_packed(chunk: Any) -> None:
    """[s, b, h] attention equals packing the same sequences, also when max_seqlen is the packed length."""
    from drpo_megatron.models.builder import forward_packed

    tokens_T, _, _ = packed_batch()
    length = len(tokens_T) // 2
    tokens_BS, positions_BS = tokens_T.view(2, length), torch.arange(length).repeat(2, 1)
    with torch.no_grad():
        batched = chunk(input_ids=tokens_BS, position_ids=positions_BS, attention_mask=None)
        cu_seqlens = torch.tensor([0, length, 2 * length], dtype=torch.int32)
        packed, longest_is_all = (
            forward_packed(chunk, tokens_T, positions_BS.flatten(), cu_seqlens, n) for n in (length, 2 * length)
        )
    torch.testing.assert_close(packed.view_as(batched), batched, atol=1e-4, rtol=0)
    assert torch.equal(packed, longest_is_all)


def _gradients_stay_in_their_sequence(chunk: Any) -> None:
    """A loss on one packed sequence reaches all of its tokens, every parameter, and no token of the other sequences."""
    from drpo_megatron.models.builder import forward_packed

    tokens_T, positions_T, cu_seqlens = packed_batch()
    embedded: list[torch.Tensor] = []
    hook = chunk.embedding.register_forward_hook(lambda module, args, out: embedded.append(out) or out.retain_grad())
    chunk.train()
    hidden_1TH = forward_packed(chunk, tokens_T, positions_T, cu_seqlens, max(LENGTHS))
    start, end = LENGTHS[0] + LENGTHS[1], sum(LENGTHS[:3])
    hidden_1TH[:, start:end].square().sum().backward()
    hook.remove()
    gradient_T = embedded[0].grad.squeeze(1).abs().sum(-1)
    assert (gradient_T[start:end] > 0).all()
    assert gradient_T[:start].max() == 0 and gradient_T[end:].max() == 0
    untouched = [n for n, p in chunk.named_parameters() if p.grad is None and n != "output_layer.weight"]
    assert not untouched, untouched


def hf_tensors(hf_dir: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(hf_dir.glob("*.safetensors")) for k, v in load_file(file).items()}


def same_directory(exported: Path, source: Path) -> None:
    """Same names, dtypes and bits; every file beside the weights is carried; the index is right."""
    ours, theirs = hf_tensors(exported), hf_tensors(source)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    index_name = "model.safetensors.index.json"
    beside = {p.name for p in source.iterdir() if p.suffix != ".safetensors"} - {index_name}
    assert beside == {p.name for p in exported.iterdir() if p.suffix != ".safetensors"} - {index_name}
    for name in beside - {"config.json"}:
        assert (exported / name).read_bytes() == (source / name).read_bytes(), name
    assert json.loads((exported / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (exported / index_name).is_file()
    index = json.loads((exported / index_name).read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in theirs.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(exported / file)
    assert index["weight_map"].keys() == theirs.keys()


def _check_family(root: Path, family: str, key: str, layout: ParallelLayout) -> dict[str, Any]:
    import torch.distributed as dist

    from drpo_megatron.models.builder import build_model, output_weight
    from drpo_megatron.models.hf_config import HFModelConfig
    from drpo_megatron.weights.exporter import iter_hf_tensors, save_hf
    from drpo_megatron.weights.importer import load_hf

    source = root / f"{family}-fp32"
    hf = HFModelConfig.load(source)
    chunks = build_model(hf, layout, params_dtype=torch.float32, spec_backend="local")
    load_hf(chunks, source, hf)
    answer: dict[str, Any] = {"logits": pipeline_logits(chunks, hf, layout)}
    weight = output_weight(chunks[-1])
    answer["has_output"] = weight is not None
    if weight is not None:
        assert weight.requires_grad and weight.shape[0] * layout.tensor >= hf.vocab_size
    if key == "tp1":
        _batch_layout_equals_packed(chunks[0])
        _gradients_stay_in_their_sequence(chunks[0])
    answer["buckets"] = [len(bucket) for bucket in iter_hf_tensors(chunks, hf, bucket_bytes=30_000)]
    answer["largest"] = max(
        (sum(t.numel() * 4 for _, t in bucket) for bucket in iter_hf_tensors(chunks, hf, bucket_bytes=200_000)),
    )

    source = root / f"{family}-bf16"
    chunks = build_model(hf, layout, params_dtype=torch.bfloat16, spec_backend="local")
    load_hf(chunks, source, hf)
    out = root / f"{family}-{key}-exported"
    save_hf(chunks, hf, out, source, max_shard_bytes=100_000)
    if dist.get_rank() == 0:
        same_directory(out, source)
    return answer


def _refused(root: Path, layout: ParallelLayout) -> dict[str, str]:
    """What load_hf says about directories that do not fit."""
    from drpo_megatron.models.builder import build_model
    from drpo_megatron.models.hf_config import HFModelConfig
    from drpo_megatron.weights.importer import load_hf

    hf = HFModelConfig.load(root / "qwen2-fp32")
    said = {}
    for case in ("truncated", "lost", "extra", "short"):
        chunks = build_model(hf, layout, params_dtype=torch.float32, spec_backend="local")
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_hf(chunks, root / case, hf)
        said[case] = str(error.value)
    return said


def _all_layouts(root: Path) -> dict[str, Any]:
    import megatron.core  # noqa: F401 - before the CPU redirect: the order must not matter

    from drpo_megatron.platform.distributed import change_layout, control_group, initialize, shutdown

    answers: dict[str, Any] = {}
    for i, (key, layout) in enumerate(LAYOUTS.items()):
        if i == 0:
            initialize(layout, timeout_s=60, seed=1)
        else:
            change_layout(layout, timeout_s=60)
        assert control_group().size() == 2
        for family in FAMILIES:
            answers[f"{family}-{key}"] = _check_family(root, family, key, layout)
        if key == "tp1":
            answers["refused"] = _refused(root, layout)
    shutdown()
    return answers


def _damaged_directories(root: Path) -> None:
    for case in ("truncated", "lost", "extra", "short"):
        shutil.copytree(root / "qwen2-sharded", root / case)
    index_file = "model.safetensors.index.json"
    index = json.loads((root / "lost" / index_file).read_text())
    norm_shard = index["weight_map"]["model.norm.weight"]
    (root / "lost" / norm_shard).unlink()
    damaged = root / "truncated" / norm_shard
    damaged.write_bytes(damaged.read_bytes()[:-16])
    index["weight_map"]["model.layers.0.self_attn.sinks"] = norm_shard
    (root / "extra" / index_file).write_text(json.dumps(index))
    del index["weight_map"]["model.layers.0.self_attn.sinks"], index["weight_map"]["model.norm.weight"]
    (root / "short" / index_file).write_text(json.dumps(index))


def test_parity_with_transformers_and_bit_exact_round_trip(tmp_path: Path) -> None:
    tokens_T, _, _ = packed_batch()
    expected = {}
    for family in FAMILIES:
        model = tiny_models.write(family, tmp_path / f"{family}-fp32")
        with torch.no_grad():
            expected[family] = torch.cat([model(s[None]).logits[0] for s in tokens_T.split(LENGTHS)])
        tiny_models.write(family, tmp_path / f"{family}-bf16", dtype=torch.bfloat16, max_shard_size="60KB")
    tiny_models.write("qwen2", tmp_path / "qwen2-sharded", max_shard_size="60KB")
    _damaged_directories(tmp_path)

    ranks = run_ranks(2, _all_layouts, tmp_path)

    for key, layout in LAYOUTS.items():
        for family in FAMILIES:
            case = f"{family}-{key}"
            answers = [r[case] for r in ranks]
            with_logits = [a["logits"] for a in answers if a["logits"] is not None]
            assert len(with_logits) == (1 if layout.pipeline == 2 else 2)
            for actual in map(torch.from_numpy, with_logits):
                assert actual.shape == expected[family].shape
                assert expected[family].std() > 0.5
                torch.testing.assert_close(
                    actual, expected[family], atol=1e-4, rtol=0, msg=lambda m, c=case: f"{c}: {m}"
                )
            assert [a["has_output"] for a in answers] == ([False, True] if layout.pipeline == 2 else [True, True])
            assert len(answers[0]["buckets"]) == len(answers[1]["buckets"]) > 4
            assert sum(answers[0]["buckets"]) > 30 and sum(answers[1]["buckets"]) == 0
            assert 0 < answers[0]["largest"] <= 200_000
    said = ranks[0]["refused"]
    for case, words in {
        "truncated": ["/truncated/model-", "(tensor model.", "damaged"],
        "lost": ["/lost/model-", "hold tensor model.", "does not exist"],
        "extra": ["without a place", "model.layers.0.self_attn.sinks"],
        "short": ["missing tensors model.norm.weight"],
    }.items():
        for word in words:
            assert word in said[case], said[case]

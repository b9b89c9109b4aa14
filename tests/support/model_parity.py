"""Built models against transformers': logits, gradients, and weights after import and export, in every layout.

A case is an architecture. Its model is written once, with what transformers computes with it; each layout that it fits
then builds it, and every rank compares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.platform.layout import ParallelLayout
from tests.support import tiny_models
from tests.support.architectures import LAYOUTS, Case, Plan, fits
from tests.support.launch import run_ranks

LOGIT_BOUND = 1e-4
GRADIENT_BOUND = 1e-3
MICRO_BATCHES = 2
# Recomputing a layer routes its tokens again.
RECOMPUTED = ("ep2-allgather", "dp2-tp2sp-ep2")
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


def batch_seeds(layout: ParallelLayout, data_rank: int) -> range:
    """Seeds of a data-parallel rank's micro-batches."""
    return range(MICRO_BATCHES * data_rank, MICRO_BATCHES * (data_rank + 1))


def cotangent(seed: int, hidden_size: int) -> torch.Tensor:
    """[T, H]: the gradient of the loss by the hidden states after the final norm."""
    return torch.randn(sum(LENGTHS), hidden_size, generator=torch.Generator().manual_seed(100 + seed))


def transformers_results(model: Any, data: int) -> tuple[dict[int, torch.Tensor], dict[int, dict[str, torch.Tensor]]]:
    """transformers' logits and its gradients by Hugging Face name, both by the seed of the batch."""
    logits, gradients = {}, {}
    for seed in range(data * MICRO_BATCHES):
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


def write(root: Path, case: Case, data: int) -> None:
    """The model, and what transformers computes with it of the batches of `data` data-parallel ranks."""
    model = tiny_models.write(case.family, root / case.directory, **case.changes)
    torch.save(transformers_results(model, data), root / case.directory / "expected.pt")
    if case.files:
        tiny_models.write(case.family, root / f"{case.directory} bf16", dtype=torch.bfloat16, max_shard_size="60KB")


def _check(root: Path, case: Case, key: str, layout: ParallelLayout) -> dict[str, float] | None:
    """Largest errors; None where the model does not fit the layout. Gradient errors are on rank 0."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    from drpo_megatron.models.builder import build_model
    from drpo_megatron.weights.exporter import iter_hf_tensors
    from drpo_megatron.weights.importer import load_hf

    source = root / case.directory
    hf = HFModelConfig.load(source)
    if not fits(hf, layout):
        return None
    expected_logits, expected_gradients = torch.load(source / "expected.pt")
    recompute = "full" if key in RECOMPUTED else "none"
    chunks = build_model(hf, layout, params_dtype=torch.float32, recompute=recompute, spec_backend="local")
    load_hf(chunks, source, hf)
    exported = {name: t.clone() for bucket in iter_hf_tensors(chunks, hf) for name, t in bucket}
    if dist.get_rank() == 0:
        written = hf_tensors(source)
        assert exported.keys() == written.keys()
        changed = [name for name, tensor in written.items() if not torch.equal(exported[name], tensor)]
        assert not changed, f"{changed} changed between import and export"
    _output_weight_is_on_the_last_stage(chunks[-1], hf, layout)
    if case.files:
        _export_is_complete(chunks, hf, source)
        _directory_is_the_same(root, case, key, hf, layout)
        if key == "tp1" and hf.moe is None:
            _batch_layout_equals_packed(chunks[0])
            _gradients_stay_in_their_sequence(chunks[0])
            chunks[0].zero_grad()
    errors = {}
    seed = batch_seeds(layout, ps.get_data_parallel_rank())[0]
    logits = pipeline_logits(chunks, hf, layout, seed=seed)
    if logits is not None:
        assert expected_logits[seed].std() > 0.3
        assert logits.shape == expected_logits[seed].shape
        errors["logits"] = float((torch.from_numpy(logits) - expected_logits[seed]).abs().max())
    if case.gradients:
        actual = hf_gradients(chunks, hf, layout)
        seeds = [s for rank in range(layout.data) for s in batch_seeds(layout, rank)]
        if dist.get_rank() == 0:
            errors["gradients"] = _gradient_error(actual, [expected_gradients[s] for s in seeds], every_one=case.files)
    return errors


def _output_weight_is_on_the_last_stage(chunk: Any, hf: HFModelConfig, layout: ParallelLayout) -> None:
    from megatron.core import parallel_state as ps

    from drpo_megatron.models.builder import output_weight

    weight = output_weight(chunk)
    assert (weight is not None) == (ps.get_pipeline_model_parallel_rank() == layout.pipeline - 1)
    if weight is not None:
        assert weight.requires_grad and weight.shape[0] * layout.tensor >= hf.vocab_size


def _export_is_complete(chunks: list[Any], hf: HFModelConfig, source: Path) -> None:
    """Each name once, in the dtype asked for, except the router's bias; all on rank 0; the same buckets everywhere."""
    import torch.distributed as dist

    from drpo_megatron.weights.exporter import iter_hf_tensors

    largest = max(sum(t.nbytes for _, t in bucket) for bucket in iter_hf_tensors(chunks, hf, bucket_bytes=200_000))
    stream = [
        [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in bucket]
        for bucket in iter_hf_tensors(chunks, hf, dtype=torch.bfloat16, bucket_bytes=20_000)
    ]
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(stream))
    assert len(set(counts)) == 1 and counts[0] > 4
    flat = [entry for bucket in stream for entry in bucket]
    if dist.get_rank() != 0:
        assert flat == [] and largest == 0
        return
    assert 0 < largest <= 200_000
    tensors = hf_tensors(source)
    assert sorted(name for name, _, _ in flat) == sorted(tensors)
    for name, dtype, shape in flat:
        kept = name.endswith("e_score_correction_bias")
        assert (dtype, shape) == ("torch.float32" if kept else "torch.bfloat16", tuple(tensors[name].shape)), name


def _directory_is_the_same(root: Path, case: Case, key: str, hf: HFModelConfig, layout: ParallelLayout) -> None:
    import torch.distributed as dist

    from drpo_megatron.models.builder import build_model
    from drpo_megatron.weights.exporter import save_hf
    from drpo_megatron.weights.importer import load_hf

    source = root / f"{case.directory} bf16"
    chunks = build_model(hf, layout, params_dtype=torch.bfloat16, spec_backend="local")
    load_hf(chunks, source, hf)
    out = root / f"{case.directory} {key} exported"
    save_hf(chunks, hf, out, source, max_shard_bytes=100_000)
    if dist.get_rank() == 0:
        same_directory(out, source)


def _gradient_error(actual: Mapping[str, Any], expected: list[dict[str, torch.Tensor]], every_one: bool) -> float:
    """The worst over parameters, each by its largest gradient."""
    outside = {name for name in actual if name == "lm_head.weight" or name.endswith("e_score_correction_bias")}
    assert actual.keys() - outside == expected[0].keys()
    worst = 0.0
    for name in expected[0]:
        total = sum(gradients[name] for gradients in expected)
        difference, scale = float((torch.from_numpy(actual[name]) - total).abs().max()), float(total.abs().max())
        # No token may have gone to an expert.
        assert scale > 0 or (".experts." in name and not every_one), f"{name} has no gradient in the reference"
        worst = max(worst, difference / scale if scale else difference)
    return worst


def _run(root: Path, plan: Plan, world: int) -> dict[str, dict[str, float] | None]:
    from drpo_megatron.platform.distributed import change_layout, control_group, initialize, shutdown

    answers: dict[str, dict[str, float] | None] = {}
    initialized = False
    for key, layout in LAYOUTS[world].items():
        cases = [case for case, keys in plan if key in keys]
        if not cases:
            continue
        (change_layout if initialized else initialize)(layout, seed=1)
        initialized = True
        assert control_group().size() == world
        for case in cases:
            try:
                answers[f"{key}, {case.directory}"] = _check(root, case, key, layout)
            except Exception as error:
                error.add_note(f"in layout {key}: {case}")
                raise
    shutdown()
    return answers


def compare(root: Path, plan: Plan, world: int) -> dict[str, set[str]]:
    """Build, compare, and return the layouts that each case fits."""
    data = max(LAYOUTS[world][key].data for _, keys in plan for key in keys)
    for case, _ in plan:
        write(root, case, data)
    ranks = run_ranks(world, _run, root, plan, world, timeout_s=3600)
    ran: dict[str, set[str]] = {case.directory: set() for case, _ in plan}
    wrong = []
    for case, keys in plan:
        for key in keys:
            answers = [rank[f"{key}, {case.directory}"] for rank in ranks]
            if answers[0] is None:
                continue
            ran[case.directory].add(key)
            # All ranks of the last stage.
            assert sum("logits" in answer for answer in answers) == world // LAYOUTS[world][key].pipeline
            errors = {name: max(a.get(name, 0.0) for a in answers) for name in ("logits", "gradients")}
            assert ("gradients" in answers[0]) is case.gradients
            # Not "above": a result that is not a number is wrong too.
            if not (errors["logits"] < LOGIT_BOUND and errors["gradients"] < GRADIENT_BOUND):
                wrong.append(f"{key}, {case}: {errors}")
    assert not wrong, "\n".join(wrong)
    return ran

"""Builds large models rank by rank on the meta device and compares every tensor with transformers' model.

Transformer Engine builds no module without a GPU unless torch.cuda says there is one; nothing is computed here, so an
answer is all it needs. The process that this is called in is good for nothing else afterwards.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.platform.layout import ParallelLayout

HF_CONFIGS = Path(__file__).parents[1] / "data" / "hf_configs"
_IN_PLACE = "fuse_wgrad_accumulation"  # of Transformer Engine's linear layers


@dataclass
class Report:
    """What the ranks of one model hold together. `state_bytes`: by pipeline stage, the fullest rank of it."""

    elements: int = 0
    reference_elements: int = 0
    names: int = 0
    ranks: int = 0
    state_bytes: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)


def pretend_a_gpu() -> None:
    """Answer as a machine with an H100 does, where there is none. Called before Transformer Engine builds a module."""
    if torch.cuda.is_available():
        return
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H100", total_memory=80 * 2**30)
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda *args, **kwargs: properties
    torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    # The dispatcher of tokens to experts takes a stream when it is built.
    torch.cuda.Stream = SimpleNamespace
    arange = torch.arange

    def arange_without_cuda(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return arange(*args, device="meta" if device == torch.device("cuda") else device, **kwargs)

    # With fused permutation it also keeps the order of its experts on the device.
    torch.arange = arange_without_cuda


def build(
    names: list[str], spec_backend: Literal["local", "transformer_engine"], te_path: str | None
) -> dict[str, Report]:
    """The report of each recipe of `configs/`. A function for `run_ranks`, in a process of its own."""
    _prepare(spec_backend, te_path)
    return {name: _build_one(name, spec_backend) for name in names}


def build_tiny(
    changes: dict[str, list[dict[str, Any]]],
    layout: ParallelLayout,
    spec_backend: Literal["local", "transformer_engine"],
    te_path: str | None,
) -> list[Report]:
    """The same of tiny models: by family, changes of `tests.support.tiny_models.config`."""
    _prepare(spec_backend, te_path)
    from tests.support import tiny_models

    reports = []
    for family, all_changes in changes.items():
        for one in all_changes:
            reference = tiny_models.config(family, **one)
            hf = HFModelConfig.from_dict(json.loads(reference.to_json_string(use_diff=False)))
            reports.append(_compare(hf, layout, reference_tensors(reference), spec_backend))
    return reports


def _prepare(spec_backend: Literal["local", "transformer_engine"], te_path: str | None) -> None:
    if spec_backend == "transformer_engine":
        pretend_a_gpu()
        if te_path is not None:
            sys.path.insert(0, te_path)
    from drpo_megatron import platform

    platform.activate()


def _build_one(name: str, spec_backend: Literal["local", "transformer_engine"]) -> Report:
    from transformers import AutoConfig

    from drpo_megatron.config import load_config

    config = load_config(HF_CONFIGS.parents[2] / "configs" / f"{name}.yaml")
    return _compare(
        HFModelConfig.load(HF_CONFIGS / name),
        config.layout,
        reference_tensors(AutoConfig.from_pretrained(HF_CONFIGS / name)),
        spec_backend,
        dtype=getattr(torch, config.model.dtype),
        recompute=config.model.recompute,
        distributed_optimizer=config.optimizer.distributed,
    )


def _compare(
    hf: HFModelConfig,
    layout: ParallelLayout,
    reference: Mapping[str, torch.Tensor],
    spec_backend: Literal["local", "transformer_engine"],
    *,
    dtype: torch.dtype = torch.bfloat16,
    recompute: Literal["none", "selective", "full"] = "none",
    distributed_optimizer: bool = True,
) -> Report:
    from megatron.core import parallel_state

    from drpo_megatron.models.builder import build_model
    from drpo_megatron.models.hf_config import padded_vocab_size
    from drpo_megatron.models.memory import is_expert, model_state_memory
    from drpo_megatron.models.meta import META, distinct_ranks, rank_on_meta
    from drpo_megatron.plan.parameters import rank_parameters, stages_of, states_of
    from drpo_megatron.weights.families import expert_of, weight_table
    from drpo_megatron.weights.importer import local_parameters

    table = weight_table(hf, padded_vocab_size(hf.vocab_size, layout.tensor))
    report = Report(reference_elements=sum(tensor.numel() for tensor in reference.values()))
    seen: set[str] = set()
    for rank in distinct_ranks(layout):
        with rank_on_meta(layout, rank):
            chunks = build_model(
                hf,
                layout,
                params_dtype=dtype,
                recompute=recompute,
                spec_backend=spec_backend,
                accumulate_gradients=True,
                device=META,
            )
            if spec_backend == "transformer_engine":
                in_place = [m.fuse_wgrad_accumulation for c in chunks for m in c.modules() if hasattr(m, _IN_PLACE)]
                assert in_place and all(in_place), "weight gradients are made apart and then added"
            stage = parallel_state.get_pipeline_model_parallel_rank()
            first_of_stage = parallel_state.get_expert_model_parallel_rank() == 0
            states = model_state_memory(chunks, layout, distributed_optimizer=distributed_optimizer)
            counted = rank_parameters(hf, layout, stages_of(hf, layout)[stage])
            planned = states_of(counted, layout, dtype.itemsize, distributed_optimizer)
            assert states == planned, f"stage {stage}: built {states}, planned {planned}"
            state_bytes = states.total
            if first_of_stage:
                assert stage == len(report.layers)
                report.layers.append(sum(len(chunk.decoder.layers) for chunk in chunks))
                report.state_bytes.append(state_bytes)
                report.modules |= {type(module).__module__ for chunk in chunks for module in chunk.modules()}
            report.state_bytes[stage] = max(report.state_bytes[stage], state_bytes)
            report.ranks += 1
            for parameter_name, parameter in local_parameters(chunks):
                assert parameter.is_meta, parameter_name
                assert is_expert(parameter) == (expert_of(parameter_name) is not None), parameter_name
                if not is_expert(parameter) and not first_of_stage:
                    continue
                size = layout.expert_tensor if is_expert(parameter) else layout.tensor
                rule = table.rule(parameter_name)
                for tp_rank in (0, size - 1):
                    shape = rule.from_hf(reference, tp_rank, size).shape
                    assert shape == parameter.shape, f"{parameter_name}: built {parameter.shape}, imported {shape}"
                report.parameters.add(parameter_name)
                if not rule.exported:
                    continue
                for hf_name, tensor in rule.to_hf([parameter.detach()] * size).items():
                    assert hf_name not in seen, f"{hf_name} is exported twice, the second time by {parameter_name}"
                    assert tensor.shape == reference[hf_name].shape, f"{hf_name}: {tensor.shape} from {parameter_name}"
                    seen.add(hf_name)
                    report.elements += tensor.numel()
    assert seen == set(reference), f"tensors that no rank holds: {sorted(set(reference) - seen)[:8]}"
    assert table.hf_names() == seen
    report.names = len(seen)
    return report


def reference_tensors(config: Any) -> Mapping[str, torch.Tensor]:
    """transformers' model of a configuration on the meta device, as the tensors that `save_pretrained` would write."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # In memory transformers stacks the experts of a layer; in files each expert has tensors of its own.
    tensors = model.state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return revert_weight_conversion(model, tensors)

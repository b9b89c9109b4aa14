"""The layouts of N GPUs that fit, ranked by the predicted seconds of a step."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce

from drpo_megatron.config.layout_checks import server_problems
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.hf_config import HFModelConfig, check_layout
from drpo_megatron.plan.activations import Kernels
from drpo_megatron.plan.advice import Changes, with_changes
from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.plan.devices import Device
from drpo_megatron.plan.memory import server_memory
from drpo_megatron.plan.run_plan import Plan, make_plan
from drpo_megatron.plan.serve_seconds import generate_seconds
from drpo_megatron.plan.train_seconds import TrainModel
from drpo_megatron.plan.workload import Workload
from drpo_megatron.platform.layout import ParallelLayout

_SPLITS = 8
"""Trainer and servers divide the GPUs in eighths, in whole nodes where there are several."""
_MOST_STAGES = 32


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, and the settings that make it of the configuration."""

    changes: Changes
    plan: Plan


@dataclass(frozen=True)
class _Part:
    """One half of a candidate: settings of trainer or servers, and the seconds of their verb."""

    seconds: float
    changes: Changes


def search(
    config: RunConfig,
    hf: HFModelConfig,
    device: Device,
    gpus: int,
    assumptions: Assumptions | None = None,
    *,
    count: int = 5,
    kernels: Kernels = "transformer_engine",
) -> list[Candidate]:
    """The best `count` that fit, best first; fewer where fewer fit.

    Tensor parallelism stays in a node. With servers of their own every split into trainer and servers is tried;
    colocated, both take all GPUs. The times are those of the plan, so that what it does not know ranks as equal.
    """
    assumed = assumptions or Assumptions.of(config)
    workload = Workload.of(config, assumed)
    colocated = config.rollout.placement == "colocated"
    pairs: list[tuple[float, Changes]] = []
    for trainers, servers in [(gpus, gpus)] if colocated else _splits(gpus, device.node):
        serving = min(_servers(config, hf, workload, device, assumed, servers), key=lambda p: p.seconds, default=None)
        if serving is None:
            continue
        for training in _trainers(config, hf, workload, device, assumed, trainers):
            ahead = config.rollout.schedule != "synchronous"
            both: Callable[[float, float], float] = max if ahead else operator.add
            pairs.append((both(training.seconds, serving.seconds), training.changes | serving.changes))
    found: list[Candidate] = []
    seen: set[ParallelLayout] = set()
    # Memory is asked of the fastest first: most of the slower ones never.
    for _, changes in sorted(pairs, key=lambda pair: pair[0]):
        changed = with_changes(config, changes)
        # One proposal for each division into ranks, with its best chunks and recomputation.
        division = replace(changed.layout, virtual_pipeline=None, first_stage_layers=None, last_stage_layers=None)
        if division in seen:
            continue
        plan = make_plan(changed, hf, device, assumed, kernels)
        if plan.fits:
            seen.add(division)
            found.append(Candidate(_differing(config, changes), plan))
            if len(found) == count:
                break
    return found


def _differing(config: RunConfig, changes: Changes) -> Changes:
    """Without what the configuration says already."""
    raw = config.model_dump()
    return {key: value for key, value in changes.items() if reduce(lambda at, k: at[k], key.split("."), raw) != value}


def _splits(gpus: int, node: int) -> Iterator[tuple[int, int]]:
    unit = node if gpus >= 2 * node else 1
    units = gpus // unit
    for trainers in sorted({math.ceil(units * eighth / _SPLITS) for eighth in range(1, _SPLITS)}):
        if 0 < trainers < units:
            yield trainers * unit, gpus - trainers * unit


def _servers(
    config: RunConfig, hf: HFModelConfig, workload: Workload, device: Device, assumed: Assumptions, gpus: int
) -> Iterator[_Part]:
    """Servers of one size that hold the longest sequence."""
    for ranks in _powers_of_2(gpus):
        if hf.num_heads % ranks or (hf.num_kv_heads % ranks and ranks % hf.num_kv_heads):
            continue
        changes: Changes = {
            "rollout.server.count": gpus // ranks,
            "rollout.server.tensor_parallel": ranks,
            "rollout.server.addresses": [],
            "rollout.server.devices": None,
        }
        changed = with_changes(config, changes)
        if any(server_problems(changed, hf)):
            continue
        memory = server_memory(changed, hf, device, assumed)
        if memory.kv_tokens >= workload.longest:
            seconds = generate_seconds(changed, hf, workload, memory, device, assumed).total
            yield _Part(seconds, changes)


def _trainers(
    config: RunConfig, hf: HFModelConfig, workload: Workload, device: Device, assumed: Assumptions, gpus: int
) -> Iterator[_Part]:
    """Every layout of `gpus` ranks that the model divides over, with each way of recomputation."""
    sequences = workload.sequences // workload.updates
    for layout in layouts(hf, gpus, device.node):
        if layout.data > sequences:
            continue
        for recompute in ("none", "selective", "full"):
            changes: Changes = {
                "parallel.tensor": layout.tensor,
                "parallel.sequence_parallel": layout.sequence_parallel,
                "parallel.pipeline": layout.pipeline,
                "parallel.virtual_pipeline": layout.virtual_pipeline,
                "parallel.first_stage_layers": layout.first_stage_layers,
                "parallel.last_stage_layers": layout.last_stage_layers,
                "parallel.context": layout.context,
                "parallel.expert": layout.expert,
                "parallel.expert_tensor": layout.expert_tensor,
                "parallel.data": layout.data,
                "model.recompute": recompute,
            }
            # Not validated again: thousands are tried, and those that are proposed are.
            parallel = config.parallel.model_copy(
                update={k.removeprefix("parallel."): v for k, v in changes.items() if k.startswith("parallel.")}
            )
            model = config.model.model_copy(update={"recompute": recompute})
            changed = config.model_copy(update={"parallel": parallel, "model": model})
            yield _Part(TrainModel(changed, hf, workload, device, assumed).predict().total, changes)


def layouts(hf: HFModelConfig, gpus: int, node: int) -> Iterator[ParallelLayout]:
    """Layouts of all `gpus` ranks that `check_layout` accepts; tensor parallelism with sequence parallelism."""
    for tensor, pipeline, context in itertools.product(
        _powers_of_2(min(gpus, node)), _powers_of_2(min(gpus, _MOST_STAGES)), (1, 2, 4, 8)
    ):
        data, rest = divmod(gpus, tensor * pipeline * context)
        if rest or data == 0:
            continue
        stage_ranks = tensor * context * data
        experts = [e for e in _powers_of_2(stage_ranks) if stage_ranks % e == 0] if hf.moe else [1]
        for expert, (first, last), virtual in itertools.product(
            experts, _edges(hf.num_layers, pipeline), (None, 2, 4) if pipeline > 1 else (None,)
        ):
            try:
                layout = ParallelLayout(
                    tensor=tensor,
                    sequence_parallel=tensor > 1,
                    pipeline=pipeline,
                    virtual_pipeline=virtual,
                    first_stage_layers=first,
                    last_stage_layers=last,
                    context=context,
                    expert=expert,
                    data=data,
                )
                check_layout(hf, layout)
            except ValueError:
                continue
            yield layout


def _edges(num_layers: int, pipeline: int) -> Iterator[tuple[int | None, int | None]]:
    """Layers of first and last stage: as the others where they divide, else what whole middle stages leave."""
    if num_layers % pipeline == 0:
        yield None, None
    elif pipeline > 2:
        middle = math.ceil(num_layers / pipeline)
        left = num_layers - (pipeline - 2) * middle
        if left >= 2:
            yield math.ceil(left / 2), left // 2
    elif pipeline == 2:
        yield math.ceil(num_layers / 2), num_layers // 2


def _powers_of_2(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]

"""Stream the model out as full Hugging Face tensors: to disk, and to whoever syncs weights to the servers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from drpo_megatron import platform
from drpo_megatron.models.hf_config import HFModelConfig, padded_vocab_size
from drpo_megatron.platform.distributed import control_group
from drpo_megatron.weights.families import WeightTable, expert_of, weight_table
from drpo_megatron.weights.hf_io import SafetensorsWriter
from drpo_megatron.weights.importer import local_parameters
from drpo_megatron.weights.map import Replicated, WeightRule

DEFAULT_BUCKET_BYTES = 512 * 1024**2
DEFAULT_SHARD_BYTES = 5 * 1000**3


@dataclass(frozen=True)
class _Item:
    """One parameter of the whole model: where it lives and how large its shard is."""

    name: str
    stage: int
    expert_rank: int | None
    """Expert-parallel rank of a routed expert's parameter; None for all others, which every such rank holds."""
    shard_shape: tuple[int, ...]
    dtype: torch.dtype


def iter_hf_tensors(
    model_chunks: Sequence[torch.nn.Module],
    hf: HFModelConfig,
    *,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Buckets of (Hugging Face name, full tensor), in the order embedding, layers, final norm, output projection.

    Every rank must exhaust the iterator: it is collective over the model-parallel groups. All ranks see the same number
    of buckets; the lists are empty except on global rank 0, where tensors are on its device. A bucket holds at most
    `bucket_bytes`, or one parameter that alone is larger. Global rank 0 needs memory for one bucket and the shards of
    one parameter more; other ranks that hold the first copy of a parameter need one parameter.

    `dtype` casts before anything is sent; None keeps the parameters'. The router's bias keeps its own either way.
    Padding rows of the vocabulary are cut, and tied output projections left out. Tensors may share memory with the
    parameters: use them before the next optimizer step.
    """
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    table = weight_table(hf, padded_vocab_size(hf.vocab_size, tp_size))
    parameters = dict(local_parameters(model_chunks))
    bucket: list[tuple[str, torch.Tensor]] = []
    filled = 0
    for item in _inventory(parameters, table, dtype):
        rule = table.rule(item.name)
        size = _copies(rule, _shard_group(item)) * item.dtype.itemsize * torch.Size(item.shard_shape).numel()
        if filled and filled + size > bucket_bytes:
            yield bucket
            bucket, filled = [], 0
        shards = _gather(parameters.get(item.name), item, rule)
        if shards is not None:
            bucket += rule.to_hf(shards).items()
            del shards
        filled += size
    yield bucket


def _inventory(parameters: dict[str, torch.Tensor], table: WeightTable, dtype: torch.dtype | None) -> list[_Item]:
    """All exported parameters in a fixed order, the same on every rank. Collective over pipeline and expert ranks."""
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    ep_group = parallel_state.get_expert_model_parallel_group()
    items = []
    for name, parameter in parameters.items():
        rule = table.rule(name)
        if rule.exported:
            exported_dtype = parameter.dtype if isinstance(rule, Replicated) and rule.keep_dtype else dtype
            expert_rank = None if expert_of(name) is None else ep_group.rank()
            items.append(
                _Item(name, pp_group.rank(), expert_rank, tuple(parameter.shape), exported_dtype or parameter.dtype)
            )
    for group in (ep_group, pp_group):
        everywhere: list[list[_Item]] = [[] for _ in range(group.size())]
        dist.all_gather_object(everywhere, items, group=group)
        # What every expert-parallel rank holds is announced by each of them and exported once.
        items = list(dict.fromkeys(itertools.chain.from_iterable(everywhere)))
    return sorted(items, key=_order)


def _order(item: _Item) -> tuple[int, int]:
    """Embedding, layers by number, then the rest; a stable sort keeps the model's order inside a layer."""
    if item.name.startswith("embedding."):
        return (0, 0)
    if item.name.startswith("decoder.layers."):
        return (1, int(item.name.split(".")[2]))
    return (2, 0)


def _gather(parameter: torch.Tensor | None, item: _Item, rule: WeightRule) -> Sequence[torch.Tensor] | None:
    """The parameter's shards by the rank of the group that divides it, on global rank 0; None on every other rank.

    The first copy of the parameter is gathered on the first rank of the shards' group, which sends to the same place
    in the first stage, from where an expert's goes to the first expert-parallel rank.
    """
    if not _holds_first_copy(item):
        return None
    group = _shard_group(item)
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    ep_group = parallel_state.get_expert_model_parallel_group()
    expert_rank = item.expert_rank or 0
    copies = _copies(rule, group)
    shards: torch.Tensor | None = None
    if item.expert_rank is None or ep_group.rank() == expert_rank:
        if pp_group.rank() == item.stage:
            assert parameter is not None, f"{item.name} is not on the rank that announced it"
            local = parameter.detach().to(item.dtype)
            if copies == 1:
                shards = local[None]
            else:
                shards = local.new_empty(copies, *item.shard_shape) if group.rank() == 0 else None
                dist.gather(local, None if shards is None else list(shards.unbind()), group=group, group_dst=0)
        if group.rank() == 0:
            shards = _send_to_first(shards, item, copies, pp_group, item.stage)
    if group.rank() == 0 and pp_group.rank() == 0:
        shards = _send_to_first(shards, item, copies, ep_group, expert_rank)
    return None if shards is None or dist.get_rank() != 0 else shards.unbind()


def _send_to_first(
    shards: torch.Tensor | None, item: _Item, copies: int, group: dist.ProcessGroup, source: int
) -> torch.Tensor | None:
    """The shards that rank `source` of `group` has, on rank 0 of it; None on the ranks between."""
    if source == 0:
        return shards
    if group.rank() == source:
        assert shards is not None, f"{item.name} is not on the rank that holds it"
        dist.send(shards, group=group, group_dst=0)
    if group.rank() != 0:
        return None
    received = torch.empty(copies, *item.shard_shape, dtype=item.dtype, device=platform.device())
    dist.recv(received, group=group, group_src=source)
    return received


def _holds_first_copy(item: _Item) -> bool:
    if item.expert_rank is None:
        return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    return parallel_state.get_expert_data_parallel_rank() == 0


def _shard_group(item: _Item) -> dist.ProcessGroup:
    """The ranks that divide the parameter."""
    if item.expert_rank is None:
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_expert_tensor_parallel_group()


def _copies(rule: WeightRule, group: dist.ProcessGroup) -> int:
    """Number of shards that differ from each other."""
    return 1 if isinstance(rule, Replicated) else group.size()


def save_hf(
    model_chunks: Sequence[torch.nn.Module],
    hf: HFModelConfig,
    out_dir: str | Path,
    source_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    replace: bool = False,
) -> None:
    """Write the model as a Hugging Face directory. Collective over all ranks; it returns when `out_dir` is complete.

    Configuration, tokenizer, chat template and generation config come from `source_dir`, with the dtype in config.json
    set to the one written (`dtype`, or the parameters'). Global rank 0 holds one shard file in memory. Raises
    FileExistsError when `out_dir` exists, unless it is to be replaced.
    """
    writer = SafetensorsWriter(out_dir, source_dir, max_shard_bytes, replace=replace) if dist.get_rank() == 0 else None
    try:
        for bucket in iter_hf_tensors(model_chunks, hf, dtype=dtype):
            if writer is not None:
                writer.add(bucket)
        if writer is not None:
            writer.commit()
            writer = None
    finally:
        if writer is not None:
            writer.abort()
    dist.barrier(group=control_group())

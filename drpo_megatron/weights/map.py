"""How one Megatron-Core parameter relates to Hugging Face tensors: the rules of import, export and every weight sync.

A rule knows nothing about files or processes. `from_hf` cuts this rank's shard out of full tensors, reading no more of
them than the shard needs; `to_hf` joins the shards of all tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class FullTensor(Protocol):
    """A full Hugging Face tensor, in memory or in a file, that can be sliced."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Any, /) -> torch.Tensor: ...


class WeightRule(Protocol):
    """A rule is a value: equal rules stand for one parameter under the names that different layer specs give it.

    `tp_rank` and `tp_size` are of the group that divides the parameter, which is an expert's own for routed experts.
    """

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The Hugging Face tensors that this parameter holds."""

    @property
    def exported(self) -> bool:
        """False for a copy of a parameter that another rule exports."""

    def from_hf(self, tensors: Mapping[str, FullTensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        """This rank's shard, contiguous, in the dtype of `tensors`. Raises ValueError when a shape does not fit."""

    def to_hf(self, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Full tensors from the shards in the order of tensor-parallel ranks. They may share memory with the shards."""


def _rows(tensor: FullTensor, name: str, rank: int, size: int) -> torch.Tensor:
    """Rows of dimension 0 that belong to `rank` of `size`."""
    if tensor.shape[0] % size:
        raise ValueError(f"{name}: {tensor.shape[0]} rows do not divide over {size} tensor-parallel ranks")
    step = tensor.shape[0] // size
    return tensor[rank * step : (rank + 1) * step]


@dataclass(frozen=True)
class Replicated:
    """The same tensor on every rank: norms, routers and the projections to latents.

    `keep_dtype`: the tensor is exported in the parameter's own dtype, whatever the others are cast to.
    """

    name: str
    exported: bool = True
    keep_dtype: bool = False

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.name,)

    def from_hf(self, tensors: Mapping[str, FullTensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        return tensors[self.name][:]

    def to_hf(self, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.name: shards[0]}


@dataclass(frozen=True)
class ColumnSharded:
    """A linear layer whose outputs are split: rows of the [out, in] weight."""

    name: str
    exported: bool = True

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.name,)

    def from_hf(self, tensors: Mapping[str, FullTensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        return _rows(tensors[self.name], self.name, tp_rank, tp_size)

    def to_hf(self, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.name: torch.cat(list(shards))}


@dataclass(frozen=True)
class RowSharded:
    """A linear layer whose inputs are split: columns of the [out, in] weight."""

    name: str
    exported: bool = True

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.name,)

    def from_hf(self, tensors: Mapping[str, FullTensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        columns = tensors[self.name].shape[1]
        if columns % tp_size:
            raise ValueError(f"{self.name}: {columns} columns do not divide over {tp_size} tensor-parallel ranks")
        step = columns // tp_size
        return tensors[self.name][:, tp_rank * step : (tp_rank + 1) * step].contiguous()

    def to_hf(self, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.name: torch.cat(list(shards), dim=1)}


@dataclass(frozen=True)
class FusedQKV:
    """Query, key and value in one parameter, weight or bias, interleaved by key-value group.

    Megatron-Core stores, for each key-value head, its query heads, then the key, then the value:
    [kv_heads, heads / kv_heads + 2, head_dim] (× hidden for the weight). A rank holds whole groups.
    """

    query: str
    key: str
    value: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    exported: bool = True

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def from_hf(self, tensors: Mapping[str, FullTensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        if self.num_kv_heads % tp_size:
            raise ValueError(f"{self.key}: {self.num_kv_heads} key-value heads do not divide over {tp_size} ranks")
        groups = self.num_kv_heads // tp_size
        parts = []
        for name, heads in zip(self.hf_names, self._heads(), strict=True):
            if tensors[name].shape[0] != heads * self.head_dim:
                raise ValueError(
                    f"{name}: {tensors[name].shape[0]} rows, and config.json says {heads} heads × {self.head_dim}"
                )
            rows = _rows(tensors[name], name, tp_rank, tp_size)
            parts.append(rows.reshape(groups, heads // self.num_kv_heads, self.head_dim, *rows.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 2)

    def to_hf(self, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        queries = self.num_heads // self.num_kv_heads
        grouped = [s.reshape(-1, queries + 2, self.head_dim, *s.shape[1:]) for s in shards]
        bounds = (slice(0, queries), slice(queries, queries + 1), slice(queries + 1, queries + 2))
        return {
            name: torch.cat([g[:, bound].flatten(0, 2) for g in grouped])
            for name, bound in zip(self.hf_names, bounds, strict=True)
        }

    def _heads(self) -> tuple[int, int, int]:
        return (self.num_heads, self.num_kv_heads, self.num_kv_heads)


@dataclass(frozen=True)
class GatedMLP:
    """The first MLP layer: each rank holds its rows of the gate above its rows of the up projection."""

    gate: str
    up: str
    exported: bool = True

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def from_hf(self, tensors: Mapping[str, FullTensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        return torch.cat([_rows(tensors[name], name, tp_rank, tp_size) for name in self.hf_names])

    def to_hf(self, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        halves = [s.chunk(2) for s in shards]
        return {name: torch.cat([h[i] for h in halves]) for i, name in enumerate(self.hf_names)}


@dataclass(frozen=True)
class VocabEmbedding:
    """Embedding or output projection: rows split over the ranks after padding with zeros to `padded_size` rows."""

    name: str
    vocab_size: int
    padded_size: int
    exported: bool = True

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.name,)

    def from_hf(self, tensors: Mapping[str, FullTensor], tp_rank: int, tp_size: int) -> torch.Tensor:
        full = tensors[self.name]
        if full.shape[0] != self.vocab_size:
            raise ValueError(f"{self.name}: {full.shape[0]} rows, and config.json says vocab_size {self.vocab_size}")
        step = self.padded_size // tp_size
        rows = full[min(tp_rank * step, self.vocab_size) : min((tp_rank + 1) * step, self.vocab_size)]
        padding = rows.new_zeros(step - rows.shape[0], *rows.shape[1:])
        return torch.cat([rows, padding])

    def to_hf(self, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.name: torch.cat(list(shards))[: self.vocab_size]}

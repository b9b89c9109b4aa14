"""Checksums that prove the server holds what the trainer sent.

SGLang's `/weights_checker` hashes each parameter of each tensor-parallel rank in its own layout: q, k and v fused, gate
and up fused, experts stacked, the vocabulary padded, FP8 multiplied with its scales. `ExpectedChecksums` builds the
same parameters from the stream of Hugging Face tensors, one at a time, and hashes them the same way. Equality is
bitwise: one changed element shows.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from drpo_megatron.models.families import FAMILIES
from drpo_megatron.platform.sglang import feed_forward_multiple
from drpo_megatron.rollout.errors import ServerError
from drpo_megatron.weights import fp8

_VOCAB_PADDING = 64  # sglang.srt.layers.vocab_parallel_embedding.DEFAULT_VOCAB_PADDING_SIZE
_FUSED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)} | {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_FUSED_PARTS = {"qkv_proj": 3, "gate_up_proj": 2}
_PROJECTION = re.compile(r"^(?P<prefix>.+\.)(?P<projection>\w+_proj)\.(?P<kind>weight|bias)$")
# What families call the parts of an expert, by what Llama calls them.
_EXPERT_PARTS = {
    name: part
    for names in (family.names for family in FAMILIES.values())
    for name, part in (
        (names.expert_gate, "gate_proj"),
        (names.expert_up, "up_proj"),
        (names.expert_down, "down_proj"),
    )
}
_EXPERT = re.compile(
    rf"^(?P<prefix>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>{'|'.join(map(re.escape, _EXPERT_PARTS))})\.weight$"
)
_ZERO_CENTERED = {model_type for model_type, family in FAMILIES.items() if family.zero_centered_norms}
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


class SyncMismatch(ServerError):
    """The server's weights are not the trainer's. `names`: the Hugging Face tensors that differ or are missing."""

    def __init__(self, names: Sequence[str], detail: str) -> None:
        self.names = list(names)
        listed = ", ".join(self.names[:8]) + (f" and {len(self.names) - 8} more" if len(self.names) > 8 else "")
        super().__init__(f"the rollout server's weights are not the trainer's after a sync: {detail}: {listed}")


@dataclass(frozen=True)
class ServerLayout:
    """What decides how the server lays out a model: its tensor-parallel size and dtype, the model's counts of heads and
    experts, the multiple to which the server pads the intermediate size of an MLP, and whether it adds 1 to the weights
    of zero-centred norms when it loads them.
    """

    tensor_parallel: int
    dtype: torch.dtype
    num_key_value_heads: int
    num_experts: int = 0
    feed_forward_multiple: int = 1
    zero_centered_norms: bool = False

    @classmethod
    def from_config(cls, model_path: Path, tensor_parallel: int, dtype: torch.dtype) -> ServerLayout:
        """Read the counts from `config.json` of a Hugging Face directory."""
        config = json.loads((model_path / "config.json").read_text())
        experts = (config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
        return cls(
            tensor_parallel,
            dtype,
            config.get("num_key_value_heads") or config["num_attention_heads"],
            next((count for count in experts if count), 0),
            feed_forward_multiple(tensor_parallel),
            config.get("model_type") in _ZERO_CENTERED,
        )

    def parameter(self, name: str) -> tuple[str, int, int]:
        """Server parameter of a Hugging Face tensor, the tensor's position in it, and how many tensors make it up.

        Raises ValueError for an expert of a model whose count of experts is not known.
        """
        if match := _EXPERT.match(name):
            if not self.num_experts:
                raise ValueError(f"{name} is an expert and the model's config.json has no expert count that is known")
            expert, projection = int(match["expert"]), _EXPERT_PARTS[match["projection"]]
            if projection == "down_proj":
                return f"{match['prefix']}.w2_weight", expert, self.num_experts
            position = 2 * expert + (projection == "up_proj")
            return f"{match['prefix']}.w13_weight", position, 2 * self.num_experts
        if (match := _PROJECTION.match(name)) and match["projection"] in _FUSED:
            fused, position = _FUSED[match["projection"]]
            return f"{match['prefix']}{fused}.{match['kind']}", position, _FUSED_PARTS[fused]
        return name, 0, 1


class ExpectedChecksums:
    """Collects the checksums that the server must report, from Hugging Face tensors in any order.

    `add` keeps a tensor (not a copy: it must not change) until the server parameter it belongs to is complete; in the
    order of a checkpoint that is at most one fused projection, or the experts of one layer; a weight in FP8 is kept
    until its scales come.
    """

    def __init__(self, layout: ServerLayout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._halves: dict[str, dict[str, torch.Tensor]] = {}
        self._parts: dict[str, dict[int, tuple[str, torch.Tensor]]] = {}
        self._sources: dict[str, list[str]] = {}
        self._checksums: list[dict[str, str]] = [{} for _ in range(layout.tensor_parallel)]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take the full Hugging Face tensor `name`. Raises ValueError when the server's ranks cannot divide it.

        A weight in FP8 is taken with its scales: of the two SGLang hashes the product, rounded to bfloat16
        (`sglang.srt.utils.weight_checker_comparator.Fp8BlockComparable`).
        """
        weight = name.removesuffix(fp8.SCALE_SUFFIX)
        if tensor.dtype is fp8.FP8 or weight != name:
            pair = self._halves.setdefault(weight, {})
            pair[name] = tensor.detach().to(self._device)
            if len(pair) == 2:
                del self._halves[weight]
                self._add(weight, fp8.dequantize(pair[weight], pair[weight + fp8.SCALE_SUFFIX]).to(torch.bfloat16))
        else:
            self._add(name, tensor.detach().to(self._device, self._layout.dtype))

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        if self._layout.zero_centered_norms and name.endswith("norm.weight"):
            tensor = tensor + 1
        parameter, position, count = self._layout.parameter(name)
        parts = self._parts.setdefault(parameter, {})
        parts[position] = (name, tensor)
        if len(parts) < count:
            return
        del self._parts[parameter]
        ordered = [parts[i] for i in range(count)]
        self._sources[parameter] = [source for source, _ in ordered]
        for rank, checksums in enumerate(self._checksums):
            shards = [self._shard(source, whole, rank) for source, whole in ordered]
            checksums[parameter] = tensor_checksum(shards[0] if count == 1 else torch.cat(shards))

    def verify(self, reported: Sequence[dict[str, str]]) -> int:
        """Compare with what the server reports, one mapping a rank; return the number of compared parameters a rank.

        Raises SyncMismatch with the Hugging Face names of everything that differs, was not sent, or has no counterpart.
        """
        if self._halves:
            raise SyncMismatch(
                [name for pair in self._halves.values() for name in pair],
                "FP8 was sent without its scales or reversely",
            )
        if self._parts:
            sent = [name for parts in self._parts.values() for name, _ in parts.values()]
            raise SyncMismatch(sent, "only a part of a fused parameter was sent")
        if len(reported) != self._layout.tensor_parallel:
            raise SyncMismatch([], f"{len(reported)} ranks reported and {self._layout.tensor_parallel} were expected")
        expected = [self._tied(mine, theirs) for mine, theirs in zip(self._checksums, reported, strict=True)]
        for mine, theirs in zip(expected, reported, strict=True):
            if missing := sorted(theirs.keys() - mine.keys()):
                raise SyncMismatch(missing, "the server has parameters that were not sent, or by another name")
            if unknown := self._names(mine.keys() - theirs.keys()):
                raise SyncMismatch(unknown, "the server has no such parameters")
        differing = {p for mine, theirs in zip(expected, reported, strict=True) for p in mine if mine[p] != theirs[p]}
        if differing:
            raise SyncMismatch(self._names(differing), "values differ")
        return len(expected[0])

    def _shard(self, name: str, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """The part of a Hugging Face tensor that `rank` of the server holds."""
        ranks = self._layout.tensor_parallel
        if name in (_EMBEDDING, _HEAD):
            # the vocabulary is padded to the multiple, or to the multiple a rank where the ranks do not divide that
            padded = -(-whole.shape[0] // _VOCAB_PADDING) * _VOCAB_PADDING
            return _padded_shard(whole, 0, rank, ranks, _VOCAB_PADDING * (ranks if padded % ranks else 1))
        if match := _EXPERT.match(name):
            name = f"{match['prefix']}.{match['expert']}.{_EXPERT_PARTS[match['projection']]}.weight"
        match = _PROJECTION.match(name)
        if match is None:
            return whole
        projection, kind = match["projection"], match["kind"]
        if projection in ("o_proj", "down_proj") and kind == "bias":
            return whole
        if projection in ("gate_proj", "up_proj", "down_proj"):
            dim = 1 if projection == "down_proj" else 0
            return _padded_shard(whole, dim, rank, ranks, self._layout.feed_forward_multiple)
        if projection == "o_proj":
            return _even_shard(name, whole, 1, rank, ranks)
        if projection in ("k_proj", "v_proj") and (heads := self._layout.num_key_value_heads) < ranks:
            return _even_shard(name, whole, 0, rank * heads // ranks, heads)
        if projection in ("q_proj", "k_proj", "v_proj"):
            return _even_shard(name, whole, 0, rank, ranks)
        return whole

    @staticmethod
    def _tied(mine: dict[str, str], theirs: dict[str, str]) -> dict[str, str]:
        """With tied embeddings the output projection may be sent or not, and the server may list it or not."""
        head = mine.get(_HEAD, mine.get(_EMBEDDING))
        if _HEAD in theirs and head is not None:
            return mine | {_HEAD: head}
        if _HEAD in mine and mine[_HEAD] == mine.get(_EMBEDDING):
            return {name: checksum for name, checksum in mine.items() if name != _HEAD}
        return mine

    def _names(self, parameters: set[str]) -> list[str]:
        return sorted(name for p in parameters for name in self._sources.get(p, [p]))


def tensor_checksum(tensor: torch.Tensor) -> str:
    """SGLang's 64-bit hash of a tensor's bytes, in hexadecimal (`sglang.srt.managers.mm_utils.tensor_hash`).

    The first 8 bytes of SHA-256 for a tensor in host memory; SGLang's own Triton hash for one on a CUDA device.
    """
    if tensor.is_cuda:
        return f"{_cuda_tensor_hash()(tensor):016x}"
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    # not data.numpy(): torch would never again let the storage be freed, as a colocated trainer does with its weights
    return hashlib.sha256(memoryview(np.from_dlpack(data))).digest()[:8].hex()


@functools.cache
def _cuda_tensor_hash() -> Callable[[torch.Tensor], int]:
    """The hash kernel, loaded from its file alone: importing the sglang package patches transformers."""
    package = importlib.util.find_spec("sglang")
    if package is None or package.origin is None:
        raise RuntimeError("SGLang is not installed in this environment: install it as README.md says")
    source = Path(package.origin).parent / "kernels" / "ops" / "memory" / "gpu_tensor_hash.py"
    spec = importlib.util.spec_from_file_location("_sglang_gpu_tensor_hash", source)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{source} is missing: install the version that setup.py names")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    gpu_tensor_hash: Callable[[torch.Tensor], int] = module.gpu_tensor_hash
    return gpu_tensor_hash


def _even_shard(name: str, whole: torch.Tensor, dim: int, index: int, shards: int) -> torch.Tensor:
    if whole.shape[dim] % shards:
        raise ValueError(f"{name} of shape {list(whole.shape)} does not divide into {shards} shards along {dim}")
    size = whole.shape[dim] // shards
    return whole.narrow(dim, index * size, size)


def _padded_shard(whole: torch.Tensor, dim: int, rank: int, ranks: int, multiple: int) -> torch.Tensor:
    """One rank's part of a tensor that is padded with zeros to a multiple along `dim` and then divided evenly."""
    size = whole.shape[dim]
    padded = -(-size // multiple) * multiple
    if padded % ranks:
        raise ValueError(f"a dimension of {size} does not divide into {ranks} tensor-parallel ranks of the server")
    rows = padded // ranks
    start, stop = min(rank * rows, size), min((rank + 1) * rows, size)
    shard = whole.narrow(dim, start, stop - start)
    if stop - start == rows:
        return shard
    shape = list(whole.shape)
    shape[dim] = rows - (stop - start)
    return torch.cat([shard, whole.new_zeros(shape)], dim)

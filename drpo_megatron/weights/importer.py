"""Load a Hugging Face directory into Megatron-Core model chunks, each rank reading only its part."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from drpo_megatron.models.builder import unwrap
from drpo_megatron.models.hf_config import HFModelConfig, padded_vocab_size
from drpo_megatron.platform.distributed import control_group
from drpo_megatron.weights.families import expert_of, global_name, weight_table
from drpo_megatron.weights.hf_io import SafetensorsReader, check_names, listed


def local_parameters(model_chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of this rank's chunks, wrapped or not, with layers and experts numbered over the whole model.

    Beside the parameters, the router's bias for the choice of experts: a buffer, because no gradient reaches it.
    """
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    for chunk in model_chunks:
        model = unwrap(chunk)
        first_layer = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
        config = model.config
        first_expert = expert_rank * ((config.num_moe_experts or 0) // config.expert_model_parallel_size)
        biases = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(".router.expert_bias"))
        for name, tensor in itertools.chain(model.named_parameters(), biases):
            yield global_name(name, first_layer, first_expert), tensor


@torch.no_grad()
def load_hf(model_chunks: Sequence[torch.nn.Module], hf_dir: str | Path, hf: HFModelConfig) -> None:
    """Fill every parameter of this rank's chunks from `hf_dir`, cast to the parameters' dtype. Collective over all.

    Call it before the optimizer is made, which copies the parameters into its main weights. Padding rows of the
    vocabulary become zeros. Raises ValueError, naming tensor or file, when the directory lacks a tensor, has one that
    no parameter takes, has one of a wrong shape, or is damaged; FileNotFoundError when a file is missing; KeyError when
    a parameter has no rule.
    """
    dense_group = parallel_state.get_tensor_model_parallel_group()
    expert_group = parallel_state.get_expert_tensor_parallel_group()
    table = weight_table(hf, padded_vocab_size(hf.vocab_size, dense_group.size()))
    reader = SafetensorsReader(hf_dir)
    check_names(reader.path, set(reader), table, hf.tied_embeddings)
    consumed: set[str] = set()
    for name, parameter in local_parameters(model_chunks):
        rule = table.rule(name)
        group = expert_group if expert_of(name) is not None else dense_group
        shard = rule.from_hf(reader, group.rank(), group.size())
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{' + '.join(rule.hf_names)} in {reader.path} give {name} the shape {tuple(shard.shape)}, "
                f"and config.json asks for {tuple(parameter.shape)}"
            )
        parameter.copy_(shard)
        if hasattr(parameter, "get_high_precision_init_val"):
            # An FP8 parameter of Transformer Engine's: the optimizer makes its main weight from this, and drops it.
            parameter.get_high_precision_init_val().copy_(shard)
        consumed.update(rule.hf_names)
    everywhere: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, consumed, group=control_group())
    unused = sorted(table.hf_names() - set().union(*everywhere))
    if unused:
        raise ValueError(f"{reader.path}: no parameter of the built model takes {listed(unused)}")

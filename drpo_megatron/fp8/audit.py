"""Which layers are in FP8, by what trainer and servers really hold, against what should be.

A layer's name that is matched wrongly somewhere leaves it in bf16 and nobody notices: nothing fails, it is only slower
and computes other numbers. So both sides are asked, and the run stops at the first difference.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from drpo_megatron.fp8.emulation import EMULATED
from drpo_megatron.fp8.selection import Selection
from drpo_megatron.models.builder import unwrap
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.platform.distributed import control_group
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerError
from drpo_megatron.rollout.server_args import FP8_REPORT
from drpo_megatron.sync.loader_call import payload
from drpo_megatron.sync.receivers import Receivers
from drpo_megatron.sync.transport import Deadline, weight_update
from drpo_megatron.sync.verify import ServerLayout
from drpo_megatron.weights.families import layer_of, weight_table
from drpo_megatron.weights.hf_io import listed
from drpo_megatron.weights.importer import local_parameters

log = logging.getLogger(__name__)

RECORD = "fp8_layers.json"


class Fp8LayersDiffer(ServerError):
    """Layers that should be in FP8 and are not, or reversely. `missing` and `unexpected`: their names."""

    def __init__(self, where: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
        self.missing, self.unexpected = list(missing), list(unexpected)
        parts = []
        if missing:
            parts.append(f"{len(missing)} layers should be in FP8 and are not: {listed(self.missing)}")
        if unexpected:
            parts.append(f"{len(unexpected)} layers are in FP8 and should not be: {listed(self.unexpected)}")
        super().__init__(f"{where}: {'; '.join(parts)}")


def check(where: str, expected: Mapping[str, bool], found: Mapping[str, bool]) -> None:
    """Compare by name. expected: parameters that may be other things than weights of linear layers. found: those of
    linear layers. Raises Fp8LayersDiffer.
    """
    missing = sorted(name for name, quantized in expected.items() if quantized and not found.get(name, False))
    unexpected = sorted(name for name, quantized in found.items() if quantized and not expected.get(name, False))
    if missing or unexpected:
        raise Fp8LayersDiffer(where, missing, unexpected)


def audit_servers(
    urls: Sequence[str],
    layout: ServerLayout,
    quantized: Mapping[str, bool],
    directory: Path,
    timeout_s: float,
    api_key: str | None = None,
) -> dict[str, bool]:
    """What the servers at `urls` hold, by parameter. quantized: what they should, by Hugging Face tensor. directory:
    where they can write their answers.

    Every tensor-parallel rank of every server is asked. Raises Fp8LayersDiffer, naming the server, and ServerError when
    one does not answer or was started without the function that does.
    """
    expected: dict[str, bool] = {}
    for name, in_fp8 in quantized.items():
        parameter, _, _ = layout.parameter(name)
        if expected.setdefault(parameter, in_fp8) != in_fp8:
            raise ValueError(f"only a part of {parameter} is to be in FP8")
    found: dict[str, bool] = {}
    with contextlib.closing(Receivers(urls, layout.tensor_parallel, api_key)) as receivers:
        for url, answers in zip(urls, _server_layers(receivers, directory, timeout_s), strict=True):
            for rank, found in enumerate(answers):
                check(f"rollout server {url}, rank {rank}", expected, found)
    return found


def _server_layers(receivers: Receivers, directory: Path, timeout_s: float) -> list[list[dict[str, bool]]]:
    """The answers of each server, one a rank."""
    deadline = Deadline.after(timeout_s)
    for loaders in receivers.each(lambda server: server.custom_weight_loaders(deadline.left())):
        if FP8_REPORT not in loaders:
            raise ServerError(
                "a rollout server was not started for FP8 rollouts: start it with the model in server_model/ of the "
                f"run's directory, --load-format dummy and --custom-weight-loader {FP8_REPORT}"
            )
    with tempfile.TemporaryDirectory(prefix="fp8-layers-", dir=directory) as answers:
        paths = {
            server.url: [Path(answers).resolve() / f"{i}-{rank}" for rank in range(receivers.ranks)]
            for i, server in enumerate(receivers.admins)
        }

        def ask(server: ServerAdmin) -> None:
            server.update_weights_from_tensor(
                payloads=[payload({"answer": str(path)}) for path in paths[server.url]],
                flush_cache=False,
                timeout_s=deadline.left(),
                load_format=FP8_REPORT,
            )
            server.wait_for_ranks(deadline.left())

        with weight_update(receivers, deadline, abandon=lambda: None):
            receivers.each(ask)
        try:
            return [[json.loads(path.read_text()) for path in of_server] for of_server in paths.values()]
        except OSError as error:
            raise ServerError(f"a rollout server wrote no list of its FP8 layers: {error}") from error


def audit_trainer(chunks: Sequence[torch.nn.Module], hf: HFModelConfig, selection: Selection) -> dict[str, bool]:
    """What the trainer's layers do, by Megatron-Core parameter, over all ranks. Collective.

    Call it after a forward: Transformer Engine's modules know by then. Raises Fp8LayersDiffer on every rank.
    """
    table = weight_table(hf, hf.vocab_size)
    mine: dict[str, tuple[bool, bool]] = {}
    for name, parameter, module in _linear_parameters(chunks):
        mine[name] = selection.parameter(name, table.rule(name), tuple(parameter.shape)), in_fp8(module)
    everywhere: list[dict[str, tuple[bool, bool]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, mine, group=control_group())
    for rank, theirs in enumerate(everywhere):
        expected = {name: should for name, (should, _) in theirs.items()}
        check(f"trainer, rank {rank}", expected, {name: is_ for name, (_, is_) in theirs.items()})
    return {name: is_ for theirs in everywhere for name, (_, is_) in theirs.items()}


def in_fp8(module: torch.nn.Module) -> bool:
    """Whether a module multiplied in FP8: Transformer Engine's in its last forward, an emulated one always."""
    return isinstance(module, tuple(EMULATED.values())) or bool(getattr(module, "fp8", False))


def _linear_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor, torch.nn.Module]]:
    owners = {
        id(parameter): module
        for chunk in chunks
        for module in unwrap(chunk).modules()
        for parameter in module.parameters(recurse=False)
    }
    for name, parameter in local_parameters(chunks):
        if parameter.dim() == 2 and layer_of(name) is not None:
            yield name, parameter, owners[id(parameter)]


def record(directory: Path, side: str, found: Mapping[str, bool]) -> None:
    """Say in the log and in the run's fp8_layers.json what was found on one side."""
    path = directory / RECORD
    sides = json.loads(path.read_text()) if path.is_file() else {}
    layers = {quantized: sorted(name for name, is_ in found.items() if is_ == quantized) for quantized in (True, False)}
    sides[side] = {"fp8": layers[True], "not": layers[False]}
    path.write_text(json.dumps(sides, indent=1) + "\n")
    log.info(
        "FP8 on the %s: %s; in the model's dtype: %s",
        side,
        _summary(layers[True]),
        _summary(layers[False]) or "no linear layer",
    )


def _summary(names: Sequence[str]) -> str:
    """Kinds of layers with their number: `36 × self_attn.qkv_proj`."""
    kinds = Counter(
        re.sub(r"^.*?layers\.\d+\.|\.weight\d*$", "", re.sub(r"experts\.\d+", "experts.*", n)) for n in names
    )
    return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())

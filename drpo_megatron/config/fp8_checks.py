"""FP8 that cannot run, or settings of it that would do nothing: refused with the reason and what would run."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from drpo_megatron import platform
from drpo_megatron.config.schema import Fp8Config, RunConfig

if TYPE_CHECKING:
    from drpo_megatron.models.hf_config import HFModelConfig

_DELAYED = ("margin", "amax_history", "amax_algorithm")
_TRAINING = ("format", *_DELAYED, "block_scales", "parameters", "health_every")


def _changed(fp8: Fp8Config, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if getattr(fp8, name) != Fp8Config.model_fields[name].default:
            yield name


def fp8_problems(config: RunConfig) -> Iterator[str]:
    """What the section says against itself, the optimizer and this machine."""
    fp8 = config.fp8
    if fp8.recipe is None:
        elsewhere = ("backend", "unquantized_first_layers", "unquantized_last_layers")
        for name in _changed(fp8, _TRAINING if fp8.rollout else (*elsewhere, *_TRAINING)):
            without = "" if fp8.rollout else " and fp8.rollout = false"
            yield f"fp8.{name}: has no effect with fp8.recipe = null{without}; set fp8.recipe, or remove it"
        return
    if fp8.recipe != "delayed":
        for name in _changed(fp8, _DELAYED):
            yield (
                f"fp8.{name}: has no effect with fp8.recipe = {fp8.recipe}, whose scales come from the tensor itself; "
                "remove it, or set fp8.recipe to delayed"
            )
    if fp8.recipe != "blockwise":
        for name in _changed(fp8, ("block_scales",)):
            yield f"fp8.{name}: has no effect with fp8.recipe = {fp8.recipe}; remove it, or set fp8.recipe to blockwise"
    if fp8.backend == "emulate":
        if fp8.parameters:
            yield (
                "fp8.parameters: is true with fp8.backend = emulate, which keeps parameters in the model's dtype; "
                "remove it, or set fp8.backend to transformer_engine on a GPU"
            )
        return
    yield from machine_problems(fp8)
    if fp8.parameters and not config.optimizer.distributed:
        yield (
            "fp8.parameters: is true with optimizer.distributed = false, and only the distributed optimizer of "
            "Megatron-Core updates FP8 parameters; turn optimizer.distributed on, or remove it"
        )
    if fp8.recipe == "delayed" and (fp8.unquantized_first_layers or fp8.unquantized_last_layers):
        yield (
            "fp8.unquantized_first_layers, fp8.unquantized_last_layers: Megatron-Core leaves no layer out under "
            "fp8.recipe = delayed; set both to 0, or use fp8.recipe tensorwise or fp8.backend emulate"
        )


def machine_problems(fp8: Fp8Config) -> Iterator[str]:
    """What Transformer Engine needs. Its own checks say the same when the first layer runs."""
    emulate = "fp8.backend: emulate computes the same numbers on any device, slowly"
    capability = platform.compute_capability()
    if capability is None:
        yield f"fp8.backend: is transformer_engine and this machine has no CUDA device; {emulate}"
        return
    if importlib.util.find_spec("transformer_engine") is None:
        yield (
            "fp8.backend: is transformer_engine, which is not installed; install transformer-engine[pytorch], or set "
            f"another: {emulate}"
        )
        return
    at_least, below = {"mxfp8": ((10, 0), (12, 0)), "blockwise": ((9, 0), None)}.get(fp8.recipe or "", ((8, 9), None))
    if capability < at_least or (below is not None and capability >= below):
        runs = ["blockwise"] if capability >= (9, 0) and fp8.recipe != "blockwise" else []
        runs += ["tensorwise", "delayed"] if capability >= (8, 9) else []
        here = f"fp8.recipe {' or '.join(runs)} would run here, and " if runs else ""
        limit = f" and below {below[0]}.{below[1]}" if below is not None else ""
        yield (
            f"fp8.recipe: {fp8.recipe} needs a compute capability of {at_least[0]}.{at_least[1]} or more{limit}, this "
            f"device has {capability[0]}.{capability[1]}; {here}{emulate}"
        )


def fp8_layer_problems(config: RunConfig, hf: HFModelConfig) -> Iterator[str]:
    """What the section says against the model."""
    fp8, layers = config.fp8, hf.num_layers
    if fp8.recipe is None and not fp8.rollout:
        return
    first, last = fp8.unquantized_first_layers, fp8.unquantized_last_layers
    if not fp8.quantized_layers(layers):
        yield (
            f"fp8.unquantized_first_layers, fp8.unquantized_last_layers: {first} + {last} leave none of the model's "
            f"{layers} layers in FP8; lower them, or remove the fp8 section"
        )
    if fp8.recipe is None or fp8.backend == "emulate":
        return
    in_stage = layers // config.parallel.pipeline
    for name, count in (("first", first), ("last", last)):
        if count > in_stage:
            yield (
                f"fp8.unquantized_{name}_layers: {count} is above the {in_stage} layers of a pipeline stage, which is "
                "Megatron-Core's limit; lower it, or set fp8.backend to emulate"
            )

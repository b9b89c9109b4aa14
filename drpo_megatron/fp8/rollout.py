"""FP8 rollouts: the model that servers are started with, and the weights that they are sent.

With Transformer Engine's backend the servers run SGLang's FP8 layers: a weight goes out as `NAME.weight` in e4m3 and
`NAME.weight_scale_inv` in float32, one scale for each 128 × 128 block (`weights.fp8`). Emulated, it goes out as the
product of the two in the model's dtype, and `platform.sglang_cpu_fp8` rounds what it is multiplied with. Which layers
those are the server reads in the `quantization_config` of its model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from drpo_megatron.config.schema import RunConfig, ServerConfig
from drpo_megatron.fp8.selection import Selection
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.platform.sglang_cpu_fp8 import EMULATED
from drpo_megatron.rollout.server_args import FP8_REPORT, with_loader
from drpo_megatron.weights import fp8
from drpo_megatron.weights.families import weight_table
from drpo_megatron.weights.hf_io import ModelDirectory, SafetensorsReader

NamedTensors = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class RolloutWeights:
    """What servers hold. quantized: every Hugging Face tensor of the model, and whether it is. stored: quantized ones
    are FP8 and scales; otherwise their product.
    """

    quantized: dict[str, bool]
    stored: bool

    @classmethod
    def of(cls, config: RunConfig) -> Self | None:
        """None where rollouts are not in FP8. Reads config.json and the headers of the model's files."""
        if not config.fp8.rollout:
            return None
        hf = HFModelConfig.load(config.model.path)
        reader = SafetensorsReader(config.model.path)
        selection = Selection.of(config.fp8, hf.num_layers)
        quantized = selection.hf_weights(weight_table(hf, hf.vocab_size), lambda name: reader[name].shape)
        return cls(quantized, stored=config.fp8.backend == "transformer_engine")

    def write_model(self, config: RunConfig) -> None:
        """The directory that servers are started with: configuration and tokenizer, without weights. Replaces it."""
        quantization = fp8.quantization_config(name for name, in_fp8 in self.quantized.items() if not in_fp8)
        if not self.stored:
            quantization["quant_method"] = EMULATED
        directory = ModelDirectory(server_model(config), config.model.path, replace=True)
        try:
            directory.commit([], 0, getattr(torch, config.model.dtype), quantization)
        except BaseException:
            directory.abort()
            raise

    def stream(self, buckets: Iterable[NamedTensors]) -> Iterator[NamedTensors]:
        """Buckets of full Hugging Face tensors as the servers take them.

        A bucket's FP8 weights come first and their scales last, because one flattened bucket on the wire has one dtype.
        Raises KeyError for a tensor that the model's files do not have.
        """
        for bucket in buckets:
            weights: NamedTensors = []
            others: NamedTensors = []
            scales: NamedTensors = []
            for name, tensor in bucket:
                if not self.quantized[name]:
                    others.append((name, tensor))
                    continue
                weight, scale = fp8.quantize(tensor)
                if self.stored:
                    weights.append((name, weight))
                    scales.append((name + fp8.SCALE_SUFFIX, scale))
                else:
                    others.append((name, fp8.dequantize(weight, scale).to(tensor.dtype)))
            yield weights + others + scales


def server_model(config: RunConfig) -> Path:
    """The model's directory that servers are started with."""
    return config.run_directory / "server_model" if config.fp8.rollout else config.model.path


def server_settings(config: RunConfig) -> ServerConfig:
    """What servers are started with beside it: no weights, because a push comes before the first request, and the
    function that the audit asks.
    """
    settings = config.rollout.server
    if not config.fp8.rollout:
        return settings
    settings = with_loader(settings, FP8_REPORT)
    return settings.model_copy(update={"args": settings.args | {"load_format": "dummy"}})

"""A conversion from checkpoint to Hugging Face directory against a bare safetensors write of the same bytes.

A Llama of about 1.1 billion random bf16 weights is made on the spot and becomes a checkpoint. Converting it, checksums
and all, alternates with writing the converted shards again from memory with safetensors' own function; both are on disk
when their time ends. The checkpoint is in the page cache, as one that was just written. A sample is the quotient of two
neighbours in time. Memory is the growth of this process's peak over a conversion, in shards: the converter reads and
writes files and maps none, so the kernel's cache of them is not counted. That is with one process; with two on the same
machine, and from Hugging Face to checkpoint, are reported without a bound.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drpo_megatron.bench.report import Figure
from drpo_megatron.bench.resident import peak, reset_peak

REPETITIONS = 5
SHARD_BYTES = 500 * 1000**2
CHECKPOINT_FILE_BYTES = 1000**3
# TinyLlama's sizes.
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def measure() -> dict[str, Figure]:
    """Takes 8 GB of the temporary directory, which it gives back."""
    import torch

    from drpo_megatron.weights.convert_to_checkpoint import hf_to_checkpoint
    from drpo_megatron.weights.convert_to_hf import checkpoint_to_hf

    torch.set_num_threads(1)
    samples: dict[str, list[float]] = {
        key: [] for key in ("ratio_to_raw_write", "peak_shards", "two_processes_ratio", "to_checkpoint_ratio")
    }
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        model, checkpoint, out = directory / "model", directory / "checkpoint", directory / "out"
        write_model(model)
        hf_to_checkpoint(model, checkpoint, max_shard_bytes=CHECKPOINT_FILE_BYTES)

        def export(processes: int) -> Any:
            return checkpoint_to_hf(checkpoint, out, max_shard_bytes=SHARD_BYTES, processes=processes)

        for _ in range(REPETITIONS):
            before = reset_peak()
            seconds, plan = _timed(lambda: export(1))
            samples["peak_shards"].append((peak() - before) / plan.largest_shard)
            raw_s = _raw_write(out, directory / "raw")
            samples["ratio_to_raw_write"].append(seconds / raw_s)
            shutil.rmtree(out)
            samples["two_processes_ratio"].append(_timed(lambda: export(2))[0] / raw_s)
            shutil.rmtree(out)
            seconds, _ = _timed(lambda: hf_to_checkpoint(model, out, max_shard_bytes=CHECKPOINT_FILE_BYTES))
            samples["to_checkpoint_ratio"].append(seconds / raw_s)
            shutil.rmtree(out)
    bounds = {"ratio_to_raw_write": "<= 1.3", "peak_shards": "<= 2"}
    return {key: Figure.of(values, bounds.get(key)) for key, values in samples.items()}


def write_model(directory: Path) -> None:
    """A Hugging Face directory of MODEL with random weights, in shards, one tensor in memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from drpo_megatron.weights.hf_io import ModelDirectory, ShardFile

    with tempfile.TemporaryDirectory() as source:
        (Path(source) / "config.json").write_text(json.dumps(MODEL))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        shapes = {name: (tuple(weight.shape), torch.bfloat16) for name, weight in model.named_parameters()}
        names = list(shapes)
        half = len(names) // 2
        generator = torch.Generator().manual_seed(0)
        target = ModelDirectory(directory, source)
        try:
            shards = [names[:half], names[half:]]
            for i, shard in enumerate(shards):
                with ShardFile(target.part(i), {name: shapes[name] for name in shard}) as file:
                    for name in shard:
                        shape, dtype = shapes[name]
                        file.write(name, torch.empty(shape, dtype=dtype).normal_(std=0.02, generator=generator))
            target.commit(shards, sum(weight.numel() * 2 for weight in model.parameters()), torch.bfloat16)
        except BaseException:
            target.abort()
            raise


def _timed[T](run: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _raw_write(converted: Path, target: Path) -> float:
    """Seconds in which the shards of `converted` are written again from memory."""
    from safetensors.torch import load, save_file

    target.mkdir()
    seconds = 0.0
    for shard in sorted(converted.glob("*.safetensors")):
        tensors = load(shard.read_bytes())
        start = time.perf_counter()
        save_file(tensors, target / shard.name, metadata={"format": "pt"})
        with (target / shard.name).open("rb") as file:
            os.fsync(file.fileno())
        seconds += time.perf_counter() - start
        del tensors
    shutil.rmtree(target)
    return seconds

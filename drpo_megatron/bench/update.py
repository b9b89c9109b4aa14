"""What an update costs on this machine's device: tokens a second, share of its bf16 peak, memory, in each precision.

One rank trains a model with random weights by the code that trains large ones, in one process for all variants. On a
GPU that is a Qwen3 of 1.7 billion parameters in bf16, with whole logits in place of the fused loss, and in every FP8
recipe that the device has; on a CPU a model of some five million in float32, to show that the bench works. The first
updates of a variant, which make the optimizer's state and tune kernels, are not counted. Memory is the device's peak
above what was there before the policy was built (on a CPU it is not measured), and is compared with the plan's.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from drpo_megatron.bench.report import Figure, run_worker

WARM_UP, REPETITIONS = 2, 3
_QWEN3: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPU_MODEL = _QWEN3 | {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
CPU_MODEL = _QWEN3 | {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
DENSE = {"algorithm.projection.backend": "dense"}


def measure() -> dict[str, Figure]:
    """Raises CalledProcessError when the worker fails; its message is on stderr."""
    from drpo_megatron.platform import compute_capability

    chosen = variants(compute_capability())
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        files = [directory / f"{name}.yaml" for name in chosen]
        for path, overrides in zip(files, chosen.values(), strict=True):
            path.write_text(json.dumps(settings(directory / "model", overrides)))  # which is YAML
        measured = run_worker("drpo_megatron.bench.update_worker", *files)
    return figures(dict(zip(chosen, measured, strict=True)))


def variants(capability: tuple[int, int] | None) -> dict[str, dict[str, Any]]:
    """Settings by name, the first being what the others are compared with, for a device of this compute capability."""
    if capability is None:
        return {"float32": {}, "float32_dense": DENSE}
    recipes = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
    fp8 = {f"fp8_{name}": {"fp8.recipe": name} for name, least in recipes.items() if capability >= least}
    return {"bfloat16": {}, "bfloat16_dense": DENSE, **fp8}


def settings(model: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a variant. The kind of model says the sizes: see `update_worker`."""
    from drpo_megatron.platform import has_cuda

    prompt, response, sequences = (512, 1536, 16) if has_cuda() else (32, 96, 8)
    made: dict[str, Any] = {
        "name": "bench-update",
        "model": {"path": str(model), "dtype": "bfloat16" if has_cuda() else "float32"},
        "data": {"source": {"type": "function", "function": "none:none"}, "max_prompt_tokens": prompt},
        "reward": {"type": "function", "function": "none:none"},
        "rollout": {
            "prompts_per_step": sequences // 4,
            "samples_per_prompt": 4,
            # The last token of a sequence is no position of it.
            "sampling": {"max_new_tokens": response + 1},
        },
        "algorithm": {"loss_args": {"delta": 0.2}},
        "optimizer": {"lr": 1e-6},
        "training": {"steps": 1, "tokens_per_micro_batch": 4 * (prompt + response), "shared_prefix": "never"},
    }
    for key, value in overrides.items():
        *sections, name = key.split(".")
        section = made
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return made


def figures(measured: dict[str, dict[str, Any]]) -> dict[str, Figure]:
    """measured: what the worker says of each variant, by its name."""
    reference = statistics.median(next(iter(measured.values()))["seconds"])
    made: dict[str, Figure] = {}
    for name, one in measured.items():
        seconds = one["seconds"]
        made[f"tokens_per_s_{name}"] = Figure.of([one["positions"] / s for s in seconds])
        made[f"speedup_{name}"] = Figure.of([reference / s for s in seconds])
        if one["peak_flops_per_s"]:
            made[f"mfu_{name}"] = Figure.of([one["flops"] / s / one["peak_flops_per_s"] for s in seconds])
        if one["peak_bytes"]:
            made[f"peak_gb_{name}"] = Figure.of([one["peak_bytes"] / 1e9])
            made[f"plan_over_peak_{name}"] = Figure.of([one["planned_bytes"] / one["peak_bytes"]])
        made[f"grad_norm_{name}"] = Figure.of([one["grad_norm"]])
    return made

"""The plan's memory against runs on this machine, and how long a plan of 671 billion parameters takes.

Each layout trains a model of some thirty million parameters for two updates, by the code that trains large ones. The
resident memory of a rank at the fullest moment of the second, above what a process has before it builds its policy, is
compared with the plan's number for the rank's stage. What is compared is everything that grows with the model: weights,
gradients, optimizer state, activations and logits, with the activations of the local kernels, the only ones that run
here.

Resident memory is what the process was given, whoever allocated and freed it: a profiler of allocations does not see
what the threads of gloo free. glibc is told to give every block above 64 KiB pages of its own, so that what is freed is
gone at once.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo_megatron.bench.report import Figure

ROOT = Path(__file__).parents[2]
LARGEST = "deepseek-v3-671b"
REPETITIONS = 5
_MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
PROMPT, RESPONSE = 64, 192
_RUN: dict[str, Any] = {
    "name": "bench-plan",
    "data": {"source": {"type": "function", "function": "none:none"}, "max_prompt_tokens": PROMPT},
    "reward": {"type": "function", "function": "none:none"},
    "rollout": {
        "prompts_per_step": 4,
        "samples_per_prompt": 4,
        # The last token of a sequence is no position of it.
        "sampling": {"max_new_tokens": RESPONSE + 1},
    },
    "algorithm": {"loss_args": {"delta": 0.2}, "projection": {"memory_budget_mb": 4}},
    "training": {"steps": 1, "tokens_per_micro_batch": 4 * (PROMPT + RESPONSE), "shared_prefix": "never"},
}


@dataclass(frozen=True)
class Layout:
    """One run. parallel: the settings of that section."""

    name: str
    parallel: dict[str, Any]
    moe: bool = False
    recompute: str = "none"
    distributed: bool = True

    @property
    def ranks(self) -> int:
        return math.prod(self.parallel.get(key, 1) for key in ("tensor", "pipeline", "data"))


LAYOUTS = (
    Layout("one_rank", {}),
    Layout("one_rank_full", {}, recompute="full"),
    Layout("dp2", {"data": 2}),
    Layout("dp2_whole_optimizer", {"data": 2}, distributed=False),
    Layout("tp2", {"tensor": 2}),
    Layout("tp2_sp_selective", {"tensor": 2, "sequence_parallel": True}, recompute="selective"),
    Layout("pp2_full", {"pipeline": 2}, recompute="full"),
    Layout("pp2_vpp2", {"pipeline": 2, "virtual_pipeline": 2}),
    Layout("tp2_pp2", {"tensor": 2, "sequence_parallel": True, "pipeline": 2}),
    Layout("moe_one_rank", {}, moe=True),
    Layout("moe_ep2", {"data": 2, "expert": 2}, moe=True),
    Layout("moe_tp2_ep2_full", {"tensor": 2, "sequence_parallel": True, "expert": 2}, moe=True, recompute="full"),
)


def measure() -> dict[str, Figure]:
    """Raises CalledProcessError when a run fails; its message is on stderr."""
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        models = {moe: _write_model(directory, moe) for moe in (False, True)}
        for layout in LAYOUTS:
            errors[layout.name] = compare(layout, models[layout.moe], directory)
    return {
        "memory_error_max": Figure(max(errors.values()), (min(errors.values()), max(errors.values())), "<= 0.10"),
        "layouts_measured": Figure.of([len(errors)], ">= 8"),
        "seconds_671b": Figure.of([_plan_seconds() for _ in range(REPETITIONS)], "<= 3"),
        **{f"memory_error_{name}": Figure.of([error]) for name, error in errors.items()},
    }


def compare(layout: Layout, model: Path, directory: Path) -> float:
    """The largest relative error over the ranks of one layout, which it runs."""
    from drpo_megatron.config import load_config
    from drpo_megatron.models.hf_config import HFModelConfig
    from drpo_megatron.plan.assumptions import Assumptions
    from drpo_megatron.plan.memory import trainer_memory
    from drpo_megatron.plan.workload import Workload

    path = directory / f"{layout.name}.yaml"
    path.write_text(json.dumps(settings(layout, model)))  # which is YAML
    config = load_config(path)
    assumed = Assumptions.of(config, [f"prompt_tokens={PROMPT}", f"response_tokens={RESPONSE}"])
    stages = trainer_memory(config, HFModelConfig.load(model), Workload.of(config, assumed), assumed, "local")
    largest = 0.0
    for measured in _run(path, layout.ranks):
        stage = stages[measured["stage"]]
        predicted = stage.states.total + stage.peak.total
        error = abs(predicted / measured["peak"] - 1)
        largest = max(largest, error)
        print(
            f"{layout.name:24} stage {measured['stage']}: states {stage.states.total / 1e6:6.1f} of "
            f"{measured['states'] / 1e6:6.1f} MB, peak {predicted / 1e6:6.1f} of {measured['peak'] / 1e6:6.1f} MB, "
            f"error {error:.3f}",
            file=sys.stderr,
            flush=True,
        )
    return largest


def settings(layout: Layout, model: Path) -> dict[str, Any]:
    """The configuration of a run of `layout`."""
    return {
        **_RUN,
        "model": {"path": str(model), "dtype": "float32", "recompute": layout.recompute},
        "parallel": layout.parallel,
        "optimizer": {"lr": 1e-4, "distributed": layout.distributed},
    }


def _run(config: Path, ranks: int) -> list[dict[str, int]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "-m", "drpo_megatron.bench.plan_worker", str(config)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "MALLOC_MMAP_MAX_": "1000000",
        },
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    answers: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def _plan_seconds() -> float:
    """Of the whole command, from its start to its end."""
    model = ROOT / "tests" / "data" / "hf_configs" / LARGEST
    recipe = ROOT / "configs" / f"{LARGEST}.yaml"
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "drpo_megatron.cli", "plan", str(recipe), f"model.path={model}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def _write_model(directory: Path, moe: bool) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = directory / ("moe" if moe else "dense")
    model = (
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**_MODEL, **_EXPERTS, norm_topk_prob=True))
        if moe
        else Qwen3ForCausalLM(Qwen3Config(**_MODEL))
    )
    model.save_pretrained(path)
    return path

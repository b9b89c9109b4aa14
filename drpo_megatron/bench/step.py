"""Where the time of a step goes, and what the DRPO loss costs over plain cross entropy.

The rates and shares come from a short run of the quickstart recipe (real server, real trainer); its first steps, which
warm both up, are left out. `drpo_over_cross_entropy` times forward and backward of the same packed batch under both
losses, alternately, on one rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from drpo_megatron.bench.report import Figure

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
STEPS, WARM_UP = 12, 2
REPETITIONS = 9
SEQUENCES, LENGTH = 16, 128
VERBS = ("generate", "advantages", "pack", "train", "sync")


def measure() -> dict[str, Figure]:
    """Raises CalledProcessError when the run fails; its message is on stderr."""
    with tempfile.TemporaryDirectory() as directory:
        steps = _run_recipe(Path(directory))
        figures = {
            "generate_tokens_per_s": Figure.of([s["perf/generate_tokens_per_s"] for s in steps]),
            "train_tokens_per_s": Figure.of([s["perf/train_tokens_per_s"] for s in steps]),
        }
        for verb in VERBS:
            figures[f"share_{verb}"] = Figure.of([s[f"perf/{verb}_s"] / s["perf/step_s"] for s in steps])
        ratios = subprocess.run(
            [sys.executable, "-m", "drpo_megatron.bench.step", str(Path(directory) / "model")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        figures["drpo_over_cross_entropy"] = Figure.of(json.loads(ratios.stdout.splitlines()[-1]), "<= 1.05")
    return figures


def _run_recipe(directory: Path) -> list[dict[str, float]]:
    overrides = [
        "name=bench-step",
        f"model.path={directory / 'model'}",
        f"tracking.directory={directory}",
        "tracking.wandb=false",
        "tracking.tensorboard=false",
        "training.export=false",
        f"training.steps={STEPS}",
    ]
    subprocess.run(
        [sys.executable, "-m", "drpo_megatron.cli", "train", str(RECIPE), *overrides], check=True, stdout=sys.stderr
    )
    lines = (directory / "bench-step" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][WARM_UP:]


def _loss_ratios(model_path: Path) -> list[float]:
    """Time of a DRPO forward and backward over that of cross entropy, one ratio a repetition."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from drpo_megatron.algorithms import make_loss
    from drpo_megatron.models.builder import build_model, forward_packed, output_weight
    from drpo_megatron.models.hf_config import HFModelConfig
    from drpo_megatron.platform import device, distributed, spec_backend
    from drpo_megatron.platform.layout import ParallelLayout
    from drpo_megatron.vocab_parallel import fused_policy_loss
    from drpo_megatron.weights.importer import load_hf

    layout = ParallelLayout()
    distributed.initialize(layout)
    torch.set_num_threads(1)
    hf = HFModelConfig.load(model_path)
    (model,) = build_model(hf, layout, params_dtype=torch.float32, spec_backend=spec_backend())
    load_hf([model], model_path, hf)
    weight_VH = output_weight(model)
    assert weight_VH is not None, "one stage is the last one"

    total = SEQUENCES * LENGTH
    tokens_T = torch.randint(0, hf.vocab_size, (total,), device=device())
    labels_T = tokens_T.roll(-1)
    positions_T = torch.arange(LENGTH, device=device()).repeat(SEQUENCES)
    bounds = torch.arange(0, total + 1, LENGTH, dtype=torch.int32, device=device())
    everywhere_T = torch.ones_like(tokens_T, dtype=torch.bool)
    advantages_T = torch.randn(total, device=device())
    weights_T = torch.full((total,), 1.0 / total, device=device())
    logmu_T = torch.full((total,), -4.0, device=device())
    loss_function = make_loss("drpo", {"delta": 0.2})
    group = parallel_state.get_tensor_model_parallel_group()

    def drpo(hidden_TH: torch.Tensor) -> torch.Tensor:
        return fused_policy_loss(
            hidden_TH,
            weight_VH,
            labels_T,
            mask_T=everywhere_T,
            loss_function=loss_function,
            logmu_T=logmu_T,
            advantages_T=advantages_T,
            weights_T=weights_T,
            group=group,
            vocab_size=hf.vocab_size,
        ).loss

    def cross_entropy(hidden_TH: torch.Tensor) -> torch.Tensor:
        logits_TV = torch.nn.functional.linear(hidden_TH, weight_VH)
        return vocab_parallel_cross_entropy(logits_TV.float(), labels_T).mean()

    def seconds(loss: object) -> float:
        start = time.perf_counter()
        hidden = forward_packed(model, tokens_T, positions_T, bounds, LENGTH)
        loss(hidden.squeeze(0)).backward()  # type: ignore[operator]
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(drpo), seconds(cross_entropy)
    ratios = [seconds(drpo) / seconds(cross_entropy) for _ in range(REPETITIONS)]
    distributed.shutdown()
    return ratios


if __name__ == "__main__":
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    print(json.dumps(_loss_ratios(Path(sys.argv[1]))))

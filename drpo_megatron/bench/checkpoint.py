"""How long a checkpoint holds up training: begun and left to a process of its own, over written while training waits.

The SmolLM2 policy with its real weights, fp32, one rank, after an update: weights, main weights, Adam's moments. Both
ways alternate; a sample is the quotient of two neighbours in time. What counts of the asynchronous way is what
training waits for: planning, copying and forking when it begins, and giving the complete checkpoint its name. Both
write to the disk (fsync) and compute checksums. `update_beside_ratio`: an update while the process writes, which has
half of the machine and a copy of every page that the update changes, over one after a synchronous save.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from drpo_megatron.bench.report import Figure, run_worker

RECIPE = Path(__file__).parents[2] / "configs" / "smollm2-arithmetic.yaml"
REPETITIONS = 5


def measure() -> dict[str, Figure]:
    """Raises CalledProcessError when the worker fails; its message is on stderr."""
    from drpo_megatron.models.recipes import ensure_model

    with tempfile.TemporaryDirectory() as directory:
        model = ensure_model("smollm2_135m", Path(directory) / "smollm2-135m")
        samples = run_worker("drpo_megatron.bench.checkpoint", model, directory, REPETITIONS)
    pairs = list(zip(samples["stall"], samples["whole"], strict=True))
    return {
        "async_stall_share": Figure.of([stall / whole for stall, whole in pairs], "<= 0.1"),
        "update_beside_ratio": Figure.of(
            [beside / alone for beside, alone in zip(samples["beside"], samples["alone"], strict=True)]
        ),
        "megabytes": Figure.of([samples["bytes"] / 1e6]),
        "megabytes_per_s_synchronous": Figure.of([samples["bytes"] / 1e6 / whole for _, whole in pairs]),
    }


def run(model: Path, directory: Path, repetitions: int) -> dict[str, object]:
    """Seconds that training waits: `whole` for a synchronous save, `stall` for an asynchronous one; and those of the
    update behind it, `alone` and `beside` the process that writes.
    """
    import torch

    from drpo_megatron.bench.prefix import synthetic_updates
    from drpo_megatron.config import load_config
    from drpo_megatron.platform import distributed

    overrides = [f"model.path={model}", "parallel.pipeline=1", "save.every=1", "save.keep=1"]
    configs = {
        name: load_config(
            RECIPE, [*overrides, f"tracking.directory={directory / name}", f"save.asynchronous={name == 'stall'}"]
        )
        for name in _WAYS
    }
    distributed.initialize(configs["whole"].layout)
    torch.set_num_threads(1)

    from drpo_megatron.checkpoint import manifest as manifests
    from drpo_megatron.checkpoint.saver import Saver, leave_alone_what_stays
    from drpo_megatron.training.step import Policy

    policy = Policy(configs["whole"])
    (update,) = synthetic_updates(1, 1, 2, policy.hf.vocab_size)
    policy.update(update, version=0)
    leave_alone_what_stays()
    savers = {name: Saver(config) for name, config in configs.items()}
    samples: dict[str, list[float]] = {name: [] for name in (*_WAYS, *_WAYS.values())}

    def seconds(name: str, step: int) -> tuple[float, float]:
        saver = savers[name]
        begin = time.perf_counter()
        saver.save(policy, step, step, None, {})
        begun = time.perf_counter()
        policy.update(update, version=step)
        updated = time.perf_counter()
        saver.wait_for_writer()  # training goes on meanwhile
        written = time.perf_counter()
        saver.poll()
        return begun - begin + time.perf_counter() - written, updated - begun

    for name in _WAYS:
        seconds(name, 1)
    for repetition in range(repetitions):
        for name, behind in _WAYS.items():
            waited, update_s = seconds(name, 2 + repetition)
            samples[name].append(waited)
            samples[behind].append(update_s)
    written = manifests.read(configs["whole"].checkpoint_directory / f"step_{1 + repetitions:06d}").total_bytes
    distributed.shutdown()
    return samples | {"bytes": written}


_WAYS = {"whole": "alone", "stall": "beside"}

if __name__ == "__main__":
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))

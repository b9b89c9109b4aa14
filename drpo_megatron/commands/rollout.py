"""`drpo rollout`: sample and score, without a trainer."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path

from drpo_megatron.commands import EXIT_FAILED, EXIT_INTERRUPTED
from drpo_megatron.commands.train import prepare
from drpo_megatron.config import ConfigError, RunConfig, load_config

HELP = "Sample and score with the model as it is, without training, into a dump for `drpo train --rollouts`."
EXAMPLES = (
    "drpo rollout configs/quickstart.yaml --steps 3 name=sampled",
    "drpo rollout configs/smollm2-arithmetic.yaml --steps 1 name=before rollout.sampling.temperature=0.7",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example rollout.samples_per_prompt=4")
    parser.add_argument("--steps", type=int, metavar="N", help="batches to sample (training.steps)")


def _refuse(config: RunConfig) -> None:
    problems = []
    if config.rollout.from_dump is not None:
        problems.append("rollout.from_dump: has no effect where rollouts are made; remove it")
    if config.fp8.rollout:
        problems.append("fp8.rollout: servers get FP8 weights from a trainer, and there is none here; set it to false")
    if not config.tracking.dump_rollouts:
        problems.append("tracking.dump_rollouts: is false, and the dump is what this command makes; set it to true")
    if config.save.resume:
        problems.append("save.resume: there are no checkpoints without a trainer; remove it")
    if problems:
        raise ConfigError(problems)


def run(parsed: argparse.Namespace) -> int:
    steps = [] if parsed.steps is None else [f"training.steps={parsed.steps}"]
    config = load_config(parsed.config, parsed.overrides + steps)
    _refuse(config)
    prepare(config)
    from launch import local

    if moved := local.prepare_run_directory(config):
        print(f"an earlier run of this name is now {moved}")
    os.environ.update(local.training_environment(config))
    log_path = config.run_directory / "log" / "rollout.log"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", filename=log_path)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers are ended either way
    from drpo_megatron.data import DataError
    from drpo_megatron.rewards import RewardError
    from drpo_megatron.rollout.errors import ServerError

    try:
        _sample(config)
    except KeyboardInterrupt:
        print(f"interrupted: {config.run_directory} holds the steps so far", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ServerError, RewardError, DataError) as error:
        print(f"drpo: sampling failed. {type(error).__name__}: {error}\nlogs: {log_path.parent}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _sample(config: RunConfig) -> None:
    """`training.steps` batches with the weights of the model's directory. Raises what sampling and scoring raise."""
    from drpo_megatron.observability import Tracker
    from drpo_megatron.training.experience import Experience
    from drpo_megatron.training.metrics import rollout_metrics

    scores: list[float] = []
    tokens, seconds = 0, 0.0
    with Experience(config) as experience, Tracker(config) as tracker:
        experience.connect()
        for step in range(config.training.steps):
            began = time.monotonic()
            experience.admit_untrained()
            while experience.generate(step):
                experience.admit_untrained()
            groups = experience.take_groups()
            rollouts = [rollout for group in groups for rollout in group.rollouts]
            step_s, step_tokens = time.monotonic() - began, sum(len(r.response_ids) for r in rollouts)
            metrics = rollout_metrics(groups) | experience.metrics
            metrics |= {"perf/step_s": step_s, "perf/generate_tokens_per_s": step_tokens / step_s}
            tracker.log(step, metrics)
            tracker.dump_rollouts(step, groups)
            scores += [rollout.reward for rollout in rollouts]
            tokens, seconds = tokens + step_tokens, seconds + step_s
            print(
                f"step {step + 1}/{config.training.steps}  reward {metrics['reward/mean']:.4f}  "
                f"{metrics['perf/generate_tokens_per_s']:,.0f} tokens/s",
                flush=True,
            )
    _report(config, scores, tokens, seconds)


def _report(config: RunConfig, scores: list[float], tokens: int, seconds: float) -> None:
    import numpy as np

    lowest, quarter, median, three_quarters, highest = np.quantile(scores, [0, 0.25, 0.5, 0.75, 1])
    mean, error, solved = np.mean(scores), np.std(scores) / len(scores) ** 0.5, np.mean(np.array(scores) >= 1)
    print(f"{len(scores)} samples of {tokens / len(scores):.1f} tokens on average, {tokens / seconds:,.0f} tokens/s")
    print(f"reward: mean {mean:.4f} ± {error:.4f} (standard error), 1 or more in {solved:.1%}")
    print(f"        min {lowest:.4f}, quartiles {quarter:.4f} {median:.4f} {three_quarters:.4f}, max {highest:.4f}")
    print(f"`drpo train CONFIG --rollouts {config.run_directory}` trains from them")

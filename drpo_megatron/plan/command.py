"""`drpo plan`."""

from __future__ import annotations

import argparse
import json
import sys

from drpo_megatron.config import ConfigError, RunConfig, load_config
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.plan.advice import verdicts
from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.plan.devices import DEVICES, Device
from drpo_megatron.plan.report import as_json, as_text, proposals_as_json, proposals_text
from drpo_megatron.plan.run_plan import make_plan
from drpo_megatron.plan.search import search


def run(parsed: argparse.Namespace) -> list[str]:
    """Print the plan, or with `--search` the best layouts. Returns what does not fit, one sentence each, which are on
    stderr too.

    Raises ConfigError for a configuration that cannot be planned.
    """
    if parsed.search and not (parsed.gpus and parsed.gpus > 0):
        raise ConfigError(["--search: needs --gpus N, the GPUs of trainer and servers together"])
    if parsed.gpus and not parsed.search:
        raise ConfigError(["--gpus: has no effect without --search; the configuration says how many it takes"])
    config = load_config(parsed.config, parsed.overrides)
    hf = _architecture(config)
    device, assumed = DEVICES[parsed.device], Assumptions.of(config, parsed.assume)
    if config.fp8.recipe is not None or config.fp8.rollout:
        print(
            f"drpo: fp8 is planned as {config.model.dtype}: what servers and FP8 parameters hold, what a sync sends "
            "and the seconds of both are upper bounds",
            file=sys.stderr,
        )
    problems = (_search if parsed.search else _plan)(parsed, config, hf, device, assumed)
    for problem in problems:
        print(f"drpo: {problem}", file=sys.stderr)
    return problems


def _architecture(config: RunConfig) -> HFModelConfig:
    path = config.model.path / "config.json"
    if not path.is_file():
        made = ", or let `drpo train CONFIG --dry-run` make the model by its recipe" if config.model.recipe else ""
        raise ConfigError([f"model.path: {path} does not exist; put it there, nothing else of the model is read{made}"])
    try:
        return HFModelConfig.load(config.model.path)
    except (OSError, ValueError) as error:
        raise ConfigError([f"model.path: {error}"]) from error


def _plan(
    parsed: argparse.Namespace, config: RunConfig, hf: HFModelConfig, device: Device, assumed: Assumptions
) -> list[str]:
    try:
        plan = make_plan(config, hf, device, assumed)
    except ValueError as error:
        raise ConfigError([f"parallel: {error}"]) from error
    sentences = verdicts(plan, hf)
    print(json.dumps(as_json(plan, sentences), indent=1) if parsed.json else as_text(plan, sentences))
    fit = (plan.trainer_fits, plan.server_fits)
    return [sentence for fits, sentence in zip(fit, sentences, strict=True) if not fits]


def _search(
    parsed: argparse.Namespace, config: RunConfig, hf: HFModelConfig, device: Device, assumed: Assumptions
) -> list[str]:
    found = search(config, hf, device, parsed.gpus, assumed)
    if parsed.json:
        print(json.dumps(proposals_as_json(found, assumed), indent=1))
    elif found:
        print(proposals_text(found, parsed.gpus, assumed))
    if found:
        return []
    return [
        f"no layout of {parsed.gpus} {device.name} fits {config.name} with its servers; give more --gpus or another "
        "--device, or lower training.tokens_per_micro_batch"
    ]

"""What `drpo evaluate` was asked for, as the configuration of a run."""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from drpo_megatron.config import ConfigError, RunConfig, check_evaluation, load_config
from drpo_megatron.config.load import section_of
from drpo_megatron.config.schema import EvaluationSet, ReasoningGymData, RewardConfig, SyncConfig

GYM = "reasoning_gym"
GYM_SEED = 1_000_003  # far from what a run trains on
_FORMATS = {".jsonl": "jsonl", ".parquet": "parquet"}
_LAYOUTS = ("keys", "gsm8k", "math", "aime", "dapo")


def config_of(parsed: argparse.Namespace) -> RunConfig:
    """The configuration, or that of a plain model directory, with the command line's sets, samples and servers.

    Raises ConfigError for what cannot be evaluated; reads the sets' files.
    """
    target: Path = parsed.target
    flags = _flags(parsed)
    if target.is_dir():
        config = section_of(RunConfig, _settings_of(target), [*flags, *parsed.overrides])
    else:
        config = load_config(target, [*flags, *parsed.overrides])
    if not config.model.path.is_dir() and config.model.recipe is not None:
        raise ConfigError(
            [
                f"model.path: {config.model.path} does not exist; let `drpo train {target} --dry-run` make the model "
                "by its recipe, or set model.path to a trained one"
            ]
        )
    config = _only_evaluation(config, parsed)
    check_evaluation(config)
    return config


def out_path(parsed: argparse.Namespace, config: RunConfig) -> Path:
    """Where the results go. Raises ConfigError when something is there."""
    out: Path = parsed.out or config.tracking.directory / "evaluations" / (
        f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    )
    if out.exists():
        raise ConfigError([f"--out: {out} exists; name another file, or remove it"])
    return out


def _flags(parsed: argparse.Namespace) -> list[str]:
    """Options as overrides, which stand before the user's own."""
    flags = []
    if parsed.data:
        flags.append(f"evaluation.sets={json.dumps(_sets(parsed.data, parsed.limit))}")
    if parsed.samples is not None:
        flags.append(f"evaluation.samples={parsed.samples}")
    if parsed.k is not None:
        flags.append(f"evaluation.ks=[{parsed.k}]")
    if parsed.servers:
        flags.append(f"rollout.server.addresses={json.dumps([url.rstrip('/') for url in parsed.servers])}")
        flags.append("rollout.server.count=1")
    return flags


def _sets(specs: list[str], limit: int | None) -> dict[str, Any]:
    sets: dict[str, Any] = {}
    for spec in specs:
        name, chosen = parse_spec(spec)
        if chosen["source"]["type"] == GYM:
            if limit is None:
                raise ConfigError([f"--data {spec}: problems are generated without end; say how many with --limit"])
            chosen["source"]["size"] = limit
        if name in sets:
            raise ConfigError([f"--data {spec}: a second set of the name {name}; write NAME={spec}"])
        sets[name] = chosen
    return sets


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and `EvaluationSet` settings of a SPEC of the command line. Raises ConfigError."""
    found = re.fullmatch(r"(?:([A-Za-z0-9_-]+)=)?(.+)", spec)
    name, what = (found.group(1), found.group(2)) if found else (None, "")
    if what.startswith(f"{GYM}:"):
        task = what.removeprefix(f"{GYM}:")
        return name or task, {"source": {"type": GYM, "task": task, "seed": GYM_SEED}, "reward": {"type": GYM}}
    file, colon, layout = what.rpartition(":")
    if not colon or layout not in _LAYOUTS:
        file, layout = what, "auto"
    path = Path(file)
    if path.suffix not in _FORMATS:
        raise ConfigError(
            [
                f"--data {spec}: is no set; write [NAME=]FILE[:LAYOUT] with a .jsonl or .parquet file and one of the "
                f"layouts {', '.join(_LAYOUTS)}, or [NAME=]{GYM}:TASK. Overrides stand before --data"
            ]
        )
    source = {"type": _FORMATS[path.suffix], "path": file, "layout": layout}
    return name or re.sub("[^A-Za-z0-9_-]", "-", path.stem), {"source": source}


def _settings_of(directory: Path) -> dict[str, Any]:
    """A run's settings for a model directory alone: its dtype, half of its positions for a prompt at most, and
    math_verify. What only training reads is filled in with anything. Raises ConfigError when it is no model.
    """
    from drpo_megatron.models.hf_config import HFModelConfig

    try:
        positions = HFModelConfig.load(directory).max_position_embeddings
        stored = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError([f"{directory}: {error}; give a Hugging Face directory, or a run's YAML file"]) from error
    dtype = stored.get("dtype", stored.get("torch_dtype"))
    prompt = min(1024, positions // 2)
    return {
        "name": re.sub("[^A-Za-z0-9._-]", "-", "-".join(directory.resolve().parts[-2:])),
        "model": {"path": str(directory), "dtype": dtype if dtype == "float32" else "bfloat16"},
        "data": {
            "source": {"type": "function", "function": "drpo_megatron.data.examples:repeat_digit"},
            "max_prompt_tokens": prompt,
        },
        "reward": {"type": "math_verify"},
        "rollout": {
            "prompts_per_step": 1,
            "samples_per_prompt": 2,
            "sampling": {"max_new_tokens": min(2048, positions - prompt)},
        },
        "algorithm": {"loss": "pg"},
        "optimizer": {"lr": 1.0},
        "training": {"steps": 1},
    }


def _only_evaluation(config: RunConfig, parsed: argparse.Namespace) -> RunConfig:
    """Without a trainer: the servers have the first devices for themselves, and nothing sends them weights."""
    server = config.rollout.server
    if server.devices is None:
        server = server.model_copy(update={"devices": list(range(server.count * server.tensor_parallel))})
    rollout = config.rollout.model_copy(update={"placement": "disaggregated", "server": server})
    options = {"samples": parsed.samples, "limit": parsed.limit}
    given = {key: value for key, value in options.items() if value is not None}
    sets = {name: chosen.model_copy(update=given) for name, chosen in config.evaluation.sets.items()}
    if parsed.data:
        sets = {name: _as_trained(config, chosen) for name, chosen in sets.items()}
    evaluation = config.evaluation.model_copy(update={"sets": sets})
    sync = SyncConfig(transport="disk", directory=Path())
    return config.model_copy(update={"rollout": rollout, "evaluation": evaluation, "sync": sync})


def _as_trained(config: RunConfig, chosen: EvaluationSet) -> EvaluationSet:
    """A reasoning-gym task of --data: its answers are found in a text as the run finds them, and its options are the
    run's where it is the run's task.
    """
    source, trained = chosen.source, config.data.source
    update: dict[str, Any] = {}
    if not isinstance(source, ReasoningGymData):
        return chosen
    if config.reward.type == GYM and chosen.reward == RewardConfig(type=GYM):
        update["reward"] = None
    if isinstance(trained, ReasoningGymData) and trained.task == source.task and not source.options:
        update["source"] = source.model_copy(update={"options": trained.options})
    return chosen.model_copy(update=update)

"""The rollouts of a run as files, and back: what `drpo train --rollouts` trains from.

    rollouts/about.json                what sampled them
    rollouts/step_000012.jsonl         one rollout a line (`Rollout.to_json`), in the order of training; `group` counts
                                       the step's groups
    rollouts/step_000012.experts.npy   tracking.dump_routed_experts: the routed experts of those lines one behind the
                                       other, [positions, L, K], uint8 where that is enough, else int16

Nothing is rounded: JSON keeps every digit that a float needs to be the same again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.records import Prompt, Rollout, RolloutGroup

ABOUT = "about.json"
FORMAT = 1

# In a config.json, and not about what the model computes.
_INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
# What training adds to a rollout is not read: it is computed again.
_FIELDS = [f.name for f in fields(Rollout) if f.name not in ("prompt", "routed_experts", "logp", "loss_weight")]


class DumpError(ValueError):
    """Dumped rollouts that cannot be trained from; the message says why and what to do."""


@dataclass(frozen=True)
class About:
    """What sampled the rollouts of a dump. model and tokenizer are SHA-256 digests: of the architecture in
    config.json, and of tokenizer.json.
    """

    format: int
    run: str
    model: str
    tokenizer: str
    temperature: float
    max_new_tokens: int
    prompts_per_step: int
    samples_per_prompt: int
    routed_experts: bool

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Raises OSError or ValueError when the model's directory lacks one of the two files."""
        rollout = config.rollout
        architecture = json.loads((config.model.path / "config.json").read_text())
        kept = {key: value for key, value in architecture.items() if key not in _INCIDENTAL}
        return cls(
            format=FORMAT,
            run=config.name,
            model=hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest(),
            tokenizer=hashlib.sha256((config.model.path / "tokenizer.json").read_bytes()).hexdigest(),
            temperature=rollout.sampling.temperature,
            max_new_tokens=rollout.sampling.max_new_tokens,
            prompts_per_step=rollout.prompts_per_step,
            samples_per_prompt=rollout.samples_per_prompt,
            routed_experts=config.tracking.dump_routed_experts,
        )


class RolloutDump:
    """The dump of a run. `path` is the run's directory, or the one inside it that has the files."""

    def __init__(self, path: Path) -> None:
        self.directory = path / "rollouts" if (path / "rollouts").is_dir() else path

    def about(self) -> About:
        """Raises DumpError when there is none, or it is of another format."""
        path = self.directory / ABOUT
        try:
            raw = json.loads(path.read_text())
        except OSError as error:
            raise DumpError(
                f"{path}: {error.strerror}; name the directory of a run with tracking.dump_rollouts, or its rollouts/"
            ) from error
        except ValueError as error:
            raise DumpError(f"{path} is not JSON ({error}); take another dump") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.keys() != {f.name for f in fields(About)}:
            raise DumpError(f"{path} is not of format {FORMAT}; dump the rollouts again with this version")
        return About(**raw)

    def write_about(self, config: RunConfig) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / ABOUT).write_text(json.dumps(asdict(About.of(config)), indent=1) + "\n")

    def steps(self) -> list[int]:
        """The steps it has, in order."""
        return sorted(int(path.stem.removeprefix("step_")) for path in self.directory.glob("step_*.jsonl"))

    def forget_from(self, step: int) -> None:
        """Remove `step` and later ones."""
        for later in self.steps():
            if later >= step:
                self._path(later).unlink()
                self._experts_path(later).unlink(missing_ok=True)

    def write(self, step: int, groups: Sequence[RolloutGroup], *, routed_experts: bool) -> None:
        """routed_experts: write those too. Raises ValueError when some rollouts have them and others do not."""
        with self._path(step).open("w") as file:
            for number, group in enumerate(groups):
                for rollout in group.rollouts:
                    record = {"group": number} | rollout.to_json()
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        experts = [r.routed_experts for g in groups for r in g.rollouts]
        present = [of_one for of_one in experts if of_one is not None]
        if not (routed_experts and present):
            return
        if len(present) < len(experts):
            raise ValueError(
                f"step {step}: {len(experts) - len(present)} of {len(experts)} rollouts lack their experts"
            )
        joined_PLK = np.concatenate(present)
        small = joined_PLK.size == 0 or (joined_PLK.min() >= 0 and joined_PLK.max() <= 255)
        np.save(self._experts_path(step), joined_PLK.astype(np.uint8 if small else np.int16))

    def read(self, step: int) -> list[RolloutGroup]:
        """Raises DumpError naming the file and the line that is not a rollout."""
        path = self._path(step)
        try:
            with path.open() as file:
                lines = list(file)  # splitlines would cut a text at its U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise DumpError(f"{path} cannot be read ({error}); take a dump that has this step") from error
        numbered = [_rollout(path, number, line) for number, line in enumerate(lines, start=1)]
        if not numbered:
            raise DumpError(f"{path} is empty; take another dump, or stop before this step")
        self._attach_experts(step, [rollout for _, rollout in numbered])
        by_group = itertools.groupby(numbered, key=lambda pair: pair[0])
        in_groups = [[rollout for _, rollout in pairs] for _, pairs in by_group]
        return [RolloutGroup(rollouts[0].prompt, rollouts) for rollouts in in_groups]

    def _attach_experts(self, step: int, rollouts: Sequence[Rollout]) -> None:
        path = self._experts_path(step)
        if not path.exists():
            return
        try:
            joined_PLK = np.load(path, allow_pickle=False).astype(np.int16)
        except (OSError, ValueError) as error:
            raise DumpError(f"{path} cannot be read ({error}); take another dump") from error
        positions = [len(r.prompt.token_ids) + len(r.response_ids) - 1 for r in rollouts]
        if joined_PLK.ndim != 3 or len(joined_PLK) != sum(positions):
            raise DumpError(
                f"{path} is of shape {list(joined_PLK.shape)}, and the step has {sum(positions)} positions; take "
                "another dump"
            )
        for rollout, of_one in zip(rollouts, np.split(joined_PLK, np.cumsum(positions)[:-1]), strict=True):
            rollout.routed_experts = of_one

    def _path(self, step: int) -> Path:
        return self.directory / f"step_{step:06d}.jsonl"

    def _experts_path(self, step: int) -> Path:
        return self.directory / f"step_{step:06d}.experts.npy"


def _rollout(path: Path, number: int, line: str) -> tuple[int, Rollout]:
    try:
        record: dict[str, Any] = json.loads(line)
        return record["group"], Rollout(Prompt(**record["prompt"]), **{name: record[name] for name in _FIELDS})
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DumpError(f"{path}, line {number}, is not a rollout ({reason}); take another dump") from error


def dump_problems(config: RunConfig, *, needs_experts: bool) -> Iterator[str]:
    """Why the rollouts that `config` names cannot be trained from. Reads the description and the first step.

    The model's directory must exist. needs_experts: training follows the experts that the rollouts took.
    """
    assert config.rollout.from_dump is not None
    dump = RolloutDump(config.rollout.from_dump)
    if dump.directory.resolve().is_relative_to(config.run_directory.resolve()):
        yield f"{dump.directory} is inside this run's own directory, which is made anew; give this run another name"
        return
    try:
        about, here = dump.about(), About.of(config)
        missing = sorted(set(range(config.training.steps)) - set(dump.steps()))
        if not missing:
            dump.read(0)
    except (DumpError, OSError) as error:
        yield str(error)
        return
    if missing:
        yield (
            f"{dump.directory} lacks {len(missing)} of the {config.training.steps} steps, the first is {missing[0]}; "
            f"lower training.steps to {missing[0]}, or take another dump"
        )
    if about.tokenizer != here.tokenizer:
        yield f"was sampled with another tokenizer than that of model.path = {config.model.path}; name its model there"
    if about.model != here.model:
        yield f"was sampled from another model than model.path = {config.model.path}; name that one there"
    for key in ("rollout.prompts_per_step", "rollout.samples_per_prompt", "rollout.sampling.temperature"):
        name = key.rsplit(".", 1)[1]
        theirs, ours = getattr(about, name), getattr(here, name)
        if theirs != ours:
            yield f"was sampled with {key} = {theirs:g}, and it is {ours:g} here; set it to {theirs:g}"
    if needs_experts and not about.routed_experts:
        yield (
            f"{dump.directory} has no routed experts, which training a mixture of experts follows; dump it with "
            "tracking.dump_routed_experts = true, or set model.routing_replay = false"
        )
    if about.max_new_tokens > here.max_new_tokens:
        yield (
            f"was sampled with rollout.sampling.max_new_tokens = {about.max_new_tokens}, and it is "
            f"{here.max_new_tokens} here; raise it to that (algorithm.horizon is the divisor of the loss)"
        )

"""Samples of a run for its page: a stated number of them, with readable tokens, and the staleness of their tokens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drpo_megatron.report.run_files import RunFiles

PER_STEP = 8
"""Samples taken of a step; steps are left out before samples of a step are."""
MAX_TOKENS = 400
"""Tokens of a response that the page holds one by one; its text is always whole."""
MAX_CHARACTERS = 20_000
"""Of a prompt or a response."""

Pieces = Callable[[Sequence[int]], list[str]]


@dataclass
class Samples:
    """What was taken of a run. total_steps: that have a dump; steps: that were read; of_steps: samples in those.
    staleness: weight versions between sampling and training → trained tokens, over all samples of the steps read.
    without_tokenizer: tokens are shown by number, because no tokenizer was found.
    """

    items: list[dict[str, Any]] = field(default_factory=list)
    total_steps: int = 0
    steps: int = 0
    of_steps: int = 0
    staleness: dict[int, int] = field(default_factory=dict)
    without_tokenizer: bool = False


def take_samples(run: RunFiles, limit: int) -> Samples:
    """At most `limit` samples: evenly spaced steps, and of each evenly spaced ranks of the reward, the lowest and
    highest among them. Raises ValueError for a dump that is damaged, or a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"{limit} samples are asked for: give a number from 1")
    dumps = sorted((run.directory / "rollouts").glob("step_*.jsonl"))
    taken = Samples(total_steps=len(dumps))
    if not dumps:
        return taken
    pieces = token_pieces(run)
    taken.without_tokenizer = pieces is None
    staleness: Counter[int] = Counter()
    chosen = evenly(len(dumps), max(1, limit // PER_STEP))
    for dump in (dumps[i] for i in chosen):
        step = int(dump.stem.removeprefix("step_"))
        rollouts = _read(dump)
        staleness += token_staleness(run, step, rollouts)
        by_reward = sorted(range(len(rollouts)), key=lambda i: rollouts[i]["reward"])
        for rank in evenly(len(rollouts), limit // len(chosen)):
            index = by_reward[rank]
            taken.items.append(_item(step, index, rollouts[index], pieces))
        taken.steps += 1
        taken.of_steps += len(rollouts)
    taken.staleness = dict(sorted(staleness.items()))
    return taken


def evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of range(count), evenly spaced, the first and the last among them; the last alone for 1."""
    if count <= limit:
        return list(range(count))
    if limit == 1:
        return [count - 1]
    return [round(i * (count - 1) / (limit - 1)) for i in range(limit)]


def _read(dump: Path) -> list[dict[str, Any]]:
    rollouts = []
    with dump.open() as file:
        for number, line in enumerate(file, start=1):
            try:
                rollouts.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{dump}:{number}: is not a rollout ({error}); remove the file") from error
    return rollouts


def token_staleness(run: RunFiles, step: int, rollouts: Sequence[dict[str, Any]]) -> Counter[int]:
    """Weight versions between the sampling of a trained token and its training → tokens.

    The version counts applied updates, and update u of a step trains every U-th group from the u-th on, as
    `Run.pack` divides them. Empty where the configuration, which says U, is missing. A skipped update inside the step
    itself counts as if it had come last.
    """
    found: Counter[int] = Counter()
    if not run.config:
        return found
    updates = run.config["training"]["updates_per_batch"]
    skipped = {int(row["step"]): int(row["train/skipped_updates"]) for row in run.metrics}
    before = step * updates - skipped.get(step - 1, 0)
    for rollout in rollouts:
        version = before + rollout["group"] % updates
        for sampled_at, trained in zip(rollout["weight_versions"], rollout["response_mask"], strict=True):
            if trained:
                found[version - sampled_at] += 1
    return found


def _item(step: int, index: int, rollout: dict[str, Any], pieces: Pieces | None) -> dict[str, Any]:
    """One sample as the page reads it. Lists are of the first `MAX_TOKENS` tokens. Of the trainer there are `weight`
    and `ratio`, log π − log μ, where the dump has them.
    """
    ids = rollout["response_ids"]
    shown = ids[:MAX_TOKENS]
    item = {
        "step": step,
        "index": index,
        "prompt": _cut(rollout["prompt"]["text"]),
        "answer": rollout["prompt"]["answer"],
        "text": _cut(rollout["text"]),
        "reward": rollout["reward"],
        "error": rollout["reward_error"],
        "advantage": _short(rollout["advantage"]),
        "finish": rollout["finish_reason"],
        "length": len(ids),
        "tokens": pieces(shown) if pieces else [f"{i} " for i in shown],
        "mask": rollout["response_mask"][:MAX_TOKENS],
    }
    item["logmu"] = [_short(value) for value in rollout["logmu"][:MAX_TOKENS]]
    if rollout.get("logp"):
        logs = zip(rollout["logp"][:MAX_TOKENS], rollout["logmu"][:MAX_TOKENS], strict=True)
        item["ratio"] = [_short(logp - logmu) for logp, logmu in logs]
        item["weight"] = [_short(value) for value in rollout["loss_weight"][:MAX_TOKENS]]
    return item


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + f"… ({len(text)} characters)"


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def token_pieces(run: RunFiles) -> Pieces | None:
    """What turns token ids into readable pieces, by the trained model's tokenizer or that of model.path; None when
    neither has a tokenizer.json.
    """
    from tokenizers import Tokenizer

    places = [run.directory / "hf"]
    if run.config:
        places.append(Path(run.config["model"]["path"]))
    found = next((file for place in places if (file := place / "tokenizer.json").is_file()), None)
    if found is None:
        return None
    tokenizer = Tokenizer.from_file(str(found))
    return lambda ids: split_text(lambda part: tokenizer.decode(part, skip_special_tokens=False), ids)


def split_text(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """A piece of text for each token; joined they are the text. A character of several tokens belongs to its last."""
    pieces = []
    start, read = 0, 0  # a token is decoded behind the one before, without which some tokenizers leave out a space
    for end in range(1, len(ids) + 1):
        known = decode(list(ids[start:read]))
        text = decode(list(ids[start:end]))
        if text.endswith("\ufffd") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(known) :])
        start, read = read, end
    return pieces

"""The results of an evaluation as JSON lines and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drpo_megatron.evaluation.answers import Answered
from drpo_megatron.evaluation.results import SetResult
from drpo_megatron.study.statistics import LEVEL


def write_results(path: Path, sets: Iterable[tuple[SetResult, Sequence[Answered]]], of: dict[str, Any]) -> None:
    """For each set a line a prompt (`"kind": "prompt"`) with its answers, and then one with its figures and intervals
    (`"kind": "summary"`), which also holds `of`: what was evaluated. Replaces the file once it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp")
    with beside.open("w") as file:
        for result, answered in sets:
            for line in [*_prompts(result.name, answered), _summary(result) | of]:
                file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    beside.rename(path)


def _prompts(name: str, answered: Sequence[Answered]) -> Iterator[dict[str, Any]]:
    for one in answered:
        yield {
            "kind": "prompt",
            "set": name,
            "id": one.prompt.id,
            "prompt": one.prompt.text,
            "reference": one.prompt.answer,
            "answers": [asdict(answer) for answer in one.answers],
        }


def _summary(result: SetResult) -> dict[str, Any]:
    line = {"kind": "summary", "set": result.name} | asdict(result)
    del line["name"]
    line["figures"] = {
        name: {key: value if math.isfinite(value) else None for key, value in asdict(figure).items()}
        for name, figure in result.figures.items()
    }
    return line


def table(results: Sequence[SetResult]) -> str:
    """For people."""
    lines = [f"intervals: {LEVEL:.0%}, over prompts"]
    for result in results:
        notes = [f"{result.mean_tokens:.0f} tokens an answer"]
        if result.truncated:
            notes.append(f"{result.truncated:.1%} cut off at the limit of tokens")
        if result.errors:
            notes.append(f"{result.errors} not judged: the verifier failed (reward 0)")
        prompts = f"{result.prompts} prompt{'s' * (result.prompts > 1)}"
        lines.append(f"{result.name}: {prompts} × {result.samples}, {', '.join(notes)}")
        width = max(len(name) for name in result.figures)
        for name, figure in result.figures.items():
            interval = f"[{figure.low:.3f}, {figure.high:.3f}]" if math.isfinite(figure.low) else "one prompt only"
            lines.append(f"  {name:<{width}}  {figure.value:.3f}  {interval}")
    return "\n".join(lines)

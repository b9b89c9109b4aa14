"""`drpo report`: runs as one HTML file. The data is JSON inside it; `page.js` and `samples.js` draw it.

The page may load nothing: its content security policy allows only what is inside. All text of runs reaches the document
as text nodes or escaped, never as markup.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from drpo_megatron.report.run_files import RunFiles, config_differences, read_runs
from drpo_megatron.report.samples import MAX_TOKENS, Samples, take_samples

MAX_POINTS = 1000
"""Of a curve."""
MAX_BARS = 100
"""Of the times of a run."""


def write_report(directories: Sequence[Path], out: Path, samples: int) -> None:
    """Write the file `out`. samples: of each run at most. Raises ValueError for a run that cannot be read."""
    runs = read_runs(directories)
    data = [_run(run, take_samples(run, samples)) for run in runs]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_page(runs, data))


def _page(runs: Sequence[RunFiles], data: list[dict[str, Any]]) -> str:
    parts = {
        "TITLE": html.escape(", ".join(run.name for run in runs)),
        "STYLE": _file("page.css"),
        "SCRIPT": _file("page.js") + _file("samples.js"),
        "DATA": _json({"runs": data, "max_points": MAX_POINTS, "max_tokens": MAX_TOKENS}),
        "SETTINGS": _settings(runs),
    }
    # One pass: what is put in is not looked at again.
    return re.sub(r"<!--([A-Z]+)-->", lambda match: parts[match[1]], _file("page.html"))


def _file(name: str) -> str:
    return files("drpo_megatron.report").joinpath(name).read_text()


def _json(value: Any) -> str:
    """For a script element: no text in it can end the element or begin a comment."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _run(run: RunFiles, samples: Samples) -> dict[str, Any]:
    return {
        "name": run.name,
        "steps": len(run.metrics),
        "curves": curves(run.metrics),
        "times": verb_times(run.metrics),
        "samples": asdict(samples) | {"staleness": sorted(samples.staleness.items())},
    }


def curves(metrics: Sequence[dict[str, float]]) -> dict[str, list[list[float | int | None]]]:
    """Metric → [steps, values], rounded to 6 digits. A value that is not finite is None."""
    names = dict.fromkeys(name for row in metrics for name in row if name not in ("step", "time"))
    found: dict[str, list[list[float | int | None]]] = {}
    for name in names:
        points = thinned([(int(row["step"]), row[name]) for row in metrics if name in row])
        found[name] = [[step for step, _ in points], [_rounded(value) for _, value in points]]
    return found


def thinned(points: Sequence[tuple[int, float]], limit: int = MAX_POINTS) -> list[tuple[int, float]]:
    """At most `limit` of the points, in order: of each of limit/2 stretches the lowest and the highest, so that a spike
    of one step is kept.
    """
    if len(points) <= limit:
        return list(points)
    stretches = limit // 2
    kept: set[int] = set()
    for i in range(stretches):
        stretch = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        finite = [j for j in stretch if math.isfinite(points[j][1])] or list(stretch)
        kept |= {min(finite, key=lambda j: points[j][1]), max(finite, key=lambda j: points[j][1])}
    return [points[j] for j in sorted(kept)]


def verb_times(metrics: Sequence[dict[str, float]]) -> dict[str, Any]:
    """`verbs` in the order in which they run, and `bars`: (first step, last step, mean seconds of each verb), one a
    step, or a stretch of steps where there are more than `MAX_BARS`.
    """
    names = dict.fromkeys(name for row in metrics for name in row if re.fullmatch(r"perf/\w+_s", name))
    # Rates are named so too; perf/step_s is the sum of the verbs.
    verbs = [name for name in names if not name.endswith("_per_s") and name != "perf/step_s"]
    bars = []
    count = min(len(metrics), MAX_BARS)
    for i in range(count):
        rows = metrics[i * len(metrics) // count : (i + 1) * len(metrics) // count]
        means = [_rounded(sum(row.get(verb, 0.0) for row in rows) / len(rows)) for verb in verbs]
        bars.append([int(rows[0]["step"]), int(rows[-1]["step"]), means])
    return {"verbs": [verb.removeprefix("perf/").removesuffix("_s") for verb in verbs], "bars": bars}


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _settings(runs: Sequence[RunFiles]) -> str:
    """The last section: what differs, the versions, every configuration whole."""
    names = [run.name for run in runs]
    versions = {key: "" for run in runs for key in run.versions}
    parts = []
    if len(runs) > 1:
        differences = config_differences([run.config for run in runs])
        parts.append("<h3>Settings that differ</h3>")
        parts.append(_table("setting", names, differences) if differences else "<p>None.</p>")
    parts.append("<h3>Versions</h3>")
    rows = {key: [run.versions.get(key, "") for run in runs] for key in versions}
    parts.append(_table("package", names, rows) if rows else "<p>Not recorded: no versions.json in the runs.</p>")
    parts.append("<h3>Configurations</h3>")
    for run in runs:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "no config.yaml"
        head = f"{html.escape(run.name)} <small>{html.escape(str(run.directory))}</small>"
        parts.append(f'<details><summary>{head}</summary><pre tabindex="0">{html.escape(text)}</pre></details>')
    return "\n".join(parts)


def _table(first: str, names: Sequence[str], rows: dict[str, list[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in (first, *names))
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(key)}</th>{"".join(f"<td>{html.escape(v)}</td>" for v in values)}</tr>'
        for key, values in rows.items()
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

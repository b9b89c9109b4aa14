"""Train a recipe for many steps, watch what grows, and record it under docs/results/long-run.md.

    python tools/long_run.py configs/quickstart.yaml --steps 500

While the run goes on, every process of it is looked at in /proc every few seconds: resident memory, open file handles,
threads. After it, so is every file of the run's directory. `--record RUN` writes the page anew from a run that was
watched before. Ends with 1 when something grew beyond the limits that the page states.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from drpo_megatron.observability.curves import read_metrics
from drpo_megatron.platform.process import processes

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SAMPLES = "processes.jsonl"
EVERY_S = 5.0
WARM_UP = 100  # steps until every cache is full and every connection open
MIB_PER_100_STEPS = 2.0  # RSS: the allocator's fragments
FASTER = 1.2
NAMES = {
    "drpo_megatron.cli train": "drpo train",
    "torch.distributed.run": "torchrun",
    "drpo_megatron.training.main": "rank",
    "sglang": "SGLang",
    "drpo_megatron.rewards.worker": "verifier",
}
"""What a process is, by a part of its command line."""
REPEATED = ("rank", "SGLang", "verifier")
PACKAGES = ("torch", "megatron-core", "sglang", "wandb")


def family(root: int) -> list[int]:
    """`root` and all that it started, directly and indirectly."""
    found, states = [root], processes()
    for parent in found:
        found += [p.pid for p in states if p.parent == parent and p.state not in "ZX"]
    return found


def look_at(pid: int) -> dict[str, Any]:
    """One process now; memory in bytes. Raises OSError when it has ended."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return {
        "pid": pid,
        "name": status["Name"].strip(),
        "command": (proc / "cmdline").read_text().replace("\0", " ")[:300],
        "rss": int(status["VmRSS"].split()[0]) * 1024,
        "anonymous": int(status["RssAnon"].split()[0]) * 1024,
        "shared": int(status["RssShmem"].split()[0]) * 1024,
        "threads": int(status["Threads"]),
        "handles": len(list((proc / "fd").iterdir())),
    }


def files_of(run: Path) -> dict[str, int]:
    """Bytes of each file of a run's directory, by its path there."""
    return {str(path.relative_to(run)): path.stat().st_size for path in run.rglob("*") if path.is_file()}


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def watch(command: list[str], run: Path) -> Iterator[dict[str, Any]]:
    """Run `command`; a look at its processes and the run's files every few seconds. Raises CalledProcessError."""
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            seen = []
            for pid in family(process.pid):
                try:
                    seen.append(look_at(pid))
                except (OSError, KeyError):  # it ended, or is about to
                    continue
            yield {"time": time.time(), "step": steps_done(run), "processes": seen, "files": files_of(run)}
            time.sleep(EVERY_S)
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


Looks = list[dict[str, Any]]


def name_of(command: str) -> str:
    return next((name for part, name in NAMES.items() if part in command), command.split(" ")[0].rsplit("/", 1)[-1])


def by_process(looks: Looks) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """(step, look) of each process that lived from the warm-up to the end, by name; equal ones are numbered."""
    alive: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for look in looks:
        for process in look["processes"]:
            if look["step"] >= WARM_UP:
                alive.setdefault(process["pid"], []).append((look["step"], process))
    last = looks[-1]["step"]
    lasting = [
        of_one for _, of_one in sorted(alive.items()) if of_one[-1][0] > (WARM_UP + last) / 2 and len(of_one) > 8
    ]
    named: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for of_one in lasting:
        name = name_of(of_one[0][1]["command"])
        count = sum(known.split(" #")[0] == name for known in named)
        named[f"{name} #{count}" if name in REPEATED else name] = of_one
    return named


def slope(points: list[tuple[int, float]]) -> float:
    """Of the least-squares line, per step."""
    mean_x, mean_y = (statistics.mean(values) for values in zip(*points, strict=True))
    across = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / across if across else 0.0


def quarters(values: list[float], of: Callable[[list[float]], float]) -> tuple[float, float]:
    """Of the first and of the last quarter."""
    part = max(len(values) // 4, 1)
    return of(values[:part]), of(values[-part:])


def process_table(looks: Looks) -> tuple[list[str], list[str]]:
    """Rows, and what grew."""
    rows = [
        "| process | RSS at first, MiB | at last | growth, MiB / 100 steps | handles | threads |",
        "|---|---|---|---|---|---|",
    ]
    grew = []
    for name, seen in by_process(looks).items():
        first, last = quarters([p["rss"] / 2**20 for _, p in seen], statistics.median)
        growth = 100 * slope([(step, p["rss"] / 2**20) for step, p in seen])
        counts = {key: quarters([p[key] for _, p in seen], min) for key in ("handles", "threads")}
        shown = [f"{a:g} → {b:g}" for a, b in counts.values()]
        rows.append(f"| {name} | {first:.1f} | {last:.1f} | {growth:+.2f} | {' | '.join(shown)} |")
        if growth > MIB_PER_100_STEPS:
            grew.append(f"{name}: {growth:.2f} MiB in 100 steps")
        grew += [f"{name}: {key} from {a:g} to {b:g}" for key, (a, b) in counts.items() if b > a]
    return rows, grew


def file_table(looks: Looks) -> tuple[list[str], list[str]]:
    """Rows of the files that grow with the steps, and those that grow faster than that."""
    rows = ["| files | bytes a step | of the whole run |", "|---|---|---|"]
    grew = []
    sizes = [(look["step"], grouped(look["files"])) for look in looks if look["step"] >= WARM_UP]
    for name in sorted(sizes[-1][1]):
        points = [(step, float(of_step.get(name, 0))) for step, of_step in sizes]
        half = len(points) // 2
        first, last = slope(points[:half]), slope(points[half:])
        if slope(points) < 1:
            continue
        rows.append(f"| `{name}` | {slope(points):,.0f} | {points[-1][1]:,.0f} |")
        if last > FASTER * first:
            grew.append(f"{name}: {first:.0f} bytes a step in the first half and {last:.0f} in the second")
    return rows, grew


def grouped(files: dict[str, int]) -> dict[str, int]:
    """Files of a kind together."""
    sums: dict[str, int] = {}
    for path, size in files.items():
        head = path.split("/")[0]
        name = f"{head}/" if head in ("rollouts", "tb", "wandb") else path
        sums[name] = sums.get(name, 0) + size
    return sums


def record(run: Path, recipe: str) -> list[str]:
    """Write the page; what grew."""
    steps = len(read_metrics(run))
    looks = [json.loads(line) for line in (run / SAMPLES).read_text().splitlines()]
    looks = [look for look in looks if look["step"] < steps]  # then the model is exported
    processes_rows, grew = process_table(looks)
    files_rows, faster = file_table(looks)
    count = sum(look["step"] >= WARM_UP for look in looks)
    minutes = (looks[-1]["time"] - looks[0]["time"]) / 60
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    lines = [
        f"# {steps} steps of {recipe}",
        "",
        f"What grows in a long run, after step {WARM_UP}, of {minutes:.0f} minutes; processes were looked at {count} "
        f"times. Python {platform.python_version()}, {packages}; two cores without a GPU, shared with other work. "
        "Written by `tools/long_run.py`.",
        "",
        "First and last are quarters of the looks: the median of memory, and the fewest handles and threads, because a",
        "step opens connections and closes them. Growth is the slope of a line through all looks. Limits:",
        f"{MIB_PER_100_STEPS:g} MiB in 100 steps, no handle and no thread more, and no file that grows more than "
        f"{FASTER:g} times as fast in",
        "the second half as in the first.",
        "",
        *(f"Beyond a limit: {problem}" for problem in grew + faster),
        *([] if grew + faster else ["**Nothing is beyond its limit.**"]),
        "",
        *processes_rows,
        "",
        "In the run's directory, what grows with the steps (a step's rollouts are as long as its prompts and answers):",
        "",
        *files_rows,
    ]
    (RESULTS / "long-run.md").write_text("\n".join(lines) + "\n")
    return grew + faster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    parser.add_argument("--record", type=Path, metavar="RUN", help="of a run that was watched")
    parsed = parser.parse_args()
    run = parsed.record or parsed.directory / "long-run"
    if parsed.record is None:
        arguments = ["name=long-run", f"tracking.directory={parsed.directory}", f"training.steps={parsed.steps}"]
        command = [sys.executable, "-m", "drpo_megatron.cli", "train", str(parsed.config), *arguments]
        parsed.directory.mkdir(parents=True, exist_ok=True)
        samples = parsed.directory / f"long-run-{SAMPLES}"
        with samples.open("w") as file:
            for look in watch(command, run):
                file.write(json.dumps(look) + "\n")
                file.flush()
        samples.rename(run / SAMPLES)
    if problems := record(run, parsed.config.stem):
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()

"""Train a recipe for many steps, watch what grows, and record it under docs/results/long-run.md.

    python tools/long_run.py configs/quickstart.yaml --steps 500

While the run goes on, every process of it is looked at in /proc every few seconds: resident memory, open file handles,
threads. After it, so is every file of the run's directory. `--record RUN` writes the page anew from a run that was
watched before. Ends with 1 when something grew by more than `LIMITS`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drpo_megatron.platform.process import processes

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SAMPLES = "processes.jsonl"
EVERY_S = 5.0


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    parsed = parser.parse_args()
    run = parsed.directory / "long-run"
    arguments = ["name=long-run", f"tracking.directory={parsed.directory}", f"training.steps={parsed.steps}"]
    command = [sys.executable, "-m", "drpo_megatron.cli", "train", str(parsed.config), *arguments]
    samples = parsed.directory / f"long-run-{SAMPLES}"
    with samples.open("w") as file:
        for look in watch(command, run):
            file.write(json.dumps(look) + "\n")
            file.flush()
    samples.rename(run / SAMPLES)


if __name__ == "__main__":
    main()

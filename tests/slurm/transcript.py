"""A user's path through a SLURM job, run on a cluster of this machine and written as a page:

python -m tests.slurm.transcript > docs/results/slurm.md
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from drpo_megatron.models.recipes import ensure_model
from tests.slurm.cluster import Cluster, unpack_slurm
from tests.slurm.test_jobs import ROOT, SMALL

_HEAD = """# A job on SLURM, as it went

Four nodes of SLURM 22.05 on one machine without a GPU, as `tests/slurm` starts them; the training, the server and the
checkpoints are real. Written by `python -m tests.slurm.transcript`. The first node fails the site's check, the job is
told in the middle that its time is up, and nobody helps it.
"""
_STEPS = 40


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="drpo") as place:
        home = Path(place) / "home"
        model = ensure_model("tiny_qwen3", home / "model")
        clusters = home / "cpu.yaml"
        text = (ROOT / "configs" / "clusters" / "cpu.yaml").read_text()
        clusters.write_text(text + "check_command: '[ \"$SLURMD_NODENAME\" != node1 ]'\n")
        with Cluster(unpack_slurm(Path(place) / "packages"), Path(place) / "cluster") as cluster:
            environment = cluster.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

            def drpo(*arguments: str) -> str:
                command = [sys.executable, "-m", "drpo_megatron.cli", *arguments]
                done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=True)
                _show("drpo", arguments, done.stdout, place)
                return done.stdout

            settings = [s for s in SMALL if "export" not in s] + ["parallel.tensor=1", "parallel.data=2"]
            settings += [f"training.steps={_STEPS}", f"model.path={model}"]
            print(_HEAD)
            config = str(ROOT / "configs" / "quickstart.yaml")
            job = re.search(r"job (\d+)", drpo("submit", config, "--cluster", "cpu.yaml", *settings))
            assert job
            run = home / "runs" / "quickstart"
            _wait(lambda: _steps(run) > 1)
            drpo("status", "runs/quickstart")
            signal = ("--batch", "--signal=USR1", job[1])
            _show("scancel", signal, cluster.run("scancel", *signal), place)
            _wait(lambda: (run / "slurm" / "done").exists())
            time.sleep(3)
            drpo("status", "runs/quickstart")
            drpo("logs", "runs/quickstart", "--lines", "400")
            checkpoint = f"runs/quickstart/checkpoints/step_{_STEPS:06d}"
            drpo("convert", checkpoint, "exported", "--to", "hf", "--dtype", "bf16", "--verify")


def _steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _wait(condition: object) -> None:
    deadline = time.monotonic() + 400
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError("the job did not come so far")
        time.sleep(0.3)


def _show(program: str, arguments: tuple[str, ...], output: str, place: str) -> None:
    """A command and its output. Most of the lines of steps are left out."""
    kept, steps = [], 0
    for line in output.splitlines():
        steps = steps + 1 if line.startswith("step ") else 0
        if steps == 4:
            kept.append("...")
        if steps < 4:
            kept.append(line)
    text = "\n".join(["$ " + " ".join([program, *arguments]), *kept])
    text = text.replace(f"{ROOT}/", "").replace(f"{place}/home/", "").replace(f"{place}/", "")
    print(f"\n```\n{text}\n```", flush=True)


if __name__ == "__main__":
    main()

"""Train one recipe by TRL's GRPO and by this project, one after the other, and record both under docs/results/trl.*.

    make peers
    python tools/compare_trl.py --steps 20 trl drpo
    python tools/compare_trl.py --steps 40 drpo-ahead

Each row of ROWS that is named is measured and kept as DIRECTORY/NAME.json; the page is of all rows that are there
(without a name it is only written again). Both sides have the two cores of the machine for themselves, so nothing else
should run meanwhile: how busy the machine is before each row is kept with it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from drpo_megatron.bench.report import Figure as Measured
from drpo_megatron.bench.report import machine
from drpo_megatron.config.load import load_config
from drpo_megatron.models.recipes import ensure_model
from drpo_megatron.observability.curves import read_metrics
from drpo_megatron.platform.process import processes
from drpo_megatron.platform.versions import versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
CONFIG = ROOT / "configs" / "smollm2-arithmetic.yaml"
WARM_UP = 2  # steps that are left out
LOOK_EVERY_S = 1.0
BUSY_S = 3.0
GOAL = 3.0
SMOOTH = 5  # steps of a mean reward: one step's is that of 64 samples

EQUAL = (
    *("algorithm.loss=grpo", "algorithm.loss_args={}"),
    *("parallel.pipeline=1", "training.threads=2", "rollout.server.threads=2"),
    *("training.shared_prefix=always", "training.tokens_per_micro_batch=1024"),  # an update is one pack
    *("sync.transport=shared_memory", "sync.verify_every=0"),
)
# The server's one thread and the trainer's two share two cores.
AHEAD = (*EQUAL, "rollout.schedule=one_step_off", "rollout.server.threads=1")
UNRECORDED = ("tracking.wandb=false", "tracking.tensorboard=false", "training.export=false")


@dataclass(frozen=True)
class Row:
    """What is measured. trl: its CPU threads; None: this project with `overrides`."""

    title: str
    trl: int | None = None
    overrides: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


PASSIVE = (("OMP_WAIT_POLICY", "passive"),)
ROWS = {
    "trl": Row("TRL", trl=2),
    "drpo": Row("this project", overrides=EQUAL),
    "drpo-ahead": Row("… generating a step ahead", overrides=AHEAD, environment=PASSIVE),
    "drpo-bfloat16": Row("… in bfloat16", overrides=(*EQUAL, "model.dtype=bfloat16")),
    "drpo-bfloat16-ahead": Row(
        "… in bfloat16, a step ahead", overrides=(*AHEAD, "model.dtype=bfloat16"), environment=PASSIVE
    ),
    "drpo-verified": Row(
        "… with every sync verified, over gloo",
        overrides=(*EQUAL, *("sync.transport=distributed", "sync.verify_every=1")),
    ),
}
"""The first two do equal work; the others show what a setting changes."""


def family(root: int) -> list[int]:
    """`root` and all that it started, directly and indirectly."""
    found, states = [root], processes()
    for parent in found:
        found += [p.pid for p in states if p.parent == parent and p.state not in "ZX"]
    return found


def resident(pid: int) -> int:
    """Bytes of a process, a page that n processes share counted 1/n (PSS). 0 when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def busy_cores() -> float:
    """Of the machine, over the last seconds. The load average would still count what ran before."""

    def idle_and_all() -> tuple[int, int]:
        times = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return times[3] + times[4], sum(times)  # idle, iowait

    (idle, total), _ = idle_and_all(), time.sleep(BUSY_S)
    idle_after, total_after = idle_and_all()
    return (os.cpu_count() or 1) * (1 - (idle_after - idle) / (total_after - total))


@contextmanager
def memory_looks(root: int) -> Iterator[list[tuple[float, int]]]:
    """(time, bytes of all processes under `root`), looked at once a second for as long as the context is open."""
    looks: list[tuple[float, int]] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_EVERY_S):
            looks.append((time.time(), sum(resident(pid) for pid in family(root))))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield looks
    finally:
        done.set()
        thread.join()


def steps_of_run(run: Path, samples: int) -> list[dict[str, Any]]:
    """The steps of a run of this project. seconds: from the end of a step to the end of the next, logging included;
    those of the first step are its verbs' alone.
    """
    metrics = read_metrics(run)
    ends = [row["time"] for row in metrics]
    begins = [ends[0] - metrics[0]["perf/step_s"], *ends[:-1]]
    return [
        {
            "seconds": end - begin,
            "time": end,
            "reward": row["reward/mean"],
            "samples": samples,
            "response_tokens": round(row["response/len_mean"] * samples),
            **{f"{verb}_s": row[f"perf/{verb}_s"] for verb in ("generate", "train", "sync")},
        }
        for row, begin, end in zip(metrics, begins, ends, strict=True)
    ]


def measure(name: str, steps: int, directory: Path) -> dict[str, Any]:
    """Run one row. Raises CalledProcessError when it fails."""
    row, out = ROWS[name], directory / name
    shutil.rmtree(out, ignore_errors=True)
    environment = dict(os.environ)
    if row.trl is not None:
        out.mkdir(parents=True)
        log = out / "steps.jsonl"
        command = [str(ROOT / "tools" / "trl_worker.py"), str(CONFIG), str(steps), str(row.trl), str(log)]
        environment |= {"OMP_NUM_THREADS": str(row.trl)}
    else:
        settings = (f"name={name}", f"tracking.directory={directory}", f"training.steps={steps}")
        command = ["-m", "drpo_megatron.cli", "train", str(CONFIG), *settings, *UNRECORDED, *row.overrides]
    environment |= dict(row.environment)
    busy = busy_cores()
    process = subprocess.Popen([sys.executable, *command], env=environment, stdout=sys.stderr)
    try:
        with memory_looks(process.pid) as looks:
            process.wait()
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    if row.trl is not None:
        measured = [json.loads(line) for line in log.read_text().splitlines()]
    else:
        rollout = load_config(CONFIG).rollout
        measured = steps_of_run(out, rollout.prompts_per_step * rollout.samples_per_prompt)
    return {"name": name, "busy_cores": busy, "steps": measured, "memory": looks}


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Of the steps after the warm-up: median and spread of rates and seconds, the peak of the memory in GiB."""
    steps = result["steps"][WARM_UP:]

    def of(value: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
        return Measured.of([value(step) for step in steps]).to_json()

    begin, end = result["steps"][WARM_UP - 1]["time"], steps[-1]["time"]
    return {
        "steps": len(steps),
        "seconds": of(lambda step: step["seconds"]),
        "samples_per_s": of(lambda step: step["samples"] / step["seconds"]),
        "tokens_per_s": of(lambda step: step["response_tokens"] / step["seconds"]),
        "generate_s": of(lambda step: step["generate_s"]),
        "rest_s": of(lambda step: step["seconds"] - step["generate_s"]),
        "train_s": of(lambda step: step.get("train_s", step["seconds"] - step["generate_s"])),
        "sync_s": of(lambda step: step.get("sync_s", 0.0)),
        "memory_gib": max(used for at, used in result["memory"] if begin <= at <= end) / 2**30,
        "busy_cores": result["busy_cores"],
        "curve": [
            {
                "s": step["time"] - result["steps"][0]["time"] + result["steps"][0]["seconds"],
                "reward": step["reward"],
            }
            for step in result["steps"]
        ],
    }


def draw(report: dict[str, Any], out: Path) -> None:
    picture = Figure(figsize=(10, 3.8), layout="constrained")
    rates, curves = picture.subplots(1, 2)
    names = list(report["rows"])
    for y, name in enumerate(names):
        rate = report["rows"][name]["samples_per_s"]
        low, high = rate["spread"]
        color = "#999999" if ROWS[name].trl else "#4477aa"
        rates.barh(y, rate["value"], xerr=[[rate["value"] - low], [high - rate["value"]]], color=color, capsize=3)
    rates.set_yticks(range(len(names)), [ROWS[name].title for name in names], fontsize="small")
    rates.invert_yaxis()
    rates.set(title="samples a second", xlim=(0, None))
    for name in names:
        points = report["rows"][name]["curve"]
        curves.plot([p["s"] for p in points], [p["reward"] for p in points], ".-", label=ROWS[name].title)
    curves.set(title="mean reward of a step over wall time", xlabel="seconds since the first step", ylim=(0, None))
    curves.legend(frameon=False, fontsize="small")
    for axes in (rates, curves):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(picture).print_png(str(out))


def shown(figure: dict[str, Any], digits: int = 2) -> str:
    low, high = figure["spread"]
    return f"{figure['value']:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


COLUMNS = (
    "",
    "samples/s",
    "over TRL",
    "response tokens/s",
    "s a step",
    "generate, s",
    "rest, s",
    "memory, GiB",
    "cores busy before",
    "steps",
    "at TRL's last reward after",
    "reward of each step from the first",
)


def smoothed(curve: list[dict[str, float]]) -> list[tuple[int, float, float]]:
    """(steps, seconds, mean reward of the last SMOOTH steps) from step SMOOTH on."""
    return [
        (end, curve[end - 1]["s"], sum(point["reward"] for point in curve[end - SMOOTH : end]) / SMOOTH)
        for end in range(SMOOTH, len(curve) + 1)
    ]


def reaches(curve: list[dict[str, float]], level: float) -> str:
    """When the mean reward is first at `level`."""
    there = next(((steps, seconds) for steps, seconds, reward in smoothed(curve) if reward >= level), None)
    return "–" if there is None else f"{there[1]:.0f} s, {there[0]} steps"


def table(rows: dict[str, Any]) -> list[str]:
    base = rows["trl"]["samples_per_s"]["value"]
    level = smoothed(rows["trl"]["curve"])[-1][2]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, row in rows.items():
        cells = (
            ROWS[name].title,
            shown(row["samples_per_s"]),
            f"{row['samples_per_s']['value'] / base:.2f}×",
            shown(row["tokens_per_s"], 1),
            *(shown(row[key], 1) for key in ("seconds", "generate_s", "rest_s")),
            f"{row['memory_gib']:.2f}",
            f"{row['busy_cores']:.2f}",
            str(row["steps"]),
            reaches(row["curve"], level),
            " ".join(f"{point['reward']:.2f}" for point in row["curve"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def verdict(rows: dict[str, Any]) -> list[str]:
    base = rows["trl"]["samples_per_s"]["value"]
    ratios = {name: row["samples_per_s"]["value"] / base for name, row in rows.items()}
    word = "holds" if ratios["drpo"] >= GOAL else "**does not hold**"
    reached = [
        f"{ROWS[name].title.removeprefix('… ')} ({ratio:.2f})" for name, ratio in ratios.items() if ratio >= GOAL
    ]
    verbs = ", ".join(f"{verb} {rows['drpo'][f'{verb}_s']['value']:.1f} s" for verb in ("generate", "train", "sync"))
    return [
        f"On equal work this project makes {ratios['drpo']:.2f} times as many samples a second; the goal, {GOAL:g}, "
        f"{word}.",
        f"Its step is {verbs}.",
        *([f"Rows that reach it, by speed alone: {', '.join(reached)}."] if reached else []),
        f"TRL's mean reward of its last {SMOOTH} steps is {smoothed(rows['trl']['curve'])[-1][2]:.2f}. The table says",
        f"when the mean of a row's {SMOOTH} latest steps is first as high.",
    ]


def command_of(row: Row) -> str:
    variables = [f"{name}={value}" for name, value in row.environment]
    return " ".join([*variables, f"drpo train configs/{CONFIG.name}", *row.overrides])


def page(report: dict[str, Any]) -> str:
    of = report["machine"]
    packages = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    lines = [
        "# Beside TRL's GRPO",
        "",
        f"[{CONFIG.name}](../../configs/{CONFIG.name}) by TRL's `GRPOTrainer` and by this project, one after the",
        f"other. {of['cores']} cores of an {of['cpu']} machine without a GPU; Python {of['python']},",
        f"{packages}. Written by `tools/compare_trl.py`.",
        "",
        *verdict(report["rows"]),
        "",
        *table(report["rows"]),
        "",
        f"Median, and lowest and highest step, without the first {WARM_UP}. A response token is generated once and",
        "trained once. Memory is the highest sum of PSS of all processes in these steps, looked at once a second.",
        f"Cores busy before: of the machine, in the {BUSY_S:g} s before the row began.",
        "",
        "![samples a second, and reward over wall time](trl.png)",
        "",
        "## What is equal",
        "",
        "In the first two rows: the model and its weights, float32; the prompts, as token ids, in the same order; 8",
        "prompts × 8 samples of at most 12 tokens, temperature 1, no top-k or top-p; the verifier; two updates a step",
        "on halves of the samples; reward minus the group's mean as the advantage; the clipped loss of GRPO (0.2 and",
        "0.28), its sum over tokens divided by samples × 12; no KL term; fused AdamW with the betas, learning rate,",
        "weight decay and clipping of the configuration; two cores, which each side uses with two threads.",
        "",
        "## What is not",
        "",
        "* TRL samples with transformers' `generate` in its own process, and this project on an SGLang server, with a",
        "  weight sync after each step (in *rest*), verified once.",
        "* TRL computes the log-probs of the behaviour policy by a forward pass of its own. This project takes those",
        "  of the server.",
        "* TRL shuffles the 64 samples over its two updates; this project gives each four whole groups.",
        "* TRL pads to the longest sample. This project packs, and computes a prompt once for its eight samples.",
        "* Random numbers differ, and so do samples and curves.",
        "* Rows with bfloat16 are not equal work, and with a step ahead the samples are one step (two updates) older:",
        "  they show what these settings change. *Generate* is there what the trainer still waits for.",
        "",
        "TRL runs without gradient checkpointing, which is on by default and slower. Settings of the other rows:",
        "",
        *(f"* {ROWS[name].title}: `{command_of(ROWS[name])}`" for name in report["rows"] if ROWS[name].overrides),
    ]
    return "\n".join(lines) + "\n"


def trl_version() -> str:
    """Of the TRL that `make peers` installed."""
    (found,) = distributions(name="trl", path=[str(Path(sys.prefix) / "peers")])
    return found.version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--directory", type=Path, default=Path("runs/compare-trl"))
    parsed = parser.parse_args()
    if unknown := set(parsed.names) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if parsed.steps < SMOOTH:
        parser.error(f"--steps must be at least {SMOOTH}, the steps of a mean reward")
    parsed.directory.mkdir(parents=True, exist_ok=True)
    if parsed.names:
        model = load_config(CONFIG).model
        ensure_model(str(model.recipe), model.path)  # TRL's row reads it too, and may be the first
    for name in parsed.names:
        result = measure(name, parsed.steps, parsed.directory.resolve())
        (parsed.directory / f"{name}.json").write_text(json.dumps(result))
    files = {name: parsed.directory / f"{name}.json" for name in ROWS}
    rows = {name: figures(json.loads(file.read_text())) for name, file in files.items() if file.exists()}
    if missing := {"trl", "drpo"} - set(rows):
        sys.exit(f"a comparison needs the rows trl and drpo; {', '.join(sorted(missing))} is not measured yet")
    report = {"machine": machine(), "versions": versions() | {"trl": trl_version()}, "rows": rows}
    (RESULTS / "trl.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "trl.md").write_text(page(report))
    draw(report, RESULTS / "trl.png")


if __name__ == "__main__":
    main()

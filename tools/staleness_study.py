"""Train one recipe with tokens of growing age, by several losses and seeds, and record it under docs/results/.

    python tools/staleness_study.py configs/quickstart.yaml --losses drpo pg --staleness 0 2 4 8 --seeds 0 1 2

Staleness 0 is rollout.schedule = synchronous, another number asynchronous with that max_staleness. Runs go one after
the other. Every number on the page comes from their metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from drpo_megatron.bench.report import machine
from drpo_megatron.observability.curves import read_metrics
from drpo_megatron.platform.versions import versions

RESULTS = Path(__file__).parents[1] / "docs" / "results"
WARM_UP = 2  # steps that are left out of rates: the first batches of an asynchronous run are sampled before it trains
LAST = 5

Rows = list[dict[str, float]]


def train(config: Path, directory: Path, loss: str, staleness: int, seed: int, overrides: list[str]) -> Rows:
    name = f"{loss}-{staleness}-{seed}"
    schedule = (
        ["rollout.schedule=asynchronous", f"rollout.max_staleness={staleness}"]
        if staleness
        else ["rollout.schedule=synchronous"]
    )
    arguments = [
        *("name=" + name, f"seed={seed}", f"tracking.directory={directory}", f"model.path={directory / 'model'}"),
        *(
            "tracking.wandb=false",
            "tracking.tensorboard=false",
            "tracking.dump_rollouts=false",
            "training.export=false",
        ),
        *(f"algorithm.loss={loss}", *schedule, *overrides),
        *([] if loss == "drpo" else ["algorithm.loss_args={}"]),
    ]
    command = [sys.executable, "-m", "drpo_megatron.cli", "train", str(config), *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return read_metrics(directory / name)


def summary(seeds: list[Rows]) -> dict[str, float]:
    """Over the seeds of one loss and staleness: medians of rates, means of what was learnt."""

    def after(name: str) -> list[float]:
        return [row[name] for rows in seeds for row in rows[WARM_UP:]]

    last = [statistics.mean(row["reward/mean"] for row in rows[-LAST:]) for rows in seeds]
    return {
        "samples_per_s": statistics.median(after("perf/samples_per_s")),
        "staleness_mean": statistics.mean(after("staleness/mean")),
        "staleness_max": max(after("staleness/max")),
        "mismatch_tv": statistics.mean(after("mismatch/tv")),
        "reward_mean": statistics.mean(row["reward/mean"] for rows in seeds for row in rows),
        "reward_last": statistics.mean(last),
        "reward_last_lowest": min(last),
        "reward_last_highest": max(last),
        "grad_norm_max": max(after("grad_norm")),
    }


def draw(runs: dict[tuple[str, int], list[Rows]], out: Path) -> None:
    losses = list(dict.fromkeys(loss for loss, _ in runs))
    picture = Figure(figsize=(5.2 * len(losses), 3.8), layout="constrained")
    for axes, loss in zip(picture.subplots(1, len(losses), squeeze=False)[0], losses, strict=True):
        for (of, staleness), seeds in runs.items():
            if of == loss:
                steps = range(min(len(rows) for rows in seeds))
                mean = [statistics.mean(rows[step]["reward/mean"] for rows in seeds) for step in steps]
                axes.plot(steps, mean, label=f"staleness {staleness}", linewidth=1.4)
        axes.set(title=f"{loss}: reward, mean over seeds", xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    FigureCanvasAgg(picture).print_png(str(out))


COLUMNS = (
    "loss",
    "max_staleness",
    "samples/s",
    "staleness mean, max",
    "mean \\|π − μ\\|",
    "mean reward",
    "last reward",
    "largest gradient norm",
)


def page(title: str, command: str, report: dict[str, Any]) -> str:
    where = f"{report['machine']['cores']} cores of an {report['machine']['cpu']} machine without a GPU"
    packages = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    lines = [
        f"# {title}",
        "",
        f"```\n{command}\n```",
        "",
        f"{where}; {packages}. Written by `tools/staleness_study.py`.",
        "",
        "`max_staleness` is in weight versions, at the first update of a batch. Rates leave out the first "
        f"{WARM_UP} steps; the last reward is the mean of the last {LAST}, over seeds, with the lowest and highest "
        "seed.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in report["rows"]:
        f = row["figures"]
        lines.append(
            f"| {row['loss']} | {row['staleness']} | {f['samples_per_s']:.1f} | {f['staleness_mean']:.2f}, "
            f"{f['staleness_max']:.0f} | {f['mismatch_tv']:.4f} | {f['reward_mean']:.3f} | {f['reward_last']:.3f} "
            f"[{f['reward_last_lowest']:.3f}, {f['reward_last_highest']:.3f}] | {f['grad_norm_max']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--losses", nargs="+", default=["drpo", "pg"])
    parser.add_argument("--staleness", nargs="+", type=int, default=[0, 2, 4, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    name = f"staleness-{parsed.config.stem}"
    runs: dict[tuple[str, int], list[Rows]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        # Seeds outermost: what else the machine does then falls on all settings alike.
        for seed in parsed.seeds:
            for loss in parsed.losses:
                for staleness in parsed.staleness:
                    rows = train(parsed.config, Path(temporary), loss, staleness, seed, parsed.overrides)
                    runs.setdefault((loss, staleness), []).append(rows)
    report = {
        "recipe": parsed.config.stem,
        "overrides": parsed.overrides,
        "seeds": parsed.seeds,
        "machine": machine(),
        "versions": versions(),
        "rows": [
            {"loss": loss, "staleness": staleness, "figures": summary(seeds)}
            for (loss, staleness), seeds in runs.items()
        ],
    }
    parsed.out.mkdir(parents=True, exist_ok=True)
    (parsed.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(runs, parsed.out / f"{name}.png")
    command = "python tools/staleness_study.py " + " ".join(sys.argv[1:])
    text = page(f"Tokens of older weights: {parsed.config.stem}", command, report)
    (parsed.out / f"{name}.md").write_text(text + f"\n![reward over steps]({name}.png)\n")


if __name__ == "__main__":
    main()

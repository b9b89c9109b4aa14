"""Draw docs/concepts.png: the parts of a run and what goes between them.

python tools/concepts_picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).parents[1] / "docs" / "concepts.png"
INK, QUIET = "#1f2933", "#616e7c"
TRAINER, RANK_0, SERVERS, FILES, VERB = "#e8f0fb", "#d3e3f8", "#e6f4ea", "#f4f1ea", "#ffffff"
EDGES = {TRAINER: "#8fb0de", RANK_0: "#5b8fd6", SERVERS: "#7dbb8d", FILES: "#c9bd9f", VERB: "#8fb0de"}


def box(ax: Axes, x: float, y: float, w: float, h: float, colour: str, text: str = "", **style: object) -> None:
    """A rounded box with its lower left corner at (x, y) and `text` in its middle."""
    shape = "round,pad=0,rounding_size=0.8"
    ax.add_patch(FancyBboxPatch((x, y), w, h, shape, facecolor=colour, edgecolor=EDGES[colour], linewidth=1.2))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", **{"fontsize": 9, "color": INK, **style})


def title(ax: Axes, x: float, y: float, text: str, note: str = "") -> None:
    ax.text(x, y, text, fontsize=11.5, fontweight="bold", color=INK, va="center")
    ax.text(x, y - 2.5, note, fontsize=8.5, color=QUIET, va="center")


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.3, "mutation_scale": 13}
    ax.annotate("", end, start, arrowprops={**style, "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0})


def between(ax: Axes, y: float, text: str, *, to_servers: bool) -> None:
    """An arrow over the gap between trainer and servers, with what goes there."""
    left, right = 76.0, 97.0
    arrow(ax, (left, y), (right, y)) if to_servers else arrow(ax, (right, y), (left, y))
    ax.text((left + right) / 2, y + 0.7, text, fontsize=8.8, color=INK, ha="center", va="bottom")


def draw() -> None:
    figure, ax = plt.subplots(figsize=(12.4, 6.9), dpi=110)
    ax.set_xlim(0, 124)
    ax.set_ylim(0, 69)
    ax.axis("off")

    box(ax, 1, 12.5, 75, 55.5, TRAINER)
    title(ax, 3, 65.6, "Trainer", "ranks under torchrun, all in the same loop; Megatron-Core")
    box(ax, 3, 45.5, 71, 15.5, RANK_0)
    ax.text(4.5, 59, "rank 0 alone", fontsize=9, fontweight="bold", color=INK, va="center")
    box(ax, 4.5, 47, 14, 9.5, VERB, "data\nprompts")
    box(ax, 21.5, 47, 30, 9.5, VERB, "rollout producer\na group: n samples of a prompt")
    box(ax, 54.5, 47, 18, 9.5, VERB, "verifiers\nin processes")
    arrow(ax, (18.5, 51.8), (21.5, 51.8))
    arrow(ax, (51.5, 53.2), (54.5, 53.2))
    arrow(ax, (54.5, 50.4), (51.5, 50.4))

    verbs = {"generate": 9.4, "advantages": 11, "pack": 6, "train × u": 9.4}
    verbs |= {"sync": 6, "evaluate": 9, "log": 5.5, "save": 5.5}
    gap = (71 - sum(verbs.values())) / (len(verbs) - 1)
    x = 3.0
    for verb, width in verbs.items():
        box(ax, x, 36, width, 5.5, VERB, verb, fontweight="bold", fontsize=8.6)
        if x > 3:
            arrow(ax, (x - gap, 38.75), (x, 38.75))
        x += width + gap
    arrow(ax, (7.4, 45.5), (7.4, 41.5))
    ax.text(8.4, 43.5, "tokens, log μ, versions, rewards", fontsize=8.8, color=INK, va="center")
    # back to generate, under the verbs
    ax.plot([70.5, 70.5, 7.4], [36, 33.8, 33.8], color=INK, linewidth=1.3)
    arrow(ax, (7.4, 33.8), (7.4, 36))
    ax.text(
        38.5, 34.1, "the next step: weights are u versions newer", fontsize=8.8, color=QUIET, ha="center", va="bottom"
    )

    ax.text(3, 31.2, "the policy on the ranks", fontsize=9, fontweight="bold", color=INK, va="center")
    for stage, text in enumerate(("pipeline stage 0: embedding, layers", "last stage: layers, output projection")):
        x = 3 + stage * 36
        box(ax, x, 14, 35, 15.3, RANK_0)
        ax.text(x + 17.5, 27.4, text, fontsize=8.8, color=INK, ha="center", va="center")
        for shard in range(2):
            words = (
                f"TP shard {shard}"
                if stage == 0
                else f"TP shard {shard},\na part of the\nvocabulary: log π,\nloss, gradients"
            )
            box(ax, x + 1.2 + shard * 16.6, 15.2, 16, 10.4, VERB, words, fontsize=8.6)

    box(ax, 97, 12.5, 26, 55.5, SERVERS)
    title(ax, 99, 65.6, "Rollout servers", "SGLang, here or elsewhere")
    box(ax, 99, 55, 22, 6, VERB, "sglang-router")
    for number, y in enumerate((41, 29.5, 18)):
        state = "in traffic, version v" if number < 2 else "restarting:\nback with the next push"
        box(ax, 99, y, 22, 9.5, VERB, f"server {number}\n{state}", fontsize=9)
    arrow(ax, (110, 55), (110, 50.5))

    between(ax, 57.5, "prompts (HTTP)", to_servers=True)
    between(ax, 51.5, "tokens, log μ, versions", to_servers=False)
    between(ax, 37.2, "weights, version v", to_servers=True)
    between(ax, 31.2, "checksums, probe log π", to_servers=False)
    ax.text(
        86.5,
        28.4,
        "sync: NCCL or gloo,\nshared memory,\ndisk, deltas",
        fontsize=8.5,
        color=QUIET,
        ha="center",
        va="top",
    )

    names = (
        ("checkpoints/", "state, manifest, sums"),
        ("metrics.jsonl", "tb/, wandb/"),
        ("rollouts/", "every sample"),
        ("log/", "a file a process"),
        ("hf/", "the trained model"),
    )
    ax.text(1, 10.2, "the run's directory", fontsize=9, fontweight="bold", color=INK, va="center")
    for number, (name, what) in enumerate(names):
        x = 1 + number * 24.6
        box(ax, x, 1, 23.6, 7.6, FILES)
        ax.text(x + 11.8, 5.9, name, fontsize=9.5, fontweight="bold", color=INK, ha="center", va="center")
        ax.text(x + 11.8, 3.2, what, fontsize=8.8, color=QUIET, ha="center", va="center")
    figure.savefig(OUT, bbox_inches="tight", pad_inches=0.08, facecolor="white")


if __name__ == "__main__":
    draw()

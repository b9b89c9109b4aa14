"""docs/results/fp8-stability.md: how the study is run, what its numbers decide, and its tables.

What the numbers decide is written from them, with the interval that decides it. What a person concludes stands between
two markers and is kept when the page is written again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from drpo_megatron.study import outcome
from drpo_megatron.study.grid import DELTA_PRECISION, DELTAS, LOSSES, PRECISIONS, Cell, delta_grid
from drpo_megatron.study.outcome import Outcome
from drpo_megatron.study.records import Record
from drpo_megatron.study.statistics import Interval
from drpo_megatron.study.summary import CellSummary, Results, end_to_end

BEGIN, END = "<!-- conclusions: kept as they are -->", "<!-- end of conclusions -->"
_NOT_WRITTEN = "Not written yet."

PROTOCOL = f"""# {{title}}

Do ratio-based losses collapse in low precision where DRPO holds? A tiny Qwen3-style model learns to repeat a digit,
with real SGLang rollouts, in {{precisions}} precisions, by {{losses}} losses, with {{staleness}} updates on each
rollout batch and {{seeds}} seeds: [configs/fp8-stability.yaml](../../configs/fp8-stability.yaml){{settings}}.

## How to run it

```
{{command}}  # goes on where it was stopped
{{command}} --report-only  # pages from the runs that there are
drpo bench fp8 --json  # a reduced grid, within ten minutes on two cores
python tools/fp8_stability.py --backend transformer_engine --name fp8-stability-gpu --workers 8  # on GPUs
```

{{fp8}} Every run is a line of `{{name}}/runs-LOSS.jsonl`.

What a run is:

* **Precision.** `bf16`: model.dtype, training and rollouts. `fp8-rollout`: rollouts in FP8, training in bf16.
  `fp8-RECIPE`: both, training by that recipe. `fp8-matched`: both, training blockwise with float32 scales, the
  servers' own formula, where Transformer Engine's default are powers of two (`fp8.block_scales`).
* **Staleness** U: updates on each rollout batch, whose log-probs are the rollout's in all of them. Equal in all cells:
  {{updates}} optimizer updates a run, {{samples}} samples an update, the learning rate, and all else. With larger U
  batches are larger and fewer.
* **Losses** with the parameters of their sources, the same in all precisions; nothing is tuned: {{parameters}}.
* A seed decides the order of prompts; what is sampled is not repeatable to the bit. All seeds are used.

What is said of it, fixed before it was run ([study/outcome.py](../../drpo_megatron/study/outcome.py)):

* The *final reward* is the mean over the last {outcome.LAST} updates, the *area* that over all.
* A run *collapsed* if it learned (a window of {outcome.WINDOW} updates with reward {outcome.LEARNED} or more) and its
  last {outcome.STAYS} windows or more are all below half of its highest; or it ended by numbers that are not finite; or
  a window's mismatch KL is above {outcome.MISMATCH} nat a token. A run that ended early has reward 0 from there on.
* Intervals are of 95 %: Student's t over seeds for means, on logarithms for KL; Wilson's for shares. They are not
  corrected for how many there are: of twenty comparisons of equals one is expected to exclude 0.
"""


_FP8 = {
    "emulate": "These runs were made without a GPU, where FP8 is emulated: the numbers are FP8's, the time is not.",
    "transformer_engine": "These runs were made on GPUs: FP8 is Transformer Engine's, the servers' SGLang's.",
}


@dataclass(frozen=True)
class Made:
    """How the runs were made: optimizer updates of one, samples of an update, hours that all would have taken one after
    the other, the backend of FP8, a sentence on the machine or "", the page's title, the settings that all runs had
    beside the recipe's, and the command that makes them.
    """

    updates: int
    samples: int
    hours: float
    backend: Literal["emulate", "transformer_engine"] = "emulate"
    note: str = ""
    title: str = "FP8 stability"
    settings: Sequence[str] = ()
    command: str = "python tools/fp8_stability.py"


def write_report(path: Path, records: Sequence[Record], made: Made, beside: Mapping[str, Sequence[Record]]) -> None:
    """The page `path`. Its pictures and records are in the folder of its name, beside it.

    beside: records of the same runs made another way, by the name of their page in the same directory.
    """
    results = Results(records, made.updates)
    kept = _kept(path.read_text()) if path.exists() else _NOT_WRITTEN
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(_page(path.stem, results, records, made, beside, kept)) + "\n")


def _page(
    name: str,
    results: Results,
    records: Sequence[Record],
    made: Made,
    beside: Mapping[str, Sequence[Record]],
    kept: str,
) -> list[str]:
    cells = list(results.by_cell)
    staleness = sorted({cell.staleness for cell in cells})
    precisions = [name for name in PRECISIONS if any(cell.precision == name for cell in cells)]
    losses = [loss for loss in LOSSES if any(cell.loss == loss for cell in cells)]
    seeds = len({seed for of_cell in results.by_cell.values() for seed in of_cell})
    parameters = ", ".join(f"`{Cell.of(loss, LOSSES[loss], 'bf16', 1).method}`" for loss in losses)
    lines = [
        PROTOCOL.format(
            title=made.title,
            precisions=len(precisions),
            losses=len(losses),
            settings=", with " + _listed([f"`{setting}`" for setting in made.settings]) if made.settings else "",
            command=made.command,
            staleness=_listed(staleness),
            seeds=seeds,
            updates=made.updates,
            samples=made.samples,
            parameters=parameters,
            fp8=_FP8[made.backend],
            name=name,
        ),
        "## What was run",
        "",
        f"{len(records)} runs in {len(cells)} cells; {made.hours:.1f} hours of one worker, servers' starts left "
        f"out. {made.note and made.note + ' '}Versions: {_versions(records)}. Written by `tools/fp8_stability.py`.",
        *_failures(results),
        "",
        "## What the numbers decide",
        "",
        *(f"* {answer}" for answer in answers(results, losses, precisions)),
        "",
        "## Conclusions",
        "",
        BEGIN,
        kept,
        END,
        "",
    ]
    lines += _costs(results, losses, precisions)
    for other, theirs in beside.items():
        lines += _beside(results, Results(theirs, made.updates), other, precisions)
    for updates_on_batch in staleness:
        lines += _tables(results, losses, precisions, updates_on_batch)
    lines += _delta_table(results)
    pictures = ("reward", "mismatch", "weights", "entropy")
    return [*lines, "## Curves", "", *(f"![{picture}]({name}/{picture}.png)\n" for picture in pictures)]


def answers(results: Results, losses: Sequence[str], precisions: Sequence[str]) -> list[str]:
    """Sentences with the interval that decides them; one that nothing decides says so."""
    return [*mismatch_order(results, precisions), *_collapses(results, losses), *_differences(results, losses)]


def mismatch_order(results: Results, precisions: Sequence[str]) -> list[str]:
    """Whether mismatch KL comes in the order FP8 rollout only > FP8 end to end > bf16, a sentence a recipe."""
    lines = []
    for recipe in end_to_end(precisions):
        for higher, lower in (("fp8-rollout", recipe), (recipe, "bf16")):
            ratio = results.mismatch_ratio(higher, lower)
            if ratio is None:
                continue
            verdict = "larger" if ratio.low > 1 else "smaller" if ratio.high < 1 else ""
            said = f"is {verdict}" if verdict else "is not told apart"
            lines.append(
                f"Mismatch KL of `{higher}` {said} {'than' if verdict else 'from'} that of `{lower}`: "
                f"{_number(ratio, 2)} times over {ratio.count} pairs of runs."
            )
    return lines


def _collapses(results: Results, losses: Sequence[str]) -> list[str]:
    lines = []
    for loss in losses:
        share = results.collapse_share(_main(results, loss))
        if share is not None:
            lines.append(
                f"`{loss}` collapsed in {round(share.value * share.count)} of {share.count} runs of the grid: "
                f"{_percent(share)}."
            )
    return lines


def _differences(results: Results, losses: Sequence[str]) -> list[str]:
    lines = []
    for loss in losses:
        if loss == "drpo":
            continue
        better, worse, undecided = [], [], 0
        for cell in _main(results, "drpo"):
            other = Cell.of(loss, LOSSES[loss], cell.precision, cell.staleness)
            difference = results.paired(cell, other, _final)
            if difference is None or math.isnan(difference.low):
                continue
            better += [cell] if difference.sign > 0 else []
            worse += [cell] if difference.sign < 0 else []
            undecided += difference.sign == 0
        if better or worse or undecided:
            lines.append(
                f"Final reward of `drpo` over `{loss}`: higher in {len(better)} cells, lower in {len(worse)}, not told "
                f"apart in {undecided}."
            )
    return lines


def _costs(results: Results, losses: Sequence[str], precisions: Sequence[str]) -> list[str]:
    """What FP8 changes, by loss and of all of them."""
    others = [precision for precision in precisions if precision != "bf16"]
    lines = [
        "## What FP8 changes",
        "",
        "Minus the run in bf16 with the same loss, staleness and seed, over all of these pairs:",
        "",
    ]
    for title, of in (("Final reward", _final), ("Area under the reward", _area)):
        lines += [f"{title}:", "", "| loss | " + " | ".join(f"`{name}`" for name in others) + " |"]
        lines += ["|---" * (len(others) + 1) + "|"]
        for name, rows in (*((f"`{loss}`", [loss]) for loss in losses), ("all", losses)):
            of_rows = [cell for loss in rows for cell in _main(results, loss)]
            cells = [[cell for cell in of_rows if cell.precision == precision] for precision in others]
            texts = [_difference_text(results.minus_bf16(of_precision, of)) for of_precision in cells]
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
        lines.append("")
    return lines


def _final(outcome: Outcome) -> float:
    return outcome.final


def _area(outcome: Outcome) -> float:
    return outcome.area


def _difference_text(interval: Interval | None) -> str:
    """Bold where it excludes 0."""
    if interval is None:
        return ""
    return f"**{_number(interval, 3)}**" if interval.sign else _number(interval, 3)


def _beside(results: Results, other: Results, name: str, precisions: Sequence[str]) -> list[str]:
    lines = [
        f"## The same runs in [{name}]({name}.md)",
        "",
        "Over the pairs of runs with the same loss, precision, staleness and seed:",
        "",
        "| precision | pairs | mismatch KL, times theirs | area, minus theirs |",
        "|---|---|---|---|",
    ]
    for precision in precisions:
        if found := results.beside(other, precision):
            ratio, difference = found
            lines.append(f"| `{precision}` | {ratio.count} | {_number(ratio, 2)} | {_number(difference, 3)} |")
    return [*lines, ""]


def _tables(results: Results, losses: Sequence[str], precisions: Sequence[str], staleness: int) -> list[str]:
    def table(title: str, text: Callable[[Cell], str], rows: Sequence[str] = losses) -> list[str]:
        head = [
            "| loss | " + " | ".join(f"`{name}`" for name in precisions) + " |",
            "|---" * (len(precisions) + 1) + "|",
        ]
        body = [
            f"| `{loss}` | "
            + " | ".join(text(Cell.of(loss, LOSSES[loss], precision, staleness)) for precision in precisions)
            + " |"
            for loss in rows
        ]
        return [f"{title}:", "", *head, *body, ""]

    def of_summary(text: Callable[[CellSummary], str]) -> Callable[[Cell], str]:
        return lambda cell: text(results.summary(cell)) if cell in results.by_cell else ""

    def difference(of: Callable[[Outcome], float]) -> Callable[[Cell], str]:
        def text(cell: Cell) -> str:
            ours = Cell.of("drpo", LOSSES["drpo"], cell.precision, cell.staleness)
            return _difference_text(results.paired(ours, cell, of))

        return text

    others = [loss for loss in losses if loss != "drpo"]
    return [
        f"## {staleness} {'update' if staleness == 1 else 'updates'} on each rollout batch",
        "",
        *table("Final reward", of_summary(lambda s: _number(s.final, 3))),
        *table("Area under the reward", of_summary(lambda s: _number(s.area, 3))),
        *table("Mismatch KL, nat a token", of_summary(lambda s: _scientific(s.mismatch))),
        *table("Share of runs that collapsed, and why", of_summary(_collapse_text)),
        *(table("Final reward, `drpo` minus the loss, by seed", difference(_final), others)),
        *(table("Area, `drpo` minus the loss, by seed", difference(_area), others)),
    ]


def _delta_table(results: Results) -> list[str]:
    cells = [cell for cell in delta_grid() if cell in results.by_cell]
    if not any(cell.loss == "drpo" and dict(cell.parameters) != LOSSES["drpo"] for cell in cells):
        return []
    best = max(cells, key=lambda cell: results.summary(cell).final.value)
    free = delta_grid()[-1]
    lines = [
        f"## δ: {', '.join(f'{delta:g}' for delta in DELTAS)} and ∞",
        "",
        f"In `{DELTA_PRECISION}`, with {cells[0].staleness} updates on each rollout batch:",
        "",
        "| δ | final reward | area | mismatch KL | collapsed | final reward, highest minus this | area, minus ∞'s |",
        "|---|---|---|---|---|---|---|",
    ]
    beaten = []
    for cell in cells:
        s, gap = results.summary(cell), results.paired(best, cell, _final)
        beaten += [cell] if gap and gap.sign > 0 else []
        lines.append(
            f"| {_delta(cell)} | {_number(s.final, 3)} | {_number(s.area, 3)} | {_scientific(s.mismatch)} | "
            f"{_collapse_text(s)} | {'highest' if cell == best else _number(gap, 3) if gap else ''} | "
            f"{_difference_text(results.paired(cell, free, _area)) if cell != free else ''} |"
        )
    tied = [_delta(cell) for cell in cells if cell != best and cell not in beaten]
    named = f"δ = {_delta(best)} has the highest final reward"
    apart = f"; not told apart from it: {_listed(tied)}." if tied else ", and its intervals to all others exclude 0."
    return [*lines, "", named + apart, ""]


def _main(results: Results, loss: str) -> list[Cell]:
    """Cells of the main grid."""
    parameters = tuple(sorted(LOSSES[loss].items()))
    return [cell for cell in results.by_cell if cell.loss == loss and cell.parameters == parameters]


def _delta(cell: Cell) -> str:
    return f"{dict(cell.parameters)['delta']:g}" if cell.loss == "drpo" else "∞ (`pg`)"


def _kept(text: str) -> str:
    if BEGIN not in text or END not in text:
        return _NOT_WRITTEN
    return text.split(BEGIN, 1)[1].split(END, 1)[0].strip("\n")


def _failures(results: Results) -> list[str]:
    if not results.failed:
        return []
    lines = ["", "Runs that failed for a reason that says nothing about the loss, and are in no table:", ""]
    return lines + [f"* `{record.job.key}`: {record.reason}" for record in results.failed]


def _versions(records: Sequence[Record]) -> str:
    seen = sorted({", ".join(f"{name} {v}" for name, v in record.versions.items()) for record in records})
    return "; ".join(seen)


def _collapse_text(summary: CellSummary) -> str:
    share = summary.collapsed
    strangers = share.count - summary.learned
    notes = [*summary.reasons, *([f"{strangers} never learned"] if strangers else [])]
    return f"{_percent(share)}{' (' + ', '.join(notes) + ')' if notes else ''}"


def _number(interval: Interval, digits: int) -> str:
    if math.isnan(interval.low):
        return f"{interval.value:.{digits}f}"
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _scientific(interval: Interval) -> str:
    if math.isnan(interval.low):
        return f"{interval.value:.1e}"
    return f"{interval.value:.1e} [{interval.low:.1e}, {interval.high:.1e}]"


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _listed(values: Sequence[object]) -> str:
    *most, last = map(str, values) if values else ["no"]
    return f"{', '.join(most)} and {last}" if most else last

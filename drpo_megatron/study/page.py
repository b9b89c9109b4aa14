"""The study as one HTML file that needs nothing else: every cell in a table that can be sorted, and the pictures."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path

from drpo_megatron.study.grid import PRECISIONS, Cell
from drpo_megatron.study.records import Record
from drpo_megatron.study.report import answers
from drpo_megatron.study.statistics import Interval
from drpo_megatron.study.summary import Results

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } img { max-width: 100% }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right }
th { cursor: pointer; position: sticky; top: 0; background: #f4f4f4 }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left } small { color: #777 } .bad { background: #fbe3df }
"""
_SORT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = document.querySelector("tbody"), index = head.cellIndex, down = head.dataset.down !== "1";
  const key = row => row.cells[index].dataset.key, number = row => parseFloat(key(row));
  head.dataset.down = down ? "1" : "";
  const rows = [...body.rows].sort((a, b) => isNaN(number(a)) || isNaN(number(b))
    ? key(a).localeCompare(key(b)) : number(a) - number(b));
  body.append(...(down ? rows : rows.reverse()));
};
"""
_COLUMNS = (
    "loss",
    "precision",
    "updates on a batch",
    "seeds",
    "final reward",
    "area",
    "mismatch KL",
    "collapsed",
    "learned",
)


def write_page(path: Path, records: Sequence[Record], updates: int, pictures: Sequence[Path]) -> None:
    """Write the file `path`, with `pictures` (PNG) inside it."""
    results = Results(records, updates)
    losses = list(dict.fromkeys(cell.loss for cell in results.by_cell))
    said = answers(results, losses, list(PRECISIONS))
    rows = "\n".join(_row(results, cell) for cell in sorted(results.by_cell))
    images = "\n".join(
        f'<h2>{picture.stem}</h2><img alt="{picture.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(picture.read_bytes()).decode()}">'
        for picture in pictures
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>FP8 stability</title><style>{_STYLE}</style>
<h1>FP8 stability</h1>
<p>{len(records)} runs, {len(results.by_cell)} cells, {updates} updates a run; {len(results.failed)} runs failed and are
left out. Means with intervals of 95 % over seeds. A click on a heading sorts.</p>
<ul>{"".join(f"<li>{html.escape(line)}</li>" for line in said)}</ul>
<table><thead><tr>{"".join(f"<th>{name}</th>" for name in _COLUMNS)}</tr></thead>
<tbody>{rows}</tbody></table>
{images}
<script>{_SORT}</script></html>
"""
    )


def _row(results: Results, cell: Cell) -> str:
    s = results.summary(cell)
    bad = ' class="bad"' if s.reasons else ""
    cells = [
        _cell(s.cell.method, s.cell.method),
        _cell(s.cell.precision, s.cell.precision),
        _cell(s.cell.staleness, str(s.cell.staleness)),
        _cell(s.collapsed.count, str(s.collapsed.count)),
        _interval(s.final, ".3f"),
        _interval(s.area, ".3f"),
        _interval(s.mismatch, ".1e"),
        _cell(s.collapsed.value, f"{s.collapsed.value:.0%} <small>{html.escape(', '.join(s.reasons))}</small>"),
        _cell(s.learned, f"{s.learned}"),
    ]
    return f"<tr{bad}>{''.join(cells)}</tr>"


def _cell(key: object, text: str) -> str:
    return f'<td data-key="{html.escape(str(key))}">{text}</td>'


def _interval(interval: Interval, form: str) -> str:
    spread = "" if math.isnan(interval.low) else f" <small>[{interval.low:{form}}, {interval.high:{form}}]</small>"
    return _cell(interval.value, f"{interval.value:{form}}{spread}")

"""The picture of docs/report.md: the page of runs in a headless browser, its charts above its samples.

python -m tools.report_picture RUN [RUN …]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from drpo_megatron.commands.report import SAMPLES
from drpo_megatron.report.page import write_report
from tests.support.browser import KEYS, Browser, unpack_chromium

OUT = Path(__file__).parents[1] / "docs" / "report.png"
WIDTH, HEIGHT = 1280, 1700
_FILTER = """for (const [name, value] of Object.entries(arguments[0])) filters.elements[name].value = value;
    filters.dispatchEvent(new Event("input")); document.activeElement.blur()"""
# Some of everything: a page is longer than a picture should be.
_SHORTEN = """const charts = "#curve-charts figure:nth-child(n + 7)", samples = "article:nth-child(n + 4)";
    const leftOut = `#bands, #staleness, #settings, ${charts}, ${samples}`;
    for (const element of document.querySelectorAll(leftOut)) element.hidden = true"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drpo") as place:
        home = Path(place)
        write_report(parsed.runs, home / "page.html", SAMPLES)
        with Browser(unpack_chromium(home / "packages"), home / "browser") as browser:
            browser.open(home / "page.html", width=WIDTH, height=HEIGHT)
            browser.type("#curve-charts svg[tabindex]", KEYS["End"])
            browser.run(_FILTER, {"colour": "weight", "step_min": 14, "reward_min": 0.25, "reward_max": 0.5})
            browser.run(_SHORTEN)
            browser.screenshot(home / "page.png")
        Image.open(home / "page.png").convert("RGB").quantize(200).save(OUT, optimize=True)


if __name__ == "__main__":
    main()

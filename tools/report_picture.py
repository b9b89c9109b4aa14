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
from tests.browser import KEYS, Browser, unpack_chromium

OUT = Path(__file__).parents[1] / "docs" / "report.png"
WIDTH, HEIGHT = 1280, 660
_SHOW = """document.getElementById(arguments[0]).scrollIntoView();
    if (arguments[0] === "samples") {
      const colour = document.querySelector('#filters [name="colour"]');
      colour.value = "weight";
      document.querySelector('#filters [name="step_min"]').value = 8;
      colour.dispatchEvent(new Event("input", { bubbles: true }));
    }"""


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
            shots = []
            for section in ("curves", "times", "samples"):
                browser.run(_SHOW, section)
                browser.screenshot(home / f"{section}.png")
                shots.append(Image.open(home / f"{section}.png").convert("RGB"))
        picture = Image.new("RGB", (WIDTH, HEIGHT * len(shots)))
        for i, shot in enumerate(shots):
            picture.paste(shot, (0, i * HEIGHT))
        picture.quantize(64).save(OUT, optimize=True)


if __name__ == "__main__":
    main()

"""The page of `drpo report` in a real browser: what is drawn, what keys and clicks do, and an empty console."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from drpo_megatron.report.page import MAX_POINTS, write_report
from tests.support.browser import KEYS, Browser, unpack_chromium
from tests.support.debian import Unavailable
from tests.support.report_runs import metrics, rollout, write_run


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(prefix="drpo") as place:
        try:
            root = unpack_chromium(Path(place) / "packages")
        except Unavailable as reason:
            pytest.skip(str(reason))
        with Browser(root, Path(place) / "browser") as browser:
            yield browser


def articles(browser: Browser) -> list[str]:
    return browser.run("return [...document.querySelectorAll('article h3')].map(h => h.textContent)")


def fill(browser: Browser, name: str, value: str) -> None:
    """Set a filter as a user does: the element tells the form that it changed."""
    script = """const field = document.querySelector(`#filters [name="${arguments[0]}"]`); field.value = arguments[1];
        field.dispatchEvent(new Event("input", { bubbles: true }))"""
    browser.run(script, name, value)


def test_charts_samples_keys_and_clicks(browser: Browser, tmp_path: Path) -> None:
    a = write_run(tmp_path / "first", [metrics(step) for step in range(6)], dumped=range(6), traps=True)
    b = write_run(tmp_path / "second", [metrics(step) for step in range(12)], dumped=[11], trained=False)
    write_report([a, b], tmp_path / "page.html", samples=100)
    browser.open(tmp_path / "page.html")

    # Curves: one of each run, and the point of the last step at the height of its value.
    drawn = "return [...document.querySelectorAll('#curve-charts figure:first-child .curve')].map(p => p.dataset.run)"
    assert browser.run(drawn) == ["first", "second"]
    heights = """const [p] = document.querySelectorAll('#curve-charts figure:first-child .curve[data-run="second"]');
        const at = step => p.getPointAtLength(p.getTotalLength() * step / 11); return [0, 5.5, 11].map(s => at(s).y)"""
    low, middle, high = browser.run(heights)
    assert low > middle > high and abs(middle - (low + high) / 2) < 0.5

    # Keys: the last step, the one before, in all charts.
    browser.type("#curve-charts svg[tabindex]", KEYS["End"] + KEYS["Left"])
    first, *others = browser.run("return [...document.querySelectorAll('#curves .readout')].map(r => r.textContent)")
    assert first == "step 10 second 1 " and all(text.startswith("step 10 ") for text in others)  # 10 / 10, of one run
    browser.type("#curve-charts svg[tabindex]", KEYS["Home"])
    assert browser.run("return document.querySelector('.readout').textContent") == "step 0 first 0 second 0 "

    # The legend hides a run everywhere.
    count = "return document.querySelectorAll('.curve[data-run=\"second\"]').length"
    assert browser.run(count) > 10
    browser.click("#legend button:nth-child(2)")
    assert browser.run(count) == 0 and not any("second" in text for text in articles(browser))
    browser.click("#legend button:nth-child(2)")

    # Times: a path a verb, as high as its seconds.
    box = "return [...document.querySelectorAll('#time-charts figure:first-child path')].map(p => p.getBBox().height)"
    generate, _ = browser.run(box)
    seconds = "return document.querySelector('#time-charts figure:nth-child(2) path').getBBox().height"
    assert generate / browser.run(seconds) == pytest.approx(6 / 12, abs=0.02)  # the longest of each, on one scale

    # Samples: text as it is, none of it run.
    assert browser.run("return window.hurt") is None
    assert len(articles(browser)) == 20 and browser.text("#sample-count") == "56 of 56 samples, 1 to 20"
    prompts = browser.run("return [...document.querySelectorAll('article .prompt')].map(p => p.textContent)")
    assert {rollout(0, i, traps=True)["prompt"]["text"] for i in range(8)} <= set(prompts)
    browser.click("#next")
    browser.click("#next")
    assert browser.text("#sample-count").endswith("41 to 56") and len(articles(browser)) == 16
    assert browser.run("return document.getElementById('next').disabled")

    # Filters.
    fill(browser, "step_min", "2")
    fill(browser, "step_max", "3")
    fill(browser, "reward_min", "0.5")
    fill(browser, "order", "best")
    assert [head.split(" · ")[0] for head in articles(browser)] == [
        f"reward {r}" for r in ("0.875", "0.875", "0.75", "0.75", "0.625", "0.625", "0.5", "0.5")
    ]
    fill(browser, "text", "SAY 3.")
    assert len(articles(browser)) == 4
    fill(browser, "text", "nowhere")
    assert articles(browser) == [] and browser.text("#sample-count") == "no sample is so"

    # Colours: of log-ratios 0.25 and −0.5, and of the token that was put in none.
    for name in ("text", "step_min", "step_max", "reward_min"):
        fill(browser, name, "")
    shades = """return [...document.querySelectorAll('article .response')[0].children].slice(0, 3)
        .map(t => [getComputedStyle(t).backgroundColor, t.className])"""
    fill(browser, "order", "step")
    assert browser.run(shades) == [
        ["rgba(37, 99, 184, 0.3)", ""],
        ["rgba(214, 96, 20, 0.6)", ""],
        ["rgba(0, 0, 0, 0)", "inserted"],
    ]
    fill(browser, "colour", "weight")  # 1.5 and −0.5: half and one and a half from 1
    assert [shade for shade, _ in browser.run(shades)[:2]] == ["rgba(37, 99, 184, 0.2)", "rgba(214, 96, 20, 0.6)"]
    browser.type("article summary", KEYS["Enter"])
    assert browser.run("return document.querySelectorAll('article table tbody tr').length") == 3

    assert browser.console() == []
    browser.run("console.error('said')")
    assert len(browser.console()) == 1, "the console is read"


def test_readable_in_the_dark_and_on_a_small_screen(browser: Browser, tmp_path: Path) -> None:
    """WCAG asks for a contrast of 4.5 to 1 between text and what is behind it, 3 to 1 for lines."""
    run = write_run(tmp_path / "run", [metrics(step) for step in range(6)], dumped=[5], config={"note": "x" * 300})
    other = write_run(tmp_path / "other", [metrics(0)])
    write_report([run, other], tmp_path / "page.html", samples=100)
    colours = """const style = getComputedStyle(document.documentElement);
        return Object.fromEntries(arguments[0].map(name => [name, style.getPropertyValue("--" + name).trim()]))"""
    lines = [f"c{i}" for i in range(8)]
    pages = []
    for dark in (False, True):
        browser.open(tmp_path / "page.html", dark=dark)
        found = browser.run(colours, ["page", "raised", "ink", "soft", "focus", *lines])
        pages.append(found["page"])
        for behind in ("page", "raised"):
            for text in ("ink", "soft", "focus"):
                assert contrast(found[text], found[behind]) >= 4.5, (dark, text)
            for line in lines:
                assert contrast(found[line], found[behind]) >= 3, (dark, line)
    assert pages[0] != pages[1]
    browser.open(tmp_path / "page.html", width=360)
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    assert browser.console() == []


def contrast(a: str, b: str) -> float:
    """The formula of WCAG 2.2."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_large_runs_stay_small(browser: Browser, tmp_path: Path) -> None:
    """Four runs of 2,500 steps with 60 metrics: a page of a few megabytes, whose curves and lists are bounded. That is
    what makes it quick; how quick is a matter of the machine.
    """
    more = {f"extra/metric_{i}": i / 7 for i in range(40)}
    rows = [metrics(step, **more) for step in range(2500)]
    runs = [write_run(tmp_path / f"run{i}", rows, dumped=range(50)) for i in range(4)]
    write_report(runs, tmp_path / "page.html", samples=300)
    assert (tmp_path / "page.html").stat().st_size < 12e6
    browser.open(tmp_path / "page.html")
    drawn = "return [...document.querySelectorAll('.curve')].map(p => p.getAttribute('d').match(/[ML]/g).length)"
    points = browser.run(drawn)
    assert len(points) > 4 * 10 and 100 < max(points) <= MAX_POINTS
    everything = "return document.querySelectorAll('*').length"
    elements = browser.run(everything)
    assert elements < 20_000
    browser.click("#legend button")
    assert len(browser.run(drawn)) == len(points) * 3 // 4
    browser.click("#legend button")
    browser.run("showSamples()")
    assert len(articles(browser)) == 20 and browser.run(everything) == elements, "drawn again, not once more"
    assert str(MAX_POINTS) in browser.text("#curve-note")
    assert browser.text("#sample-note").count("296 of the 296 samples in 37 of its 50 steps") == 4
    assert browser.console() == []
    assert json.loads(browser.run("return document.getElementById('data').textContent"))["max_points"] == MAX_POINTS

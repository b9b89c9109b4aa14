"""A pytest plugin for parts of the slow tests: no new test begins after `--stop-after-s` seconds.

On a slow machine a part would otherwise run into a limit outside, and be lost whole. Tests that did not begin are
skipped with that reason, so the summary names them.
"""

from __future__ import annotations

import time

import pytest

_start = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stop-after-s", type=float, default=None, help="begin no test after that many seconds")


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--stop-after-s")
    if limit is not None and time.monotonic() - _start > limit:
        pytest.skip(f"not begun: the part's {limit:.0f} s were over")

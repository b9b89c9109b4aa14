"""Run groups of tests one after the other and say what each cost: `python tools/run_tests.py GROUP...`.

`make test` calls it with the fast groups. A table of tests and seconds is printed at the end, also after a failure,
which ends the run. `slow-part` runs one part of the slow tests: the parts cost about the same, and the number of
commits says whose turn it is, so that every slow test has run after a few commits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COSTS = ROOT / "tests" / "slow" / "seconds.json"
"""Seconds of each file of slow tests, as `--record` measured them. They only decide how the parts are cut."""
TRANSFORMER_ENGINE = ROOT / ".venv" / "te"
"""Where `make te` installs it."""
SLOW = ("tests/slow", "tests/slurm", "tests/gpu")
UNKNOWN_S = 120.0
PART_S = 15 * 60.0
"""Of a part on the machine that recorded the costs. A slower one has until PART_LIMIT_S."""
PART_LIMIT_S = 25 * 60.0
PYTEST = (sys.executable, "-m", "pytest", "--quiet")
SHUFFLED = ("-p", "randomly")
TIME_LIMIT = ("-p", "tests.support.time_limit")

GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lint": (
        (sys.executable, "-m", "ruff", "check", "--quiet", "."),
        (sys.executable, "-m", "ruff", "format", "--quiet", "--check", "."),
        (sys.executable, "-m", "mypy"),
    ),
    "unit": ((*PYTEST, "tests/unit", "--numprocesses", "2", "--dist", "loadfile"),),
    "ranks": ((*PYTEST, "tests/ranks"),),
    "server": ((*PYTEST, "tests/server"),),
    "e2e": ((*PYTEST, "tests/e2e"),),
    "shuffled": (
        (*PYTEST, *SHUFFLED, "tests/unit", "--numprocesses", "2"),
        (*PYTEST, *SHUFFLED, "tests/ranks", "tests/server", "tests/e2e"),
    ),
    "slow": ((*PYTEST, *SHUFFLED, *SLOW),),
    "slow-part": (),  # made by `slow_part`
}


@dataclass
class Outcome:
    """What one group cost. tests, skipped: None for what is not pytest."""

    group: str
    seconds: float
    tests: int | None
    skipped: int | None
    code: int


def run_group(group: str, commands: Sequence[Sequence[str]], record: bool = False) -> Outcome:
    """Run the commands until one fails."""
    start, tests, skipped, code = time.monotonic(), None, None, 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if (TRANSFORMER_ENGINE / ".installed").exists():
        environment.setdefault("DRPO_TE_PATH", str(TRANSFORMER_ENGINE))
    with tempfile.TemporaryDirectory() as directory:
        for number, command in enumerate(commands):
            report = Path(directory) / f"{number}.xml"
            is_pytest = "pytest" in command
            done = subprocess.run(
                [*command, f"--junitxml={report}"] if is_pytest else command, cwd=ROOT, env=environment, check=False
            )
            if is_pytest and report.exists():
                cases = list(ElementTree.parse(report).getroot().iter("testcase"))
                tests = (tests or 0) + len(cases)
                skipped = (skipped or 0) + sum(case.find("skipped") is not None for case in cases)
                if record:
                    record_costs(cases)
            code = done.returncode
            if code:
                break
    return Outcome(group, time.monotonic() - start, tests, skipped, code)


def record_costs(cases: Sequence[ElementTree.Element]) -> None:
    """Write the seconds of each file that ran into COSTS; the other files keep theirs."""
    costs = read_costs()
    measured: dict[str, float] = {}
    for case in cases:
        file = case.get("classname", "").replace(".", "/") + ".py"
        measured[file] = measured.get(file, 0.0) + float(case.get("time", "0"))
    known = {file: seconds for file, seconds in (costs | measured).items() if (ROOT / file).exists()}
    COSTS.write_text(json.dumps({file: round(known[file], 1) for file in sorted(known)}, indent=1) + "\n")


def read_costs() -> dict[str, float]:
    return json.loads(COSTS.read_text()) if COSTS.exists() else {}


def slow_files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in SLOW for path in (ROOT / folder).glob("test_*.py"))


def parts(files: Sequence[str], costs: Mapping[str, float]) -> list[list[str]]:
    """Cut the files into as few parts of about PART_S seconds as there must be; deterministic."""
    cost = {file: costs.get(file, UNKNOWN_S) for file in files}
    count = max(1, -(-int(sum(cost.values())) // int(PART_S)))
    cut: list[list[str]] = [[] for _ in range(count)]
    for file in sorted(files, key=lambda name: (-cost[name], name)):
        min(cut, key=lambda part: (sum(cost[f] for f in part), cut.index(part))).append(file)
    return [sorted(part) for part in cut if part]


def slow_part() -> tuple[tuple[str, ...], ...]:
    """The command of the part whose turn it is."""
    count = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    cut = parts(slow_files(), read_costs())
    turn = int(count.stdout) % len(cut)
    print(f"slow tests, part {turn + 1} of {len(cut)}: {' '.join(cut[turn])}", flush=True)
    return ((*PYTEST, *SHUFFLED, *TIME_LIMIT, f"--stop-after-s={PART_LIMIT_S:.0f}", *cut[turn]),)


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [("group", "tests", "skipped", "seconds", "")]
    for one in outcomes:
        counts = ("" if n is None else str(n) for n in (one.tests, one.skipped))
        rows.append((one.group, *counts, f"{one.seconds:.0f}", "" if one.code == 0 else f"failed ({one.code})"))
    rows.append(("all", "", "", f"{sum(one.seconds for one in outcomes):.0f}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[c]:>{widths[c]}}" for c in (1, 2, 3)) + f"  {row[4]}"
        for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument(
        "--record", action="store_true", help="write the cost of each slow file, by which parts are cut"
    )
    parsed = parser.parse_args()
    outcomes = []
    for group in parsed.groups:
        print(f"== {group}", flush=True)
        commands = slow_part() if group == "slow-part" else GROUPS[group]
        outcomes.append(run_group(group, commands, parsed.record))
        if outcomes[-1].code:
            break
    print("\n" + table(outcomes), flush=True)
    return max(outcome.code for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())

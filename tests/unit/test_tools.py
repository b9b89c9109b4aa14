"""The tools that run the tests and test them: parts of the slow tests, and faults that can still be planted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def tool(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fault", tool("plant_faults").FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: object, tmp_path: Path) -> None:
    """Where the code has moved on, the fault must move with it, or it would prove nothing."""
    source = ROOT / fault.file  # type: ignore[attr-defined]
    target = tmp_path / fault.file  # type: ignore[attr-defined]
    target.parent.mkdir(parents=True)
    target.write_text(source.read_text())
    fault.plant(tmp_path)  # type: ignore[attr-defined]
    assert target.read_text() != source.read_text()
    compile(target.read_text(), str(target), "exec")


def test_a_fault_that_cannot_be_planted_is_an_error(tmp_path: Path) -> None:
    plant_faults = tool("plant_faults")
    (tmp_path / "module.py").write_text("a = 1\na = 1\n")
    with pytest.raises(ValueError, match="2 times, not once"):
        plant_faults.Fault("twice", "module.py", "a = 1", "a = 2").plant(tmp_path)


def test_parts_of_the_slow_tests() -> None:
    """Every file is in one part, and no part is much longer than another where the files allow it."""
    run_tests = tool("run_tests")
    costs = {f"tests/slow/test_{i}.py": 60.0 + 10 * i for i in range(40)}
    cut = run_tests.parts(list(costs), costs)
    assert sorted(file for part in cut for file in part) == sorted(costs)
    sums = [sum(costs[file] for file in part) for part in cut]
    assert len(cut) > 5 and max(sums) - min(sums) <= max(costs.values())
    assert run_tests.parts(list(costs), costs) == cut
    assert run_tests.parts(["tests/slow/test_new.py"], {}) == [["tests/slow/test_new.py"]]


def test_the_parts_cover_what_make_slow_runs() -> None:
    run_tests = tool("run_tests")
    files = run_tests.slow_files()
    assert {Path(file).parent.as_posix() for file in files} == set(run_tests.SLOW)
    assert set(run_tests.SLOW) < set(run_tests.GROUPS["slow"][0])
    assert run_tests.read_costs().keys() <= set(files), "a cost of a file that is gone"

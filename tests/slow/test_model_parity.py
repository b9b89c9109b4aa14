"""Every family of the registry equals transformers on awkward and on random architectures, in every layout.

The cases write themselves from `models.families.FAMILIES` and from the keys that transformers' configuration has. One
launch runs all of them in all layouts of its number of ranks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from drpo_megatron.models.families import FAMILIES
from tests.support.architectures import LAYOUTS, Case, awkward_cases, random_cases, tiny_case, were_not_left_out
from tests.support.model_parity import compare

pytestmark = pytest.mark.distributed

CASES = [
    case for family in FAMILIES for case in [tiny_case(family), *awkward_cases(family), *random_cases(family, range(2))]
]
# Of the others, a dozen architectures have shown each already.
WITHOUT_REPEATS = {
    2: ("tp1", "tp2", "tp2sp", "pp2", "pp2uneven", "ep2"),
    4: ("tp2sp-pp2", "dp2-tp2sp", "dp2-pp2-ep2", "dp2-tp2sp-ep4", "tp2sp-pp2-ep2"),
}


def _compare(root: Path, cases: list[Case], keys: tuple[str, ...], world: int) -> None:
    plan = [(case, keys) for case in cases]
    ran = compare(root, plan, world)
    if world == 2:
        were_not_left_out(root, plan, ran)
    else:
        # A single key-value head or three layers fit few layouts of four ranks.
        assert sum(map(bool, ran.values())) > len(cases) / 2


@pytest.mark.parametrize("world", [2, 4])
def test_every_family(world: int, tmp_path: Path) -> None:
    _compare(tmp_path, CASES, tuple(LAYOUTS[world]), world)


@pytest.mark.parametrize("world", [2, 4])
def test_many_random_architectures(world: int, tmp_path: Path) -> None:
    cases = [case for family in FAMILIES for case in random_cases(family, range(2, 22))]
    _compare(tmp_path, cases, WITHOUT_REPEATS[world], world)

"""The comparison of stubs with libraries finds each kind of lie, and Megatron-Core's stubs tell none.

`tests/slow/test_stubs.py` compares those of all libraries, each in a process of its own.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from drpo_megatron import platform
from tests.support.stubs import Findings, compare, compare_package, stub_modules

LIBRARY = """
from dataclasses import dataclass

flag = True

def add(a, b, /, scale=1.0, *rest, mode="plain", **others): ...

class Base:
    def __init__(self, size, *, bias=True):
        self.size = size

    def forward(self, x, mask=None): ...

    @classmethod
    def load(cls, path): ...

    @staticmethod
    def names(): ...

class Layer(Base):
    extra: int

@dataclass
class Settings:
    width: int
    depth: int = 2
"""

TRUE = """
from dataclasses import dataclass
from typing import type_check_only

flag: bool

@type_check_only
class OnlyHere: ...

def add(x: int, y: int, /, scale: float = 1.0, *rest: int, mode: str = ..., **others: int) -> int: ...

class Base:
    size: int

    def __init__(self, size: int, *, bias: bool = True) -> None: ...
    def forward(self, x: int, *, mask: int | None = None) -> int: ...
    @classmethod
    def load(cls, path: str) -> Base: ...
    @staticmethod
    def names() -> list[str]: ...

class Layer(Base):
    extra: int

@dataclass(kw_only=True)
class Settings:
    width: int
    depth: int = 2
"""

LIES = {
    "flag: bool -> banner: bool": "library has no banner",
    "def add( -> def plus(": "library has no plus",
    "scale: float = 1.0 -> factor: float = 1.0": "library.add has not factor at place 2, by keyword too, but scale=1.0",
    "scale: float = 1.0 -> scale: float = 2.0": "library.add: the default of scale is 1.0",
    "mode: str = ... -> manner: str = ...": "library.add has no manner",
    "x: int, y: int, / -> x: int, b: int": "library.add has not x at place 0, by keyword too, but a",
    "size: int, *, bias -> size: int = 1, *, bias": "library.Base.__init__ needs size",
    "self, size: int, * -> self, *": "library.Base.__init__ needs size, which the stub does not give",
    "x: int, *, mask -> x: int, *args: int, mask": "library.Base.forward takes no *args",
    "    size: int\n -> \n    length: int\n": "library.Base has no length",
    "    @classmethod\n -> \n": "library.Base.load is a classmethod",
    "    @staticmethod\n -> \n": "library.Base.names is a staticmethod",
    "class Layer(Base) -> class Layer(Settings)": "library.Layer is no Settings",
    "    extra: int -> \n    other: int": "library.Layer has no other",
    "    width: int -> \n    width: int = 1": "library.Settings needs width",
    "    depth: int = 2 -> \n    depth: int = 3": "library.Settings: the default of depth is 2",
    "class Settings -> class Options": "library has no Options",
}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("library")
    monkeypatch.setitem(sys.modules, "library", module)
    exec(LIBRARY, vars(module))
    # What instances get is read in the source, which a module made of a string does not have.
    module.Base.size = 0
    return module


def test_a_true_stub_has_no_problem(library: types.ModuleType) -> None:
    findings = Findings()
    compare(TRUE, library, "library", findings)
    assert findings.problems == []
    assert {"library.add(scale)", "library.Base.size", "library.Settings(depth)"} <= set(findings.checked)
    assert "library.OnlyHere" not in findings.checked


@pytest.mark.parametrize("change", LIES)
def test_a_lie_is_found(library: types.ModuleType, change: str) -> None:
    truth, lie = change.split(" -> ")
    assert TRUE.count(truth) == 1
    findings = Findings()
    compare(TRUE.replace(truth, lie), library, "library", findings)
    assert LIES[change] in findings.problems


class _Settles:
    def __init__(self) -> None:
        self.settled = True

    def later(self) -> None:
        self.came_later = 1


def test_attributes_that_methods_assign_are_known() -> None:
    module = types.SimpleNamespace(Settles=_Settles)
    findings = Findings()
    compare("class Settles:\n    settled: bool\n    came_later: int\n    never: int\n", module, "library", findings)
    assert findings.problems == ["library.Settles has no never"]


def test_a_module_that_does_not_exist_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "no_such_library").mkdir()
    (tmp_path / "no_such_library" / "__init__.pyi").touch()
    monkeypatch.setattr("tests.support.stubs.STUBS", tmp_path)
    assert compare_package("no_such_library").problems == ["no_such_library: No module named 'no_such_library'"]


def test_megatron_core_is_as_its_stubs_say() -> None:
    """With the product's stand-ins in the places of some of its functions: they take the same arguments."""
    platform.activate()
    findings = compare_package("megatron")
    assert findings.problems == []
    assert {name for name, _ in stub_modules("megatron")} <= set(findings.checked)
    assert len(findings.checked) > 500

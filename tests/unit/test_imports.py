"""Cuts of what libraries import: the mechanism, without the libraries. `tests/server/test_imports.py` has those."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from drpo_megatron.platform import imports


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`cut_user`, which takes `cut_optional` where it is installed, and `cut_later`, which has a class."""
    (tmp_path / "cut_optional.py").write_text("")
    (tmp_path / "cut_later.py").write_text("class Later(tuple): pass\n")
    (tmp_path / "cut_user.py").write_text(
        "try:\n    import cut_optional\nexcept ImportError:\n    cut_optional = None\nfrom cut_later import Later\n"
    )
    names = ("cut_user", "cut_optional", "cut_later")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    importlib.invalidate_caches()
    yield
    for name in names:
        sys.modules.pop(name, None)


def test_an_optional_package_is_hidden_while_its_user_is_imported(packages: None) -> None:
    imports.CutImports({"cut_user": imports.hidden("cut_optional")}).install()
    assert importlib.import_module("cut_user").cut_optional is None
    assert "cut_optional" not in sys.modules
    importlib.import_module("cut_optional")


def test_a_package_that_is_loaded_is_not_hidden(packages: None) -> None:
    optional = importlib.import_module("cut_optional")
    imports.CutImports({"cut_user": imports.hidden("cut_optional")}).install()
    assert importlib.import_module("cut_user").cut_optional is optional
    assert sys.modules["cut_optional"] is optional


def test_nothing_is_cut_where_it_is_not_wanted(packages: None) -> None:
    finder = imports.CutImports({"cut_user": imports.hidden("cut_optional")}, lambda: False)
    finder.install()
    assert importlib.import_module("cut_user").cut_optional is importlib.import_module("cut_optional")
    assert finder not in sys.meta_path


def test_what_a_module_raises_leaves_nothing_hidden(packages: None, tmp_path: Path) -> None:
    (tmp_path / "cut_user.py").write_text("import cut_optional\n")
    imports.CutImports({"cut_user": imports.hidden("cut_optional")}).install()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("cut_user")
    importlib.import_module("cut_optional")


def test_a_class_is_imported_with_its_first_instance(packages: None) -> None:
    imports.CutImports({"cut_user": imports.late("cut_later", "Later")}).install()
    user = importlib.import_module("cut_user")
    assert "cut_later" not in sys.modules
    made = user.Later([1, 2])
    assert type(made) is importlib.import_module("cut_later").Later and made == (1, 2)


def test_distributions_are_those_of_the_whole_list() -> None:
    """Of a package of its distribution's name, of one with another (Pillow), and of one that is not installed."""
    complete = importlib.metadata.packages_distributions()
    asked = imports._Distributions(lambda: complete)
    for name in ("torch", "numpy", "transformers", "PIL", "yaml"):
        assert asked.get(name, []) == complete.get(name, []), name
    assert asked.get("no_such_package", []) == []


def test_distributions_are_not_all_read_for_one() -> None:
    def all_of_them() -> dict[str, list[str]]:
        raise AssertionError("read")

    asked = imports._Distributions(all_of_them)
    assert asked.get("torch") == ["torch"]
    with pytest.raises(AssertionError, match="read"):
        asked.get("PIL")  # belongs to Pillow, which only the whole list says

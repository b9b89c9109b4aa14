"""Compares `stubs/` with the installed libraries: a stub that says what is not so hides errors from mypy.

What is compared: that every module, class, function and attribute exists; that a base class is one; and that whatever
call a stub allows, the library takes: names, kinds and order of parameters, which of them may be left out, and the
defaults that are written down. A stub may say less than the library has. Types are not compared: the libraries say
few of them.

`python -m tests.support.stubs PACKAGE` prints {"checked": names, "problems": lines} of the stubs of one package, which
it imports: a process of its own, because the product replaces some of these functions.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from inspect import Parameter
from pathlib import Path
from typing import Any

STUBS = Path(__file__).parents[2] / "stubs"
PACKAGES = tuple(sorted(path.name for path in STUBS.iterdir()))
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_BY_KEYWORD = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass
class Findings:
    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def stub_modules(package: str) -> Iterator[tuple[str, Path]]:
    """(name, file) of the modules that the stubs of `package` describe."""
    for path in sorted((STUBS / package).rglob("*.pyi")):
        parts = path.relative_to(STUBS).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def compare_package(package: str) -> Findings:
    """Import every module that is described, and compare it."""
    findings = Findings()
    for name, path in stub_modules(package):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            findings.problems.append(f"{name}: {error}")
            continue
        findings.checked.append(name)
        compare(path.read_text(), module, name, findings)
    return findings


def compare(stub: str, module: Any, where: str, findings: Findings) -> None:
    """Add to `findings` what of the text of a stub is not so in the imported module."""
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ClassDef):
            if not _has_decorator(node, "type_check_only"):
                _compare_class(node, module, where, findings)
        elif isinstance(node, ast.FunctionDef):
            if found := _found(node.name, module, where, findings):
                _compare_call(node, found[0], f"{where}.{node.name}", findings)
        elif isinstance(node, ast.AnnAssign):
            _found(ast.unparse(node.target), module, where, findings)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.asname == alias.name:  # the mark of what a stub re-exports
                    _found(alias.name, module, where, findings)


def _found(name: str, owner: Any, where: str, findings: Findings) -> tuple[Any] | None:
    findings.checked.append(f"{where}.{name}")
    if not hasattr(owner, name):
        findings.problems.append(f"{where} has no {name}")
        return None
    return (getattr(owner, name),)


def _has_decorator(node: ast.ClassDef | ast.FunctionDef, name: str) -> bool:
    return any(ast.unparse(decorator).split("(")[0] == name for decorator in node.decorator_list)


def _compare_class(node: ast.ClassDef, module: Any, where: str, findings: Findings) -> None:
    found, where = _found(node.name, module, where, findings), f"{where}.{node.name}"
    if found is None:
        return
    (cls,) = found
    if not isinstance(cls, type):
        findings.problems.append(f"{where} is no class")
        return
    bases = {base.__name__ for base in cls.__mro__} | ({"NamedTuple"} if hasattr(cls, "_fields") else set())
    for base in (ast.unparse(base).split(".")[-1] for base in node.bases):
        if base not in bases:
            findings.problems.append(f"{where} is no {base}")
    if _has_decorator(node, "dataclass"):
        _compare_parameters(_fields(node), cls, where, findings)
    for member in node.body:
        name = getattr(member, "name", "")
        if isinstance(member, ast.AnnAssign):
            _compare_attribute(ast.unparse(member.target), cls, where, findings)
        elif isinstance(member, ast.Assign):
            for target in member.targets:
                value = _found(ast.unparse(target), cls, where, findings)
                if value and value[0].value != ast.literal_eval(member.value):
                    findings.problems.append(f"{where}.{ast.unparse(target)} is {value[0].value}")
        elif isinstance(member, ast.FunctionDef) and _has_decorator(member, "property"):
            _compare_attribute(name, cls, where, findings)
        elif isinstance(member, ast.FunctionDef) and name == "__init__":
            _compare_call(member, cls, f"{where}.__init__", findings, skip=1, skip_found=0)
        elif isinstance(member, ast.FunctionDef) and _found(name, cls, where, findings):
            _compare_method(member, cls, f"{where}.{name}", findings)


def _compare_method(node: ast.FunctionDef, cls: type, where: str, findings: Findings) -> None:
    raw = inspect.getattr_static(cls, node.name)
    for kind in (classmethod, staticmethod):
        if isinstance(raw, kind) and not _has_decorator(node, kind.__name__):
            findings.problems.append(f"{where} is a {kind.__name__}")
            return
        # An instance's method may be described as one of the class, as subclasses may narrow it: never the reverse.
    skip = 0 if _has_decorator(node, "staticmethod") else 1
    function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
    _compare_call(node, function, where, findings, skip=skip, skip_found=0 if isinstance(raw, staticmethod) else 1)


def _compare_attribute(name: str, cls: type, where: str, findings: Findings) -> None:
    findings.checked.append(f"{where}.{name}")
    annotated = any(name in vars(base).get("__annotations__", {}) for base in cls.__mro__)
    if not (annotated or hasattr(cls, name) or any(name in assigned(base) for base in cls.__mro__)):
        findings.problems.append(f"{where} has no {name}")


@functools.cache
def assigned(cls: type) -> frozenset[str]:
    """Names that the methods of a class give their instance; none of a class without source in Python."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return frozenset()
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


_MISSING = object()


def _parameters(arguments: ast.arguments) -> list[Parameter]:
    """Those of a stub; a default that is written as `...` is `_MISSING`."""
    positional = [(a, Parameter.POSITIONAL_ONLY) for a in arguments.posonlyargs]
    positional += [(a, Parameter.POSITIONAL_OR_KEYWORD) for a in arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    found = [
        Parameter(a.arg, kind, default=_default(default))
        for (a, kind), default in zip(positional, [*defaults, *arguments.defaults], strict=True)
    ]
    if arguments.vararg:
        found.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    found += [
        Parameter(a.arg, Parameter.KEYWORD_ONLY, default=_default(default))
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        found.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return found


def _default(node: ast.expr | None) -> Any:
    if node is None:
        return Parameter.empty
    return _MISSING if isinstance(node, ast.Constant) and node.value is ... else ast.literal_eval(node)


def _fields(node: ast.ClassDef) -> list[Parameter]:
    """The parameters of the constructor of a dataclass."""
    by_keyword = any("kw_only=True" in ast.unparse(decorator) for decorator in node.decorator_list)
    kind = Parameter.KEYWORD_ONLY if by_keyword else Parameter.POSITIONAL_OR_KEYWORD
    return [
        Parameter(ast.unparse(member.target), kind, default=_default(member.value))
        for member in node.body
        if isinstance(member, ast.AnnAssign)
    ]


def _compare_call(
    node: ast.FunctionDef,
    function: Callable[..., Any],
    where: str,
    findings: Findings,
    *,
    skip: int = 0,
    skip_found: int = 0,
) -> None:
    """skip, skip_found: parameters that the call of a method does not give, in the stub and in the library."""
    _compare_parameters(_parameters(node.args)[skip:], function, where, findings, skip_found)


def _compare_parameters(
    described: list[Parameter], function: Callable[..., Any], where: str, findings: Findings, skip_found: int = 0
) -> None:
    say = findings.problems.append
    found = _signature(function)
    if skip_found and found[0].name in ("self", "cls"):  # transformers makes signatures without them
        found = found[1:]
    positional = [p for p in found if p.kind in _POSITIONAL]
    by_name = {p.name: p for p in found if p.kind in _BY_KEYWORD}
    given: set[str] = set()
    for index, parameter in enumerate(described):
        kind, name = parameter.kind, parameter.name
        findings.checked.append(f"{where}({name})")
        if kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
            if not any(p.kind is kind for p in found):
                say(f"{where} takes no {'*' if kind is Parameter.VAR_POSITIONAL else '**'}{name}")
            continue
        if kind is Parameter.KEYWORD_ONLY:
            real = by_name.get(name)
        else:
            real = positional[index] if index < len(positional) else None
            if kind is Parameter.POSITIONAL_OR_KEYWORD and (real is None or real is not by_name.get(name)):
                say(f"{where} has not {name} at place {index}, by keyword too, but {real}")
                continue
        if real is None:
            say(f"{where} has no {name}")
            continue
        given.add(real.name)
        if parameter.default is Parameter.empty:
            continue
        if real.default is Parameter.empty:
            say(f"{where} needs {name}")
        elif parameter.default is not _MISSING and parameter.default != real.default:
            say(f"{where}: the default of {name} is {real.default!r}")
    for real in found:
        is_variable = real.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        if real.default is Parameter.empty and not is_variable and real.name not in given:
            say(f"{where} needs {real.name}, which the stub does not give")


def _signature(function: Any) -> list[Parameter]:
    """With `**kwargs` of a wrapper that takes more than what it wraps."""
    if not inspect.isfunction(function) and inspect.isfunction(getattr(function, "fn", None)):
        function = function.fn  # Triton's objects hold their function so
    found = list(inspect.signature(function).parameters.values())
    outermost = function.__init__ if isinstance(function, type) else function
    if inspect.isfunction(outermost) and hasattr(outermost, "__wrapped__"):
        of_wrapper = inspect.signature(outermost, follow_wrapped=False).parameters.values()
        kinds = {p.kind for p in found}
        found += [p for p in of_wrapper if p.kind is Parameter.VAR_KEYWORD and p.kind not in kinds]
    return found


def main(package: str) -> None:
    if package == "sglang":
        import torch

        from drpo_megatron.platform.sglang_cpu import install_stand_ins

        if not torch.cuda.is_available():
            install_stand_ins()
    findings = compare_package(package)
    print(json.dumps({"checked": findings.checked, "problems": findings.problems}))


if __name__ == "__main__":
    main(sys.argv[1])

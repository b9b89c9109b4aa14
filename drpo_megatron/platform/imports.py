"""What libraries import when they are imported, and nothing on a machine without CUDA uses: half of a process's start.

Nothing that is computed changes, and no library is. `tests/server/test_imports.py` fails when a cut no longer cuts.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

# Every `drpo` command imports this module: what it needs itself is imported where it is used.

Cuts = Mapping[str, Callable[[], AbstractContextManager[None]]]
"""Names of modules to what holds while they are imported."""


class CutImports:
    """On `sys.meta_path`: finds modules where they are, and loads them within their cuts. `wanted` is asked before the
    first of them.
    """

    def __init__(self, cuts: Cuts, wanted: Callable[[], bool] = lambda: True) -> None:
        self._cuts = dict(cuts)
        self._wanted: Callable[[], bool] | None = wanted

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        cut = self._cuts.pop(name, None)
        if cut is None:
            return None
        if self._wanted is not None:
            wanted, self._wanted = self._wanted, None
            if not wanted():
                sys.meta_path.remove(self)
                return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_within(module: ModuleType) -> None:
                with cut():
                    load(module)

            spec.loader.exec_module = load_within  # type: ignore[method-assign]
        return spec

    def install(self) -> None:
        sys.meta_path.insert(0, self)


_compiler_is_kept = False


def keep_the_compiler() -> None:
    """For a process whose user wants what it computes compiled. Call it before the libraries are imported."""
    global _compiler_is_kept
    _compiler_is_kept = True


def compile_nothing() -> None:
    """`torch.compile`, and what tells it apart, returns the function it is given: where all tensors are on the CPU.

    As decorators they import the compiler, 3.5 s of CPU time, though the function may never run; and one that runs
    needs a C++ compiler, which the machine need not have.
    """
    if _compiler_is_kept:
        return
    import torch

    # A stand-in for functions of several signatures.
    compiler: Any = torch.compiler
    compiler.disable = compiler.allow_in_graph = compiler.assume_constant_result = _as_it_is
    torch.compile = _as_it_is  # type: ignore[assignment]


def _as_it_is(function: Callable[..., Any] | None = None, *arguments: Any, **options: Any) -> Any:
    return function if function is not None else lambda decorated: decorated


@contextlib.contextmanager
def _instead(modules: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """Meanwhile these modules are imported, but where the real ones are loaded already; None: cannot be imported."""
    modules = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(modules)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


def hidden(*names: str) -> Callable[[], AbstractContextManager[None]]:
    """Packages that are as if they were not installed: for a module that could use them for what nobody asks of it."""
    return lambda: _instead(dict.fromkeys(names))


def late(module: str, name: str) -> Callable[[], AbstractContextManager[None]]:
    """A class or function that is imported when it is called."""

    def make(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    stand_in = ModuleType(module)
    setattr(stand_in, name, make)
    return lambda: _instead({module: stand_in})


class _Distributions(dict[str, list[str]]):
    """`importlib.metadata.packages_distributions()` as it is asked. All of it is 1.1 s of CPU time: it looks for every
    file of every installed package.
    """

    def __init__(self, all_of_them: Callable[[], Mapping[str, list[str]]]) -> None:
        super().__init__()
        self._all_of_them = all_of_them
        self._complete = False

    def get(self, package: str, default: Any = None) -> Any:
        if not self._complete and package not in self:
            import importlib.metadata

            try:
                self[package] = [importlib.metadata.distribution(package).metadata["Name"]]
            except importlib.metadata.PackageNotFoundError:  # Pillow has PIL
                self.update(self._all_of_them())
                self._complete = True
        return super().get(package, default)


@contextlib.contextmanager
def _distributions_as_asked() -> Iterator[None]:
    import importlib.metadata

    real = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: _Distributions(real)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = real


@contextlib.contextmanager
def _model_files_read_once() -> Iterator[None]:
    """transformers reads all files of its models for their names in one module, and again in another."""
    from transformers.utils import import_utils

    read = import_utils.create_import_structure_from_path
    # It remembers what it read, by the name of the folder there and by that of a file in it here.
    import_utils.create_import_structure_from_path = lambda module_path: read(Path(module_path).parent)
    try:
        yield
    finally:
        import_utils.create_import_structure_from_path = read


def no_compiler() -> AbstractContextManager[None]:
    """For decorators of torch's compiler itself."""
    if _compiler_is_kept:
        return contextlib.nullcontext()
    stand_in = ModuleType("torch._dynamo")
    stand_in.__dict__.update(allow_in_graph=_as_it_is, assume_constant_result=_as_it_is, disable=_as_it_is)
    return _instead({"torch._dynamo": stand_in})


_WITHOUT_CUDA: Cuts = {
    "megatron.core": contextlib.nullcontext,
    # Timers that could write to these, and are not used.
    "megatron.core.timers": hidden("wandb", "torch.utils.tensorboard"),
    "transformers.utils.import_utils": _distributions_as_asked,
    # torch's compiler, for masks of models that transformers computes.
    "transformers.masking_utils": late("torch._dynamo._trace_wrapped_higher_order_op", "TransformGetItemToIndex"),
    "transformers.integrations.deepgemm": no_compiler,
    "transformers.integrations.finegrained_fp8": no_compiler,
    "torchvision.ops.roi_align": late("torch._dynamo.utils", "is_compile_supported"),
    "transformers.models": _model_files_read_once,
    # For losses of object detection.
    "transformers.loss.loss_utils": late("scipy.optimize", "linear_sum_assignment"),
}


def without_cuda() -> bool:
    """Called before the first of the libraries is imported, whichever module of whatever process that is."""
    import torch

    # Asks NVIDIA's library and not CUDA, which no fork of this process could then use.
    if torch.cuda.device_count() > 0:
        return False
    compile_nothing()
    return True


def cut_imports() -> None:
    """Install the cuts for processes without CUDA. What is loaded already stays as it is."""
    CutImports(_WITHOUT_CUDA, without_cuda).install()

"""What SGLang's server imports and this one does not use, for `platform.sglang_cpu`: most of its start is imports."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from drpo_megatron.platform import imports

_NO_MODELS = f"{__name__}._no_models"


def cut_imports(arguments: Sequence[str]) -> None:
    """Call it before SGLang is imported, with the server's command line."""
    if "--enable-torch-compile" in arguments:
        imports.keep_the_compiler()
    imports.CutImports(
        {
            # Its values could be compared with a trainer's in the same process.
            "sglang.srt.debug_utils.dumper": imports.hidden("megatron"),
            "sglang.srt.models.registry": _without_models,
            "sglang.kernels.ops.layernorm.mhc": imports.no_compiler,
            # The vocabulary of one maker's files.
            "gguf.vocab": imports.hidden("mistral_common"),
        }
    ).install()


@contextlib.contextmanager
def _without_models() -> Iterator[None]:
    """SGLang's own way to import its 200 files of models when one is asked for that is not registered: there is a
    package of others. Here it is empty, if the user has none.
    """
    variable = "SGLANG_EXTERNAL_MODEL_PACKAGE"
    if os.environ.get(variable):
        yield
        return
    package = ModuleType(_NO_MODELS)
    package.__path__ = []
    sys.modules[_NO_MODELS] = package
    os.environ[variable] = _NO_MODELS
    try:
        yield
    finally:
        del os.environ[variable], sys.modules[_NO_MODELS]


def register_model(model_path: str) -> None:
    """Import the one file of SGLang's models that has the first architecture of `config.json`, and register it.

    Where that is not found, SGLang imports all of them when it loads the model.
    """
    from sglang.srt.models.registry import ModelRegistry

    config = Path(model_path) / "config.json"
    architectures = json.loads(config.read_text()).get("architectures") if config.is_file() else None
    if architectures and architectures[0] not in ModelRegistry.models:
        model = _model_class(architectures[0])
        if model is not None:
            ModelRegistry.models[architectures[0]] = model


def _model_class(architecture: str) -> Any:
    """The class that SGLang would register for `architecture`; None when no file defines one."""
    import sglang.srt.models as models

    defines = re.compile(rf"^class {re.escape(architecture)}\b", re.MULTILINE)
    for found in pkgutil.iter_modules(models.__path__):
        file = Path(models.__path__[0]) / f"{found.name}.py"
        if not found.ispkg and file.is_file() and defines.search(file.read_text()):
            entry = getattr(importlib.import_module(f"{models.__name__}.{found.name}"), "EntryClass", [])
            for model in entry if isinstance(entry, list) else [entry]:
                if model.__name__ == architecture:
                    return model
    return None

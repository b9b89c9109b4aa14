"""SGLang's own arguments: which ones the installed version has, and the command line for them."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drpo_megatron.config.schema import ServerConfig
from drpo_megatron.rollout.errors import ServerStartError

# Where a server finds the receiving end of the delta transport; it is imported there, at the first push.
DELTA_LOADER = "drpo_megatron.sync.delta_loader.load"
# And the function that says which of its layers are in FP8.
FP8_REPORT = "drpo_megatron.fp8.server_report.report"


@functools.cache
def installed_arguments() -> dict[str, str]:
    """Name → command line flag of every argument of the installed SGLang.

    Read from the source of its argument records (`sglang/srt/arg_groups/fields`) and of the flags registered by hand in
    `server_args.py`, because importing SGLang takes seconds and patches transformers in the importing process. Raises
    ServerStartError when SGLang is not installed or keeps its arguments elsewhere.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise ServerStartError("SGLang is not installed in this environment: install it as README.md says")
    root = Path(spec.origin).parent / "srt"
    arguments = _registered(root / "server_args.py")
    folder = root / "arg_groups" / "fields"
    for source in sorted(folder.glob("*.py")):
        for record in ast.parse(source.read_text()).body:
            if isinstance(record, ast.ClassDef):
                arguments.update(_fields(record))
    if "model_path" not in arguments:
        raise ServerStartError(f"no SGLang arguments found in {folder}: install the version that setup.py names")
    return arguments


def _registered(source: Path) -> dict[str, str]:
    flags = {
        call.args[0].value
        for call in ast.walk(ast.parse(source.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        if call.args and isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    }
    return {flag.removeprefix("--").replace("-", "_"): flag for flag in flags}


def _fields(record: ast.ClassDef) -> dict[str, str]:
    fields = {}
    for field in record.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        annotation = field.annotation
        if not (isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name)):
            continue
        if annotation.value.id != "A":  # `A[type, help]` marks an argument; the rest is derived
            continue
        keywords = {
            k.arg: k.value.value
            for call in ast.walk(annotation)
            if isinstance(call, ast.Call)
            for k in call.keywords
            if isinstance(k.value, ast.Constant)
        }
        if not keywords.get("no_cli"):
            fields[field.target.id] = str(keywords.get("cli_name") or "--" + field.target.id.replace("_", "-"))
    return fields


def check_arguments(arguments: Mapping[str, Any], reserved: Mapping[str, str]) -> None:
    """Refuse arguments that the installed SGLang does not have, and those that `reserved` maps to a setting of ours.

    Raises ServerStartError with the nearest name, or with the setting to use.
    """
    installed = installed_arguments()
    for name in arguments:
        if name in reserved:
            raise ServerStartError(f"rollout.server.args.{name} is decided elsewhere: set {reserved[name]}")
        if name not in installed:
            near = difflib.get_close_matches(name.replace("-", "_"), installed, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ServerStartError(f"rollout.server.args.{name} is not an argument of the installed SGLang{hint}")


def with_loader(config: ServerConfig, loader: str) -> ServerConfig:
    """The server's configuration with `loader` besides those that its arguments name."""
    loaders = [*config.args.get("custom_weight_loader", []), loader]
    return config.model_copy(update={"args": config.args | {"custom_weight_loader": loaders}})


def with_delta_loader(config: ServerConfig) -> ServerConfig:
    return with_loader(config, DELTA_LOADER)


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments by name as a command line. True is a bare flag; False and None leave the argument out."""
    installed = installed_arguments()
    line: list[str] = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        line.append(installed[name])
        if value is True:
            continue
        if isinstance(value, Mapping):
            line.append(json.dumps(value))
        elif isinstance(value, (list, tuple)):
            line.extend(str(v) for v in value)
        else:
            line.append(str(value))
    return line

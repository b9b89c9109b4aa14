"""From a YAML file and `key=value` overrides to a `RunConfig`, with errors that say which key and what to do."""

from __future__ import annotations

import difflib
import itertools
import math
import re
import reprlib
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from drpo_megatron.config.schema import RunConfig, Section


class ConfigError(ValueError):
    """A configuration that is refused. `problems` has one line each: `path.to.key: problem; what to do`."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML file `path`, put the `a.b=value` overrides over it (values are YAML), and validate.

    Relative paths inside the configuration count from the working directory. Raises ConfigError with every problem.
    """
    return load_section(RunConfig, path, overrides)


def load_section[S: Section](schema: type[S], path: Path | str, overrides: Sequence[str] = ()) -> S:
    """The same for any file whose settings `schema` describes."""
    return section_of(schema, _read_yaml(Path(path)), overrides)


def section_of[S: Section](schema: type[S], raw: dict[str, Any], overrides: Sequence[str] = ()) -> S:
    """The same for settings that are no file. Changes `raw`."""
    problems: list[str] = []
    for override in overrides:
        try:
            _apply_override(raw, override)
        except ConfigError as error:
            problems += error.problems
    problems += _not_settings(raw, "", 0, itertools.count())
    if problems:
        raise ConfigError(problems)
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([_problem(details, schema) for details in error.errors()]) from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML. `load_config` of it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


_LONGEST_FILE = 2**20  # characters; PyYAML reads some 100,000 a second
_DEEPEST = 50
_MOST_VALUES = 10_000
_SHORT = reprlib.Repr(maxstring=80, maxother=80, maxlong=40, maxlevel=3)

# --- YAML ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key, and reads `1e-6` as the float that YAML 1.2 says it is."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    first_lines: dict[Hashable, int] = {}
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, Hashable):
            raise ConfigError([f"{_shown(key)}: is the key in line {line}, and keys are words; put it into quotes"])
        if key in first_lines:
            raise ConfigError([f"{key}: given twice, in lines {first_lines[key]} and {line}; remove one of them"])
        first_lines[key] = line
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open() as file:
            text = file.read(_LONGEST_FILE + 1)
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}; give the path of a YAML file, see configs/"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8 text; give the path of a YAML file, see configs/"]) from error
    if len(text) > _LONGEST_FILE:
        limit = _LONGEST_FILE // 2**20
        raise ConfigError([f"{path}: is longer than {limit} MiB; give the path of a YAML file, see configs/"])
    try:
        raw = _parse(text)
    except _NotYaml as error:
        raise ConfigError([f"{path}: is not valid YAML ({error}); correct it there"]) from error
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from error
    if not isinstance(raw, dict):
        raise ConfigError([f"{path}: holds no settings; it must be a mapping of sections, see configs/"])
    return raw


class _NotYaml(Exception):
    """The message is one line."""


def _parse(text: str) -> Any:
    """Raises _NotYaml, and ConfigError for a repeated key."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise _NotYaml("it is nested too deeply") from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that Python does not have is a ValueError
        raise _NotYaml(_one_line(error)) from error


def _not_settings(value: Any, path: str, depth: int, count: Iterator[int]) -> Iterator[str]:
    """What YAML can say and settings cannot be: words with characters that no path and no UTF-8 text has, numbers
    that no tensor has, keys that are no words, and more than anyone would write.

    count: of the values seen. Raises ConfigError at too many of them.
    """
    if next(count) >= _MOST_VALUES:  # aliases of aliases multiply them
        raise ConfigError([f"{path}: holds more than {_MOST_VALUES} values; a configuration has a few hundred"])
    if isinstance(value, str) and not _is_text(value):
        yield f"{path}: {_shown(value)} holds a character that files and terminals do not take; remove it"
    elif isinstance(value, int) and abs(value) >= 2**63:
        yield f"{path}: {_shown(value)} does not fit into 64 bits; correct the value"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path}: must be a finite number, got {value!r}; correct the value"
    elif isinstance(value, dict | list) and depth > _DEEPEST:
        yield f"{path}: is nested more than {_DEEPEST} deep; correct the value"
    elif isinstance(value, dict):
        for key, child in value.items():
            if isinstance(key, str) and _is_text(key):
                yield from _not_settings(child, f"{path}.{key}".lstrip("."), depth + 1, count)
            else:
                yield f"{path or _shown(key)}: has the key {_shown(key)}, and keys are words; put it into quotes"
    elif isinstance(value, list):
        for child in value:
            yield from _not_settings(child, path, depth + 1, count)


def _is_text(word: str) -> bool:
    return "\0" not in word and not any("\ud800" <= c <= "\udfff" for c in word)


def _shown(value: Any) -> str:
    """A value in a message: its start, where it is long."""
    return _SHORT.repr(value)


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError([f"{override}: is not an override; write key=value, for example training.steps=10"])
    try:
        parsed = _parse(value)
    except _NotYaml as error:
        raise ConfigError([f"{key}: the value {_shown(value)} is not valid YAML ({error}); quote it"]) from error
    *parents, last = key.split(".")
    section = raw
    for depth, parent in enumerate(parents):
        # An empty section (`tracking:`) is null in YAML.
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            at = ".".join(parents[: depth + 1])
            raise ConfigError([f"{key}: {at} is the value {_shown(section)}, not a section; correct the key"])
    section[last] = parsed


# --- Problems -----------------------------------------------------------------------------------------------------


def _problem(details: ErrorDetails, schema: type[Section]) -> str:
    """One line for one pydantic error."""
    keys, section = _resolve(details["loc"], schema)
    path = ".".join(keys)
    given, context, kind = details["input"], details.get("ctx", {}), details["type"]
    if kind == "extra_forbidden":
        return f"{path}: unknown key; {_nearest_key(keys[-1], section, schema)}"
    if kind == "missing":
        description = section.model_fields[keys[-1]].description if section else None
        return f"{path}: is required; set it" + (f" ({_decapitalised(description)})" if description else "")
    if kind == "union_tag_not_found":
        return f"{path}.type: is required; set it to one of {', '.join(_tags(details['loc'], schema))}"
    if kind == "union_tag_invalid":
        return f"{path}.type: {_shown(context['tag'])} is unknown; choose one of {context['expected_tags']}"
    if kind == "model_type" or kind == "model_attributes_type":
        return f"{path}: {_shown(given)} is not a section; write its settings as indented key: value lines"
    if kind == "string_pattern_mismatch":
        return f"{path}: {_shown(given)} does not match {context['pattern']}; choose another value"
    requirement = re.sub(r"^Input should be", "must be", details["msg"]).removeprefix("Value error, ")
    return f"{path}: {_decapitalised(requirement).rstrip('.')}, got {_shown(given)}; correct the value"


def _decapitalised(text: str) -> str:
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _resolve(location: Sequence[int | str], schema: type[Section]) -> tuple[list[str], type[Section] | None]:
    """The dotted keys of an error's location, and the section that its last key belongs to.

    pydantic puts the tag of a discriminated union into the location; the user never wrote it as a key.
    """
    keys: list[str] = []
    here: Any = schema
    parent: Any = None
    for part in location:
        if isinstance(here, dict):
            here = here[str(part)]
            continue
        keys.append(str(part))
        if isinstance(here, _Named):
            here = here.section
            continue
        parent = here
        here = _child(here, str(part))
    return keys, parent if isinstance(parent, type) and issubclass(parent, Section) else None


@dataclass(frozen=True)
class _Named:
    """Sections of one kind, under names that the user gives."""

    section: type[Section]


def _child(section: Any, key: str) -> Any:
    """What stands at `key`: a section, named sections, the variants of a discriminated union by tag, or None."""
    if not (isinstance(section, type) and issubclass(section, Section)) or key not in section.model_fields:
        return None
    field = section.model_fields[key]
    if field.discriminator:
        return _variants(field)
    if typing.get_origin(field.annotation) is dict:
        of_each = typing.get_args(field.annotation)[1]
        return _Named(of_each) if isinstance(of_each, type) and issubclass(of_each, Section) else None
    for annotation in (field.annotation, *typing.get_args(field.annotation)):  # a section may be optional
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return annotation
    return None


def _variants(field: FieldInfo) -> dict[str, type[Section]]:
    return {
        str(tag): variant
        for variant in typing.get_args(field.annotation)
        for tag in typing.get_args(variant.model_fields[str(field.discriminator)].annotation)
    }


def _tags(location: Sequence[int | str], schema: type[Section]) -> list[str]:
    keys, section = _resolve(location, schema)
    return list(_variants(section.model_fields[keys[-1]])) if section else []


def _nearest_key(key: str, section: type[Section] | None, schema: type[Section]) -> str:
    valid = list(section.model_fields) if section else []
    hints = []
    nearest = difflib.get_close_matches(key, valid, n=1)
    if nearest:
        hints.append(f"did you mean {nearest[0]!r}?")
    elsewhere = list(dict.fromkeys(f.path for f in field_help(schema) if f.path.rsplit(".", 1)[-1] == key))
    if elsewhere:
        hints.append(f"{key!r} is a setting at {' and '.join(elsewhere)}")
    return "; ".join(hints) if hints else f"valid keys here: {', '.join(valid)}"


# --- Reference ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FieldHelp:
    """One setting. `variant` is the `type` that a setting of a discriminated union belongs to."""

    path: str
    type: str
    default: str
    description: str
    variant: str | None = None

    @property
    def key(self) -> str:
        return f"{self.path} ({self.variant})" if self.variant else self.path


def field_help(schema: type[Section] = RunConfig) -> list[FieldHelp]:
    """Every setting, in the order of the schema."""
    return list(_walk(schema, "", None))


def setting_reference(schema: type[Section] = RunConfig) -> str:
    """Every setting with its type, default and meaning, as a Markdown table."""
    rows = [(f"`{h.key}`", f"`{h.type}`", h.default, h.description) for h in field_help(schema)]
    cells = [tuple(" ".join(cell.split()).replace("|", "\\|") for cell in row) for row in rows]
    header = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join(header + [f"| {' | '.join(row)} |" for row in cells])


def _walk(section: type[Section], prefix: str, variant: str | None) -> Iterator[FieldHelp]:
    for key, field in section.model_fields.items():
        path = f"{prefix}{key}"
        child = _child(section, key)
        if isinstance(child, dict):
            for model in dict.fromkeys(child.values()):
                tags = " | ".join(tag for tag, m in child.items() if m is model)
                yield from _walk(model, f"{path}.", tags)
        elif isinstance(child, _Named):
            yield FieldHelp(path, "mapping", _default(field), field.description or "", variant)
            yield from _walk(child.section, f"{path}.NAME.", variant)
        elif child is not None:
            yield from _walk(child, f"{path}.", variant)
        else:
            yield FieldHelp(path, _type_name(field.annotation), _default(field), field.description or "", variant)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True) if field.default is PydanticUndefined else field.default
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(_type_name(a) for a in arguments)
    if annotation is type(None):
        return "null"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping"
    if origin in (list, tuple):
        return f"{'list' if origin is list else 'tuple'} of {', '.join(_type_name(a) for a in arguments)}"
    return str({"str": "string", "Path": "path"}.get(annotation.__name__, annotation.__name__))

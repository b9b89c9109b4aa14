"""Rows of a data source, before any tokenizer: files are validated whole, generated rows one by one. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from drpo_megatron.config.functions import import_function
from drpo_megatron.config.schema import FileData, FunctionData, ReasoningGymData
from drpo_megatron.data import layouts
from drpo_megatron.data.errors import DataError
from drpo_megatron.data.gym import make_dataset

__all__ = ["DataError", "Message", "Row", "Rows", "open_rows"]

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
MAX_REPORTED = 10


@dataclass(frozen=True)
class Row:
    """One problem. id: unique in its source, stable between runs. where: for messages, `file:line` or `task[index]`."""

    id: str
    where: str
    prompt: str | list[Message]
    answer: str | None
    metadata: dict[str, Any] = field(default_factory=dict)


class Rows(Protocol):
    """A sequence of rows. `stored`: all of them exist and are valid; else each is made and checked when asked for."""

    stored: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


def open_rows(source: ReasoningGymData | FileData | FunctionData) -> Rows:
    """Open a data source. Every row of a file, and the first row of a generated source, is validated here.

    Raises DataError with the file and line of each malformed row (the first ten) and the reason.
    """
    if isinstance(source, FileData):
        return StoredRows(_read_file(source))
    rows = _gym_rows(source) if isinstance(source, ReasoningGymData) else _function_rows(source)
    _ = rows[0]
    return rows


class StoredRows:
    stored = True

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


class GeneratedRows:
    stored = False

    def __init__(self, size: int, make: Callable[[int], Row]) -> None:
        self._size, self._make = size, make

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Row:
        return self._make(index)


# --- Generated sources ----------------------------------------------------------------------------------------------


def _gym_rows(source: ReasoningGymData) -> GeneratedRows:
    dataset = make_dataset(source)

    def make(index: int) -> Row:
        entry = dataset[index]
        where = f"{source.task}[{index}]"
        # The entry itself travels to the verifier: some scorers compare tuples, which JSON would turn into lists.
        return _row(
            where, where, {"prompt": entry["question"], "answer": entry["answer"], "metadata": {"entry": entry}}
        )

    return GeneratedRows(source.size, make)


def _function_rows(source: FunctionData) -> GeneratedRows:
    try:
        function = import_function(source.function)
    except ValueError as error:
        raise DataError(str(error)) from error

    def make(index: int) -> Row:
        where = f"{source.function}[{index}]"
        try:
            made = function(index, source.seed)
        except Exception as error:  # whatever a user's function raises becomes part of the message
            raise DataError(f"{where}: raised {type(error).__name__}: {error}") from error
        if not isinstance(made, dict) or not {"prompt"} <= made.keys() <= {"prompt", "answer", "metadata"}:
            raise DataError(
                f"{where}: returned {made!r}; return a dict with 'prompt' and, if needed, 'answer', 'metadata'"
            )
        return _row(f"{source.function}[{source.seed}:{index}]", where, made)

    return GeneratedRows(source.size, make)


def _row(row_id: str, where: str, made: dict[str, Any]) -> Row:
    """Raises DataError, naming `where`, for a prompt, answer or metadata of the wrong kind."""
    prompt, answer, metadata = made["prompt"], made.get("answer"), made.get("metadata") or {}
    for problem in _prompt_problems(prompt):
        raise DataError(f"{where}: {problem}")
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int | float)):
        raise DataError(f"{where}: the answer must be a string or a number, not {_kind(answer)}")
    if not isinstance(metadata, dict):
        raise DataError(f"{where}: the metadata must be a mapping, not {_kind(metadata)}")
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        # Rollouts are dumped as JSON with their metadata.
        raise DataError(f"{where}: the metadata cannot be written as JSON ({error})") from error
    return Row(row_id, where, prompt, None if answer is None else str(answer), metadata)


def _prompt_problems(prompt: object) -> Iterator[str]:
    if isinstance(prompt, str):
        if not prompt.strip():
            yield "the prompt is empty"
    elif not isinstance(prompt, list):
        yield f"the prompt must be a string or a list of chat messages, not {_kind(prompt)}"
    elif not prompt:
        yield "the prompt is an empty list of chat messages"
    else:
        for number, message in enumerate(prompt, start=1):
            if not isinstance(message, dict):
                yield f"chat message {number} must be a mapping with role and content, not {_kind(message)}"
            elif message.get("role") not in ROLES:
                yield f"chat message {number} has the role {message.get('role')!r}, which is none of {', '.join(ROLES)}"
            elif not isinstance(message.get("content"), str):
                yield f"chat message {number} must have a string as content, not {_kind(message.get('content'))}"
            elif number == len(prompt) and message["role"] == "assistant":
                yield "the last chat message is the assistant's; the policy needs one to answer"


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


# --- Files ------------------------------------------------------------------------------------------------------------


def _read_file(source: FileData) -> list[Row]:
    path = Path(source.path)
    if not path.is_file():
        raise DataError(f"{path}: does not exist; correct data.source.path")
    rows: list[Row] = []
    problems: list[str] = []
    layout: str | None = None if source.layout == "auto" else source.layout
    for number, raw in (_jsonl if source.type == "jsonl" else _parquet)(path):
        where = f"{path}:{number}"
        if layout is None and isinstance(raw, dict):
            layout = _detected_layout(source, where, raw)
        try:
            if isinstance(raw, DataError):
                raise raw
            rows.append(_file_row(source, layout or "keys", f"{path.name}:{number}", where, raw))
        except DataError as error:
            problems.append(str(error))
    if problems:
        more = f"\n... and {len(problems) - MAX_REPORTED} more rows" if len(problems) > MAX_REPORTED else ""
        raise DataError("\n".join(problems[:MAX_REPORTED]) + more)
    if not rows:
        raise DataError(f"{path}: has no rows; give a file with at least one prompt")
    return rows


def _detected_layout(source: FileData, where: str, raw: dict[str, Any]) -> str:
    """The one layout that the first row fits. Raises DataError when it is not one."""
    found = layouts.detect(raw)
    with contextlib.suppress(DataError):
        _lookup(raw, source.prompt_key, where)
        if source.answer_key is None or _lookup(raw, source.answer_key, where) is not None:
            found.append("keys")
    if len(found) == 1:
        return found[0]
    columns = ", ".join(map(str, raw)) or "none"
    fits = f"fit the layouts {' and '.join(found)}" if found else "fit no layout"
    choices = "one of them" if found else f"one of {', '.join(layouts.LAYOUTS)}, or prompt_key and answer_key"
    raise DataError(f"{where}: the columns ({columns}) {fits}; set the source's layout to {choices}")


def _file_row(source: FileData, layout: str, row_id: str, where: str, raw: object) -> Row:
    if not isinstance(raw, dict):
        wanted = f"the key {source.prompt_key!r}" if layout == "keys" else f"the columns of the layout {layout}"
        raise DataError(f"{where}: must be an object with {wanted}, not {_kind(raw)}")
    if layout != "keys":
        try:
            return _row(row_id, where, layouts.read_row(layout, raw))
        except layouts.LayoutError as error:
            raise DataError(f"{where}: {error}") from error
    made: dict[str, Any] = {"prompt": _lookup(raw, source.prompt_key, where)}
    if source.answer_key is not None:
        made["answer"] = _lookup(raw, source.answer_key, where)
        if made["answer"] is None:
            raise DataError(
                f"{where}: {source.answer_key!r} is null; give an answer, or set data.source.answer_key=null"
            )
    made["metadata"] = {k: v for k, v in raw.items() if k not in (source.prompt_key, source.answer_key)}
    return _row(row_id, where, made)


def _lookup(raw: dict[str, Any], key: str, where: str) -> Any:
    """`raw[key]`; where there is no such key, a dotted one goes into nested mappings (`reward_model.ground_truth`)."""
    if key in raw:
        return raw[key]
    here: Any = raw
    for part in key.split("."):
        if not isinstance(here, dict) or part not in here:
            raise DataError(f"{where}: has no key {key!r}; its keys are {', '.join(map(str, raw)) or 'none'}")
        here = here[part]
    return here


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, json.loads(line)
            except UnicodeDecodeError as error:
                yield number, DataError(f"{path}:{number}: is not UTF-8 ({error})")
            except json.JSONDecodeError as error:
                reason = "is empty" if not line.strip() else f"is not valid JSON ({error.msg}, column {error.colno})"
                yield number, DataError(f"{path}:{number}: {reason}")


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for raw in batch.to_pylist():
                number += 1
                yield number, raw
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a readable parquet file ({error}); write it again") from error

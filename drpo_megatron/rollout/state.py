"""What can be seen of a rollout server from outside, for the report on a run that stands still."""

from __future__ import annotations

from pathlib import Path

from drpo_megatron.platform.process import processes
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerError

_ANSWER_S = 2.0
_LOG_LINES = 8
_LOG_BYTES = 8192
_STATES = {
    "R": "running",
    "S": "waiting",
    "D": "in the kernel, cannot be interrupted",
    "T": "stopped by a signal (SIGSTOP)",
    "t": "stopped by a debugger",
    "Z": "ended (zombie)",
    "X": "ended",
}


def server_state(name: str, url: str, pid: int | None, log_path: Path | None, api_key: str | None = None) -> list[str]:
    """Lines about one server: whether it answers, its weight version, its processes, the end of its log.

    `pid` is the server's process and its group's id, None when it is not started; `log_path` is None for a server that
    was started elsewhere. Takes little more than 2 s at worst.
    """
    if log_path is None:
        return [f"{name} at {url}, started elsewhere: {_answer(url, api_key)}"]
    members = [] if pid is None else [p for p in processes() if p.group == pid]
    lines = [f"{name} at {url}: {_answer(url, api_key)}"]
    lines += [f"  process {p.pid} ({p.name}): {_STATES.get(p.state, p.state)}" for p in members]
    if not members:
        lines.append("  no process of it exists")
    return [*lines, f"  end of {log_path}:", *(f"    {line}" for line in _tail(log_path))]


def _answer(url: str, api_key: str | None) -> str:
    try:
        info = ServerAdmin(url, api_key).model_info(timeout_s=_ANSWER_S)
    except ServerError as error:
        return str(error)
    return f"/model_info answers, weight version {info.get('weight_version')}"


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - _LOG_BYTES))
            return log.read(_LOG_BYTES).decode(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError as error:
        return [f"cannot be read: {error}"]

"""The subcommands of `drpo`, one module each, named as they are.

A module has `HELP` (one sentence), `EXAMPLES` (command lines, parsed by a test), `add_arguments(parser)` and
`run(parsed)`, which returns an exit code and may raise ConfigError. The command line imports all of them: what takes
long to import (torch, pandas, plots) is imported in `run`.
"""

from __future__ import annotations

COMMANDS = (
    "train",
    "rollout",
    "evaluate",
    "plot",
    "report",
    "diff",
    "convert",
    "inspect",
    "plan",
    "submit",
    "status",
    "logs",
    "cancel",
    "settings",
    "bench",
    "doctor",
    "top",
)
"""In the order of `drpo --help`."""

EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 75, 130
"""The run failed; refused before anything was started; start it again (it was told to stop and saved a checkpoint, or
it stood still and the watchdog ended it); interrupted."""

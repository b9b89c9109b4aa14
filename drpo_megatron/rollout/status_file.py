"""How the servers are, in a file of the run for those who look from outside (`drpo top`)."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from drpo_megatron.rollout.member import Member

log = logging.getLogger(__name__)

NAME = "servers.json"
EVERY_S = 5.0


class StatusFile:
    """`servers.json`: `time` (Unix, of the look) and `servers`, a row each. Readers always find a whole file.

    Written when a row changes, and at least every five seconds. A disk that refuses it does not end the run.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, object]] = []
        self._due = 0.0
        self._refused = False

    def write(self, members: Sequence[Member]) -> None:
        rows = [member.status() for member in members]
        if rows == self._rows and time.monotonic() < self._due:
            return
        self._rows, self._due = rows, time.monotonic() + EVERY_S
        beside = self._path.with_suffix(".tmp")
        try:
            beside.write_text(json.dumps({"time": time.time(), "servers": rows}))
            os.replace(beside, self._path)
        except OSError as error:
            if not self._refused:
                log.warning("%s cannot be written (%s): drpo top will show old servers", self._path, error)
            self._refused = True

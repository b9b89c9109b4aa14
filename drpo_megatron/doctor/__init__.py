"""Is this machine well enough to train on? Every finding says what is so, or what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from drpo_megatron.config.schema import RunConfig

OK: Final = "OK"
SKIPPED: Final = "--"
FAIL: Final = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's. `says`: what was found; of `--` why it does not apply here, of FAIL what to do."""

    name: str
    state: Literal["OK", "--", "FAIL"]
    says: str

    def line(self) -> str:
        return f"{self.state:<4} {self.name:<19} {self.says}"


def examine(config: RunConfig | None) -> Iterator[Finding]:
    """Look at everything, the quick things first. config: what a run of it needs; None: what any run needs."""
    from drpo_megatron.doctor import host, libraries

    yield from host.examine(config)
    yield from libraries.examine(config)

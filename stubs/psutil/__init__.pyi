from typing import NamedTuple, type_check_only

@type_check_only
class _CpuTimes(NamedTuple):
    user: float
    system: float

class Process:
    def __init__(self, pid: int | None = None) -> None: ...
    def children(self, recursive: bool = False) -> list[Process]: ...
    def cpu_times(self) -> _CpuTimes: ...

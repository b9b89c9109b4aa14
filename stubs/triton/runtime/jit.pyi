from collections.abc import Callable
from typing import Any

class JITFunction:
    # The grid, or what makes it of the chosen configuration.
    def __getitem__(
        self, grid: tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]
    ) -> Callable[..., None]: ...

def jit(fn: Callable[..., Any]) -> JITFunction: ...

from collections.abc import Callable
from typing import Any

from triton.runtime.jit import JITFunction

class Config:
    def __init__(self, kwargs: dict[str, Any], num_warps: int = 4) -> None: ...

def autotune(
    configs: list[Config], key: list[str], *, restore_value: list[str] | None = None
) -> Callable[[JITFunction], JITFunction]: ...

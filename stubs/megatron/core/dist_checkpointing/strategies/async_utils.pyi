from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

class AsyncRequest(NamedTuple):
    async_fn: Callable[..., None] | None
    async_fn_args: tuple[Any, ...]
    finalize_fns: list[Callable[[], None]]

    def add_finalize_fn(self, fn: Callable[[], None]) -> None: ...
    def execute_sync(self) -> None: ...

class AsyncCaller:
    def close(self, abort: bool = False) -> None: ...

class TemporalAsyncCaller(AsyncCaller):
    process: BaseProcess | None

class _ActiveAsyncRequest(NamedTuple):
    idx: int
    # That of a queue which is not persistent.
    async_caller: TemporalAsyncCaller
    async_request: AsyncRequest

class AsyncCallsQueue:
    async_calls: list[_ActiveAsyncRequest]

    def __init__(self, persistent: bool = False) -> None: ...
    def schedule_async_request(self, async_request: AsyncRequest) -> int: ...
    def maybe_finalize_async_calls(self, blocking: bool = False) -> list[int]: ...

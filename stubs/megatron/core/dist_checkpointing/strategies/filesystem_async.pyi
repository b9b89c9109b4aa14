import logging
from typing import Protocol, type_check_only

@type_check_only
class _Queue(Protocol):
    """What the writers of a save ask of the queue that a save of Megatron-Core leaves in this module."""

    def put(self, results: object, /) -> None: ...
    def get_nowait(self) -> object: ...

logger: logging.Logger
_results_queue: _Queue | None

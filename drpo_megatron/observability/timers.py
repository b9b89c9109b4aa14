"""Wall-clock seconds of the main loop's verbs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class VerbTimer:
    """`with timer("train"): ...` adds to that verb's seconds; a verb may be timed several times in a step.

    On a GPU it measures what the host waits for: a verb that only enqueues kernels is charged to the verb that waits.
    `watch` hears when a verb begins, by its name, and when what follows it begins. `around` is entered with each verb;
    what it takes to enter and leave is not counted.
    """

    def __init__(
        self,
        watch: Callable[[str], None] | None = None,
        around: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._watch = watch or (lambda _: None)
        self._around = around or (lambda _: nullcontext())
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, verb: str) -> Iterator[None]:
        self._watch(verb)
        try:
            with self._around(verb):
                start = time.perf_counter()
                try:
                    yield
                finally:
                    self._seconds[verb] = self._seconds.get(verb, 0.0) + time.perf_counter() - start
        finally:
            self._watch(f"what follows {verb}")

    def reset(self) -> None:
        """Begin a new step."""
        self._seconds = {}

    def seconds(self) -> dict[str, float]:
        """Verb → seconds since the last `reset`, in the order in which the verbs first ran."""
        return dict(self._seconds)

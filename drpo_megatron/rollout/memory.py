"""What one server holds on its devices, and in which order it gives it back and takes it again."""

from __future__ import annotations

from drpo_megatron.rollout.admin import MemoryTag, ServerAdmin


class ServerMemory:
    """Keeps the server paused while it lacks memory, so that a request that comes then waits and is not computed.

    SGLang ends when it is asked for what it does not have, in both directions, so each method asks only for what is
    still to do. Methods are bounded by `timeout_s` and raise ServerDied or ServerRequestError.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._released: set[MemoryTag] = set()

    @property
    def released(self) -> frozenset[MemoryTag]:
        """What the server lacks; it is paused while this is not empty."""
        return frozenset(self._released)

    def release(self, url: str, *tags: MemoryTag) -> None:
        """Retract running requests, which then wait, and give back the device memory of `tags`."""
        wanted = [tag for tag in tags if tag not in self._released]
        if wanted:
            admin = ServerAdmin(url)
            admin.pause_generation("retract", self._timeout_s)
            admin.release_memory(wanted, self._timeout_s)
            self._released.update(wanted)

    def resume(self, url: str, *tags: MemoryTag) -> None:
        """Take back the memory of `tags`; with all of it back, go on generating. Weights that come back are undefined:
        push them before the KV cache comes back.
        """
        wanted = [tag for tag in tags if tag in self._released]
        if wanted:
            admin = ServerAdmin(url)
            admin.resume_memory(wanted, self._timeout_s)
            self._released.difference_update(wanted)
            if not self._released:
                admin.continue_generation(self._timeout_s)

    def restarted(self) -> None:
        """A new server holds everything."""
        self._released.clear()

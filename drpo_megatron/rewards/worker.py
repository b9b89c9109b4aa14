"""One verifier process: `python -m drpo_megatron.rewards.worker FD`, FD being its end of a socket pair.

Protocol (pickled): it gets (RewardConfig, DataConfig), answers None when ready or the reason why it cannot be; then for
each (text, answer, metadata) it answers (reward, error). It ends when the other side is closed, and with
`OUT_OF_MEMORY` when a verifier ran out of memory, also at its start: what is still held may leave none for an answer.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

from drpo_megatron.platform.process import die_with_parent
from drpo_megatron.rewards.verifiers import checked_reward, make_verifier

OUT_OF_MEMORY = 86
"""Exit code."""


def limit_memory(memory_mb: int | None) -> None:
    """Bound this process's address space; an allocation behind it fails. A lower limit that is in force stays."""
    if memory_mb is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = memory_mb * 2**20 if hard == resource.RLIM_INFINITY else min(memory_mb * 2**20, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether a failed allocation is behind `error`: an import hides it behind errors of its own."""
    while error is not None:
        # The dynamic loader's words for a library that does not fit into the address space, and the interpreter's where
        # there was no memory for the exception either.
        words = ("failed to map segment", "error return without exception set")
        if isinstance(error, MemoryError) or any(said in str(error) for said in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def main(fd: int) -> None:
    die_with_parent()
    # Ctrl-C goes to the whole terminal, a scheduler's warning to the whole job; the trainer decides when its verifiers
    # end.
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    connection = Connection(fd)
    try:
        reward, data = connection.recv()
        limit_memory(reward.memory_mb)
        try:
            verifier = make_verifier(reward, data)
        except Exception as error:
            if ran_out_of_memory(error):
                raise MemoryError from error
            connection.send(f"{type(error).__name__}: {error}")
            return
        connection.send(None)
        while True:
            connection.send(checked_reward(verifier, *connection.recv()))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # without what an orderly end would allocate
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the trainer closed its end, or is gone


if __name__ == "__main__":
    main(int(sys.argv[1]))

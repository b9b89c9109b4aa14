"""One verifier process: `python -m drpo_megatron.rewards.worker FD`, FD being its end of a socket pair.

Protocol (pickled): it gets (RewardConfig, DataConfig), answers None when ready or the reason why it cannot be; then for
each (text, answer, metadata) it answers (reward, error). It ends when the other side is closed.
"""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

from drpo_megatron.platform.process import die_with_parent
from drpo_megatron.rewards.verifiers import checked_reward, make_verifier


def main(fd: int) -> None:
    die_with_parent()
    # Ctrl-C goes to the whole terminal; the trainer decides when its verifiers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(fd)
    try:
        reward, data = connection.recv()
        try:
            verifier = make_verifier(reward, data)
        except Exception as error:  # noqa: BLE001 - sent to the pool, which raises it
            connection.send(f"{type(error).__name__}: {error}")
            return
        connection.send(None)
        while True:
            connection.send(checked_reward(verifier, *connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the trainer closed its end, or is gone


if __name__ == "__main__":
    main(int(sys.argv[1]))

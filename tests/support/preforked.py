"""SGLang servers in two seconds instead of ten: forks of one process that has imported what a server imports.

Most of a server's start is imports, and they are the same for all. `ServerForks.launch` takes the place of
`subprocess.Popen` in `SGLangServer`: the fork gets the command line, the environment and the log of the server, a
session of its own, and the bond that kills it with its parent; what it runs is `platform.sglang_cpu.main`. What is
returned behaves as a `Popen` does: the process of this module waits for its forks and passes on how they end.

With CUDA nothing can be forked, and servers are started by their command line.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo_megatron.platform.process import killed_with_parent

_ROOT = Path(__file__).parents[2]
_MODULE = "drpo_megatron.platform.sglang_cpu"


class ForkedServer:
    """The part of `subprocess.Popen` that a server's owner uses. Safe to use from several threads."""

    def __init__(self, command: Sequence[str], connection: socket.socket) -> None:
        self.args = list(command)
        self.returncode: int | None = None
        self._connection = connection
        self._said = b""
        self._lock = threading.Lock()
        line = self._line(None)
        assert line, "the process that forks servers has ended"
        self.pid = int(line)

    def poll(self) -> int | None:
        return self._wait(0.0)

    def wait(self, timeout: float | None = None) -> int:
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, timeout: float | None) -> int | None:
        with self._lock:
            if self.returncode is None:
                line = self._line(timeout)
                if line is not None:
                    # Nothing at all: the parent has ended, and the fork was killed with it.
                    self.returncode = int(line) if line else -signal.SIGKILL
                    self._connection.close()
        return self.returncode

    def _line(self, timeout: float | None) -> bytes | None:
        """The next line; None when there is none in time, empty at the end."""
        while b"\n" not in self._said:
            if not select.select([self._connection], [], [], timeout)[0]:
                return None
            more = self._connection.recv(4096)
            if not more:
                return b""
            self._said += more
        line, self._said = self._said.split(b"\n", 1)
        return line


@dataclass(frozen=True)
class Forking:
    """Where the process that forks can be asked. It pickles, and with it its `launch`: a run in another process may
    start its servers so. They end with the process that forks.
    """

    address: str

    def launch(
        self,
        command: Sequence[str],
        *,
        env: dict[str, str],
        stdin: int,
        stdout: Any,
        stderr: int,
        start_new_session: bool,
        preexec_fn: Callable[[], None],
    ) -> Any:
        """As `subprocess.Popen`, with exactly what `SGLangServer` asks of it."""
        asked = (list(command[:3]), stdin, stderr, start_new_session, preexec_fn)
        known = ([sys.executable, "-m", _MODULE], subprocess.DEVNULL, subprocess.STDOUT, True, killed_with_parent)
        assert asked == known, f"forks are not started so: {asked}"
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        request = json.dumps({"arguments": list(command[3:]), "environment": env}).encode()
        sent = socket.send_fds(connection, [request], [stdout.fileno()])
        connection.sendall(request[sent:])
        connection.shutdown(socket.SHUT_WR)
        return ForkedServer(command, connection)


class ServerForks:
    """The process that forks. It begins to import at once, and is killed with the thread that makes this object."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="servers-")
        self._forking = Forking(str(Path(self._directory.name) / "socket"))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._forking.address)
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.preforked", str(listener.fileno())],
                cwd=_ROOT,
                # What is read once, at an import.
                env=os.environ | {"OMP_NUM_THREADS": "1", "SGLANG_USE_CPU_ENGINE": "1"},
                pass_fds=[listener.fileno()],
                preexec_fn=killed_with_parent,
            )

    @property
    def launch(self) -> Callable[..., Any]:
        return self._forking.launch

    def close(self) -> None:
        """Ends what is left of the forks, too."""
        self._process.kill()
        self._process.wait()
        self._directory.cleanup()


_MODULES = (
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.server_args",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.scheduler",
    "sglang.srt.model_executor.model_runner",
    "sglang.srt.models.qwen3",
    "drpo_megatron.platform.sglang_cpu_attention",
)


def preload() -> None:
    """Import what `sglang_cpu.prepare` imports for any command line, and the model of most tests."""
    from drpo_megatron.platform import sglang_cpu

    gc.disable()  # imports make nothing that it could collect
    sglang_cpu.cut_imports([])
    sglang_cpu.install_stand_ins()
    for module in _MODULES:
        importlib.import_module(module)
    gc.freeze()  # the forks share these objects


def _serve(listener: socket.socket) -> None:
    """Fork for every connection; say the fork's id, and how it ended."""
    import setproctitle

    setproctitle.getproctitle()  # finds the place of titles, which cannot be found once the environment has changed
    preload()
    with selectors.DefaultSelector() as events:
        events.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    pid = _fork(connection, events)
                    connection.sendall(b"%d\n" % pid)
                    events.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
                else:
                    pid, connection = key.data
                    events.unregister(key.fileobj)
                    os.close(key.fd)
                    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with connection, contextlib.suppress(BrokenPipeError):  # nobody wants to know it any more
                        connection.sendall(b"%d\n" % status)


def _fork(connection: socket.socket, events: selectors.BaseSelector) -> int:
    request, (log, *_), _, _ = socket.recv_fds(connection, 65536, 1)
    while more := connection.recv(65536):
        request += more
    asked = json.loads(request)
    pid = os.fork()
    if pid:
        os.close(log)
        return pid
    status = 1
    try:
        killed_with_parent()
        os.setsid()
        connection.close()
        for key in list(events.get_map().values()):
            if key.data:
                key.data[1].close()
            os.close(key.fd)
        events.close()
        _become(asked["arguments"], asked["environment"], log)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - in the log, where the interpreter would say it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _become(arguments: list[str], environment: dict[str, str], log: int) -> None:
    """The server."""
    import numpy as np
    import setproctitle
    import torch

    from drpo_megatron.platform import sglang_cpu

    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    random.seed()  # SGLang takes ports by chance
    np.random.seed()
    sys.argv = [sglang_cpu.__file__, *arguments]
    setproctitle.setproctitle(" ".join([sys.executable, "-m", _MODULE, *arguments]))
    sglang_cpu.main()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))

"""One SGLang server process: start it, wait for it, restart it a bounded number of times, leave nothing behind."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import requests

from drpo_megatron.config.schema import RunConfig, ServerConfig
from drpo_megatron.platform.process import killed_with_parent, stop_group
from drpo_megatron.platform.sglang import sglang_default_args, sglang_launch_command
from drpo_megatron.rollout.errors import ServerGaveUp, ServerStartError
from drpo_megatron.rollout.experts import RoutedExpertsFormat
from drpo_megatron.rollout.server_args import check_arguments, command_line, with_delta_loader

_RESERVED = {
    "model_path": "model.path",
    "dtype": "model.dtype",
    "random_seed": "seed",
    "host": "rollout.server.host",
    "port": "rollout.server.port",
    "tp_size": "rollout.server.tensor_parallel",
    "weight_version": "nothing, the trainer counts the versions",
    "enable_return_routed_experts": "nothing, it is on for a mixture of experts",
}
_LOG_TAIL_LINES = 25
_POLL_S = 0.2
_BACKOFF_S = 1.0  # before the first restart; it doubles with each
_STOP_S = 3.0  # the server holds nothing that has to be saved


class SGLangServer:
    """A server that runs in a process group of its own and is killed when the thread that started it ends.

    Start it from a thread that lives as long as the run, such as the main thread. `model_path` is a Hugging Face
    directory, `dtype` the name of SGLang's dtype, `log_path` collects the output of the server and its restarts.
    `routed_experts`: keep the experts of every token for the answers that ask for them; a mixture of experts only.
    Raises ServerStartError for arguments that the installed SGLang does not have.
    """

    def __init__(
        self,
        config: ServerConfig,
        model_path: Path,
        dtype: str,
        seed: int,
        log_path: Path,
        *,
        routed_experts: bool = False,
    ) -> None:
        check_arguments(config.args, _RESERVED)
        self._config = config
        self._log_path = log_path
        self._arguments: dict[str, Any] = sglang_default_args() | config.args
        self._arguments |= {
            "model_path": str(model_path),
            "dtype": dtype,
            "random_seed": seed,
            "host": config.host,
            "tp_size": config.tensor_parallel,
            "weight_version": "0",
            "enable_return_routed_experts": routed_experts,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None
        self._log_start = 0
        self.restarts = 0

    @property
    def url(self) -> str:
        """Address of the server. A restart with `port: null` changes it."""
        if self._port is None:
            raise RuntimeError("the server has no address before start()")
        return f"http://{self._config.host}:{self._port}"

    @property
    def tensor_parallel(self) -> int:
        return self._config.tensor_parallel

    @property
    def pid(self) -> int | None:
        """Process id of the server, which is also the id of its process group."""
        return self._process.pid if self._process else None

    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of a server that listens on `port`."""
        return sglang_launch_command(
            command_line(self._arguments | {"port": port}),
            tensor_parallel=self._config.tensor_parallel,
            threads=self._config.threads,
            devices=self._config.devices,
        )

    def start(self) -> None:
        """Start the process and return at once. Raises ServerStartError when the configured port is in use."""
        if self._process is not None:
            raise RuntimeError("the server is already started: stop() it first")
        self._port = self._config.port or _free_port(self._config.host)
        if _in_use(self._config.host, self._port):
            raise ServerStartError(
                f"port {self._port} on {self._config.host} is in use: end the process that listens there, or set "
                "rollout.server.port to another port or to null for a free one"
            )
        command, environment = self.command(self._port)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # On SIGTERM SGLang first finishes its requests. Its workers have the same bond with it.
                preexec_fn=killed_with_parent,
            )

    def wait_ready(self) -> str:
        """Wait until the server generates, at most `start_timeout_s`, and return its URL.

        Raises ServerStartError, with the end of the server's log, when it exits before or is not ready in time; the
        server is then stopped.
        """
        if self._process is None:
            raise RuntimeError("start() the server before wait_ready()")
        deadline = time.monotonic() + self._config.start_timeout_s
        while True:
            status = self._process.poll()
            if status is not None:
                self.stop()
                raise ServerStartError(f"SGLang ended with status {status} before it was ready; {self._log_tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise ServerStartError(
                    f"SGLang was not ready after {self._config.start_timeout_s:.0f} s: raise "
                    f"rollout.server.start_timeout_s if its log shows progress; {self._log_tail()}"
                )
            if self.healthy(timeout_s=min(20.0, self._config.start_timeout_s)):
                return self.url
            time.sleep(_POLL_S)

    def alive(self) -> bool:
        """Whether the process runs. A server that hangs is alive and not healthy."""
        return self._process is not None and self._process.poll() is None

    def healthy(self, timeout_s: float = 20.0) -> bool:
        """Whether the server generates a token within `timeout_s`."""
        try:
            return requests.get(f"{self.url}/health_generate", timeout=timeout_s).status_code == 200
        except requests.RequestException:
            return False

    def restart(self) -> str:
        """Stop what is left of the server, start it again and wait until it is ready; return its URL.

        Its weights are then those of `model_path`. Raises ServerGaveUp when `max_restarts` is used up. Each restart
        waits twice as long as the one before, from one second on.
        """
        if self.restarts >= self._config.max_restarts:
            self.stop()
            raise ServerGaveUp(
                f"the server died {self.restarts + 1} times and rollout.server.max_restarts is "
                f"{self._config.max_restarts}: find the cause in {self._log_path}; {self._log_tail()}"
            )
        self.stop()
        time.sleep(_BACKOFF_S * 2**self.restarts)
        self.restarts += 1
        self.start()
        return self.wait_ready()

    def stop(self) -> None:
        """End the server and its workers within a few seconds. Does nothing when it is not running."""
        if self._process is not None:
            stop_group(self._process, timeout_s=_STOP_S)
            self._process = None

    def __enter__(self) -> SGLangServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _log_tail(self) -> str:
        with self._log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return f"end of {self._log_path}:\n" + "\n".join(lines[-_LOG_TAIL_LINES:])


def server_of(config: RunConfig) -> SGLangServer:
    """The server that a run's configuration asks for, not started. The model's directory must exist."""
    log_path = config.run_directory / "log" / "server.log"
    server = config.rollout.server
    return SGLangServer(
        with_delta_loader(server) if config.sync.transport == "delta" else server,
        config.model.path,
        config.model.dtype,
        config.seed,
        log_path,
        routed_experts=RoutedExpertsFormat.load(config.model.path) is not None,
    )


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _in_use(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for a server
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False

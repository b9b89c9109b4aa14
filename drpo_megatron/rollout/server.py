"""One SGLang server: a process that is started here, or an address where one was started elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import requests

from drpo_megatron.config.schema import ServerConfig
from drpo_megatron.platform import has_cuda
from drpo_megatron.platform.ports import free_port, in_use
from drpo_megatron.platform.process import killed_with_parent, stop_group
from drpo_megatron.platform.sglang import sglang_default_args, sglang_launch_command
from drpo_megatron.rollout.admin import authorization
from drpo_megatron.rollout.errors import ServerStartError
from drpo_megatron.rollout.server_args import check_arguments, command_line

_RESERVED = {
    "model_path": "model.path",
    "dtype": "model.dtype",
    "random_seed": "seed",
    "host": "rollout.server.host",
    "port": "rollout.server.port",
    "tp_size": "rollout.server.tensor_parallel",
    "weight_version": "nothing, the trainer counts the versions",
    "enable_return_routed_experts": "nothing, it is on for a mixture of experts",
    "enable_deterministic_inference": "training.deterministic",
    "api_key": "rollout.server.api_key_env",
    "enable_memory_saver": "rollout.placement to colocated, which turns it on",
}
_LOG_TAIL_LINES = 60
_POLL_S = 0.2
_STOP_S = 3.0  # the server holds nothing that has to be saved, but devices, which it may free in order


class Server(Protocol):
    """What a fleet needs of a server, wherever it runs."""

    @property
    def url(self) -> str: ...

    @property
    def pid(self) -> int | None:
        """Of a process of this host, which is also the id of its process group."""

    def start(self) -> None:
        """Begin to start it, without waiting. Raises ServerStartError."""

    def ended(self) -> str | None:
        """Why it does not run any more; None while it runs, as far as that can be seen without asking it."""

    def healthy(self, timeout_s: float) -> bool:
        """Whether it generates a token within `timeout_s`."""

    def stop(self) -> None:
        """End it, if it was started here."""


class SGLangServer:
    """A server that runs in a process group of its own and is killed when the thread that started it ends.

    Start it from a thread that lives as long as the run, such as the main thread. `model_path` is a Hugging Face
    directory, `dtype` the name of SGLang's dtype, `log_path` collects the output of the server and its restarts.
    `index`: its place among the servers of this host, which decides its devices and port. `routed_experts`: keep the
    experts of every token for the answers that ask for them; a mixture of experts only. `api_key`: what every request
    must carry. `colocated`: on the trainer's devices, whose memory it can give back. `deterministic`: what it samples
    depends on the request and its seed alone, and not on other requests. `emulate_fp8`: without a GPU, compute a model
    in FP8 by rounding. Raises ServerStartError for arguments that the installed SGLang does not have.
    """

    def __init__(
        self,
        config: ServerConfig,
        model_path: Path,
        dtype: str,
        seed: int,
        log_path: Path,
        *,
        index: int = 0,
        routed_experts: bool = False,
        api_key: str | None = None,
        colocated: bool = False,
        deterministic: bool = False,
        emulate_fp8: bool = False,
    ) -> None:
        check_arguments(config.args, _RESERVED)
        self._config = config
        self.launch: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen
        """What starts the process. Tests fork one that has imported SGLang."""
        self._colocated = colocated
        self._emulate_fp8 = emulate_fp8
        self._index = index
        self.log_path = log_path
        self._api_key = api_key
        self._arguments: dict[str, Any] = sglang_default_args(deterministic) | config.args
        self._arguments |= {
            "model_path": str(model_path),
            "dtype": dtype,
            "random_seed": seed + index,
            "host": config.host,
            "tp_size": config.tensor_parallel,
            "weight_version": "0",
            "enable_return_routed_experts": routed_experts,
            "enable_deterministic_inference": deterministic,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted_port = config.port + index if config.port else None
        self._port: int | None = None
        self._log_start = 0

    @property
    def url(self) -> str:
        """Address of the server. A start with `port: null` changes it."""
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

    def command(self) -> tuple[list[str], dict[str, str]]:
        """Command line and environment, without the API key. A free port is chosen at the start, and 0 before.

        Raises ServerStartError when this host has not the devices.
        """
        try:
            return sglang_launch_command(
                command_line(self._arguments | {"port": self._port or self._wanted_port or 0}),
                tensor_parallel=self._config.tensor_parallel,
                threads=self._config.threads,
                devices=self._config.devices,
                index=self._index,
                colocated=self._colocated,
                emulate_fp8=self._emulate_fp8,
            )
        except ValueError as error:
            raise ServerStartError(str(error)) from error

    def start(self) -> None:
        """Start the process and return at once. Raises ServerStartError when the configured port is in use."""
        if self._process is not None:
            raise RuntimeError("the server is already started: stop() it first")
        self._port = self._wanted_port or free_port(self._config.host)
        if in_use(self._config.host, self._port):
            raise ServerStartError(
                f"port {self._port} on {self._config.host} is in use: end the process that listens there, or set "
                "rollout.server.port to another port or to null for a free one"
            )
        command, environment = self.command()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = self.launch(
                command + self._key_file(),
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
            if ended := self.ended():
                self.stop()
                raise ServerStartError(f"SGLang {ended} before it was ready; {self.log_tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise ServerStartError(
                    f"SGLang was not ready after {self._config.start_timeout_s:.0f} s: raise "
                    f"rollout.server.start_timeout_s if its log shows progress; {self.log_tail()}"
                )
            if self.healthy(timeout_s=min(20.0, self._config.start_timeout_s)):
                return self.url
            time.sleep(_POLL_S)

    def ended(self) -> str | None:
        """None while the process runs. A server that hangs runs and is not healthy."""
        status = self._process.poll() if self._process else None
        if self._process is None:
            return "is not started"
        return None if status is None else f"ended with status {status}"

    def alive(self) -> bool:
        return self.ended() is None

    def healthy(self, timeout_s: float = 20.0) -> bool:
        """Whether the server generates a token within `timeout_s`."""
        return is_healthy(self.url, timeout_s, self._api_key)

    def stop(self) -> None:
        """End the server and its workers within a few seconds. Does nothing when it is not running."""
        if self._process is not None:
            # It looks every five seconds whether it was told to stop.
            stop_group(self._process, timeout_s=_STOP_S if has_cuda() else 0.0)
            self._process = None
            self._key_path.unlink(missing_ok=True)

    def __enter__(self) -> SGLangServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def log_tail(self) -> str:
        """The last lines that the server wrote since its last start."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return f"end of {self.log_path}:\n" + "\n".join(lines[-_LOG_TAIL_LINES:])

    @property
    def _key_path(self) -> Path:
        return self.log_path.with_suffix(".key.yaml")

    def _key_file(self) -> list[str]:
        """The argument that hands over the API key: in a file for this user alone, where a command line is public."""
        if self._api_key is None:
            return []
        self._key_path.unlink(missing_ok=True)
        with os.fdopen(os.open(self._key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            # As a JSON string, or YAML would make a number or a truth value of some keys.
            file.write(f"api-key: {json.dumps(self._api_key)}\n")
        return ["--config", str(self._key_path)]


class ExternalServer:
    """A server that was started elsewhere, at `url`. It is never started or stopped here."""

    pid: int | None = None

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url
        self._api_key = api_key

    def start(self) -> None:
        pass

    def ended(self) -> str | None:
        return None

    def healthy(self, timeout_s: float) -> bool:
        return is_healthy(self.url, timeout_s, self._api_key)

    def stop(self) -> None:
        pass


def is_healthy(url: str, timeout_s: float, api_key: str | None) -> bool:
    try:
        response = requests.get(f"{url}/health_generate", headers=authorization(api_key), timeout=timeout_s)
    except requests.RequestException:
        return False
    return response.status_code == 200

"""sglang-router in front of a fleet: one address for generation, over the servers that hold the current weights.

The fleet decides who is in it. The router's own health checks, retries and circuit breaker are off: they would hide
from the fleet what it must act on, and know nothing of weight versions.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests

from drpo_megatron.config.schema import RouterConfig
from drpo_megatron.platform.ports import free_port
from drpo_megatron.platform.process import killed_with_parent, stop_group
from drpo_megatron.rollout.errors import ServerError, ServerStartError

_HOST = "127.0.0.1"  # rank 0 is its only client
_START_S = 120.0
_REQUEST_S = 30.0
_POLL_S = 0.1
_STOP_S = 3.0


class Router:
    """A process that is killed when the thread that started it ends. Its address stays the same over restarts."""

    def __init__(self, config: RouterConfig, log_path: Path, api_key: str | None) -> None:
        self._config = config
        self._log_path = log_path
        self._api_key = api_key
        self._port = free_port(_HOST)
        self._process: subprocess.Popen[bytes] | None = None
        self.restarts = 0

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self._port}"

    def command(self) -> list[str]:
        options = {
            "host": _HOST,
            "port": self._port,
            "policy": self._config.policy,
            "prometheus-host": _HOST,
            "prometheus-port": free_port(_HOST),
            "health-check-interval-secs": 10**6,
            "request-timeout-secs": 10**6,  # the client has a limit of its own
            "max-payload-size": 2**30,
            "log-level": "warn",
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        flags += ["--disable-retries", "--disable-circuit-breaker"]
        return [sys.executable, "-m", "sglang_router.launch_router", *flags]

    def start(self) -> None:
        """Start it and return at once."""
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=killed_with_parent,
            )

    def wait_ready(self) -> None:
        """Raises ServerStartError when it does not answer, for at most two minutes."""
        deadline = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(requests.RequestException):  # it does not listen yet
                if requests.get(f"{self.url}/liveness", timeout=_REQUEST_S).status_code == 200:
                    return
            if not self.alive() or time.monotonic() > deadline:
                raise ServerStartError(f"sglang-router does not answer; see {self._log_path}")
            time.sleep(_POLL_S)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def route_to(self, urls: set[str]) -> set[str]:
        """Send new requests to exactly these servers; those that run elsewhere go on to their end. Blocks until it is
        so, and returns the servers that the router could not reach. Raises ServerError when it does not answer.
        """
        deadline = time.monotonic() + _REQUEST_S
        asked: set[str] = set()
        while True:
            try:
                now = {worker["url"]: worker["id"] for worker in self._workers()}
                for url in urls - now.keys() - asked:
                    body = {"url": url} | ({"api_key": self._api_key} if self._api_key else {})
                    self._call("POST", "/workers", body)
                for url in now.keys() - urls - asked:
                    self._call("DELETE", f"/workers/{now[url]}", None)
            except requests.RequestException as error:
                raise ServerError(f"sglang-router does not answer: {error}; see {self._log_path}") from error
            if now.keys() == urls or time.monotonic() > deadline:
                return urls - now.keys()
            asked |= urls ^ now.keys()
            time.sleep(_POLL_S)

    def stop(self) -> None:
        if self._process is not None:
            stop_group(self._process, timeout_s=_STOP_S)
            self._process = None

    def _workers(self) -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = self._call("GET", "/workers", None).json()["workers"]
        return answer

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> requests.Response:
        response = requests.request(method, self.url + path, json=body, timeout=_REQUEST_S)
        response.raise_for_status()
        return response

"""A headless Chromium of Debian's packages, driven over loopback by the WebDriver protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from drpo_megatron.platform.ports import free_port
from drpo_megatron.platform.process import killed_with_parent
from tests.support.debian import Unavailable, unpack_packages

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id in W3C WebDriver
_LIBRARIES = (
    "usr/lib/chromium",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/pulseaudio",
    "lib/x86_64-linux-gnu",
)
_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing outside this machine is asked for a page or an update
    "--hide-scrollbars",
)
KEYS = {"Right": "\ue014", "Left": "\ue012", "Home": "\ue011", "End": "\ue010", "Tab": "\ue004", "Enter": "\ue007"}


LIMIT_S = 300.0
# All that must be of one version. A machine that has a Chromium has some of them, and apt would not bring those.
_PACKAGES = ("chromium", "chromium-common", "chromium-driver", "fonts-dejavu-core")
_CHROMIUM, _DRIVER = "usr/lib/chromium/chromium", "usr/bin/chromedriver"


def unpack_chromium(directory: Path) -> Path:
    """Chromium and its driver, of one version, with what they need, below `directory`; those that the machine has are
    not used. Raises Unavailable: the message says what is lacking.
    """
    root = unpack_packages(_PACKAGES, directory)
    chromium, driver = (_version(root, program) for program in (_CHROMIUM, _DRIVER))
    if chromium != driver:
        raise Unavailable(f"Debian's packages are of two versions: chromium {chromium}, chromium-driver {driver}")
    return root


def _version(root: Path, program: str) -> str:
    """What the program says of itself: it finds its libraries."""
    path = root / program
    if not path.exists():
        raise Unavailable(f"{path.name} is not in the packages of this distribution, which lack {program}")
    done = subprocess.run(
        [path, "--version"], env=_environment(root, root), capture_output=True, text=True, timeout=LIMIT_S
    )
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    if done.returncode or found is None:
        raise Unavailable(f"{path.name} of Debian's packages does not run here: {(done.stderr or done.stdout).strip()}")
    return found[0]


def _environment(root: Path, home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HOME": str(home),
        "LD_LIBRARY_PATH": ":".join(f"{root}/{place}" for place in _LIBRARIES),
        "FONTCONFIG_PATH": f"{root}/etc/fonts" if (root / "etc/fonts").exists() else "/etc/fonts",
    }


class Browser:
    """Context manager: one browser window with a fresh profile. Leaving ends the browser and its driver."""

    def __init__(self, root: Path, directory: Path) -> None:
        self._root, self._directory = root.absolute(), directory.absolute()

    def __enter__(self) -> Self:
        root = self._root
        self._directory.mkdir(parents=True)
        port = free_port("127.0.0.1")
        self._url = f"http://127.0.0.1:{port}"
        with contextlib.ExitStack() as started, (self._directory / "driver.log").open("wb") as log:
            self._driver = subprocess.Popen(
                [root / _DRIVER, f"--port={port}"],
                env=_environment(root, self._directory),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=killed_with_parent,
            )
            started.callback(self._end_driver)
            self._wait_for_driver()
            session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": self._capabilities()}})
            self._session = f"/session/{session['sessionId']}"
            started.callback(self._ask, "DELETE", self._session)
            self._stack = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _capabilities(self) -> dict[str, Any]:
        arguments = [*_ARGUMENTS, f"--user-data-dir={self._directory / 'profile'}"]
        return {
            "goog:chromeOptions": {"binary": str(self._root / _CHROMIUM), "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL"},
        }

    def _wait_for_driver(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                self._ask("GET", "/status")
                return
            except urllib.error.URLError:
                log = (self._directory / "driver.log").read_text()
                assert self._driver.poll() is None and time.monotonic() < deadline, f"no driver: {log}"
                time.sleep(0.1)

    def _end_driver(self) -> None:
        self._driver.terminate()
        self._driver.wait(timeout=LIMIT_S)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=LIMIT_S) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode()[:500]}") from error

    def open(self, page: Path, *, dark: bool = False, width: int = 1280, height: int = 900) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._devtools("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", size)
        self._ask("POST", f"{self._session}/url", {"url": page.absolute().as_uri()})

    def _devtools(self, command: str, parameters: dict[str, Any]) -> None:
        self._ask("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a JavaScript function body."""
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def _element(self, css: str) -> str:
        found = self._ask("POST", f"{self._session}/element", {"using": "css selector", "value": css})
        return f"{self._session}/element/{found[_ELEMENT]}"

    def click(self, css: str) -> None:
        self._ask("POST", f"{self._element(css)}/click")

    def type(self, css: str, text: str) -> None:
        """Press the keys of `text` with the focus on the element; `KEYS` has those without a character."""
        self._ask("POST", f"{self._element(css)}/value", {"text": text})

    def text(self, css: str) -> str:
        return str(self._ask("GET", f"{self._element(css)}/text"))

    def console(self) -> list[str]:
        """What the console got since the last call."""
        return [entry["message"] for entry in self._ask("POST", f"{self._session}/se/log", {"type": "browser"})]

    def screenshot(self, out: Path) -> None:
        out.write_bytes(base64.b64decode(self._ask("GET", f"{self._session}/screenshot")))

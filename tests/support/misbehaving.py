"""A verifier for the tests of the reward pool, in a module without torch: the pool's processes import it."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from typing import Any

_KEPT: list[bytearray] = []


def _fill() -> list[object]:
    """All of the memory, to the last small object."""
    blocks: list[object] = []
    for size in (2**20, 2**12, 64):
        try:
            while True:
                blocks.append(bytearray(size))
        except MemoryError:
            pass
    return blocks


def behave(text: str, answer: str | None, metadata: dict[str, Any]) -> Any:
    """Does what the response says."""
    match text:
        case "raise":
            raise RuntimeError("bad sample")
        case "python loop":
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            while True:
                pass
        case "c call":
            libc = ctypes.PyDLL(None)  # PyDLL holds the interpreter lock: no Python code of this process runs meanwhile
            libc.sleep(600)
        case "exit":
            os._exit(7)
        case "segfault":
            ctypes.string_at(0)
        case "nan":
            return float("nan")
        case "none":
            return None
        case "modules":
            return float("torch" in sys.modules)
        case "sigint ignored":
            return signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        case "memory":
            kept = []
            while True:
                kept.append(bytearray(2**20))
        case "small objects":
            numbers: list[object] = []
            while True:
                numbers.append([numbers])
        case "memory in a cycle":
            # What is left of it is no one's, and stays until a collection that may come too late.
            cycle: list[object] = []
            cycle.append((cycle, _fill()))
            raise MemoryError
        case "memory in C":
            import numpy

            return float(numpy.ones((2**17, 2**14)).sum())  # 16 GiB in one allocation
        case "memory kept":
            try:
                while True:
                    _KEPT.append(bytearray(2**20))
            except MemoryError as error:
                raise error
        case "some memory":
            return float(len(bytearray(2**27)))
        case "abort":
            # What C++ does with an allocation that fails and nobody catches.
            libc = ctypes.CDLL(None)
            libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
            while libc.malloc(2**24):
                pass
            libc.abort()
        case "address space":
            return float(resource.getrlimit(resource.RLIMIT_AS)[1])
        case "child":
            subprocess.Popen(["sleep", "600"])
            time.sleep(600)
    return 0.5

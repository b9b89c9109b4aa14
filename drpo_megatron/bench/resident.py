"""Resident memory of this process. Pages that the kernel caches of files are not in it, unless a file is mapped."""

from __future__ import annotations

import ctypes
from pathlib import Path


def reset_peak() -> int:
    """Resident bytes of this process now, from which its peak is counted again (Linux, glibc)."""
    # Memory that was freed and kept by the allocator would be taken without growth.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most resident bytes since `reset_peak`."""
    return _status("VmHWM")


def anonymous() -> int:
    """Resident bytes now that belong to no file: what was allocated and written to."""
    return _status("RssAnon")


def of_files() -> int:
    """Resident bytes now of mapped files, such as libraries."""
    return _status("RssFile") + _status("RssShmem")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024

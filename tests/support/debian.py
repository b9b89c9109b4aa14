"""Debian's packages without installing them: downloaded with apt and unpacked, which needs no root."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


class Unavailable(Exception):
    """The packages cannot be had here. The message is the reason."""


def unpack_packages(names: Sequence[str], directory: Path) -> Path:
    """Download packages with what they need and unpack them below `directory`; returns their root. Raises
    Unavailable.
    """
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise Unavailable(f"{names[0]} cannot be unpacked: {program} is not on this machine")
    root, packages = directory / "root", directory / "packages"
    packages.mkdir(parents=True)
    simulate = ["install", "--simulate", "--no-install-recommends", *names]
    try:
        listed = _apt(simulate, packages)
    except Unavailable:
        _apt(["update", "-qq"], packages)  # a fresh machine has no lists
        listed = _apt(simulate, packages)
    needed = {line.split()[1] for line in listed.splitlines() if line.startswith("Inst ")}
    _apt(["download", "-qq", *sorted(needed | set(names))], packages)
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, root], check=True, timeout=60)
    return root


def _apt(arguments: list[str], directory: Path) -> str:
    try:
        done = subprocess.run(["apt-get", *arguments], cwd=directory, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"apt-get {arguments[0]} did not end in time") from error
    if done.returncode:
        raise Unavailable(f"apt-get {arguments[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout

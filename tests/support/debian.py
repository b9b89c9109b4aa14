"""Debian's packages without installing them: downloaded with apt and unpacked, which needs no root."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

LIMIT_S = 600.0


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
    try:
        _download(names, packages)
    except Unavailable:
        _apt(["update", "-qq"], packages)  # a fresh machine has no lists, and old ones name files that are gone
        _download(names, packages)
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, root], check=True, timeout=LIMIT_S)
    return root


def _download(names: Sequence[str], directory: Path) -> None:
    """The packages, whatever the machine has, and what they need, as far as the machine does not have it."""
    listed = _apt(["install", "--simulate", "--no-install-recommends", *names], directory)
    needed = {line.split()[1] for line in listed.splitlines() if line.startswith("Inst ")}
    _apt(["download", "-qq", *sorted(needed | set(names))], directory)


def _apt(arguments: list[str], directory: Path) -> str:
    try:
        done = subprocess.run(["apt-get", *arguments], cwd=directory, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"apt-get {arguments[0]} did not end in {LIMIT_S:.0f} s") from error
    if done.returncode:
        raise Unavailable(f"apt-get {arguments[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout

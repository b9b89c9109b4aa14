"""Versions of the packages that results depend on."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

VERSIONS_OF = ("drpo-megatron", "torch", "megatron-core", "sglang", "transformers")
WHERE_INSTALLED = ("transformer-engine",)


def versions() -> dict[str, str]:
    """By package; `not installed` for a checkout of ours that is only on the path, or without SGLang."""
    found = {package: _version(package) or "not installed" for package in VERSIONS_OF}
    return found | {package: version for package in WHERE_INSTALLED if (version := _version(package))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_ROOT = Path(__file__).parents[2]
_GIT_S = 10.0


def code_version() -> dict[str, str]:
    """The packages' versions and, where this package is a git checkout, its commit; behind it `+` when files differ."""
    return versions() | ({"commit": commit} if (commit := _commit(_ROOT)) else {})


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():  # an environment may lie inside somebody's other checkout
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=_GIT_S
        )
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=_GIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):  # there is no git, or it hangs: a run does not fail for its label
        return None
    return None if head.returncode else head.stdout.strip() + "+" * bool(changed.stdout)

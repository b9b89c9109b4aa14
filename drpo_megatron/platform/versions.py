"""Versions of the packages that results depend on."""

from __future__ import annotations

import importlib.metadata

VERSIONS_OF = ("drpo-megatron", "torch", "megatron-core", "sglang", "transformers")


def versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in VERSIONS_OF}

"""What a run records of the packages it depends on."""

from __future__ import annotations

import importlib.metadata

import pytest

from drpo_megatron.platform import versions


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that is only on the path runs, and says so; Transformer Engine is named where it is."""
    installed = {"torch": "2.14.1", "megatron-core": "0.19.2", "transformers": "5.19.0", "sglang": "0.5.23"}

    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert versions.versions() == {"drpo-megatron": "not installed", **installed}
    installed["transformer-engine"] = "2.20.2"
    assert versions.versions()["transformer-engine"] == "2.20.2"

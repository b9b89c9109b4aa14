"""Tests over many layouts, which take many minutes on two cores: `make layouts` runs them."""

from __future__ import annotations

import os

import pytest

many_layouts = pytest.mark.skipif(
    "DRPO_LAYOUTS" not in os.environ, reason="many layouts take many minutes: `make layouts` runs them"
)

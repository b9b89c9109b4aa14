"""A thousand syncs in a row hold nothing: neither memory nor file handles grow, here and in the server."""

from __future__ import annotations

import pytest

from tests.support.server_pool import Loans
from tests.support.servers import many_pushes

pytestmark = pytest.mark.server


@pytest.mark.parametrize("transport", ["distributed", "shared_memory", "disk", "delta"])
def test_many_pushes_hold_nothing(borrow: Loans, transport: str) -> None:
    pooled = borrow("plain")
    grown = many_pushes(pooled, pooled.reference(), transport, 1000)
    # Half of what these pushes would hold that kept their weights on one side.
    assert grown.memory < grown.pushed / 2

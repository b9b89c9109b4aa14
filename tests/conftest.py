"""Servers that the whole test run shares. Imports wait until a test asks: most tests need neither servers nor torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.fleets import Pair, Pairs
    from tests.support.server_pool import Loans, ServerPool


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    from tests.support.server_pool import ServerPool

    with ServerPool(tmp_path_factory.mktemp("servers")) as pool:
        yield pool


@pytest.fixture
def borrow(servers: ServerPool) -> Iterator[Loans]:
    """`borrow("plain")` is a running server of that kind. The test fails that does not leave it as it was."""
    from tests.support.server_pool import Loans

    loans = Loans(servers)
    yield loans
    loans.give_back()


@pytest.fixture(scope="session")
def pairs(servers: ServerPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pairs]:
    from tests.support.fleets import Pairs

    pairs = Pairs(tmp_path_factory.mktemp("pairs"), servers.launch)
    yield pairs
    pairs.close()


@pytest.fixture
def pair(pairs: Pairs) -> Iterator[Pair]:
    """A fleet of two servers whose processes may be killed. The test fails that leaves it so that it cannot recover."""
    yield pairs.get()
    pairs.give_back()

"""Every trainer layout to every server layout, by every transport with every size of buckets."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.support.layout_pushes import BUCKETS_MB, SERVERS, TRAINERS, TRANSPORTS, check_pushes, pushes_to
from tests.support.server_pool import Loans

pytestmark = [pytest.mark.server, pytest.mark.distributed]

PAIRS = [(t, k) for t, (family, _) in TRAINERS.items() for k, (model, _) in SERVERS.items() if model == family]


@pytest.mark.parametrize(("trainer", "kind"), PAIRS)
def test_trainer_and_server_agree_after_every_push(borrow: Loans, tmp_path: Path, trainer: str, kind: str) -> None:
    ways = tuple(itertools.product(TRANSPORTS, BUCKETS_MB))
    check_pushes([pushes_to(borrow(kind), trainer, ways, tmp_path, plant=True)])

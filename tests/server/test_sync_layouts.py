"""Weights from trainers of other layouts than the servers'. `tests/slow/test_sync_layouts.py` has every pair."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerRequestError
from tests.support.layout_pushes import BUCKETS_MB, SERVERS, TRAINERS, TRANSPORTS, check_pushes, pushes_to
from tests.support.server_pool import Loans
from tests.support.servers import LIMIT_S

pytestmark = [pytest.mark.server, pytest.mark.distributed]

# Each trainer, transport and bucket size, and each kind of server but one; each transport from and to several ranks.
PLAN: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("tp1", "tp2", (("distributed", "one tensor"), ("delta", "some"))),
    ("tp2", "plain", (("shared_memory", "some"), ("disk", "all"))),
    ("pp2", "tp2", (("shared_memory", "one tensor"), ("distributed", "all"))),
    ("ep2", "moe", (("distributed", "some"), ("disk", "one tensor"), ("delta", "all"))),
)


def test_trainer_and_server_agree_after_every_push(borrow: Loans, tmp_path: Path) -> None:
    assert {trainer for trainer, _, _ in PLAN} == set(TRAINERS)
    assert {kind for _, kind, _ in PLAN} == SERVERS.keys() - {"moe_tp2"}
    ways = [way for _, _, ways in PLAN for way in ways]
    assert {transport for transport, _ in ways} == set(TRANSPORTS) and {size for _, size in ways} == set(BUCKETS_MB)
    # Two of the trainers, and with them a dense model and a mixture of experts, show what the probe finds.
    plan = [
        pushes_to(borrow(kind), trainer, ways, tmp_path, plant=trainer in ("tp2", "ep2"))
        for trainer, kind, ways in PLAN
    ]
    check_pushes(plan)


def test_the_files_stay_until_every_rank_of_the_server_has_them(
    borrow: Loans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's first rank answers when it has loaded them itself; a rank that finds nothing ends the server."""
    pooled = borrow("tp2")
    server, directory = pooled.server, tmp_path / "files"
    wait_for_ranks = ServerAdmin.wait_for_ranks
    files: list[int] = []

    def record(self: ServerAdmin, timeout_s: float) -> None:
        wait_for_ranks(self, timeout_s)
        files.append(len(list(directory.glob("*/*/*.safetensors"))))

    monkeypatch.setattr(ServerAdmin, "wait_for_ranks", record)
    model = pooled.reference()
    weights = pooled.sync(transport="disk", directory=directory)
    assert weights.push(model.state_dict().items(), 1).verified
    assert files == [1] and not list(directory.glob("*/*"))
    weights.close()

    # The wait is for all of them: it does not end while one of them cannot go on.
    ranks = {p.pid for p in psutil.Process(server.pid).children(recursive=True)}
    (second,) = [
        p for p in psutil.process_iter(["cmdline"]) if p.pid in ranks and "scheduler_TP1" in " ".join(p.info["cmdline"])
    ]
    second.suspend()
    try:
        with pytest.raises(ServerRequestError, match="did not answer"):
            wait_for_ranks(ServerAdmin(server.url), 2.0)
    finally:
        second.resume()
    wait_for_ranks(ServerAdmin(server.url), LIMIT_S)

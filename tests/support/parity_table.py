"""The parity table: every layout, packing, recomputation and loss that the trainer has, each once or more.

`tests/slow/test_parity.py` runs all of it and writes docs/results/parity.md; `tests/ranks/test_training_parity.py` runs
the rows marked as fast, which have every axis once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support import references
from tests.support.launch import run_ranks
from tests.support.parity import (
    ON_ONE_RANK,
    ONE_SEQUENCE,
    OVERLAPPED,
    REFERENCE_SETTINGS,
    SETTINGS,
    SP2,
    Case,
    Outcome,
    Updates,
    errors,
    run_cases,
    sequences_of,
    smallest_move,
)
from tests.support.references import Reference, Router

PAGE = Path(__file__).parents[2] / "docs" / "results" / "parity.md"
BUDGET = "training.tokens_per_micro_batch"
ALONE, FOUR_MICRO_BATCHES, TWO_MICRO_BATCHES, ONE_MICRO_BATCH = ({BUDGET: n} for n in (ONE_SEQUENCE, 20, 40, 4096))
SELECTIVE, FULL = {"model.recompute": "selective"}, {"model.recompute": "full"}
SHARED = {"training.shared_prefix": "always"}
REPLAY = {"model.routing_replay": True}
BF16 = {"model.dtype": "bfloat16"}
# With these limits the ratio of some sequences is clipped and that of others is not.
GSPO: dict[str, Any] = {"algorithm.loss": "gspo", "algorithm.loss_args": {"eps_low": 0.1, "eps_high": 0.2}}
DENSE = {"algorithm.projection.backend": "dense"}
# The auxiliary losses are of a micro-batch, so each sequence has one.
AUXILIARY = REPLAY | ALONE | {"model.moe_aux_loss_coefficient": 3.0, "model.moe_z_loss_coefficient": 0.3}
BIAS_RATE = 0.125
BIASES = {"model.moe_bias_update_rate": BIAS_RATE}
EXACT = (0.0, 0.0, 0.0, 0.0)
VPP2 = {"pipeline": 2, "virtual_pipeline": 2}
NAN: dict[str, Any] = {"poisoned": True}
FAST: dict[str, Any] = {"fast": True}

ONE_PROCESS = [
    Case("packed, 4 micro-batches", "qwen3", {}, FOUR_MICRO_BATCHES),
    Case("packed, 2 micro-batches", "qwen3", {}, TWO_MICRO_BATCHES),
    Case("packed, 1 micro-batch", "qwen3", {}, ONE_MICRO_BATCH),
    Case("packed, 1 micro-batch", "deepseek_v3", {}, ONE_MICRO_BATCH, **FAST),
    Case("packed, 2 micro-batches", "qwen3_moe", {}, TWO_MICRO_BATCHES, **NAN),
    Case("recompute selective", "qwen3", {}, SELECTIVE),
    Case("recompute selective", "deepseek_v3", {}, SELECTIVE),
    Case("recompute selective, replay", "qwen3_moe", {}, SELECTIVE | REPLAY | ALONE, **NAN),
    Case("recompute selective, replay", "deepseek_v3", {}, SELECTIVE | REPLAY | ALONE, **NAN),
    Case("recompute full", "qwen3", {}, FULL),
    Case("recompute full", "qwen3_moe", {}, FULL),
    Case("shared prefixes", "qwen3", {}, SHARED),
    Case("shared prefixes", "deepseek_v3", {}, SHARED | TWO_MICRO_BATCHES, **FAST),
    Case("shared prefixes, replay", "qwen3_moe", {}, SHARED | REPLAY),
    Case("dense projection", "qwen3", {}, DENSE),
    Case("GSPO", "qwen3", {}, GSPO),
    Case("auxiliary losses, replay", "qwen3_moe", {}, AUXILIARY, **NAN),
    Case("auxiliary losses, replay", "deepseek_v3", {}, AUXILIARY, **NAN),
]
TWO_PROCESSES = [
    Case("TP2", "qwen3", {"tensor": 2}, **NAN),
    Case("TP2", "qwen2", {"tensor": 2}, **NAN, **FAST),
    Case("TP2+SP", "qwen3", SP2, **NAN),
    Case("TP2+SP", "qwen2", SP2, **NAN),
    Case("TP2+SP", "deepseek_v3", SP2),
    Case("TP2+SP, recompute full", "qwen3", SP2, FULL, **FAST),
    Case("PP2", "qwen3", {"pipeline": 2}, **NAN),
    Case("PP2", "qwen2", {"pipeline": 2}, **NAN),
    Case("PP2, recompute selective", "llama", {"pipeline": 2}, SELECTIVE),
    Case("PP2, 1 and 3 layers", "deepseek_v3", {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 3}),
    Case("PP2×VPP2", "qwen3", VPP2, FOUR_MICRO_BATCHES),
    Case("PP2×VPP2", "qwen2", VPP2, FOUR_MICRO_BATCHES | OVERLAPPED, **NAN, **FAST),
    Case("DP2, optimizer not sharded", "qwen3", {"data": 2}, {"optimizer.distributed": False}),
    Case("DP2, no overlap", "qwen3", {"data": 2}, {"optimizer.overlap_grad_reduce": False}),
    Case("DP2, overlapped", "qwen3", {"data": 2}, OVERLAPPED),
    Case("DP2, overlapped", "qwen2", {"data": 2}, OVERLAPPED, **NAN, **FAST),
    Case("DP2, one sequence a micro-batch", "qwen3", {"data": 2}, ALONE),
    Case("DP2, 1 micro-batch", "qwen3", {"data": 2}, ONE_MICRO_BATCH),
    Case("EP2", "qwen3_moe", {"data": 2, "expert": 2}),
    Case("EP2", "deepseek_v3", {"data": 2, "expert": 2}),
    Case("EP2, overlapped", "qwen3_moe", {"data": 2, "expert": 2}, OVERLAPPED),
    Case("EP2, allgather", "qwen3_moe", {"data": 2, "expert": 2, "moe_dispatcher": "allgather"}),
    Case("EP2, allgather", "deepseek_v3", {"data": 2, "expert": 2, "moe_dispatcher": "allgather"}),
    Case("ETP2", "qwen3_moe", {"data": 2, "expert_tensor": 2}, **FAST),
    Case("ETP2", "deepseek_v3", {"data": 2, "expert_tensor": 2}),
    Case("TP2+SP×EP2", "qwen3_moe", {**SP2, "expert": 2}),
    Case("TP2+SP×EP2", "deepseek_v3", {**SP2, "expert": 2}, **FAST),
    Case("CP2", "qwen3", {"context": 2}),
    Case("CP2", "llama", {"context": 2}),
    Case("CP2", "qwen2", {"context": 2}, OVERLAPPED),
    Case("CP2", "qwen3_moe", {"context": 2}),
    Case("CP2", "deepseek_v3", {"context": 2}, **FAST),
    Case("CP2, recompute full", "qwen3", {"context": 2}, FULL),
    Case("CP2, recompute selective", "qwen3", {"context": 2}, SELECTIVE),
    Case("CP2, dense projection", "qwen3", {"context": 2}, DENSE),
    Case("CP2, GSPO", "qwen3", {"context": 2}, GSPO, **FAST),
    Case("CP2, GSPO, dense projection", "qwen3", {"context": 2}, GSPO | DENSE),
    Case("CP2, sampled on one rank", "qwen3", {"context": 2}, sequences=ON_ONE_RANK, **FAST),
    Case("CP2, GSPO, sampled on one rank", "qwen3", {"context": 2}, GSPO, sequences=ON_ONE_RANK),
    Case("CP2×EP2", "qwen3_moe", {"context": 2, "expert": 2}),
    Case("CP2×EP2, allgather", "deepseek_v3", {"context": 2, "expert": 2, "moe_dispatcher": "allgather"}),
    Case("TP2+SP, shared prefixes", "qwen3", SP2, SHARED),
    Case("PP2, shared prefixes", "deepseek_v3", {"pipeline": 2}, SHARED),
    Case("EP2, replay", "qwen3_moe", {"data": 2, "expert": 2}, REPLAY),
    Case("EP2, replay", "deepseek_v3", {"data": 2, "expert": 2}, REPLAY),
    Case("TP2+SP×EP2, replay", "qwen3_moe", {**SP2, "expert": 2}, REPLAY | FULL),
    Case("PP2, auxiliary losses", "qwen3_moe", {"pipeline": 2}, AUXILIARY | FULL, **NAN),
    Case("PP2, auxiliary losses, biases", "deepseek_v3", {"pipeline": 2}, AUXILIARY | BIASES, **NAN),
    Case(
        "EP2, auxiliary losses, biases",
        "deepseek_v3",
        {"data": 2, "expert": 2},
        AUXILIARY | BIASES | FULL,
        **NAN,
        **FAST,
    ),
    Case("TP2+SP×EP2, auxiliary losses", "qwen3_moe", {**SP2, "expert": 2}, AUXILIARY | FULL, **NAN),
    Case("DP2, bf16", "qwen3", {"data": 2}, BF16 | ALONE, **FAST),
    Case(
        "TP2, bf16",
        "qwen3",
        {"tensor": 2},
        BF16 | ALONE,
        bounds=(5e-2, 5e-2, 2e-2, 1e-2),
        reason="(partial sums of the two ranks are rounded to bf16, 8 bits, before they are added)",
    ),
    Case("DP2, overlapped, again", "qwen3", {"data": 2}, OVERLAPPED, "DP2, overlapped", EXACT),
    Case("EP2, again", "deepseek_v3", {"data": 2, "expert": 2}, {}, "EP2", EXACT),
    Case("TP2+SP, again", "qwen3", SP2, {}, "TP2+SP", EXACT),
]
FOUR_PROCESSES = [
    Case("TP4", "llama", {"tensor": 4}),
    Case("TP4+SP", "llama", {"tensor": 4, "sequence_parallel": True}),
    Case("PP4", "qwen2", {"pipeline": 4}),
    Case("TP2×PP2", "qwen2", {"tensor": 2, "pipeline": 2}),
    Case("TP2+SP×PP2", "qwen2", {**SP2, "pipeline": 2}, **NAN),
    Case("TP2×DP2", "qwen2", {"tensor": 2, "data": 2}, **NAN),
    Case("TP2+SP×PP2×VPP2", "qwen3", {**SP2, **VPP2}, FOUR_MICRO_BATCHES, **FAST),
    Case("TP2+SP×DP2, overlapped", "qwen3", {**SP2, "data": 2}, OVERLAPPED),
    Case("PP2×DP2, overlapped", "llama", {"pipeline": 2, "data": 2}, OVERLAPPED, **NAN),
    Case("DP4, overlapped", "qwen2", {"data": 4}, OVERLAPPED),
    Case("TP2+SP×CP2", "qwen3", {**SP2, "context": 2}),
    Case("TP2×CP2", "qwen3", {"tensor": 2, "context": 2}),
    Case("CP2×DP2, overlapped", "llama", {"context": 2, "data": 2}, OVERLAPPED),
    Case("CP2×DP2", "qwen3", {"context": 2, "data": 2}),
    Case("CP2×DP2, GSPO", "qwen3", {"context": 2, "data": 2}, GSPO),
    Case("CP4", "qwen3", {"context": 4}),
    Case("PP2×CP2", "qwen2", {"pipeline": 2, "context": 2}),
    Case("PP2×CP2", "llama", {"pipeline": 2, "context": 2}),
    Case("PP2×CP2, GSPO", "qwen3", {"pipeline": 2, "context": 2}, GSPO),
    Case("TP2+SP×CP2×EP4", "deepseek_v3", {**SP2, "context": 2, "expert": 4}),
    Case("TP2+SP×PP2×EP2, replay", "qwen3_moe", {**SP2, "pipeline": 2, "expert": 2}, REPLAY),
    Case("TP2+SP×PP2×VPP2×EP2, auxiliary losses", "qwen3_moe", {**SP2, **VPP2, "expert": 2}, AUXILIARY | FULL, **NAN),
    Case("EP4", "deepseek_v3", {"data": 4, "expert": 4}, OVERLAPPED),
    Case("TP2+SP×DP2×EP2×ETP2", "qwen3_moe", {**SP2, "data": 2, "expert": 2, "expert_tensor": 2}, **FAST),
    Case("PP2×DP2×EP2", "deepseek_v3", {"pipeline": 2, "data": 2, "expert": 2}),
    Case(
        "PP2×DP2×EP2, auxiliary losses, biases",
        "deepseek_v3",
        {"pipeline": 2, "data": 2, "expert": 2},
        AUXILIARY | BIASES | FULL,
        **NAN,
    ),
]
CASES = ONE_PROCESS + TWO_PROCESSES + FOUR_PROCESSES
FAST_CASES = [case for case in CASES if case.fast]

PAGE_HEAD = """# Parity of the layouts

Written by `make parity`, which runs `tests/slow/test_parity.py`; do not edit it. Every row is three updates of a
tiny random model by the trainer's own `Policy.update` (packing, schedule, fused loss, gradient reduction, clipping,
Adam), on CPU ranks over gloo. It is compared with one process that has one sequence in a micro-batch, no recomputation
and an unsharded optimizer. That process equals transformers, autograd and torch's AdamW in float64, within bounds
that the same test has. All rows of a model have the same weights and the same eight sequences an update, two responses
to each of four prompts; those "sampled on one rank" have four sequences whose sampled tokens are all on the second
context-parallel rank. Arithmetic is float32 unless a row says bf16; main weights and gradient sums are float32 in every
row. With `routing_replay` both sides take the same random experts.

Relative errors, the worst of three updates. Loss and gradient norm: |a − e| / |e|. Log-probs: the largest difference
over the largest log-prob, of all sampled tokens. Parameters: the same for each tensor after the third update, the worst
tensor. By that scale every trained tensor moves in the three updates by at least {moves}.

| processes | layout | model | settings | compared with | loss | gradient norm | log-probs | parameters | bound |
|---|---|---|---|---|---|---|---|---|---|
"""
MEASURED = slice(5, 9)


def label(case: Case) -> str:
    return f"{case.name} {case.model}"


@dataclass
class Launches:
    """The outcomes of `cases` and of what they are compared with; one launch a world size, when it is asked for."""

    root: Path
    updates: dict[str, Updates]
    cases: list[Case]
    done: dict[int, list[tuple[Case, Outcome]]] = field(default_factory=dict)
    transformers: list[tuple[Case, Reference]] = field(default_factory=list)
    failed: dict[int, BaseException] = field(default_factory=dict)

    @property
    def references(self) -> list[Case]:
        """One process with one sequence a micro-batch, each once."""
        found: list[Case] = []
        for reference in (case.reference for case in self.cases if case.against is None):
            if reference not in found:
                found.append(reference)
        return found

    def outcome(self, case: Case) -> Outcome:
        size = case.world_size
        if size in self.failed:
            pytest.fail(f"the cases of {size} ranks did not run: {self.failed[size]}")
        if size not in self.done:
            cases = [c for c in self.cases if c.world_size == size]
            if size == 1:
                cases += [reference for reference in self.references if reference not in cases]
            try:
                outcomes = run_ranks(size, run_cases, self.root, self.updates, cases, timeout_s=3600)[0]
            except BaseException as error:
                self.failed[size] = error
                raise
            self.done[size] = list(zip(cases, outcomes, strict=True))
        return next(outcome for c, outcome in self.done[size] if c == case)

    def expected(self, case: Case) -> Outcome:
        if case.against is None:
            return self.outcome(case.reference)
        return self.outcome(next(c for c in self.cases if (c.name, c.model) == (case.against, case.model)))

    def errors(self, case: Case) -> tuple[float, ...]:
        return errors(self.outcome(case), self.expected(case))

    def by_transformers(self, reference: Case) -> Reference:
        for case, found in self.transformers:
            if case == reference:
                return found
        settings = SETTINGS | dict(reference.settings)
        loss = references.drpo
        if settings.get("algorithm.loss") == "gspo":
            loss = references.gspo(**settings["algorithm.loss_args"])
        router = Router(
            settings["model.routing_replay"],
            settings.get("model.moe_aux_loss_coefficient", 0.0),
            settings.get("model.moe_z_loss_coefficient", 0.0),
        )
        found = references.train(
            self.root / reference.model,
            sequences_of(reference, self.updates[reference.model]),
            loss,
            lr=settings["optimizer.lr"],
            eps=settings["optimizer.eps"],
            router=router,
        )
        self.transformers.append((reference, found))
        return found

    def moves(self, experts: bool = True) -> dict[str, float]:
        """By model, of one process: `smallest_move`."""
        plain = [c for c in self.references if c.settings == REFERENCE_SETTINGS and not c.sequences]
        return {c.model: smallest_move(self.outcome(c), self.root / c.model, experts) for c in plain}


def row(case: Case, measured: Sequence[str]) -> list[str]:
    settings = ", ".join(f"{key}={str(value).lower()}" for key, value in case.settings.items())
    bound = " / ".join(dict.fromkeys(f"{b:.0e}" if b else "0" for b in case.bounds))
    against = "one process" if case.against is None else f"{case.against}, to the bit"
    processes = str(case.world_size)
    return [processes, case.name, case.model, settings, against, *measured, " ".join((bound, case.reason)).strip()]

"""Which architectures are compared with transformers, and in which layouts: cases of `tests/support/model_parity.py`.

The cases write themselves from the registry of families and from the keys that transformers' configuration has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drpo_megatron.models.families import FAMILIES
from drpo_megatron.models.hf_config import HFModelConfig, check_layout
from drpo_megatron.platform.layout import ParallelLayout
from tests.support import tiny_models

SP2 = {"tensor": 2, "sequence_parallel": True}
LAYOUTS: dict[int, dict[str, ParallelLayout]] = {
    2: {
        "tp1": ParallelLayout(data=2),
        "tp2": ParallelLayout(tensor=2),
        "tp2sp": ParallelLayout(**SP2),
        "pp2": ParallelLayout(pipeline=2),
        "pp2uneven": ParallelLayout(pipeline=2, first_stage_layers=1),
        "ep2": ParallelLayout(data=2, expert=2),
        "vpp2": ParallelLayout(pipeline=2, virtual_pipeline=2),
        "ep2-allgather": ParallelLayout(data=2, expert=2, moe_dispatcher="allgather"),
        "etp2": ParallelLayout(data=2, expert_tensor=2),
        "tp2sp-ep2": ParallelLayout(**SP2, expert=2),
        "tp2sp-etp2": ParallelLayout(**SP2, expert_tensor=2),
    },
    4: {
        "tp2sp-pp2": ParallelLayout(**SP2, pipeline=2),
        "dp2-tp2sp": ParallelLayout(**SP2, data=2),
        "dp2-pp2-ep2": ParallelLayout(pipeline=2, data=2, expert=2),
        "dp2-tp2sp-ep4": ParallelLayout(**SP2, data=2, expert=4),
        "tp2sp-pp2-ep2": ParallelLayout(**SP2, pipeline=2, expert=2),
        "dp2-tp2sp-ep2": ParallelLayout(**SP2, data=2, expert=2),
        "dp2-tp2sp-ep2-etp2": ParallelLayout(**SP2, data=2, expert=2, expert_tensor=2),
        "dp2-tp2sp-ep4-allgather": ParallelLayout(**SP2, data=2, expert=4, moe_dispatcher="allgather"),
        "vpp2-tp2sp-ep2": ParallelLayout(**SP2, expert=2, pipeline=2, virtual_pipeline=2),
    },
}


@dataclass(frozen=True)
class Case:
    """`changes` are over the family's tiny configuration. `gradients`: they are compared as well. `files`: so are the
    buckets of the export and a directory written in bfloat16.
    """

    family: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    gradients: bool = False
    files: bool = False

    @property
    def directory(self) -> str:
        return f"{self.family} {self.name}"

    def __str__(self) -> str:
        return f"{self.directory}: {dict(self.changes)}"


Plan = Sequence[tuple[Case, Sequence[str]]]
"""Cases and the names of the layouts, of one number of ranks, in which each is built."""


def tiny_case(family: str) -> Case:
    return Case(family, "tiny", gradients=True, files=True)


def awkward_cases(family: str) -> list[Case]:
    """One for each rotary embedding of the family. They differ in key-value heads, in head width, in whether the output
    projection is the embedding, and have vocabularies that no number of ranks divides.
    """
    cases = []
    for number, kind in enumerate(FAMILIES[family].rope_types):
        changes: dict[str, Any] = {
            "rope_parameters": tiny_models.rope(kind),
            "tie_word_embeddings": number % 2 == 0,
            "vocab_size": (521, 523, 541)[number],
        }
        if FAMILIES[family].mla:
            changes["q_lora_rank"] = (None, 12)[number]
        else:
            # All query heads share one key-value head; each has its own; two share one.
            changes["num_key_value_heads"] = (1, 4, 2)[number]
            # Heads together narrower and wider than the hidden states of 64.
            changes["head_dim"] = (8, 40, 12)[number]
        cases.append(Case(family, kind, changes, gradients=number == 1))
    return cases


def random_cases(family: str, seeds: range) -> list[Case]:
    return [
        Case(family, f"seed {seed}", tiny_models.random_changes(family, seed), gradients=seed == seeds[0])
        for seed in seeds
    ]


def fits(hf: HFModelConfig, layout: ParallelLayout) -> bool:
    try:
        check_layout(hf, layout)
    except ValueError:
        return False
    return True


def were_not_left_out(root: Path, plan: Plan, ran: Mapping[str, set[str]]) -> None:
    """Which layouts of two ranks fit is known without `check_layout`."""
    for case, keys in plan:
        hf = HFModelConfig.load(root / case.directory)
        expected = {"tp1"}
        if hf.num_kv_heads % 2 == 0:
            expected |= {"tp2sp"} | (set() if hf.moe or hf.mla else {"tp2"})
        if hf.num_layers % 2 == 0:
            expected |= {"pp2"}
        if hf.num_layers % 4 == 0:
            expected |= {"vpp2"}
        if hf.moe:
            expected |= {"ep2", "ep2-allgather", "etp2"}
            if hf.num_kv_heads % 2 == 0:
                expected |= {"tp2sp-ep2", "tp2sp-etp2"}
        assert expected & set(keys) == ran[case.directory] - {"pp2uneven"}, case
        assert {"pp2", "pp2uneven"} & ran[case.directory] or not {"pp2", "pp2uneven"} <= set(keys), case

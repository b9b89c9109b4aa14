"""Losses, advantages, aggregation, diagnostics: pure functions of tensors, without distributed code."""

from drpo_megatron.algorithms.advantages import ADVANTAGES, compute_advantages, fraction_without_signal
from drpo_megatron.algorithms.aggregation import AGGREGATIONS, sequence_weights
from drpo_megatron.algorithms.diagnostics import TokenStats, summarize
from drpo_megatron.algorithms.losses import (
    LOSSES,
    SEQUENCE_LEVEL_LOSSES,
    LossFunction,
    LossInputs,
    LossOutputs,
    evaluate,
    loss_and_coefficient,
    loss_parameters,
    make_loss,
)

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "LOSSES",
    "SEQUENCE_LEVEL_LOSSES",
    "LossFunction",
    "LossInputs",
    "LossOutputs",
    "TokenStats",
    "compute_advantages",
    "evaluate",
    "fraction_without_signal",
    "loss_and_coefficient",
    "loss_parameters",
    "make_loss",
    "sequence_weights",
    "summarize",
]

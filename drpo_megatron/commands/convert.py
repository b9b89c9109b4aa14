"""`drpo convert`: checkpoints to Hugging Face directories and back."""

from __future__ import annotations

from drpo_megatron.weights.convert import add_arguments, run

HELP = "Convert between checkpoints and Hugging Face directories, on the CPU."
EXAMPLES = (
    "drpo convert runs/quickstart/checkpoints/step_000050 OUT --to hf --dtype bf16 --verify",
    "drpo convert runs/quickstart/hf OUT --to checkpoint",
)

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

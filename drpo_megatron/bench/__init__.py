"""`drpo bench NAME --json`: medians of repeated, interleaved measurements, with their spread. One file a bench."""

from drpo_megatron.bench.report import Figure, run_bench

__all__ = ["Figure", "run_bench"]

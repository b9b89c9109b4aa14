"""`drpo bench NAME --json`: medians of repeated, interleaved measurements, with their spread. One file a bench."""

from drpo_megatron.bench.report import BENCHES, Figure, run_bench

__all__ = ["BENCHES", "Figure", "run_bench"]

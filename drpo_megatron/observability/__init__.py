"""What a run shows and writes: metrics, rollouts, the live display, timers, curves."""

from drpo_megatron.observability.progress import progress_display
from drpo_megatron.observability.timers import VerbTimer
from drpo_megatron.observability.tracker import Tracker

__all__ = ["Tracker", "VerbTimer", "progress_display"]

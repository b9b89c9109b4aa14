"""What a run shows and writes: metrics, rollouts, the live display, timers, curves, and why it stands still."""

from drpo_megatron.observability.progress import progress_display
from drpo_megatron.observability.timers import VerbTimer
from drpo_megatron.observability.tracker import Tracker
from drpo_megatron.observability.watchdog import Watchdog

__all__ = ["Tracker", "VerbTimer", "Watchdog", "progress_display"]

"""Training checkpoints: what they hold, how they are written beside and renamed, and how a run goes on from one."""

"""The main loop. Its verbs are the design: generate (and score) → advantages → pack → train → sync → log."""

from __future__ import annotations

from drpo_megatron.training.run import Run


def train(run: Run) -> None:
    """Train to the last step. SPMD: every rank calls this; rank 0 alone talks to the rollout server and the
    verifiers.
    """
    run.sync()
    for step in range(run.config.training.steps):
        run.begin(step)
        groups = run.generate()
        run.advantages(groups)
        updates = run.pack(groups)
        results = [run.train(sequences) for sequences in updates]
        run.sync()
        run.log(groups, results)
    run.finish()

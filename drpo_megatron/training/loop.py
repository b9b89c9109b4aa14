"""The main loop. Its verbs are the design:

generate (and score) → advantages → pack → train → sync → evaluate → log → save
"""

from __future__ import annotations

from drpo_megatron.training.run import Run


def train(run: Run) -> None:
    """Train to the last step, from the first or the checkpoint's. SPMD: every rank calls this; rank 0 alone talks to
    the rollout servers and the verifiers. Raises StopRequested when the run was told to stop, with a checkpoint.
    """
    run.sync()
    for step in range(run.first_step, run.config.training.steps):
        run.begin(step)
        groups = run.generate()
        run.advantages(groups)
        updates = run.pack(groups)
        results = [run.train(sequences) for sequences in updates]
        run.sync()
        run.evaluate()
        run.log(groups, results)
        run.save()
    run.finish()

"""What each rank runs: `python -m drpo_megatron.training.main RUN/config.yaml`, started by torchrun."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TextIO

import torch

from drpo_megatron.config import load_config
from drpo_megatron.fp8.recipes import choose_block_scales
from drpo_megatron.platform import distributed
from drpo_megatron.platform.process import die_with_parent
from drpo_megatron.training.stop import RECORD, StopRequested, StopSignal

log = logging.getLogger(__name__)


def send_output_to(path: Path, keep_terminal: bool) -> TextIO | None:
    """Point this process's stdout and stderr at `path`. Returns the terminal for the progress display, if it is
    kept.
    """
    terminal = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) if keep_terminal else None
    sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    return terminal


def main() -> None:
    """Ends the process with 0, 1 after an error (recorded in the run's log directory), 75 when the watchdog found that
    the run stands still (recorded too), 130 when it was told to stop.

    A run that saves checkpoints stops at the next one on SIGTERM or SIGUSR1, and ends with 0 and a record of it; see
    `training/stop.py`.
    """
    die_with_parent()
    rank = int(os.environ["RANK"])
    config = load_config(Path(sys.argv[1]), [])
    log_directory = config.run_directory / "log"
    terminal = send_output_to(log_directory / f"rank_{rank}.log", keep_terminal=rank == 0)
    stop = StopSignal(rank, saves=config.save.every is not None)
    torch.set_num_threads(config.training.threads)
    choose_block_scales(config.fp8)
    code = 0
    try:
        from drpo_megatron.observability import Watchdog
        from drpo_megatron.training.loop import train
        from drpo_megatron.training.run import Run

        distributed.initialize(
            config.layout,
            timeout_s=config.training.timeout_s,
            seed=config.seed,
            deterministic=config.training.deterministic,
        )
        with (
            Watchdog(config.training.verb_timeout_s, rank, log_directory) as watchdog,
            Run(config, terminal, watchdog, stop) as run,
        ):
            train(run)
        distributed.shutdown()
    except StopRequested as stopped:
        log.info("%s", stopped)
        if rank == 0:
            (log_directory / RECORD).write_text(f"{stopped}\n")
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # noqa: BLE001 - the last line of defence: recorded, reported, and the process ends
        log.error("%s", traceback.format_exc())
        (log_directory / f"error_rank_{rank}.txt").write_text(f"{type(error).__name__}: {error}\n")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: interpreter shutdown would wait for communicators whose other ranks may be gone.
    os._exit(code)


if __name__ == "__main__":
    main()

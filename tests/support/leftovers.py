"""What one function may leave to the next in the same rank: nothing.

What every function may change is put back. What none may leave behind is reported by name, because the next function
would compute something else, or fail for a reason that is not its own.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import resource
import sys
import threading
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import numpy as np
import psutil
import torch
import torch.distributed as dist

_PACKAGES = ("drpo_megatron", "launch", "megatron")
"""Their functions and constants must be the same ones afterwards."""
_CONSTANTS = (int, float, str, tuple, frozenset, FunctionType, type)
_ABSENT = object()
_HANDLERS = "the handlers of the log "


class LeftBehind(AssertionError):
    """A function changed the process that the next one will run in."""


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Put back what is inside may change: the environment, the directory, seeds, the path of imports, torch's modes.

    Raises LeftBehind for process groups, Megatron's groups, replaced functions, threads, processes, handlers of logs
    and limits. After another exception the process is not looked at: its owner ends it.
    """
    environment, directory, path = dict(os.environ), os.getcwd(), list(sys.path)
    modes = _modes()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = _state()
    with _change_layout_forgets_models():
        yield
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.path[:] = path
    torch.use_deterministic_algorithms(False)
    filesystem = sys.modules.get("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if filesystem is not None:
        filesystem._results_queue = None  # the product's, of the last checkpoint: Megatron-Core makes another
    forget_models()
    left = [*_differences(before, _state()), *_groups(), *_processes()]
    left += [f"{name}: {value}, before {modes[name]}" for name, value in _modes().items() if value != modes[name]]
    if left:
        raise LeftBehind("left behind for the next function of this rank:\n" + "\n".join(left))


def forget_models() -> None:
    """Let go of all models, which are void when their layout is. Each would keep the process groups of its layout and
    their threads, some sixty: Megatron-Core's data parallelism hangs on hooks of torch that hang on it, a circle that
    Python cannot see.
    """
    module = sys.modules.get("megatron.core.distributed.distributed_data_parallel")
    if module is not None:
        for found in gc.get_objects():
            if type(found) is module.DistributedDataParallel:
                vars(found).clear()
    gc.collect()


@contextlib.contextmanager
def _change_layout_forgets_models() -> Iterator[None]:
    from drpo_megatron.platform import distributed

    change_layout = distributed.change_layout

    def forgetting(*args: Any, **kwargs: Any) -> None:
        forget_models()
        change_layout(*args, **kwargs)

    with mock.patch.object(distributed, "change_layout", forgetting):
        yield


def _modes() -> dict[str, Any]:
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "whether gradients are computed": torch.is_grad_enabled(),
        "whether torch is in inference mode": torch.is_inference_mode_enabled(),
        "whether autocast is on": torch.is_autocast_enabled("cpu"),
        "the number of torch's threads": torch.get_num_threads(),
        "the largest file": resource.getrlimit(resource.RLIMIT_FSIZE),
        "the level of the root logger": logging.getLogger().level,
    }


def _state() -> dict[str, Any]:
    """By name: functions and constants of the packages, and handlers of logs."""
    state: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _PACKAGES and isinstance(module, ModuleType):
            for key, value in vars(module).items():
                if not isinstance(value, _CONSTANTS) or isinstance(value, bool):  # which says that something was made
                    continue
                state[f"{name}.{key}"] = value
                if isinstance(value, type) and value.__module__ == name:
                    state.update(
                        (f"{name}.{key}.{attribute}", of_class)
                        for attribute, of_class in vars(value).items()
                        if isinstance(of_class, (FunctionType, staticmethod, classmethod, property))
                    )
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        if isinstance(logger, logging.Logger):
            state[f"{_HANDLERS}{logger.name}: "] = tuple(logger.handlers)
    return state


def _differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name in after:
        if name.startswith(_HANDLERS) and after[name] != before.get(name, ()):
            yield f"{name}{after[name]}, before {before.get(name, ())}"
    for name, value in before.items():
        if name.startswith(_HANDLERS):
            continue
        now = after.get(name, _ABSENT)
        # What is equal may have been computed again; a function has to be the same one.
        if now is not value and (isinstance(value, (FunctionType, type)) or now != value):
            yield f"{name} is another one"


def _groups() -> Iterator[str]:
    if dist.is_initialized():
        yield "torch's process groups: call drpo_megatron.platform.distributed.shutdown()"
    state = sys.modules.get("megatron.core.parallel_state")
    if state is not None and state.model_parallel_is_initialized():
        yield "Megatron-Core's process groups: call drpo_megatron.platform.distributed.shutdown()"


def _processes() -> Iterator[str]:
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            yield f"the thread {thread.name}"
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() != "torch_shm_manager":  # torch's own: one a process, with which it ends
                yield f"the process {child.pid}: {' '.join(child.cmdline())}"

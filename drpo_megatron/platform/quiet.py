"""What libraries say when they are imported, and nobody who reads it could use."""

from __future__ import annotations

import logging
import warnings


def hush_advice_for_gpus() -> None:
    """Of Megatron-Core, the packages for GPUs that are not installed; of torch, a CUDA compiler without a device. Where
    there is a device, ranks do not call this: there it is news.
    """
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed")
    compiler = logging.getLogger("torch.utils.cpp_extension")
    if _has_device not in compiler.filters:
        compiler.addFilter(_has_device)


def _has_device(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("No CUDA runtime is found")

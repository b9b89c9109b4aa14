"""A call of a function in each rank of a server: SGLang passes it on as a weight update with a `load_format`.

The function is one of the server's `custom_weight_loader`. It gets the model and the name of a tensor without elements,
which is the request, and answers in a file that the request names.
"""

from __future__ import annotations

import json
import os
import pickle
from base64 import b64encode
from pathlib import Path

import torch


class _NoElements:
    """A tensor without elements that pickles as a call. Megatron-Core, once imported, changes how a tensor's storage is
    pickled, and SGLang refuses to read that.
    """

    def __reduce__(self) -> tuple[type[torch.Tensor], tuple[()]]:
        return torch.Tensor, ()


def payload(request: dict[str, str | None]) -> str:
    """One rank's part of `ServerAdmin.update_weights_from_tensor`."""
    return b64encode(pickle.dumps([(json.dumps(request), _NoElements())])).decode("ascii")


def write_answer(path: Path, text: str) -> None:
    """For the function in the server. The file is complete when it is there."""
    unfinished = path.with_suffix(".unfinished")
    try:
        unfinished.write_text(text)
        os.replace(unfinished, path)
    except OSError as error:
        # The trainer finds no answer and says so.
        print(f"no answer can be written to {path}: {error}", flush=True)

from typing import Any

import torch

def load_gguf_checkpoint(
    gguf_checkpoint_path: str, return_tensors: bool = False, model_to_load: torch.nn.Module | None = None
) -> dict[str, Any]: ...

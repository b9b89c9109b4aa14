from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

class TorchDistSaveShardedStrategy:
    def __init__(self) -> None: ...
    def async_save(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, async_strategy: str = "nvrx"
    ) -> AsyncRequest: ...

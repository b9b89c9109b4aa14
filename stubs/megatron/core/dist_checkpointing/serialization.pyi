from typing import Any, Literal, overload

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

# With its default `strict` it returns the state alone.
def load(sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> dict[str, Any]: ...
def load_content_metadata(checkpoint_dir: str | None = None) -> dict[str, Any] | None: ...
@overload
def save(
    sharded_state_dict: dict[str, Any],
    checkpoint_dir: str,
    sharded_strategy: FullyParallelSaveStrategyWrapper | TorchDistSaveShardedStrategy | None = None,
    *,
    async_sharded_save: Literal[True],
    content_metadata: dict[str, Any] | None = None,
    async_strategy: Literal["mcore"],
) -> AsyncRequest: ...
@overload
def save(
    sharded_state_dict: dict[str, Any],
    checkpoint_dir: str,
    sharded_strategy: FullyParallelSaveStrategyWrapper | TorchDistSaveShardedStrategy | None = None,
    *,
    content_metadata: dict[str, Any] | None = None,
) -> None: ...

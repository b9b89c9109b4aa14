from megatron.core.dist_checkpointing.serialization import load as load
from megatron.core.dist_checkpointing.serialization import load_content_metadata as load_content_metadata
from megatron.core.dist_checkpointing.serialization import save as save

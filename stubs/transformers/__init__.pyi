from os import PathLike
from typing import Any

import torch

class PreTrainedConfig: ...

class Qwen3Config(PreTrainedConfig):
    def __init__(self, **kwargs: Any) -> None: ...

class Qwen3MoeConfig(PreTrainedConfig):
    def __init__(self, **kwargs: Any) -> None: ...

class PreTrainedModel(torch.nn.Module):
    # Of a class for each family.
    config: Any

    def get_input_embeddings(self) -> torch.nn.Embedding: ...
    def tie_weights(self) -> None: ...
    def save_pretrained(self, save_directory: str | PathLike[str]) -> None: ...

class Qwen3ForCausalLM(PreTrainedModel):
    def __init__(self, config: Qwen3Config) -> None: ...

class Qwen3MoeForCausalLM(PreTrainedModel):
    def __init__(self, config: Qwen3MoeConfig) -> None: ...

class PreTrainedTokenizerFast:
    chat_template: str | None

    def __init__(self, **kwargs: Any) -> None: ...
    def save_pretrained(self, save_directory: str | PathLike[str]) -> tuple[str, ...]: ...

class AutoConfig:
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> PreTrainedConfig: ...

class AutoModelForCausalLM:
    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel: ...
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> PreTrainedModel: ...

class AutoTokenizer:
    # A tokenizer's class depends on the files of the model.
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any: ...

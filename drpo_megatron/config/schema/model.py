"""Model, data and reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from drpo_megatron.config.schema.section import Section


class ModelConfig(Section):
    path: Path
    """Hugging Face directory: config.json, safetensors and tokenizer. The truth about the model."""
    recipe: str | None = None
    """How to make `path` when it does not exist: a name from models/recipes.py (tiny_qwen3,
    tiny_qwen3_blocks, tiny_qwen3_moe, smollm2_135m)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter dtype of the trainer and the server. Main weights and log-probs are float32 either way."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward: nothing, the core attention, or whole layers."""
    routing_replay: bool | None = None
    """Mixture of experts: train each token with the experts that the rollout engine sent it to. The engines round
    differently, a near tie then takes another expert, and the log-prob jumps though the policy did not change. null:
    true for a mixture of experts. false: the trainer's routers choose, and are still compared."""
    moe_aux_loss_coefficient: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss of every layer, a mean over micro-batches by their tokens; 1 is balanced."""
    moe_z_loss_coefficient: float = Field(0.0, ge=0)
    """Weight of the mean squared log-sum-exp of router logits, for every layer."""
    moe_bias_update_rate: float = Field(0.0, ge=0)
    """Step of the router's bias of each expert after an update, towards equal loads. Models with such a bias only."""


class ReasoningGymData(Section):
    type: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    """Name of a reasoning-gym task, for example `basic_arithmetic`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the task's own configuration."""
    size: int = Field(10000, gt=0)
    """Number of problems that are generated (lazily)."""
    seed: int = 1
    """Seed of the problems; evaluation data takes another one."""


class FileData(Section):
    type: Literal["jsonl", "parquet"]
    """Format of the file."""
    path: Path
    """One row a prompt."""
    layout: Literal["keys", "auto", "gsm8k", "math", "aime", "dapo"] = "keys"
    """Where a row has its prompt and answer. keys: under `prompt_key` and `answer_key`. gsm8k, math, aime, dapo: as the
    files of these data sets have them (data/layouts.py). auto: the one of all these that the first row fits; more than
    one, or none, is an error that names them."""
    prompt_key: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages."""
    answer_key: str | None = "answer"
    """Column with the reference answer, given to the verifier; dots reach into nested ones. null for none."""


class FunctionData(Section):
    type: Literal["function"] = "function"
    function: str
    """`module:function`, called as f(index, seed) -> {'prompt', 'answer', 'metadata'}."""
    size: int = Field(10000, gt=0)
    """Number of problems."""
    seed: int = 1
    """Handed to the function."""


class DataConfig(Section):
    source: ReasoningGymData | FileData | FunctionData = Field(discriminator="type")
    """Where the prompts come from."""
    system_prompt: str | None = None
    """Put in front of every prompt as the system message."""
    prompt_template: str = "{prompt}"
    """Text around the prompt; `{prompt}` is replaced."""
    chat_template: bool = True
    """Apply the tokenizer's chat template. False: the text is tokenized as it is."""
    max_prompt_tokens: int = Field(1024, gt=0)
    """A longer prompt is an error before training starts."""
    shuffle: bool = True
    """Shuffle the prompts in every epoch, with the run's seed."""


class RewardConfig(Section):
    type: Literal["reasoning_gym", "math_verify", "function"]
    """The verifier."""
    function: str | None = None
    """For type `function`: `module:function`, called as f(text, answer, metadata) -> float."""
    extract: str | None = None
    """Regular expression; its last match's first group is what reasoning-gym scores. null: the stripped text."""
    timeout_s: float = Field(10.0, gt=0)
    """Seconds for one sample; a later answer is reward 0, counted and logged."""
    workers: int = Field(1, gt=0)
    """Processes that verify."""
    memory_mb: int | None = Field(4096, gt=0)
    """Address space of each of them, in MiB (RLIMIT_AS); a sample that needs more is reward 0, counted and logged.
    math-verify takes 83, reasoning-gym 241, a function that imports torch 3200, one that uses CUDA far more than the
    memory. null: no limit."""

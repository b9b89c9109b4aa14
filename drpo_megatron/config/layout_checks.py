"""What the settings of layout and server must satisfy together, beyond what one of them says alone.

Rules between the model and the trainer's layout are `models.hf_config.check_layout`; rules inside the layout are
`platform.layout`. Each function yields one line a problem: `path.to.key: problem; what to do`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.platform import determinism

if TYPE_CHECKING:
    from drpo_megatron.models.hf_config import HFModelConfig


def determinism_problems(config: RunConfig) -> Iterator[str]:
    """Variables of the environment that contradict `training.deterministic`."""
    if config.training.deterministic:
        for name, value, needed in determinism.contradictions():
            yield (
                f"training.deterministic: is true and the environment has {name}={value}; unset it, or set it to "
                f"{needed}"
            )


def server_problems(config: RunConfig, hf: HFModelConfig) -> Iterator[str]:
    """The rollout server's devices and context, and the model's widths over its ranks."""
    server = config.rollout.server
    ranks, devices = server.tensor_parallel, server.devices
    if devices is not None and (len(devices) != server.count * ranks or len(set(devices)) != len(devices)):
        servers = f" and rollout.server.count = {server.count}" if server.count > 1 else ""
        yield (
            f"rollout.server.devices: {devices} are {len(set(devices))} different devices for "
            f"rollout.server.tensor_parallel = {ranks}{servers}; name one a rank"
        )
    context = server.args.get("context_length")
    prompt, response = config.data.max_prompt_tokens, config.rollout.sampling.max_new_tokens
    if isinstance(context, int) and context < prompt + response:
        yield (
            f"rollout.server.args.context_length: {context} is below data.max_prompt_tokens = {prompt} + "
            f"rollout.sampling.max_new_tokens = {response}; raise it to {prompt + response}, or lower one of them"
        )
    for what, size in _server_widths(config, hf):
        if size % ranks:
            yield (
                f"rollout.server.tensor_parallel: {ranks} does not divide the {size} {what}; choose a divisor of {size}"
            )


def _server_widths(config: RunConfig, hf: HFModelConfig) -> Iterator[tuple[str, int]]:
    """Widths that SGLang divides over its tensor-parallel ranks, beside the heads."""
    if hf.moe is None or not all(hf.moe.layers):
        yield "MLP columns", hf.ffn_hidden_size
    if hf.moe is not None:
        if config.rollout.server.args.get("ep_size", 1) == 1:
            yield "MLP columns of an expert", hf.moe.ffn_hidden_size
        yield "MLP columns of the shared experts", hf.moe.shared_ffn_hidden_size

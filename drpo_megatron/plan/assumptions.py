"""What a plan takes for granted. Every one is printed with the plan, and `--assume NAME=VALUE` sets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from drpo_megatron.config.load import ConfigError
from drpo_megatron.config.schema import RunConfig


def _assumed(text: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True)
class Assumptions:
    """Numbers that no configuration file holds. Rates are shares of the data sheet's."""

    prompt_tokens: float = _assumed("mean prompt, in tokens; a quarter of data.max_prompt_tokens")
    response_tokens: float = _assumed("mean response, in tokens; half of rollout.sampling.max_new_tokens")
    dense_utilization: float = _assumed("share of peak FLOP/s in dense matrix products and attention", default=0.55)
    expert_utilization: float = _assumed("share of peak FLOP/s in the experts' grouped products", default=0.40)
    link_utilization: float = _assumed("share of NVLink and network bandwidth that collectives reach", default=0.75)
    memory_utilization: float = _assumed("share of memory bandwidth that a decode step reaches", default=0.65)
    decode_layer_us: float = _assumed("fixed time of a layer of a decode step, µs: launches, all-reduces", default=20.0)
    server_memory_fraction: float = _assumed("share of a device for a server's weights and KV cache", default=0.85)
    reserved_gb: float = _assumed("GB that CUDA, NCCL and the allocator's slack take beside the tensors", default=5.0)
    imbalance: float = _assumed("tokens of the fullest expert rank over the mean one's", default=1.0)
    sync_bucket_ms: float = _assumed("fixed time of a sync bucket, ms: requests, names, loading", default=15.0)
    host_gb_s: float = _assumed("GB/s between a device and host memory", default=25.0)
    storage_gb_s: float = _assumed("GB/s that all ranks together write to or read from storage", default=10.0)

    @classmethod
    def of(cls, config: RunConfig, given: Sequence[str] = ()) -> Assumptions:
        """Those of a run; `given` are NAME=VALUE. Raises ConfigError for a name or value that is none."""
        limits = config.data.max_prompt_tokens / 4, config.rollout.sampling.max_new_tokens / 2
        server_fraction = config.rollout.server.args.get("mem_fraction_static")
        made = cls(prompt_tokens=limits[0], response_tokens=limits[1])
        if isinstance(server_fraction, float):
            made = replace(made, server_memory_fraction=server_fraction)
        known = {f.name for f in fields(cls)}
        for one in given:
            name, _, value = one.partition("=")
            if name not in known:
                raise ConfigError([f"--assume {one}: {name!r} is no assumption; known are {', '.join(sorted(known))}"])
            try:
                number = float(value)
            except ValueError as error:
                raise ConfigError([f"--assume {one}: {value!r} is not a number; write {name}=NUMBER"]) from error
            if not number > 0:
                raise ConfigError([f"--assume {one}: must be above 0; correct the value"])
            made = replace(made, **{name: number})
        longest = {
            "prompt_tokens": ("data.max_prompt_tokens", config.data.max_prompt_tokens),
            "response_tokens": ("rollout.sampling.max_new_tokens", config.rollout.sampling.max_new_tokens),
        }
        for name, (key, limit) in longest.items():
            if getattr(made, name) > limit:
                raise ConfigError(
                    [f"--assume {name}: is above {key} = {limit}, the longest; lower it, or raise the key"]
                )
        return made

    def described(self) -> list[tuple[str, float, str]]:
        """(name, value, meaning) of each."""
        return [(f.name, getattr(self, f.name), f.metadata["text"]) for f in fields(self)]

"""The rotary embedding of a `config.json`. No torch, no Megatron."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drpo_megatron.models.hf_reader import ConfigReader
from drpo_megatron.models.hf_sections import RopeConfig

RopeTypes = Mapping[str, tuple[str, ...]]

ROPE_TYPES: RopeTypes = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The keys that each type must have, of attention without latents."""
MLA_ROPE_TYPES: RopeTypes = {"default": (), "yarn": ("factor", "original_max_position_embeddings")}
"""The same of multi-latent attention."""
# Those that it may have beside them.
_YARN_OPTIONS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def rope_config(reader: ConfigReader, types: RopeTypes, default_theta: float) -> RopeConfig:
    """transformers 5 writes one `rope_parameters`; earlier versions write `rope_theta` and `rope_scaling`.

    Raises ValueError for a type outside `types`, a nested key that the type does not have, and for two places that
    disagree about a key.
    """
    reader.only("partial_rotary_factor", (None, 1.0))
    nested = _merged(reader)
    theta = _one(reader, nested, "rope_theta", reader.value("rope_theta"))
    nested["rope_theta"] = default_theta if theta is None else theta
    path = "rope_parameters" if reader.value("rope_parameters") else "rope_scaling"
    rope = ConfigReader(nested, reader.source, reader.family, {}, path)
    kind = rope.value("rope_type", "type") if {"rope_type", "type"} & nested.keys() else "default"
    if not isinstance(kind, str) or kind not in types:
        raise ValueError(
            f"{reader.source}: rope_type {kind!r} is not supported for {reader.family}; "
            f"supported are {', '.join(types)}"
        )
    missing = [key for key in types[kind] if nested.get(key) is None]
    if missing:
        raise ValueError(f"{reader.source}: rope_type {kind!r} needs {', '.join(missing)}")
    options: dict[str, Any] = {
        key: rope.integer(key) if key == "original_max_position_embeddings" else rope.number(key) for key in types[kind]
    }
    rope.only("partial_rotary_factor", (None, 1.0))
    if kind == "yarn":
        _refuse_yarn(rope, nested)
        options |= {key: rope.number(key) for key in _YARN_OPTIONS if nested.get(key)}
    theta = rope.number("rope_theta")
    rope.finish({})
    return RopeConfig(theta=theta, type=kind, **options)


def _merged(reader: ConfigReader) -> dict[str, Any]:
    scaling, parameters = reader.nested("rope_scaling"), reader.nested("rope_parameters")
    return {
        key: _one(reader, parameters, key, scaling.get(key), where="rope_scaling.") for key in {**scaling, **parameters}
    }


def _one(reader: ConfigReader, nested: Mapping[str, Any], key: str, other: Any, where: str = "") -> Any:
    """The value of `key` in `nested`, or `other`, which stands elsewhere in the file. Raises where they disagree."""
    inner = nested.get(key)
    if inner is None or other is None:
        return other if inner is None else inner
    if inner != other:
        raise ValueError(
            f"{reader.source}: rope_parameters.{key} = {inner!r} and {where}{key} = {other!r} say two different "
            "things; remove the one that is wrong"
        )
    return inner


def _refuse_yarn(rope: ConfigReader, nested: Mapping[str, Any]) -> None:
    """What Megatron-Core's yarn computes differently from transformers'."""
    rope.only("attention_factor", (None,))
    rope.only("truncate", (True,))
    mscale, mscale_all_dim = (nested.get(key) for key in ("mscale", "mscale_all_dim"))
    if mscale_all_dim and not mscale:
        raise rope.refuse(
            "mscale_all_dim", mscale_all_dim, "because transformers then leaves it out of cosine and sine"
        )
    if float(mscale or 1) != 1 and not mscale_all_dim:
        raise rope.refuse("mscale", mscale, "because transformers ignores it without mscale_all_dim")

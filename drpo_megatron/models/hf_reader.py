"""Reads `config.json` so that no key passes unnoticed: each is read, known to be without effect, or refused by name.

No torch, no Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_OTHER_TASKS = "belongs to tasks other than language modelling"
_OUTPUTS = "says what transformers returns, not what it computes"
_SAMPLING = "belongs to sampling: the run's configuration says how"
_TOKENS = "special tokens come from the tokenizer"
_LOSSES = "belongs to a loss: the run's configuration says what is trained on"

IGNORED: dict[str, str] = {
    "model_type": "names the family, which is chosen before the keys are read",
    "architectures": "model_type says what is built",
    "auto_map": "code that comes with a model is never run",
    "transformers_version": "says which version wrote the file",
    "transformers.js_config": "settings of another library",
    "_name_or_path": "says where the file came from",
    "_model_name_or_path": "says where a converted GGUF came from",
    "_attn_implementation": "names a kernel of transformers",
    "dtype": "the run's model.dtype decides",
    "torch_dtype": "the run's model.dtype decides",
    "initializer_range": "weights are loaded, not drawn",
    "use_cache": "training keeps no key-value cache",
    "tokenizer_class": "the tokenizer's own files say what it is",
    "unsloth_fixed": "says which tool wrote the file",
    "unsloth_version": "says which tool wrote the file",
    "max_sequence_length": "max_position_embeddings says how long sequences may be",
    "bos_token_id": _TOKENS,
    "unk_token_id": _TOKENS,
    "sep_token_id": _TOKENS,
    "cls_token_id": _TOKENS,
    "mask_token_id": _TOKENS,
    "pad_token_id": "packs are padded outside the sequences",
    "return_dict": _OUTPUTS,
    "output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "output_router_logits": _OUTPUTS,
    "router_aux_loss_coef": _LOSSES,
    "id2label": _OTHER_TASKS,
    "label2id": _OTHER_TASKS,
    "problem_type": _OTHER_TASKS,
    "chunk_size_feed_forward": "trades memory for time",
    **dict.fromkeys(
        (
            "do_sample",
            "length_penalty",
            "max_length",
            "max_new_tokens",
            "num_beam_groups",
            "num_beams",
            "num_return_sequences",
            "repetition_penalty",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
        ),
        _SAMPLING,
    ),
}
"""Keys of `config.json` without effect on the computation of any family, with the reason."""

DEFAULTS: dict[str, Any] = {
    "eos_token_id": None,
    "layer_types": None,
    "partial_rotary_factor": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": None,
    "tie_word_embeddings": False,
}
"""What transformers takes for a key that the file omits, where it is the same for most families."""


class ConfigReader:
    """The parsed JSON. It remembers which keys were read; `finish` refuses the others.

    A key that the file omits has its value in `defaults`. `path` is where a nested object lies. `family` and `source`,
    the file, are named in errors.
    """

    def __init__(
        self, raw: Mapping[str, Any], source: str, family: str, defaults: Mapping[str, Any], path: str = ""
    ) -> None:
        self.raw, self.source, self.family, self.defaults, self.path = raw, source, family, defaults, path
        self._read: set[str] = set()

    def value(self, *spellings: str) -> Any:
        """The value of a key, which may have several spellings. Raises ValueError when the file has none of them and
        no default is known, or has two that disagree."""
        self._read.update(spellings)
        present = [key for key in spellings if key in self.raw]
        for key in present[1:]:
            if self.raw[key] != self.raw[present[0]]:
                raise ValueError(
                    f"{self.source}: {self._name(present[0])} = {self.raw[present[0]]!r} and {self._name(key)} = "
                    f"{self.raw[key]!r} say two different things; remove the one that is wrong"
                )
        if present:
            return self.raw[present[0]]
        for key in spellings:
            if key in self.defaults:
                return self.defaults[key]
        raise self._missing(spellings[0])

    def integer(self, *spellings: str, least: int = 0) -> int:
        value = self._stated(*spellings)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refuse(spellings[0], value, f"because it must be an integer of at least {least}")
        return value

    def size(self, *spellings: str) -> int:
        return self.integer(*spellings, least=1)

    def number(self, *spellings: str) -> float:
        value = self._stated(*spellings)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(spellings[0], value, "because it must be a number")
        return float(value)

    def flag(self, *spellings: str) -> bool:
        value = self._stated(*spellings)
        if not isinstance(value, bool):
            raise self.refuse(spellings[0], value, "because it must be true or false")
        return value

    def optional_size(self, *spellings: str) -> int | None:
        return None if self.value(*spellings) is None else self.size(*spellings)

    def only(self, key: str, values: Sequence[Any]) -> None:
        """Refuse a value other than `values`; a key that is absent and without default counts as one of them."""
        self._read.add(key)
        value = self.raw.get(key, self.defaults.get(key, values[0]))
        if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in values):
            raise self.refuse(key, value, f"only {' or '.join(repr(allowed) for allowed in values)} is")

    def nested(self, key: str) -> Mapping[str, Any]:
        """An object in the file; empty for null or absent."""
        value = self.value(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.refuse(key, value, "because it must be an object")
        return value or {}

    def refuse(self, key: str, value: Any, reason: str) -> ValueError:
        return ValueError(
            f"{self.source}: {self._name(key)} = {value!r} is not supported for {self.family}, {reason}; "
            "use another model"
        )

    def finish(self, ignored: Mapping[str, str]) -> None:
        """Raise ValueError naming the keys that nothing read. Null, false, zero and empty values switch nothing on."""
        unread = {
            self._name(key): value
            for key, value in self.raw.items()
            if value and key not in self._read and key not in ignored
        }
        if unread:
            listed = ", ".join(f"{key} = {value!r}" for key, value in unread.items())
            raise ValueError(
                f"{self.source}: no code reads {listed}, so the model could compute something else than is trained; "
                "use another model, or, where the key has no effect on the computation, add it with the reason to "
                "IGNORED in drpo_megatron/models/hf_reader.py"
            )

    def _stated(self, *spellings: str) -> Any:
        value = self.value(*spellings)
        if value is None:
            raise self._missing(spellings[0])
        return value

    def _missing(self, key: str) -> ValueError:
        return ValueError(f"{self.source}: {self._name(key)} is missing; a {self.family} configuration must state it")

    def _name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

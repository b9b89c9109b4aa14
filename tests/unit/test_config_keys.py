"""No key of `config.json` passes unnoticed: each changes the model, is refused by name, or is known to have no effect.

For every family of the registry, over every key that transformers writes and every key of the published files.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from drpo_megatron.models.families import FAMILIES
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.models.hf_reader import IGNORED
from drpo_megatron.models.hf_rope import ROPE_TYPES
from tests.support import tiny_models

PUBLISHED = sorted((Path(__file__).parents[1] / "data" / "hf_configs").glob("*/config.json"))
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 0.5,
    "mscale_all_dim": 0.8,
}
SCALED = {"linear": LINEAR, "llama3": LLAMA3, "yarn": YARN}


def _saved(family: str, **changes: Any) -> dict[str, Any]:
    if family == "qwen3_moe":
        # With more dense layers two values of decoder_sparse_step can stand for the same layers.
        changes |= {"mlp_only_layers": [0]}
    return json.loads(tiny_models.config(family, **changes).to_json_string(use_diff=False))


def _full_configs() -> Iterator[Any]:
    """Configurations with all keys: as transformers writes them, with each kind of rotary embedding, and published."""
    for family, known in FAMILIES.items():
        yield pytest.param(_saved(family), id=family)
        for kind in known.rope_types:
            if kind in SCALED:
                yield pytest.param(_saved(family, rope_parameters=SCALED[kind]), id=f"{family}-{kind}")
                old = {key: value for key, value in SCALED[kind].items() if key != "rope_theta"}
                raw = {key: value for key, value in _saved(family).items() if key != "rope_parameters"}
                yield pytest.param(raw | {"rope_theta": 1e4, "rope_scaling": old}, id=f"{family}-{kind}-old keys")
    for file in PUBLISHED:
        yield pytest.param(json.loads(file.read_text()), id=file.parent.name)


def _other_values(value: Any) -> list[Any]:
    """Values of the same kind that are not it."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value + 2]
    if isinstance(value, float):
        return [value * 1.5 + 0.125]
    if isinstance(value, str):
        return [value + "x", ""]
    if isinstance(value, list):
        return [[*value, 1], [f"{item}x" for item in value] or [0]]
    if value is None:
        return [3, "x", True, {"a": 1}]
    return []


def _changes(raw: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(where, the configuration with one value changed), nested objects included."""
    place: Any = raw
    for key in path:
        place = place[key]
    for key, value in place.items():
        where = (*path, key)
        if isinstance(value, dict):
            yield from _changes(raw, where)
        for other in _other_values(value):
            changed = copy.deepcopy(raw)
            inner: Any = changed
            for step in path:
                inner = inner[step]
            inner[key] = other
            yield where, changed


@pytest.mark.parametrize("raw", list(_full_configs()))
def test_no_changed_value_passes_unnoticed(raw: dict[str, Any]) -> None:
    family = raw["model_type"]
    ignored = IGNORED | dict(FAMILIES[family].ignored)
    hf = HFModelConfig.from_dict(raw)
    understood, refused = set(), set()
    for where, changed in _changes(raw):
        try:
            same = HFModelConfig.from_dict(changed) == hf
        except ValueError as error:
            assert where[-1] in str(error) or where[0] in str(error) or _consequence(where[-1], str(error)), where
            refused.add(where)
            continue
        if not same:
            understood.add(where)
        else:
            assert where[0] in ignored and where[0] != "model_type", (
                f"{'.'.join(where)} = {changed[where[0]]!r} passes unnoticed"
            )
    assert {("hidden_size",), ("vocab_size",), ("rms_norm_eps",), ("hidden_act",)} <= understood | refused
    # A value in the ignore list that is read after all would be there by mistake.
    assert not {where for where in understood if where[0] in ignored and where[0] != "model_type"}


def _consequence(key: str, error: str) -> bool:
    """Whether changing `key` makes another key impossible, and that one is named."""
    others = {
        "hidden_size": "num_attention_heads",
        "num_attention_heads": "num_key_value_heads",
        "num_hidden_layers": "layer_types",
        "n_routed_experts": "n_group",
        "num_experts_per_tok": "topk_group",
        "n_group": "topk_group",
        "qk_rope_head_dim": "head_dim",
        "qk_nope_head_dim": "head_dim",
        "num_local_experts": "num_experts",
        "type": "rope_type",
    }
    return others.get(key, key) in error


@pytest.mark.parametrize("family", FAMILIES)
def test_a_made_up_key_is_refused_by_name(family: str) -> None:
    raw = _saved(family)
    for value in (1, 0.5, True, "on", [1], {"a": 0}):
        with pytest.raises(ValueError, match=r"config\.json: no code reads attention_magic = .*IGNORED"):
            HFModelConfig.from_dict(raw | {"attention_magic": value})
    for neutral in (None, False, 0, 0.0, "", [], {}):
        assert HFModelConfig.from_dict(raw | {"attention_magic": neutral}) == HFModelConfig.from_dict(raw)
    with pytest.raises(ValueError, match=r"rope_parameters\.magic = 2"):
        HFModelConfig.from_dict(raw | {"rope_parameters": raw["rope_parameters"] | {"magic": 2}})
    with pytest.raises(ValueError, match=r"rope_parameters\.magic = 2"):
        HFModelConfig.from_dict(raw | {"rope_scaling": {"magic": 2}})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_of_another_rope_type_is_refused(family: str) -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ValueError, match=r"rope_parameters\.factor = 2.0"):
        HFModelConfig.from_dict(_saved(family) | {"rope_parameters": plain | {"factor": 2.0}})
    types = FAMILIES[family].rope_types
    if types is ROPE_TYPES:
        with pytest.raises(ValueError, match=r"rope_parameters\.low_freq_factor = 1.0"):
            HFModelConfig.from_dict(_saved(family) | {"rope_parameters": LINEAR | {"low_freq_factor": 1.0}})
    for kind in ("dynamic", "longrope", "yarn" if types is ROPE_TYPES else "llama3"):
        with pytest.raises(ValueError, match=f"rope_type '{kind}' is not supported for {family}"):
            HFModelConfig.from_dict(_saved(family) | {"rope_parameters": LINEAR | {"rope_type": kind}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"rope_theta": 2e4, "rope_parameters": LINEAR},
            ["rope_parameters.rope_theta = 10000.0", "rope_theta = 20000"],
        ),
        (
            {"rope_scaling": LINEAR | {"factor": 3.0}, "rope_parameters": LINEAR},
            ["factor = 2.0", "rope_scaling.factor"],
        ),
        ({"rope_parameters": LINEAR | {"type": "llama3"}}, ["rope_type = 'linear'", "type = 'llama3'"]),
        ({"rope_parameters": LINEAR | {"factor": "2"}}, ["rope_parameters.factor = '2'"]),
        ({"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor = 0.5"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        ({"rope_parameters": {"full_attention": LINEAR}}, ["rope_parameters.full_attention"]),
    ],
)
def test_what_contradicts_itself_is_refused(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        HFModelConfig.from_dict(_saved("mistral") | change)
    for word in words:
        assert word in str(error.value)


def test_two_spellings_that_disagree_are_refused() -> None:
    raw = _saved("qwen3_moe") | {"num_experts": 8, "num_local_experts": 8}
    assert HFModelConfig.from_dict(raw) == HFModelConfig.from_dict(_saved("qwen3_moe"))
    with pytest.raises(ValueError, match="num_experts = 16 and num_local_experts = 8 say two different things"):
        HFModelConfig.from_dict(raw | {"num_experts": 16})


def test_what_tools_add_to_a_file_changes_nothing() -> None:
    """Keys that converters, earlier versions of transformers and fine-tuning tools leave in `config.json`."""
    raw = _saved("llama")
    added = {
        "_model_name_or_path": "Smollm2 135M 8k Lc100K Mix1 Ep2",
        "unk_token_id": 3,
        "tokenizer_class": "LlamaTokenizer",
        "max_sequence_length": 2048,
        "unsloth_version": "2024.9",
        "temperature": 0.6,
        "top_k": 50,
        "max_length": 20,
        "pruned_heads": {},
        "torchscript": False,
        "finetuning_task": None,
    }
    assert HFModelConfig.from_dict(raw | added) == HFModelConfig.from_dict(raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_omitted_key_means_what_transformers_takes_for_it(family: str) -> None:
    """Or is refused: a default of ours that differed would give another model than the same file gives there."""
    whole = _saved(family)
    accepted = 0
    for key in whole.keys() - {"model_type", "transformers_version"}:
        without = {name: value for name, value in whole.items() if name != key}
        try:
            hf = HFModelConfig.from_dict(without)
        except ValueError as error:
            assert key in str(error) or _consequence(key, str(error)) or key in ("rms_norm_eps", "kv_lora_rank"), key
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            completed = CONFIG_MAPPING[family].from_dict(without)
        assert hf == HFModelConfig.from_dict(json.loads(completed.to_json_string(use_diff=False))), key
        accepted += 1
    assert accepted > 15


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.parent.name)
def test_published_files_load(file: Path) -> None:
    """And say the same as transformers reads in them."""
    raw = json.loads(file.read_text())
    hf = HFModelConfig.load(file.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    assert hf == HFModelConfig.from_dict(json.loads(reference.to_json_string(use_diff=False)))
    assert hf.rope.theta == reference.rope_parameters["rope_theta"]
    assert hf.tied_embeddings == reference.tie_word_embeddings
    assert hf.num_kv_heads == reference.num_key_value_heads


def test_the_families_say_what_transformers_says_of_itself() -> None:
    for family, known in FAMILIES.items():
        kind = CONFIG_MAPPING[family]
        assert known.rope_theta == kind.default_theta, family
        assert not set(known.ignored) & IGNORED.keys(), family
        reference = kind()
        assert next(iter(known.activations)) == reference.hidden_act, family


def test_deepseek_as_published_is_refused_for_its_fp8_weights_only() -> None:
    raw = json.loads(next(file for file in PUBLISHED if "deepseek" in file.parent.name).read_text())
    carried = {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001}
    assert HFModelConfig.from_dict(raw | carried | {"seq_aux": True}) == HFModelConfig.from_dict(raw)
    with pytest.raises(ValueError, match="quantization_config"):
        HFModelConfig.from_dict(raw | {"quantization_config": {"fmt": "e4m3", "weight_block_size": [128, 128]}})

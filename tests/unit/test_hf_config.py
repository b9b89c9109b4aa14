"""config.json → HFModelConfig: transformers' own configurations are the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from drpo_megatron.models.hf_config import HFModelConfig, check_layout, padded_vocab_size
from drpo_megatron.models.rope import inverse_frequencies
from drpo_megatron.platform.layout import ParallelLayout
from tests import tiny_models

LLAMA_2 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
    "pretraining_tp": 1,
    "rope_scaling": None,
}
LLAMA_31_ROPE = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    reference = tiny_models.config(family)
    reference.save_pretrained(tmp_path)
    hf = HFModelConfig.load(tmp_path)
    assert hf.model_type == family
    assert hf.num_layers == reference.num_hidden_layers and hf.hidden_size == reference.hidden_size
    assert hf.ffn_hidden_size == reference.intermediate_size and hf.vocab_size == reference.vocab_size
    assert (hf.num_heads, hf.num_kv_heads) == (reference.num_attention_heads, reference.num_key_value_heads)
    assert hf.head_dim == {"llama": 16, "qwen2": 16, "qwen3": 24}[family]
    assert hf.rms_norm_eps == reference.rms_norm_eps and hf.tied_embeddings == reference.tie_word_embeddings
    assert (hf.qkv_bias, hf.qk_norm) == (family == "qwen2", family == "qwen3")
    assert hf.eos_token_ids == (2,)


def test_old_and_new_rope_keys_say_the_same() -> None:
    old = HFModelConfig.from_dict(LLAMA_2 | LLAMA_31_ROPE)
    scaling = dict(LLAMA_31_ROPE["rope_scaling"])
    new = HFModelConfig.from_dict(LLAMA_2 | {"rope_parameters": scaling | {"rope_theta": 500000.0}})
    assert old == new and old.rope.theta == 500000.0 and old.rope.type == "llama3"
    assert HFModelConfig.from_dict(LLAMA_2).rope.theta == 10000.0


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 7.0,
             "original_max_position_embeddings": 512},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    ],
)  # fmt: skip
def test_inverse_frequencies_equal_transformers(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    reference = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    expected, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](reference, torch.device("cpu"))
    actual = inverse_frequencies(HFModelConfig.from_dict(json.loads(reference.to_json_string(use_diff=False))))
    assert attention_factor == 1.0 and actual.shape == (64,)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gpt2"}, "supported are llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type None"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding_window"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_refuses_by_name(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        HFModelConfig.from_dict(LLAMA_2 | change)


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        HFModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        HFModelConfig.load(tmp_path)


def test_an_inactive_window_is_accepted() -> None:
    hf = HFModelConfig.from_dict(LLAMA_2 | {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False})
    assert hf.qkv_bias


def test_padded_vocab_size_is_the_smallest_that_fits() -> None:
    for vocab in (1, 99, 515, 49152):
        for tp in (1, 2, 3, 8):
            for multiple in (1, 8):
                padded = padded_vocab_size(vocab, tp, multiple)
                brute = next(n for n in range(vocab, vocab + tp * multiple) if n % tp == 0 and n // tp % multiple == 0)
                assert padded == brute


def test_layouts_that_do_not_fit() -> None:
    hf = HFModelConfig.from_dict(
        LLAMA_2 | {"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}
    )
    check_layout(hf, ParallelLayout(pipeline=3, virtual_pipeline=2))
    with pytest.raises(ValueError, match=r"9 attention heads .* parallel\.tensor = 2"):
        check_layout(hf, ParallelLayout(tensor=2))
    with pytest.raises(ValueError, match="30 layers do not divide"):
        check_layout(hf, ParallelLayout(pipeline=4))
    with pytest.raises(ValueError, match="sequence_parallel needs tensor"):
        ParallelLayout(sequence_parallel=True)
    with pytest.raises(ValueError, match="virtual_pipeline"):
        ParallelLayout(virtual_pipeline=2)
    assert ParallelLayout(tensor=2, pipeline=3, context=4, data=5).world_size == 120


def test_reading_a_configuration_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2))
    code = (
        "import sys; from drpo_megatron.models.hf_config import HFModelConfig; "
        f"HFModelConfig.load({str(tmp_path)!r}); assert not {{'torch', 'megatron', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

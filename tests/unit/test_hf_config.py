"""config.json → HFModelConfig: transformers' own configurations are the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from drpo_megatron.models.flops import training_flops
from drpo_megatron.models.hf_config import HFModelConfig, check_layout, padded_vocab_size
from drpo_megatron.models.rope import inverse_frequencies
from drpo_megatron.platform.layout import ParallelLayout
from tests.support import tiny_models

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
        ({"model_type": "gpt2"}, "supported are llama, qwen2, qwen3, qwen3_moe, deepseek_v3, mistral, mixtral, gemma"),
        ({"model_type": None}, "model_type None"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window = 4096"),
        ({"model_type": "mistral"}, "sliding_window = 4096"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"num_attention_heads": 12}, "num_attention_heads = 12"),
        ({"head_dim": 15}, "head_dim = 15"),
        ({"hidden_size": "4096"}, "hidden_size = '4096'.*integer"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0.*at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1.*at least 1"),
        ({"rms_norm_eps": True}, "rms_norm_eps = True.*number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false'.*true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'.*object"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_refuses_by_name(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        HFModelConfig.from_dict(LLAMA_2 | change)


def _saved(family: str, **change: Any) -> dict[str, Any]:
    """A tiny configuration as transformers writes it, with changes."""
    return json.loads(tiny_models.config(family).to_json_string(use_diff=False)) | change


def test_experts_and_latents_agree_with_transformers() -> None:
    from transformers import AutoModelForCausalLM

    for family in ("qwen3_moe", "deepseek_v3"):
        reference = tiny_models.config(family)
        hf = HFModelConfig.from_dict(_saved(family))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(reference)
        moe = hf.moe
        assert moe is not None
        assert moe.layers == tuple(hasattr(layer.mlp, "experts") for layer in model.model.layers)
        assert {True, False} == set(moe.layers)
        experts = model.model.layers[3].mlp.experts
        assert experts.down_proj.shape == (moe.num_experts, hf.hidden_size, moe.ffn_hidden_size)
        assert moe.top_k == reference.num_experts_per_tok and moe.normalize
        assert [hf.is_moe_layer(i) for i in range(4)] == list(moe.layers)
        if family == "qwen3_moe":
            assert hf.qk_norm and hf.mla is None and hf.head_dim == 24 and hf.num_mtp_layers == 0
            assert (moe.score_function, moe.expert_bias, moe.num_groups) == ("softmax", False, None)
            assert (moe.scaling_factor, moe.shared_ffn_hidden_size) == (1.0, 0)
            continue
        shared = model.model.layers[3].mlp.shared_experts
        assert shared.gate_proj.weight.shape == (moe.shared_ffn_hidden_size, hf.hidden_size)
        assert (moe.score_function, moe.expert_bias, moe.scaling_factor) == ("sigmoid", True, 1.7)
        assert (moe.num_groups, moe.topk_groups, hf.num_mtp_layers) == (4, 2, 1)
        attention, mla = model.model.layers[3].self_attn, hf.mla
        assert mla is not None and hf.head_dim == mla.qk_head_dim == attention.qk_head_dim == 24
        assert attention.q_a_proj.weight.shape == (mla.q_lora_rank, hf.hidden_size)
        assert attention.kv_a_proj_with_mqa.weight.shape[0] == mla.kv_lora_rank + mla.qk_rope_head_dim
        assert attention.kv_b_proj.weight.shape[0] == hf.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        assert (hf.rope.type, hf.rope.factor, hf.rope.mscale, hf.rope.mscale_all_dim) == ("yarn", 8.0, 0.7, 1.3)


def test_published_expert_configurations() -> None:
    """The files of the published models, whose keys are older than those that transformers writes."""
    configs = Path(__file__).parents[1] / "data" / "hf_configs"
    qwen = HFModelConfig.load(configs / "qwen3-30b-a3b")
    assert qwen.moe is not None and all(qwen.moe.layers)
    assert (qwen.moe.num_experts, qwen.moe.top_k, qwen.moe.ffn_hidden_size, qwen.head_dim) == (128, 8, 768, 128)
    deepseek = HFModelConfig.load(configs / "deepseek-v3-671b")
    assert deepseek.moe is not None and deepseek.moe.layers == (False,) * 3 + (True,) * 58
    assert (deepseek.moe.num_groups, deepseek.moe.topk_groups, deepseek.moe.scaling_factor) == (8, 4, 2.5)
    assert (deepseek.rope.type, deepseek.rope.factor, deepseek.rope.mscale_all_dim) == ("yarn", 40, 1.0)
    assert (deepseek.head_dim, deepseek.num_mtp_layers, deepseek.moe.shared_ffn_hidden_size) == (192, 1, 2048)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("family", "change", "word"),
    [
        ("qwen3_moe", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("qwen3_moe", {"num_local_experts": None}, "num_experts is missing"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "9 of 8 experts"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1.*no gradient"),
        ("qwen3_moe", {"rope_parameters": YARN}, "rope_type 'yarn' is not supported for qwen3_moe"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("deepseek_v3", {"num_experts_per_tok": 6}, "topk_group = 2.*two experts a group"),
        ("deepseek_v3", {"n_group": 3}, "16 experts do not divide"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "supported are default, yarn"),
        ("deepseek_v3", {"rope_parameters": YARN | {"factor": None}}, "needs factor"),
        ("deepseek_v3", {"rope_parameters": YARN | {"attention_factor": 1.2}}, "attention_factor = 1.2"),
        ("deepseek_v3", {"rope_parameters": YARN | {"truncate": False}}, "truncate = False"),
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 0.7}}, "mscale = 0.7"),
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale_all_dim": 1.0}}, "mscale_all_dim = 1.0"),
    ],
)
def test_experts_and_latents_refuse_by_name(family: str, change: dict[str, Any], word: str) -> None:
    HFModelConfig.from_dict(_saved(family))
    with pytest.raises(ValueError, match=word):
        HFModelConfig.from_dict(_saved(family, **change))


def test_training_flops_count_the_weights_a_token_meets() -> None:
    from transformers import AutoModelForCausalLM

    for family in ("qwen3", "qwen3_moe", "deepseek_v3"):
        reference = tiny_models.config(family)
        hf = HFModelConfig.from_dict(_saved(family))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(reference)
        met = 0.0
        for name, parameter in model.model.named_parameters():
            share = hf.moe.top_k / hf.moe.num_experts if hf.moe and ".mlp.experts." in name else 1
            met += share * parameter.numel() if parameter.dim() > 1 and "embed_tokens" not in name else 0
        # Of a sequence of one token the attention products are all that is left.
        value_dim = hf.mla.v_head_dim if hf.mla else hf.head_dim
        products = hf.num_layers * hf.num_heads * (hf.head_dim + value_dim) / 2
        head = hf.hidden_size * hf.vocab_size
        assert training_flops(hf, [1] * 10, 3) == pytest.approx(6 * (10 * met + 10 * products + 3 * head))
        longer = training_flops(hf, [10], 3) - training_flops(hf, [1] * 10, 3)
        assert longer == pytest.approx(6 * (100 - 10) * products)


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        HFModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        HFModelConfig.load(tmp_path)


def test_an_inactive_window_is_accepted() -> None:
    window = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
    hf = HFModelConfig.from_dict(LLAMA_2 | window | {"model_type": "qwen2", "num_key_value_heads": 32})
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
        LLAMA_2 | {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "num_hidden_layers": 30}
    )
    check_layout(hf, ParallelLayout(pipeline=3, virtual_pipeline=2))
    with pytest.raises(ValueError, match=r"9 attention heads .* parallel\.tensor = 2"):
        check_layout(hf, ParallelLayout(tensor=2))
    with pytest.raises(ValueError, match="30 layers do not divide"):
        check_layout(hf, ParallelLayout(pipeline=4))
    with pytest.raises(ValueError, match=r"sequence_parallel .* parallel\.tensor = 1"):
        ParallelLayout(sequence_parallel=True)
    with pytest.raises(ValueError, match="virtual_pipeline"):
        ParallelLayout(virtual_pipeline=2)
    assert ParallelLayout(tensor=2, pipeline=3, context=4, data=5).world_size == 120


def test_expert_layouts_that_do_not_fit() -> None:
    qwen, deepseek = (HFModelConfig.from_dict(_saved(family)) for family in ("qwen3_moe", "deepseek_v3"))
    check_layout(qwen, ParallelLayout(data=8, expert=4, expert_tensor=2))
    check_layout(deepseek, ParallelLayout(tensor=4, sequence_parallel=True, expert=4, data=2))
    for hf, layout, word in (
        (qwen, ParallelLayout(data=16, expert=16), r"8 experts .* parallel\.expert = 16"),
        (qwen, ParallelLayout(data=16, expert_tensor=16), r"40 MLP columns of an expert .*expert_tensor = 16"),
        (qwen, ParallelLayout(tensor=2), r"parallel\.tensor is 2 .*sequence_parallel"),
        (HFModelConfig.from_dict(LLAMA_2), ParallelLayout(data=2, expert=2), "expert is 2 and llama is dense"),
        (HFModelConfig.from_dict(LLAMA_2), ParallelLayout(data=2, expert_tensor=2), "expert_tensor is 2 and llama"),
        (
            HFModelConfig.from_dict(_saved("deepseek_v3", moe_intermediate_size=25, n_shared_experts=1)),
            ParallelLayout(tensor=2, sequence_parallel=True),
            r"25 MLP columns of the shared experts .* parallel\.tensor = 2",
        ),
    ):
        with pytest.raises(ValueError, match=word):
            check_layout(hf, layout)

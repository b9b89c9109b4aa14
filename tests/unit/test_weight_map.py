"""The rules of the weight map, against plain matrix products, and the files they are read from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from drpo_megatron.models.families import FAMILIES
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.models.recipes import ensure_model
from drpo_megatron.weights.families import expert_of, global_name, weight_table
from drpo_megatron.weights.hf_io import SafetensorsReader, SafetensorsWriter, check_names
from drpo_megatron.weights.map import (
    ColumnSharded,
    FusedQKV,
    GatedMLP,
    Replicated,
    RowSharded,
    VocabEmbedding,
    WeightRule,
)
from tests.support import tiny_models

HIDDEN = 6


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


Case = tuple[WeightRule, dict[str, torch.Tensor]]

COLUMN: Case = (ColumnSharded("c"), {"c": _random(12, HIDDEN)})
ROW: Case = (RowSharded("r"), {"r": _random(HIDDEN, 12)})
QKV: Case = (
    FusedQKV("q", "k", "v", num_heads=8, num_kv_heads=4, head_dim=3),
    {"q": _random(24, HIDDEN), "k": _random(12, HIDDEN), "v": _random(12, HIDDEN) + 1},
)
QKV_BIAS: Case = (FusedQKV("q", "k", "v", 8, 4, 3), {"q": _random(24), "k": _random(12), "v": _random(12) + 1})
GATED: Case = (GatedMLP("g", "u"), {"g": _random(12, HIDDEN), "u": _random(12, HIDDEN) + 1})
VOCABULARY: Case = (VocabEmbedding("e", vocab_size=13, padded_size=32), {"e": _random(13, HIDDEN)})
RULES: list[Case] = [(Replicated("n"), {"n": _random(HIDDEN)}), COLUMN, ROW, QKV, QKV_BIAS, GATED, VOCABULARY]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("rule", "tensors"), RULES, ids=lambda x: type(x).__name__ if not isinstance(x, dict) else "")
def test_round_trip_is_exact(rule: WeightRule, tensors: dict[str, torch.Tensor], tp: int) -> None:
    shards = [rule.from_hf(tensors, rank, tp) for rank in range(tp)]
    assert len({s.shape for s in shards}) == 1 and all(s.is_contiguous() for s in shards)
    back = rule.to_hf(shards)
    assert tuple(back) == rule.hf_names == tuple(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)


def test_fused_qkv_gives_each_group_its_heads() -> None:
    """SelfAttention.get_query_key_value_tensors splits each group of the fused output into queries, key, value."""
    rule, tensors = QKV
    x_TH = _random(5, HIDDEN)
    queries, keys, values = (F.linear(x_TH, tensors[n]).unflatten(-1, (-1, 3)) for n in "qkv")
    for tp in (1, 2, 4):
        for rank in range(tp):
            groups = 4 // tp
            mixed = F.linear(x_TH, rule.from_hf(tensors, rank, tp)).view(5, groups, 4, 3)
            query, key, value = mixed.split((2, 1, 1), dim=2)
            mine = slice(rank * groups, (rank + 1) * groups)
            torch.testing.assert_close(query.flatten(1, 2), queries[:, 2 * rank * groups : 2 * (rank + 1) * groups])
            torch.testing.assert_close(key.squeeze(2), keys[:, mine])
            torch.testing.assert_close(value.squeeze(2), values[:, mine])


def test_sharded_mlp_computes_the_whole_one() -> None:
    gated, up_gate = GATED
    row, down = ROW
    x_TH = _random(5, HIDDEN)
    expected = F.linear(F.silu(F.linear(x_TH, up_gate["g"])) * F.linear(x_TH, up_gate["u"]), down["r"])
    total = torch.zeros_like(expected)
    for rank in range(2):
        gate, up = F.linear(x_TH, gated.from_hf(up_gate, rank, 2)).chunk(2, dim=-1)
        total += F.linear(F.silu(gate) * up, row.from_hf(down, rank, 2))
    torch.testing.assert_close(total, expected)


def test_padding_is_zero_and_never_exported() -> None:
    rule, tensors = VOCABULARY
    shards = [rule.from_hf(tensors, rank, 4) for rank in range(4)]
    assert torch.cat(shards)[13:].abs().max() == 0 and torch.cat(shards).shape == (32, HIDDEN)
    shards[-1].fill_(7.0)
    assert torch.equal(rule.to_hf(shards)["e"], tensors["e"])


@pytest.mark.parametrize(
    ("rule", "tensors", "word"),
    [
        (GatedMLP("g", "u"), {n: torch.zeros(9, 2) for n in "gu"}, "g: 9 rows"),
        (RowSharded("r"), {"r": torch.zeros(2, 9)}, "r: 9 columns"),
        (FusedQKV("q", "k", "v", 8, 4, 3), {n: torch.zeros(12, 2) for n in "qkv"}, "q: 12 rows.* 8 heads × 3"),
        (FusedQKV("q", "k", "v", 9, 3, 3), {n: torch.zeros(27, 2) for n in "qkv"}, "3 key-value heads"),
        (VocabEmbedding("e", 13, 16), {"e": torch.zeros(16, 2)}, "e: 16 rows.* vocab_size 13"),
    ],
)
def test_wrong_shapes_are_named(rule: WeightRule, tensors: dict[str, torch.Tensor], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        rule.from_hf(tensors, 0, 2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tables_hold_exactly_the_tensors_transformers_writes(family: str, tmp_path: Path) -> None:
    model = tiny_models.write(family, tmp_path)
    hf = HFModelConfig.load(tmp_path)
    table = weight_table(hf, 520)
    assert table.hf_names() == set(SafetensorsReader(tmp_path)) == set(load_file(tmp_path / "model.safetensors"))
    same = {} if hf.is_moe_layer(0) else {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
    if hf.mla is None:
        same["input_layernorm.weight"] = "self_attention.linear_qkv.layer_norm_weight"
    else:
        same["self_attention.q_layernorm.weight"] = "self_attention.linear_q_up_proj.layer_norm_weight"
        same["self_attention.kv_layernorm.weight"] = "self_attention.linear_kv_up_proj.layer_norm_weight"
    for plain, fused in same.items():
        assert table.rule(f"decoder.layers.0.{plain}") == table.rule(f"decoder.layers.0.{fused}")
        assert table.rule(f"decoder.layers.0.{plain}").hf_names[0].startswith("model.layers.0.")
    if hf.moe is not None:
        for fc in ("linear_fc1", "linear_fc2"):
            one = table.rule(f"decoder.layers.3.mlp.experts.local_experts.7.{fc}.weight")
            assert one == table.rule(f"decoder.layers.3.mlp.experts.{fc}.weight7")
            moe = FAMILIES[family].names.moe
            assert one.hf_names[0].startswith(f"model.layers.3.{moe}.experts.7.")
        with pytest.raises(KeyError, match=r"decoder\.layers\.3\.mlp\.linear_fc1\.weight"):
            table.rule("decoder.layers.3.mlp.linear_fc1.weight")
    assert table.rule("output_layer.weight").exported is not model.config.tie_word_embeddings
    if not hf.is_moe_layer(0):
        with pytest.raises(KeyError, match=r"decoder\.layers\.0\.mlp\.router\.weight"):
            table.rule("decoder.layers.0.mlp.router.weight")
    assert global_name("decoder.layers.1.mlp.linear_fc2.weight", 6) == "decoder.layers.7.mlp.linear_fc2.weight"
    assert global_name("decoder.final_layernorm.weight", 6) == "decoder.final_layernorm.weight"


def test_experts_are_numbered_over_the_whole_model() -> None:
    for local, whole in {
        "decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight": (
            "decoder.layers.7.mlp.experts.local_experts.34.linear_fc2.weight"
        ),
        "decoder.layers.1.mlp.experts.linear_fc1.weight11": "decoder.layers.7.mlp.experts.linear_fc1.weight43",
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight": (
            "decoder.layers.7.mlp.shared_experts.linear_fc1.weight"
        ),
        "decoder.layers.1.mlp.router.weight": "decoder.layers.7.mlp.router.weight",
    }.items():
        assert global_name(local, 6, 32) == whole
    assert expert_of("decoder.layers.7.mlp.experts.local_experts.34.linear_fc2.weight") == 34
    assert expert_of("decoder.layers.7.mlp.experts.linear_fc1.weight43") == 43
    assert expert_of("decoder.layers.7.mlp.shared_experts.linear_fc1.weight") is None
    assert expert_of("decoder.layers.7.mlp.linear_fc1.weight") is None


def test_prediction_layers_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    tiny_models.config("deepseek_v3").save_pretrained(tmp_path)
    table = weight_table(HFModelConfig.load(tmp_path), 520)
    names = table.hf_names()
    check_names(
        tmp_path, names | {"model.layers.4.eh_proj.weight", "model.layers.4.mlp.gate.weight"}, table, tied=False
    )
    for unknown in ("model.layers.5.eh_proj.weight", "model.layers.3.eh_proj.weight"):
        with pytest.raises(ValueError, match=unknown):
            check_names(tmp_path, names | {unknown}, table, tied=False)


def test_stacked_experts_are_refused_by_name(tmp_path: Path) -> None:
    """As transformers holds them in memory. No file has been seen with them."""
    model = tiny_models.write("mixtral", tmp_path)
    table = weight_table(HFModelConfig.load(tmp_path), 520)
    held = {name for name, _ in model.named_parameters()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in held
    with pytest.raises(
        ValueError, match=r"missing tensors .*block_sparse_moe.* without a place .*mlp\.experts\.down_proj"
    ):
        check_names(tmp_path, held, table, tied=False)


def test_names_that_may_be_ignored(tmp_path: Path) -> None:
    tiny_models.config("qwen2").save_pretrained(tmp_path)
    table = weight_table(HFModelConfig.load(tmp_path), 520)
    names = table.hf_names()
    check_names(tmp_path, names | {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}, table, tied=True)
    with pytest.raises(ValueError, match=r"missing tensors none; .* lm_head\.weight"):
        check_names(tmp_path, names | {"lm_head.weight"}, table, tied=False)


def test_reader_and_writer(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    (source / "tokenizer.json").write_text("{}")
    tensors = {f"t{i}": _random(4, i + 1) for i in range(5)}
    writer = SafetensorsWriter(out, source, max_shard_bytes=100)
    assert not out.exists()
    shared = torch.cat([tensors["t0"], tensors["t1"]], dim=1)
    writer.add([("t0", shared[:, :1]), ("t1", shared[:, 1:])])
    shared.zero_()
    writer.add([(name, tensors[name]) for name in ("t2", "t3", "t4")])
    writer.commit()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert (out / "tokenizer.json").read_text() == "{}"
    assert len(list(out.glob("model-*-of-00003.safetensors"))) == 3
    reader = SafetensorsReader(out)
    assert sorted(reader) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader[name][:], tensor) and torch.equal(reader[name][:, 1:], tensor[:, 1:])
    with pytest.raises(FileExistsError, match="remove it"):
        SafetensorsWriter(out, source, 100)
    (out / "model-00002-of-00003.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors cannot be read \(tensor t3"):
        SafetensorsReader(out)["t3"]
    with pytest.raises(FileNotFoundError, match="neither"):
        SafetensorsReader(source)
    save_file({"moved": torch.zeros(1)}, out / "model-00002-of-00003.safetensors")
    with pytest.raises(ValueError, match="t3"):
        SafetensorsReader(out)["t3"]


def test_ensure_model_is_made_once_and_checked(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = ensure_model("tiny_qwen3", tmp_path / "m", seed=3)
    assert HFModelConfig.load(path).qk_norm
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert ensure_model("tiny_qwen3", path, seed=3) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    again = ensure_model("tiny_qwen3", tmp_path / "again", seed=3)
    other = ensure_model("tiny_qwen3", tmp_path / "other", seed=4)
    first, second, third = (load_file(p / "model.safetensors") for p in (path, again, other))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])
    with pytest.raises(FileExistsError, match="seed 4"):
        ensure_model("tiny_qwen3", path, seed=4)
    with pytest.raises(ValueError, match="known are tiny_qwen3, tiny_qwen3_blocks, tiny_qwen3_moe, smollm2_135m"):
        ensure_model("nope", tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "m", "other"]

    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "What is 12 + 30?\nAnswer: 42 {~}"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    chat_ids = tokenizer.encode(chat)
    assert chat_ids[0] == 1 and chat_ids.count(2) == 1 and tokenizer.eos_token_id == 2 and max(chat_ids) < 128

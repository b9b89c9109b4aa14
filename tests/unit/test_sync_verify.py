"""Expected checksums: the server's fused and sharded parameters, built here by hand, and every way they can differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from drpo_megatron.sync.verify import ExpectedChecksums, ServerLayout, SyncMismatch, tensor_checksum

CPU = torch.device("cpu")
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, EXPERTS = 8, 4, 2, 4, 12, 100, 3
LAYER = "model.layers.0."


def dense() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    attention, mlp = LAYER + "self_attn.", LAYER + "mlp."
    return {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN),
        attention + "q_proj.weight": torch.randn(HEADS * HEAD_DIM, HIDDEN),
        attention + "k_proj.weight": torch.randn(KV_HEADS * HEAD_DIM, HIDDEN),
        attention + "v_proj.weight": torch.randn(KV_HEADS * HEAD_DIM, HIDDEN),
        attention + "q_proj.bias": torch.randn(HEADS * HEAD_DIM),
        attention + "k_proj.bias": torch.randn(KV_HEADS * HEAD_DIM),
        attention + "v_proj.bias": torch.randn(KV_HEADS * HEAD_DIM),
        attention + "q_norm.weight": torch.randn(HEAD_DIM),
        attention + "o_proj.weight": torch.randn(HIDDEN, HEADS * HEAD_DIM),
        mlp + "gate_proj.weight": torch.randn(FFN, HIDDEN),
        mlp + "up_proj.weight": torch.randn(FFN, HIDDEN),
        mlp + "down_proj.weight": torch.randn(HIDDEN, FFN),
        "model.norm.weight": torch.randn(HIDDEN),
        "lm_head.weight": torch.randn(VOCAB, HIDDEN),
    }


def served(hf: dict[str, torch.Tensor], tp: int) -> list[dict[str, torch.Tensor]]:
    """The parameters of each rank of a server, with explicit indices."""
    attention, mlp = LAYER + "self_attn.", LAYER + "mlp."
    ranks = []
    for rank in range(tp):
        out: dict[str, torch.Tensor] = {}
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            padded = torch.zeros(128, HIDDEN)
            padded[:VOCAB] = hf[name]
            out[name] = padded.reshape(tp, 128 // tp, HIDDEN)[rank]
        for kind in ("weight", "bias"):
            pieces = []
            for letter, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                by_head = hf[f"{attention}{letter}_proj.{kind}"].unflatten(0, (heads, HEAD_DIM))
                mine = [int(h * heads / HEADS) for h in range(rank * HEADS // tp, (rank + 1) * HEADS // tp)]
                pieces.append(by_head[sorted(set(mine))].flatten(0, 1))
            out[f"{attention}qkv_proj.{kind}"] = torch.cat(pieces)
        columns = slice(rank * HEADS * HEAD_DIM // tp, (rank + 1) * HEADS * HEAD_DIM // tp)
        out[attention + "o_proj.weight"] = hf[attention + "o_proj.weight"][:, columns]
        part = slice(rank * FFN // tp, (rank + 1) * FFN // tp)
        gate, up = hf[mlp + "gate_proj.weight"], hf[mlp + "up_proj.weight"]
        out[mlp + "gate_up_proj.weight"] = torch.cat([gate[part], up[part]])
        out[mlp + "down_proj.weight"] = hf[mlp + "down_proj.weight"][:, part]
        for name in (attention + "q_norm.weight", "model.norm.weight"):
            out[name] = hf[name]
        ranks.append(out)
    return ranks


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def expect(hf: dict[str, torch.Tensor], tp: int, dtype: torch.dtype = torch.float32) -> ExpectedChecksums:
    expected = ExpectedChecksums(ServerLayout(tp, dtype, KV_HEADS, EXPERTS), CPU)
    for name, tensor in hf.items():
        expected.add(name, tensor)
    return expected


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_checksums_are_those_of_the_served_parameters(tp: int) -> None:
    hf = dense()
    reported = [{name: sha(tensor) for name, tensor in rank.items()} for rank in served(hf, tp)]
    assert expect(hf, tp).verify(reported) == len(reported[0]) == 9
    assert expect(dict(reversed(hf.items())), tp).verify(reported) == 9


@pytest.mark.parametrize("tp", [1, 2])
def test_one_changed_element_of_any_tensor_is_found_and_named(tp: int) -> None:
    reported = [{name: sha(tensor) for name, tensor in rank.items()} for rank in served(dense(), tp)]
    for name in dense():
        for index in (0, -1):
            hf = dense()
            flat = hf[name].view(-1)
            flat[index] = torch.nextafter(flat[index], torch.tensor(9.0))
            with pytest.raises(SyncMismatch, match="values differ") as caught:
                expect(hf, tp).verify(reported)
            assert name in caught.value.names and len(caught.value.names) <= 3


def test_a_padded_intermediate_size() -> None:
    mlp = LAYER + "mlp."
    hf = {name: tensor for name, tensor in dense().items() if name.startswith(mlp)}
    reported = []
    for rank in (0, 1):  # 12 columns are padded to 20 and divided by two
        gate_up, down = torch.zeros(20, HIDDEN), torch.zeros(HIDDEN, 10)
        for column in range(10 * rank, min(10 * rank + 10, FFN)):
            gate_up[column - 10 * rank] = hf[mlp + "gate_proj.weight"][column]
            gate_up[10 + column - 10 * rank] = hf[mlp + "up_proj.weight"][column]
            down[:, column - 10 * rank] = hf[mlp + "down_proj.weight"][:, column]
        reported.append({mlp + "gate_up_proj.weight": sha(gate_up), mlp + "down_proj.weight": sha(down)})
    expected = ExpectedChecksums(ServerLayout(2, torch.float32, KV_HEADS, feed_forward_multiple=20), CPU)
    for name, tensor in hf.items():
        expected.add(name, tensor)
    assert expected.verify(reported) == 2


def test_the_server_dtype_counts() -> None:
    hf = dense()
    half = {name: tensor.bfloat16() for name, tensor in hf.items()}
    reported = [{name: tensor_checksum(tensor) for name, tensor in rank.items()} for rank in served(half, 1)]
    embedding = torch.zeros(128, HIDDEN, dtype=torch.bfloat16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        embedding[:VOCAB] = half[name]
        reported[0][name] = tensor_checksum(embedding)
    assert expect(hf, 1, torch.bfloat16).verify(reported) == 9


def test_checksummed_memory_can_still_be_freed() -> None:
    """numpy's view of a tensor would fix its storage for good."""
    weight = torch.randn(8, 4)
    tensor_checksum(weight)
    weight.untyped_storage().resize_(0)
    assert weight.untyped_storage().nbytes() == 0


def test_experts_are_stacked() -> None:
    prefix = LAYER + "mlp.experts."
    shapes = {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}
    hf = {f"{prefix}{e}.{p}_proj.weight": torch.randn(*shapes[p]) for e in range(EXPERTS) for p in shapes}

    def stacked(rank: int) -> dict[str, str]:
        part = slice(rank * FFN // 2, (rank + 1) * FFN // 2)
        w13 = torch.empty(EXPERTS, FFN, HIDDEN)
        w2 = torch.empty(EXPERTS, HIDDEN, FFN // 2)
        for e in range(EXPERTS):
            w13[e, : FFN // 2] = hf[f"{prefix}{e}.gate_proj.weight"][part]
            w13[e, FFN // 2 :] = hf[f"{prefix}{e}.up_proj.weight"][part]
            w2[e] = hf[f"{prefix}{e}.down_proj.weight"][:, part]
        return {prefix + "w13_weight": sha(w13), prefix + "w2_weight": sha(w2)}

    reported = [stacked(0), stacked(1)]
    assert expect(hf, 2).verify(reported) == 2
    changed = f"{prefix}1.up_proj.weight"
    hf[changed] = hf[changed] + 1
    with pytest.raises(SyncMismatch) as caught:
        expect(hf, 2).verify(reported)
    assert changed in caught.value.names and not any("down" in name for name in caught.value.names)


def test_experts_have_the_names_of_their_family() -> None:
    """Mixtral's w1, w3 and w2 are gate, up and down: the same parameter with the same bits."""
    tensors = {part: torch.randn(EXPERTS, 8, 8) for part in ("gate_proj", "up_proj", "down_proj")}
    checksums = []
    for names in ({}, {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}):
        expected = ExpectedChecksums(ServerLayout(2, torch.float32, KV_HEADS, EXPERTS), CPU)
        for part, stacked in tensors.items():
            for expert in range(EXPERTS):
                expected.add(f"{LAYER}moe.experts.{expert}.{names.get(part, part)}.weight", stacked[expert])
        checksums.append(expected._checksums)
    assert checksums[0] == checksums[1] and len(checksums[0][0]) == 2
    assert checksums[0][0] != checksums[0][1]


def test_the_server_adds_one_to_zero_centred_norms(tmp_path: Path) -> None:
    shape = {"num_attention_heads": 4, "num_key_value_heads": KV_HEADS}
    weight = torch.randn(8).to(torch.bfloat16)
    for model_type, held in (("gemma", weight + 1), ("llama", weight)):
        (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": model_type}))
        expected = ExpectedChecksums(ServerLayout.from_config(tmp_path, 1, torch.bfloat16), CPU)
        expected.add("model.norm.weight", weight)
        assert expected.verify([{"model.norm.weight": tensor_checksum(held)}]) == 1


def test_tied_embeddings_may_be_sent_and_listed_or_not() -> None:
    hf = dense()
    hf["lm_head.weight"] = hf["model.embed_tokens.weight"]
    (both,) = [{name: sha(tensor) for name, tensor in rank.items()} for rank in served(hf, 1)]
    one = {name: checksum for name, checksum in both.items() if name != "lm_head.weight"}
    without = {name: tensor for name, tensor in hf.items() if name != "lm_head.weight"}
    for sent in (hf, without):
        for reported in (both, one):
            assert expect(sent, 1).verify([reported]) >= 8


def test_missing_extra_and_partial_tensors_are_named() -> None:
    hf = dense()
    (reported,) = [{name: sha(tensor) for name, tensor in rank.items()} for rank in served(hf, 1)]
    norm, up = "model.norm.weight", LAYER + "mlp.up_proj.weight"
    with pytest.raises(SyncMismatch, match="not sent") as caught:
        expect({n: t for n, t in hf.items() if n != norm}, 1).verify([reported])
    assert caught.value.names == [norm]
    with pytest.raises(SyncMismatch, match="no such parameters") as caught:
        expect(hf | {"model.extra.weight": torch.ones(1)}, 1).verify([reported])
    assert caught.value.names == ["model.extra.weight"]
    with pytest.raises(SyncMismatch, match="only a part") as caught:
        expect({n: t for n, t in hf.items() if n != up}, 1).verify([reported])
    assert caught.value.names == [LAYER + "mlp.gate_proj.weight"]
    with pytest.raises(SyncMismatch, match="1 ranks reported"):
        expect(hf, 2).verify([reported])


def test_a_tensor_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        expect({LAYER + "mlp.down_proj.weight": torch.randn(4, 7)}, 2)

"""FP8 rollouts without a server: rounding, which layers, what is sent, its checksums, the audit and the refusals."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drpo_megatron.config import rollout_checks
from drpo_megatron.config.checks import check_config
from drpo_megatron.config.load import ConfigError
from drpo_megatron.config.schema import Fp8Config, RunConfig
from drpo_megatron.fp8 import audit, server_report
from drpo_megatron.fp8.groups import quantize_groups, round_groups
from drpo_megatron.fp8.rollout import RolloutWeights, server_model, server_settings
from drpo_megatron.fp8.selection import Selection
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.rollout.errors import ServerError
from drpo_megatron.sync.verify import ExpectedChecksums, ServerLayout, SyncMismatch
from drpo_megatron.weights.families import weight_table
from drpo_megatron.weights.hf_io import SafetensorsReader
from tests.support import tiny_models
from tests.support.updates import run_config

# e4m3: four bits of exponent with bias 7, three of mantissa, and no infinity.
E4M3 = np.array(
    sorted(
        (1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6 for e in range(16) for m in range(8) if (e, m) != (15, 7)
    )
)


def nearest_e4m3(value: float) -> float:
    """Ties go to the even mantissa, which has the even place in the list."""
    distance = np.abs(E4M3 - min(abs(value), 448.0))
    near = np.flatnonzero(distance == distance.min())
    return float(np.copysign(E4M3[near[near % 2 == 0][0] if len(near) > 1 else near[0]], value))


def rounded_by_hand(row_K: np.ndarray) -> np.ndarray:
    out = np.empty(len(row_K), np.float32)
    for start in range(0, len(row_K), 128):
        group = row_K[start : start + 128].astype(np.float32)
        largest = max(np.float32(np.abs(group).max()), np.float32(1e-10))
        factor, scale = np.float32(448) / largest, largest * np.float32(1 / 448)
        out[start : start + 128] = [np.float32(nearest_e4m3(float(v * factor))) * scale for v in group]
    return out


def cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=300).astype(np.float32)
    outlier = normal.copy()
    outlier[5] = 1e4
    ties = np.linspace(0, 448, 128 * 7 + 1, dtype=np.float32)
    return {
        "normal": normal,
        "one group": normal[:128],
        "shorter than a group": normal[:40],
        "an outlier": outlier,
        "zeros": np.zeros(130, np.float32),
        "a group of zeros": np.concatenate([np.zeros(128, np.float32), normal]),
        "below the smallest maximum": np.full(128, 1e-12, np.float32),
        "subnormals": (normal * 1e-40).astype(np.float32),
        "exact and between": ties,
        "448 and 449": np.array([448, 449, -449, 1], np.float32),
        "large": (normal * 1e37).astype(np.float32),
    }


@pytest.mark.parametrize("name", cases())
def test_groups_are_rounded_bit_for_bit(name: str) -> None:
    row_K = cases()[name]
    assert np.array_equal(round_groups(torch.from_numpy(row_K)).numpy(), rounded_by_hand(row_K))


def test_groups_of_other_dtypes_and_shapes() -> None:
    x = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    quantized, scales = quantize_groups(x)
    assert quantized.dtype == torch.float8_e4m3fn and quantized.shape == x.shape and scales.shape == (2, 3, 3)
    expected = torch.from_numpy(np.stack([rounded_by_hand(row.float().numpy()) for row in x.view(6, 300)]))
    assert torch.equal(round_groups(x), expected.view(2, 3, 300).bfloat16())
    assert round_groups(torch.tensor([1.0, torch.nan, 2.0])).isnan().any(), "NaN stays visible"


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "deepseek_v3"])
def test_which_tensors_of_a_model(family: str, tmp_path: Path) -> None:
    """Projections of attention, MLPs and experts, by a list of its own; layer 1 of 12 is not 10 or 11."""
    changes = {"num_hidden_layers": 12} | ({"mlp_only_layers": []} if family == "qwen3_moe" else {})
    tiny_models.write(family, tmp_path, **changes)
    hf, reader = HFModelConfig.load(tmp_path), SafetensorsReader(tmp_path)
    weights = Selection.of(Fp8Config(unquantized_first_layers=2), 12).hf_weights(
        weight_table(hf, hf.vocab_size), lambda name: reader[name].shape
    )
    kinds = re.compile(r"\.(?:[qkvo]|q_a|q_b|kv_b|gate|up|down)_proj\.weight$|\.kv_a_proj_with_mqa\.weight$")
    table = {n for n in reader if not re.match(r"model\.layers\.12\.", n)}
    assert set(weights) == table
    for name, quantized in weights.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        assert quantized == bool(layer and int(layer[1]) >= 2 and kinds.search(name)), name
    assert any(weights[n] for n in weights if ".layers.10." in n) and any(weights[n] for n in weights if ".11." in n)


def configuration(model: Path, **fp8: Any) -> RunConfig:
    raw = run_config(model, {}).model_dump()
    raw["fp8"] |= {"rollout": True, "backend": "emulate", "unquantized_first_layers": 1} | fp8
    raw["tracking"]["directory"] = model.parent / "runs"
    return RunConfig.model_validate(raw)


def test_what_is_sent(tmp_path: Path) -> None:
    model = tiny_models.write("qwen3", tmp_path / "model", hidden_size=160)
    tensors = model.state_dict()
    half = len(tensors) // 2
    named = list(tensors.items())
    buckets = [named[:half], named[half:]]
    config = configuration(tmp_path / "model", backend="transformer_engine")
    stored = RolloutWeights.of(config)
    product = RolloutWeights.of(configuration(tmp_path / "model"))
    assert stored and product
    sent: dict[str, torch.Tensor] = {}
    for bucket in stored.stream(iter(buckets)):
        dtypes = [tensor.dtype for _, tensor in bucket]
        # One flattened bucket has one dtype: weights, then float32. Mixed, each tensor would be a bucket of its own.
        assert sum(a != b for a, b in itertools.pairwise(dtypes)) == 1
        assert [n for n, _ in bucket][-1].endswith("_scale_inv") and dtypes[0] is torch.float8_e4m3fn
        sent |= dict(bucket)
    plain = dict(pair for bucket in product.stream(iter(buckets)) for pair in bucket)
    assert list(plain) == list(tensors)
    in_fp8 = 0
    for name, tensor in tensors.items():
        if re.search(r"layers\.[123]\..*proj\.weight", name):
            scales = sent[f"{name}_scale_inv"]
            spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]]
            assert scales.dtype == torch.float32 and sent[name].dtype == torch.float8_e4m3fn
            assert torch.equal(plain[name], sent[name].float() * spread) and not torch.equal(plain[name], tensor)
            in_fp8 += 1
        else:
            assert torch.equal(sent[name], tensor) and torch.equal(plain[name], tensor)
    assert in_fp8 == 3 * 7 and len(sent) == len(tensors) + in_fp8
    with pytest.raises(KeyError):
        list(stored.stream([[("model.layers.0.self_attn.extra.weight", torch.ones(2, 2))]]))


def test_the_model_that_servers_start_with(tmp_path: Path) -> None:
    tiny_models.write("qwen3", tmp_path / "model")
    for backend, method in (("emulate", "drpo_fp8_emulated"), ("transformer_engine", "fp8")):
        config = configuration(tmp_path / "model", backend=backend)
        weights = RolloutWeights.of(config)
        assert weights
        weights.write_model(config)
        weights.write_model(config)
        directory = server_model(config)
        assert not list(directory.glob("*.safetensors*")) and (directory / "tokenizer.json").is_file()
        quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
        assert quantization["quant_method"] == method and quantization["weight_block_size"] == [128, 128]
        kept = set(quantization["modules_to_not_convert"])
        assert "model.layers.0.mlp.up_proj" in kept and "lm_head" in kept and "model.layers.1.mlp.up_proj" not in kept
        assert server_settings(config).args["load_format"] == "dummy"
    without = configuration(tmp_path / "model", rollout=False)
    assert RolloutWeights.of(without) is None and server_model(without) == without.model.path


def served(sent: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, str]:
    """What SGLang reports of an FP8 attention and MLP: products in bfloat16, fused and divided."""
    prefix, whole = "model.layers.0.", {}
    for name in [n for n in sent if not n.endswith("_scale_inv")]:
        scales = sent[f"{name}_scale_inv"]
        product = sent[name].float() * torch.kron(scales, torch.ones(128, 128))
        whole[name.removeprefix(prefix).removesuffix("_proj.weight").split(".")[-1]] = product.bfloat16()

    def rows(part: str) -> torch.Tensor:
        return whole[part].chunk(ranks)[rank]

    parameters = {
        "self_attn.qkv_proj.weight": torch.cat([rows("q"), rows("k"), rows("v")]),
        "self_attn.o_proj.weight": whole["o"].chunk(ranks, dim=1)[rank],
        "mlp.gate_up_proj.weight": torch.cat([rows("gate"), rows("up")]),
        "mlp.down_proj.weight": whole["down"].chunk(ranks, dim=1)[rank],
    }
    return {
        prefix + name: hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        for name, t in parameters.items()
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_checksums_of_fp8_parameters(ranks: int) -> None:
    torch.manual_seed(0)
    shapes = {"self_attn.q": (512, 256), "self_attn.k": (256, 256), "self_attn.v": (256, 256)}
    shapes |= {"self_attn.o": (256, 512), "mlp.gate": (256, 256), "mlp.up": (256, 256), "mlp.down": (256, 256)}
    sent = {}
    for part, (out, columns) in shapes.items():
        name = f"model.layers.0.{part}_proj.weight"
        sent[name] = torch.randn(out, columns).to(torch.float8_e4m3fn)
        sent[f"{name}_scale_inv"] = torch.rand(out // 128, columns // 128) + 0.5
    reported = [served(sent, rank, ranks) for rank in range(ranks)]

    def expect(tensors: dict[str, torch.Tensor]) -> ExpectedChecksums:
        expected = ExpectedChecksums(ServerLayout(ranks, torch.bfloat16, 2), torch.device("cpu"))
        # As buckets come: weights, then scales.
        for name in sorted(tensors, key=lambda name: name.endswith("_scale_inv")):
            expected.add(name, tensors[name])
        return expected

    assert expect(sent).verify(reported) == 4
    scales = "model.layers.0.self_attn.k_proj.weight_scale_inv"
    changed = sent | {scales: sent[scales] * 1.01}
    with pytest.raises(SyncMismatch, match="values differ") as caught:
        expect(changed).verify(reported)
    assert "model.layers.0.self_attn.k_proj.weight" in caught.value.names and len(caught.value.names) == 3
    with pytest.raises(SyncMismatch, match="without its scales"):
        expect({name: tensor for name, tensor in sent.items() if name != scales}).verify(reported)


def test_a_name_that_is_part_of_another_is_found() -> None:
    """Whoever takes `model.layers.1` for a part of `model.layers.10` leaves that out too."""
    expected = {f"model.layers.{n}.mlp.down_proj.weight": n != 1 for n in range(12)}
    by_part = {name: "model.layers.1" not in name for name in expected}
    audit.check("server", expected, expected)
    with pytest.raises(audit.Fp8LayersDiffer, match="2 layers should be in FP8 and are not") as caught:
        audit.check("server", expected, by_part)
    assert caught.value.missing == [f"model.layers.{n}.mlp.down_proj.weight" for n in (10, 11)]
    assert not caught.value.unexpected
    with pytest.raises(audit.Fp8LayersDiffer, match=r"should not be: model\.layers\.1\.mlp") as caught:
        audit.check("server", expected, dict.fromkeys(expected, True))
    with pytest.raises(audit.Fp8LayersDiffer, match="11 layers should be"):
        audit.check("server", expected, {})


class LinearBase(torch.nn.Module):
    """By the name of SGLang's class."""

    def __init__(self, dtype: torch.dtype, method: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 2).to(dtype), requires_grad=False)
        self.quant_method = method


class MergedLinear(LinearBase):
    pass


class Fp8LinearMethod:
    pass


class Emulated:
    emulates_fp8 = True


def test_a_server_reports_what_it_holds(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.real = MergedLinear(torch.float8_e4m3fn, Fp8LinearMethod())
    model.emulated = MergedLinear(torch.float32, Emulated())
    model.plain = LinearBase(torch.bfloat16, object())
    # What FP8's method holds in bf16 it has not quantized.
    model.unfilled = LinearBase(torch.bfloat16, Fp8LinearMethod())
    model.embedding = torch.nn.Embedding(3, 2)
    request = json.dumps({"answer": str(tmp_path / "answer")})
    server_report.report(model, [(request, torch.empty(0))])
    assert json.loads((tmp_path / "answer").read_text()) == {
        "real.weight": True,
        "emulated.weight": True,
        "plain.weight": False,
        "unfilled.weight": False,
    }


def test_the_record_names_every_layer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        audit.record(tmp_path, "servers", {f"model.layers.{n}.mlp.down_proj.weight": n > 0 for n in range(3)})
        audit.record(tmp_path, "trainer", {"decoder.layers.0.mlp.linear_fc1.weight": True})
    assert "FP8 on the servers: 2 × mlp.down_proj; in the model's dtype: 1 × mlp.down_proj" in caplog.text
    written = json.loads((tmp_path / "fp8_layers.json").read_text())
    assert written["servers"]["not"] == ["model.layers.0.mlp.down_proj.weight"] and len(written["servers"]["fp8"]) == 2
    assert set(written) == {"servers", "trainer"}


def problems(config: RunConfig, family: str, **changes: Any) -> str:
    hf = HFModelConfig.from_dict(tiny_models.config(family, **changes).to_dict())
    return "\n".join(rollout_checks.fp8_rollout_problems(config, hf))


def with_server(config: RunConfig, **settings: Any) -> RunConfig:
    raw = config.model_dump()
    raw["rollout"]["server"] |= settings
    return RunConfig.model_validate(raw)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"addresses": ["http://127.0.0.1:30000"]}, "rollout.server.addresses: names servers that were started else"),
        ({"args": {"quantization": "fp8"}}, "rollout.server.args.quantization: is decided by fp8.rollout"),
        ({"args": {"load_format": "auto"}}, "rollout.server.args.load_format: is decided by fp8.rollout"),
        ({"args": {"kv_cache_dtype": "fp8_e4m3"}}, "rollout.server.args.kv_cache_dtype: is fp8_e4m3"),
    ],
)
def test_servers_that_cannot_be_emulated(settings: dict[str, Any], expected: str) -> None:
    config = configuration(Path("model"))
    assert problems(config, "qwen3") == ""
    assert expected in problems(with_server(config, **settings), "qwen3")


def test_models_and_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated, real = configuration(Path("m")), configuration(Path("m"), backend="transformer_engine")
    assert "qwen3_moe is a mixture of experts" in problems(emulated, "qwen3_moe")
    assert "deepseek_v3 has latent attention" in problems(emulated, "deepseek_v3")
    assert "this machine does not have; set fp8.backend to emulate" in problems(real, "qwen3")
    monkeypatch.setattr(rollout_checks, "backend", lambda: "nccl")
    assert "set fp8.backend to transformer_engine" in problems(emulated, "qwen3")
    whole = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128}
    assert problems(real, "qwen3", **whole).startswith("model.dtype: is float32")
    raw = real.model_dump()
    raw["model"]["dtype"] = "bfloat16"
    real = RunConfig.model_validate(raw)
    assert problems(real, "qwen3", **whole) == ""
    assert "the MLP's columns are 96" in problems(real, "qwen3", **whole | {"intermediate_size": 96})
    assert "the MLP's columns are 64 on a rank" in problems(with_server(real, tensor_parallel=4), "qwen3", **whole)
    assert problems(configuration(Path("m"), rollout=False), "deepseek_v3") == ""


def test_a_run_is_refused_by_them(tmp_path: Path) -> None:
    tiny_models.write("qwen3_moe", tmp_path / "model")
    with pytest.raises(ConfigError, match="is a mixture of experts, whose FP8 products are not emulated"):
        check_config(configuration(tmp_path / "model"))


def test_a_server_without_the_function_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(audit.ServerAdmin, "custom_weight_loaders", lambda self, timeout_s: [])
    layout = ServerLayout(1, torch.float32, 2)
    with pytest.raises(ServerError, match=r"--custom-weight-loader drpo_megatron\.fp8\.server_report\.report"):
        audit.audit_servers(["http://127.0.0.1:1"], layout, {}, tmp_path, 1.0)

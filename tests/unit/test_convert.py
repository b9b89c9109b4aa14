"""Conversion on one machine: round trips, damaged inputs, FP8, verification, and what `drpo inspect` says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo_megatron import cli
from drpo_megatron.checkpoint import manifest
from drpo_megatron.checkpoint.manifest import CheckpointError
from drpo_megatron.checkpoint.reader import CheckpointReader
from drpo_megatron.commands import EXIT_REFUSED
from drpo_megatron.weights import convert_verify, fp8
from drpo_megatron.weights.convert_to_checkpoint import hf_to_checkpoint
from drpo_megatron.weights.convert_to_hf import checkpoint_to_hf
from drpo_megatron.weights.convert_verify import VerificationError, verify_export, verify_import
from tests.support import tiny_models

ROOT = Path(__file__).parents[2]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "deepseek_v3": ("deepseek_v3", {}),
}
LARGE = 10**9


def tensors_of(hf_dir: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(hf_dir.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def sizes_of(hf_dir: Path) -> list[int]:
    return [sum(tensor.nbytes for tensor in load_file(file).values()) for file in hf_dir.glob("*.safetensors")]


@torch.no_grad()
def logits(hf_dir: Path) -> torch.Tensor:
    result: torch.Tensor = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)(
        torch.arange(40)[None]
    ).logits[0]
    return result


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME/ and NAME-checkpoint/ of every model, float32."""
    root = tmp_path_factory.mktemp("models")
    for name, (family, changes) in MODELS.items():
        tiny_models.write(family, root / name, **changes)
        hf_to_checkpoint(root / name, root / f"{name}-checkpoint", max_shard_bytes=100_000)
    return root


@pytest.fixture
def checkpoint(models: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    return Path(shutil.copytree(models / "qwen3-checkpoint", tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_in_shards(models: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    plan = checkpoint_to_hf(models / f"{name}-checkpoint", out, max_shard_bytes=150_000)
    expected, actual = tensors_of(models / name), tensors_of(out)
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype and torch.equal(actual[key], tensor), key
    sizes = sizes_of(out)
    # The embedding alone is 132 kB.
    assert len(sizes) == len(plan.shards) > 3 and max(sizes) == plan.largest_shard <= 150_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == plan.nbytes
    assert all(key in load_file(out / file) for key, file in index["weight_map"].items())
    for file in (models / name).iterdir():
        if file.suffix != ".safetensors":
            text = (out / file.name).read_text()
            assert (
                json.loads(text) == json.loads(file.read_text()) if file.suffix == ".json" else text == file.read_text()
            )
    actual_TV, expected_TV = logits(out), logits(models / name)
    assert torch.equal(actual_TV, expected_TV) and expected_TV.std() > 0.5
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_slices_of_stored_tensors(models: Path) -> None:
    reader = CheckpointReader(models / "qwen3_moe-checkpoint")
    for name in reader:
        stored = reader[name]
        whole = stored[:]
        assert whole.shape == stored.shape and whole.is_contiguous()
        assert torch.equal(stored[2:7], whole[2:7])
        if whole.dim() == 2:
            assert torch.equal(stored[:, 3:9], whole[:, 3:9]) and torch.equal(stored[1:5, 40:], whole[1:5, 40:])
    with pytest.raises(IndexError):
        stored[::2]


def test_a_slice_reads_little(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    into = CheckpointReader._read_into
    monkeypatch.setattr(
        CheckpointReader, "_read_into", lambda self, file, at, to: (read.append(to.nbytes), into(self, file, at, to))
    )
    reader = CheckpointReader(models / "qwen3-checkpoint")
    embedding = reader["embedding.word_embeddings.weight"][10:12]
    layer = reader["decoder.layers.2.mlp.linear_fc2.weight"][8:16]
    assert read == [embedding.nbytes, layer.nbytes] == [2 * 64 * 4, 8 * 96 * 4]


def test_cast_keeps_the_routers_bias(models: Path, tmp_path: Path) -> None:
    checkpoint_to_hf(models / "deepseek_v3-checkpoint", tmp_path / "out", dtype="bf16", max_shard_bytes=LARGE)
    source = tensors_of(models / "deepseek_v3")
    for name, tensor in tensors_of(tmp_path / "out").items():
        cast = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        assert torch.equal(tensor, source[name].to(cast)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["state/__1_0.distcp", "state/.metadata", "hf/config.json", "state/metadata.json"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [(_truncate, "bytes"), (_flip, "SHA-256"), (Path.unlink, "is missing")],
    ids=lambda x: str(x)[:9],
)
def test_a_damaged_file_is_named_and_nothing_left(
    checkpoint: Path, tmp_path: Path, name: str, damage: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(checkpoint / name)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["convert", str(checkpoint), str(tmp_path / "out"), "--to", "hf", "--processes", "1"])
    assert exit_info.value.code == EXIT_REFUSED
    message = capsys.readouterr().err
    assert str(checkpoint / name) in message and said in message
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_wrong_manifest_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / manifest.MANIFEST
    for text, said in (("{", "damaged"), (path.read_text().replace('"format": 1', '"format": 9'), "format 9")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=said):
            checkpoint_to_hf(checkpoint, tmp_path / "out", max_shard_bytes=LARGE)
    path.unlink()
    with pytest.raises(CheckpointError, match="no manifest"):
        checkpoint_to_hf(checkpoint, tmp_path / "out", max_shard_bytes=LARGE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 5, "layer_types": None}, r"lacks .* model\.layers\.4\.input_layernorm"),
        ({"num_hidden_layers": 3, "layer_types": None}, r"not in hf/config\.json: model\.layers\.3"),
        ({"head_dim": 20}, r"linear_qkv\.weight has shape \(192, 64\)"),
    ],
)
def test_a_state_of_another_model_is_refused(
    checkpoint: Path, tmp_path: Path, change: dict[str, int | None], said: str
) -> None:
    path = checkpoint / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    held = manifest.read(checkpoint)
    held.files["hf/config.json"] = manifest.checksum(path)
    manifest.write(checkpoint, held)
    with pytest.raises(CheckpointError, match=said):
        checkpoint_to_hf(checkpoint, tmp_path / "out", max_shard_bytes=LARGE)


def test_a_damaged_hf_directory_is_refused(models: Path, tmp_path: Path) -> None:
    for damage, error, said in (
        ("truncated", ValueError, "damaged"),
        ("lost", ValueError, "model.norm.weight"),
        ("short", ValueError, "rows"),
    ):
        source = Path(shutil.copytree(models / "qwen3", tmp_path / damage))
        file = source / "model.safetensors"
        tensors = load_file(file)
        if damage == "truncated":
            _truncate(file)
        elif damage == "lost":
            save_file({name: t for name, t in tensors.items() if name != "model.norm.weight"}, file)
        else:
            save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"][:100].clone()}, file)
        with pytest.raises(error, match=said):
            hf_to_checkpoint(source, tmp_path / "out", max_shard_bytes=LARGE)
        assert sorted(path.name for path in tmp_path.iterdir()) == [damage]
        shutil.rmtree(source)


def test_existing_out_is_refused(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, to in (("qwen3", "checkpoint"), ("qwen3-checkpoint", "hf")):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["convert", str(models / source), str(tmp_path), "--to", to])
        assert exit_info.value.code == EXIT_REFUSED and f"{tmp_path} exists" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_verification_notices_one_other_bit(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = models / "qwen3-checkpoint", tmp_path / "out"
    plan = checkpoint_to_hf(source, out, max_shard_bytes=LARGE)
    assert "35 parameters mapped back equal the checkpoint's to the bit" in verify_export(source, out, plan, None)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"].view(torch.int32)[3, 5] ^= 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"layers\.2\.self_attention\.linear_qkv"):
        verify_export(source, out, plan, None)
    with pytest.raises(VerificationError, match=r"layers\.2\.self_attn\.k_proj"):
        verify_import(out, source)
    assert "logits of 64 random tokens are equal" in verify_import(models / "qwen3", source)
    monkeypatch.setattr(convert_verify, "LOGITS_UP_TO_BYTES", 1000)
    assert "logits were not compared" in verify_import(models / "qwen3", source)


@pytest.mark.parametrize("shape", [(128, 128), (130, 300), (5, 3)])
def test_fp8_blocks(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * 10 ** torch.randn(shape[0], 1, generator=generator)
    weight[:, 0] = 0
    quantized, scales = fp8.quantize(weight)
    assert quantized.shape == shape and scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    # Block by block, with torch's own cast.
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            rows, columns = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            assert scales[i, j] == weight[rows, columns].abs().max() / 448
            expected = (weight[rows, columns] / scales[i, j]).to(torch.float8_e4m3fn)
            assert torch.equal(quantized[rows, columns].float(), expected.float())
    error, bound = (fp8.dequantize(quantized, scales) - weight).abs(), fp8.error_bound(weight, scales)
    assert (error <= bound).all() and (error > 0.5 * bound).any()
    zeros, ones = fp8.quantize(torch.zeros(shape))
    assert not zeros.float().any() and (ones == 1).all()


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "deepseek_v3"])
def test_fp8_export_is_what_other_readers_expect(models: Path, tmp_path: Path, name: str) -> None:
    """Dequantized by this test, the files are the model within rounding, and transformers' logits are close."""
    source, out = models / f"{name}-checkpoint", tmp_path / "out"
    plan = checkpoint_to_hf(source, out, dtype="fp8", max_shard_bytes=120_000)
    assert "in FP8 are within rounding" in verify_export(source, out, plan, "fp8")
    original, written = tensors_of(models / name), tensors_of(out)
    scales = {key for key in written if key.endswith("_scale_inv")}
    quantized = {key for key, tensor in written.items() if tensor.dtype is torch.float8_e4m3fn}
    assert scales == {f"{key}_scale_inv" for key in quantized}
    # Linear layers and nothing else: in these families they are called so.
    linear = {key for key in original if key.endswith(("_proj.weight", "_proj_with_mqa.weight"))}
    assert quantized == linear and len(quantized) > 20
    dequantized = {}
    for key, tensor in original.items():
        if key not in quantized:
            dequantized[key] = written[key].float()
            continue
        rows, columns = tensor.shape
        spread = torch.kron(written[f"{key}_scale_inv"], torch.ones(128, 128))[:rows, :columns]
        dequantized[key] = written[key].float() * spread
        torch.testing.assert_close(dequantized[key], tensor, rtol=2**-4 * 1.001, atol=float(spread.max()) * 2**-10)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    assert config["activation_scheme"] == "dynamic" and config["fmt"] == "e4m3"
    kept = {key.removesuffix(".weight") for key in original.keys() - quantized if key.endswith(".weight")}
    assert set(config["modules_to_not_convert"]) == kept

    plain = tmp_path / "plain"
    shutil.copytree(models / name, plain)
    save_file(dequantized, plain / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = logits(plain), logits(models / name)
    # Rounding moves the logits, and now and then a token to another expert.
    assert 0.9 < float(torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]) < 1


def test_inspect(models: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def inspect(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["inspect", *arguments])
        captured = capsys.readouterr()
        return int(str(exit_info.value.code)), captured.out + captured.err

    code, text = inspect(str(checkpoint), "--json")
    held = json.loads(text)
    count = sum(tensor.numel() for tensor in tensors_of(models / "qwen3").values())
    assert code == 0 and held["kind"] == "checkpoint" and held["parameters"] == count
    assert (held["step"], held["version"], held["optimizer"], held["damage"]) == (0, 0, False, None)
    assert held["weight_bytes"] == 4 * count and held["dtype"] == "float32" and held["model_type"] == "qwen3"
    assert held["versions"]["megatron-core"] and held["bytes"] == sum(
        path.stat().st_size for path in checkpoint.rglob("*") if path.is_file() and path.name != manifest.MANIFEST
    )
    code, text = inspect(str(checkpoint))
    assert code == 0 and "step 0" in text and f"{count:,}" in text and "one rank" in text and "weights only" in text

    code, text = inspect(str(tmp_path))
    assert code == 0 and "1 checkpoint\n" in text and "checkpoint " in text

    _flip(checkpoint / "state" / "__1_0.distcp")
    assert inspect(str(checkpoint))[0] == 0
    code, text = inspect(str(checkpoint), "--checksums")
    assert code == 1 and "DAMAGED" in text and "__1_0.distcp" in text
    assert inspect(str(tmp_path), "--checksums")[0] == 1
    _truncate(checkpoint / "state" / ".metadata")
    code, text = inspect(str(checkpoint))
    assert code == 1 and ".metadata" in text

    checkpoint_to_hf(models / "qwen3-checkpoint", tmp_path / "fp8", dtype="fp8", max_shard_bytes=100_000)
    code, text = inspect(str(tmp_path / "fp8"), "--json")
    held = json.loads(text)
    assert code == 0 and held["kind"] == "hf" and held["parameters"] == count and held["quantized"] == "fp8"
    assert held["shards"] == len(list((tmp_path / "fp8").glob("*.safetensors"))) > 1
    assert held["bytes"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "fp8").values())
    code, text = inspect(str(models / "qwen3"))
    assert code == 0 and "quantized   no" in text and f"{count:,} float32" in text

    code, text = inspect(str(tmp_path / "nothing"))
    assert code == 2 and "nothing is no checkpoint" in text


@pytest.mark.parametrize("arguments", [["--processes", "0"], ["--max-shard-gb", "-1"], ["--dtype", "fp4"]])
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["convert", "source", "out", "--to", "hf", *arguments])
    assert exit_info.value.code == 2


def test_what_is_left_out_is_said(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(models / "llama-tied", tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    again = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | again, source / "model.safetensors", metadata={"format": "pt"})
    for path, said in ((source, True), (models / "llama-tied", False)):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["convert", str(path), str(tmp_path / f"out-{said}"), "--to", "checkpoint", "--processes", "1"])
        assert exit_info.value.code == 0 and ("no place for lm_head.weight" in capsys.readouterr().out) == said

"""Loading, error messages and cross-checks of the configuration."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from drpo_megatron.config import (
    ConfigError,
    check_config,
    dump_config,
    field_help,
    load_config,
    notes,
    setting_reference,
)
from drpo_megatron.config.model_files import read_safetensors_header

MINIMAL: dict[str, Any] = {
    "name": "test",
    "model": {"path": "model"},
    "data": {"source": {"type": "function", "function": "drpo_megatron.data.examples:repeat_digit"}},
    "reward": {"type": "function", "function": "drpo_megatron.rewards.examples:matching_characters"},
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 6}},
    "algorithm": {"loss_args": {"delta": 0.2}},
    "optimizer": {"lr": 0.001},
    "training": {"steps": 3},
}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def problems_of(path: Path, *overrides: str, check: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        config = load_config(path, overrides)
        if check:
            check_config(config)
    assert all(problem and "\n" not in problem for problem in caught.value.problems)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["algorithm.loss_args.delta=12.5"], "stay within 1 ± 0.08"),
        (["training.tokens_per_micro_batch=8", "data.max_prompt_tokens=10"], "= 16 tokens"),
        (["parallel.context=2"], "its own copy of the prompt"),
        (["parallel.context=2", "training.shared_prefix=never"], None),
        (["rollout.placement=colocated"], "there is no GPU: trainer and servers take turns"),
        (["training.verb_timeout_s=600"], "not above rollout.request_timeout_s = 600: what waits"),
        (["training.verb_timeout_s=601"], None),
        (["training.verb_timeout_s=null"], None),
        ([], None),
    ],
)
def test_notes(config_file: Path, overrides: list[str], says: str | None) -> None:
    """Each of the settings that may not do what they look like, and nothing about others."""
    found = notes(load_config(config_file, overrides))
    assert len(found) == (says is not None)
    assert says is None or says in found[0]


def test_overrides_win_create_sections_and_round_trip(config_file: Path, tmp_path: Path) -> None:
    config = load_config(
        config_file,
        [
            "optimizer.lr=1e-6",
            "sync.bucket_mb=4",
            "rollout.server.args.mem_fraction_static=3e-1",
            "optimizer.betas=[0.8, 0.9]",
        ],
    )
    assert config.optimizer.lr == 1e-6
    assert config.sync.bucket_mb == 4
    # An untyped value: YAML 1.1 would leave the string '3e-1'.
    assert config.rollout.server.args == {"mem_fraction_static": 0.3}
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.training.steps == 3
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(dumped) == config


def test_every_problem_is_listed_with_its_path(config_file: Path) -> None:
    text = problems_of(
        config_file, "optimizer.lr=-1", "training.setps=3", "parallel.lr=1", "data.source.sise=2", "reward.type=x"
    )
    lines = {line.split(":")[0]: line for line in text.splitlines()}
    assert set(lines) == {"optimizer.lr", "training.setps", "parallel.lr", "data.source.sise", "reward.type"}
    assert "did you mean 'steps'" in lines["training.setps"]
    assert "optimizer.lr" in lines["parallel.lr"]
    assert "did you mean 'size'" in lines["data.source.sise"]
    assert "greater than 0" in lines["optimizer.lr"] and "-1" in lines["optimizer.lr"]
    assert "math_verify" in lines["reward.type"]


def test_structural_problems(config_file: Path, tmp_path: Path) -> None:
    assert "data.source.type: 'csv' is unknown; choose one of" in problems_of(config_file, "data.source.type=csv")
    assert problems_of(config_file, "data.source={task: x}").startswith(
        "data.source.type: is required; set it to one of"
    )
    assert problems_of(config_file, "training={}").startswith("training.steps: is required")
    assert "not a section" in problems_of(config_file, "name.x=1")
    assert "not a section" in problems_of(config_file, "training=5")
    assert "key=value" in problems_of(config_file, "training.steps")
    assert "does not match" in problems_of(config_file, "name=a/b")
    assert "No such file" in problems_of(tmp_path / "absent.yaml")

    def write(text: str) -> Path:
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        return path

    assert "seed: given twice, in lines 2 and 4" in problems_of(write("a:\n  seed: 1\n  b: 2\n  seed: 3\n"))
    assert "not valid YAML" in problems_of(write("a: [1"))
    assert "no settings" in problems_of(write(""))


def test_every_setting_is_documented() -> None:
    rows = {h.key: h for h in field_help()}
    undocumented = [key for key, h in rows.items() if not h.description and "source.type (" not in key]
    assert not undocumented
    assert rows["data.source.path (jsonl | parquet)"].default == "required"
    assert rows["rollout.server.max_restarts"].default == "3"
    assert setting_reference().count("\n") == len(rows) + 1


# --- Cross-checks -----------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], int]], extra: bytes = b"") -> None:
    """By the format's definition, not by the library: name → (dtype, shape, bytes)."""
    header, position = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(position) + extra)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    hf = {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
    (path / "config.json").write_text(json.dumps(hf))
    tokenizer = {"model": {"vocab": {"a": 0, "z": 98}}, "added_tokens": [{"id": 99, "content": "<|end|>"}]}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    write_safetensors(path / "model.safetensors", {"b": ("BF16", [2, 3], 12), "a": ("F32", [], 4)})
    return path


def test_a_sound_configuration_passes(config_file: Path, model: Path) -> None:
    check_config(load_config(config_file, [f"model.path={model}"]))
    elsewhere = "rollout.server.addresses=[http://node7:30000]"
    ahead = [
        "rollout.schedule=asynchronous",
        "rollout.max_staleness=2",
        "sync.transport=delta",
        "sync.directory=shared",
    ]
    overrides = [f"model.path={model}", elsewhere, "rollout.server.api_key_env=PATH", *ahead]
    check_config(load_config(config_file, overrides))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["parallel.tensor=4"], "2 key-value heads do not divide over parallel.tensor = 4"),
        (["parallel.pipeline=4"], "2 layers do not divide"),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel is true with parallel.tensor = 1"),
        (["parallel.virtual_pipeline=2"], "it needs pipeline >= 2"),
        (["parallel.expert=2", "parallel.data=2"], "parallel: parallel.expert is 2 and qwen3 is dense: set it to 1"),
        (["training.timeout_s=3600"], "before training.verb_timeout_s = 3600; raise the first or lower the second"),
        (["training.profile_steps=[0,3]"], "training.profile_steps: [3] are not among the steps 0 to 2 of the run"),
        (
            ["training.updates_per_batch=3"],
            "training.updates_per_batch: 3 does not divide rollout.prompts_per_step = 4",
        ),
        (["parallel.data=9"], "parallel.data: 9 ranks share the 8 sequences"),
        (["rollout.samples_per_prompt=1"], "rollout.samples_per_prompt: must be 2 or more"),
        (
            ["rollout.server.tensor_parallel=3"],
            "rollout.server.tensor_parallel: 3 does not divide the 4 attention heads",
        ),
        (["data.max_prompt_tokens=2043"], "is above the model's 2048 positions"),
        (["algorithm.loss=drop"], "did you mean 'drpo'"),
        (["algorithm.loss_args={}"], "algorithm.loss: loss 'drpo' needs delta"),
        (["reward.type=reasoning_gym", "reward.function=null"], "reasoning_gym scores its own problems only"),
        (["reward.function=null"], "reward.function: is required"),
        (["reward.function=json:lods"], "module 'json' has no function 'lods'"),
        (["reward.function=no_such_module:f"], "module 'no_such_module' cannot be imported"),
        (["reward.type=math_verify"], "reward.function: has no effect"),
        (["data.prompt_template=x"], "does not contain {prompt}"),
        (["data.system_prompt=x", "data.chat_template=false"], "data.system_prompt: needs data.chat_template"),
        (["data.source={type: jsonl, path: absent.jsonl}"], "data.source: absent.jsonl: does not exist"),
        (["model.path=absent"], "model.path: absent is not a directory"),
        (["model.routing_replay=true"], "model.routing_replay: is True and qwen3 is dense; remove it"),
        (["model.moe_aux_loss_coefficient=0.1"], "model.moe_aux_loss_coefficient: is 0.1 and qwen3 is dense"),
        (["model.moe_z_loss_coefficient=0.1"], "model.moe_z_loss_coefficient: is 0.1 and qwen3 is dense"),
        (["model.moe_bias_update_rate=0.1"], "model.moe_bias_update_rate: is 0.1 and qwen3 is dense"),
        (["rollout.schedule=asynchronous"], "rollout.max_staleness: is None, and a step makes"),
        (
            ["rollout.schedule=asynchronous", "rollout.max_staleness=1", "training.updates_per_batch=2"],
            "set it to 2 or more",
        ),
        (["rollout.schedule=one_step_off", "rollout.max_staleness=0"], "set it to null"),
        (["rollout.over_sampling=2", "rollout.schedule=one_step_off"], "slow groups delay no step"),
        (["rollout.function=json:lods"], "rollout.function: module 'json' has no function 'lods'"),
        (["rollout.server.host=0.0.0.0"], "rollout.server.api_key_env: is required"),
        (["rollout.server.api_key_env=DRPO_NO_SUCH_KEY"], "has no variable DRPO_NO_SUCH_KEY"),
        (["rollout.server.addresses=[127.0.0.1:1]"], "is not the address of a server; write http://HOST:PORT"),
        (["rollout.server.addresses=[http://127.0.0.1:1,http://127.0.0.1:1]"], "names a server twice"),
        (["rollout.server.addresses=[http://127.0.0.1:1]", "rollout.server.count=2"], "no server is started here"),
        (["rollout.server.addresses=[http://node7:30000]", "sync.address=10.0.0.1"], "api_key_env: is required"),
        (
            ["rollout.server.addresses=[http://node7:30000]", "rollout.server.api_key_env=PATH"],
            "sync.address: is 127.0.0.1, which servers on other hosts cannot reach",
        ),
        (
            [
                "rollout.server.addresses=[http://node7:30000]",
                "rollout.server.api_key_env=PATH",
                "sync.transport=shared_memory",
            ],
            "sync.transport: shared_memory reaches servers on this host only",
        ),
        (
            [
                "rollout.server.addresses=[http://node7:30000]",
                "rollout.server.api_key_env=PATH",
                "sync.transport=delta",
            ],
            "sync.directory: is required for sync.transport = delta",
        ),
        (["sync.directory=elsewhere"], "sync.directory: has no effect with sync.transport = distributed"),
    ],
)
def test_cross_checks(config_file: Path, model: Path, overrides: list[str], expected: str) -> None:
    problems = problems_of(config_file, f"model.path={model}", *overrides, check=True)
    assert expected in problems
    assert len(problems.splitlines()) == 1, problems


def test_a_key_that_sglang_would_take_for_an_argument(
    config_file: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRPO_KEY_OF_A_TEST", "-key")
    settings = (f"model.path={model}", "rollout.server.api_key_env=DRPO_KEY_OF_A_TEST")
    assert "begins with '-'" in problems_of(config_file, *settings, check=True)
    elsewhere = ("rollout.server.addresses=[http://127.0.0.1:30000]",)
    check_config(load_config(config_file, [*settings, *elsewhere]))


def test_mixture_of_experts(config_file: Path, model: Path) -> None:
    """What only such a model may have, and which of them the rollout engine serves."""
    hf = json.loads((model / "config.json").read_text())
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    (model / "config.json").write_text(json.dumps(hf | {"model_type": "qwen3_moe"} | experts))
    settings = [f"model.path={model}", "model.routing_replay=false", "model.moe_aux_loss_coefficient=0.1"]
    check_config(load_config(config_file, settings))
    text = problems_of(config_file, *settings, "model.moe_bias_update_rate=0.1", check=True)
    assert text.startswith("model.moe_bias_update_rate: is 0.1 and the routers of qwen3_moe have no bias")
    (model / "config.json").write_text(json.dumps(hf | {"model_type": "qwen3_moe", "mlp_only_layers": [1]} | experts))
    text = problems_of(config_file, *settings, check=True)
    assert "layers [1] of" in text and "SGLang serves Qwen3-MoE with experts in every layer only" in text


def test_what_the_rollout_engine_computes_differently(config_file: Path, model: Path) -> None:
    hf = json.loads((model / "config.json").read_text())
    mixtral = hf | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    gemma = hf | {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}
    scaled = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    settings = [f"model.path={model}", "model.routing_replay=false"]
    for raw, expected in (
        (mixtral, None),
        (gemma | {"head_dim": 32}, None),
        (mixtral | scaled, "is linear, and SGLang serves mixtral with default only"),
        (gemma | scaled, "is linear, and SGLang serves gemma with default only"),
        (
            mixtral | {"head_dim": 32},
            "is 32, and SGLang serves mixtral with hidden_size / num_attention_heads = 16 only",
        ),
    ):
        (model / "config.json").write_text(json.dumps(raw))
        if expected is None:
            check_config(load_config(config_file, settings))
        else:
            assert expected in problems_of(config_file, *settings, check=True)


def test_extract_and_port(config_file: Path, model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = problems_of(
            config_file, f"model.path={model}", f"rollout.server.port={port}", "reward.extract=(a", check=True
        )
    assert f"rollout.server.port: {port} cannot be used" in text
    assert "reward.extract: has no effect" in text and "is not a regular expression" in text


def test_tokenizer_that_does_not_fit(config_file: Path, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["id"] = 100
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "tokenizer_config.json").write_text("{}")
    text = problems_of(config_file, f"model.path={model}", check=True)
    assert "'<|end|>' with id 100" in text and "100 rows" in text
    assert "has no chat template; set data.chat_template=false" in text


def test_damaged_weights(config_file: Path, model: Path) -> None:
    file = model / "model.safetensors"
    whole = file.read_bytes()
    assert set(read_safetensors_header(file)) == {"a", "b"}

    def problem(content: bytes) -> str:
        file.write_bytes(content)
        text = problems_of(config_file, f"model.path={model}", check=True)
        assert str(file) in text
        return text

    assert "tensors, the file has" in problem(whole[:-1])
    assert "tensors, the file has" in problem(whole + b"\0")
    assert "header of" in problem(b"\xff" * 100)
    assert "header of" in problem(b"")
    assert "header is unreadable" in problem(whole.replace(b"BF16", b"XX16"))
    assert "tensor b lies at" in problem(whole.replace(b"[2, 3]", b"[2, 4]"))
    file.unlink()
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "x.safetensors", "c": "y.safetensors"}})
    )
    write_safetensors(model / "x.safetensors", {"b": ("BF16", [2], 4)})
    text = problems_of(config_file, f"model.path={model}", check=True)
    assert "x.safetensors lacks 1 tensors" in text and "y.safetensors does not exist" in text


def test_header_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "w": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.ones(7),
        "e": torch.zeros(0, 4),
        "f": torch.zeros(9, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    header = read_safetensors_header(tmp_path / "t.safetensors")
    assert {name: tuple(entry["shape"]) for name, entry in header.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }

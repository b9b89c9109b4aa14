"""Layouts and settings that cannot run are refused by `drpo train --dry-run`, with the numbers that clash."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron import cli
from drpo_megatron.commands import EXIT_REFUSED
from drpo_megatron.config import check_config, load_config
from drpo_megatron.config.rollout_checks import rollout_problems
from tests.support import tiny_models

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
FAMILIES = ("qwen3", "qwen2", "qwen3_moe", "deepseek_v3")


@dataclass(frozen=True)
class Refusal:
    """`overrides` over quickstart.yaml with a tiny model of `family` (`changes` in its config.json): refused, and the
    message has all of `words`.
    """

    name: str
    overrides: str
    words: tuple[str, ...]
    family: str = "qwen3"
    changes: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


# The tiny models: 4 layers, 4 heads, 2 key-value heads, MLP of 96, hidden size 64, 515 tokens, 512 positions.
# quickstart.yaml: 32 prompts of 8 samples, 2 updates, tensor 2.
REFUSALS = [
    Refusal("heads over tensor", "parallel.tensor=3", ("4 attention heads", "parallel.tensor = 3")),
    Refusal(
        "key-value heads over tensor", "parallel.tensor=4", ("2 key-value heads", "parallel.tensor = 4"), family="qwen2"
    ),
    Refusal(
        "MLP over tensor",
        "parallel.tensor=2",
        ("97 MLP columns", "parallel.tensor = 2"),
        "qwen3",
        {"intermediate_size": 97},
    ),
    Refusal(
        "hidden size over tensor",
        "parallel.tensor=4",
        ("66 hidden columns", "parallel.tensor = 4"),
        "qwen3",
        {"hidden_size": 66, "num_key_value_heads": 4},
    ),
    Refusal("layers over pipeline", "parallel.pipeline=3", ("4 layers", "pipeline = 3")),
    Refusal("more stages than layers", "parallel.pipeline=8", ("4 layers", "pipeline = 8")),
    Refusal(
        "layers left by the first stage",
        "parallel.pipeline=3 parallel.first_stage_layers=1",
        ("4 layers", "pipeline = 3", "first_stage_layers = 1", "3 are left for 2"),
    ),
    Refusal(
        "first and last stage are not all layers",
        "parallel.pipeline=2 parallel.first_stage_layers=1 parallel.last_stage_layers=2",
        ("4 layers", "first_stage_layers = 1", "last_stage_layers = 2", "1 are left for 0"),
    ),
    Refusal(
        "first stage takes every layer",
        "parallel.pipeline=2 parallel.first_stage_layers=4",
        ("4 layers", "0 are left for 1"),
    ),
    Refusal(
        "first stage without a pipeline", "parallel.first_stage_layers=2", ("first_stage_layers is 2", "pipeline 1")
    ),
    Refusal("last stage without a pipeline", "parallel.last_stage_layers=3", ("last_stage_layers is 3", "pipeline 1")),
    Refusal(
        "virtual pipeline over layers",
        "parallel.pipeline=2 parallel.virtual_pipeline=3",
        ("4 layers", "virtual_pipeline = 3", "[2, 2]"),
    ),
    Refusal(
        "virtual pipeline over unequal stages",
        "parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.first_stage_layers=1",
        ("4 layers", "virtual_pipeline = 2", "[1, 3]"),
    ),
    Refusal(
        "virtual pipeline without a pipeline", "parallel.virtual_pipeline=2", ("virtual_pipeline is 2", "pipeline 1")
    ),
    Refusal(
        "virtual pipeline of one chunk", "parallel.virtual_pipeline=1", ("parallel.virtual_pipeline", "greater than 1")
    ),
    Refusal(
        "sequence parallelism without tensor parallelism",
        "parallel.tensor=1 parallel.sequence_parallel=true",
        ("sequence_parallel", "parallel.tensor = 1", "tensor >= 2"),
    ),
    Refusal(
        "experts with tensor and without sequence parallelism",
        "parallel.tensor=2",
        ("parallel.tensor is 2", "qwen3_moe", "parallel.sequence_parallel"),
        "qwen3_moe",
    ),
    Refusal(
        "latent attention with tensor and without sequence parallelism",
        "parallel.tensor=2",
        ("parallel.tensor is 2", "deepseek_v3", "parallel.sequence_parallel"),
        "deepseek_v3",
    ),
    Refusal(
        "experts over expert",
        "parallel.tensor=1 parallel.data=3 parallel.expert=3",
        ("8 experts", "parallel.expert = 3"),
        "qwen3_moe",
    ),
    Refusal(
        "more expert ranks than experts",
        "parallel.tensor=1 parallel.data=16 parallel.expert=16",
        ("8 experts", "parallel.expert = 16"),
        "qwen3_moe",
    ),
    Refusal(
        "expert over the ranks of a stage",
        "parallel.tensor=1 parallel.expert=2",
        ("expert × expert_tensor = 2", "tensor × context × data = 1"),
        "qwen3_moe",
    ),
    Refusal(
        "pipeline ranks do not count for experts",
        "parallel.tensor=1 parallel.pipeline=2 parallel.data=2 parallel.expert=4",
        ("expert × expert_tensor = 4", "tensor × context × data = 2"),
        "qwen3_moe",
    ),
    Refusal(
        "expert times expert_tensor",
        "parallel.tensor=2 parallel.sequence_parallel=true parallel.data=2 parallel.expert=4 parallel.expert_tensor=2",
        ("expert × expert_tensor = 8", "tensor × context × data = 4"),
        "qwen3_moe",
    ),
    Refusal(
        "expert MLP over expert_tensor",
        "parallel.tensor=1 parallel.data=3 parallel.expert_tensor=3",
        ("40 MLP columns of an expert", "parallel.expert_tensor = 3"),
        "qwen3_moe",
    ),
    Refusal(
        "shared experts over tensor",
        "parallel.tensor=2 parallel.sequence_parallel=true",
        ("25 MLP columns of the shared experts", "parallel.tensor = 2"),
        "deepseek_v3",
        {"n_shared_experts": 1, "moe_intermediate_size": 25},
    ),
    Refusal(
        "expert parallelism of a dense model",
        "parallel.tensor=1 parallel.data=2 parallel.expert=2",
        ("parallel.expert is 2", "qwen3 is dense"),
    ),
    Refusal(
        "expert_tensor of a dense model", "parallel.expert_tensor=2", ("parallel.expert_tensor is 2", "qwen3 is dense")
    ),
    Refusal(
        "dispatcher of a dense model",
        "parallel.moe_dispatcher=allgather",
        ("moe_dispatcher is allgather", "qwen3 is dense"),
    ),
    Refusal(
        "more experts a token than experts",
        "parallel.tensor=1",
        ("9 of 8 experts",),
        "qwen3_moe",
        {"num_experts_per_tok": 9},
    ),
    Refusal("experts over groups", "parallel.tensor=1", ("n_group = 3", "16 experts"), "deepseek_v3", {"n_group": 3}),
    Refusal(
        "latent attention with grouped keys",
        "parallel.tensor=1",
        ("num_key_value_heads = 2", "all 4 heads"),
        "deepseek_v3",
        {"num_key_value_heads": 2},
    ),
    Refusal(
        "shared prefixes and a split context",
        "training.shared_prefix=always parallel.context=2",
        ("training.shared_prefix", "always", "parallel.context = 2"),
    ),
    Refusal(
        "replay of a dense model", "model.routing_replay=true", ("model.routing_replay: is True", "qwen3 is dense")
    ),
    Refusal(
        "dense layers that SGLang does not serve",
        "parallel.tensor=1",
        ("layers [0, 2]", "SGLang"),
        "qwen3_moe",
        {"mlp_only_layers": [0, 2]},
    ),
    Refusal("updates over prompts", "training.updates_per_batch=5", ("5 does not divide", "prompts_per_step = 32")),
    Refusal(
        "more updates than prompts", "training.updates_per_batch=64", ("64 does not divide", "prompts_per_step = 32")
    ),
    Refusal(
        "data over the sequences of an update",
        "parallel.data=16 rollout.prompts_per_step=2 training.updates_per_batch=1 rollout.samples_per_prompt=4",
        ("16 ranks", "8 sequences"),
    ),
    Refusal(
        "prompt and response over positions",
        "data.max_prompt_tokens=500 rollout.sampling.max_new_tokens=40",
        ("40", "max_prompt_tokens = 500", "512 positions"),
    ),
    Refusal(
        "server's context",
        "data.max_prompt_tokens=100 rollout.sampling.max_new_tokens=40 'rollout.server.args={context_length: 128}'",
        ("context_length: 128", "100", "40", "140"),
    ),
    Refusal(
        "server's ranks over heads", "rollout.server.tensor_parallel=3", ("3 does not divide", "4 attention heads")
    ),
    Refusal(
        "server's ranks and key-value heads",
        "parallel.tensor=1 rollout.server.tensor_parallel=4",
        ("4 neither divides the 3 key-value heads",),
        "qwen3",
        {"num_attention_heads": 12, "num_key_value_heads": 3},
    ),
    Refusal(
        "server's ranks over an expert",
        "parallel.tensor=1 rollout.server.tensor_parallel=4",
        ("4 does not divide", "42 MLP columns of an expert"),
        "qwen3_moe",
        {"moe_intermediate_size": 42},
    ),
    Refusal(
        "server's devices", "rollout.server.devices=[0] rollout.server.tensor_parallel=2", ("[0]", "1 different", "= 2")
    ),
    Refusal(
        "a device twice",
        "rollout.server.devices=[1,1] rollout.server.tensor_parallel=2",
        ("[1, 1]", "1 different", "= 2"),
    ),
    Refusal(
        "parameter gather of an unsharded optimizer",
        "optimizer.overlap_param_gather=true optimizer.distributed=false",
        ("overlap_param_gather", "optimizer.distributed = false"),
    ),
    Refusal(
        "parameter gather without buckets",
        "optimizer.overlap_param_gather=true optimizer.overlap_grad_reduce=false",
        ("overlap_param_gather", "overlap_grad_reduce = false"),
    ),
    Refusal(
        "buckets of nothing",
        "optimizer.bucket_parameters=1000 optimizer.overlap_grad_reduce=false",
        ("bucket_parameters: 1000", "overlap_grad_reduce = false"),
    ),
    Refusal("learning rates", "optimizer.lr=1e-6 optimizer.min_lr=1e-5", ("1e-05", "optimizer.lr = 1e-06")),
    Refusal(
        "deterministic with an algorithm of NCCL that is not",
        "training.deterministic=true",
        ("NCCL_ALGO=NVLS", "^NVLS"),
        environment={"NCCL_ALGO": "NVLS"},
    ),
    Refusal(
        "deterministic with kernels of Transformer Engine that are not",
        "training.deterministic=true",
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO=1",),
        environment={"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"},
    ),
    Refusal("a size of zero", "parallel.data=0", ("parallel.data", "greater than 0", "got 0")),
    Refusal("a size with a fraction", "parallel.tensor=1.5", ("parallel.tensor", "1.5")),
    Refusal("a size in words", "parallel.pipeline=two", ("parallel.pipeline", "'two'")),
    Refusal("a number for a switch", "optimizer.overlap_grad_reduce=2", ("optimizer.overlap_grad_reduce", "2")),
    Refusal("a list for a section", "parallel=[2]", ("parallel", "[2]", "not a section")),
    Refusal("a section for a number", "'parallel.tensor={size: 2}'", ("parallel.tensor", "{'size': 2}")),
    Refusal("an unknown way to recompute", "model.recompute=some", ("model.recompute", "'selective'", "'some'")),
    Refusal("a misspelt size", "parallel.tensors=2", ("parallel.tensors", "'tensor'")),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        # SGLang serves Qwen3-MoE without dense layers only.
        tiny_models.write(family, root / family, **({"mlp_only_layers": []} if family == "qwen3_moe" else {}))
    return root


MakeModel = Callable[[str, Mapping[str, Any]], Path]


@pytest.fixture
def make_model(models: Path, tmp_path: Path) -> MakeModel:
    """The directory of a family, or a copy of it with other values in config.json."""

    def make(family: str, changes: Mapping[str, Any]) -> Path:
        if not changes:
            return models / family
        path = Path(shutil.copytree(models / family, tmp_path / family))
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
        return path

    return make


def base(model: Path, runs: Path) -> list[str]:
    return [
        f"model.path={model}",
        "model.recipe=null",
        f"tracking.directory={runs}",
        "data.max_prompt_tokens=64",
        "tracking.wandb=false",
    ]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.name)
def test_refused(
    refusal: Refusal,
    make_model: MakeModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launch.local.run", lambda *_: pytest.fail("the run was started"))
    for name in ("NCCL_ALGO", "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in refusal.environment.items():
        monkeypatch.setenv(name, value)
    model, runs = make_model(refusal.family, refusal.changes), tmp_path / "runs"
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", str(QUICKSTART), *base(model, runs), *shlex.split(refusal.overrides), "--dry-run"])
    message = capsys.readouterr().err
    assert exit_info.value.code == EXIT_REFUSED, message
    assert message.startswith("drpo: ") and len(message.splitlines()) == 1, message
    for word in refusal.words:
        assert word in message, message
    assert not runs.exists()


NCCL = "drpo_megatron.config.rollout_checks.backend"
COLOCATED = "rollout.placement=colocated parallel.tensor=2 "


@pytest.mark.parametrize(
    ("gpu", "overrides", "environment", "words"),
    [
        (False, "rollout.server.tensor_parallel=4", {}, ("4 × rollout.server.count = 1", "2 devices of the trainer")),
        (
            False,
            "rollout.server.tensor_parallel=2 rollout.server.count=2",
            {},
            ("2 × rollout.server.count = 2 ranks", "2 devices of the trainer"),
        ),
        (False, "rollout.schedule=one_step_off", {}, ("rollout.schedule: one_step_off", "set it to synchronous")),
        (
            False,
            "rollout.schedule=asynchronous rollout.max_staleness=4",
            {},
            ("rollout.schedule: asynchronous", "set it to synchronous"),
        ),
        (False, "rollout.server.addresses=['http://127.0.0.1:1']", {}, ("rollout.server.addresses", "remove it")),
        (False, "rollout.server.devices=[2]", {}, ("[2] are not among the trainer's 0 to 1",)),
        (False, "rollout.server.args.weight_cache_mode=daemon", {}, ("weight_cache_mode", "remove it")),
        (True, "sync.transport=distributed", {}, ("refuses two ranks on one device", "shared_memory")),
        (
            True,
            "sync.transport=disk",
            {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            ("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True", "take expandable_segments out"),
        ),
        (True, "sync.transport=shared_memory rollout.server.devices=[1]", {}, ()),
        # it gives a server all weights, from what both keep in host memory
        (True, "sync.transport=delta", {}, ()),
        (True, "sync.transport=shared_memory rollout.server.count=2 rollout.server.devices=[1,0]", {}, ()),
        (False, "rollout.server.tensor_parallel=2 sync.transport=distributed", {}, ()),
    ],
)
def test_colocated(
    gpu: bool,
    overrides: str,
    environment: dict[str, str],
    words: tuple[str, ...],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a server on the trainer's devices cannot do; with no words it can."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(NCCL, lambda: "nccl" if gpu else "gloo")
    settings = base(models / "qwen3", tmp_path / "runs")
    config = load_config(QUICKSTART, [*settings, *COLOCATED.split(), *overrides.split()])
    problems = "\n".join(rollout_problems(config))
    assert bool(problems) == bool(words), problems
    assert all(word in problems for word in words), problems
    apart = load_config(QUICKSTART, [*settings, "parallel.tensor=2", *overrides.split()])
    assert not list(rollout_problems(apart))


LEGAL = [
    ("qwen3", "parallel.tensor=2 parallel.sequence_parallel=true parallel.pipeline=2 parallel.virtual_pipeline=2"),
    ("qwen2", "parallel.tensor=1 parallel.pipeline=4 parallel.data=2"),
    ("qwen2", "parallel.pipeline=2 parallel.first_stage_layers=1"),
    ("qwen3_moe", "parallel.tensor=1 parallel.data=8 parallel.expert=8"),
    ("qwen3_moe", "parallel.sequence_parallel=true parallel.data=2 parallel.expert=2 parallel.expert_tensor=2"),
    ("deepseek_v3", "parallel.tensor=4 parallel.sequence_parallel=true parallel.expert=4 parallel.pipeline=2"),
    ("qwen3", "parallel.context=2 parallel.data=2"),
    ("qwen3", "optimizer.overlap_param_gather=true optimizer.bucket_parameters=1000 training.deterministic=true"),
    ("qwen3", "rollout.server.tensor_parallel=4 rollout.server.devices=[2,3,4,5]"),
]


@pytest.mark.parametrize(("family", "overrides"), LEGAL)
def test_accepted(family: str, overrides: str, models: Path, tmp_path: Path) -> None:
    check_config(load_config(QUICKSTART, [*base(models / family, tmp_path / "runs"), *overrides.split(" ")]))

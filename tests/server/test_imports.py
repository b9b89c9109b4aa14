"""Without CUDA, processes do not import what nothing there uses: a start is mostly imports. See `platform.imports`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny_models

# What each cut takes away. A new version of a library that imports one by another way fails here.
NOT_IN_A_RANK = {
    "torch._inductor": "torch.compile of Megatron-Core's fusions",
    "torch._dynamo": "the same, and transformers",
    "wandb": "Megatron-Core's timers",
    "tensorboard": "Megatron-Core's timers",
    "scipy": "transformers' losses of object detection",
    "transformers": "rank 0 alone has a tokenizer",
    "aiohttp": "rank 0 alone asks servers",
    "sglang": "servers are processes of their own",
}
NOT_IN_RANK_0 = NOT_IN_A_RANK.keys() - {"transformers", "aiohttp"}


def loaded(code: str) -> set[str]:
    """Names of all modules that a process holds after `code`, which may import more than it likes itself."""
    code += "\nimport sys\nprint('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return set(next(line for line in done.stdout.splitlines() if line.startswith("LOADED ")).split())


@pytest.fixture(autouse=True)
def without_cuda() -> None:
    import torch

    if torch.cuda.device_count():
        pytest.skip("the cuts are for machines without CUDA")


def test_a_rank() -> None:
    modules = loaded(
        "from drpo_megatron import platform\nimport drpo_megatron.training.main, drpo_megatron.training.run\n"
        "platform.activate()"
    )
    assert "megatron.core.timers" in modules
    assert not NOT_IN_A_RANK.keys() & modules


def test_rank_0() -> None:
    """With the tokenizer that it makes for its prompts."""
    modules = loaded(
        "from drpo_megatron import platform\nimport drpo_megatron.training.main, drpo_megatron.training.run\n"
        "import drpo_megatron.training.experience\nplatform.activate()\nfrom transformers import AutoTokenizer"
    )
    assert "transformers.models.auto.tokenization_auto" in modules
    assert not NOT_IN_RANK_0 & modules


def test_what_was_cut_still_computes() -> None:
    """transformers' masks, whose cut class comes late, and wandb, which the tracker imports after Megatron-Core."""
    loaded(
        "import drpo_megatron\nimport megatron.core, torch, wandb\nassert wandb.init\n"
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,"
        " num_key_value_heads=1, head_dim=8)\n"
        "model = Qwen3ForCausalLM(Qwen3Config(**sizes, attn_implementation='sdpa')).eval()\n"
        "ids = torch.tensor([[1, 2, 3, 4, 5]])\n"
        "padded = torch.tensor([[0, 1, 2, 3, 4, 5]])\n"
        "seen = torch.tensor([[0, 1, 1, 1, 1, 1]])\n"
        "with torch.no_grad():\n"
        "    alone = model(ids).logits\n"
        "    beside = model(padded, attention_mask=seen).logits[:, 1:]\n"
        "torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-5)\n"
        "twice = torch.compile(lambda x: 2 * x)\nassert twice(torch.ones(1)).item() == 2\n"
        "@torch.compile(dynamic=True)\ndef thrice(x):\n    return 3 * x\nassert thrice(torch.ones(1)).item() == 3"
    )


NOT_IN_A_SERVER = {
    "torch._inductor": "torch.compile of SGLang's layers",
    "torch._dynamo": "what tells the compiler apart, in transformers, torchvision and SGLang",
    "megatron": "SGLang's dumper of values, which compares them with a trainer's",
    "wandb": "the same",
    "scipy": "transformers' losses of object detection",
    "mistral_common": "gguf's vocabulary",
    "sglang.srt.models.llama4": "all models for one",
}


@pytest.mark.server
def test_a_server(tmp_path: Path) -> None:
    """All that is imported before the server forks its workers, for a model whose file is the only one loaded."""
    tiny_models.write("qwen3", tmp_path)
    modules = loaded(
        "from drpo_megatron.platform import sglang_cpu\n"
        f"sglang_cpu.prepare(['--model-path', {str(tmp_path)!r}, '--device', 'cpu', '--attention-backend', "
        "'torch_native'])\n"
        "from sglang.srt.models.registry import ModelRegistry\n"
        "model, name = ModelRegistry.resolve_model_cls(['Qwen3ForCausalLM'])\n"
        "assert model.__module__ == 'sglang.srt.models.qwen3' and not ModelRegistry._default_models_loaded"
    )
    assert {"sglang.srt.managers.scheduler", "sglang.srt.models.qwen3"} <= modules
    assert not NOT_IN_A_SERVER.keys() & modules


@pytest.mark.server
def test_a_server_finds_what_sglang_registers() -> None:
    """For each architecture that can be trained: in its file, the class that SGLang has in its registry of all."""
    loaded(
        "from drpo_megatron.platform import sglang_cpu, sglang_cpu_imports\n"
        "sglang_cpu_imports.cut_imports([])\nsglang_cpu.install_stand_ins()\n"
        "import sglang, sglang.srt.managers.scheduler\n"
        "from sglang.srt.models.registry import ModelRegistry\n"
        "from drpo_megatron.models.families import FAMILIES\n"
        "from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES\n"
        "architectures = [NAMES[family] for family in FAMILIES]\n"
        "assert not ModelRegistry.models\n"
        "assert sglang_cpu_imports._model_class('NoSuchModel') is None\n"
        "found = {name: sglang_cpu_imports._model_class(name) for name in architectures}\n"
        "assert len(ModelRegistry.get_supported_archs()) > 100\n"
        "for name, model in found.items():\n"
        "    assert model is not None and ModelRegistry.models[name] is model, name"
    )


@pytest.mark.server
def test_a_server_compiles_when_it_is_asked_to() -> None:
    modules = loaded(
        "from drpo_megatron.platform import sglang_cpu, sglang_cpu_imports\n"
        "sglang_cpu_imports.cut_imports(['--enable-torch-compile'])\nsglang_cpu.install_stand_ins()\n"
        "import torch\ncompile = torch.compile\nimport sglang\nassert torch.compile is compile"
    )
    assert "torch._dynamo" in modules

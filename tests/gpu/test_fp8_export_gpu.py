"""An FP8 export in SGLang's own FP8 layers, which only a GPU can run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig, ServerConfig
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.server import SGLangServer
from drpo_megatron.weights import fp8
from tests.server.test_fp8_export import export
from tests.support.servers import OneServer, largest_logprob_error, make_prompts
from tests.support.tiny_models import VOCAB_SIZE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device for SGLang's FP8 kernels"),
]


def test_server_computes_with_the_export(tmp_path: Path) -> None:
    """Log-probs of the server against transformers' with the dequantized weights, and with all weights halved."""
    quantized = export(tmp_path, initializer_range=0.05)
    tensors = load_file(quantized / "model.safetensors")
    plain = Path(shutil.copytree(tmp_path / "model", tmp_path / "plain"))

    def reference(factor: float) -> torch.nn.Module:
        weights = {
            name: factor * fp8.dequantize(tensor, tensors[name + fp8.SCALE_SUFFIX])
            if tensor.dtype is fp8.FP8
            else tensor.float()
            for name, tensor in tensors.items()
            if not name.endswith(fp8.SCALE_SUFFIX)
        }
        save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()

    config = RolloutConfig(
        prompts_per_step=4, samples_per_prompt=4, sampling=SamplingConfig(max_new_tokens=16), server=ServerConfig()
    )
    with SGLangServer(config.server, quantized, "bfloat16", 0, tmp_path / "server.log") as server:
        server.wait_ready()
        driver = RolloutDriver(config, OneServer(server), AutoTokenizer.from_pretrained(quantized))
        groups = driver.generate(make_prompts(4, VOCAB_SIZE))
    # Activations are rounded to FP8 as well.
    error = largest_logprob_error(groups, reference(1.0), 1.0)
    assert error < 0.5 and largest_logprob_error(groups, reference(0.5), 1.0) > 2 * error

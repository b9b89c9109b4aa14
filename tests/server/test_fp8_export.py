"""The real SGLang server takes an FP8 export.

Its CPU engine multiplies FP8 only on CPUs with AMX, and by kernels that are not installed here: the server reads every
tensor into its FP8 layers and then refuses. So what is shown is that its loader takes the files, and which it refuses.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drpo_megatron import cli
from drpo_megatron.config.schema import ServerConfig
from drpo_megatron.rollout.errors import ServerError
from drpo_megatron.rollout.server import SGLangServer
from drpo_megatron.weights.convert_to_checkpoint import hf_to_checkpoint
from drpo_megatron.weights.convert_to_hf import checkpoint_to_hf
from tests.support import tiny_models
from tests.support.server_pool import WHOLE_BLOCKS, ServerPool
from tests.support.servers import LIMIT_S

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu serves the export on a device"),
]


def server_log(servers: ServerPool, model: Path, log: Path) -> str:
    """What the server says when it is started with this model, which it does not come up with."""
    server = SGLangServer(ServerConfig(start_timeout_s=LIMIT_S), model, "bfloat16", 0, log)
    server.launch = servers.launch
    with server, pytest.raises(ServerError):
        server.wait_ready()
    return log.read_text()


def export(directory: Path, **changes: float) -> Path:
    tiny_models.write("qwen3", directory / "model", dtype=torch.bfloat16, **WHOLE_BLOCKS | changes)
    hf_to_checkpoint(directory / "model", directory / "checkpoint", max_shard_bytes=10**9)
    checkpoint_to_hf(directory / "checkpoint", directory / "fp8", dtype="fp8", max_shard_bytes=10**9)
    return directory / "fp8"


def test_loader_takes_the_files(servers: ServerPool, tmp_path: Path) -> None:
    """The layers are made for FP8 and filled; the refusal comes from what prepares the kernel's weights afterwards."""
    said = server_log(servers, export(tmp_path), tmp_path / "log")
    assert "Fp8LinearMethod on CPU requires that CPU has AMX support" in said
    assert "process_weights_after_loading" in said and "load_weights(" not in said


def test_joined_projections_must_be_whole_blocks(
    servers: ServerPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `drpo convert` notes about rows that are no multiple of 128 is what the server says."""
    said = server_log(servers, export(tmp_path, head_dim=64), tmp_path / "log")
    assert "is not divisible by weight quantization block_n = 128" in said
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["convert", str(tmp_path / "checkpoint"), str(tmp_path / "again"), "--to", "hf", "--dtype", "fp8"])
    assert exit_info.value.code == 0
    noted = capsys.readouterr().out
    assert "SGLang refuses" in noted and "layers.0.self_attn.k_proj" in noted and "down_proj" not in noted

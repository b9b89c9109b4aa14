"""A server with two tensor-parallel ranks and tied embeddings, and what it leaves behind when the trainer is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support import tiny_models
from tests.support.servers import (
    OneServer,
    largest_logprob_error,
    make_prompts,
    members,
    nudge,
    perturb,
    wait_until_gone,
)

pytestmark = pytest.mark.server


def trainer(path: Path) -> None:
    """The process that is killed: serve, push by each transport, generate, print what it saw, and wait."""
    from transformers import AutoTokenizer

    from drpo_megatron.config.schema import RolloutConfig, SamplingConfig, ServerConfig, SyncConfig
    from drpo_megatron.rollout.driver import RolloutDriver
    from drpo_megatron.rollout.server import SGLangServer
    from drpo_megatron.rollout.server_args import with_delta_loader
    from drpo_megatron.sync.push import WeightSync
    from drpo_megatron.sync.verify import ServerLayout, SyncMismatch

    torch.set_num_threads(1)
    # as under torchrun: a default group exists, and rendezvous would go to the agent's store
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=12)
    server_config = with_delta_loader(ServerConfig(tensor_parallel=2, start_timeout_s=600))
    config = RolloutConfig(prompts_per_step=4, samples_per_prompt=4, sampling=sampling, server=server_config)
    server = SGLangServer(server_config, path, "float32", 0, path / "server.log")
    server.start()
    model = tiny_models.write("qwen2", path / "copy")
    url = server.wait_ready()
    layout = ServerLayout.from_config(path, 2, torch.float32)
    weights = WeightSync(SyncConfig(bucket_mb=0.05, timeout_s=600), layout, path, path / "sync")
    weights.connect([url])
    driver = RolloutDriver(config, OneServer(server), AutoTokenizer.from_pretrained(path))
    perturb(model, 1)
    report = weights.push(model.named_parameters(), 1)
    groups = driver.generate(make_prompts(4, tiny_models.VOCAB_SIZE))
    errors = {"distributed": largest_logprob_error(groups, model, 1.0)}
    for version, transport in enumerate(("shared_memory", "disk", "delta"), start=2):
        settings = SyncConfig(transport=transport, bucket_mb=0.05, timeout_s=600)
        other = WeightSync(settings, layout, path, path / "sync")
        other.connect([url])
        perturb(model, version)
        assert other.push(model.named_parameters(), version).verified == report.verified
        groups = driver.generate(make_prompts(4, tiny_models.VOCAB_SIZE))
        errors[transport] = largest_logprob_error(groups, model, 1.0)
        if transport == "delta":
            nudge(model, 5)
            again = other.push(model.named_parameters(), 5)
            assert again.verified == report.verified
            groups = driver.generate(make_prompts(4, tiny_models.VOCAB_SIZE))
            errors["second delta"] = largest_logprob_error(groups, model, 1.0)
            share = again.delta_share
        other.close()
    seen = {
        "pid": server.pid,
        "verified": report.verified,
        "errors": errors,
        "versions": sorted({v for g in groups for r in g.rollouts for v in r.weight_versions}),
        "processes": len(members(server.pid or 0)),
        "mismatch": [],
        "delta_share": share,
    }
    name = "model.layers.2.self_attn.k_proj.bias"
    try:
        weights.push([(n, t) for n, t in model.named_parameters() if n != name], 6)
    except SyncMismatch as error:
        seen["mismatch"] = error.names
    print("SEEN " + json.dumps(seen), flush=True)
    signal.pause()


def test_two_ranks_and_a_killed_trainer(tmp_path: Path) -> None:
    tiny_models.write("qwen2", tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", f"from tests.server.test_server_tp2 import *; trainer(Path({str(tmp_path)!r}))"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = next((text for text in process.stdout if text.startswith("SEEN ")), None)
        assert line is not None, "the trainer process failed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    seen = json.loads(line.removeprefix("SEEN "))
    assert seen["errors"].keys() == {"distributed", "shared_memory", "disk", "delta", "second delta"}
    assert seen["versions"] == [5] and 0 < seen["delta_share"] < 0.1
    assert max(seen["errors"].values()) < 1e-4
    # embeddings and last norm; a layer has 2 norms, 4 projections and the bias of the first
    assert seen["verified"] == 2 + 4 * 7
    layer = "model.layers.2.self_attn."
    assert sorted(seen["mismatch"]) == [f"{layer}q_proj.bias", f"{layer}v_proj.bias"]
    assert seen["processes"] >= 4, "server, detokenizer and two schedulers"
    assert wait_until_gone(seen["pid"], 300) == []

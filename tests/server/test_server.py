"""One real SGLang server: log-probs, weight sync by every transport, verification, and starts that cannot work."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from transformers import AutoTokenizer, PreTrainedModel

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig, ServerConfig
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.client import request_body
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.errors import ServerRequestError, ServerStartError
from drpo_megatron.rollout.server import SGLangServer
from drpo_megatron.sync.buckets import Bucket
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.verify import SyncMismatch
from drpo_megatron.weights import hf_io
from tests.support import tiny_models
from tests.support.server_pool import Loans, PooledServer
from tests.support.servers import LIMIT_S, OneServer, largest_logprob_error, make_prompts, many_pushes, perturb

pytestmark = pytest.mark.server

SAMPLING = SamplingConfig(temperature=0.7, max_new_tokens=24)
PROMPTS = make_prompts(4, tiny_models.VOCAB_SIZE)
TOLERANCE = 1e-4  # float32 logits of magnitude 10, computed in another order
EOS = 2


@dataclass
class Setup:
    """A server with its first weights, and transformers' model with the same."""

    pooled: PooledServer
    driver: RolloutDriver
    model: PreTrainedModel

    @property
    def server(self) -> SGLangServer:
        return self.pooled.server

    @cached_property
    def weights(self) -> WeightSync:
        return self.pooled.sync(bucket_mb=0.05, verify_every=1)


@pytest.fixture
def setup(borrow: Loans) -> Iterator[Setup]:
    pooled = borrow("plain")
    config = RolloutConfig(prompts_per_step=4, samples_per_prompt=8, sampling=SAMPLING)
    driver = RolloutDriver(config, OneServer(pooled.server), AutoTokenizer.from_pretrained(pooled.model))
    made = Setup(pooled, driver, pooled.reference())
    yield made
    if "weights" in vars(made):
        made.weights.close()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logmu_is_the_log_softmax_at_the_sampling_temperature(setup: Setup, temperature: float) -> None:
    groups = setup.driver.generate(PROMPTS, 8, SamplingConfig(temperature=temperature, max_new_tokens=24))
    assert [g.prompt for g in groups] == PROMPTS and all(len(g.rollouts) == 8 for g in groups)
    assert largest_logprob_error(groups, setup.model, temperature) < TOLERANCE
    other = 1.7 - temperature
    assert largest_logprob_error(groups, setup.model, other) > 100 * TOLERANCE
    assert len({tuple(r.response_ids) for g in groups for r in g.rollouts}) > 24, "samples of a prompt must differ"


def test_a_prompt_is_computed_once_for_its_samples(setup: Setup) -> None:
    """By the server's own count: for a sample it computes the last token, whose logits it needs, and nothing else."""
    prompt, samples = [3 + (k * 5) % (tiny_models.VOCAB_SIZE - 3) for k in range(24)], 8
    body = request_body([prompt] * samples, SAMPLING)
    answers = requests.post(f"{setup.server.url}/generate", json=body, timeout=LIMIT_S).json()
    metas = [answer["meta_info"] for answer in answers]
    assert len(metas) == samples and all(meta["prompt_tokens"] == len(prompt) for meta in metas)
    assert sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas) == samples


def test_responses_end_at_eos_at_a_stop_string_or_at_the_limit(setup: Setup) -> None:
    groups = setup.driver.generate(PROMPTS, 64, SamplingConfig(max_new_tokens=24))
    rollouts = [r for g in groups for r in g.rollouts]
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert (rollout.finish_reason == "stop") == (rollout.response_ids[-1] == EOS)
        assert EOS not in rollout.response_ids[:-1] and len(rollout.response_ids) <= 24
    # SGLang looks for stop strings in the names of special tokens too, and with ignore_eos they come in between.
    names = "".join(AutoTokenizer.from_pretrained(setup.pooled.model).all_special_tokens)
    letter = next(r.text[0] for r in rollouts if r.text and r.text[0] not in names)
    stopped = setup.driver.generate(PROMPTS, 64, SamplingConfig(max_new_tokens=24, stop=[letter], ignore_eos=True))
    ended = [r for g in stopped for r in g.rollouts if r.finish_reason == "stop"]
    assert ended and all(r.text.endswith(letter) and letter not in r.text[:-1] for r in ended)
    assert all(letter not in r.text for g in stopped for r in g.rollouts if r.finish_reason == "length")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the server's cores are its own")
def test_a_paused_server_leaves_the_cores_to_the_trainer(setup: Setup) -> None:
    """SGLang's scheduler turns in a loop while it is paused. One that turns takes about as much time of the cores as
    this process, which turns beside it; one that waits takes next to none, however busy the machine is.
    """
    admin = ServerAdmin(setup.server.url)
    assert setup.server.pid is not None
    family = psutil.Process(setup.server.pid).children(recursive=True)

    def theirs() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in family)

    def share() -> float:
        """Of what this process takes in the same time."""
        before, mine = theirs(), time.process_time()
        while time.process_time() < mine + 1.0:
            pass
        return (theirs() - before) / (time.process_time() - mine)

    admin.pause_generation("retract", LIMIT_S)
    try:
        assert any(share() < 0.25 for _ in range(10)), "what was under way before the pause ends"
    finally:
        admin.continue_generation(LIMIT_S)
    assert len(setup.driver.generate(PROMPTS[:1])) == 1


def test_a_push_replaces_all_weights_and_stamps_the_version(setup: Setup) -> None:
    before = setup.driver.generate(PROMPTS)
    assert {v for g in before for r in g.rollouts for v in r.weight_versions} == {0}
    for version in (1, 2):
        perturb(setup.model, version)
        report = setup.weights.push(setup.model.state_dict().items(), version)
        tensors = list(setup.model.state_dict().values())
        assert report.version == version and report.tensors == len(tensors)
        assert report.bytes == sum(t.nbytes for t in tensors)
        assert report.buckets > 5, "small buckets: errors at their borders must show"
        # embeddings, head, last norm; a layer has 2 norms, 2 head norms and 4 projections
        assert report.verified == 3 + 4 * 8
        after = setup.driver.generate(PROMPTS)
        assert {v for g in after for r in g.rollouts for v in r.weight_versions} == {version}
        assert largest_logprob_error(after, setup.model, SAMPLING.temperature) < TOLERANCE
        assert largest_logprob_error(before, setup.model, SAMPLING.temperature) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
        "model.layers.1.self_attn.k_norm.weight",
        "lm_head.weight",
    ],
)
def test_one_wrong_element_on_the_wire_is_found(setup: Setup, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Bucket.write

    def flip(bucket: Bucket, flat: torch.Tensor) -> torch.Tensor:
        flat = write(bucket, flat)
        if name in bucket.names:
            end = sum(t.nbytes for t in bucket.tensors[: bucket.names.index(name) + 1])
            flat[end - 4] ^= 1  # the lowest bit of the last element's mantissa
        return flat

    monkeypatch.setattr(Bucket, "write", flip)
    with pytest.raises(SyncMismatch, match="values differ") as caught:
        setup.weights.push(setup.model.state_dict().items(), 3)
    setup.weights.connect([setup.server.url])
    assert name in caught.value.names and len(caught.value.names) <= 3
    monkeypatch.undo()
    assert setup.weights.push(setup.model.state_dict().items(), 3).verified


_ANOTHER_RUN = """
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from drpo_megatron.config.schema import SyncConfig
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.verify import ServerLayout

url, path = sys.argv[1], Path(sys.argv[2])
weights = WeightSync(SyncConfig(timeout_s=600), ServerLayout.from_config(path, 1, torch.float32), path, path / "sync")
weights.connect([url])
print(weights.push(load_file(path / "model.safetensors").items(), 7).verified)
"""


def test_the_next_run_takes_a_server_that_one_left(setup: Setup) -> None:
    """One that was started elsewhere keeps the process group of a run that did not leave it."""
    assert setup.weights.push(setup.model.state_dict().items(), 6).verified
    command = [sys.executable, "-c", _ANOTHER_RUN, setup.server.url, str(setup.pooled.model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0 and int(done.stdout) == 3 + 4 * 8, done.stderr
    assert setup.weights.push(setup.model.state_dict().items(), 8).verified


def test_a_tensor_that_is_not_sent_is_found(setup: Setup) -> None:
    name = "model.norm.weight"
    with pytest.raises(SyncMismatch, match="not sent") as caught:
        setup.weights.push([(n, t) for n, t in setup.model.state_dict().items() if n != name], 4)
    assert caught.value.names == [name]
    setup.weights.connect([setup.server.url])
    setup.weights.push(setup.model.state_dict().items(), 4)
    assert largest_logprob_error(setup.driver.generate(PROMPTS), setup.model, SAMPLING.temperature) < TOLERANCE


@pytest.mark.parametrize("transport", ["shared_memory", "disk", "delta"])
@pytest.mark.parametrize("bucket_mb", [1e-6, 0.05, 64.0], ids=["one tensor a bucket", "some", "all in one"])
def test_other_transports(setup: Setup, transport: str, bucket_mb: float, tmp_path: Path) -> None:
    """Real weights in, verified, for bucket sizes from one tensor to all; nothing is left in files or in memory."""
    weights = setup.pooled.sync(transport=transport, bucket_mb=bucket_mb, directory=tmp_path, verify_every=1)
    tensors = setup.model.state_dict()
    for seed in (7, 8):
        perturb(setup.model, seed)
        report = weights.push(tensors.items(), 4)
        assert report.verified == 3 + 4 * 8
        assert report.buckets == {1e-6: len(tensors), 64.0: 1}.get(bucket_mb, report.buckets)
    assert largest_logprob_error(setup.driver.generate(PROMPTS), setup.model, SAMPLING.temperature) < TOLERANCE
    private = list(tmp_path.iterdir())
    assert len(private) == (transport in ("disk", "delta"))
    for directory in private:
        assert directory.stat().st_mode & 0o077 == 0, "weights are for this user alone"
        assert not list(directory.iterdir())
    weights.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(setup: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The trainer stops with what to do, and a push by another way brings the server back."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    weights = setup.pooled.sync(transport="disk", directory=tmp_path)
    monkeypatch.setattr(hf_io, "save_file", full)
    with pytest.raises(ServerRequestError, match=r"No space left.*sync\.directory"):
        weights.push(setup.model.state_dict().items(), 4)
    weights.close()
    assert not list(tmp_path.iterdir())
    assert setup.weights.push(setup.model.state_dict().items(), 4).verified


@pytest.mark.parametrize("transport", ["distributed", "shared_memory", "disk", "delta"])
def test_many_pushes_hold_nothing(setup: Setup, transport: str) -> None:
    """Files do not stay open, here and in the server. `tests/slow/test_many_pushes.py` looks at the memory as well."""
    many_pushes(setup.pooled, setup.model, transport, 20)


def test_a_start_that_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match="did you mean max_total_tokens"):
        SGLangServer(ServerConfig(args={"max_total_token": 9}), tmp_path, "float32", 0, tmp_path / "log")
    with pytest.raises(ServerStartError, match=r"set rollout\.server\.tensor_parallel"):
        SGLangServer(ServerConfig(args={"tp_size": 2}), tmp_path, "float32", 0, tmp_path / "log")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = SGLangServer(ServerConfig(port=port), tmp_path, "float32", 0, tmp_path / "log")
        with pytest.raises(ServerStartError, match=rf"port {port} on 127\.0\.0\.1 is in use.*null for a free one"):
            server.start()
    server = SGLangServer(ServerConfig(), tmp_path / "no-such-model", "float32", 0, tmp_path / "log")
    with server, pytest.raises(ServerStartError, match=r"(?s)ended with status \d+ before.*no-such-model"):
        server.wait_ready()
    assert not server.alive() and server.pid is None

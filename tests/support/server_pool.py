"""Real SGLang servers for the whole test run: one of each kind, started when the first test asks for it.

Starting a server costs more than most tests that use it. So tests borrow one, by the fixture `borrow` of
`tests/conftest.py`, and each finds it as it was started: generating, idle, with its first weights and version 0. What a
test leaves is looked at when it gives the server back. A server that a test broke fails that test and is replaced.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from drpo_megatron.config.schema import RunConfig, ServerConfig, SyncConfig
from drpo_megatron.fp8.rollout import RolloutWeights, server_model, server_settings
from drpo_megatron.models.recipes import ensure_model
from drpo_megatron.platform import has_cuda
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerError
from drpo_megatron.rollout.server import SGLangServer
from drpo_megatron.rollout.server_args import with_delta_loader
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.verify import ServerLayout
from tests.support import tiny_models
from tests.support.preforked import ServerForks
from tests.support.servers import LIMIT_S
from tests.support.updates import run_config

IDLE_S = 120.0  # for requests that were aborted and end by themselves

# Sizes of a model whose tensors are whole FP8 blocks.
WHOLE_BLOCKS = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "num_hidden_layers": 2,
}


@dataclass(frozen=True)
class Launch:
    """A server that is being started. config: the run that an FP8 server belongs to."""

    server: SGLangServer
    model: Path
    dtype: torch.dtype = torch.float32
    config: RunConfig | None = None


@dataclass(frozen=True)
class PooledServer:
    """A running server. model: its Hugging Face directory. directory: for files of the tests that use it. pid and
    checksums: as they were before the first test, and are before every test.
    """

    kind: str
    server: SGLangServer
    model: Path
    directory: Path
    dtype: torch.dtype
    config: RunConfig | None
    pid: int
    checksums: list[dict[str, str]]

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def layout(self) -> ServerLayout:
        return ServerLayout.from_config(self.model, self.server.tensor_parallel, self.dtype)

    def sync(self, **settings: Any) -> WeightSync:
        """A way for weights to it, connected. The test closes it."""
        config = SyncConfig(timeout_s=LIMIT_S).model_copy(update=settings)
        weights = WeightSync(config, self.layout, self.model, self.directory / "sync")
        weights.connect([self.url])
        return weights

    def reference(self) -> PreTrainedModel:
        """transformers' model with the first weights; the test's own, to change and to push."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype).eval()


class ServerPool:
    """Servers by kind. Use it as a context, in the main thread: servers end with the thread that started them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._forks = None if has_cuda() else ServerForks()
        self.launch: Callable[..., Any] = self._forks.launch if self._forks else subprocess.Popen
        """For `SGLangServer.launch` of servers that a test has for itself."""
        self._numbers = itertools.count()
        self._launched: dict[str, Launch] = {}
        self._ready: dict[str, PooledServer] = {}

    def start(self, *kinds: str) -> None:
        """Begin to start those that do not run, without waiting: they start together."""
        for kind in kinds:
            if kind not in self._launched:
                directory = self._root / f"{next(self._numbers)}-{kind}"
                self._launched[kind] = launch = KINDS[kind](directory)
                launch.server.launch = self.launch
                launch.server.start()

    def get(self, kind: str) -> PooledServer:
        """The server, which runs and generates. Raises AssertionError when it ended while no test had it."""
        self.start(kind)
        launch = self._launched[kind]
        if kind not in self._ready:
            try:
                self._ready[kind] = ready(kind, launch)
            except BaseException:
                self.discard(kind)
                raise
        elif ended := launch.server.ended():
            log = launch.server.log_tail()
            self.discard(kind)
            raise AssertionError(f"the {kind} server {ended} while no test had it; {log}")
        return self._ready[kind]

    def discard(self, kind: str) -> None:
        """End the server. The next test that asks gets a new one."""
        self._ready.pop(kind, None)
        self._launched.pop(kind).server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._launched):
            self.discard(name)
        if self._forks:
            self._forks.close()


class Loans:
    """What one test borrows from the pool."""

    def __init__(self, pool: ServerPool) -> None:
        self._pool = pool
        self._taken: dict[str, PooledServer] = {}

    def __call__(self, kind: str) -> PooledServer:
        if kind not in self._taken:
            self._taken[kind] = self._pool.get(kind)
        return self._taken[kind]

    def give_back(self) -> None:
        """Raises AssertionError with what is wrong; servers that a test broke are replaced."""
        wrong = []
        for kind, pooled in self._taken.items():
            try:
                restore(pooled)
            except (AssertionError, ServerError, requests.RequestException) as error:
                wrong.append(f"the test broke the {kind} server: {error}\n{pooled.server.log_tail()}")
                self._pool.discard(kind)
        self._taken.clear()
        assert not wrong, "\n".join(wrong)


def restore(pooled: PooledServer) -> None:
    """Make a server what it was before the first test, and prove it.

    Raises AssertionError or ServerError for what no test may leave: another process or none, a pause, requests.
    """
    admin = ServerAdmin(pooled.url)
    ended = pooled.server.ended()
    assert ended is None and pooled.server.pid == pooled.pid, f"it {ended or 'was restarted'}"
    wait_until_idle(admin)
    if admin.weight_checksums(LIMIT_S) != pooled.checksums:
        _push_first_weights(pooled)
        assert admin.weight_checksums(LIMIT_S) == pooled.checksums, "it does not take its first weights back"
    admin.set_weight_version(0, LIMIT_S)
    flushed = requests.post(f"{pooled.url}/flush_cache", timeout=LIMIT_S)
    assert flushed.status_code == 200, f"its cache is in use: {flushed.text}"


def wait_until_idle(admin: ServerAdmin) -> None:
    """Prove that the server generates, and wait until nothing runs or waits in it. One that is paused, or that lacks
    memory, does not answer.
    """
    admin.score([3, 4, 5], routed_experts=False, timeout_s=IDLE_S)
    deadline = time.monotonic() + IDLE_S
    while (load := admin.load(LIMIT_S)) != (0, 0):
        assert time.monotonic() < deadline, f"{load[0]} requests run in it and {load[1]} wait"
        time.sleep(0.05)


def first_weights(model: Path, config: RunConfig | None) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors of a model's file, as a server of this configuration takes them."""
    tensors = list(load_file(model / "model.safetensors").items())
    weights = RolloutWeights.of(config) if config else None
    if weights is None:
        return tensors
    buckets = [tensors[i : i + 20] for i in range(0, len(tensors), 20)]
    return itertools.chain.from_iterable(weights.stream(buckets))


def _push_first_weights(pooled: PooledServer) -> None:
    weights = pooled.sync(transport="shared_memory")
    try:
        assert weights.push(first_weights(pooled.model, pooled.config), 0).verified
    finally:
        weights.close()


def ready(kind: str, launch: Launch) -> PooledServer:
    """Wait until it generates, with its first weights."""
    url = launch.server.wait_ready()
    assert launch.server.pid is not None
    directory = launch.model.parent
    fields = (kind, launch.server, launch.model, directory, launch.dtype, launch.config, launch.server.pid)
    if launch.config:  # an FP8 server starts without weights
        _push_first_weights(PooledServer(*fields, []))
    pooled = PooledServer(*fields, ServerAdmin(url).weight_checksums(LIMIT_S))
    restore(pooled)
    return pooled


def _launch(directory: Path, model: Path, *, tensor_parallel: int = 1, **settings: Any) -> Launch:
    config = with_delta_loader(ServerConfig(start_timeout_s=LIMIT_S, tensor_parallel=tensor_parallel))
    return Launch(SGLangServer(config, model, "float32", 0, directory / "server.log", **settings), model)


def _plain(directory: Path, tensor_parallel: int = 1) -> Launch:
    tiny_models.write("qwen3", directory / "model")
    return _launch(directory, directory / "model", tensor_parallel=tensor_parallel)


def _moe(directory: Path, tensor_parallel: int = 1) -> Launch:
    # SGLang makes every layer of this family a mixture of experts, whatever the configuration says.
    tiny_models.write("qwen3_moe", directory / "model", mlp_only_layers=[])
    return _launch(directory, directory / "model", tensor_parallel=tensor_parallel, routed_experts=True)


def _deterministic(directory: Path) -> Launch:
    """The model of the quickstart."""
    return _launch(directory, ensure_model("tiny_qwen3", directory / "model"), deterministic=True)


def fp8_launch(
    directory: Path, dtype: str, backend: str, first: int, devices: list[int] | None = None, **sizes: Any
) -> Launch:
    """In FP8 from layer `first` on."""
    path = directory / "model"
    tiny_models.write("qwen3", path, dtype=getattr(torch, dtype), **sizes)
    raw = run_config(path, {}).model_dump()
    raw["model"]["dtype"] = dtype
    raw["tracking"]["directory"] = directory / "runs"
    raw["fp8"] |= {"rollout": True, "backend": backend, "unquantized_first_layers": first}
    raw["rollout"]["server"] |= {"start_timeout_s": LIMIT_S, "devices": devices}
    config = RunConfig.model_validate(raw)
    weights = RolloutWeights.of(config)
    assert weights
    weights.write_model(config)
    settings = with_delta_loader(server_settings(config))
    log = directory / "server.log"
    server = SGLangServer(settings, server_model(config), dtype, 0, log, emulate_fp8=True)
    return Launch(server, path, getattr(torch, dtype), config)


def _fp8_emulated(directory: Path) -> Launch:
    """Twelve layers, of which the last two are in FP8; no size is a multiple of 128."""
    sizes = {"num_hidden_layers": 12, "hidden_size": 160, "intermediate_size": 288, "initializer_range": 0.08}
    return fp8_launch(directory, "float32", "emulate", 10, **sizes)


def _fp8_stored(directory: Path) -> Launch:
    """FP8 parameters and scales in SGLang's own layers, whose products are emulated; the first layer is bfloat16."""
    sizes = WHOLE_BLOCKS | {"num_hidden_layers": 3, "initializer_range": 0.05}
    return fp8_launch(directory, "bfloat16", "transformer_engine", 1, **sizes)


KINDS: dict[str, Callable[[Path], Launch]] = {
    "plain": _plain,
    "tp2": lambda directory: _plain(directory, tensor_parallel=2),
    "moe": _moe,
    "moe_tp2": lambda directory: _moe(directory, tensor_parallel=2),
    "fp8": _fp8_emulated,
    "fp8_stored": _fp8_stored,
    "deterministic": _deterministic,
}

"""`drpo doctor`: each thing that can be wrong is made wrong, and the sentence must say what to do."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drpo_megatron import cli, doctor, platform
from drpo_megatron.config import ConfigError, load_config
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.doctor import FAIL, OK, SKIPPED, Finding, host, libraries
from drpo_megatron.models.recipes import ensure_model
from tests.unit.test_config import MINIMAL

ROOT = Path(__file__).parents[2]


def config_of(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(MINIMAL | sections)


def fails(finding: Finding, *words: str) -> None:
    assert finding.state == FAIL and all(word in finding.says for word in words), finding


def test_all_is_well_on_this_machine(tmp_path: Path) -> None:
    for finding in [*host.examine(None), *libraries.packages(), libraries.gloo(), libraries.sglang_arguments(None)]:
        assert finding.state in (OK, SKIPPED), finding
    assert host.disk(tmp_path / "not" / "yet", 0).state == OK and list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    fails(host.disk(tmp_path / "file", 0), "cannot be written to", "Not a directory", "tracking.directory")

    def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    fails(host.disk(tmp_path, 0), "Input/output error")
    monkeypatch.setattr(os, "fsync", lambda *_: time.sleep(0.05))
    monkeypatch.setattr(host, "_FSYNC_S", 0.01)
    fails(host.disk(tmp_path, 0), "fsync of a small file", "use another disk")


def statvfs(free_bytes: int) -> Callable[[Path], SimpleNamespace]:
    return lambda _: SimpleNamespace(f_bavail=free_bytes // 4096, f_frsize=4096)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ensure_model("tiny_qwen3", tmp_path / "model")
    saves = config_of(model={"path": str(model), "dtype": "bfloat16"}, save={"every": 1, "keep": 3})
    # The tiny model's files are in float32, and a checkpoint holds two moments, the main weights and those in bf16.
    parameters = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 4
    assert host.checkpoint_bytes(saves) == pytest.approx(parameters * 14 * (3 + 1), rel=0.01)
    assert host.checkpoint_bytes(config_of(model={"path": str(model)})) == 0
    assert host.disk_needed(saves) == 10**9, "the least"
    monkeypatch.setattr(os, "statvfs", statvfs(10**8))
    (model / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.path: "):
        host.checkpoint_bytes(saves)
    fails(host.disk(tmp_path, 10**9), "0.1 GB are free", "= 1:", "free some")


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", statvfs(64 * 2**20))
    fails(host.shared_memory(None), "64 MiB are free", "256 MiB", "--shm-size")
    monkeypatch.setattr(os, "statvfs", statvfs(300 * 2**20))
    assert host.shared_memory(None).state == host.shared_memory(config_of()).state == OK
    finding = host.shared_memory(config_of(sync={"transport": "shared_memory", "bucket_mb": 100}))
    fails(finding, "300 MiB are free", "456 MiB", "sync.bucket_mb = 100")
    monkeypatch.setattr(host, "SHARED_MEMORY", Path("/dev/none"))
    fails(host.shared_memory(None), "mount a tmpfs")


def test_a_clock_that_is_set_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    times = iter([now, now + 7.0])
    monkeypatch.setattr(time, "time", lambda: next(times))
    fails(host.clock(), "it went 7.00 s while 0.1", "synchronize it")
    monkeypatch.setattr(time, "time", lambda: 86400.0)
    fails(host.clock(), "1970-01-02", "synchronize it")


def test_low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (900, 100_000))
    fails(host.open_files(None), "limit of 900", "`ulimit -n 1024`", "rollout.concurrency")
    fails(host.processes(), "limit of 900", "`ulimit -u 2048`")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    assert host.open_files(None).state == OK
    busy = config_of(rollout=MINIMAL["rollout"] | {"concurrency": 4096})
    fails(host.open_files(busy), "below 4608", "administrator", "hard limit of 1024")


def test_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "HUGE_PAGES", tmp_path / "enabled")
    assert host.huge_pages().state == SKIPPED
    for mode, state in (("always madvise [never]", SKIPPED), ("always [madvise] never", OK)):
        (tmp_path / "enabled").write_text(mode)
        assert host.huge_pages().state == state
    (tmp_path / "enabled").write_text("always madvise [never]")
    assert "a tenth longer" in host.huge_pages().says and "echo madvise" in host.huge_pages().says


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_taken_port(taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = MINIMAL["rollout"] | {"server": {"port": taken_port - 1, "count": 2}}
    fails(host.ports(config_of(rollout=rollout)), f"{taken_port} cannot be used", "in use", "choose another")
    elsewhere = MINIMAL["rollout"] | {"server": {"addresses": ["http://127.0.0.1:1"]}}
    assert host.ports(config_of(rollout=elsewhere)).state == SKIPPED
    monkeypatch.setattr("drpo_megatron.platform.ports.in_use", lambda *_: True)
    fails(host.ports(None), "no free port", "end processes")


def test_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = libraries.pinned_versions()
    lines = (ROOT / "requirements" / "base.txt").read_text().splitlines()
    assert pinned["torch"] == next(line for line in lines if line.startswith("torch==")).partition("==")[2]
    assert "sglang" in pinned and "transformer-engine" not in pinned and "pytest" not in pinned
    monkeypatch.setattr(libraries, "pinned_versions", lambda: pinned | {"rich": "1.2.3", "not-a-package": "4"})
    (finding,) = libraries.packages()
    fails(finding, "where 1.2.3 is pinned", "not-a-package is missing where 4", "make install")


def test_gpus_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert libraries.gpus(None).state == SKIPPED
    monkeypatch.setattr(libraries, "count_gpus", lambda: 8)
    fails(libraries.gpus(None), "nvidia-smi shows 8", "driver", "CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(libraries, "_device_count", lambda: 2)
    parallel = {"data": 2}
    fails(libraries.gpus(config_of(parallel=parallel)), "needs 3", "can use 2", "colocated")
    assert libraries.devices_needed(config_of()) == 2
    with pytest.raises(ConfigError, match="sequence_parallel"):
        libraries.gpus(config_of(parallel={"sequence_parallel": True}))
    colocated = MINIMAL["rollout"] | {"placement": "colocated"}
    assert libraries.devices_needed(config_of(rollout=colocated, parallel=parallel)) == 2


def test_fp8_of_the_device() -> None:
    blockwise = config_of(fp8={"recipe": "blockwise"})
    fails(libraries.fp8(blockwise), "no CUDA device", "emulate")
    assert libraries.fp8(None).state == SKIPPED
    with platform.as_seen_on((8, 0)):
        assert libraries.fp8(None).state == SKIPPED and "8.9" in libraries.fp8(None).says
    with platform.as_seen_on((9, 0)):
        assert libraries.fp8(None).state == OK


def test_gloo_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("unable to resolve hostname\nframe 1")

    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "ProcessGroupGloo", refuse)
        fails(libraries.gloo(), "(unable to resolve hostname)", "GLOO_SOCKET_IFNAME=lo")

    class Wrong:
        def __init__(self, *arguments: Any) -> None:
            pass

        def allreduce(self, tensors: list[torch.Tensor]) -> Any:
            tensors[0].fill_(2.0)
            return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(torch.distributed, "ProcessGroupGloo", Wrong)
    fails(libraries.gloo(), "an all-reduce of 1 and 2 gave 2")


def test_sglangs_import_that_fails_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process itself: tests/slow/test_command_processes.py."""

    def failed(command: list[str], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(returncode=1, stderr="Traceback:\nModuleNotFoundError: No module named 'sglang'\n")

    def hangs(command: list[str], *, timeout: float, **_: Any) -> SimpleNamespace:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", failed)
    fails(libraries.sglang(), "(ModuleNotFoundError: No module named 'sglang')", "make install")
    monkeypatch.setattr(subprocess, "run", hangs)
    fails(libraries.sglang(), "did not end within", "slow")


def test_an_argument_that_sglang_does_not_have(tmp_path: Path) -> None:
    model = ensure_model("tiny_qwen3", tmp_path / "model")
    server = MINIMAL["rollout"] | {"server": {"args": {"chunked_prefil_size": 8}}}
    finding = libraries.sglang_arguments(config_of(model={"path": str(model)}, rollout=server))
    fails(finding, "chunked_prefil_size", "chunked_prefill_size")


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("disk", OK, "fine"), Finding("gpu", SKIPPED, "none")]
    monkeypatch.setattr(doctor, "examine", lambda config: iter(findings))

    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["doctor", *words])
        return int(exit_info.value.code or 0), capsys.readouterr().out

    assert run() == (0, "OK   disk                fine\n--   gpu                 none\n")
    findings.append(Finding("clock", FAIL, "set it"))
    code, out = run("--json")
    assert code == 1 and json.loads(out) == {
        "findings": [vars(finding) for finding in findings],
        "failed": 1,
    }
    assert run("configs/none.yaml")[0] == 2


def test_a_configuration_of_the_repository_is_looked_at() -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["rollout.server.port=null"])
    assert {f.state for f in host.examine(config)} <= {OK, SKIPPED}

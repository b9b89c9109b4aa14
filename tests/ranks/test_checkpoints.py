"""Checkpoints of real policies: what goes on from one equals what was never stopped, in every layout; what is damaged
is not loaded.
"""

from __future__ import annotations

import functools
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from drpo_megatron.checkpoint import manifest as manifests
from drpo_megatron.checkpoint.manifest import CheckpointError
from drpo_megatron.checkpoint.state import with_own_storage
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.weights.convert_to_checkpoint import hf_to_checkpoint
from drpo_megatron.weights.convert_to_hf import checkpoint_to_hf
from tests.support import tiny_models
from tests.support.launch import run_ranks
from tests.support.updates import make_sequences, run_config

pytestmark = pytest.mark.distributed

SP2 = {"tensor": 2, "sequence_parallel": True}
LOGGED: list[str] = []
DRIVER = {"source": {"epoch": 1}, "begun": [{"experts": torch.arange(6, dtype=torch.int16).view(1, 2, 3)}]}


@dataclass(frozen=True)
class Case:
    """A run that saves in layout `saved`, and those that go on from it."""

    family: str
    saved: dict[str, Any]
    resumed: tuple[dict[str, Any], ...]
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        settings = [*self.saved.items(), *self.overrides]
        return "-".join([self.family, *(f"{key}.{value}" for key, value in settings)])


CASES = [
    Case("qwen3", {"data": 2}, ({"data": 2}, SP2, {"pipeline": 2}), (("save.asynchronous", False),)),
    Case("qwen3", SP2, ({"data": 2}, SP2), (("model.dtype", "bfloat16"),)),
    Case("qwen2", {"pipeline": 2}, ({"pipeline": 2}, {"data": 2}, {"pipeline": 2, "virtual_pipeline": 2})),
    Case("qwen3_moe", {"data": 2}, ({"data": 2}, SP2 | {"expert": 2}, {"data": 2, "expert": 2}, {"pipeline": 2})),
    Case("qwen3_moe", {"data": 2, "expert": 2}, ({"data": 2}, {"data": 2, "expert": 2})),
    Case("qwen3", {"data": 2}, ({"data": 2}, SP2), (("optimizer.distributed", False),)),
    # Several buckets with padding between them.
    Case("qwen3", {"data": 2}, ({"data": 2}, SP2), (("optimizer.bucket_parameters", 5000),)),
]


FAST_CASES = [
    Case("qwen3", {"data": 2}, ({"data": 2}, {"pipeline": 2}), (("save.asynchronous", False),)),
    Case("qwen3", SP2, ({"data": 2},), (("model.dtype", "bfloat16"),)),
    Case("qwen3_moe", {"data": 2}, (SP2 | {"expert": 2},)),
]


def configuration(root: Path, case: Case, parallel: dict[str, Any]) -> RunConfig:
    raw = run_config(root / case.family, parallel, steps=8, deterministic=False).model_dump()
    raw["name"], raw["tracking"]["directory"] = case.name, root
    raw["optimizer"] |= {"lr": 1e-3, "schedule": "linear", "warmup_steps": 2, "weight_decay": 0.1}
    if "moe" in case.family:
        raw["model"]["routing_replay"] = False
    for key, value in case.overrides:
        section, name = key.split(".")
        raw[section][name] = value
    return RunConfig.model_validate(raw)


class _Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        LOGGED.append(record.getMessage())


def enter(config: RunConfig, first: bool) -> Any:
    from drpo_megatron.platform import distributed

    if first:
        distributed.initialize(config.layout, seed=0)
    else:
        distributed.change_layout(config.layout, seed=0)
    from drpo_megatron.training.step import Policy

    return Policy(config)


def weights(policy: Any) -> dict[str, torch.Tensor]:
    from drpo_megatron.weights.exporter import iter_hf_tensors

    return {name: t.clone() for bucket in iter_hf_tensors(policy.modules, policy.hf) for name, t in bucket}


def updates(policy: Any, numbers: range) -> dict[str, Any]:
    sequences = make_sequences(policy.hf.vocab_size)
    results = [policy.update(sequences, number) for number in numbers]
    return {
        "norms": [r.grad_norm for r in results],
        "lr": [r.learning_rate for r in results],
        "weights": weights(policy),
        "random": float(torch.rand(())),
    }


def leaving_nothing(function: Any) -> Any:
    """For functions of `enter`: what it has joined and heard is not left to the next function of these ranks."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        from drpo_megatron.platform import distributed

        log, listener = logging.getLogger("drpo_megatron.checkpoint.saver"), _Listener()
        LOGGED.clear()
        log.addHandler(listener)
        try:
            answer = function(*args)
        finally:
            log.removeHandler(listener)
        distributed.shutdown()
        return answer

    return call


@leaving_nothing
def save_and_go_on(root: Path, cases: list[Case]) -> list[dict[str, Any]]:
    """Two updates, a checkpoint, and two more while it is written."""
    import torch.distributed as dist

    from drpo_megatron.checkpoint.saver import Saver

    outcomes = []
    for index, case in enumerate(cases):
        config = configuration(root, case, case.saved)
        policy = enter(config, first=index == 0)
        saver = Saver(config)
        before = weights(policy)
        saver.save(policy, 0, 0, None, {})  # Adam has no state yet
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights(policy).items())
        updates(policy, range(2))
        saved = weights(policy)
        saver.save(policy, 2, 2, DRIVER if dist.get_rank() == 0 else None, {"reward/mean": 0.25})
        outcomes.append(updates(policy, range(2, 4)) | {"saved": saved})
        saver.finish()
    return outcomes


@leaving_nothing
def resume_and_go_on(root: Path, wanted: list[tuple[Case, dict[str, Any]]]) -> list[dict[str, Any]]:
    from drpo_megatron.checkpoint.saver import Saver

    outcomes = []
    for index, (case, parallel) in enumerate(wanted):
        config = configuration(root, case, parallel)
        policy = enter(config, first=index == 0)
        resumed = Saver(config).resume(policy)
        assert resumed is not None
        outcomes.append(updates(policy, range(2, 4)) | {"manifest": resumed.manifest, "driver": resumed.driver})
    return outcomes


def write_models(root: Path, cases: list[Case]) -> None:
    for family in {case.family for case in cases}:
        tiny_models.write(family, root / family)


def check_resumed(root: Path, cases: list[Case], uninterrupted: list[dict[str, Any]]) -> None:
    wanted = [(case, parallel) for case in cases for parallel in case.resumed]
    outcomes = run_ranks(2, resume_and_go_on, root, wanted)[0]
    expected = {case.name: outcome for case, outcome in zip(cases, uninterrupted, strict=True)}
    for (case, parallel), outcome in zip(wanted, outcomes, strict=True):
        of_case, what = expected[case.name], f"{case.name} in {parallel}"
        assert outcome["lr"] == of_case["lr"], what
        assert outcome["manifest"].step == 2 and outcome["manifest"].metrics == {"reward/mean": 0.25}
        torch.testing.assert_close(outcome["driver"], DRIVER, rtol=0, atol=0)
        same = parallel == case.saved
        if same:
            assert outcome["norms"] == of_case["norms"] and outcome["random"] == of_case["random"], what
        # Adam moves weights by up to lr an update; another order of sums moves them by rounding.
        rounding = 2**-8 * 2 if ("model.dtype", "bfloat16") in case.overrides else 1e-5
        tolerance = 0.0 if same else rounding
        for name, tensor in of_case["weights"].items():
            torch.testing.assert_close(
                outcome["weights"][name], tensor, rtol=tolerance, atol=tolerance, msg=f"{what}: {name} differs"
            )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints")
    write_models(path, FAST_CASES)
    return path


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> list[dict[str, Any]]:
    return run_ranks(2, save_and_go_on, root, FAST_CASES)[0]


def test_goes_on_as_if_never_stopped(root: Path, uninterrupted: list[dict[str, Any]]) -> None:
    check_resumed(root, FAST_CASES, uninterrupted)


def test_the_files_beside_the_weights_are_carried(root: Path, uninterrupted: list[dict[str, Any]]) -> None:
    case = FAST_CASES[0]
    checkpoint = root / case.name / "checkpoints" / "step_000002"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        source = root / case.family / name
        if source.exists():
            assert (checkpoint / manifests.HF_FILES / name).read_bytes() == source.read_bytes()
    read = manifests.read(checkpoint)
    assert set(read.files) == set(manifests.data_files(checkpoint))
    assert read.layout["data"] == 2 and read.versions["megatron-core"]


@leaving_nothing
def resume_only(root: Path, case: Case, parallel: dict[str, Any]) -> tuple[int | str, list[str]]:
    """The step that was loaded, or why none was, and what was logged."""
    from drpo_megatron.checkpoint.saver import Saver

    config = configuration(root, case, parallel)
    policy = enter(config, first=True)
    try:
        resumed = Saver(config).resume(policy)
    except CheckpointError as error:
        return str(error), LOGGED
    return resumed.manifest.step if resumed else -1, LOGGED


def test_a_damaged_checkpoint_is_never_loaded(root: Path, uninterrupted: list[dict[str, Any]]) -> None:
    """The one before is taken, with a message; without one, the run does not start anew by itself."""
    case = FAST_CASES[0]
    damaged = root / "damaged"
    shutil.copytree(root / case.name, damaged / case.name)
    shutil.copytree(root / case.family, damaged / case.family)
    checkpoints = damaged / case.name / "checkpoints"
    shutil.rmtree(checkpoints / "step_000000")
    (good,) = checkpoints.iterdir()
    for step, damage in ((4, "flipped"), (6, "truncated"), (8, "half-written")):
        path = checkpoints / f"step_{step:06d}"
        shutil.copytree(good, path)
        file = max((path / manifests.STATE).glob("*.distcp"), key=lambda p: p.stat().st_size)
        contents = bytearray(file.read_bytes())
        contents[len(contents) // 3] ^= 0x10
        file.write_bytes(contents if damage == "flipped" else contents[: len(contents) // 2])
        if damage == "half-written":
            (path / manifests.MANIFEST).unlink()
    step, logged = run_ranks(2, resume_only, damaged, case, case.saved)[0]
    assert step == 2
    text = "\n".join(logged)
    for says in ("step_000008 has no manifest.json", "were written", "step_000006/state/__", "step_000004/state/__"):
        assert says in text
    assert "SHA-256 differs" in text

    shutil.rmtree(good)
    refused, _ = run_ranks(2, resume_only, damaged, case, case.saved)[0]
    assert isinstance(refused, str) and refused.startswith(f"no checkpoint in {checkpoints} can be used")
    assert all(f"step_{step:06d}" in refused for step in (4, 6, 8)) and "Move them away" in refused


def test_another_kind_of_optimizer_is_refused(root: Path, uninterrupted: list[dict[str, Any]]) -> None:
    case = FAST_CASES[0]
    other = Case(case.family, case.saved, (), (*case.overrides, ("optimizer.distributed", False)))
    shutil.copytree(root / case.name, root / other.name)
    refused, _ = run_ranks(2, resume_only, root, other, case.saved)[0]
    assert "optimizer.distributed = True, now it is False" in str(refused)


def test_an_optimizer_that_cannot_move_is_refused(root: Path) -> None:
    """Replicated optimizers of experts that are divided over other ranks."""
    case = Case("qwen3_moe", {"data": 2}, (), (("optimizer.distributed", False),))
    run_ranks(2, save_and_go_on, root, [case])
    refused, _ = run_ranks(2, resume_only, root, case, {"data": 2, "expert": 2})[0]
    assert "number of optimizers" in str(refused) and "set it as it was" in str(refused)


def check_converted(root: Path, cases: list[Case], uninterrupted: list[dict[str, Any]]) -> None:
    for number, (case, outcome) in enumerate(zip(cases, uninterrupted, strict=True)):
        out = root / f"converted-{number}"
        checkpoint_to_hf(root / case.name / "checkpoints" / "step_000002", out, max_shard_bytes=2**30)
        converted = load_file(out / "model.safetensors")
        assert converted.keys() == outcome["saved"].keys()
        for name, tensor in outcome["saved"].items():
            assert converted[name].dtype == tensor.dtype and torch.equal(converted[name], tensor), (case.name, name)


def test_conversion_of_what_a_run_saved(root: Path, uninterrupted: list[dict[str, Any]]) -> None:
    check_converted(root, FAST_CASES, uninterrupted)


@leaving_nothing
def resume_weights(root: Path, case: Case, parallel: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    from drpo_megatron.checkpoint.saver import Saver

    config = configuration(root, case, parallel)
    policy = enter(config, first=True)
    resumed = Saver(config).resume(policy)
    loaded = weights(policy)
    # An update writes the main weights over these.
    policy.update(make_sequences(policy.hf.vocab_size), 0)
    after = weights(policy)
    moved = max((float((tensor - loaded[name]).abs().max()) for name, tensor in after.items()), default=0.0)
    return (resumed and resumed.manifest.step, resumed and resumed.driver, moved), loaded


def test_a_run_goes_on_from_a_converted_directory(root: Path) -> None:
    """A checkpoint of weights alone: other weights than model.path's, and an optimizer that starts."""
    case = Case("qwen3", SP2, (), (("save.keep", 7), ("model.dtype", "bfloat16")))
    tiny_models.write("qwen3", root / "other", seed=5)
    hf_to_checkpoint(root / "other", root / case.name / "checkpoints" / "step_000000", max_shard_bytes=2**30)
    (step, driver, moved), loaded = run_ranks(2, resume_weights, root, case, case.saved)[0]
    assert (step, driver) == (0, None)
    for name, tensor in load_file(root / "other" / "model.safetensors").items():
        assert torch.equal(loaded[name], tensor.bfloat16()), name
    # The first learning rate of the warm-up is 0: what moves weights are main weights that are still model.path's.
    assert moved == 0


@leaving_nothing
def fill_the_disk(root: Path, case: Case) -> str:
    import resource

    from drpo_megatron.checkpoint.saver import Saver

    config = configuration(root, case, case.saved)
    policy = enter(config, first=True)
    updates(policy, range(1))
    saver = Saver(config)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk: a write fails in the middle of a file
    try:
        saver.save(policy, 1, 1, None, {})
        saver.finish()
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return ""


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_is_full_is_named(root: Path, asynchronous: bool) -> None:
    case = Case("qwen3", {"data": 2}, (), (("save.keep", 5), ("save.asynchronous", asynchronous)))
    said = run_ranks(2, fill_the_disk, root, case)
    directory = root / case.name / "checkpoints"
    assert all(f"a checkpoint in {directory}" in text and "could not be written" in text for text in said)
    assert "encountered an error" in said[0] and "GB are free there" in said[0]
    assert not [path for path in directory.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_a_tensor_is_saved_without_a_copy_of_it(dtype: torch.dtype) -> None:
    buffer = torch.arange(12).to(dtype)
    part = buffer[4:10].view(2, 3)
    alone = with_own_storage(part)
    assert alone.untyped_storage().nbytes() == 6 * dtype.itemsize
    buffer[4:10] = 7
    assert torch.equal(alone, torch.full((2, 3), 7).to(dtype))
    assert with_own_storage(buffer.view(3, 4)[:, :2]).untyped_storage().nbytes() == 12 * dtype.itemsize

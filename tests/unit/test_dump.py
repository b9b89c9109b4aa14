"""Dumped rollouts come back as they were, to the bit, and what does not fit is refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from drpo_megatron import cli
from drpo_megatron.commands import EXIT_REFUSED
from drpo_megatron.config import load_config
from drpo_megatron.models.recipes import ensure_model
from drpo_megatron.records import Prompt, Rollout, RolloutGroup
from drpo_megatron.rollout.dump import ABOUT, DumpError, RolloutDump

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
PROMPTS, SAMPLES, STEPS = 4, 2, 3


def groups_of_a_step(seed: int, experts: int | None = None) -> list[RolloutGroup]:
    """Two groups of the same prompt in a row, several turns, and log μ that float32 has and short decimals have not."""
    draw = np.random.default_rng(seed)
    groups = []
    for number in range(PROMPTS):
        prompt = Prompt("p:1" if number < 2 else f"p:{number}", [1, 2, 3], "1+\u2028é", "7", {"entry": {"x": [1.5]}})
        rollouts = []
        for length in draw.integers(1, 6, SAMPLES).tolist():
            logmu = np.float32(-(draw.random(length) ** 8)).tolist()
            mask = [1, *draw.integers(0, 2, length - 1).tolist()]
            rollout = Rollout(prompt, draw.integers(0, 60, length).tolist(), logmu, [4] * length, "stop", mask, "t\n")
            rollout.reward, rollout.advantage = float(draw.random()), float(draw.random()) / 3
            if experts is not None:
                shape = (len(prompt.token_ids) + length - 1, 2, 3)
                rollout.routed_experts = draw.integers(0, experts, shape).astype(np.int16)
            rollouts.append(rollout)
        groups.append(RolloutGroup(prompt, rollouts))
    return groups


def test_what_was_dumped_comes_back(tmp_path: Path) -> None:
    dump = RolloutDump(tmp_path)
    for step in (0, 11):
        dump.write(step, groups_of_a_step(step), routed_experts=True)
    assert dump.steps() == [0, 11]
    assert dump.read(11) == groups_of_a_step(11) != dump.read(0)
    dump.forget_from(1)
    assert dump.steps() == [0]
    with pytest.raises(DumpError, match="step_000011"):
        dump.read(11)


@pytest.mark.parametrize(("experts", "dtype"), [(8, np.uint8), (300, np.int16)])
def test_routed_experts_come_back(tmp_path: Path, experts: int, dtype: type) -> None:
    dump, groups = RolloutDump(tmp_path), groups_of_a_step(0, experts)
    dump.write(0, groups, routed_experts=True)
    assert np.load(tmp_path / "step_000000.experts.npy").dtype == dtype
    for there, here in zip(dump.read(0), groups, strict=True):
        for read, written in zip(there.rollouts, here.rollouts, strict=True):
            assert read.routed_experts is not None and read.routed_experts.dtype == np.int16
            np.testing.assert_array_equal(read.routed_experts, written.routed_experts)
    groups[0].rollouts[0].routed_experts = None
    with pytest.raises(ValueError, match="1 of 8 rollouts"):
        dump.write(1, groups, routed_experts=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_model("tiny_qwen3", tmp_path_factory.mktemp("models") / "tiny")


def settings(model: Path, directory: Path) -> list[str]:
    sizes = [f"rollout.prompts_per_step={PROMPTS}", f"rollout.samples_per_prompt={SAMPLES}", f"training.steps={STEPS}"]
    return [f"model.path={model}", "model.recipe=null", f"tracking.directory={directory}", *sizes]


@pytest.fixture
def dump(model: Path, tmp_path: Path) -> RolloutDump:
    """Of a run that took `settings` and was called "former"."""
    dump = RolloutDump(tmp_path / "former" / "rollouts")
    dump.write_about(load_config(QUICKSTART, [*settings(model, tmp_path), "name=former"]))
    for step in range(STEPS):
        dump.write(step, groups_of_a_step(step), routed_experts=False)
    return dump


Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(model: Path, dump: RolloutDump, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Say:
    """Exit code and output of a dry run over the dump."""

    def run(*overrides: str, rollouts: Path = dump.directory.parent) -> tuple[int, str]:
        words = ["train", str(QUICKSTART), *settings(model, tmp_path), *overrides, "--dry-run"]
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--rollouts", str(rollouts)])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return run


def test_a_replay_starts_no_servers(say: Say, dump: RolloutDump, monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither what servers need nor where they are matters.
    code, said = say("rollout.server.api_key_env=NOT_SET", "rollout.server.addresses=[http://elsewhere:1]")
    assert code == 0 and f"rollouts are read from {dump.directory.parent}" in said and "sglang" not in said
    assert say(rollouts=dump.directory)[0] == 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.steps=5", "lacks 2 of the 5 steps, the first is 3; lower training.steps to 3"),
        ("name=former", "give this run another name"),
        ("rollout.prompts_per_step=8", "rollout.prompts_per_step = 4, and it is 8 here"),
        ("rollout.samples_per_prompt=4", "rollout.samples_per_prompt = 2, and it is 4 here"),
        ("rollout.sampling.temperature=0.5", "rollout.sampling.temperature = 1, and it is 0.5 here"),
        ("rollout.sampling.max_new_tokens=3", "max_new_tokens = 4, and it is 3 here"),
    ],
)
def test_settings_that_are_not_the_dumps(say: Say, override: str, says: str) -> None:
    code, said = say(override)
    assert code == EXIT_REFUSED and "rollout.from_dump: " in said and says in said


def test_another_model_and_tokenizer(say: Say, model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}, indent=7))
    assert say(f"model.path={other}")[0] == 0
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    code, said = say(f"model.path={other}")
    assert code == EXIT_REFUSED and "another model" in said and "tokenizer" not in said
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    code, said = say(f"model.path={other}")
    assert code == EXIT_REFUSED and "another model" in said and "another tokenizer" in said


def test_a_mixture_of_experts_needs_its_experts(say: Say, dump: RolloutDump, tmp_path: Path) -> None:
    path = ensure_model("tiny_qwen3_moe", tmp_path / "experts")
    for dumped in ("false", "true"):
        overrides = [f"model.path={path}", f"tracking.dump_routed_experts={dumped}", "parallel.sequence_parallel=true"]
        dump.write_about(load_config(QUICKSTART, [*settings(path, tmp_path), *overrides]))
        code, said = say(*overrides)
        assert (code == 0) == (dumped == "true"), said
        assert ("no routed experts" in said) == (dumped == "false")
        assert say(*overrides, "model.routing_replay=false")[0] == 0


def test_damage_is_named(say: Say, dump: RolloutDump, tmp_path: Path) -> None:
    first = dump.directory / "step_000000.jsonl"
    whole = first.read_text()
    lines = whole.split("\n")
    record = json.loads(lines[1])
    for damaged, says in (
        (whole[:-30], "line 8, is not a rollout"),
        ("", "is empty"),
        (json.dumps({k: v for k, v in record.items() if k != "response_mask"}), "'response_mask'"),
        (json.dumps(record | {"logmu": [0.0] * 99}), "differ in length"),
        ("7", "line 1, is not a rollout"),
    ):
        first.write_text(damaged)
        code, said = say()
        assert code == EXIT_REFUSED and says in said, said
    first.write_text(whole)
    about = dump.directory / ABOUT
    about.write_text(about.read_text().replace('"format": 1', '"format": 2'))
    assert "not of format 1" in say()[1]
    about.unlink()
    assert "about.json" in say()[1]
    assert "about.json" in say(rollouts=tmp_path / "nowhere")[1]

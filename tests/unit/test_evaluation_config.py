"""What `drpo evaluate` and `evaluation` refuse, and what a command line becomes. Nothing is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron import cli
from drpo_megatron.commands import EXIT_REFUSED
from drpo_megatron.config import ConfigError, RunConfig, dump_config, load_config
from drpo_megatron.config.evaluation_checks import evaluation_problems
from drpo_megatron.config.schema import EvaluationSampling, FileData, ReasoningGymData, SamplingConfig
from drpo_megatron.evaluation.during_training import results_path
from drpo_megatron.evaluation.request import config_of
from drpo_megatron.models.recipes import ensure_model
from drpo_megatron.observability import Tracker
from drpo_megatron.rollout.client import request_body

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SET = "{source: {type: function, function: 'drpo_megatron.data.examples:repeat_digit', size: 10, seed: 9}}"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_model("tiny_qwen3", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1", "answer": f"#### {i + 1}"}) + "\n" for i in range(5)))
    return path


def asked(*words: object) -> RunConfig:
    return config_of(cli.parse_arguments(["evaluate", *map(str, words)]))


def refused(*words: object) -> str:
    with pytest.raises(ConfigError) as caught:
        asked(*words)
    return str(caught.value)


def test_a_model_directory_needs_no_configuration(pristine: Path, sums: Path) -> None:
    words = (pristine, "data.chat_template=false", "--data", sums, f"again={sums}:gsm8k", "--samples", 8, "--k", "1,4")
    config = asked(*words, "--limit", 3, "--servers", "http://127.0.0.1:1/")
    assert config.model.path == pristine and config.model.dtype == "float32"
    assert list(config.evaluation.sets) == ["sums", "again"]
    for chosen, layout in zip(config.evaluation.sets.values(), ("auto", "gsm8k"), strict=True):
        assert isinstance(chosen.source, FileData) and chosen.source.layout == layout and chosen.source.path == sums
        assert chosen.samples == 8 and chosen.limit == 3
    assert config.evaluation.ks == [1, 4] and config.reward.type == "math_verify"
    assert config.rollout.server.addresses == ["http://127.0.0.1:1"] and config.rollout.server.devices == [0]


def test_a_configuration_has_its_own_sets(pristine: Path, tmp_path: Path) -> None:
    base = (QUICKSTART, f"model.path={pristine}")
    config = asked(*base, f"evaluation.sets.digits={SET}", "evaluation.sets.digits.samples=2", "evaluation.top_p=0.9")
    assert config.evaluation.sets["digits"].samples == 2
    assert config.evaluation_sampling == EvaluationSampling(top_p=0.9, max_new_tokens=4, ignore_eos=True)
    assert request_body([[1]], config.evaluation_sampling)["sampling_params"]["top_p"] == 0.9
    assert request_body([[1]], SamplingConfig(max_new_tokens=4))["sampling_params"]["top_p"] == 1.0
    gym = asked(*base, "--data", "reasoning_gym:basic_arithmetic", "--limit", 7).evaluation.sets["basic_arithmetic"]
    assert isinstance(gym.source, ReasoningGymData) and gym.source.size == 7 and gym.reward is not None
    assert gym.source.seed != ReasoningGymData(task="basic_arithmetic").seed
    smollm2 = (ROOT / "configs" / "smollm2-arithmetic.yaml", f"model.path={pristine}", "parallel.pipeline=1")
    trained = asked(*smollm2, "--data", "reasoning_gym:basic_arithmetic", "--limit", 7)
    own = trained.evaluation.sets["basic_arithmetic"]
    assert own.reward is None and trained.reward.extract is not None
    assert isinstance(own.source, ReasoningGymData) and own.source.options["operators"] == ["+"]
    other = asked(*smollm2, "--data", "reasoning_gym:chain_sum", "--limit", 7).evaluation.sets["chain_sum"]
    assert isinstance(other.source, ReasoningGymData) and other.source.options == {} and other.reward is None
    # a run's resolved configuration, as its ranks read it, is the same
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config))
    assert load_config(resolved) == config


def test_what_cannot_be_evaluated_is_refused(pristine: Path, sums: Path, tmp_path: Path) -> None:
    base, plain = (QUICKSTART, f"model.path={pristine}"), (pristine, "data.chat_template=false")
    assert "evaluation.sets: is empty" in refused(*base)
    assert "`drpo train" in refused(QUICKSTART, f"model.path={tmp_path / 'absent'}", "--data", sums)
    assert "give a Hugging Face directory" in refused(tmp_path, "--data", sums)
    assert "Overrides stand before --data" in refused(*plain, "--data", sums, "evaluation.top_p=0.5")
    assert "does not exist" in refused(*plain, "--data", "absent.jsonl")
    assert "a second set of the name sums" in refused(*plain, "--data", sums, sums)
    assert "say how many with --limit" in refused(*plain, "--data", "reasoning_gym:basic_arithmetic")
    assert "the 2 samples of sums" in refused(*plain, "--data", sums, "--samples", 2, "--k", "1,4")
    assert "evaluation.ks" in refused(*plain, "--data", sums, "--k", "1,x")
    assert "at temperature 0" in refused(*plain, "evaluation.temperature=0", "--data", sums, "--samples", 2)
    assert "evaluation.max_new_tokens: 5000" in refused(*plain, "evaluation.max_new_tokens=5000", "--data", sums)
    assert "fp8.rollout" in refused(*base, "fp8.rollout=true", "fp8.backend=emulate", "--data", sums)
    assert "is not the address of a server" in refused(*plain, "--data", sums, "--servers", "evaluation.top_p=1")


def test_exit_codes(pristine: Path, sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(pristine), "data.chat_template=false", "--data", str(sums), "--out", str(sums)]
    for more, said in (([], "exists; name another file"), (["--servers", "http://127.0.0.1:9"], "does not generate")):
        if more:
            words[-1] = str(tmp_path / "out.jsonl")
        with pytest.raises(SystemExit) as exit_info:
            cli.main([*words, *more])
        assert exit_info.value.code == EXIT_REFUSED and said in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_settings_of_sets_are_checked(sums: Path) -> None:
    def problems(**evaluation: Any) -> str:
        override = f"evaluation={json.dumps(evaluation)}"
        return "\n".join(evaluation_problems(load_config(QUICKSTART, [override])))

    file = {"source": {"type": "jsonl", "path": str(sums), "layout": "gsm8k"}}
    assert problems(every=2, sets={"a": file}) == ""
    assert "evaluation.every is 2; name a set" in problems(every=2)
    assert "evaluation.sets.a/b: 'a/b' is not a name" in problems(sets={"a/b": file})
    assert "does not contain {prompt}" in problems(sets={"a": file | {"prompt_template": "x"}})
    assert "needs data.chat_template" in problems(sets={"a": file | {"system_prompt": "x"}})
    keyed = {"source": file["source"] | {"prompt_key": "q"}}
    assert "evaluation.sets.a.source.prompt_key: has no effect" in problems(sets={"a": keyed})
    gym = file | {"reward": {"type": "reasoning_gym"}}
    assert "evaluation.sets.a.reward.type: reasoning_gym scores its own problems only" in problems(sets={"a": gym})
    assert problems(sets={"a": {"source": file["source"] | {"layout": "auto"}}}) == ""
    wrong = {"source": file["source"] | {"layout": "aime"}}
    assert f"{sums}:1: the answer of an aime row" in problems(sets={"a": wrong})
    with pytest.raises(ConfigError, match=r"evaluation\.sets\.a\.limits: unknown key; did you mean 'limit'"):
        problems(sets={"a": file | {"limits": 3}})
    with pytest.raises(ConfigError, match=r"evaluation\.sets\.a\.source\.type: 'csv' is unknown"):
        problems(sets={"a": {"source": {"type": "csv"}}})


def test_results_of_steps_that_are_done_again_are_removed(tmp_path: Path) -> None:
    settings = ("tracking.wandb=false", "tracking.dump_rollouts=false")
    config = load_config(QUICKSTART, [f"tracking.directory={tmp_path}", *settings])
    files = [results_path(config.run_directory, "a", done) for done in (4, 8)]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    with Tracker(config, first_step=4):
        assert [path.exists() for path in files] == [True, False]
    shutil.rmtree(config.run_directory)

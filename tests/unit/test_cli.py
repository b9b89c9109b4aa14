"""Bad input at the command line: a sentence that says what to do, exit code 2, and nothing started or written."""

from __future__ import annotations

import importlib
import json
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from drpo_megatron import cli
from drpo_megatron.commands import COMMANDS, EXIT_REFUSED
from drpo_megatron.config import load_config
from drpo_megatron.models.recipes import ensure_model
from drpo_megatron.rollout.fleet import fleet_of
from drpo_megatron.rollout.server_args import DELTA_LOADER

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_model("tiny_qwen3", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


Refuse = Callable[..., str]


@pytest.fixture
def refuse(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Run `drpo train` with overrides, which must be refused; return what it says."""
    monkeypatch.setattr("launch.local.run", lambda *_: pytest.fail("the run was started"))

    def run(*overrides: str) -> str:
        base = [f"model.path={model}", "model.recipe=null", f"tracking.directory={tmp_path / 'runs'}"]
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["train", str(QUICKSTART), *base, *overrides])
        assert exit_info.value.code == EXIT_REFUSED
        assert not (tmp_path / "runs").exists()
        return capsys.readouterr().err

    return run


def test_unknown_key_names_the_nearest(refuse: Refuse) -> None:
    message = refuse("rollout.prompts_per_steps=4", "optimiser.lr=1")
    assert "prompts_per_step" in message and "optimizer" in message


def test_layout_that_does_not_divide_the_heads(refuse: Refuse) -> None:
    message = refuse("parallel.tensor=3")
    assert "4" in message and "heads" in message and "parallel.tensor" in message


def test_model_directory_without_a_configuration(refuse: Refuse, model: Path) -> None:
    (model / "config.json").unlink()
    assert "config.json" in refuse()


def test_corrupt_safetensors(refuse: Refuse, model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refuse()


def test_tokenizer_that_does_not_fit_the_vocabulary(refuse: Refuse, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    message = refuse()
    assert "64" in message and "tokenizer" in message


def test_port_in_use(refuse: Refuse) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refuse(f"rollout.server.port={port}")
    assert str(port) in message and "in use" in message


def test_argument_that_sglang_does_not_have(refuse: Refuse) -> None:
    assert "chunked_prefill_size" in refuse("rollout.server.args={chunked_prefil_size: 128}")


def test_loss_without_its_parameter(refuse: Refuse) -> None:
    assert "delta" in refuse("algorithm.loss_args={}")


def test_unknown_recipe(refuse: Refuse) -> None:
    assert "tiny_qwen3" in refuse("model.recipe=tiny_qwen4")


def test_a_boundary_out_of_reach_is_mentioned(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["train", str(QUICKSTART), f"model.path={model}", "model.recipe=null", "--dry-run"]
    for delta, mentioned in (("12.5", True), ("0.9", False)):
        with pytest.raises(SystemExit) as exit_info:
            cli.main([*base, f"algorithm.loss_args={{delta: {delta}}}"])
        assert exit_info.value.code == 0
        assert ("never reached" in capsys.readouterr().out) == mentioned


def test_overrides_may_stand_behind_options() -> None:
    parsed = cli.parse_arguments(["train", "a.yaml", "x.y=1", "--dry-run", "z=2"])
    assert parsed.dry_run and parsed.overrides == ["x.y=1", "z=2"]
    with pytest.raises(SystemExit):
        cli.parse_arguments(["train", "a.yaml", "--dry-rum", "z=2"])


def test_servers_of_a_delta_run_get_its_loader(model: Path) -> None:
    def flags(*overrides: str) -> list[str]:
        base = [f"model.path={model}", "model.recipe=null", "rollout.server.args={custom_weight_loader: [a.b]}"]
        return fleet_of(load_config(QUICKSTART, [*base, *overrides])).commands()[0]

    plain, delta = flags(), flags("sync.transport=delta")
    at = plain.index("--custom-weight-loader")
    assert plain[at + 1] == "a.b"
    assert delta == [*plain[: at + 2], DELTA_LOADER, *plain[at + 2 :]]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_are_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    examples = importlib.import_module(f"drpo_megatron.commands.{name}").EXAMPLES
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    for example in examples:
        program, *words = shlex.split(example)
        parsed = cli.parse_arguments(words)
        assert program == "drpo" and words[0] == name and f"  {example}\n" in shown
        if getattr(parsed, "config", None):
            load_config(ROOT / parsed.config, parsed.overrides)

"""Random damage to sound configurations: `drpo train --dry-run` prints what would run, or says which setting is wrong.

Nothing else may happen: no other exception, no file, no process.
"""

from __future__ import annotations

import copy
import datetime
import io
import os
import random
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from drpo_megatron import cli
from drpo_megatron.commands import EXIT_REFUSED
from drpo_megatron.config import ConfigError, FieldHelp, field_help, load_config
from drpo_megatron.models.recipes import ensure_model
from launch.local import describe

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MUTATIONS = 100
SEED = os.environ.get("DRPO_FUZZ_SEED", datetime.date.today().isoformat())
"""Others each day, so that the fast tests go through many in the end. A failure says how to repeat it."""

Keys = tuple[Any, ...]

VALUES: list[Any] = [
    *(None, True, False, "", " ", "null", "x", "1", "-1", "1e400", "a: b", "../..", "/", ".", "..", "~", "x" * 5000),
    *("ключ", "\u202e", "🜁", "a\nb", "a\0b", "\ud800", "module:", ":function", "os:path", "(", "{prompt", "%s{0}"),
    *(0, 1, 2, 3, 7, -1, 2**31, 2**63, 2**64, -(2**64), 10**400),
    *(0.0, -0.0, 0.5, 1.5, -1.0, 1e-320, 1e300, float("inf"), float("-inf"), float("nan")),
    *(
        [],
        [None],
        [1, 2, 3],
        ["x"],
        [[[]]],
        {},
        {"x": 1},
        {"": {}},
        {1: 2},
        {None: None},
        {"type": "x"},
        {"a": {"b": [{}]}},
    ),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every recipe with a tiny model of its kind, and on this host."""
    directory = tmp_path_factory.mktemp("models")
    dense = ensure_model("tiny_qwen3", directory / "dense")
    experts = ensure_model("tiny_qwen3_moe", directory / "experts")
    found = []
    for path in CONFIGS:
        base = yaml.safe_load(path.read_text())
        mixture = any(key.startswith(("moe_", "routing_")) for key in base["model"]) or "moe" in path.stem
        base["model"] |= {"path": str(experts if mixture else dense), "dtype": "float32"}
        base["model"].pop("recipe", None)
        base["data"]["source"] = {"type": "function", "function": "drpo_megatron.data.examples:repeat_digit"}
        base["data"] |= {"chat_template": False, "max_prompt_tokens": 16}
        base["data"].pop("system_prompt", None)
        base["reward"] = {"type": "function", "function": "drpo_megatron.rewards.examples:matching_characters"}
        base["rollout"]["sampling"]["max_new_tokens"] = 16
        base["rollout"].pop("server", None)
        for section in ("parallel", "fp8"):
            base.pop(section, None)
        found.append(base)
    return found


def places(value: Any, at: Keys = ()) -> Iterator[Keys]:
    """The keys that lead to every value inside `value`."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from places(child, (*at, key))


def parent_of(config: Any, at: Keys) -> Any:
    for key in at[:-1]:
        config = config[key]
    return config


def misspelt(key: str, choose: random.Random) -> str:
    at = choose.randrange(len(key))
    return choose.choice(
        [key[:at] + key[at + 1 :], key[:at] + key[at] + key[at:], key.upper(), key + "_", "", f"{key}.x"]
    )


def nested(value: Any, depth: int, choose: random.Random) -> Any:
    for _ in range(depth):
        value = choose.choice([[value], {"x": value}])
    return value


def fitting(setting: FieldHelp, choose: random.Random) -> Any:
    """A value of the setting's type, sensible or not."""
    kind = choose.choice(setting.type.split(" | "))
    kinds = {"int": int, "float": float, "string": str, "path": str, "mapping": dict, "bool": bool}
    values = [v for v in VALUES if type(v) is kinds[kind]] if kind in kinds else [None if kind == "null" else kind]
    return choose.choice(values)


def mutate(config: dict[str, Any], settings: dict[str, FieldHelp], choose: random.Random) -> Keys:
    """Damage `config` in one place; the keys of that place."""
    at = choose.choice(list(places(config)))
    parent, key = parent_of(config, at), at[-1]
    what = choose.choice(["value", "value", "delete", "misspell", "list", "nest", "swap", "add", *["fitting"] * 8])
    if what == "delete":
        del parent[key]
    elif what == "misspell" and isinstance(parent, dict):
        parent[misspelt(key, choose)] = parent.pop(key)
    elif what == "list":
        parent[key] = [parent[key]]
    elif what == "nest":
        parent[key] = nested(parent[key], choose.choice([1, 3, 30, 150]), choose)
    elif what == "swap":
        other = choose.choice([p for p in places(config) if p[: len(at)] != at[: len(p)] and at[: len(p)] != p] or [at])
        parent[key] = copy.deepcopy(parent_of(config, other)[other[-1]])
    elif what in ("add", "fitting"):
        name = choose.choice(list(settings))
        at = tuple(name.split("."))
        section = config
        for part in at[:-1]:
            section = section.setdefault(part, {}) if isinstance(section, dict) else {}
            section = section if isinstance(section, dict) else {}
        section[at[-1]] = fitting(settings[name], choose) if what == "fitting" else choose.choice(VALUES)
    else:
        parent[key] = choose.choice(VALUES)
    return at


def dry_run(path: Path) -> tuple[int, str]:
    """Exit code of `drpo train PATH --dry-run`, and what it says in the terminal's encoding."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.main(["train", str(path), "--dry-run"])
    out.flush(), err.flush()
    return int(ended.value.code or 0), err.buffer.getvalue().decode()


def names_it(message: str, at: Keys) -> bool:
    """Whether a problem is about this place, something in it, or what it is in."""
    keys = [str(key) for key in at]
    dotted = [".".join(keys[: n + 1]) for n in range(len(keys))]
    return any(path and path in message for path in [*dotted, keys[-1]])


def damage(bases: list[dict[str, Any]], path: Path, seed: str, mutations: int) -> dict[int, int]:
    """Dry runs of configurations in the file `path`, each damaged by its own number; exit code → how many ended so."""
    settings = {setting.path: setting for setting in field_help()}
    codes = {0: 0, EXIT_REFUSED: 0}
    unlike: list[str] = []
    for number in range(mutations):
        choose = random.Random(f"{seed}:{number}")
        config = copy.deepcopy(choose.choice(bases))
        places_damaged = [mutate(config, settings, choose) for _ in range(choose.choice([1, 1, 1, 2]))]
        path.write_text(yaml.dump(config, allow_unicode=False))
        try:
            code, message = dry_run(path)
        except Exception as error:  # noqa: BLE001 - what the test looks for
            unlike.append(f"{number} {places_damaged}: {type(error).__name__}: {str(error)[:200]}")
            continue
        codes[code] += 1
        if code and not any(names_it(message, at) for at in places_damaged):
            unlike.append(f"{number} {places_damaged} is not named: {message[:300]}")
    assert not unlike, "\n".join([f"{len(unlike)} of {mutations}; again with DRPO_FUZZ_SEED={seed}", *unlike])
    return codes


@pytest.fixture
def started_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file for the configurations; afterwards it is alone in its directory, and no run was started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.local.run", lambda *_: pytest.fail("the run was started"))
    yield tmp_path / "mutant.yaml"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mutant.yaml"]


def test_100_mutations_of_the_day(bases: list[dict[str, Any]], started_nothing: Path) -> None:
    """2,000, the same each day: tests/slow/test_config_fuzz.py."""
    codes = damage(bases, started_nothing, SEED, MUTATIONS)
    assert all(codes.values()), (codes, f"again with DRPO_FUZZ_SEED={SEED}")


def test_the_bases_are_sound(bases: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for base in bases:
        (tmp_path / "base.yaml").write_text(yaml.dump(base))
        code, message = dry_run(tmp_path / "base.yaml")
        assert code == 0, f"{base['name']}: {message}"


LAUGHS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param("name: a\nname: b\n", "name: given twice, in lines 1 and 2", id="repeated key"),
        pytest.param(
            "model: &m {path: *m}\n", "found unconstructable recursive node", id="alias inside its own mapping"
        ),
        pytest.param("rollout: &r [*r]\n", "found unconstructable recursive node", id="alias inside its own list"),
        pytest.param(
            f"a0: &a0 [x]\n{LAUGHS}\nname: *a29\n", "holds more than 10000 values", id="aliases of aliases of aliases"
        ),
        pytest.param("model:\n\tpath: x\n", "cannot start any token", id="tabs"),
        pytest.param(b"\x7fELF\x02\x01\x01\0\xff\xfe", "is not UTF-8 text", id="binary"),
        pytest.param("name: \0\n", "special characters are not allowed", id="NUL"),
        pytest.param('name: "\\ud800"\n', "name: '\\ud800' holds a character", id="half a surrogate pair"),
        pytest.param("x: y\n" * 2_000_000, "is longer than 1 MiB", id="10 MB"),
        pytest.param("[" * 100_000, "it is nested too deeply", id="deep"),
        pytest.param("training: " + "[" * 90 + "]" * 90, "training: is nested more than 50 deep", id="rather deep"),
        pytest.param("training: {steps: 2024-99-99}\n", "month must be in 1..12", id="no date"),
        pytest.param(f"training: {{steps: {'9' * 5000}}}\n", "is not valid YAML (Exceeds the limit", id="no number"),
        pytest.param("? [a, b]\n: c\n", "keys are words", id="a list as a key"),
        pytest.param("1: 2\n", "has the key 1, and keys are words", id="a number as a key"),
        pytest.param("!!python/object/apply:os.getcwd []\n", "could not determine a constructor", id="a Python object"),
        pytest.param("- a\n- b\n", "it must be a mapping of sections", id="a list"),
        pytest.param("text\n", "it must be a mapping of sections", id="a word"),
        pytest.param("", "it must be a mapping of sections", id="nothing"),
        pytest.param("a: b\n---\nc: d\n", "expected a single document", id="two documents"),
    ],
)
def test_unhappy_files(tmp_path: Path, content: str | bytes, says: str) -> None:
    path = tmp_path / "mutant.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, message = dry_run(path)
    assert code == EXIT_REFUSED and says in message and len(message) < 20_000


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.lr=.nan", "optimizer.lr: must be a finite number"),
        ("optimizer.lr=.inf", "optimizer.lr: must be a finite number"),
        ("optimizer.betas=[.nan, 0.9]", "optimizer.betas: must be a finite number"),
        ("optimizer.lr=1e400", "optimizer.lr: must be a finite number"),
        (f"algorithm.loss_args.delta={10**400}", "algorithm.loss_args.delta: 1000000"),
        ("algorithm.loss_args.delta=.nan", "algorithm.loss_args.delta: must be a finite number"),
        ("name=..", "name: '..' does not match"),
        (f"name={'x' * 300}", "name: string should have at most 200 characters"),
        (f"model.path={'x' * 300}", "model.path: must be a path that file systems take"),
        (f"tracking.directory={'x/' * 2000}", "tracking.directory: must be a path that file systems take"),
        ("seed=4294967296", "seed: must be less than 2147483648"),
        ("rollout.server.count=1000000000", "rollout.server.count: must be less than or equal to 256"),
        ("training.steps=9223372036854775808", "training.steps: 9223372036854775808 does not fit into 64 bits"),
        ("rollout.server.args={x: [", "rollout.server.args: the value '{x: [' is not valid YAML"),
        ('rollout.server.args={"a\\0": 1}', "keys are words"),
    ],
)
def test_values_that_no_run_can_take(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(CONFIGS[0].with_name("quickstart.yaml"), [override])
    (problem,) = refused.value.problems
    assert says in problem and len(problem) < 600


def test_a_dry_run_of_many_ranks_is_short() -> None:
    config = load_config(CONFIGS[0].with_name("quickstart.yaml"), ["parallel.data=1000000"])
    lines = describe(config, config.layout, []).splitlines()
    assert len(lines) < 1100 and any("more in the same order" in line for line in lines)

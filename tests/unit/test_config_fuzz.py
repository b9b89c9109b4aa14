"""Random damage to sound configurations: `drpo train --dry-run` prints what would run, or says which setting is wrong.

Nothing else may happen: no other exception, no file, no process.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from drpo_megatron import cli
from drpo_megatron.commands import EXIT_REFUSED
from drpo_megatron.config import FieldHelp, field_help
from drpo_megatron.models.recipes import ensure_model

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MUTATIONS = int(__import__("os").environ.get("N", 2000))
SEED = 20

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


def test_2000_mutations(bases: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.local.run", lambda *_: pytest.fail("the run was started"))
    settings = {setting.path: setting for setting in field_help()}
    path = tmp_path / "mutant.yaml"
    codes = {0: 0, EXIT_REFUSED: 0}
    unlike: list[str] = []
    for number in range(MUTATIONS):
        choose = random.Random(f"{SEED}:{number}")
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
    assert not unlike, "\n".join([f"{len(unlike)} of {MUTATIONS}", *unlike])
    assert min(codes.values()) > MUTATIONS / 10, codes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mutant.yaml"]


def test_the_bases_are_sound(bases: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for base in bases:
        (tmp_path / "base.yaml").write_text(yaml.dump(base))
        code, message = dry_run(tmp_path / "base.yaml")
        assert code == 0, f"{base['name']}: {message}"

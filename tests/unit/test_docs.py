"""Documentation says what is: its commands parse, its settings are the schema's, its metrics are those that are
written.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from drpo_megatron.cli import parse_arguments
from drpo_megatron.commands import submit
from drpo_megatron.config import load_config, setting_reference
from launch.checks import layout_problems, rollout_group_problems, time_problems
from launch.cluster import ClusterConfig, load_cluster

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            found += [(page.name, line) for line in block.splitlines() if line and not line.startswith("#")]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_of_the_documentation_is_one(page: str, line: str) -> None:
    """What the commands do is shown by the end-to-end tests; here each must exist and take these arguments."""
    words = shlex.split(line)
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return
    assert words[0] == ".venv/bin/drpo", line
    parsed = parse_arguments(words[1:])
    if words[1] in ("train", "submit"):
        load_config(ROOT / parsed.config, parsed.overrides)
    if words[1] == "submit":
        fits_its_cluster(line)


def fits_its_cluster(line: str) -> None:
    parsed = parse_arguments(shlex.split(line)[1:])
    cluster = load_cluster(ROOT / parsed.cluster)
    config = load_config(ROOT / parsed.config, parsed.overrides)
    problems = (layout_problems, rollout_group_problems, time_problems)
    assert not [problem for of in problems for problem in of(config, cluster)]
    assert not (parsed.sweep and cluster.rollout)


@pytest.mark.parametrize("line", submit.EXAMPLES)
def test_examples_of_submit_fit_their_cluster(line: str) -> None:
    fits_its_cluster(line)


def test_the_commands_are_found() -> None:
    lines = [line for _, line in commands()]
    assert "make quickstart" in lines and "make test" in lines and "make gpu" in lines


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    assert load_config(recipe).name == recipe.stem


def test_settings_page_is_current() -> None:
    assert (ROOT / "docs" / "settings.md").read_text().endswith(setting_reference().strip() + "\n"), "make settings"


def test_settings_of_the_cluster_file_are_current() -> None:
    """`drpo settings --cluster` prints the table."""
    assert (ROOT / "docs" / "slurm.md").read_text().endswith(setting_reference(ClusterConfig).strip() + "\n")


def test_links_and_pictures_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), (page.name, target)


def test_metrics_page_names_every_metric_of_a_recorded_run() -> None:
    """The recorded quickstart run has no metric that the page does not explain."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    recorded = json.loads((ROOT / "docs" / "results" / "quickstart-seed0.jsonl").read_text().splitlines()[0])
    explained = set(re.findall(r"[\w/@]+", page))
    for name in recorded:
        verb = re.fullmatch(r"perf/(generate|score|advantages|pack|train|sync)_s", name)
        family, _, last = name.rpartition("/")
        short = last.rsplit("_", 1)[-1]
        assert verb or name in explained or (family in page and ({last, short, "_" + short} & explained)), name

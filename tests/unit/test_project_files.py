"""The files that a public project is judged by: metadata, versions, citation, CI, forms, hooks, the GPU image.

Nobody notices when one of them goes stale, because no run reads it. Here each is parsed, and what it names must exist.
"""

from __future__ import annotations

import ast
import datetime
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import drpo_megatron
from drpo_megatron import cli

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
FOLDERS = (".ci", ".github", "configs", "docs", "drpo_megatron", "launch", "requirements", "tests", "tools")
"""Of the repository; beside them lie an environment, runs and caches."""
LARGEST_KB = 1000


def read_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def pins(name: str) -> dict[str, str]:
    """Package → version of requirements/NAME.txt, for those that are pinned."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    found: dict[str, str] = {}
    for requirement in [Requirement(line) for line in lines if line and not line.startswith("#")]:
        exact = [s.version for s in requirement.specifier if s.operator == "=="]
        if exact:
            found[canonicalize_name(requirement.name)] = exact[0]
    return found


def make_targets() -> set[str]:
    lines = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {target for line in lines for target in line.split()}


# --- Metadata and the version -------------------------------------------------------------------------------------


def test_metadata_says_who_what_and_under_which_license() -> None:
    assert PROJECT["name"] == "drpo-megatron" and PROJECT["requires-python"] == ">=3.12"
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
    assert PROJECT["authors"] == [{"name": "The drpo-megatron authors"}]
    assert (ROOT / PROJECT["readme"]).exists() and len(PROJECT["description"]) < 120
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert not [c for c in PROJECT["classifiers"] if c.startswith("License")], "the expression says it"
    for package in ("drpo_megatron", "launch"):
        assert (ROOT / package / "py.typed").exists()
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:2] == ["Apache", "License"] and "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000


def test_setup_py_says_nothing_of_its_own() -> None:
    body = ast.parse((ROOT / "setup.py").read_text()).body
    assert [ast.unparse(node) for node in body[1:]] == ["from setuptools import setup", "setup()"]


def test_requirements_are_read_from_their_files() -> None:
    dynamic = PYPROJECT["tool"]["setuptools"]["dynamic"]
    extras = dynamic["optional-dependencies"]
    assert set(extras) == {"gpu", "cpu", "dev"}
    files = [file for entry in (dynamic["dependencies"], *extras.values()) for file in entry["file"]]
    assert len(files) == 4 and all((ROOT / file).exists() for file in files)
    assert set(PROJECT["dynamic"]) == {"version", "dependencies", "optional-dependencies"}


def test_one_version(capsys: pytest.CaptureFixture[str]) -> None:
    """It is a literal, so that a build reads it without importing torch."""
    assert "version" not in PROJECT
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "drpo_megatron.__version__"}
    tree = ast.parse((ROOT / "drpo_megatron" / "__init__.py").read_text())
    (value,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__version__"]
    assert ast.literal_eval(value) == drpo_megatron.__version__
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0 and capsys.readouterr().out == f"drpo {drpo_megatron.__version__}\n"
    assert read_yaml("CITATION.cff")["version"] == drpo_megatron.__version__
    newest, _ = releases()[0]
    assert newest == drpo_megatron.__version__


def releases() -> list[tuple[str, str]]:
    """Version and date of each, as in the changelog."""
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = [Version(version) for version, _ in releases()]
    assert versions == sorted(set(versions), reverse=True)
    for _, date in releases():
        datetime.date.fromisoformat(date)
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert len([h for h in headings if h != "[Unreleased]"]) == len(versions) and "[Unreleased]" not in headings[1:]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds


def test_citation_can_be_cited() -> None:
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation["cff-version"] == "1.2.0"
    assert citation["title"] == PROJECT["name"] and citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert citation["date-released"] == dict(releases())[citation["version"]]
    (paper,) = citation["references"]
    assert {"type", "title", "authors", "url"} <= set(paper) and paper["url"] in (ROOT / "README.md").read_text()
    assert all({"given-names", "family-names"} == set(author) for author in paper["authors"])


# --- Requirements -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "dev", "sglang-cpu", "no-deps"])
def test_pins_are_those_of_the_tested_environment(name: str) -> None:
    tested, mine = pins("constraints"), pins(name)
    assert mine and {package: tested.get(package) for package in mine} == mine


@pytest.mark.parametrize("name", ["base", "gpu", "image"])
def test_pins_are_those_of_the_image(name: str) -> None:
    """Transformer Engine's torch extension is compiled there: no index has it."""
    image, mine = pins("constraints-gpu"), pins(name)
    assert mine and {package: image.get(package) for package in mine} == mine


def test_the_image_differs_from_the_tested_environment_in_cuda_alone() -> None:
    tested, image = pins("constraints"), pins("constraints-gpu")
    assert len(image) > 200
    differ = {p for p in tested.keys() & image.keys() if tested[p] != image[p]}
    assert all(package.startswith(("cuda-", "nvidia-")) for package in differ), differ


def test_literal_pins_of_the_makefile_are_those_of_the_requirements() -> None:
    for package, version in re.findall(r"\b([\w-]+)==([\w.]+)", (ROOT / "Makefile").read_text()):
        assert pins("constraints")[package] == version


def test_tests_run_in_their_order_unless_asked() -> None:
    assert "-p no:randomly" in PYPROJECT["tool"]["pytest"]["ini_options"]["addopts"]
    assert {"pytest-xdist", "pytest-randomly", "pytest-cov", "coverage"} <= set(pins("dev"))
    assert '"-p", "randomly"' in (ROOT / "tools" / "run_tests.py").read_text()


# --- Pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_page_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
        if target.startswith("https://"):
            continue
        linked = ROOT / target if target else ROOT / page
        assert linked.exists(), (page, target)
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, (page, target, anchor)


@pytest.mark.parametrize("page", [*PAGES, ".github/pull_request_template.md"])
def test_targets_and_files_that_the_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"(?:`|^ *)make ([\w-]+)", text, re.MULTILINE):
        assert target in make_targets(), (page, target)
    for path in re.findall(r"`((?:tests|tools|docs|requirements|drpo_megatron)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), (page, path)


def test_readme_names_license_and_contributing() -> None:
    text = (ROOT / "README.md").read_text()
    assert "(LICENSE)" in text and "(CONTRIBUTING.md)" in text


def test_contributing_names_every_folder_of_tests() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    assert folders >= {"unit", "ranks", "server", "e2e", "slurm", "gpu", "slow"}
    assert all(f"`tests/{folder}`" in text for folder in folders)


# --- GitHub -------------------------------------------------------------------------------------------------------


def test_ci_proves_changes_and_runs_the_slow_tests_at_night() -> None:
    workflow = read_yaml(".github/workflows/ci.yml")
    assert {"push", "pull_request", "schedule"} <= set(workflow["on"])
    assert re.fullmatch(r"\d+ \d+ \* \* \*", workflow["on"]["schedule"][0]["cron"]), "once a night"
    assert workflow["permissions"] == {"contents": "read"}
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in workflow["jobs"].items()}
    assert commands == {"test": ["make install", "make test"], "slow": ["make install", "make slow"]}
    assert "!= 'schedule'" in workflow["jobs"]["test"]["if"] and "== 'schedule'" in workflow["jobs"]["slow"]["if"]
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 360, "GitHub's own limit"
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)
        (python,) = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
        assert f">={python['python-version']}" == PROJECT["requires-python"]
    assert {"install", "test", "slow"} <= make_targets()


def test_the_script_of_ci_calls_targets_that_exist() -> None:
    targets = re.findall(r"^(?:exec )?make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert "test" in targets and set(targets) <= make_targets()


@pytest.mark.parametrize("form", ["bug", "feature", "model-family"])
def test_issue_form_is_one(form: str) -> None:
    """The rules are GitHub's, which shows a form that breaks one to nobody."""
    content = read_yaml(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert content["name"] and content["description"] and content["labels"]
    fields = [element for element in content["body"] if element["type"] != "markdown"]
    ids = [field["id"] for field in fields]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[\w-]+", name) for name in ids)
    labels = [field["attributes"]["label"] for field in fields]
    assert len(labels) == len(set(labels))
    assert sum(field.get("validations", {}).get("required", False) for field in fields) >= 2
    for element in content["body"]:
        assert set(element) <= {"type", "id", "attributes", "validations"}
        assert element["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        if element["type"] == "markdown":
            assert element["attributes"]["value"]
        if element["type"] in {"dropdown", "checkboxes"}:
            options = element["attributes"]["options"]
            assert len(options) >= 1 and isinstance(options[0], dict) == (element["type"] == "checkboxes")


def test_forms_name_files_that_exist() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [path.stem for path in forms] == ["bug", "config", "feature", "model-family"]
    assert read_yaml(".github/ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": False}
    named = {path for form in forms for path in re.findall(r"[\w/]+/[\w./-]+\.(?:md|yaml|txt)\b", form.read_text())}
    named.discard("log/stacks_rank_")
    assert len(named) > 4 and all((ROOT / path).exists() for path in named), named


# --- Hooks of commits ---------------------------------------------------------------------------------------------


def test_hooks_of_commits_are_what_make_lint_runs() -> None:
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: hook for hook in local["hooks"]}
    assert local["repo"] == "local" and set(hooks) == {"ruff", "ruff-format", "mypy", "check-added-large-files"}
    dev = pins("dev")
    for name in ("ruff", "ruff-format"):
        assert hooks[name]["additional_dependencies"] == [f"ruff=={dev['ruff']}"]
    # Of the environment, and so in the version of dev.txt, which `make install` puts there.
    assert hooks["mypy"]["entry"] == ".venv/bin/python -m mypy" and hooks["mypy"]["language"] == "system"
    assert "mypy" in dev and hooks["mypy"]["pass_filenames"] is False
    large = hooks["check-added-large-files"]
    assert large["entry"].split() == ["check-added-large-files", f"--maxkb={LARGEST_KB}"]
    assert re.fullmatch(r"pre-commit-hooks==[\d.]+", *large["additional_dependencies"])


def test_no_file_is_large() -> None:
    sizes = {
        path: path.stat().st_size
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert len(sizes) > 300
    assert {path: size for path, size in sizes.items() if size > LARGEST_KB * 1024} == {}

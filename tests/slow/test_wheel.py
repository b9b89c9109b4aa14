"""The wheel, installed where there is no checkout: what a user gets who never sees this repository.

A file that is missing from the wheel is missed nowhere else, because every other test runs from the checkout.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import drpo_megatron
from tests.support.report_runs import metrics, write_run

ROOT = Path(__file__).parents[2]
HF_CONFIGS = ROOT / "tests" / "data" / "hf_configs"
INPUTS = ("LICENSE", "README.md", "configs", "drpo_megatron", "launch", "pyproject.toml", "requirements", "setup.py")
LIMIT_S = 900.0


@dataclass(frozen=True)
class Installed:
    """wheel: the file. prefix: of the environment that has it. empty: a directory with nothing in it."""

    wheel: Path
    prefix: Path
    empty: Path

    @property
    def recipes(self) -> Path:
        return self.prefix / "share" / "drpo-megatron" / "configs"

    @property
    def packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.prefix)}))

    def run(self, program: str, *arguments: str | Path) -> str:
        """What a program of the environment prints. It must succeed."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [self.prefix / "bin" / program, *arguments],
            cwd=self.empty,
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Built from a copy: a build leaves its own files beside the sources, and takes those of an earlier one along."""
    directory = tmp_path_factory.mktemp("wheel")
    source, prefix, empty = directory / "source", directory / "environment", directory / "empty"
    source.mkdir()
    empty.mkdir()
    for name in INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source / name)
    # Isolation would fetch setuptools.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    pip(sys.executable, "wheel", str(source), "--no-deps", *isolation, "--wheel-dir", str(directory))
    (wheel,) = directory.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", prefix], check=True, timeout=LIMIT_S)
    pip(str(prefix / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel))
    made = Installed(wheel, prefix, empty)
    # Behind the environment's own packages: the wheel's dependencies, and nothing of the checkout, whose editable
    # installation works by a .pth file that is not read there.
    (made.packages / "zz-dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


def pip(python: str, *arguments: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_packages_and_their_data(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(ROOT))
        for package in ("drpo_megatron", "launch")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    assert {name for name in held if ".data/" not in name} == wanted
    assert {"drpo_megatron/py.typed", "drpo_megatron/report/page.html", "launch/job.sbatch"} <= wanted
    shared = {name.partition("/share/drpo-megatron/")[2] for name in held if ".data/" in name}
    assert shared == {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}


def test_its_metadata(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = {name.partition(".dist-info/")[2]: name for name in archive.namelist()}
        metadata = Parser().parsestr(archive.read(names["METADATA"]).decode())
        assert archive.read(names["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
    assert (metadata["Name"], metadata["Version"]) == ("drpo-megatron", drpo_megatron.__version__)
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.12"
    assert metadata["Author"] == "The drpo-megatron authors"
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    assert set(metadata.get_all("Provides-Extra") or []) == {"gpu", "cpu", "dev"}
    for extra, file in {"": "base", "gpu": "gpu", "cpu": "sglang-cpu", "dev": "dev"}.items():
        lines = (ROOT / "requirements" / f"{file}.txt").read_text().splitlines()
        wanted = {(r.name, r.specifier) for r in (Requirement(x) for x in lines if x and not x.startswith("#"))}
        mine = {
            (r.name, r.specifier) for r in required if str(r.marker or "") == (f'extra == "{extra}"' if extra else "")
        }
        assert mine == wanted, file


def test_the_packages_come_from_the_wheel(installed: Installed) -> None:
    """And importing the package does not import torch, so that `drpo --help` and tab completion are quick."""
    code = "import sys, drpo_megatron, launch; print(drpo_megatron.__file__, launch.__file__, 'torch' in sys.modules)"
    package, launch, torch = installed.run("python", "-c", code).split()
    assert Path(package) == installed.packages / "drpo_megatron" / "__init__.py"
    assert Path(launch) == installed.packages / "launch" / "__init__.py"
    assert torch == "False"


def test_help_and_version(installed: Installed) -> None:
    shown = installed.run("drpo", "--help")
    assert shown.startswith("usage: drpo") and all(word in shown for word in ("train", "plan", "report", "submit"))
    assert installed.run("drpo", "--version") == f"drpo {drpo_megatron.__version__}\n"


def test_a_shipped_recipe_is_planned(installed: Installed) -> None:
    """Of the model only its config.json is read, which a user has and the wheel has not."""
    model = HF_CONFIGS / "llama3-70b"
    shown = installed.run("drpo", "plan", installed.recipes / "llama3-70b.yaml", f"model.path={model}")
    assert "70.55 billion parameters" in shown


def test_a_shipped_recipe_becomes_a_job(installed: Installed) -> None:
    """The script is made from a file of the package."""
    layout = ("parallel.tensor=1", "parallel.data=2", "save.every=5")
    cluster = installed.recipes / "clusters" / "cpu.yaml"
    shown = installed.run(
        "drpo", "submit", installed.recipes / "quickstart.yaml", "--cluster", cluster, "--dry-run", *layout
    )
    assert "#!/bin/bash\n#SBATCH" in shown and "-m launch.node" in shown


def test_the_page_of_a_report(installed: Installed, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [metrics(step) for step in range(5)], dumped=[2, 3])
    shown = installed.run("drpo", "report", run, "--out", tmp_path / "page.html")
    assert "page.html holds 1 runs" in shown
    page = (tmp_path / "page.html").read_text()
    for part in ("page.css", "page.js", "samples.js"):
        text = (installed.packages / "drpo_megatron" / "report" / part).read_text()
        assert text.strip().splitlines()[-1] in page, part
    assert "say 3.1" in page and "reward/mean" in page

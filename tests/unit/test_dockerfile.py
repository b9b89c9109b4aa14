"""The Dockerfile of the GPU image: parsed, and compared with what it uses. Where the tests run nobody can build it."""

from __future__ import annotations

import io
import re
import shlex
import tomllib

import pytest
from dockerfile_parse import DockerfileParser

from drpo_megatron.doctor import apex
from launch.cluster import load_cluster
from tests.unit.test_project_files import ROOT, pins

SYSTEM_PYTHON = {"ubuntu24.04": "3.12"}
"""Of the base images that may be taken."""


def parsed(text: str) -> DockerfileParser:
    parser = DockerfileParser(fileobj=io.BytesIO())
    parser.content = text
    return parser


DOCKERFILE = parsed((ROOT / "Dockerfile").read_text())


def steps(instruction: str) -> list[str]:
    return [step["value"] for step in DOCKERFILE.structure if step["instruction"] == instruction]


def commands() -> list[list[str]]:
    """Words of each simple command of the RUN steps, variables that are set for it among them."""
    found = []
    for step in steps("RUN"):
        lexer = shlex.shlex(step, posix=True, punctuation_chars="&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word == "&&":
                found.append(words)
                words = []
            else:
                words.append(word)
    return found


def arguments() -> dict[str, str]:
    return dict(step.replace('"', "").split("=", 1) for step in steps("ARG"))


def pip_installs() -> list[list[str]]:
    return [words for words in commands() if words[_program(words) : _program(words) + 2] == ["pip", "install"]]


def _program(words: list[str]) -> int:
    return next((i for i, word in enumerate(words) if not re.match(r"\w+=", word)), len(words))


def options(words: list[str], name: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == name]


def test_it_is_one_stage_of_known_instructions() -> None:
    known = {"ARG", "FROM", "LABEL", "RUN", "ENV", "WORKDIR", "COPY", "CMD", "COMMENT"}
    assert {step["instruction"] for step in DOCKERFILE.structure} == known
    assert len(steps("FROM")) == 1
    assert all(words for words in commands()), "an && with nothing on one side"


def test_the_base_image_is_pinned_and_has_the_toolkit_of_torch() -> None:
    """apex refuses to be compiled by another CUDA than torch's."""
    tag = re.fullmatch(r"nvidia/cuda:(\d+\.\d+\.\d+)-devel-(ubuntu[\d.]+)", DOCKERFILE.baseimage)
    assert tag and DOCKERFILE.baseimage == arguments()["BASE_IMAGE"]
    assert pins("constraints-gpu")["cuda-toolkit"].startswith(f"{tag[1]}.")
    python = SYSTEM_PYTHON[tag[2]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={python}"
    assert [f"python{python}", "-m", "venv", "/opt/venv"] in commands()
    assert set(re.findall(r"python3\.\d+", (ROOT / "Dockerfile").read_text())) == {f"python{python}"}


def test_all_packages_come_from_the_requirements() -> None:
    """No version stands in the Dockerfile; what is installed is held by the constraints, or brings nothing along."""
    installs = pip_installs()
    assert [options(words, "--requirement") for words in installs if "--constraint" in words] == [
        ["requirements/base.txt", "requirements/image.txt"],
        ["requirements/gpu.txt"],
    ]
    for words in installs:
        assert options(words, "--constraint") == ["requirements/constraints-gpu.txt"] or "--no-deps" in words
        assert all((ROOT / path).exists() for path in options(words, "--requirement") + options(words, "--constraint"))
    assert "==" not in " ".join(steps("RUN"))
    assert [words[-1] for words in installs if "--no-deps" in words] == ["/tmp/apex", "."]


def test_transformer_engine_is_compiled_against_torchs_libraries() -> None:
    (words,) = [words for words in pip_installs() if "requirements/gpu.txt" in words]
    set_for_it = dict(word.split("=", 1) for word in words[: _program(words)])
    assert set_for_it["NVTE_PYTORCH_FORCE_BUILD"] == "TRUE" and "--no-build-isolation" in words
    assert set_for_it["CPATH"] == "$site/cudnn/include:$site/nccl/include"
    image = pins("constraints-gpu")
    assert {"nvidia-cudnn-cu13", "nvidia-nccl-cu13", "transformer-engine-cu13"} <= set(image)
    assert image["transformer-engine-cu13"] == image["transformer-engine"] == pins("gpu")["transformer-engine"]
    assert {"ninja", "pybind11", "setuptools", "wheel"} <= set(pins("image")), "nothing else brings them"


def test_apex_is_one_commit_with_its_extensions() -> None:
    commit = arguments()["APEX_COMMIT"]
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    fetch = next(words for words in commands() if "fetch" in words)
    assert fetch[-2:] == ["https://github.com/NVIDIA/apex", "${APEX_COMMIT}"]
    (words,) = [words for words in pip_installs() if "/tmp/apex" in words]
    set_for_it = dict(word.split("=", 1) for word in words[: _program(words)])
    assert set_for_it["APEX_CPP_EXT"] == set_for_it["APEX_CUDA_EXT"] == "1" and "--no-build-isolation" in words
    assert set_for_it["TORCH_CUDA_ARCH_LIST"] == "${CUDA_ARCHITECTURES}"
    assert re.fullmatch(r"\d+\.\d(;\d+\.\d)*", arguments()["CUDA_ARCHITECTURES"])


def test_the_build_imports_what_runs_would_leave_out_silently() -> None:
    """Every extension of apex that Megatron-Core takes for a run of this project, and Transformer Engine's."""
    imported = set()
    for words in commands():
        if words[:2] == ["python", "-c"]:
            names = words[2].removeprefix("import ").split(", ")
            assert names[0] == "torch", "it loads the libraries of the others"
            imported |= set(names)
    wanted = {target.partition(":")[0].split(".")[0] for p in apex.PARTS if not p.not_asked for target in p.imports}
    wanted |= {part.extension for part in apex.PARTS if part.extension}
    assert wanted | {"transformer_engine.pytorch", "apex_C"} <= imported
    assert ["drpo", "--version"] in commands() and ["pip", "check"] in commands()


def copied() -> list[str]:
    return [source for step in steps("COPY") for source in step.split()[:-1]]


def test_it_copies_what_the_build_of_the_package_reads() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setuptools = pyproject["tool"]["setuptools"]
    dynamic = setuptools["dynamic"]
    read = {"pyproject.toml", "setup.py", pyproject["project"]["readme"], *pyproject["project"]["license-files"]}
    read |= {name.split(".")[0] for name in setuptools["packages"]["find"]["include"]}
    read |= {pattern.split("/")[0] for patterns in setuptools["data-files"].values() for pattern in patterns}
    files = [dynamic["dependencies"], *dynamic["optional-dependencies"].values()]
    read |= {file.split("/")[0] for entry in files for file in entry["file"]}
    assert {source.rstrip("/") for source in copied()} == read
    assert all((ROOT / source).exists() for source in copied())


def test_what_is_copied_is_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:].rstrip("/") for rule in rules if rule[0] == "!"} == {source.rstrip("/") for source in copied()}


def test_the_page_makes_the_image_that_the_example_names() -> None:
    container = load_cluster(ROOT / "configs" / "clusters" / "example.yaml").container
    assert container and container.python == "python3", "the environment of the image is the first on its PATH"
    assert "PATH=/opt/venv/bin:" in steps("ENV")[0]
    page = (ROOT / "docs" / "slurm.md").read_text()
    tag = re.search(r"^docker build --tag ([\w-]+) \.$", page, re.MULTILINE)
    assert tag and f"enroot import --output {container.image} dockerd://{tag[1]}\n" in page
    for name in re.findall(r"--build-arg (\w+)=", page):
        assert name in arguments()


@pytest.mark.parametrize(
    ("before", "after", "test"),
    [
        ("13.0.3-devel", "13.1.0-devel", test_the_base_image_is_pinned_and_has_the_toolkit_of_torch),
        ("13.0.3-devel-ubuntu24.04", "latest", test_the_base_image_is_pinned_and_has_the_toolkit_of_torch),
        ("=6424da3b4faa6c8f062da4a48c424fff3f02d42d", "=master", test_apex_is_one_commit_with_its_extensions),
        ("APEX_CUDA_EXT=1 ", "", test_apex_is_one_commit_with_its_extensions),
        (" --requirement requirements/image.txt", " ninja", test_all_packages_come_from_the_requirements),
        ("NVTE_PYTORCH_FORCE_BUILD=TRUE ", "", test_transformer_engine_is_compiled_against_torchs_libraries),
        (", fused_weight_gradient_mlp_cuda", "", test_the_build_imports_what_runs_would_leave_out_silently),
        ("COPY launch/ launch/\n", "", test_it_copies_what_the_build_of_the_package_reads),
    ],
)  # fmt: skip
def test_a_wrong_dockerfile_is_found(before: str, after: str, test: object, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert text.count(before) == 1
    monkeypatch.setitem(globals(), "DOCKERFILE", parsed(text.replace(before, after)))
    assert callable(test)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        test()

"""Packaging. The version set below is the one that is tested together; requirements/constraints.txt pins what it pulls
in.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements(name: str) -> list[str]:
    lines = (HERE / "requirements" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


setup(
    name="drpo-megatron",
    version="0.1.0",
    description="DRPO reinforcement learning of language models on Megatron-Core, with SGLang rollouts",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.12",
    packages=find_packages(include=["drpo_megatron", "drpo_megatron.*", "launch", "launch.*"]),
    package_data={"launch": ["job.sbatch"], "drpo_megatron.report": ["page.html", "*.css", "*.js"]},
    install_requires=requirements("base.txt"),
    extras_require={
        # SGLang with its kernels, and FP8. NVIDIA apex is used by Megatron-Core where it is importable; it has no
        # wheel.
        "gpu": ["sglang==0.5.23", "transformer-engine[pytorch]==2.20.2"],
        # What SGLang imports on a machine without a GPU; sglang itself is then installed with --no-deps (see the
        # Makefile).
        "cpu": requirements("sglang-cpu.txt"),
        "dev": requirements("dev.txt"),
    },
    entry_points={"console_scripts": ["drpo = drpo_megatron.cli:main"]},
)

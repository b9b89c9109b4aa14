"""What a command does not import: it would take seconds, and the machine that submits a job may not have it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.rollout.server_args import DELTA_LOADER
from tests.unit import test_top
from tests.unit.test_hf_config import LLAMA_2
from tests.unit.test_plan import recipe, words

run = test_top.run  # the fixture


def test_the_help_starts_no_heavy_library() -> None:
    """`drpo --help` is a matter of the imports: none of those that take a second."""
    code = """
import sys
from drpo_megatron import cli
try:
    cli.main(["--help"])
except SystemExit:
    pass
print([name for name in ("torch", "pandas", "matplotlib", "transformers", "sglang", "megatron") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_import_is_free_of_torch_and_transformers() -> None:
    """The command line and the verifier processes import these; a process of its own shows what they pull in."""
    code = (
        "import sys, drpo_megatron.config, drpo_megatron.rewards.worker, drpo_megatron.data.rows;"
        "print(sorted({'torch', 'transformers', 'reasoning_gym', 'pyarrow'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_server_imports_little() -> None:
    heavy = "megatron transformers sglang pydantic drpo_megatron.sync.delta drpo_megatron.weights"
    module = DELTA_LOADER.rsplit(".", 1)[0]
    code = f"import sys; import {module}; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_reading_a_configuration_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2))
    code = (
        "import sys; from drpo_megatron.models.hf_config import HFModelConfig; "
        f"HFModelConfig.load({str(tmp_path)!r}); assert not {{'torch', 'megatron', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_needs_no_torch(run: Path) -> None:
    code = f"""
import sys
from drpo_megatron import cli
try:
    cli.main(["top", {str(run)!r}])
except SystemExit:
    pass
print("torch" in sys.modules)
"""
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False", "a frame, as into a pipe, and it ends"


def test_671b_in_seconds_without_torch() -> None:
    """Of processor time, since a machine may be busy with other things: under three when nothing else runs."""
    code = f"""import sys
from drpo_megatron import cli
from drpo_megatron.bench import plan as bench_plan
try:
    cli.main(["plan", *{words("deepseek-v3-671b")!r}])
finally:
    assert "torch" not in sys.modules, "the plan imports torch"
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert "671.03 billion parameters" in done.stdout
    for name, _, _ in Assumptions.of(recipe("deepseek-v3-671b")).described():
        assert name in done.stdout

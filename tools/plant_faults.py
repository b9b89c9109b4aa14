"""Plant ten faults in the product, one at a time, and see whether `make test` finds each.

A test suite that runs fast proves nothing unless it still fails when it must. Every fault is a change of one line that
a tired engineer could make. Each goes into a copy of the committed tree, `make test` runs there until its first
failure, and the test that found it is printed. The last line says how many were found; the exit code is 1 when one was
not. `--only NAME...` plants some of them, `--list` prints them.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """`before` stands once in `file`, and `after` takes its place."""

    name: str
    file: str
    before: str
    after: str

    def plant(self, tree: Path) -> None:
        """Raises ValueError when the code has changed, so that there is nothing to plant."""
        path = tree / self.file
        text = path.read_text()
        if text.count(self.before) != 1:
            raise ValueError(f"{self.name}: {self.file} has {self.before!r} {text.count(self.before)} times, not once")
        path.write_text(text.replace(self.before, self.after))


FAULTS = (
    Fault(
        "a wrong sign in a gradient",
        "drpo_megatron/vocab_parallel/torch_kernels.py",
        "target_C = torch.expm1(logp_C)",
        "target_C = -torch.expm1(logp_C)",
    ),
    Fault(
        "a missing all-reduce",
        "drpo_megatron/vocab_parallel/head.py",
        "hidden_NH = copy_to_tensor_model_parallel_region(hidden_NH, group=group)",
        "pass",
    ),
    Fault(
        "a swapped gate and up",
        "drpo_megatron/weights/map.py",
        "return (self.gate, self.up)",
        "return (self.up, self.gate)",
    ),
    Fault(
        "a temperature not applied",
        "drpo_megatron/vocab_parallel/torch_kernels.py",
        "return logits if temperature == 1.0 else logits.div_(temperature)",
        "return logits",
    ),
    Fault(
        "an off-by-one in packing",
        "drpo_megatron/training/packing.py",
        "mask_T=joined([s.sampled_L[1:] for s in sequences], torch.bool)",
        "mask_T=joined([s.sampled_L[:-1] for s in sequences], torch.bool)",
    ),
    Fault(
        "a checksum not compared",
        "drpo_megatron/sync/verify.py",
        "for p in mine if mine[p] != theirs[p]}",
        "for p in mine if p not in theirs}",
    ),
    Fault(
        "a sample trained twice on resume",
        "drpo_megatron/rollout/producer.py",
        'self._source.restore(state["source"])',
        'self._source.restore(state["source"] | {"index": max(0, state["source"]["index"] - 1)})',
    ),
    Fault(
        "a server not restarted",
        "drpo_megatron/rollout/fleet.py",
        "if now >= member.at and not self._lent:",
        "if now >= member.at and self._lent:",
    ),
    Fault(
        "a learning-rate schedule off by one",
        "drpo_megatron/training/optimizer.py",
        "lr_warmup_steps=settings.warmup_steps,",
        "lr_warmup_steps=settings.warmup_steps + (1 if settings.warmup_steps else 0),",
    ),
    Fault(
        "an FP8 scale of the wrong block",
        "drpo_megatron/fp8/numerics.py",
        "scales = scales.repeat_interleave(block[1], 1)[:, :columns]",
        "scales = scales.roll(1, 1).repeat_interleave(block[1], 1)[:, :columns]",
    ),
)


def copy_tree(directory: Path) -> None:
    """The committed files, with the environment of this checkout linked in. `make` must not think it out of date."""
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(directory, filter="data")
    (directory / ".venv").symlink_to(ROOT / ".venv")


def run_tests(tree: Path, output: Path) -> int:
    """`make test` in the copy, up to the first failure; its exit code."""
    # Every process of the tests imports the package from the copy, not from the checkout that is installed.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTEST_ADDOPTS": "--exitfirst"}
    with output.open("wb") as sink:
        return subprocess.run(
            ["make", "--old-file=.venv/.installed", "test"], cwd=tree, env=environment, stdout=sink, stderr=sink
        ).returncode


def found_by(output: str) -> str:
    """The first test that failed, or the last line."""
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return failed[0] if failed else output.strip().splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="plant only faults whose names contain these words")
    parser.add_argument("--list", action="store_true", help="print the faults and plant nothing")
    parsed = parser.parse_args()
    chosen = [f for f in FAULTS if parsed.only is None or any(word in f.name for word in parsed.only)]
    if parsed.list:
        for fault in chosen:
            print(f"{fault.name}: {fault.file}\n  - {fault.before}\n  + {fault.after}")
        return 0
    found = 0
    for fault in chosen:
        with tempfile.TemporaryDirectory() as directory:
            tree, output = Path(directory) / "tree", Path(directory) / "output"
            tree.mkdir()
            copy_tree(tree)
            fault.plant(tree)
            start = time.monotonic()
            code = run_tests(tree, output)
            seconds = time.monotonic() - start
            by = found_by(output.read_text(errors="replace")) if code else "NOT FOUND"
            found += code != 0
            print(f"{fault.name} | {by} | {seconds:.0f} s", flush=True)
    print(f"{found} of {len(chosen)} found")
    return int(found < len(chosen))


if __name__ == "__main__":
    sys.exit(main())

"""`drpo convert`, and the same for `tools/`: arguments, refusals and what is printed.

torch is imported when a conversion runs, not when the command line starts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

EXIT_FAILED, EXIT_REFUSED = 1, 2
HF_SHARD_GB, CHECKPOINT_FILE_GB = 5.0, 1.0

Target = Literal["hf", "checkpoint"]


def add_arguments(parser: argparse.ArgumentParser, to: Target | None = None) -> None:
    """`to`: None makes it an option."""
    sources = {"hf": "CHECKPOINT", "checkpoint": "HF_DIR", None: "SOURCE"}
    parser.add_argument("source", type=Path, metavar=sources[to], help="checkpoint, or Hugging Face directory")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write; it must not exist")
    if to is None:
        parser.add_argument("--to", choices=("hf", "checkpoint"), required=True, help="what OUT shall be")
    else:
        parser.set_defaults(to=to)
    if to != "checkpoint":
        parser.add_argument(
            "--dtype", choices=("bf16", "fp32", "fp8"), help="of a Hugging Face directory; default: as stored"
        )
    else:
        parser.set_defaults(dtype=None)
    parser.add_argument(
        "--max-shard-gb",
        type=_positive(float),
        metavar="N",
        help=f"largest file in 10⁹ bytes; default: {HF_SHARD_GB:g} of a Hugging Face directory, {CHECKPOINT_FILE_GB:g} "
        "of a checkpoint, of which a process holds one file in memory",
    )
    parser.add_argument(
        "--processes",
        type=_positive(int),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that write files; default: %(default)s",
    )
    parser.add_argument("--verify", action="store_true", help="read the result again and compare it with the source")


def _positive[T: (int, float)](kind: type[T]) -> type[T]:
    def number(text: str) -> T:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    number.__name__ = f"positive {kind.__name__}"
    return number  # type: ignore[return-value]


def run(parsed: argparse.Namespace) -> int:
    """Convert and print what was done. Returns the exit code: 2 for a refusal, after which nothing is left, and 1 for a
    result that is not its source, a full disk or a killed process.
    """
    from drpo_megatron.checkpoint.manifest import CheckpointError
    from drpo_megatron.weights.convert_verify import VerificationError

    try:
        return _convert(parsed)
    except VerificationError as error:
        print(f"drpo: {error}. {parsed.out} is left for a look: do not use it", file=sys.stderr)
        return EXIT_FAILED
    except (CheckpointError, FileExistsError, FileNotFoundError, ValueError) as error:
        print(f"drpo: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except OSError as error:
        print(f"drpo: {error}; nothing is left of {parsed.out}", file=sys.stderr)
        return EXIT_FAILED


def _convert(parsed: argparse.Namespace) -> int:
    from drpo_megatron.weights import convert_verify, fp8
    from drpo_megatron.weights.convert_to_checkpoint import Model, hf_to_checkpoint
    from drpo_megatron.weights.convert_to_hf import Source, checkpoint_to_hf, within_a_block
    from drpo_megatron.weights.hf_io import listed

    if not parsed.source.is_dir():
        raise FileNotFoundError(f"{parsed.source} is no directory: name a checkpoint or a Hugging Face directory")
    start = time.monotonic()
    default_gb = HF_SHARD_GB if parsed.to == "hf" else CHECKPOINT_FILE_GB
    max_shard_bytes = int((parsed.max_shard_gb or default_gb) * 1000**3)
    if parsed.to == "hf":
        plan = checkpoint_to_hf(
            parsed.source,
            parsed.out,
            dtype=parsed.dtype,
            max_shard_bytes=max_shard_bytes,
            processes=parsed.processes,
        )
        _print_written(parsed.out, sum(map(len, plan.tensors)), plan.nbytes, len(plan.shards), start)
        if parsed.dtype == "fp8" and (names := within_a_block(Source.open(parsed.source), plan)):
            print(f"note: SGLang refuses FP8 projections whose rows are no multiple of {fp8.BLOCK}: {listed(names)}")
        if parsed.verify:
            print(convert_verify.verify_export(parsed.source, parsed.out, plan, parsed.dtype))
        return 0
    if parsed.dtype is not None:
        raise ValueError("--dtype is for --to hf: a checkpoint keeps the dtypes of its source, and a run casts")
    stored = hf_to_checkpoint(parsed.source, parsed.out, max_shard_bytes=max_shard_bytes, processes=parsed.processes)
    files = len(list((parsed.out / "state").glob("*.distcp")))
    _print_written(parsed.out, len(stored), sum(one.nbytes for one in stored), files, start)
    if names := Model.open(parsed.source).left_out():
        print(f"note: the policy has no place for {listed(names)}: they are not in the checkpoint")
    if parsed.verify:
        print(convert_verify.verify_import(parsed.source, parsed.out))
    return 0


def _print_written(out: Path, tensors: int, nbytes: int, files: int, start: float) -> None:
    seconds = time.monotonic() - start
    print(f"{out}: {tensors} tensors, {nbytes / 1e9:.3f} GB in {files} file{'s' * (files > 1)}, {seconds:.1f} s")


def main(to: Target, description: str, arguments: Sequence[str] | None = None) -> None:
    """A script of its own for one direction."""
    parser = argparse.ArgumentParser(description=description)
    add_arguments(parser, to)
    sys.exit(run(parser.parse_args(arguments)))

"""`drpo bench` as a user runs it. What it measures of this machine's speed is no matter of a test; that it measures, of
what, and what its exit code says are.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from drpo_megatron.bench import checkpoint, convert, loss, prefix, sync, update
from drpo_megatron.bench.report import run_worker
from tests.support.launch import run_ranks
from tests.support.runs import LIMIT_S

pytestmark = [pytest.mark.server, pytest.mark.distributed]


def test_step() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "drpo_megatron.cli", "bench", "step", "--json"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    missed = [name for name, figure in report["figures"].items() if figure["holds"] is False]
    assert done.returncode == bool(missed), missed
    figures = {name: figure["value"] for name, figure in report["figures"].items()}
    shares = {name: value for name, value in figures.items() if name.startswith("share_")}
    assert shares.keys() == {f"share_{verb}" for verb in ("generate", "advantages", "pack", "train", "sync")}
    assert all(0 < share < 1 for share in shares.values())
    assert figures["generate_tokens_per_s"] > 0 and figures["train_tokens_per_s"] > 0
    assert figures["drpo_over_cross_entropy"] > 0


def test_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "REPETITIONS", 1)
    monkeypatch.setattr(prefix, "DTYPES", {"fp32": "float32"})
    figures = prefix.measure()
    # A pack repeats nothing of a group's prompt but its last token.
    assert 3 < figures["shared_prefix_tokens_ratio"].value < 4
    assert figures["shared_prefix_speedup_fp32"].value > 0


def test_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "REPETITIONS", 1)
    figures = checkpoint.measure()
    # Weights, main weights and two moments, fp32.
    assert 134e6 * 16 < figures["megabytes"].value * 1e6 < 135e6 * 17
    assert figures["async_stall_share"].value > 0


def test_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "REPETITIONS", 1)
    figures = sync.measure()
    assert figures["bytes_over_weights"].value == 1
    # A bucket is on the wire: less would mean that memory is not counted.
    assert figures["peak_extra_buckets"].value >= 1
    assert all(figures[name].value > 0 for name in figures if name.endswith("ratio_to_broadcast"))
    # A step of 1e-6 rounds away in all but about one in a hundred weights of 16 bits.
    assert 0.001 < figures["delta_bytes_share"].value < 0.03
    assert figures["delta_time_ratio"].value > 0


def test_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "REPETITIONS", 2)
    monkeypatch.setattr(convert, "SHARD_BYTES", 20 * 1000**2)
    small = {"vocab_size": 4000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    monkeypatch.setattr(convert, "MODEL", convert.MODEL | small | {"num_attention_heads": 8})
    figures = convert.measure()
    assert {name for name, figure in figures.items() if figure.must} == {"ratio_to_raw_write", "peak_shards"}
    # A parameter and what it becomes are in memory: less would mean that memory is not counted.
    assert 0.1 < figures["peak_shards"].value < 2
    assert all(figures[name].value > 0 for name in figures if name.endswith(("write", "ratio")))


def test_loss_tasks() -> None:
    """The sizes that count are the bench's own; here each task only has to run."""
    # Without the peers the other ways still run; the bench itself refuses.
    installed = all((loss.PEERS / name).is_dir() for name in ("trl", "verl"))
    compared = loss.COMPARED if installed else ("dense", "plain", "mcore")
    job = loss.Job("ratio", hidden=64, vocabulary=512, tokens=256, repetitions=2, compared=compared)
    ratio, traffic = loss.run_worker(2, [job, replace(job, task="traffic")])
    assert len(ratio["ratio"]) == 2 and min(ratio["ratio"]) > 0
    assert traffic == {"collectives_per_chunk": [1.0], "bytes_per_token": [16.0]}
    series = replace(job, task="series", tokens_of_series=(64, 128, 256))
    memory, ways, by_tokens = loss.run_worker(1, [replace(job, task="memory-fused"), replace(job, task="ways"), series])
    assert memory["bytes"][0] < 2**30
    assert ways.keys() == {*compared, "masked"} and all(len(s) == 2 and min(s) > 0 for s in ways.values())
    assert by_tokens.keys() == {"64", "128", "256"} and all(len(s) == 2 for s in by_tokens.values())


def test_updates(tmp_path: Path) -> None:
    """A worker goes through the variants; with whole logits an update is the same."""
    names = update.variants(None)
    files = []
    for name, overrides in names.items():
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(json.dumps(update.settings(tmp_path / "model", overrides)))
    measured = run_worker("drpo_megatron.bench.update_worker", *files)
    figures = update.figures(dict(zip(names, measured, strict=True)))
    assert figures["grad_norm_float32"].value == pytest.approx(figures["grad_norm_float32_dense"].value, rel=1e-4)
    assert all(len(one["seconds"]) == update.REPETITIONS and min(one["seconds"]) > 0 for one in measured)


def test_loss_ways_agree() -> None:
    """What is timed against each other computes the same gradients."""
    run_ranks(1, ways_agree)


def ways_agree() -> None:
    from drpo_megatron.platform import distributed
    from drpo_megatron.platform.layout import ParallelLayout

    distributed.initialize(ParallelLayout())
    import torch

    from drpo_megatron.bench.loss_ways import Ways

    gradients = {}
    for name in ("fused", "dense", "plain", "mcore"):
        torch.manual_seed(0)
        ways = Ways.random(tokens=96, hidden=32, vocabulary=256)
        getattr(ways, name)()
        gradients[name] = (ways.hidden_TH.grad, ways.main_grad_VH)
        assert float(ways.main_grad_VH.norm()) > 0
    for name in ("dense", "plain", "mcore"):
        torch.testing.assert_close(gradients[name], gradients["fused"], rtol=1e-4, atol=1e-6)

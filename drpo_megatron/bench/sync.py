"""A weight sync against a bare broadcast of the same bytes.

SmolLM2's real weights go to a real SGLang server by each transport, and over the same backend from this process to
another one that only receives, in buckets of the same sizes. The ways alternate; a sample is the quotient of two
neighbours in time. Checksums are compared in the first push of each transport and not in those that are timed. Memory
is the growth of this process's peak over a push, in buckets. Trainer and server have a core each.

`lowest_ratio_of_cores`: what a sync by broadcast could come down to on this machine if nothing ever waited: the core
seconds of the bare broadcast, on both sides, and those in which the server loads the same bytes from shared memory,
over all cores and the seconds of the bare broadcast. A wire that costs no core, as NCCL's, has no such bound.

The delta transport is compared with itself: the weights after one optimizer step against those before it, as a delta
and whole, in bf16. A few steps come first, because a quantized file has many weights that are exactly zero, which each
step changes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from drpo_megatron.bench.report import Figure
from drpo_megatron.bench.resident import peak, reset_peak

if TYPE_CHECKING:
    import psutil
    import torch

    from drpo_megatron.sync.verify import ServerLayout

BUCKET_MB = 64.0
REPETITIONS = 5
TIMEOUT_S = 300.0
TRANSPORTS = ("distributed", "shared_memory", "disk")
RECIPE = "smollm2_135m"
LEARNING_RATE = 1e-6
STEPS_BEFORE = 4
STEP_TOKENS = 256


def measure() -> dict[str, Figure]:
    """Raises ServerError when the server does not start or take the weights."""
    import torch

    from drpo_megatron.config.schema import ServerConfig
    from drpo_megatron.models.recipes import ensure_model
    from drpo_megatron.rollout.server import SGLangServer
    from drpo_megatron.rollout.server_args import with_delta_loader
    from drpo_megatron.sync.verify import ServerLayout

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        model = ensure_model(RECIPE, directory / "model")
        config = with_delta_loader(ServerConfig(threads=1))
        with SGLangServer(config, model, "float32", 0, directory / "server.log") as server:
            url = server.wait_ready()
            layout = ServerLayout.from_config(model, 1, torch.float32)
            assert server.pid is not None
            samples = _samples(url, server.pid, layout, model, directory)
            return _figures(samples) | _delta_figures(url, model, directory)


def _figures(samples: dict[str, list[float]]) -> dict[str, Figure]:
    bare, cores = samples["bare"], len(os.sched_getaffinity(0))

    def over_bare(name: str) -> list[float]:
        return [seconds / broadcast for seconds, broadcast in zip(samples[name], bare, strict=True)]

    return {
        "ratio_to_broadcast": Figure.of(over_bare("distributed"), "<= 1.15"),
        "bytes_over_weights": Figure.of(samples["bytes"], "<= 1"),
        "lowest_ratio_of_cores": Figure.of(
            [
                (wire + load) / (cores * seconds)
                for wire, load, seconds in zip(samples["wire_cpu"], samples["load_cpu"], bare, strict=True)
            ]
        ),
        "peak_extra_buckets": Figure.of(samples["distributed_peak"], "<= 2"),
        **{f"{name}_ratio_to_broadcast": Figure.of(over_bare(name)) for name in TRANSPORTS[1:]},
        **{f"{name}_peak_extra_buckets": Figure.of(samples[f"{name}_peak"]) for name in TRANSPORTS[1:]},
    }


def _samples(url: str, server: int, layout: ServerLayout, model: Path, directory: Path) -> dict[str, list[float]]:
    import psutil
    from safetensors.torch import load_file

    from drpo_megatron.config.schema import SyncConfig
    from drpo_megatron.sync.buckets import make_buckets
    from drpo_megatron.sync.push import WeightSync

    tensors = [item for file in sorted(model.glob("*.safetensors")) for item in load_file(file).items()]
    bucket_bytes = int(BUCKET_MB * 2**20)
    sizes = [bucket.nbytes for bucket in make_buckets(tensors, bucket_bytes)]
    ways = {
        name: WeightSync(
            SyncConfig(transport=name, bucket_mb=BUCKET_MB, verify_every=0, timeout_s=TIMEOUT_S),
            layout,
            model,
            directory / "sync",
        )
        for name in TRANSPORTS
    }
    samples: dict[str, list[float]] = {key: [] for key in ("bare", "bytes", *TRANSPORTS)}
    samples |= {key: [] for key in ("wire_cpu", "load_cpu", *(f"{name}_peak" for name in TRANSPORTS))}
    whole = sum(tensor.nbytes for _, tensor in tensors)
    serving = [psutil.Process(server), *psutil.Process(server).children(recursive=True)]
    with _Receiver(directory / "store", sizes) as receiver:
        wire = [psutil.Process(), psutil.Process(receiver.pid)]
        for way in ways.values():
            way.connect([url])
            way.push(tensors, 0)
        receiver.broadcast(tensors, bucket_bytes)
        for _ in range(REPETITIONS):
            start, busy = time.perf_counter(), _core_seconds(wire)
            receiver.broadcast(tensors, bucket_bytes)
            samples["bare"].append(time.perf_counter() - start)
            samples["wire_cpu"].append(_core_seconds(wire) - busy)
            for name, way in ways.items():
                before = reset_peak()
                start, busy = time.perf_counter(), _core_seconds(serving)
                report = way.push(tensors, 1)
                samples[name].append(time.perf_counter() - start)
                if name == "shared_memory":
                    samples["load_cpu"].append(_core_seconds(serving) - busy)
                samples[f"{name}_peak"].append((peak() - before) / max(sizes))
                if name == "distributed":
                    samples["bytes"].append(report.bytes / whole)
        for way in ways.values():
            way.close()
    return samples


def _core_seconds(processes: Sequence[psutil.Process]) -> float:
    """Of these processes, since they began."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def _delta_figures(url: str, model: Path, directory: Path) -> dict[str, Figure]:
    from drpo_megatron.sync.buckets import make_buckets
    from drpo_megatron.sync.delta import DeltaTransport
    from drpo_megatron.sync.receivers import Receivers
    from drpo_megatron.sync.transport import Deadline

    before, after = _one_step(model)
    receivers = Receivers([url], ranks=1)
    transport = DeltaTransport(receivers, directory / "sync")
    transport.connect()
    receivers.each(lambda server: server.pause_generation("retract", TIMEOUT_S))

    def push(tensors: list[tuple[str, torch.Tensor]]) -> tuple[int, float]:
        start = time.perf_counter()
        nbytes = transport.send(make_buckets(tensors, int(BUCKET_MB * 2**20)), Deadline.after(TIMEOUT_S))
        return nbytes, time.perf_counter() - start

    shares, times = [], []
    push(after)  # the rate of the carrier
    for _ in range(REPETITIONS):
        transport.forget()
        whole_bytes, whole_s = push(before)
        delta_bytes, delta_s = push(after)
        shares.append(delta_bytes / whole_bytes)
        times.append(delta_s / whole_s)
    receivers.each(lambda server: server.continue_generation(TIMEOUT_S))
    transport.close(servers_alive=True)
    receivers.close()
    return {"delta_bytes_share": Figure.of(shares), "delta_time_ratio": Figure.of(times)}


def _one_step(path: Path) -> tuple[list[tuple[str, torch.Tensor]], list[tuple[str, torch.Tensor]]]:
    """The model in bf16 before and after an Adam step on fp32 main weights; the text is this file's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adam = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    ids_T = AutoTokenizer.from_pretrained(path)(Path(__file__).read_text(), return_tensors="pt").input_ids[0]
    versions: list[list[tuple[str, torch.Tensor]]] = []
    for step in range(STEPS_BEFORE + 1):
        if step == STEPS_BEFORE:
            versions.append(_bf16(model))
        start = step * STEP_TOKENS % (len(ids_T) - STEP_TOKENS)
        batch_1T = ids_T[None, start : start + STEP_TOKENS]
        adam.zero_grad()
        model(batch_1T, labels=batch_1T).loss.backward()
        adam.step()
    return versions[0], _bf16(model)


def _bf16(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    import torch

    return [(name, parameter.detach().to(torch.bfloat16)) for name, parameter in model.named_parameters()]


class _Receiver:
    """Another process that receives what this one broadcasts."""

    def __init__(self, store: Path, sizes: Sequence[int]) -> None:
        self._store, self._sizes = store, sizes

    def __enter__(self) -> _Receiver:
        command = [sys.executable, "-m", "drpo_megatron.bench.sync", str(self._store), json.dumps(self._sizes)]
        self._process = subprocess.Popen([*command, str(REPETITIONS + 1)])
        _join(self._store, 0)
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()
        self._process.terminate()
        self._process.wait()

    def broadcast(self, tensors: list[tuple[str, torch.Tensor]], bucket_bytes: int) -> None:
        """Each bucket flattened and sent while the next is flattened, as a push does."""
        import torch
        import torch.distributed as dist

        from drpo_megatron.sync.buckets import FlatBuffers, make_buckets

        in_flight = None
        flats = FlatBuffers(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
        for bucket in make_buckets(tensors, bucket_bytes):
            flat = flats.fill(bucket)
            if in_flight is not None:
                in_flight[0].wait()
            work = dist.broadcast(flat, src=0, async_op=True)
            assert work is not None, "both ranks are in the group"
            in_flight = work, flat
        assert in_flight is not None
        in_flight[0].wait()
        dist.barrier()  # the other one has it all


def _join(store: Path, rank: int) -> None:
    import torch.distributed as dist

    from drpo_megatron.platform import backend

    dist.init_process_group(backend(), store=dist.FileStore(str(store), 2), rank=rank, world_size=2)


def _receive(store: Path, sizes: list[int], rounds: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _join(store, 1)
    flats = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    for _ in range(rounds):
        for flat in flats:
            dist.broadcast(flat, src=0)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _receive(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))

"""What the tests with a real server share: prompts, the reference log-probs, and a look at what processes are left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from drpo_megatron.records import Prompt, RolloutGroup
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.server import SGLangServer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tests.support.server_pool import PooledServer

LIMIT_S = 600.0
"""For a start, a push or an answer on a machine that is busy with other things."""


@dataclass
class OneServer:
    """A single server as the client sees a fleet."""

    server: SGLangServer
    api_key: str | None = None

    @property
    def url(self) -> str:
        return self.server.url

    def serving(self) -> int:
        return int(self.server.alive())

    def check_soon(self) -> None:
        raise AssertionError("the server answered with old weights")


def make_prompts(count: int, vocab_size: int, length: int = 6) -> list[Prompt]:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(3, vocab_size, (count, length), generator=generator).tolist()
    return [Prompt(f"prompt-{i}", row, "") for i, row in enumerate(ids)]


def largest_logprob_error(groups: Sequence[RolloutGroup], model: PreTrainedModel, temperature: float) -> float:
    """Largest |log μ − log-softmax(logits / temperature)| over all tokens, the second from transformers in fp32."""
    largest = 0.0
    for group in groups:
        for rollout in group.rollouts:
            start = len(group.prompt.token_ids)
            tokens_T = torch.tensor(group.prompt.token_ids + rollout.response_ids)
            with torch.no_grad():
                logits_TV = model(tokens_T[None]).logits[0, start - 1 : -1].float()
            logprobs_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
            logprobs_T = logprobs_TV.gather(1, tokens_T[start:, None])[:, 0]
            largest = max(largest, float((logprobs_T - torch.tensor(rollout.logmu)).abs().max()))
    return largest


def perturb(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def nudge(model: PreTrainedModel, seed: int) -> None:
    """Change one element in a hundred, so much that the log-probs show it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            chosen = torch.rand(parameter.shape, generator=generator) < 0.01
            parameter.add_(chosen * torch.randn(parameter.shape, generator=generator))


def members(process_group: int) -> list[int]:
    """Process ids in a process group that still run (a zombie does not)."""
    running = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, group = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
        if int(group) == process_group and state not in "ZX":
            running.append(int(entry.name))
    return running


def wait_until_gone(process_group: int, timeout_s: float) -> list[int]:
    """What still runs of a process group after at most `timeout_s`: nothing, as it should be."""
    deadline = time.monotonic() + timeout_s
    while (left := members(process_group)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@dataclass(frozen=True)
class Growth:
    """Of this process and a server over many pushes: open files, bytes in memory, and bytes that were pushed."""

    files: int
    memory: int
    pushed: int


def many_pushes(pooled: PooledServer, model: PreTrainedModel, transport: str, count: int) -> Growth:
    """Push `count` times, of which a tenth are not looked at. No file may stay open."""
    weights = pooled.sync(transport=transport, bucket_mb=64.0, verify_every=0)
    tensors = list(model.state_dict().items())
    pids = [os.getpid(), *members(pooled.pid)]

    def held() -> tuple[int, int]:
        files = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
        files += sum(len(list(Path("/dev/shm").glob(f"torch_{pid}_*"))) for pid in pids)
        resident = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return files, resident * os.sysconf("SC_PAGE_SIZE")

    warm = max(5, count // 10)
    for _ in range(warm):
        weights.push(tensors, 4)
    files, memory = held()
    for _ in range(count - warm):
        weights.push(tensors, 4)
    more_files, more_memory = held()
    weights.close()
    grown = Growth(
        more_files - files, more_memory - memory, (count - warm) * sum(tensor.nbytes for _, tensor in tensors)
    )
    print(f"{transport}: {count} pushes, {grown.files} more files, {grown.memory / 1e6:.1f} MB more")
    assert grown.files <= 4
    return grown


def when_it_generates(url: str, act: Callable[[], None], api_key: str | None = None) -> None:
    """Wait until the server runs a request, and act. For a thread beside the one that asks."""
    admin, deadline = ServerAdmin(url, api_key), time.monotonic() + LIMIT_S
    while admin.load(LIMIT_S)[0] == 0:
        assert time.monotonic() < deadline, "no request came"
        time.sleep(0.02)
    act()

"""What the tests with a real server share: prompts, the reference log-probs, and a look at what processes are left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from drpo_megatron.records import Prompt, RolloutGroup
from drpo_megatron.rollout.server import SGLangServer


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

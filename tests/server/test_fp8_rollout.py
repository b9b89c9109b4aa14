"""Real SGLang servers in FP8 without a GPU: one that emulates it, and one that holds FP8 parameters and scales.

Both get their weights by a push and are compared with transformers, whose linear layers this file rounds by itself.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from drpo_megatron.fp8 import audit
from drpo_megatron.fp8.rollout import RolloutWeights
from drpo_megatron.rollout.probe import score_tokens
from drpo_megatron.sync.buckets import Bucket
from drpo_megatron.sync.push import SyncReport
from drpo_megatron.sync.verify import SyncMismatch
from tests.support import tiny_models
from tests.support.server_pool import Loans, PooledServer
from tests.support.servers import LIMIT_S, perturb

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has SGLang's own FP8 layers"),
]

PROMPTS = np.random.default_rng(0).integers(3, tiny_models.VOCAB_SIZE - 1, (8, 6)).tolist()
TRANSPORTS = ("distributed", "shared_memory", "disk", "delta")
PROJECTION = re.compile(r"model\.layers\.(\d+)\..*_proj")


def rounded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """[M, K] to e4m3 and back, in blocks of `rows` × 128 with the largest value at 448; float32."""
    out = torch.empty(x.shape)
    for i, j in itertools.product(range(0, x.shape[0], rows), range(0, x.shape[1], 128)):
        block = x[i : i + rows, j : j + 128].float()
        factor = 448 / block.abs().amax().clamp(min=1e-10)
        out[i : i + rows, j : j + 128] = (block * factor).clamp(-448, 448).to(torch.float8_e4m3fn).float() / factor
    return out


@torch.no_grad()
def reference(model: PreTrainedModel, first: int, *, inputs: bool = True, factor: float = 1.0) -> np.ndarray:
    """Log-probs of PROMPTS, with projections in FP8 from layer `first` on. inputs: their inputs as well. factor: of
    their weights.
    """
    saved, hooks = {n: p.clone() for n, p in model.named_parameters()}, []
    for name, module in model.named_modules():
        match = PROJECTION.fullmatch(name)
        if match and int(match[1]) >= first:
            module.weight.copy_(factor * rounded(module.weight, 128))
            if inputs:
                hooks.append(module.register_forward_pre_hook(lambda _, a: (rounded(a[0][0], 1)[None].to(a[0].dtype),)))
    logprobs = []
    for tokens in PROMPTS:
        logits_TV = model(torch.tensor([tokens])).logits[0, :-1].float()
        logprobs.append(torch.log_softmax(logits_TV, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0])
    for hook in hooks:
        hook.remove()
    for name, parameter in model.named_parameters():
        parameter.copy_(saved[name])
    return torch.cat(logprobs).double().numpy()


@dataclass
class Served:
    pooled: PooledServer
    model: PreTrainedModel

    def __post_init__(self) -> None:
        assert self.pooled.config is not None
        self.config = self.pooled.config
        weights = RolloutWeights.of(self.config)
        assert weights is not None
        self.weights = weights

    def push(self, version: int, **sync: Any) -> SyncReport:
        to = self.pooled.sync(bucket_mb=0.2, **sync)
        named = list(self.model.state_dict().items())
        buckets = [named[i : i + 20] for i in range(0, len(named), 20)]
        try:
            return to.push(itertools.chain.from_iterable(self.weights.stream(buckets)), version)
        finally:
            to.close(servers_alive=True)

    def logprobs(self) -> np.ndarray:
        return np.concatenate([score_tokens(self.pooled.url, tokens, LIMIT_S).logprobs_P for tokens in PROMPTS])

    def audit(self, quantized: dict[str, bool]) -> dict[str, bool]:
        urls, layout = [self.pooled.url], self.pooled.layout
        return audit.audit_servers(urls, layout, quantized, self.config.run_directory, LIMIT_S)


@pytest.fixture
def emulated(borrow: Loans) -> Served:
    """Twelve layers, of which the last two are in FP8; no size is a multiple of 128."""
    pooled = borrow("fp8")
    return Served(pooled, pooled.reference())


@pytest.fixture
def stored(borrow: Loans) -> Served:
    """FP8 parameters and scales, but for the first of three layers."""
    pooled = borrow("fp8_stored")
    return Served(pooled, pooled.reference())


def test_an_emulated_server_computes_in_fp8(emulated: Served) -> None:
    """A value that lies between two FP8 numbers may be rounded otherwise where float32 sums come in another order: most
    log-probs agree to 1e-4, and not all.
    """
    tensors = len(emulated.model.state_dict())
    for version, transport in enumerate(TRANSPORTS, start=1):
        if version % 2 == 0:
            perturb(emulated.model, version)
        report = emulated.push(version, transport=transport)
        # embeddings, head, last norm; a layer has 2 norms, 2 head norms and 4 projections
        assert report.verified == 3 + 12 * 8 and report.tensors == tensors
        found = emulated.logprobs()
        error_P = np.abs(found - reference(emulated.model, 10))
        assert np.mean(error_P < 1e-4) >= 0.75 and error_P.mean() < 0.01
        for other in (
            reference(emulated.model, 12),
            reference(emulated.model, 10, inputs=False),
            reference(emulated.model, 9),
        ):
            other_P = np.abs(found - other)
            assert np.mean(other_P < 1e-3) < 0.25 and other_P.mean() > 5 * error_P.mean()


def test_an_emulated_server_says_which_layers(emulated: Served) -> None:
    """Layer 1 is not in FP8; 10 and 11, whose names begin as its does, are."""
    found = emulated.audit(emulated.weights.quantized)
    assert len(found) == 12 * 4
    assert {n for n, in_fp8 in found.items() if in_fp8} == {n for n in found if re.match(r"model\.layers\.1[01]\.", n)}
    by_part = {n: in_fp8 and "model.layers.1" not in n for n, in_fp8 in emulated.weights.quantized.items()}
    with pytest.raises(audit.Fp8LayersDiffer, match="8 layers are in FP8 and should not be") as caught:
        emulated.audit(by_part)
    assert "model.layers.10.self_attn.qkv_proj.weight" in caught.value.unexpected
    with pytest.raises(audit.Fp8LayersDiffer, match=r"4 layers should be in FP8 and are not: model\.layers\.9\.mlp"):
        emulated.audit(dict(emulated.weights.quantized) | quantized_layer(emulated, 9))
    assert emulated.logprobs().shape == (40,), "the server generates as before"


def quantized_layer(served: Served, number: int) -> dict[str, bool]:
    projection = re.compile(rf"model\.layers\.{number}\..*_proj\.weight")
    return {name: True for name in served.weights.quantized if projection.fullmatch(name)}


def test_a_server_holds_fp8_parameters(stored: Served) -> None:
    """SGLang's own FP8 layers take weights and scales; their products are emulated. Everything else is bfloat16, so
    that log-probs show no more than that every tensor is in its place.
    """
    tensors = len(stored.model.state_dict()) + 2 * 7
    for version, transport in enumerate(TRANSPORTS, start=1):
        if version % 2 == 0:
            perturb(stored.model, version)
        report = stored.push(version, transport=transport)
        assert report.verified == 3 + 3 * 8 and report.tensors == tensors
        found = stored.logprobs()
        error_P = np.abs(found - reference(stored.model, 1))
        assert error_P.mean() < 0.2 * np.abs(found - reference(stored.model, 1, factor=0.5)).mean()
    layers = stored.audit(stored.weights.quantized)
    assert len(layers) == 3 * 4
    assert {n for n, in_fp8 in layers.items() if in_fp8} == {n for n in layers if re.match(r"model\.layers\.[12]\.", n)}


def test_a_wrong_scale_on_the_wire_is_found(stored: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    name, write = "model.layers.2.mlp.up_proj.weight_scale_inv", Bucket.write

    def spoil(bucket: Bucket, flat: torch.Tensor) -> torch.Tensor:
        flat = write(bucket, flat)
        if name in bucket.names:
            start = sum(t.nbytes for t in bucket.tensors[: bucket.names.index(name)])
            flat[start + 2] ^= 1  # a bit of the mantissa of the first scale that bfloat16 keeps
        return flat

    monkeypatch.setattr(Bucket, "write", spoil)
    with pytest.raises(SyncMismatch, match="values differ") as caught:
        stored.push(9)
    assert "model.layers.2.mlp.up_proj.weight" in caught.value.names and len(caught.value.names) == 2
    monkeypatch.undo()
    assert stored.push(10).verified

"""Seconds of the other verbs: generate by a decode model, sync and save by bytes over a link."""

from __future__ import annotations

import math
from dataclasses import dataclass

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.flops import SequenceCost, routed_weights
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.plan.devices import Device
from drpo_megatron.plan.memory import ELEMENT_BYTES, ServerMemory
from drpo_megatron.plan.parameters import total_parameters
from drpo_megatron.plan.workload import Workload


def servers_of(config: RunConfig) -> int:
    return len(config.rollout.server.addresses) or config.rollout.server.count


@dataclass(frozen=True)
class GenerateSeconds:
    """A step's rollouts. running: sequences that each server decodes together. step: one token of each of them."""

    total: float
    prefill: float
    decode: float
    running: int
    step: float


def generate_seconds(
    config: RunConfig,
    hf: HFModelConfig,
    workload: Workload,
    memory: ServerMemory,
    device: Device,
    assumed: Assumptions,
) -> GenerateSeconds:
    """Decoding reads the weights it meets and the cache of all running sequences once a token, or computes as long.

    A server runs as many sequences as fit its cache, its share of rollout.concurrency and of the step; when they are
    fewer than its share, one begins where another ends. No step is shorter than its longest response. Prompts are
    computed once a group: the others find them in the prefix cache. The server must hold the longest sequence
    (`ServerMemory.kv_tokens`).
    """
    servers, ranks = servers_of(config), config.rollout.server.tensor_parallel
    share = math.ceil(workload.sequences / servers)
    context = workload.prompt + workload.response / 2
    fitting = int(memory.kv_tokens // context)
    running = min(fitting, max(1, config.rollout.concurrency // servers), share)
    cost = SequenceCost.of(hf)
    rate = device.flops_per_s * assumed.dense_utilization * ranks

    def step(sequences: int) -> float:
        read = memory.weights * weights_met(hf, sequences) + sequences * context * memory.kv_token
        reading = read / (device.memory_bytes_per_s * assumed.memory_utilization)
        computed = sequences * (cost.linear + hf.hidden_size * hf.vocab_size + cost.quadratic * context)
        return max(reading, 2 * computed / rate) + hf.num_layers * assumed.decode_layer_us * 1e-6

    prefill = 2 * cost(round(workload.prompt)) * math.ceil(workload.prompts / servers) / rate
    tokens = share * workload.response
    longest = config.rollout.sampling.max_new_tokens
    # The longest response begins with the first, and half as many run beside it on average.
    decode = max(tokens / running * step(running), longest * step(max(1, running // 2)))
    return GenerateSeconds(prefill + decode, prefill, decode, running, step(running))


def weights_met(hf: HFModelConfig, sequences: int) -> float:
    """Share of a server's weights that a step of so many tokens reads, when each takes any experts."""
    if hf.moe is None:
        return 1.0
    experts = sum(routed_weights(hf, layer) for layer in range(hf.num_layers)) * hf.moe.num_experts / hf.moe.top_k
    missed = (1 - hf.moe.top_k / hf.moe.num_experts) ** sequences
    return 1 - experts / total_parameters(hf) * missed


@dataclass(frozen=True)
class SyncSeconds:
    nbytes: int
    buckets: int
    total: float


def sync_seconds(config: RunConfig, hf: HFModelConfig, device: Device, assumed: Assumptions) -> SyncSeconds:
    """Whole weights once from rank 0: over the network, through host memory, or to storage and back.

    Gathering a bucket goes on while the one before it is sent, and takes as long.
    """
    nbytes = total_parameters(hf) * ELEMENT_BYTES[config.model.dtype]
    buckets = math.ceil(nbytes / (config.sync.bucket_mb * 2**20))
    seconds = {
        "distributed": nbytes / (device.network_bytes_per_s * assumed.link_utilization),
        "shared_memory": nbytes / (assumed.host_gb_s * 1e9),
        "disk": 2 * nbytes / (assumed.storage_gb_s * 1e9),
        "delta": 2 * nbytes / (assumed.storage_gb_s * 1e9),
    }[config.sync.transport]
    return SyncSeconds(nbytes, buckets, seconds + buckets * assumed.sync_bucket_ms / 1000)


def save_seconds(config: RunConfig, hf: HFModelConfig, assumed: Assumptions, rank_bytes: float) -> tuple[int, float]:
    """(bytes, seconds that training waits) of a checkpoint: weights, main weights and moments.

    rank_bytes: what the fullest rank copies to host memory; asynchronous checkpoints wait for that copy only.
    """
    weight = ELEMENT_BYTES[config.model.dtype]
    nbytes = total_parameters(hf) * (weight + 8 + (4 if weight < 4 else 0))
    if config.save.asynchronous:
        return nbytes, rank_bytes / (assumed.host_gb_s * 1e9)
    return nbytes, nbytes / (assumed.storage_gb_s * 1e9)

"""The plan against numbers from elsewhere: published sizes, closed forms, Megatron-LM's formulas, counts by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron import cli
from drpo_megatron.bench import plan as bench_plan
from drpo_megatron.config import RunConfig, load_config
from drpo_megatron.models.flops import training_flops
from drpo_megatron.models.hf_config import HFModelConfig, check_layout
from drpo_megatron.plan.activations import (
    ActivationModel,
    LossBytes,
    loss_bytes,
    schedule_of,
    stage_peak,
)
from drpo_megatron.plan.advice import verdicts
from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.plan.devices import DEVICES
from drpo_megatron.plan.memory import server_memory
from drpo_megatron.plan.parameters import KINDS, rank_parameters, stages_of, states_of, total_parameters
from drpo_megatron.plan.run_plan import Plan, make_plan
from drpo_megatron.plan.search import search
from drpo_megatron.plan.serve_seconds import weights_met
from drpo_megatron.plan.workload import Workload
from drpo_megatron.platform.layout import ParallelLayout

ROOT = Path(__file__).parents[2]
HF_CONFIGS = ROOT / "tests" / "data" / "hf_configs"
H100 = DEVICES["h100"]
# As the publishers state them, without multi-token prediction layers.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3-70b": 70_553_706_496,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v3-671b": 671_026_419_200,
}
NO_LOSS = LossBytes(0, 0, 0)


def architecture(name: str) -> HFModelConfig:
    return HFModelConfig.load(HF_CONFIGS / name)


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / f"{name}.yaml", [f"model.path={HF_CONFIGS / name}", *overrides])


def plan(name: str, *overrides: str, assume: tuple[str, ...] = ()) -> Plan:
    config = recipe(name, *overrides)
    return make_plan(config, architecture(name), H100, Assumptions.of(config, assume))


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_a_model_has_its_published_size(name: str, published: int) -> None:
    assert total_parameters(architecture(name)) == published


@pytest.mark.parametrize("name", ["llama3-70b", "qwen3-235b-a22b", "deepseek-v3-671b"])
def test_all_ranks_together_are_the_model(name: str) -> None:
    """Elements of every rank of the recipe, each by the number of ranks that hold others, against the whole."""
    hf, layout = architecture(name), recipe(name).layout
    whole = rank_parameters(hf, ParallelLayout(), stages_of(hf, ParallelLayout())[0])
    together: Counter[str] = Counter()
    for stage in stages_of(hf, layout):
        together += rank_parameters(hf, layout, stage)
    assert together["experts"] * layout.expert * layout.expert_tensor == whole["experts"]
    assert together["mlp"] * layout.tensor == whole["mlp"]
    for kind in ("norms", "router"):  # on every rank of a stage
        assert together[kind] == whole[kind]
    if hf.mla is None:
        assert together["attention"] * layout.tensor == whole["attention"]
    assert set(together) <= set(KINDS)


def test_stages_by_hand() -> None:
    hf = replace(architecture("llama3.2-1b"), num_layers=10)
    uneven = stages_of(hf, ParallelLayout(pipeline=3, first_stage_layers=2, last_stage_layers=3))
    assert [stage.layers for stage in uneven] == [(0, 1), (2, 3, 4, 5, 6), (7, 8, 9)]
    assert [(stage.first, stage.last) for stage in uneven] == [(True, False), (False, False), (False, True)]
    # Megatron-Core deals chunks out in rounds.
    interleaved = stages_of(replace(hf, num_layers=8), ParallelLayout(pipeline=2, virtual_pipeline=2))
    assert [stage.chunks for stage in interleaved] == [((0, 1), (4, 5)), ((2, 3), (6, 7))]


def test_a_tied_embedding_is_held_twice_by_two_stages() -> None:
    hf = architecture("llama3.2-1b")
    one = rank_parameters(hf, ParallelLayout(), stages_of(hf, ParallelLayout())[0])
    assert one["embedding"] == 128256 * 2048 and "head" not in one
    two = ParallelLayout(pipeline=2)
    first, last = (rank_parameters(hf, two, stage) for stage in stages_of(hf, two))
    assert first["embedding"] == last["head"] == 128256 * 2048 and "head" not in first


def test_states_divide_over_the_copies() -> None:
    """Dense over data × context = 6 ranks, experts over the 3 that TP 4 × DP 3 × CP 2 leaves to EP 8."""
    layout = ParallelLayout(tensor=4, data=3, context=2, expert=8)
    states = states_of(Counter(attention=600, experts=60), layout, 2, True)
    assert (states.weights, states.gradients) == (660 * 2, 660 * 4)
    assert states.optimizer == 600 * 12 // 6 + 60 * 12 // 3
    assert states_of(Counter(attention=600), layout, 4, False).optimizer == 600 * 8


def test_activations_are_korthikantis() -> None:
    """Their equation 6 is 34·s·b·h a layer with selective recomputation: 10 of them per rank whole, 24 divided.

    Without dropout the two masks fall away (2·s·b·h), with rotary positions two copies of queries and keys come in
    (4·s·b·h), and SwiGLU of width 8/3·h keeps what their MLP of 4·h does. Flash attention adds 4 bytes a head.
    """
    base = replace(architecture("llama2-7b"), hidden_size=3072, num_heads=24, num_kv_heads=24, head_dim=128)
    hf = replace(base, ffn_hidden_size=8192)
    for layout in (ParallelLayout(), ParallelLayout(tensor=8, sequence_parallel=True)):
        layer = ActivationModel(hf, layout, 2, "transformer_engine").dense_layer
        assert layer.kept == ((34 - 2 + 4) * 3072 + 4 * 24) / layout.tensor
        assert layer.kept - layer.core == (34 - 2 + 4) * 3072 / layout.tensor
    # Without sequence parallelism both norms, and what they hand on, are whole on each rank.
    whole = ActivationModel(hf, ParallelLayout(tensor=8), 2, "transformer_engine").dense_layer
    assert whole.kept == 8 * 3072 + (28 * 3072 + 4 * 24) / 8


@pytest.mark.parametrize(("pipeline", "virtual"), [(4, None), (8, None), (4, 2), (8, 3)])
def test_the_schedule_holds_what_megatron_says(pipeline: int, virtual: int | None) -> None:
    """1F1B: p − i micro-batches on stage i. Interleaved, first stage: 1 + (p − 1)/(p·v) of all layers' activations
    (Narayanan et al. 2021, section 2.3; Megatron-LM's theoretical_memory_usage).
    """
    chunks = virtual or 1
    hf = replace(architecture("llama3.2-1b"), num_layers=pipeline * chunks)
    layout = ParallelLayout(pipeline=pipeline, virtual_pipeline=virtual)
    for stage in stages_of(hf, layout):
        held = most = 0
        seen: Counter[tuple[bool, int]] = Counter()
        for forward, chunk in schedule_of(stage, layout, 3 * pipeline):
            seen[forward, chunk] += 1
            held += 1 if forward else -1
            most = max(most, held)
            assert seen[True, chunk] >= seen[False, chunk]
        assert set(seen.values()) == {3 * pipeline} and len(seen) == 2 * chunks
        if virtual is None:
            assert most == pipeline - stage.index
        elif stage.first:
            assert most == pipeline * chunks * (1 + (pipeline - 1) / (pipeline * chunks))


def test_full_recomputation_keeps_inputs_and_one_layer() -> None:
    hf = replace(architecture("llama2-7b"), num_layers=6, vocab_size=8)
    model = ActivationModel(hf, ParallelLayout(), 2, "transformer_engine")
    (stage,) = stages_of(hf, ParallelLayout())
    hidden, width = 2 * hf.hidden_size, 2 * hf.ffn_hidden_size
    layer = model.dense_layer
    assert layer.working == hidden + 2 * width
    peak = stage_peak(model, stage, "full", 100, NO_LOSS, micro_batches=3)
    # Six inputs, the norm behind the last layer, and one layer recomputed from its input in its backward.
    assert peak.total == 100 * (6 * hidden + 2 * hidden + layer.kept - hidden + layer.working)
    none = stage_peak(model, stage, "none", 100, NO_LOSS, micro_batches=3)
    assert none.total == 100 * (6 * layer.kept + 2 * hidden + layer.working)


def test_logits_stay_in_their_budget() -> None:
    hf, layout = architecture("llama3-70b"), ParallelLayout(tensor=8, pipeline=2)
    columns = 128256 // 8
    fused = loss_bytes(hf, layout, 2, 8192, 256 * 2**20, "fused")
    assert fused.logits == 8192 * columns * 2 < 256 * 2**20
    assert loss_bytes(hf, layout, 2, 8192, 2**20, "fused").logits == 2**20
    assert loss_bytes(hf, layout, 2, 8192, 2**20, "dense").logits == 8192 * columns * (2 + 12)
    assert fused.placeholder == columns * 8192 * 2


@pytest.mark.parametrize(
    ("name", "ranks", "kv_token"),
    [
        ("llama3-70b", 8, 80 * 2 * 128 * 2),
        ("llama3-70b", 16, 80 * 2 * 128 * 2),  # a key-value head is the least
        ("qwen3-32b", 2, 64 * 2 * 4 * 128 * 2),
        ("deepseek-v3-671b", 32, 61 * 576 * 2),  # the latent and the rotary key, on every rank
    ],
)
def test_kv_cache_of_a_token(name: str, ranks: int, kv_token: int) -> None:
    config = recipe(name, f"rollout.server.tensor_parallel={ranks}")
    memory = server_memory(config, architecture(name), H100, Assumptions.of(config))
    assert memory.kv_token == kv_token
    assert memory.kv_tokens == int((0.85 * 80e9 - memory.weights) / kv_token)


def test_a_server_of_70b_is_an_eighth_of_it() -> None:
    config = recipe("llama3-70b")
    weights = server_memory(config, architecture("llama3-70b"), H100, Assumptions.of(config)).weights
    norms = (2 * 80 + 1) * 8192  # on every rank
    assert weights == 2 * ((70_553_706_496 - norms) / 8 + norms)


def test_training_takes_its_flops_at_the_assumed_rate() -> None:
    """One rank: nothing but matrix products."""
    overrides = ["parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.data=1", "model.recompute=none"]
    one = plan("qwen3-32b", *overrides, assume=("prompt_tokens=1000", "response_tokens=3000"))
    sequences = 64 * 16
    flops = training_flops(one_hf := architecture("qwen3-32b"), [4000] * sequences, 3000 * sequences)
    assert one.train.flops == flops
    assert one.train.total == pytest.approx(flops / (0.55 * 989e12))
    assert one.train.mfu(1, H100) == pytest.approx(0.55)
    again = plan("qwen3-32b", *overrides[:3], assume=("prompt_tokens=1000", "response_tokens=3000"))
    layers = flops - 6 * one_hf.hidden_size * one_hf.vocab_size * 3000 * sequences
    assert again.train.total == pytest.approx((flops + layers / 3) / (0.55 * 989e12))


def test_a_pipeline_waits_once_a_stage() -> None:
    """(m + p − 1) / m of the time without waiting, and with v chunks (m + (p − 1) / v) / m."""
    base = plan("llama3-70b")
    count, spent = base.train.micro_batches, base.train
    assert spent.bubble / (spent.total - spent.bubble - spent.data) == pytest.approx(1 / count)
    interleaved = plan("llama3-70b", "parallel.virtual_pipeline=2").train
    assert interleaved.bubble == pytest.approx(spent.bubble / 2, rel=0.01)


def test_collectives_by_hand() -> None:
    """Tensor parallelism: 8 collectives of a hidden state a layer and micro-batch, 2 gathers more for the gradients of
    weights, 4 in a forward that is recomputed; each moves 7/8 of [T, H] over NVLink.
    """
    one = plan("llama3-70b", assume=("link_utilization=1",))
    tokens = one.workload.rank_sequences(one.config.layout) * one.workload.length
    assert one.train.tensor == pytest.approx(4 * 40 * 14 * tokens * 8192 * 2 * 7 / 8 / 450e9)
    kept = plan("llama3-70b", "model.recompute=none", assume=("link_utilization=1",))
    assert kept.train.tensor == pytest.approx(one.train.tensor * 10 / 14)


@pytest.mark.parametrize(
    ("overrides", "seconds_a_byte"),
    [
        # Eight ranks of one node: seven peers over NVLink.
        ((), 7 / 8 / 450e9),
        # Two nodes: the half that leaves the node is what takes longer.
        (("parallel.expert=16", "parallel.data=8"), 8 / 16 / 50e9),
    ],
)
def test_all_to_all_by_hand(overrides: tuple[str, ...], seconds_a_byte: float) -> None:
    """Each token's hidden state to 8 experts and back, in forward, recomputed forward and backward."""
    one = plan("qwen3-30b-a3b", *overrides, assume=("link_utilization=1",))
    tokens = one.workload.rank_sequences(one.config.layout) * one.workload.length
    sent = 4 * 48 * 6 * tokens / 2 * 2048 * 2 * 8
    assert one.train.expert == pytest.approx(sent * seconds_a_byte)
    assert plan("qwen3-30b-a3b", *overrides, assume=("link_utilization=1", "imbalance=2")).train.expert == (
        pytest.approx(2 * one.train.expert)
    )


def test_a_decode_step_meets_the_experts_of_its_tokens() -> None:
    """One token reads 8 of 128 experts, many read all."""
    hf = architecture("qwen3-30b-a3b")
    experts = 48 * 128 * 3 * 2048 * 768
    total = PUBLISHED["qwen3-30b-a3b"]
    assert weights_met(hf, 1) == pytest.approx((total - experts + experts * 8 / 128) / total)
    assert weights_met(hf, 2) == pytest.approx((total - experts + experts * (1 - (120 / 128) ** 2)) / total)
    assert weights_met(hf, 4096) == pytest.approx(1)
    assert weights_met(architecture("llama3-70b"), 1) == 1


def test_decoding_reads_weights_and_cache() -> None:
    """One sequence of a dense model at a time: bytes over bandwidth, and a fixed time a layer."""
    assume = ("prompt_tokens=100", "response_tokens=200", "memory_utilization=1", "decode_layer_us=1e-9")
    small = ["rollout.prompts_per_step=4", "rollout.samples_per_prompt=2", "rollout.sampling.max_new_tokens=200"]
    one = plan("llama3-70b", *small, "rollout.concurrency=1", assume=assume)
    assert one.generate is not None
    token = (one.server.weights + 200 * one.server.kv_token) / 3.35e12
    assert one.generate.running == 1
    assert one.generate.step == pytest.approx(token)
    assert one.generate.decode == pytest.approx(8 * 200 * token)
    together = plan("llama3-70b", *small, "rollout.concurrency=8", assume=assume).generate
    assert together is not None and together.running == 8
    assert together.decode == pytest.approx(200 * (one.server.weights + 8 * 200 * one.server.kv_token) / 3.35e12)


def test_a_sync_is_the_weights_over_the_network() -> None:
    one = plan("llama3-70b", assume=("sync_bucket_ms=1e-9", "link_utilization=1"))
    assert one.sync.nbytes == 2 * 70_553_706_496
    assert one.sync.total == pytest.approx(one.sync.nbytes / 50e9)
    assert one.sync.buckets == -(-one.sync.nbytes // 2**30)


def test_micro_batches() -> None:
    config = recipe("llama3-70b", "parallel.data=4")
    workload = Workload.of(config, Assumptions.of(config, ["prompt_tokens=1024", "response_tokens=1024"]))
    assert workload.rank_sequences(config.layout) == 128 * 8 // 4 // 4
    assert workload.micro_batches(config.layout) == 64 * 2048 // 8192
    assert workload.micro_batch_tokens(replace(config.layout, context=2)) == 4096
    assert workload.micro_batches(replace(config.layout, pipeline=3, virtual_pipeline=2)) == 18


@pytest.mark.parametrize("name", ["llama3-70b", "qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b", "deepseek-v3-671b"])
def test_recipes_fit(name: str) -> None:
    one = plan(name)
    assert one.fits and 0.5 * H100.memory < one.trainer_bytes
    assert all("fits: " in sentence for sentence in verdicts(one, architecture(name)))


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.recompute=none",),
        ("optimizer.distributed=false",),
        ("parallel.data=1", "parallel.pipeline=1"),
        ("training.tokens_per_micro_batch=250000",),
    ],
)
def test_advice_helps(overrides: tuple[str, ...]) -> None:
    """Of a plan that does not fit, the setting that the sentence names makes it fit."""
    hf = architecture("llama3-70b")
    one = plan("llama3-70b", *overrides)
    assert not one.trainer_fits
    sentence = verdicts(one, hf)[0]
    advice = re.search(r"set (.+?), which takes ([\d.]+) GB", sentence)
    if advice is None:
        assert "no single change is enough" in sentence and overrides[0] == "parallel.data=1"
        return
    changed = plan("llama3-70b", *overrides, *advice[1].split())
    assert changed.trainer_fits
    assert f"{changed.trainer_bytes / 1e9:.1f}" == advice[2]


def test_a_server_that_does_not_fit_names_its_ranks() -> None:
    one = plan("llama3-70b", "rollout.server.tensor_parallel=2")
    sentence = verdicts(one, architecture("llama3-70b"))[1]
    assert not one.server_fits and one.generate is None
    ranks = re.search(r"set rollout.server.tensor_parallel=(\d+)", sentence)
    assert ranks and plan("llama3-70b", f"rollout.server.tensor_parallel={ranks[1]}").server_fits


def test_colocated_holds_both_weights_in_the_sync() -> None:
    apart = plan("llama3-70b")
    both = plan("llama3-70b", "rollout.placement=colocated", "rollout.server.count=4", "sync.transport=shared_memory")
    assert (apart.devices, both.devices) == (40, 32)
    assert both.trainer_bytes == max(stage.training for stage in both.stages)
    large = plan("llama3-70b", "rollout.placement=colocated", "rollout.server.tensor_parallel=1")
    syncing = max(s.states.weights + s.sync + s.reserved for s in large.stages) + large.server.weights
    assert large.trainer_bytes == syncing > both.trainer_bytes


@pytest.mark.parametrize(("name", "gpus"), [("llama3-70b", 64), ("qwen3-30b-a3b", 16)])
def test_search_proposes_layouts_that_fit(name: str, gpus: int) -> None:
    config, hf = recipe(name), architecture(name)
    found = search(config, hf, H100, gpus)
    assert len(found) == 5
    seconds = [one.plan.step_seconds for one in found]
    assert seconds == sorted(seconds)
    for one in found:
        check_layout(hf, one.plan.config.layout)
        assert one.plan.fits and one.plan.devices == gpus
        assert one.changes and plan(name, *(cli_override(item) for item in one.changes.items())).fits
    assert len({one.plan.config.layout for one in found}) == 5
    if gpus > config.layout.world_size + 8:
        assert seconds[0] < make_plan(config, hf, H100).step_seconds


def cli_override(item: tuple[str, Any]) -> str:
    return f"{item[0]}={json.dumps(item[1])}"


def test_search_shares_gpus_when_colocated() -> None:
    config = recipe("qwen3-32b", "rollout.placement=colocated", "sync.transport=shared_memory")
    found = search(config, architecture("qwen3-32b"), H100, 16)
    assert found and all(one.plan.ranks == one.plan.devices == 16 for one in found)


# --- the command ---------------------------------------------------------------------------------------------------


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *words])
    return int(ended.value.code or 0)


def words(name: str, *more: str) -> list[str]:
    return [str(ROOT / "configs" / f"{name}.yaml"), f"model.path={HF_CONFIGS / name}", *more]


def test_json_has_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words("qwen3-235b-a22b", "--json", "--device", "h200")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["device"] == "h200" and printed["fits"] is True
    assert printed["parameters"] == PUBLISHED["qwen3-235b-a22b"]
    assert [stage["layers"] for stage in printed["stages"]] == [11, 12, 12, 12, 12, 12, 12, 11]
    assert printed["sync_bytes"] == 2 * PUBLISHED["qwen3-235b-a22b"]
    assert printed["seconds"]["step"] > printed["seconds"]["train"] > 0


def test_a_plan_says_that_it_does_not_know_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    run(*words("llama3-70b"))
    plain = capsys.readouterr()
    run(*words("llama3-70b", "fp8.recipe=blockwise"))
    in_fp8 = capsys.readouterr()
    assert plain.out == in_fp8.out and "fp8" not in plain.err
    assert "fp8 is planned as bfloat16" in in_fp8.err


def test_what_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words("llama3-70b", "model.recompute=none")) == 2
    assert "set model.recompute=full" in capsys.readouterr().err
    assert run(*words("llama3-70b", "model.recompute=none", "--device", "b200")) == 0
    assert run(*words("llama3-70b", "--search", "--gpus", "8")) == 2
    assert "no layout of 8 h100 fits llama3-70b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["model.path=nowhere"], "nowhere/config.json does not exist; put it there, nothing else of the model is read"),
        (["parallel.tensor=16"], "8 key-value heads do not divide over parallel.tensor = 16"),
        (["parallel.pipeline=3"], "choose a divisor"),
        (["--search"], "--search: needs --gpus N"),
        (["--gpus", "8"], "--gpus: has no effect without --search"),
        (["--assume", "mfu=1"], "'mfu' is no assumption; known are"),
        (["--assume", "imbalance=many"], "'many' is not a number"),
        (["--assume", "imbalance=0"], "must be above 0"),
        (["--assume", "response_tokens=5000"], "is above rollout.sampling.max_new_tokens = 4096"),
        (["parallel.tensr=8"], "did you mean 'tensor'"),
    ],
)
def test_a_bad_question_is_answered(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words("llama3-70b", *given)) == 2
    printed = capsys.readouterr()
    assert says in printed.err and not printed.out


def test_a_recipe_says_how_its_model_is_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(str(ROOT / "configs" / "quickstart.yaml"), f"model.path={tmp_path / 'none'}") == 2
    assert "drpo train CONFIG --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("layout", bench_plan.LAYOUTS, ids=lambda layout: layout.name)
def test_the_bench_measures_layouts_that_exist(layout: bench_plan.Layout, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(bench_plan.settings(layout, tmp_path)))
    config = load_config(path)
    assert config.layout.world_size == layout.ranks <= 4
    assert config.layout.layers_per_stage(8)
    assert len({one.name for one in bench_plan.LAYOUTS}) == len(bench_plan.LAYOUTS) >= 8

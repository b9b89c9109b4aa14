"""What the settings of a run must satisfy together, and with the files they name. Runs before any process starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from drpo_megatron.config.data_checks import data_problems, reward_problems
from drpo_megatron.config.evaluation_checks import evaluation_problems
from drpo_megatron.config.fp8_checks import fp8_layer_problems, fp8_problems
from drpo_megatron.config.layout_checks import determinism_problems, server_problems
from drpo_megatron.config.load import ConfigError
from drpo_megatron.config.model_files import tokenizer_problems, weight_problems
from drpo_megatron.config.optimizer_checks import moment_machine_problems, moment_problems, overlap_problems
from drpo_megatron.config.rollout_checks import fp8_rollout_problems, rollout_problems
from drpo_megatron.config.save_checks import save_problems
from drpo_megatron.config.schema import RunConfig

if TYPE_CHECKING:
    from drpo_megatron.models.hf_config import HFModelConfig


def check_config(config: RunConfig) -> None:
    """Raise ConfigError with every problem. Reads the model's headers, the tokenizer and all rows of a data file.

    model.path must exist: a recipe is to be made before this.
    """
    problems = [
        *_parallel(config),
        *overlap_problems(config),
        *moment_problems(config),
        *moment_machine_problems(config),
        *determinism_problems(config),
        *_batch(config),
        *_algorithm(config),
        *data_problems(config.data),
        *reward_problems(config.reward, config.data.source),
        *evaluation_problems(config),
        *rollout_problems(config),
        *save_problems(config),
        *fp8_problems(config),
        *_timeouts(config),
        *_profile(config),
        *_model(config),
    ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))  # a set that is evaluated may repeat one of the run's


def check_evaluation(config: RunConfig) -> None:
    """The same for what `drpo evaluate` needs of a configuration: the model, the sets and the servers."""
    problems = [*evaluation_problems(config), *rollout_problems(config), *_model(config)]
    if not config.evaluation.sets:
        problems.append("evaluation.sets: is empty; name what is to be evaluated there, or with --data")
    if config.fp8.rollout:
        problems.append(
            "fp8.rollout: is true, and servers of FP8 rollouts start without weights, which a training run sends them; "
            "set it to false, or evaluate a model that `drpo convert --dtype fp8` made"
        )
    if problems:
        raise ConfigError(problems)


def _parallel(config: RunConfig) -> Iterator[str]:
    try:
        _ = config.layout
    except ValueError as error:
        yield f"parallel: {error}"


def _batch(config: RunConfig) -> Iterator[str]:
    prompts, updates, ranks = (
        config.rollout.prompts_per_step,
        config.training.updates_per_batch,
        config.parallel.data,
    )
    if config.rollout.samples_per_prompt < 2:
        yield (
            "rollout.samples_per_prompt: must be 2 or more, because the advantage compares the samples of one prompt; "
            "raise it"
        )
    if prompts % updates:
        yield (
            f"training.updates_per_batch: {updates} does not divide rollout.prompts_per_step = {prompts}; "
            "change one of them"
        )
    sequences = prompts // updates * config.rollout.samples_per_prompt
    if not prompts % updates and sequences < ranks:
        yield (
            f"parallel.data: {ranks} ranks share the {sequences} sequences of an update "
            "(prompts_per_step / updates_per_batch × samples_per_prompt), so some would have none; change one of them"
        )
    from drpo_megatron.fp8.recipes import layer_backend
    from drpo_megatron.training.prefix import sharing_mode  # imports torch, which takes seconds

    try:
        sharing_mode(config.training.shared_prefix, config.parallel.context, layer_backend(config.fp8))
    except ValueError as error:
        yield f"training.shared_prefix: {error}"
    if config.optimizer.min_lr > config.optimizer.lr:
        yield f"optimizer.min_lr: {config.optimizer.min_lr} is above optimizer.lr = {config.optimizer.lr}; lower it"


def _algorithm(config: RunConfig) -> Iterator[str]:
    from drpo_megatron.algorithms.losses import make_loss  # imports torch, which takes seconds

    try:
        make_loss(config.algorithm.loss, config.algorithm.loss_args)
    except ValueError as error:
        yield f"algorithm.loss: {error}"


def _timeouts(config: RunConfig) -> Iterator[str]:
    training = config.training
    if training.verb_timeout_s is not None and training.timeout_s <= training.verb_timeout_s:
        yield (
            f"training.timeout_s: is {training.timeout_s:g}, and a collective would end the job, without a report, "
            f"before training.verb_timeout_s = {training.verb_timeout_s:g}; raise the first or lower the second"
        )


def _profile(config: RunConfig) -> Iterator[str]:
    steps = config.training.steps
    if beyond := [step for step in config.training.profile_steps if not 0 <= step < steps]:
        yield f"training.profile_steps: {beyond} are not among the steps 0 to {steps - 1} of the run; correct them"


def _model(config: RunConfig) -> Iterator[str]:
    from drpo_megatron.models.hf_config import HFModelConfig

    path = config.model.path
    if not path.is_dir():
        yield f"model.path: {path} is not a directory; point it at a Hugging Face model, or set model.recipe"
        return
    try:
        hf = HFModelConfig.load(path)
    except (OSError, ValueError) as error:
        yield f"model.path: {error}"
        return
    yield from _model_layout(config, hf)
    yield from server_problems(config, hf)
    yield from _experts(config, hf)
    yield from fp8_layer_problems(config, hf)
    yield from _served(config, hf)
    yield from fp8_rollout_problems(config, hf)
    yield from _replay(config, hf)
    for problem in weight_problems(path):
        yield f"model.path: {problem}"
    for problem in tokenizer_problems(path, hf.vocab_size, config.data.chat_template):
        yield f"model.path: {problem}"
    prompt, response = config.data.max_prompt_tokens, config.rollout.sampling.max_new_tokens
    if prompt + response > hf.max_position_embeddings:
        yield (
            f"rollout.sampling.max_new_tokens: {response} + data.max_prompt_tokens = {prompt} is above the model's "
            f"{hf.max_position_embeddings} positions; lower one of them"
        )
    answer = config.evaluation.max_new_tokens or response
    if config.evaluation.sets and prompt + answer > hf.max_position_embeddings:
        yield (
            f"evaluation.max_new_tokens: {answer} + data.max_prompt_tokens = {prompt} is above the model's "
            f"{hf.max_position_embeddings} positions; lower one of them"
        )


def _replay(config: RunConfig, hf: HFModelConfig) -> Iterator[str]:
    """The rollouts of a former run that this one is to train from."""
    from drpo_megatron.rollout.dump import dump_problems

    if config.rollout.from_dump is not None:
        follows_routing = hf.moe is not None and config.model.routing_replay is not False
        for problem in dump_problems(config, needs_experts=follows_routing):
            yield f"rollout.from_dump: {problem}"


def _experts(config: RunConfig, hf: HFModelConfig) -> Iterator[str]:
    model = config.model
    if hf.moe is None:
        keys = ("routing_replay", "moe_aux_loss_coefficient", "moe_z_loss_coefficient", "moe_bias_update_rate")
        for key in keys:
            if getattr(model, key):
                yield f"model.{key}: is {getattr(model, key)} and {hf.model_type} is dense; remove it"
    elif model.moe_bias_update_rate and not hf.moe.expert_bias:
        yield (
            f"model.moe_bias_update_rate: is {model.moe_bias_update_rate} and the routers of {hf.model_type} have no "
            "bias; remove it, or set model.moe_aux_loss_coefficient"
        )


def _served(config: RunConfig, hf: HFModelConfig) -> Iterator[str]:
    """What SGLang's code for the family would compute differently."""
    path = config.model.path
    if hf.moe is not None and hf.model_type == "qwen3_moe" and not all(hf.moe.layers):
        dense = [layer for layer, is_moe in enumerate(hf.moe.layers) if not is_moe]
        yield (
            f"model.path: layers {dense} of {path} are dense, and SGLang serves Qwen3-MoE with experts in "
            "every layer only; use another model"
        )
    if hf.model_type in ("mixtral", "gemma") and hf.rope.type != "default":
        yield (
            f"model.path: the rope_type of {path} is {hf.rope.type}, and SGLang serves {hf.model_type} with default "
            "only; use another model"
        )
    if hf.model_type == "mixtral" and hf.head_dim * hf.num_heads != hf.hidden_size:
        yield (
            f"model.path: the head_dim of {path} is {hf.head_dim}, and SGLang serves mixtral with hidden_size / "
            f"num_attention_heads = {hf.hidden_size // hf.num_heads} only; use another model"
        )


def _model_layout(config: RunConfig, hf: HFModelConfig) -> Iterator[str]:
    from drpo_megatron.models.hf_config import check_layout

    try:
        layout = config.layout
    except ValueError:
        pass  # reported by _parallel
    else:
        try:
            check_layout(hf, layout)
        except ValueError as error:
            yield f"parallel: {error}"
    server = config.rollout.server.tensor_parallel
    if hf.num_heads % server:
        yield (
            f"rollout.server.tensor_parallel: {server} does not divide the {hf.num_heads} attention heads; "
            f"choose a divisor of {hf.num_heads}"
        )
    # SGLang replicates key-value heads when it has more ranks than heads.
    elif hf.num_kv_heads % server and server % hf.num_kv_heads:
        yield (
            f"rollout.server.tensor_parallel: {server} neither divides the {hf.num_kv_heads} key-value heads nor is a "
            "multiple of them; choose another size"
        )

"""Train a recipe's model and task by TRL's GRPO: what `compare_trl.py` runs on the peer's side.

    python tools/trl_worker.py CONFIG.yaml STEPS THREADS OUT.jsonl

It takes prompts in this project's order, its verifier, and every setting that both sides have from the configuration.
A line is written after each step, a batch of generations with all its updates:
    seconds, generate_s, reward, samples, response_tokens, prompt_tokens, time
generate_s is TRL's sampling alone, without scoring and without the log-probs of the behaviour policy.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from drpo_megatron.config.load import load_config
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.data.prompts import load_prompts
from drpo_megatron.rewards.verifiers import checked_reward, make_verifier

# Behind everything that is installed, and before transformers is imported, which looks for accelerate then.
sys.path.append(str(Path(sys.prefix) / "peers"))
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def arguments(config: RunConfig, steps: int, directory: Path) -> GRPOConfig:
    """The settings of the configuration in TRL's names. The loss is grpo, over the horizon."""
    rollout, optimizer = config.rollout, config.optimizer
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    updates = config.training.updates_per_batch
    loss = {"eps_low": 0.2, "eps_high": 0.28} | config.algorithm.loss_args
    return GRPOConfig(
        output_dir=str(directory),
        use_cpu=True,
        bf16=False,
        seed=config.seed,
        max_steps=steps * updates,
        per_device_train_batch_size=samples // updates,
        gradient_accumulation_steps=1,
        steps_per_generation=updates,
        num_generations=rollout.samples_per_prompt,
        max_completion_length=rollout.sampling.max_new_tokens,
        temperature=rollout.sampling.temperature,
        shuffle_dataset=False,
        beta=0.0,
        loss_type="dr_grpo",
        scale_rewards="none",
        epsilon=loss["eps_low"],
        epsilon_high=loss["eps_high"],
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip_grad,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class Record(TrainerCallback):
    """Collects what a step did, and writes it when its last update is done."""

    def __init__(self, updates: int, out: Path) -> None:
        self.updates, self.out = updates, out
        self.now: dict[str, Any] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % self.updates:
            return
        end = time.perf_counter()
        with self.out.open("a") as file:
            file.write(json.dumps(self.now | {"seconds": end - self.begin, "time": time.time()}) + "\n")
        self.begin, self.now = end, {}


class TimedTrainer(GRPOTrainer):
    """TRL's trainer, with a clock around its sampling."""

    record: Record

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.record.now["generate_s"] = time.perf_counter() - begin
        self.record.now["prompt_tokens"] = sum(map(len, prompt_ids))
        return result


def main() -> None:
    config_path, steps, threads, out = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(threads)
    config = load_config(config_path, ["algorithm.loss=grpo", "algorithm.loss_args={}"])
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    prompts = load_prompts(config.data, tokenizer, config.seed).next(steps * config.rollout.prompts_per_step)
    verifier = make_verifier(config.reward, config.data)
    record = Record(config.training.updates_per_batch, out)

    def reward(completions: list[str], completion_ids: list[Any], number: list[int], **_: Any) -> list[float]:
        values = [
            checked_reward(verifier, text, prompts[n].answer, prompts[n].metadata)[0]
            for text, n in zip(completions, number, strict=True)
        ]
        record.now |= {"reward": sum(values) / len(values), "samples": len(values)}
        record.now["response_tokens"] = sum(map(len, completion_ids))
        return values

    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32),
        args=arguments(config, steps, out.parent / "trl"),
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": p.text, "number": n} for n, p in enumerate(prompts)]),
        callbacks=[record],
    )
    trainer.record = record
    trainer.train()


if __name__ == "__main__":
    main()

"""Real rollouts for `bench loss`: SmolLM2 served by SGLang answers the prompts of its recipe, and transformers computes
the hidden states that the last layer gave for each sampled token.

    python -m drpo_megatron.bench.loss_rollouts OUT.pt
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[2] / "configs" / "smollm2-arithmetic.yaml"
PROMPTS, RESPONSE_TOKENS = 8, 96


def main(out: Path) -> None:
    """Write {hidden_TH, targets_T, logmu_T, sequence_ids_T, weight_VH} of 64 rollouts of at most 96 tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from drpo_megatron.config import load_config
    from drpo_megatron.data import load_prompts
    from drpo_megatron.models.recipes import ensure_model
    from drpo_megatron.rollout.driver import RolloutDriver
    from drpo_megatron.rollout.fleet import fleet_of

    with tempfile.TemporaryDirectory() as directory:
        # The prompts without the instruction to be brief, so that the responses are sentences.
        overrides = [f"tracking.directory={directory}", "data.system_prompt=null"]
        overrides += [f"rollout.sampling.max_new_tokens={RESPONSE_TOKENS}"]
        config = load_config(RECIPE, overrides)
        assert config.model.recipe is not None
        path = ensure_model(config.model.recipe, config.model.path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        with fleet_of(config) as fleet:
            fleet.wait_all()
            fleet.admit(fleet.up(), version=0)
            driver = RolloutDriver(config.rollout, fleet, tokenizer)
            groups = driver.generate(load_prompts(config.data, tokenizer, config.seed).next(PROMPTS))

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # of a class that its files name
    hidden = []
    with torch.no_grad():
        for rollout in rollouts:
            prompt_ids = rollout.prompt.token_ids
            tokens_1T = torch.tensor([prompt_ids + rollout.response_ids])
            hidden.append(model.model(tokens_1T).last_hidden_state[0, len(prompt_ids) - 1 : -1])
    lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
    torch.save(
        {
            "hidden_TH": torch.cat(hidden),
            "targets_T": torch.tensor([token for rollout in rollouts for token in rollout.response_ids]),
            "logmu_T": torch.tensor([logmu for rollout in rollouts for logmu in rollout.logmu]),
            "sequence_ids_T": torch.arange(len(rollouts)).repeat_interleave(lengths),
            "weight_VH": model.lm_head.weight.detach().clone(),
        },
        out,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

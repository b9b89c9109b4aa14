"""The models that are made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from drpo_megatron.models.recipes import ensure_model


@pytest.mark.parametrize("recipe", ["tiny_qwen3", "tiny_qwen3_blocks", "tiny_qwen3_moe"])
def test_no_token_has_a_gradient_of_another_size(tmp_path: Path, recipe: str) -> None:
    """Any token may be sampled, and is an input then: also the one for padding, whose row transformers makes zero."""
    model = AutoModelForCausalLM.from_pretrained(ensure_model(recipe, tmp_path / "model"))
    # Not by the embedding itself, which transformers gives no gradient for padding.
    embedding_VH = model.get_input_embeddings().weight.detach().clone().requires_grad_()
    labels = torch.arange(model.config.vocab_size).flip(0)
    model(inputs_embeds=embedding_VH[None], labels=labels[None]).loss.backward()
    norms_V = embedding_VH.grad.norm(dim=1)
    assert norms_V.max() < 10 * norms_V.median()

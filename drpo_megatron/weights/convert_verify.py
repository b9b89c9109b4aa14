"""What was converted, read again from both sides and compared."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from drpo_megatron.weights import fp8
from drpo_megatron.weights.convert_to_hf import ExportDtype, Exported, Plan, Source, checkpoint_to_hf
from drpo_megatron.weights.hf_io import SafetensorsReader
from drpo_megatron.weights.map import VocabEmbedding, WeightRule

LOGITS_TOKENS = 64
LOGITS_UP_TO_BYTES = 4 * 1000**3
"""Of a model's tensors: larger ones are compared tensor by tensor alone, because both sides would be in memory."""


class VerificationError(Exception):
    """The result is not the source; the message names the tensor."""


def verify_export(checkpoint: str | Path, out_dir: str | Path, plan: Plan, dtype: ExportDtype | None) -> str:
    """Compare every tensor of `out_dir`, mapped back, with the checkpoint; return what was compared.

    To the bit in the written dtype; FP8 within what rounding to nearest leaves. Raises VerificationError.
    """
    source, written = Source.open(Path(checkpoint)), SafetensorsReader(out_dir)
    parameters = [one for shard in plan.shards for one in shard]
    for one in parameters:
        stored, rule = source.reader[one.name][:], source.table.rule(one.name)
        if one.quantized:
            _compare_blocks(one, rule.to_hf([stored.float()]), written)
        else:
            back = rule.from_hf(written, 0, 1)
            _compare_bits(one.name, back, stored.to(back.dtype), rule)
    quantized = sum(one.quantized for one in parameters)
    text = f"verified: {len(parameters) - quantized} parameters mapped back equal the checkpoint's to the bit"
    if dtype is not None:
        text += f" in {dtype if dtype != 'fp8' else 'bf16'}"
    return text + (f", {quantized} in FP8 are within rounding to nearest" if quantized else "")


def verify_import(hf_dir: str | Path, checkpoint: str | Path) -> str:
    """Compare every tensor of a checkpoint, mapped to Hugging Face names, with `hf_dir` to the bit, and the logits of
    random tokens by transformers from both sides; return what was compared. Raises VerificationError.
    """
    source, original = Source.open(Path(checkpoint)), SafetensorsReader(hf_dir)
    tensors = nbytes = 0
    for name, rule in source.rules():
        for hf_name, tensor in rule.to_hf([source.reader[name][:]]).items():
            expected = original[hf_name][:]
            if tensor.dtype != expected.dtype or not _same_bits(tensor, expected):
                raise VerificationError(f"{hf_name} of {hf_dir} is another tensor in {checkpoint}")
            tensors, nbytes = tensors + 1, nbytes + tensor.nbytes
    text = f"verified: {tensors} tensors equal the source's to the bit"
    if nbytes > LOGITS_UP_TO_BYTES:
        return text + f"; logits were not compared, because the model has more than {LOGITS_UP_TO_BYTES / 1e9:g} GB"
    with tempfile.TemporaryDirectory(prefix=".verify.", dir=Path(checkpoint).parent) as beside:
        exported = Path(beside) / "hf"
        checkpoint_to_hf(checkpoint, exported, max_shard_bytes=LOGITS_UP_TO_BYTES)
        largest = float((random_logits(hf_dir) - random_logits(exported)).abs().max())
    if largest != 0:
        raise VerificationError(f"logits of {hf_dir} and of {checkpoint} differ by up to {largest:.3g}")
    return text + f"; logits of {LOGITS_TOKENS} random tokens are equal"


@torch.no_grad()
def random_logits(hf_dir: str | Path) -> torch.Tensor:
    """Logits [tokens, vocabulary], float32, that transformers computes for fixed random tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    tokens_1T = torch.randint(0, model.config.vocab_size, (1, LOGITS_TOKENS), generator=generator)
    logits_TV: torch.Tensor = model(tokens_1T).logits[0]
    return logits_TV


def _compare_bits(name: str, back: torch.Tensor, stored: torch.Tensor, rule: WeightRule) -> None:
    rows = rule.vocab_size if isinstance(rule, VocabEmbedding) else None
    # Padding rows of the vocabulary are in no file.
    if not _same_bits(back[:rows], stored[:rows]):
        raise VerificationError(f"{name} was written as other values: {' + '.join(rule.hf_names)}")


def _compare_blocks(one: Exported, expected: Mapping[str, torch.Tensor], written: SafetensorsReader) -> None:
    for name, weight in expected.items():
        scales = written[name + fp8.SCALE_SUFFIX][:]
        error = (fp8.dequantize(written[name][:], scales) - weight).abs()
        # Written so that NaN fails.
        if not bool((error <= fp8.error_bound(weight, scales)).all()):
            raise VerificationError(f"{name} is off by more than rounding to FP8 leaves: {one.name}")


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN equals itself, and 0 is not -0."""
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )

"""`config.json` of a Hugging Face directory, as the numbers a model is built from. No torch, no Megatron.

The directory is the truth about a model: nothing about the architecture is read from anywhere else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo_megatron.models.families import FAMILIES, FIXED, Activation, Family
from drpo_megatron.models.hf_reader import DEFAULTS, IGNORED, ConfigReader
from drpo_megatron.models.hf_rope import rope_config
from drpo_megatron.models.hf_sections import MLAConfig, MoEConfig, RopeConfig
from drpo_megatron.platform.layout import ParallelLayout


@dataclass(frozen=True)
class HFModelConfig:
    """A decoder. Sizes are of the whole model, before any parallelism; `vocab_size` is unpadded.

    `ffn_hidden_size` is the dense layers'. `head_dim` is the query's and key's; with `mla` the value has its own.
    `zero_centered_norms`: norms scale by 1 + weight. `scaled_embeddings`: the first layer sees the embedding times
    √hidden_size, the output projection does not.

    Behind the last layer the files may hold `num_mtp_layers` layers of multi-token prediction, which are not read.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope: RopeConfig
    eos_token_ids: tuple[int, ...] = ()
    activation: Activation = "silu"
    zero_centered_norms: bool = False
    scaled_embeddings: bool = False
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    num_mtp_layers: int = 0

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the MLP of `layer`, counted from 0, is a mixture of experts."""
        return self.moe is not None and self.moe.layers[layer]

    @classmethod
    def load(cls, hf_dir: str | Path) -> HFModelConfig:
        """Read `hf_dir/config.json`. Raises FileNotFoundError without one, ValueError for what is not supported."""
        path = Path(hf_dir) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: point model.path at a Hugging Face model directory")
        try:
            raw = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): download the model again") from error
        return cls.from_dict(raw, source=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> HFModelConfig:
        """The same from the parsed JSON. `source` names the file in errors."""
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise ValueError(
                f"{source}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
            )
        family = FAMILIES[model_type]
        reader = ConfigReader(raw, source, model_type, DEFAULTS | dict(family.defaults))
        ignored = IGNORED | dict(family.ignored)
        for key, values in (FIXED | dict(family.fixed)).items():
            if key not in ignored:
                reader.only(key, values)
        mla = family.mla(reader) if family.mla else None
        num_heads = reader.size("num_attention_heads")
        hidden_size = reader.size("hidden_size")
        num_kv_heads = reader.optional_size("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise reader.refuse("num_key_value_heads", num_kv_heads, f"because {num_heads} heads do not divide over it")
        hf = cls(
            model_type=model_type,
            num_layers=reader.size("num_hidden_layers"),
            hidden_size=hidden_size,
            ffn_hidden_size=reader.size("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=mla.qk_head_dim if mla else _head_dim(reader, hidden_size, num_heads),
            vocab_size=reader.size("vocab_size"),
            max_position_embeddings=reader.size("max_position_embeddings"),
            rms_norm_eps=reader.number("rms_norm_eps"),
            tied_embeddings=reader.flag("tie_word_embeddings"),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            rope=rope_config(reader, family.rope_types, family.rope_theta),
            eos_token_ids=_token_ids(reader),
            activation=_activation(reader, family),
            zero_centered_norms=family.zero_centered_norms,
            scaled_embeddings=family.scaled_embeddings,
            moe=_moe(reader, family),
            mla=mla,
            num_mtp_layers=_prediction_layers(reader, family),
        )
        _refuse_windows(reader, hf.num_layers)
        reader.finish(ignored)
        return hf


def _head_dim(reader: ConfigReader, hidden_size: int, num_heads: int) -> int:
    head_dim = reader.optional_size("head_dim")
    if head_dim is None and hidden_size % num_heads:
        raise reader.refuse("num_attention_heads", num_heads, f"because {hidden_size} columns do not divide over it")
    head_dim = hidden_size // num_heads if head_dim is None else head_dim
    if head_dim % 2:
        raise reader.refuse("head_dim", head_dim, "because rotary positions turn pairs of dimensions")
    return head_dim


def _token_ids(reader: ConfigReader) -> tuple[int, ...]:
    value = reader.value("eos_token_id")
    return tuple(value) if isinstance(value, list) else () if value is None else (reader.integer("eos_token_id"),)


def _activation(reader: ConfigReader, family: Family) -> Activation:
    reader.only("hidden_act", tuple(family.activations))
    return family.activations[reader.raw.get("hidden_act", next(iter(family.activations)))]


def _moe(reader: ConfigReader, family: Family) -> MoEConfig | None:
    if family.moe is None:
        return None
    moe = family.moe(reader)
    if not 1 <= moe.top_k <= moe.num_experts:
        raise ValueError(
            f"{reader.source}: num_experts_per_tok = {moe.top_k} of {moe.num_experts} experts is not possible"
        )
    if moe.normalize and moe.top_k == 1:
        raise reader.refuse(
            "num_experts_per_tok", 1, "because the one expert's normalized weight is 1 and its router has no gradient"
        )
    return moe


def _prediction_layers(reader: ConfigReader, family: Family) -> int:
    key = "num_nextn_predict_layers"
    if key not in family.defaults:
        return 0
    return 0 if reader.value(key, "num_mtp_layers") is None else reader.integer(key, "num_mtp_layers")


def _refuse_windows(reader: ConfigReader, num_layers: int) -> None:
    kinds = reader.value("layer_types")
    if kinds is not None and kinds != ["full_attention"] * num_layers:
        raise reader.refuse("layer_types", kinds, f"only full_attention, once for each of {num_layers} layers, is")


def padded_vocab_size(vocab_size: int, tensor_parallel: int, multiple: int = 8) -> int:
    """Smallest vocabulary that gives each tensor-parallel rank the same number of rows, a multiple of `multiple`.

    The default of 8 rows is what bf16 tensor cores ask of a matrix dimension (16 bytes).
    """
    step = tensor_parallel * multiple
    return -(-vocab_size // step) * step


def check_layout(hf: HFModelConfig, layout: ParallelLayout) -> None:
    """Raise ValueError when the model does not divide over the ranks of `layout`."""
    tp = layout.tensor
    has_dense_layers = hf.moe is None or not all(hf.moe.layers)
    for what, size in (
        ("attention heads", hf.num_heads),
        ("key-value heads", hf.num_kv_heads),
        ("MLP columns", hf.ffn_hidden_size if has_dense_layers else 0),
        ("hidden columns", hf.hidden_size),
    ):
        if size % tp:
            raise ValueError(f"{size} {what} do not divide over parallel.tensor = {tp}: choose a divisor of {size}")
    layout.layers_per_stage(hf.num_layers)
    if hf.moe is not None:
        _check_experts(hf.moe, layout)
    elif layout.expert > 1 or layout.expert_tensor > 1:
        key = "expert" if layout.expert > 1 else "expert_tensor"
        raise ValueError(f"parallel.{key} is {getattr(layout, key)} and {hf.model_type} is dense: set it to 1")
    elif layout.moe_dispatcher != "alltoall":
        raise ValueError(
            f"parallel.moe_dispatcher is {layout.moe_dispatcher} and {hf.model_type} is dense, without experts to "
            "dispatch to: remove it"
        )
    if (hf.moe or hf.mla) and tp > 1 and not layout.sequence_parallel:
        # Megatron-Core routes each token once only where ranks hold different tokens.
        raise ValueError(
            f"parallel.tensor is {tp} and {hf.model_type} needs parallel.sequence_parallel with it: turn it on"
        )


def _check_experts(moe: MoEConfig, layout: ParallelLayout) -> None:
    for what, size, key, ranks in (
        ("experts", moe.num_experts, "expert", layout.expert),
        ("MLP columns of an expert", moe.ffn_hidden_size, "expert_tensor", layout.expert_tensor),
        ("MLP columns of the shared experts", moe.shared_ffn_hidden_size, "tensor", layout.tensor),
    ):
        if size % ranks:
            raise ValueError(f"{size} {what} do not divide over parallel.{key} = {ranks}: choose a divisor of {size}")

"""`config.json` of a Hugging Face directory, as the numbers a model is built from. No torch, no Megatron.

The directory is the truth about a model: nothing about the architecture is read from anywhere else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo_megatron.models.hf_sections import MLAConfig, MoEConfig, RawConfig, mla_config, moe_config
from drpo_megatron.platform.layout import ParallelLayout

SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `type` is default, linear, llama3 or yarn; the other fields belong to the types that scale.

    Multi-latent attention takes default and yarn, other attention default, linear and llama3. With yarn, cosine and
    sine are multiplied by m(mscale) / m(mscale_all_dim) and attention scores by m(mscale_all_dim)², where
    m(x) = 1 + 0.1 · x · ln(factor).
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class HFModelConfig:
    """A decoder. Sizes are of the whole model, before any parallelism; `vocab_size` is unpadded.

    `ffn_hidden_size` is the dense layers'. `head_dim` is the query's and key's; with `mla` the value has its own.
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
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(
                f"{source}: model_type {model_type!r} is not supported; "
                f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
            )
        _refuse_unsupported(raw, model_type, source)

        need = RawConfig(raw, source).need
        mla = mla_config(raw, model_type, source)
        num_heads = int(need("num_attention_heads"))
        hidden_size = int(need("hidden_size"))
        eos = raw.get("eos_token_id")
        return cls(
            model_type=model_type,
            num_layers=int(need("num_hidden_layers")),
            hidden_size=hidden_size,
            ffn_hidden_size=int(need("intermediate_size")),
            num_heads=num_heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
            head_dim=mla.qk_head_dim if mla else _head_dim(raw, model_type, hidden_size, num_heads),
            vocab_size=int(need("vocab_size")),
            max_position_embeddings=int(need("max_position_embeddings")),
            rms_norm_eps=float(need("rms_norm_eps")),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type in ("qwen3", "qwen3_moe"),
            rope=_rope(raw, source, _MLA_ROPE if mla else _ROPE),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
            moe=moe_config(raw, model_type, source),
            mla=mla,
            num_mtp_layers=int(raw.get("num_nextn_predict_layers") or 0),
        )


def _head_dim(raw: dict[str, Any], model_type: str, hidden_size: int, num_heads: int) -> int:
    if raw.get("head_dim") is not None:
        return int(raw["head_dim"])
    # transformers omits values that equal the class's default, and Qwen3's is not hidden_size / heads.
    return 128 if model_type == "qwen3" else hidden_size // num_heads


def _refuse_unsupported(raw: dict[str, Any], model_type: str, source: str) -> None:
    refused = {
        "attention_bias": bool(raw.get("attention_bias")) and model_type != "qwen2",
        "mlp_bias": bool(raw.get("mlp_bias")),
        "quantization_config": raw.get("quantization_config") is not None,
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_dropout": float(raw.get("attention_dropout") or 0) != 0,
        "pretraining_tp": int(raw.get("pretraining_tp") or 1) != 1,
        # Qwen writes a window size and switches it by use_sliding_window; layer_types says what is in force.
        "sliding_window": bool(raw.get("use_sliding_window"))
        or any(kind != "full_attention" for kind in raw.get("layer_types") or ())
        or (model_type == "llama" and raw.get("sliding_window") is not None),
    }
    for key, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"{source}: {key} = {raw.get(key)!r} is not supported for {model_type}; use another model")


# The keys that each rope type must have.
_ROPE = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_MLA_ROPE = {"default": (), "yarn": ("factor", "original_max_position_embeddings")}
# Those that it may have beside them.
_YARN_OPTIONS = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def _rope(raw: dict[str, Any], source: str, types: dict[str, tuple[str, ...]]) -> RopeConfig:
    """transformers 5 writes one `rope_parameters`; earlier versions write `rope_theta` and `rope_scaling`."""
    parameters = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    theta = parameters.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if float(parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0)) != 1.0:
        raise ValueError(f"{source}: partial_rotary_factor is not supported; use another model")
    if kind not in types:
        raise ValueError(
            f"{source}: rope_type {kind!r} is not supported for {raw['model_type']}; supported are {', '.join(types)}"
        )
    missing = [key for key in types[kind] if parameters.get(key) is None]
    if missing:
        raise ValueError(f"{source}: rope_type {kind!r} needs {', '.join(missing)}")
    options = {key: parameters[key] for key in types[kind]}
    if kind == "yarn":
        _refuse_yarn(parameters, source)
        options |= {key: parameters[key] for key in _YARN_OPTIONS if parameters.get(key)}
    return RopeConfig(theta=float(theta), type=kind, **options)


def _refuse_yarn(parameters: dict[str, Any], source: str) -> None:
    """What Megatron-Core's yarn computes differently from transformers'."""
    refused = {
        "attention_factor": parameters.get("attention_factor") is not None,
        "truncate": not parameters.get("truncate", True),
        # transformers leaves it out of cosine and sine then; Megatron-Core has no such case.
        "mscale_all_dim": bool(parameters.get("mscale_all_dim")) and not parameters.get("mscale"),
        # Without mscale_all_dim transformers ignores it.
        "mscale": float(parameters.get("mscale") or 1) != 1 and not parameters.get("mscale_all_dim"),
    }
    for key, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"{source}: rope_type 'yarn' with {key} = {parameters.get(key)!r} is not supported")


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

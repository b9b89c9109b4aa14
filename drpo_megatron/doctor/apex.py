"""Which parts of NVIDIA apex Megatron-Core uses on this machine, and what it uses in their place.

A run is slower, or ends at its first update, when apex is there in part: Megatron-Core takes each part for itself,
wherever an import succeeds, and says nothing. `PARTS` has an entry for every import of apex in Megatron-Core;
`tests/unit/test_doctor_apex.py` compares it with Megatron-Core's source.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

from drpo_megatron import platform
from drpo_megatron.doctor import FAIL, OK, SKIPPED, Finding

_BUILD = "build apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1 (the Dockerfile does), or uninstall it"


@dataclass(frozen=True)
class Part:
    """One use that Megatron-Core has for apex.

    Args:
        name: of its line in the report, behind "apex: ".
        imports: what Megatron-Core imports, as `module` or `module:attribute`. It takes apex's part when all succeed.
        extension: the compiled module that this part loads when it is first used, where it is not among `imports`.
        before: what of Transformer Engine Megatron-Core tries first, written in the same way. None: nothing.
        use: what Megatron-Core uses it for.
        otherwise: what is used when neither can be imported.
        not_asked: why no run of this project uses the part, whoever offers it. None: runs use it.
    """

    name: str
    imports: tuple[str, ...]
    use: str
    otherwise: str
    extension: str | None = None
    before: str | None = None
    not_asked: str | None = None


_NO_LAYER_NORM = "models here have RMSNorm and no LayerNorm"
_TE_OPTIMIZERS = "transformer_engine.pytorch.optimizers"

PARTS = (
    Part(
        "fused Adam",
        ("apex.optimizers:FusedAdam", "apex.optimizers:FusedSGD"),
        extension="amp_C",
        before=f"{_TE_OPTIMIZERS}:FusedAdam",
        use="updates of parameters",
        otherwise="torch's AdamW",
    ),
    Part(
        "multi-tensor",
        ("amp_C", "apex.multi_tensor_apply:multi_tensor_applier"),
        before=f"{_TE_OPTIMIZERS}:multi_tensor_applier",
        use="gradient norms, clipping and copies of weights",
        otherwise="its own loops over tensors",
    ),
    Part(
        "accumulation",
        ("fused_weight_gradient_mlp_cuda",),
        use="weight gradients of its own linear layers; Transformer Engine's layers add in place by themselves",
        otherwise="a product and an addition each",
    ),
    Part(
        "layer norm",
        ("apex.normalization.fused_layer_norm:FusedLayerNormAffineFunction",),
        extension="fused_layer_norm_cuda",
        use="LayerNorm",
        otherwise="torch's",
        not_asked=_NO_LAYER_NORM,
    ),
    Part(
        "fast norm",
        ("apex.contrib.layer_norm.layer_norm:FastLayerNormFN",),
        use="LayerNorm",
        otherwise="torch's",
        not_asked=_NO_LAYER_NORM,
    ),
    Part(
        "softmax",
        ("scaled_upper_triang_masked_softmax_cuda", "scaled_masked_softmax_cuda", "scaled_softmax_cuda"),
        use="softmax of its own attention",
        otherwise="torch's",
        not_asked="attention is Transformer Engine's, FlexAttention or torch's, which have a softmax of their own",
    ),
    Part(
        "NCCL buffers",
        ("apex.contrib.nccl_allocator",),
        use="communication buffers of Megatron FSDP",
        otherwise="its own",
        not_asked="ranks here use the distributed optimizer",
    ),
)


def examine() -> Iterator[Finding]:
    """A line for each part on a machine with a GPU; one line without, where nothing is imported."""
    if not platform.has_cuda():
        there = "is installed, and not used" if importlib.util.find_spec("apex") else "is not installed, nor used"
        yield Finding(
            "apex", SKIPPED, f"{there} without a GPU: Adam is torch's, and this project adds weight gradients in place"
        )
        return
    for part in PARTS:
        yield finding_of(part)


def finding_of(part: Part) -> Finding:
    """Imports what Megatron-Core would, in its order."""
    name = f"apex: {part.name}"
    error = next((failed for target in part.imports if (failed := import_error(target))), None)
    unloadable = import_error(part.extension) if part.extension and not error else None
    here = f"cannot be imported ({error or unloadable})" if error or unloadable else "can be imported"
    if part.not_asked:
        return Finding(name, SKIPPED, f"{here}, and is not used: {part.not_asked}")
    if part.before and not import_error(part.before):
        return Finding(name, SKIPPED, f"{here}, and is not used: Transformer Engine's comes first")
    if unloadable:
        return Finding(
            name, FAIL, f"Megatron-Core takes it, and {part.extension} cannot be imported ({unloadable}): {_BUILD}"
        )
    if error:
        return Finding(name, SKIPPED, f"{here}; Megatron-Core uses {part.otherwise} for {part.use}")
    return Finding(name, OK, f"can be imported, and Megatron-Core uses it for {part.use}")


def import_error(target: str) -> str | None:
    """The first line of what importing `module` or `module:attribute` says; None when it succeeds."""
    module, _, attribute = target.partition(":")
    try:
        imported = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # OSError: a library that the extension needs is missing
        return str(error).split("\n")[0] or type(error).__name__
    if attribute and not hasattr(imported, attribute):
        return f"{module} has no {attribute}"
    return None

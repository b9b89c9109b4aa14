"""What `drpo doctor` says of apex, against the imports that Megatron-Core's source really has.

Stand-ins on sys.path are apex, Transformer Engine and their extensions.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import megatron.core.utils  # before there are stand-ins, which it would import
import pytest

from drpo_megatron import platform
from drpo_megatron.doctor import FAIL, OK, SKIPPED, Finding, apex

Install = Callable[[dict[str, str]], None]

MEGATRON = Path(megatron.core.utils.__file__).parent
OTHERS_OF_APEX = {"apex"}
"""Megatron-Core asks whether apex itself is there before it takes the layer norm."""
EXTENSIONS = {"amp_C", "fused_weight_gradient_mlp_cuda", "fused_layer_norm_cuda", "fast_layer_norm"}

OPTIMIZERS = "class FusedAdam: ...\nclass FusedSGD: ...\n"
MULTI_TENSOR = "multi_tensor_applier = 'of apex'\n"
AMP_C = "multi_tensor_scale = multi_tensor_l2norm = 'of apex'\n"
TE_OPTIMIZERS = (
    OPTIMIZERS
    + "multi_tensor_applier = 'of Transformer Engine'\n"
    + "multi_tensor_scale = multi_tensor_l2norm = multi_tensor_scale_tensor = multi_tensor_applier\n"
)
APEX = {
    "apex.optimizers": OPTIMIZERS,
    "apex.multi_tensor_apply": MULTI_TENSOR,
    "apex.normalization.fused_layer_norm": "class FusedLayerNormAffineFunction: ...\n",
    "apex.contrib.layer_norm.layer_norm": "class FastLayerNormFN: ...\n",
    "apex.contrib.nccl_allocator": "",
    "amp_C": AMP_C,
    "fused_layer_norm_cuda": "",
    "fused_weight_gradient_mlp_cuda": "",
    "scaled_upper_triang_masked_softmax_cuda": "",
    "scaled_masked_softmax_cuda": "",
    "scaled_softmax_cuda": "",
}
BROKEN = "raise ImportError('libc10.so: undefined symbol: _ZN3c106\\nmore')\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts modules, by their source, where imports find them before anything that is installed."""
    families = ("apex", "transformer_engine", *{name.split(".")[0] for name in APEX})
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in families}

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in families]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def install(sources: dict[str, str]) -> None:
        forget()
        for name, source in sources.items():
            *packages, module = name.split(".")
            directory = tmp_path
            for package in packages:
                directory = directory / package
                directory.mkdir(exist_ok=True)
                (directory / "__init__.py").touch()
            (directory / f"{module}.py").write_text(source)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    forget()
    sys.modules.update(before)


def of(name: str) -> Finding:
    (part,) = [part for part in apex.PARTS if part.name == name]
    return apex.finding_of(part)


def imported_by(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_every_import_of_apex_in_megatron_core_is_a_part() -> None:
    """A new version of Megatron-Core that uses more of apex fails here."""
    known = {target.partition(":")[0] for part in apex.PARTS for target in part.imports} | OTHERS_OF_APEX
    found = set()
    for path in MEGATRON.rglob("*.py"):
        text = path.read_text()
        if "apex" in text or "amp_C" in text or "_cuda" in text:
            names = imported_by(ast.parse(text))
            found |= {n for n in names if n.split(".")[0] == "apex" or n in EXTENSIONS or n.endswith("softmax_cuda")}
    assert found == known


def chosen_by(file: str, wanted: str) -> Any:
    """What the name `wanted` is after Megatron-Core's own `try: import …`, which is taken out of its source."""
    tree = ast.parse((MEGATRON / file).read_text())
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.Try)
        and any(isinstance(n, ast.Name | ast.alias) and _binds(n) == wanted for n in ast.walk(node))
    ]
    names: dict[str, Any] = {
        "__name__": "megatron.core.tried",
        "warnings": warnings,
        "_grad_accum_fusion_available": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(ast.Module([block], []), file, "exec"), names)
    return names[wanted]


def _binds(node: ast.AST) -> str | None:
    if isinstance(node, ast.alias):
        return node.asname or node.name
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None


def test_nothing_is_there(install: Install) -> None:
    install(dict.fromkeys(("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda"), BROKEN))
    for name, instead in {
        "fused Adam": "torch's AdamW",
        "multi-tensor": "its own loops over tensors",
        "accumulation": "a product and an addition",
    }.items():
        assert of(name).state == SKIPPED and "cannot be imported (" in of(name).says
        assert instead in of(name).says
    assert chosen_by("optimizer/__init__.py", "Adam").__module__.startswith("torch.optim")
    assert chosen_by("optimizer/clip_grads.py", "multi_tensor_applier").__name__ == "local_multi_tensor_applier"
    assert chosen_by("tensor_parallel/layers.py", "_grad_accum_fusion_available") is False


def test_apex_with_its_extensions_and_no_transformer_engine(install: Install) -> None:
    install({"transformer_engine": BROKEN} | APEX)
    for name in ("fused Adam", "multi-tensor", "accumulation"):
        assert of(name).state == OK and "Megatron-Core uses it" in of(name).says, of(name)
    assert chosen_by("optimizer/__init__.py", "Adam").__module__ == "apex.optimizers"
    for file in ("optimizer/optimizer.py", "optimizer/clip_grads.py"):
        assert chosen_by(file, "multi_tensor_applier") == chosen_by(file, "multi_tensor_scale_impl") == "of apex"
    assert chosen_by("tensor_parallel/layers.py", "_grad_accum_fusion_available") is True


def test_transformer_engine_comes_first(install: Install) -> None:
    install(APEX | {"transformer_engine.pytorch.optimizers": TE_OPTIMIZERS})
    for name in ("fused Adam", "multi-tensor"):
        finding = of(name)
        assert finding.state == SKIPPED and "can be imported, and is not used: Transformer Engine's" in finding.says
    assert of("accumulation").state == OK, "nothing of Transformer Engine stands before it"
    assert chosen_by("optimizer/__init__.py", "Adam").__module__ == "transformer_engine.pytorch.optimizers"
    assert chosen_by("optimizer/clip_grads.py", "multi_tensor_applier") == "of Transformer Engine"


def test_parts_that_no_run_asks_for(install: Install) -> None:
    unused = [part.name for part in apex.PARTS if part.not_asked]
    assert unused == ["layer norm", "fast norm", "softmax", "NCCL buffers"]
    install(APEX)
    for name in unused:
        assert of(name).state == SKIPPED and of(name).says.startswith("can be imported, and is not used: "), of(name)
    assert chosen_by("fusions/fused_layer_norm.py", "HAVE_FUSED_LAYER_NORM") is True
    install({"fused_layer_norm_cuda": BROKEN})
    assert "cannot be imported (libc10.so: undefined symbol: _ZN3c106)" in of("layer norm").says


def test_apex_without_its_extensions_would_end_the_run(install: Install) -> None:
    """Its FusedAdam can be imported, and refuses to be made."""
    install({"transformer_engine": BROKEN, "amp_C": BROKEN, "apex.optimizers": OPTIMIZERS})
    finding = of("fused Adam")
    assert finding.state == FAIL and "amp_C cannot be imported (libc10.so: undefined symbol" in finding.says
    assert "APEX_CPP_EXT=1 APEX_CUDA_EXT=1" in finding.says
    assert of("multi-tensor").state == SKIPPED, "Megatron-Core's own loops are taken"
    assert chosen_by("optimizer/__init__.py", "Adam").__module__ == "apex.optimizers"
    install({"transformer_engine.pytorch.optimizers": TE_OPTIMIZERS})
    assert of("fused Adam").state == SKIPPED, "Transformer Engine's comes first"


def test_another_package_of_that_name(install: Install) -> None:
    """The package registry's `apex` is not NVIDIA's."""
    install({"transformer_engine": BROKEN, "apex.optimizers": ""})
    assert "apex.optimizers has no FusedAdam" in of("fused Adam").says and of("fused Adam").state == SKIPPED


def test_one_line_without_a_gpu(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    with platform.as_seen_on(None):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name: None)
            (finding,) = apex.examine()
        assert finding.state == SKIPPED and "is not installed" in finding.says
        install({"apex.optimizers": "raise SystemExit('nothing is imported without a GPU')\n"})
        (finding,) = apex.examine()
        assert finding.state == SKIPPED and "is installed, and not used without a GPU" in finding.says
    install({"apex.optimizers": OPTIMIZERS})
    with platform.as_seen_on((9, 0)):
        findings = list(apex.examine())
    assert [finding.name for finding in findings] == [f"apex: {part.name}" for part in apex.PARTS]
    assert all(len(finding.name) <= 19 for finding in findings)

#!/usr/bin/env bash
# Transformer Engine in a directory of its own, for the tests that need it and no GPU: `bash tools/install_te.sh TARGET`.
#
# In the environment itself Megatron-Core would take its CUDA kernels, which abort without a GPU. The package registry
# has no wheel of transformer-engine-torch: one that was built before is taken from DRPO_TE_WHEELS, or from
# ../shared/wheels beside the checkout. Otherwise it is built from its source, about eight minutes, which needs a C++
# compiler and CUDA's headers.
set -euo pipefail

target=${1:?usage: install_te.sh TARGET}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${DRPO_PYTHON:-$root/.venv/bin/python}
version=2.20.2
wheels=${DRPO_TE_WHEELS:-$root/../shared/wheels}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Without their own dependencies: torch and pydantic are installed.
packages=("transformer-engine==$version" "transformer-engine-cu13==$version")
packages+=(onnx onnxscript onnx_ir ml_dtypes nvdlfw-inspect einops importlib_metadata)

wheel=$(find "$wheels" -name "transformer_engine_torch-$version-*.whl" 2>/dev/null | sort | head -n 1)
if [ -z "$wheel" ]; then
  echo "no wheel of transformer-engine-torch $version in $wheels: building one from its source" >&2
  # Its build imports torch and the packages above.
  "$python" -m pip install --quiet --no-deps --target "$work/build" "${packages[@]}"
  PYTHONPATH="$work/build" timeout 3600 "$python" -m pip wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir "$work/wheels" "transformer-engine-torch==$version"
  wheel=$(find "$work/wheels" -name "transformer_engine_torch-*.whl" | head -n 1)
fi
# At once: a second command would replace the folder that the packages share.
"$python" -m pip install --quiet --no-deps --target "$work/te" "$wheel" "${packages[@]}"

PYTHONPATH="$work/te" "$python" -c 'import torch, transformer_engine.pytorch; print("Transformer Engine imports")'
rm -rf "$target"
mkdir -p "$(dirname "$target")"
mv "$work/te" "$target"

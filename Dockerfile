# syntax=docker/dockerfile:1
# The GPU image: the pinned set, SGLang's kernels, Transformer Engine and NVIDIA apex with their extensions compiled.
# docs/slurm.md says how to build it, and how it becomes the .sqsh that configs/clusters/example.yaml names.

# The toolkit must be the one that torch was built with: apex refuses another. It stays in the image because SGLang
# compiles kernels while it serves.
ARG BASE_IMAGE=nvidia/cuda:13.0.3-devel-ubuntu24.04
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="drpo-megatron" \
      org.opencontainers.image.licenses="Apache-2.0"

# A commit, of 8 July 2026: a tag of apex may move, and its set-up always says version 0.1.
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
# A100, H100 and H200, B200: what a cluster file can name as its device.
ARG CUDA_ARCHITECTURES="8.0;9.0;10.0"
# Compilers at a time. Each takes up to 4 GB.
ARG JOBS=8

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      build-essential ca-certificates git ibverbs-providers libibverbs1 libnuma1 python3.12-dev python3.12-venv \
 && rm -rf /var/lib/apt/lists/*

ENV CUDA_HOME=/usr/local/cuda \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/venv/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
RUN python3.12 -m venv /opt/venv

# Before the sources, which change more often than what they need.
WORKDIR /opt/drpo-megatron
COPY requirements/ requirements/
RUN pip install --constraint requirements/constraints-gpu.txt \
      --requirement requirements/base.txt --requirement requirements/image.txt

# Without the variable its set-up may take a compiled extension from elsewhere. cuDNN and NCCL are those that torch
# loads, so their headers are too.
RUN site=/opt/venv/lib/python3.12/site-packages/nvidia \
 && CPATH="$site/cudnn/include:$site/nccl/include" NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS="${JOBS}" \
    pip install --no-build-isolation --constraint requirements/constraints-gpu.txt \
      --requirement requirements/gpu.txt

# Its set-up reads options from the environment. The extensions of apex.contrib, which Megatron-Core does not use with
# the models here, are left out, and so are the submodules that only they need.
RUN git init --quiet /tmp/apex \
 && git -C /tmp/apex fetch --quiet --depth 1 https://github.com/NVIDIA/apex "${APEX_COMMIT}" \
 && git -C /tmp/apex checkout --quiet FETCH_HEAD \
 && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" MAX_JOBS="${JOBS}" \
    pip install --no-build-isolation --no-deps /tmp/apex \
 && rm -rf /tmp/apex

COPY LICENSE README.md pyproject.toml setup.py ./
COPY configs/ configs/
COPY drpo_megatron/ drpo_megatron/
COPY launch/ launch/
RUN pip install --no-build-isolation --no-deps . \
 && pip check

# An extension that does not load would be left out of a run without a word. torch comes first: it loads their libraries.
RUN python -c "import torch, apex, apex_C, amp_C, fused_layer_norm_cuda, fused_weight_gradient_mlp_cuda" \
 && python -c "import torch, transformer_engine.pytorch" \
 && drpo --version

WORKDIR /workspace
CMD ["drpo", "--help"]

"""What ranks on CPU are forked from (`tests/support/pool.py`): these imports take longer than most of the tests."""

import gc

import torch

torch.set_num_threads(1)  # a pool of threads would not survive the fork

from drpo_megatron import platform  # noqa: E402

platform.activate()

import pytest  # noqa: E402, F401
import safetensors.numpy  # noqa: E402
import safetensors.torch  # noqa: E402, F401
import transformers  # noqa: E402, F401

import drpo_megatron.checkpoint.saver  # noqa: E402
import drpo_megatron.training.run  # noqa: E402
import drpo_megatron.training.step  # noqa: E402
import drpo_megatron.weights.exporter  # noqa: E402, F401
import tests.support.leftovers  # noqa: E402
import tests.support.tiny_models  # noqa: E402, F401

gc.collect()
gc.freeze()  # or a rank would go through all of it after every function

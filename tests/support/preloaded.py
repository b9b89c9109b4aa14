"""What ranks on CPU are forked from (`tests/support/launch.py`): these imports take longer than most of the tests."""

import torch

torch.set_num_threads(1)  # a pool of threads would not survive the fork

from drpo_megatron import platform  # noqa: E402

platform.activate()

import drpo_megatron.training.run  # noqa: E402, F401

"""What the ranks of `tests/support/trainer.py` are forked from. A trainer's imports take longer than its run."""

import gc
import importlib
import os

# Read once, at the imports below or at the first tensor: as `launch.local.training_environment` has them.
os.environ.update(OMP_NUM_THREADS="1", THP_MEM_ALLOC_ENABLE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

for module in (
    "tests.support.preloaded",
    "drpo_megatron.training.loop",
    "drpo_megatron.training.main",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.configuration_qwen3",
    "transformers.models.qwen3_moe.configuration_qwen3_moe",
):
    importlib.import_module(module)

gc.collect()
gc.freeze()  # or each run would go through all of it

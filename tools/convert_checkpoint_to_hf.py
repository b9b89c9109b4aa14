"""`drpo convert CHECKPOINT OUT --to hf` under the name that users of Megatron look for.

python tools/convert_checkpoint_to_hf.py runs/NAME/checkpoints/step_000100 OUT --dtype bf16
"""

from drpo_megatron.weights.convert import main

if __name__ == "__main__":
    main("hf", "Write the weights of a checkpoint as a Hugging Face directory.")

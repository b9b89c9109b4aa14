"""`drpo convert HF_DIR OUT --to checkpoint` under the name that users of Megatron look for.

python tools/convert_hf_to_checkpoint.py HF_DIR OUT
"""

from drpo_megatron.weights.convert import main

if __name__ == "__main__":
    main("checkpoint", "Write a Hugging Face directory as a checkpoint that a run of any layout can load.")

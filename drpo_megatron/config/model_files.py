"""Checks of a Hugging Face model directory that read headers and JSON only: seconds even for hundreds of gigabytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Bits of an element, by the names of the safetensors format (sub-byte types exist, so not bytes).
_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "C64": 64}
_BITS |= {"BF16": 16, "F16": 16, "I16": 16, "U16": 16, "BOOL": 8, "I8": 8, "U8": 8}
_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
# The limit of the format itself: a larger number is not a header length.
_MAX_HEADER_BYTES = 100_000_000
_DOWNLOAD = "download it again"


def weight_problems(model_dir: Path) -> Iterator[str]:
    """What is wrong with the safetensors files of `model_dir`: missing, cut off, or not what their headers say."""
    index, single = model_dir / "model.safetensors.index.json", model_dir / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            yield from _file_problems(single, None)
        else:
            yield f"{model_dir} has neither {single.name} nor {index.name}; point model.path at a safetensors model"
        return
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        yield f"{index} is not a safetensors index ({type(error).__name__}: {error}); {_DOWNLOAD}"
        return
    by_file: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        by_file.setdefault(name, set()).add(tensor)
    for name, tensors in sorted(by_file.items()):
        yield from _file_problems(model_dir / name, tensors)


def _file_problems(path: Path, expected: set[str] | None) -> Iterator[str]:
    try:
        header = read_safetensors_header(path)
    except (OSError, ValueError) as error:
        yield f"{error}; {_DOWNLOAD}"
        return
    missing = sorted((expected or set()) - header.keys())
    if missing:
        yield f"{path} lacks {len(missing)} tensors that the index puts there, the first is {missing[0]}; {_DOWNLOAD}"


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name → {dtype, shape, data_offsets}, checked against the size of the file. No weights are read.

    Layout (safetensors format): u64 little-endian header length, the header as JSON, then the tensors without gaps.
    Raises FileNotFoundError, or ValueError for a file that does not agree with itself; both name the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path} is damaged: a header of {length} bytes does not fit its {size} bytes")
        try:
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            spans = {name: _span(entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged: its header is unreadable ({type(error).__name__}: {error})"
            ) from error
    position = 0
    for name, (begin, end, needed) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position or end - begin != needed:
            raise ValueError(
                f"{path} is damaged: tensor {name} lies at {begin}-{end}, its place is {position}-{position + needed}"
            )
        position = end
    if position != size - 8 - length:
        raise ValueError(
            f"{path} is damaged: its header needs {position} bytes of tensors, the file has {size - 8 - length}"
        )
    return header


def _span(entry: dict[str, Any]) -> tuple[int, int, int]:
    begin, end = entry["data_offsets"]
    return int(begin), int(end), math.prod(entry["shape"]) * _BITS[entry["dtype"]] // 8


def tokenizer_problems(model_dir: Path, vocab_size: int, needs_chat_template: bool) -> Iterator[str]:
    """Whether the tokenizer's ids are rows of the embedding, and whether it has a chat template where one is needed."""
    path = model_dir / "tokenizer.json"
    try:
        largest, token = _largest_token(path)
    except FileNotFoundError:
        yield f"{path} does not exist; save a fast tokenizer there with save_pretrained"
    except (ValueError, KeyError, TypeError) as error:
        yield f"{path} cannot be read ({type(error).__name__}: {error}); {_DOWNLOAD}"
    else:
        if largest >= vocab_size:
            yield (
                f"{path} has token {token!r} with id {largest}, but the model's vocabulary has {vocab_size} rows "
                f"(ids to {vocab_size - 1}); use the tokenizer that belongs to the model"
            )
    if needs_chat_template and not _has_chat_template(model_dir):
        yield f"{model_dir} has no chat template; set data.chat_template=false or use a model that has one"


def _largest_token(path: Path) -> tuple[int, str]:
    raw = json.loads(path.read_text())
    vocab = raw["model"]["vocab"]
    # Unigram models store a list of [piece, score], whose position is the id; the others a mapping token → id.
    pairs = (
        [(i, piece[0]) for i, piece in enumerate(vocab)]
        if isinstance(vocab, list)
        else [(i, t) for t, i in vocab.items()]
    )
    pairs += [(added["id"], added["content"]) for added in raw.get("added_tokens") or []]
    largest, token = max(pairs)
    return int(largest), str(token)


def _has_chat_template(model_dir: Path) -> bool:
    if (model_dir / "chat_template.jinja").is_file() or (model_dir / "chat_template.json").is_file():
        return True
    config = model_dir / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text()).get("chat_template"))

"""Prompt sources: validation with file and line, order, resume, chat template, reasoning-gym."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drpo_megatron.config.schema import DataConfig
from drpo_megatron.data import DataError, PromptSource, load_prompts
from drpo_megatron.data.gym import UNSCORABLE_TASKS, make_dataset
from drpo_megatron.data.rows import MAX_REPORTED

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes as tokens, with a chat template; a BOS token in front of plain text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {"<bos>": 0} | {c: i + 1 for i, c in enumerate(sorted(alphabet))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>")
    fast.chat_template = CHATML
    return fast


def config(source: dict[str, Any], **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"source": source, **settings})


def jsonl(path: Path, *lines: str | dict[str, Any]) -> dict[str, Any]:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return {"type": "jsonl", "path": str(path)}


def refused(source: dict[str, Any], tokenizer: Any, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_prompts(config(source, **settings), tokenizer, seed=0)
    return str(caught.value)


def test_jsonl_strings_messages_and_templates(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(
        tmp_path / "d.jsonl",
        {"prompt": "2+2", "answer": 4, "level": 1},
        {
            "prompt": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": "3"},
            ],
            "answer": "x",
        },
    )
    prompts = load_prompts(
        config(source, shuffle=False, system_prompt="S", prompt_template="Q {prompt}?"), tokenizer, seed=0
    ).next(2)
    assert [p.text for p in prompts] == [
        "<system>S<user>Q 2+2?<assistant>",
        "<system>S<user>hi<assistant>yes<user>Q 3?<assistant>",
    ]
    assert [p.id for p in prompts] == ["d.jsonl:1", "d.jsonl:2"]
    assert (prompts[0].answer, prompts[0].metadata) == ("4", {"level": 1})
    # The template's text is tokenized as it is: no second BOS.
    assert tokenizer.decode(prompts[0].token_ids) == prompts[0].text
    plain_source = jsonl(tmp_path / "e.jsonl", {"prompt": "2+2", "answer": "4"})
    plain = load_prompts(config(plain_source, chat_template=False), tokenizer, seed=0).next(1)[0]
    assert (plain.text, plain.token_ids[0], len(plain.token_ids)) == ("2+2", 0, 4)


def test_malformed_rows_are_named_before_training(tmp_path: Path, tokenizer: Any) -> None:
    def user(content: Any) -> dict[str, Any]:
        return {"role": "user", "content": content}

    rows: list[tuple[str | dict[str, Any], str]] = [
        ("{'prompt': 1}", "is not valid JSON"),
        ("", "is empty"),
        ("[1]", "must be an object"),
        ({"answer": "1"}, "has no key 'prompt'; its keys are answer"),
        ({"prompt": "a"}, "has no key 'answer'"),
        ({"prompt": "a", "answer": None}, "'answer' is null"),
        ({"prompt": "a", "answer": [1]}, "the answer must be a string or a number"),
        ({"prompt": 3, "answer": "1"}, "must be a string or a list of chat messages, not int"),
        ({"prompt": " ", "answer": "1"}, "the prompt is empty"),
        ({"prompt": [], "answer": "1"}, "empty list"),
        ({"prompt": ["a"], "answer": "1"}, "chat message 1 must be a mapping"),
        ({"prompt": [user("a"), {"role": "bot", "content": "a"}], "answer": "1"}, "chat message 2 has the role 'bot'"),
        ({"prompt": [user(None)], "answer": "1"}, "must have a string as content, not null"),
        (
            {"prompt": [user("a"), {"role": "assistant", "content": "a"}], "answer": "1"},
            "last chat message is the assistant",
        ),
    ]
    for row, reason in rows:
        text = refused(jsonl(tmp_path / "d.jsonl", {"prompt": "ok", "answer": "1"}, row), tokenizer)
        assert text.startswith(f"{tmp_path / 'd.jsonl'}:2: ") and reason in text, text
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "a", "answer": "\xff"}\n')
    assert "d.jsonl:1: is not UTF-8" in refused({"type": "jsonl", "path": str(tmp_path / "d.jsonl")}, tokenizer)
    assert "has no rows" in refused(jsonl(tmp_path / "empty.jsonl"), tokenizer)
    assert "does not exist" in refused({"type": "jsonl", "path": str(tmp_path / "absent")}, tokenizer)
    many = refused(jsonl(tmp_path / "many.jsonl", *["x"] * (MAX_REPORTED + 5)), tokenizer)
    assert many.count("is not valid JSON") == MAX_REPORTED and "and 5 more rows" in many


def test_settings_that_do_not_suit_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    long = jsonl(tmp_path / "l.jsonl", {"prompt": "a" * 5, "answer": "1"}, {"prompt": "a" * 50, "answer": "1"})
    text = refused(long, tokenizer, max_prompt_tokens=30)
    assert f"{tmp_path / 'l.jsonl'}:2: the prompt has 67 tokens, data.max_prompt_tokens is 30" in text
    assert ":1:" not in text
    chat = jsonl(
        tmp_path / "c.jsonl",
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "1"},
    )
    assert "set data.chat_template=true" in refused(chat, tokenizer, chat_template=False)
    assert "a system message of its own" in refused(chat, tokenizer, system_prompt="S")
    tokenizer.chat_template = None
    try:
        assert "no chat template" in refused(long, tokenizer)
    finally:
        tokenizer.chat_template = CHATML


def test_parquet_with_nested_answer(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "d.parquet"
    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "reward_model": {"ground_truth": f"a{i}"}} for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    source = {"type": "parquet", "path": str(path), "answer_key": "reward_model.ground_truth"}
    prompts = load_prompts(config(source, shuffle=False), tokenizer, seed=0).next(3)
    assert [(p.text, p.answer) for p in prompts] == [(f"<user>q{i}<assistant>", f"a{i}") for i in range(3)]
    assert "reward_model.x" in refused(source | {"answer_key": "reward_model.x"}, tokenizer)
    path.write_bytes(path.read_bytes()[:-10])
    assert "d.parquet: is not a readable parquet file" in refused(source, tokenizer)


def test_order_and_resume(tokenizer: Any) -> None:
    source = {"type": "function", "function": "drpo_megatron.data.examples:repeat_digit", "size": 7}

    def fresh(seed: int = 5) -> PromptSource:
        return load_prompts(config(source), tokenizer, seed)

    prompts = fresh()
    first, second = [p.id for p in prompts.next(7)], [p.id for p in prompts.next(7)]
    assert len(set(first)) == 7 and set(first) == set(second) and first != second
    assert [p.id for p in fresh().next(14)] == first + second
    assert [p.id for p in fresh(seed=6).next(7)] != first
    resumed = fresh()
    prompts = fresh()
    prompts.next(10)
    resumed.restore(json.loads(json.dumps(prompts.state())))
    assert resumed.next(9) == prompts.next(9)
    with pytest.raises(DataError, match="seed = 5, now it is 6"):
        fresh(seed=6).restore(prompts.state())


def wrong_at_3(index: int, seed: int) -> Any:
    return {"prompt": "a"} if index != 3 else {"prompt": "a", "metadata": {"x": object()}}


def raises(index: int, seed: int) -> Any:
    raise KeyError("lost")


def test_function_errors(tokenizer: Any) -> None:
    here = __name__
    source = {"type": "function", "function": f"{here}:wrong_at_3", "size": 5}
    assert f"{here}:wrong_at_3[3]: the metadata cannot be written as JSON" in refused(source, tokenizer)
    assert "raised KeyError: 'lost'" in refused(source | {"function": f"{here}:raises"}, tokenizer)
    assert "returned None" in refused(source | {"function": "builtins:print"}, tokenizer)
    assert "has no function 'absent'" in refused(source | {"function": f"{here}:absent"}, tokenizer)


def test_reasoning_gym(tokenizer: Any) -> None:
    source = {"type": "reasoning_gym", "task": "basic_arithmetic", "size": 30, "seed": 3, "options": {"max_terms": 2}}
    settings = config(source)
    prompts = load_prompts(settings, tokenizer, seed=0).next(30)
    assert len({p.id for p in prompts}) == 30
    dataset = make_dataset(settings.source)  # type: ignore[arg-type]
    assert all(dataset.score_answer(p.answer, p.metadata["entry"]) == 1.0 for p in prompts)
    assert sum(dataset.score_answer("no", p.metadata["entry"]) for p in prompts) == 0.0
    json.dumps([p.metadata for p in prompts])
    for task in sorted(UNSCORABLE_TASKS):
        assert f"'{task}' scores its own reference answers 0" in refused(source | {"task": task}, tokenizer)
    assert "did you mean 'basic_arithmetic'" in refused(source | {"task": "basic_aritmetic"}, tokenizer)
    assert "it takes: min_terms, max_terms" in refused(source | {"options": {"max_term": 2}}, tokenizer)
    parts = [{"name": "chain_sum", "weight": 1, "config": {}}, {"name": "gsm_symbolic", "weight": 1, "config": {}}]
    mixed = load_prompts(
        config(source | {"task": "composite", "options": {"datasets": parts}}), tokenizer, seed=0
    ).next(30)
    assert {p.metadata["entry"]["metadata"]["source_dataset"] for p in mixed} == {"chain_sum", "gsm_symbolic"}

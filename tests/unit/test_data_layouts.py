"""Files in the layouts of known data sets: what becomes the prompt and the answer, and what math-verify says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drpo_megatron.config.schema import DataConfig, FileData, RewardConfig
from drpo_megatron.data import DataError
from drpo_megatron.data.boxed import last_boxed
from drpo_megatron.data.rows import Row, open_rows
from drpo_megatron.rewards.verifiers import checked_reward, make_verifier

GSM8K = {"question": "Ann has 1,000 eggs and buys 234.", "answer": "1000 + 234 = <<1000+234=1234>>1,234\n#### 1,234"}
MATH = {
    "problem": "What is $1/4 + 1/2$?",
    "level": "Level 2",
    "type": "Algebra",
    "solution": r"First \boxed{1}, no: $\frac{1}{4}+\frac{2}{4}=\boxed{\frac{3}{4}}$.",
}
MATH_500 = {"problem": "Who?", "solution": "…", "answer": r"\text{Evelyn}", "subject": "Algebra", "level": 2}
AIME = {"ID": "2024-I-1", "Problem": "Find m+n.", "Answer": 33}
AIME_TEXT = {"question": "Find the angle.", "answer": r"036^\circ"}
DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "Solve. The last line is Answer: $Answer.\n\nWhat is 17+17?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4"},
}
ROWS = {"gsm8k": GSM8K, "math": MATH, "aime": AIME, "dapo": DAPO}


def source(path: Path, *rows: dict[str, Any], layout: str = "auto", **keys: str) -> FileData:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileData.model_validate({"type": path.suffix[1:], "path": str(path), "layout": layout, **keys})


def only(path: Path, row: dict[str, Any], layout: str = "auto") -> Row:
    return open_rows(source(path, row, layout=layout))[0]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_known_layouts_are_told_by_their_columns(tmp_path: Path, suffix: str) -> None:
    def read(row: dict[str, Any]) -> tuple[Any, str | None]:
        found = only(tmp_path / f"d.{suffix}", row)
        return found.prompt, found.answer

    assert read(GSM8K) == (GSM8K["question"], "1234")
    assert read(MATH) == (MATH["problem"], r"\frac{3}{4}")
    assert read(MATH_500) == ("Who?", r"\text{Evelyn}")
    assert read(AIME) == ("Find m+n.", "33")
    assert read(AIME_TEXT) == ("Find the angle.", "36")
    assert read({"problem": "p", "answer": "070", "url": "u"}) == ("p", "70")
    assert read({"id": 0, "problem": "p", "solution": r"\boxed{204}"}) == ("p", "204")
    assert read(DAPO) == (DAPO["prompt"], "34")
    assert read({"prompt": "2+2", "answer": 4}) == ("2+2", "4")
    for layout, row in ROWS.items():
        named = only(tmp_path / f"n.{suffix}", row, layout)
        assert (named.prompt, named.answer) == read(row)
    kept = only(tmp_path / f"m.{suffix}", MATH)
    assert kept.metadata == {key: MATH[key] for key in ("level", "type", "solution")} and kept.id == f"m.{suffix}:1"


def test_what_fits_two_layouts_or_none_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    both = {"id": 60, "problem": "p", "solution": r"\boxed{204}", "answer": "204", "year": "2024"}
    with pytest.raises(DataError, match=r"d\.jsonl:1: the columns \(id, .*\) fit the layouts math and aime; set"):
        open_rows(source(path, both))
    for layout in ("math", "aime"):
        assert only(path, both, layout).answer == "204"
    with pytest.raises(DataError, match="fit the layouts dapo and keys"):
        open_rows(source(path, DAPO | {"answer": "34"}))
    with pytest.raises(DataError, match=r"\(text\) fit no layout; set the source's layout to one of gsm8k"):
        open_rows(source(path, {"text": "a"}))


def test_rows_that_are_not_of_the_layout_are_named(tmp_path: Path) -> None:
    bad = {
        "gsm8k": (GSM8K | {"answer": "1234"}, "ends with '####'"),
        "math": (MATH | {"solution": r"\boxed{3"}, r"has the answer in \\boxed"),
        "aime": (AIME | {"Answer": "x+1"}, "an integer from 0 to 999, not 'x.1'"),
        "dapo": (DAPO | {"reward_model": {"style": "rule"}}, "the answer in `reward_model.ground_truth`"),
    }
    path = tmp_path / "d.jsonl"
    for layout, (row, reason) in bad.items():
        with pytest.raises(DataError, match=rf"d\.jsonl:2: .*{reason}"):
            open_rows(source(path, ROWS[layout], row))
        with pytest.raises(DataError, match=rf"d\.jsonl:1: has no column .* of the layout {layout}; its columns are x"):
            open_rows(source(path, {"x": 1}, layout=layout))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{\frac{1}{\sqrt{2}}} then", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed 17.", "17"),
        ("17", None),
    ],
)
def test_last_boxed(text: str, found: str | None) -> None:
    assert last_boxed(text) == found


def test_math_verify_judges_answers_to_all_layouts(tmp_path: Path) -> None:
    """From the files to the reward. In processes of their own: tests/slow/test_reward_memory.py."""
    judged = {
        "gsm8k": (GSM8K, ["1000 + 234 makes\n#### 1,234", r"\boxed{1234}"], ["#### 1,244", "234"]),
        "math": (MATH, [r"\boxed{\frac{3}{4}}", r"It is $\boxed{0.75}$."], [r"\boxed{\frac{4}{3}}", "no idea"]),
        "math-500": (MATH_500, [r"\boxed{\text{Evelyn}}"], [r"\boxed{\text{Bob}}"]),
        "aime": (AIME, [r"\boxed{033}", "The answer is 33."], [r"\boxed{330}"]),
        "aime-text": (AIME_TEXT, [r"\boxed{36}", r"\boxed{36^\circ}"], [r"\boxed{63^\circ}"]),
        "dapo": (DAPO, ["17+17 is that.\nAnswer: 34", "Answer: $34$"], ["Answer: 35", "17 twice"]),
    }
    data = DataConfig(source=source(tmp_path / "d.jsonl", GSM8K))
    verifier = make_verifier(RewardConfig(type="math_verify"), data)
    for name, (row, right, wrong) in judged.items():
        found = only(tmp_path / f"{name}.jsonl", row)
        for text in [*right, *wrong]:
            scored = checked_reward(verifier, text, found.answer, found.metadata)
            assert scored == (float(text in right), None), (name, text)

"""The pages for people: what they name exists in the code, and each can be reached from the index."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from drpo_megatron.commands import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_STOPPED
from drpo_megatron.config import setting_reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROSE = ("operating.md", "faq.md", "concepts.md")

SETTINGS = set(re.findall(r"^\| `([\w.]+)` \|", setting_reference(), re.MULTILINE))
SECTIONS = {key.split(".")[0] for key in SETTINGS}
METRICS = set(re.findall(r"[\w@]+/[\w@]+|`grad_norm`", (DOCS / "metrics.md").read_text()))


def known_metric(name: str) -> bool:
    """`a/b`, a family `a/*`, and the short forms of the page: `_max`, and `perf/VERB_s`."""
    family, last = name.split("/")
    page = (DOCS / "metrics.md").read_text()
    if last == "*":
        return any(metric.startswith(family + "/") for metric in METRICS)
    short = re.escape("_" + last.rsplit("_", 1)[-1])
    same_row = rf"`{re.escape(name.rsplit('_', 1)[0])}\w*`[^|]*`{short}`"
    verb = re.fullmatch(r"perf/(generate|score|advantages|pack|train|sync|save)_s", name)
    return name in METRICS or bool(verb) or re.search(same_row, page) is not None


def spans(page: str) -> list[str]:
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(), flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PROSE)
def test_metrics_and_settings_of_the_page_exist(page: str) -> None:
    checked = 0
    for span in spans(page):
        name = span.split("=")[0]
        if re.fullmatch(r"[a-z0-9]+/[\w@*]+", name) and not (ROOT / "drpo_megatron" / name).exists():
            if name.split("/")[0] in {m.split("/")[0] for m in METRICS}:
                assert known_metric(name), (page, span)
                checked += 1
        elif re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", name) and name.split(".")[0] in SECTIONS:
            assert name in SETTINGS or any(s.startswith(name + ".") for s in SETTINGS), (page, span)
            checked += 1
    assert checked > (40 if page == "operating.md" else 5), page


def test_a_wrong_name_would_be_found() -> None:
    assert known_metric("mismatch/abs_dlogp_max") and known_metric("drpo/weight_q01") and known_metric("mismatch/*")
    assert not known_metric("mismatch/abs_dlogp_min") and not known_metric("drpo/weight_q05")
    assert "rollout.max_staleness" in SETTINGS and "rollout.staleness" not in SETTINGS


def messages() -> list[str]:
    """Every string of the code, an f-string or a %-format with … where something is filled in."""
    found = []
    for folder in ("drpo_megatron", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[sd]", "…", node.value))
    return found


def test_quoted_messages_are_said_by_the_code() -> None:
    """A quotation is found when its parts between … follow each other in one string, or one begins where another's
    filled-in part is.
    """
    said = messages()
    quoted = re.findall(r"“([^”]+)”", (DOCS / "operating.md").read_text())
    assert len(quoted) > 40
    for quotation in quoted:
        parts = [part.strip(" ;:,") for part in quotation.replace("\n", " ").split("…")]
        parts = [part for part in parts if part]
        pattern = re.compile(".*".join(re.escape(part).replace(r"\ ", r"\s+") for part in parts), re.DOTALL)
        one_string = any(pattern.search(text) for text in said)
        each_part = len(parts) > 0 and all(len(p) > 9 and any(p in text for text in said) for p in _clauses(parts))
        assert one_string or each_part, quotation


def _clauses(parts: list[str]) -> list[str]:
    """Of a message that one string holds and another is filled into: what stands on either side of a colon."""
    return [clause.strip() for part in parts for clause in part.split(": ") if clause.strip()]


def test_exit_codes_are_those_of_the_command() -> None:
    page = (DOCS / "operating.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| ([^|]+) \|", page, re.MULTILINE))
    assert set(map(int, rows)) == {0, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, EXIT_INTERRUPTED}
    assert "refused" in rows[str(EXIT_REFUSED)] and "interrupted" in rows[str(EXIT_INTERRUPTED)]
    assert "watchdog" in rows[str(EXIT_STOPPED)] and "failed" in rows[str(EXIT_FAILED)]


@pytest.mark.parametrize("page", ["README.md", *(p.name for p in sorted(DOCS.glob("*.md")) if p.name != "README.md")])
def test_links_to_headings_exist(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", (DOCS / page).read_text()):
        linked = (DOCS / target).resolve() if target else DOCS / page
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs, (page, target, anchor)


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    linked = set(re.findall(r"\]\(([^)#]+)\)", index))
    pages = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")} - {"README.md"}
    assert pages <= linked, pages - linked
    assert "(docs/README.md)" in (ROOT / "README.md").read_text()


def test_the_recipes_page_is_what_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("recipes_page", ROOT / "tools" / "recipes_page.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.PAGE.read_text()
    assert set(re.findall(r"<!-- recipes:(\w+) -->", page)) == set(script.TABLES)
    assert script.written(page) == page, "python tools/recipes_page.py"

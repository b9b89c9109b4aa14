"""The pages for people: what they name exists in the code, and each can be reached from the index."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from drpo_megatron.commands import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_STOPPED
from drpo_megatron.config import setting_reference

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROSE = ("operating.md", "faq.md", "concepts.md")

SETTINGS = set(re.findall(r"^\| `([\w.]+)` \|", setting_reference(), re.MULTILINE))
FILES = ("jsonl", "json", "md", "txt", "log", "yaml", "sbatch", "py")


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


SAID = messages()
VERBS = ("generate", "advantages", "pack", "train", "sync", "save")
METRICS = {text for text in SAID if re.fullmatch(r"[a-z0-9]+/[\w@]+", text)} | {f"perf/{verb}_s" for verb in VERBS}
FAMILIES = {"loss", "reward", "drpo", "mismatch", "ratio", "policy", "staleness", "response", "train", "perf", "pack"}
FAMILIES |= {"memory", "sync", "fp8", "save", "rollout", "router", "moe"}


def known_metric(name: str) -> bool:
    """A metric by its whole name, or a family as `mismatch/*`."""
    return name in METRICS or (name.endswith("/*") and any(metric.startswith(name[:-1]) for metric in METRICS))


def spans(page: str) -> list[str]:
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(), flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PROSE)
def test_metrics_and_settings_of_the_page_exist(page: str) -> None:
    checked = 0
    for span in spans(page):
        name = re.split(r"[=:]", span)[0]
        if re.fullmatch(r"[a-z0-9]+/[\w@*]+", name) and name.split("/")[0] in FAMILIES:
            assert known_metric(name), (page, span)
        elif re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", name) and name.split(".")[-1] not in FILES:
            assert name in SETTINGS or any(s.startswith(name + ".") for s in SETTINGS), (page, span)
        else:
            continue
        checked += 1
    assert checked > (80 if page == "operating.md" else 8), (page, checked)


def test_a_wrong_name_would_be_found() -> None:
    assert known_metric("mismatch/abs_dlogp_max") and known_metric("drpo/weight_q01") and known_metric("mismatch/*")
    assert (
        not known_metric("mismatch/abs_dlogp_min")
        and not known_metric("drpo/weight_q05")
        and not known_metric("drop/*")
    )
    assert "rollout.max_staleness" in SETTINGS and "rollout.staleness" not in SETTINGS


def test_quoted_messages_are_said_by_the_code() -> None:
    """A quotation is found when its parts between … follow each other in one string of the code."""
    quoted = re.findall(r"“([^”]+)”", (DOCS / "operating.md").read_text())
    assert len(quoted) > 35
    missing = []
    for quotation in quoted:
        parts = [part.strip() for part in " ".join(quotation.split()).split("…")]
        pattern = re.compile(".*".join(re.escape(part).replace(r"\ ", r"\s+") for part in parts), re.DOTALL)
        if not any(pattern.search(text) for text in SAID):
            missing.append(quotation)
    assert not missing


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


@pytest.mark.parametrize("script", ["recipes_page", "scaling_page"])
def test_a_page_is_what_its_script_writes(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")  # where Python looks first that starts the script
    made = importlib.import_module(script)
    page = made.PAGE.read_text()
    assert importlib.import_module("tables").written(page, made.TABLES) == page, f"python tools/{script}.py"

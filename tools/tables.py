"""The tables of a documentation page that a script writes, between `<!-- table:NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

Tables = Mapping[str, Callable[[], str]]


def written(page: str, tables: Tables) -> str:
    """`page` with every table made anew. Raises ValueError when it does not have each of `tables` and no other."""
    marker = r"<!-- table:(\w+) -->"
    if (on_page := set(re.findall(marker, page))) != set(tables):
        raise ValueError(f"tables on the page or in the script alone: {', '.join(sorted(on_page ^ set(tables)))}")

    def one(match: re.Match[str]) -> str:
        return f"<!-- table:{match[1]} -->\n{tables[match[1]]()}\n<!-- end -->"

    return re.sub(rf"{marker}\n.*?<!-- end -->", one, page, flags=re.DOTALL)


def main(path: Path, tables: Tables, about: str | None) -> None:
    """The command line of a script with the docstring `about`, which writes the tables of the page at `path`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parsed = parser.parse_args()
    page = path.read_text()
    made = written(page, tables)
    if parsed.check:
        sys.exit(made != page)
    path.write_text(made)

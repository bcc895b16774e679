# SPDX-License-Identifier: MIT
"""Puts the table and the curves of results/learning/ into the site, so that no page holds a copy of a figure."""

import csv
from pathlib import Path
from typing import Any

LEARNING = Path(__file__).resolve().parent.parent / "results" / "learning"
PLACE = "<!-- scores.csv -->"


def on_files(files: Any, config: Any) -> Any:
    """Add the picture of the learning curves to the files of the site."""
    from mkdocs.structure.files import File  # here, so that the table can be tested without mkdocs

    files.append(File.generated(config, "curves.png", abs_src_path=str(LEARNING / "curves.png")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of scores where a page asks for it."""
    return markdown.replace(PLACE, table(LEARNING / "scores.csv"))


def table(path: Path) -> str:
    """Return a CSV file as a table of Markdown."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    names = [name.replace("_", " ") for name in header]
    lines = [names, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

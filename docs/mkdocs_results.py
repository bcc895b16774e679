# SPDX-License-Identifier: MIT
"""Puts the tables and the curves of the measurements into the site, so that no page holds a copy of a figure.

Pages link to them as files of the repository, where they can be read without the site.
"""

import csv
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
FILE = re.compile(r"\]\(\.\./((?:results|benchmarks)/\S+\.(?:png|csv|json))\)")
TABLE = re.compile(r"^\[[^\]]*\]\(\.\./(results/\S+\.csv)\)$", re.MULTILINE)
"""A link with a line of its own."""


def on_files(files: Any, config: Any) -> Any:
    """Add what pages show, or link to, to the files of the site."""
    from mkdocs.structure.files import File  # here, so that the rest can be tested without mkdocs

    for path in sorted(linked()):
        files.append(File.generated(config, name(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put tables and pictures where a page links to them, and leave out the marks of code that a test runs."""
    markdown = markdown.replace("```python\n# run\n", "```python\n")
    markdown = TABLE.sub(lambda link: table(ROOT / link[1]), markdown)
    return FILE.sub(lambda link: f"]({name(link[1])})", markdown)


def linked() -> set[str]:
    """Return the files of the repository that pages show, or link to beside the tables that they show."""
    pages = (TABLE.sub("", page.read_text(encoding="utf-8")) for page in DOCS.glob("*.md"))
    return {path for page in pages for path in FILE.findall(page)}


def name(path: str) -> str:
    """Return what a file is called in the site, which has no directories of them."""
    return path.replace("/", "_")


def table(path: Path) -> str:
    """Return a CSV file as a table of Markdown."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    names = [title.replace("_", " ") for title in header]
    lines = [names, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

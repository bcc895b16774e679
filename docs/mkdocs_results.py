# SPDX-License-Identifier: MIT
"""Puts the tables and the curves of results/ into the site, so that no page holds a copy of a figure.

Pages link to them as files of the repository, where they can be read without the site.
"""

import csv
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "results"
PICTURE = re.compile(r"\]\(\.\./results/(\S+\.png)\)")
TABLE = re.compile(r"^\[[^\]]*\]\(\.\./results/(\S+\.csv)\)$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures that pages show to the files of the site."""
    from mkdocs.structure.files import File  # here, so that the rest can be tested without mkdocs

    for path in sorted(pictures()):
        files.append(File.generated(config, name(path), abs_src_path=str(RESULTS / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put tables and pictures where a page links to them, and leave out the marks of code that a test runs."""
    markdown = markdown.replace("```python\n# run\n", "```python\n")
    markdown = PICTURE.sub(lambda link: f"]({name(link[1])})", markdown)
    return TABLE.sub(lambda link: table(RESULTS / link[1]), markdown)


def pictures() -> set[str]:
    """Return the pictures that pages show, as paths in results/."""
    return {path for page in DOCS.glob("*.md") for path in PICTURE.findall(page.read_text(encoding="utf-8"))}


def name(path: str) -> str:
    """Return what a picture is called in the site, which has no directories of them."""
    return path.replace("/", "_")


def table(path: Path) -> str:
    """Return a CSV file as a table of Markdown."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = list(csv.reader(file))
    names = [title.replace("_", " ") for title in header]
    lines = [names, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
